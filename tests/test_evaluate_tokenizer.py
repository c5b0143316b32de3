"""Evaluating tokenizers: the numbers of each image, independence of batches and devices, files, clear errors."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image

from checkpoints_tools import vae as vae_files
from configs import vae as vae_config
from repae_jax import evaluate_tokenizer, images
from repae_jax.distributed import sharding
from repae_jax.job import build
from repae_jax.metrics import image_quality
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.sampling.load_model import LoadedTokenizer, load_vae
from repae_jax.training import checkpoint

SIDE = 12


class Pictures:
    """Noise, except that record 0 has a black and a white half; those in `bad` cannot be decoded."""

    image_size = SIDE

    def __init__(self, count=20, bad=()):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
        self.pixels[0] = np.repeat([0, 255], SIDE // 2)[:, None, None]
        self.bad = set(bad)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"broken {i}")
        return {"image": self.pixels[i], "label": 0}

    def name(self, i):
        return f"picture-{i}"


def features_of(pixels):
    """Stub for Inception: means of the colors over each half, [N, 6]."""
    return pixels.reshape(len(pixels), 2, -1, 3).mean(axis=2).reshape(len(pixels), -1) / 255


class Network:
    """Stub for InceptionNetwork."""

    checksum = "0123"

    def __call__(self, pixels):
        return SimpleNamespace(pool=features_of(pixels))


class Extent:
    """Stub for LPIPS: largest minus smallest value of the originals."""

    def init(self, key, *inputs):
        return {"params": jnp.ones(())}

    def apply(self, variables, originals, recon):
        assert recon.shape == originals.shape
        return variables["params"] * (originals.max(axis=(1, 2, 3)) - originals.min(axis=(1, 2, 3)))


@pytest.fixture(scope="module")
def vae():
    """A random VAE of factor 2."""
    module = AutoencoderKL(latent_channels=2, channels=8, channel_multipliers=(1, 1), num_res_blocks=1, norm_groups=4)
    inputs = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1, SIDE // 2, SIDE // 2, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        spread = np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 2
        return (rng.standard_normal(leaf.shape) / spread + (len(leaf.shape) == 1)).astype(np.float32)

    return LoadedTokenizer(module, jax.tree.map(draw, shapes), None)


def compare(vae, source, records=None, *, devices=8, **options):
    options = {"batch_size": 8, "latents": "sampled", "seed": 0, "features_fn": features_of, **options}
    records = np.arange(len(source)) if records is None else np.asarray(records)
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    return evaluate_tokenizer.compare_all(vae, source, records, mesh=mesh, **options)


@pytest.fixture(scope="module")
def compared(vae):
    return compare(vae, Pictures())


def test_values_of_the_mean_by_hand(vae):
    source = Pictures(8)
    made = compare(vae, source, latents="mode")

    @jax.jit
    def reconstruct(pixels):
        posterior = vae.module.apply({"params": vae.params}, images.to_float(pixels), method="encode")
        return vae.module.apply({"params": vae.params}, posterior.mean, method="decode")

    recon = np.asarray(reconstruct(source.pixels))
    rounded = np.floor(127.5 * recon + 128).clip(0, 255).astype(np.uint8)  # LightningDiT's
    np.testing.assert_array_equal(made.pairs[::2], source.pixels)
    assert np.abs(made.pairs[1::2].astype(int) - rounded).max() <= 1  # float rounding at a gray level's edge
    decibels = -10 * np.log10(((source.pixels - rounded.astype(float)) ** 2).mean(axis=(1, 2, 3)) / 255**2)
    np.testing.assert_allclose(made.values["psnr"], decibels, atol=1e-2)
    expected = image_quality.ssim(images.to_float(source.pixels), recon.clip(-1, 1), 2)
    np.testing.assert_allclose(made.values["ssim"], expected, atol=1e-4)
    expected = image_quality.ssim(source.pixels.astype(np.float32), rounded.astype(np.float32), 255)
    np.testing.assert_allclose(made.values["ssim_pixels"], expected, atol=1e-3)
    sides = (gaussian_stats(features_of(made.pairs[start::2])) for start in (0, 1))
    assert made.rfid == pytest.approx(frechet_distance(*next(sides), *next(sides)), rel=1e-9)


def test_pixels_are_rounded_not_truncated():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(images.to_uint8(images.to_float(levels) + np.float32(1 / 255)), levels)


@pytest.mark.parametrize("batch_size, devices", [(16, 8), (3, 1)])
def test_batches_and_devices_change_nothing(vae, compared, batch_size, devices):
    made = compare(vae, Pictures(), batch_size=batch_size, devices=devices)
    np.testing.assert_array_equal(made.records, np.arange(20))
    for name, values in compared.values.items():
        np.testing.assert_allclose(made.values[name], values, rtol=1e-3, err_msg=name)
    assert made.rfid == pytest.approx(compared.rfid, rel=1e-2)
    assert np.abs(made.pairs.astype(int) - compared.pairs).max() <= 1
    assert len(made.pairs) == 2 * evaluate_tokenizer.SHOWN


def test_noise_depends_on_seed_and_record_alone(vae, compared):
    some = [3, 7, 8, 19]
    made = compare(vae, Pictures(), some, features_fn=None)
    assert made.rfid is None
    np.testing.assert_allclose(made.values["psnr"], compared.values["psnr"][some], rtol=1e-4)
    other, mean = (compare(vae, Pictures(), some, **changed) for changed in ({"seed": 1}, {"latents": "mode"}))
    for changed in (other, mean):
        assert (np.abs(changed.values["psnr"] - made.values["psnr"]) > 1e-4).all()
    # two records of the same image get different noise
    same = Pictures(8)
    same.pixels[:] = same.pixels[1]
    assert len(set(compare(vae, same).values["psnr"])) == 8
    assert np.ptp(compare(vae, same, latents="mode").values["psnr"]) < 1e-4


def test_undecodable_images_do_not_count(vae, compared):
    made = compare(vae, Pictures(bad=(0, 9, 16, 17, 18, 19)))  # the last block holds none
    good = [i for i in range(20) if i not in (0, 9, 16, 17, 18, 19)]
    np.testing.assert_array_equal(made.records, good)
    np.testing.assert_allclose(made.values["psnr"], compared.values["psnr"][good], rtol=1e-4)
    assert [record for record, _ in made.bad_records] == [0, 9, 16, 17, 18, 19]
    assert made.bad_records[0][1] == "OSError: broken 0"
    with pytest.raises(ValueError, match="none of the 3 images can be decoded, first picture-0: OSError: broken 0"):
        compare(vae, Pictures(3, bad=range(3)))


def test_images_that_are_not_finite_are_refused(vae):
    broken = LoadedTokenizer(vae.module, jax.tree.map(lambda leaf: leaf * np.nan, vae.params), None)
    with pytest.raises(ValueError, match="reconstructions of 8 of 8 images hold nan or infinity, first picture-0, picture-1"):
        compare(broken, Pictures())


def test_lpips_gets_images_from_minus_one_to_one(vae, monkeypatch):
    """Not those of [-3, 1] of the code that trained the published weights."""
    monkeypatch.setattr(evaluate_tokenizer, "LPIPS", Extent)
    assert compare(vae, Pictures(8), lpips=jnp.ones(())).values["lpips"][0] == 2


def test_means_leave_exact_images_out():
    warnings = []
    values = {"psnr": np.array([20.0, np.inf, 30.0]), "ssim": np.array([0.2, 1.0, 0.3])}
    assert evaluate_tokenizer.mean_values(values, warnings.append) == {"psnr": 25.0, "ssim": 0.5}
    assert "1 of 3 images came out exactly" in warnings[0]
    assert evaluate_tokenizer.mean_values({"psnr": np.array([np.inf])}, warnings.append) == {"psnr": None}


@pytest.mark.parametrize("count, text", [(2048, "has rank 2047 at most"), (2049, "higher than from 50,000"), (50_000, None)])
def test_too_few_images_for_rfid(count, text):
    warnings = []
    evaluate_tokenizer.check_count(count, 2048, warnings.append)
    assert [text in warning for warning in warnings] == ([True] if text else [])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_folder(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "diffusers"
    vae_files.save_diffusers(folder, vae.module, jax.device_get(vae.params), {"mean": np.zeros(2), "var": np.ones(2)})
    return folder


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Nine images of many sizes, no class folders, and one that is broken."""
    folder = tmp_path_factory.mktemp("val")
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "4b.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a tokenizer after step 7, on digits of 16 pixels."""
    job = build.build(small.config({"data.image_size": 16}, vae_config), jax.devices()[:1])
    folder = tmp_path_factory.mktemp("run")
    state = small.random_state(job).replace(step=np.int32(7))
    with checkpoint.Checkpointer(folder) as checkpointer:
        checkpointer.save(7, state, {"next_batch": 7, "bad_records": [], "records": 10}, job.config)
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return load_vae(workdir)


def run(*arguments):
    return evaluate_tokenizer.run(evaluate_tokenizer.parse_args([str(argument) for argument in arguments]))


def test_a_file_and_a_folder_of_images(vae_folder, picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_tokenizer.inception_features, "load_network", lambda path, batch_size, prepare: Network())
    monkeypatch.setattr(evaluate_tokenizer, "LPIPS", Extent)
    arguments = (
        vae_folder, "--data", f"folder:path={picture_folder}", "--image_size", "16", "--batch_size", "8", "--inception", "file",
        "--lpips_vgg16", "random", "--lpips_linear", "random", "--out", tmp_path / "made" / "x.json",
    )  # fmt: skip
    path, result = run(*arguments)
    assert path == tmp_path / "made" / "x.json" and json.loads(path.read_text()) == result
    assert list(result["metrics"]) == ["rfid", "psnr", "ssim", "ssim_pixels", "lpips"]
    assert all(np.isfinite(value) for value in result["metrics"].values())
    protocol = result["protocol"]
    assert protocol["images"] == 9 and protocol["images_of_the_source"] == 10 and protocol["undecodable"] == 1
    assert protocol["inception"] == {"weights": "file", "fingerprint": Network.checksum}
    assert "ADM's center crop" in protocol["preprocessing"] and protocol["latents"] == "sampled" and protocol["seed"] == 0
    assert result["step"] is None and result["kind"] == "tokenizer"
    assert [entry["image"] for entry in result["undecodable"]] == ["4b.png"]
    decibels = [entry["psnr"] for entry in result["worst"]]
    assert len(decibels) == 9 and decibels == sorted(decibels) and result["worst"][0]["image"].endswith(".png")
    for text in ("RANDOM weights", "1 of 10 images cannot be decoded", "covariance of 2048 features has rank 8"):
        assert any(text in warning for warning in result["warnings"]), text
    with Image.open(tmp_path / "made" / "x.png") as picture:
        assert picture.size == (8 * 66 + 2, 3 * 66 + 2)  # 18 images of 16 pixels, enlarged
    with pytest.raises(ValueError, match="x.json, .*x.png exists; choose another --out"):
        run(*arguments)


def test_a_run_has_defaults(workdir):
    path, result = run(workdir, "--num_images", "16", "--batch_size", "16", "--latents", "mode")
    assert path == workdir / "evaluations" / "tokenizer-0000007-digits-16px-16-mode.json" and path.exists()
    assert path.with_suffix(".png").exists()
    assert result["step"] == 7 and result["protocol"]["image_size"] == 16 and result["protocol"]["seed"] is None
    assert list(result["metrics"]) == ["psnr", "ssim", "ssim_pixels"]
    for text in ("no --data: these are the images that the run trained on", "rFID is left out", "LPIPS is left out"):
        assert any(text in warning for warning in result["warnings"]), text
    path, result = run(workdir, "--data", "digits:split=test", "--image_size", "8", "--num_images", "8", "--batch_size", "8")
    assert path.name == "tokenizer-0000007-digits-test-8px-8-sampled-seed0.json"
    assert list(result["metrics"]) == ["psnr"] and any("SSIM is left out" in warning for warning in result["warnings"])
    assert not any("no --data" in warning for warning in result["warnings"])


@pytest.mark.slow
def test_a_run_with_the_real_networks(workdir):
    arguments = ("--inception", "random", "--lpips_vgg16", "random", "--lpips_linear", "random")
    _, result = run(workdir, "--data", "digits:split=test", "--num_images", "8", "--batch_size", "8", *arguments)
    assert result["metrics"]["rfid"] > 0 and result["metrics"]["lpips"] > 0
    assert sum("RANDOM weights" in warning for warning in result["warnings"]) == 2


def test_records_are_spread():
    np.testing.assert_array_equal(evaluate_tokenizer._choose_records(4, 10), [0, 2, 5, 7])
    np.testing.assert_array_equal(evaluate_tokenizer._choose_records(None, 3), [0, 1, 2])
    np.testing.assert_array_equal(evaluate_tokenizer._choose_records(3, 3), [0, 1, 2])


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--batch_size", "9"), "--batch_size=9 is not a multiple of the 8 devices"),
        (("--num_images", "99999"), "--num_images=99999: there are 1442"),
        (("--data", "nowhere"), "'nowhere' is no folder, and no source"),
        (("--data", "digits:split=val"), "split is 'val'; allowed"),
        (("--data", "digits:colour=red"), "has no argument colour"),
        (("--lpips_vgg16", "random"), "give 'random' for both, or two files"),
    ],
)
def test_bad_arguments(workdir, loaded, monkeypatch, extra, message):
    monkeypatch.setattr(evaluate_tokenizer, "load_vae", lambda source, step: loaded)
    if "--batch_size" in extra:
        monkeypatch.setattr(evaluate_tokenizer, "load_vae", lambda *_: pytest.fail("weights were read before"))
    with pytest.raises(ValueError, match=message):
        run(workdir, *extra)
    assert not list(workdir.glob("evaluations/*1442*"))


def test_what_a_vae_file_needs(vae_folder, picture_folder, tmp_path):
    data, size, out = ("--data", picture_folder), ("--image_size", "16"), ("--out", tmp_path / "x")
    for arguments, message in (
        ((*size, *out), "is no run of ours, whose config tells its images: give --data"),
        ((*data, *out), "config tells the size of its images: give --image_size"),
        ((*data, *size), "no folder of a run to keep the result in: give --out"),
        ((*data, "--image_size", "15", *out), "images of 15 pixels: .* 2 x 2 pixels; allowed as --image_size: multiples of 2"),
        ((*data, *size, *out, "--step", "3"), "AutoencoderKL, which has no step 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(vae_folder, *arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below"):
        run(vae_folder, "--data", tmp_path / "empty", *size, *out)
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        run(vae_folder, *data, *size, *out, "--inception", tmp_path / "missing.pth")
    assert not list(tmp_path.glob("x*"))


def test_no_vae_there(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(tmp_path / "nowhere", "--data", "digits:split=test")
    np.savez(tmp_path / "sit.npz", **{"x_embedder.proj.weight": np.zeros((4, 4, 1, 1), np.float32)})
    with pytest.raises(ValueError, match="SiT, REPA or DiT weights without a VAE"):
        run(tmp_path / "sit.npz", "--data", "digits:split=test")


def test_mistakes_end_in_one_line(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_tokenizer", str(workdir), "--step", "3"])
    with pytest.raises(SystemExit) as caught:
        evaluate_tokenizer.main()
    assert str(caught.value.code).startswith("error: ") and "\n" not in str(caught.value.code)
    monkeypatch.setattr(evaluate_tokenizer, "compare_all", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["evaluate_tokenizer", str(workdir)])
    with pytest.raises(SystemExit, match="130"):
        evaluate_tokenizer.main()
    assert capsys.readouterr().err.endswith("interrupted: nothing was written; the same command starts again\n")
    with pytest.raises(SystemExit):
        evaluate_tokenizer.parse_args([str(workdir), "--num_images", "0"])
    assert "--num_images: 0 must be at least 1" in capsys.readouterr().err
