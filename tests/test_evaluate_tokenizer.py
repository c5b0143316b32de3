"""The command that evaluates tokenizers: files, defaults, clear errors."""

import json
import sys

import jax
import numpy as np
import pytest
import small
from PIL import Image
from tokenizer_stub import Extent, Network, random_vae

from checkpoints_tools import vae as vae_files
from configs import vae as vae_config
from repae_jax import evaluate_tokenizer
from repae_jax.evaluation import tokenizer
from repae_jax.job import build
from repae_jax.sampling.load_model import load_vae
from repae_jax.training import checkpoint


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    vae = random_vae()
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


@pytest.mark.integration
def test_a_file_and_a_folder_of_images(vae_folder, picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_tokenizer.inception_features, "load_network", lambda path, batch_size, prepare: Network())
    for module in (evaluate_tokenizer, tokenizer):
        monkeypatch.setattr(module, "LPIPS", Extent)
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


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
def test_what_a_vae_file_needs(vae_folder, picture_folder, tmp_path):
    data, size, out = ("--data", picture_folder), ("--image_size", "16"), ("--out", tmp_path / "x")
    for arguments, message in (
        ((*size, *out), "is no run of ours, whose config tells its images: give --data"),
        ((*data, *out), "config tells the size of its images: give --image_size"),
        ((*data, *size), "no folder of a run to keep the result in: give --out"),
        ((*data, "--image_size", "15", *out), "images of 15 pixels: .* 2 x 2 pixels; allowed as --image_size: multiples of 2"),
        ((*data, *size, *out, "--step", "3"), "VAE, which has no step 3"),
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


@pytest.mark.integration
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
