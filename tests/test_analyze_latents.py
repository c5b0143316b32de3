"""Analysis of a tiny run, its older checkpoint and its exported VAE, side by side."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import small
from PIL import Image

from checkpoints_tools.convert import extract_vae
from checkpoints_tools.vit import save_encoder
from repae_jax import data
from repae_jax.analyze_latents import __main__ as command
from repae_jax.analyze_latents import encoding, hidden_states, numbers, sources
from repae_jax.distributed import sharding
from repae_jax.job import build
from repae_jax.models import encoders as vision_encoders
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling.load_model import load_model, load_vae
from repae_jax.training import checkpoint

VIT = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
TRANSFORMS = ["none", "scale 0.5", "turn 90°"]


@pytest.fixture(scope="module", autouse=True)
def few_transforms():
    with pytest.MonkeyPatch.context() as patch:
        few = {name: encoding.TRANSFORMS[name] for name in TRANSFORMS}
        patch.setattr(encoding, "TRANSFORMS", few)  # each is a program to compile
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a vision encoder."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny-vit"
    tiny = vision_encoders.make_encoder(VIT, 8, image_size=8)
    save_encoder(folder, tiny.module, jax.device_get(vision_encoders.init_params(tiny, jax.random.key(0))))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, encoder):
    """A run with checkpoints 2 and 4; its weights are drawn, which spares compiling its training."""
    workdir = tmp_path_factory.mktemp("run") / "repae"
    job = build.build(small.config({"encoders.target.weights": str(encoder)}), jax.devices())
    with checkpoint.Checkpointer(workdir) as checkpointer:
        for step in (2, 4):
            checkpointer.save(step, small.random_state(job, seed=step).replace(step=np.int32(step)), {}, job.config)
    return workdir


@pytest.fixture(scope="module")
def vae(tmp_path_factory, workdir):
    folder = tmp_path_factory.mktemp("exported") / "vae"
    extract_vae(workdir, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return load_vae(workdir)


@pytest.fixture(scope="module")
def trained(workdir):
    return load_model(workdir)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory, workdir, vae):
    """Folder of an analysis of three."""
    out = tmp_path_factory.mktemp("made") / "deep" / "analysis"
    analyze(f"early={workdir}@2", workdir, vae, "--num_images", "40", "--out", out)
    return out


@pytest.fixture(scope="module")
def with_cknna(workdir):
    """analysis.json of the run alone, in its folder."""
    path = analyze(workdir, "--num_images", "24", "--cknna_images", "40", "--timesteps", "0", "0.5", "--cknna")
    return json.loads(path.read_text())


def analyze(*arguments):
    return command.run(command.parse_args(list(map(str, arguments))))


def numbers_of(folder):
    return {about["name"]: about for about in json.loads((folder / "analysis.json").read_text())["models"]}


@pytest.mark.integration
def test_what_is_written(analysis):
    content = json.loads((analysis / "analysis.json").read_text())
    assert content["kind"] == "analysis" and len(content["rgb_spectrum"]) == 16
    assert [about["name"] for about in content["models"]] == ["early", "repae", "vae"]
    assert [about["step"] for about in content["models"]] == [2, 4, None]
    assert content["protocol"]["data"] == "digits" and content["protocol"]["num_images"] == 40
    assert content["protocol"]["mean_errors_over"] == ["scale 0.5", "turn 90°"]
    assert content["warnings"] == ["no --data: these are the images that the first run trained on"]
    early, whole, exported = (about["vae_fingerprint"] for about in content["models"])
    assert early != whole == exported
    for about in content["models"]:
        assert about["latent_shape"] == [4, 4, 4] and len(about["spectrum"]) == 16 and about["spectrum"][0] == 1
        assert set(about["channels"]) >= {"mean", "std", "skewness", "quantile_99", "collapsed"} and about["cknna"] == []
        assert all(len(values) == 4 for values in about["channels"].values())
        assert 1 <= about["numbers"]["participation_ratio"] <= about["numbers"]["effective_rank"] <= 4
        assert [row["transform"] for row in about["equivariance"]] == TRANSFORMS
        assert about["equivariance"][0]["latent_error"] == 0 < about["equivariance"][1]["latent_error"]
    assert sorted(path.name for path in analysis.iterdir()) == [
        "analysis.json", "channels.png", "equivariance.png", "pca.png", "spectrum.png"
    ]  # fmt: skip
    for picture in analysis.glob("*.png"):
        pixels = np.asarray(Image.open(picture))
        assert pixels.shape[1] > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, picture.name


@pytest.mark.integration
def test_an_exported_vae_has_the_numbers_of_its_run_and_an_older_checkpoint_has_others(analysis):
    by_name = numbers_of(analysis)
    for name, value in by_name["repae"]["numbers"].items():
        assert by_name["vae"]["numbers"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert by_name["early"]["numbers"]["spatial_variance"] != by_name["repae"]["numbers"]["spatial_variance"]


@pytest.mark.integration
def test_numbers_do_not_depend_on_the_batch_size(analysis, vae, tmp_path):
    same = ("--data", "digits:split=train", "--image_size", "8", "--num_images", "40")
    analyze(vae, *same, "--batch_size", "16", "--out", tmp_path)
    for name, value in numbers_of(tmp_path)["vae"]["numbers"].items():
        assert numbers_of(analysis)["vae"]["numbers"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.integration
def test_cknna_of_every_block(with_cknna, workdir):
    rows = with_cknna["models"][0]["cknna"]
    measures = ("cknna_paper", "cknna_platonic_code", "mutual_knn", "cka")
    assert [(row["timestep"], row["measure"]) for row in rows] == [(t, name) for t in (0, 0.5) for name in measures]
    assert {row["encoder"] for row in rows} == {"tiny-vit"}
    assert all(len(row["blocks"]) == 2 and all(-1 <= value <= 1 for value in row["blocks"]) for row in rows)
    about = with_cknna["protocol"]["cknna"]
    assert about["num_images"] == 40 and about["k"] == 10 and about["labels"] == "null"
    assert about["encoders"]["tiny-vit"]["image_size"] == 8 and len(about["encoders"]["tiny-vit"]["fingerprint"]) == 16
    assert len(with_cknna["models"][0]["sit_fingerprint"]) == 16
    assert "CKNNA of 40 images" in with_cknna["warnings"][1] and "mutual_knn is 0.26 by chance" in with_cknna["warnings"][1]
    assert (workdir / "analysis" / "cknna.png").exists(), "the default place"


@pytest.mark.integration
def test_hidden_states_are_the_networks(trained):
    """They are the averaged SiT's at normalized latents; noise belongs to an image, not to its place in the batch."""
    z = np.random.default_rng(0).normal(size=(8, *trained.latent_shape)).astype(np.float32)
    run, labels, key = hidden_states.make_hidden_states(trained), np.arange(8, dtype=np.int32), jax.random.key(0)
    clean = run(trained.params, z, np.arange(8), 0.0, labels, key)
    expected = trained.nets.sit.apply({"params": trained.params["sit"]}, z, np.zeros(8), labels, method="mean_tokens")
    np.testing.assert_allclose(clean, expected, rtol=1e-4, atol=1e-5)
    noisy = np.asarray(run(trained.params, z, np.arange(8), 0.5, labels, key))
    turned = run(trained.params, z[::-1], np.arange(8)[::-1], 0.5, labels[::-1], key)
    np.testing.assert_allclose(np.asarray(turned)[:, ::-1], noisy, rtol=1e-4, atol=1e-5)
    assert np.abs(noisy - clean).max() > 1e-3


@pytest.mark.integration
def test_normalized_latents_are_what_training_sees(trained, loaded):
    stats = ChannelStats(mean=np.full(4, 2.0, np.float32), var=np.full(4, 4.0, np.float32))
    trained = dataclasses.replace(trained, params={**trained.params, "latent_stats": stats})
    source = data.make_source("digits", 8)
    z = hidden_states.normalized_latents(trained, "x", source, np.arange(5), 32)
    model = encoding.encode_images(sources.Source("x", "x", None), loaded, source, np.arange(5), 32, sharding.make_mesh(1))
    np.testing.assert_allclose(z, (model.latents - 2) / 2, rtol=1e-3, atol=1e-4)


def broken(vae, change):
    """A VAE whose layer before the latents is changed."""
    params = jax.tree.map(np.array, jax.device_get(vae.params))
    params["quant_conv"] = jax.tree.map(change, params["quant_conv"])
    return dataclasses.replace(vae, params=params)


@pytest.mark.integration
def test_collapsed_latents_are_labeled(workdir, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_vae", lambda *_: broken(loaded, np.zeros_like))
    analyze(workdir, "--num_images", "16", "--out", tmp_path)
    about = numbers_of(tmp_path)["repae"]
    assert about["collapsed"] and about["numbers"]["collapsed_channels"] == 4
    assert about["numbers"]["effective_rank"] is None and about["numbers"]["scale_error"] is None
    assert about["spectrum"] == [None] * 16 and (tmp_path / "pca.png").exists()
    assert "-" in command.summary(tmp_path / "analysis.json")


@pytest.mark.integration
def test_latents_that_are_not_finite_are_named(workdir, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_vae", lambda *_: broken(loaded, lambda x: np.full_like(x, np.nan)))
    with pytest.raises(ValueError, match="repae: latents of 16 of 16 images are not finite, first of digits train #"):
        analyze(workdir, "--num_images", "16", "--out", tmp_path)


def test_names_and_steps(tmp_path):
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    parse = sources.parse_sources
    assert [(s.name, s.path, s.step) for s in parse([f"best={run}@400", str(run)])] == [
        ("best", str(run), 400), ("run", str(run), None)
    ]  # fmt: skip
    assert [s.name for s in parse([f"{run}@1", f"{run}@2"])] == ["run@1", "run@2"]
    assert [s.name for s in parse(["x/a/vae", "x/b/vae"])] == ["a/vae", "b/vae"]
    assert [s.step for s in parse([f"{run}@1", str(run)], step=7)] == [1, 7]
    odd = tmp_path / "lr=1e-4@2"
    odd.mkdir()
    assert parse([str(odd)])[0].path == str(odd)
    with pytest.raises(ValueError, match="same name: a; tell them apart with NAME=SOURCE"):
        parse([f"a={run}@1", f"a={run}@2"])
    with pytest.raises(ValueError, match="same name"):
        parse([str(run), str(run)])


def test_images_are_drawn_once_each():
    source = data.make_source("digits", 8)
    drawn = sources.draw_records(source, 100, 0)
    assert len(set(drawn)) == 100 and (np.diff(drawn) > 0).all() and drawn[-1] > 1000
    assert not np.array_equal(drawn, sources.draw_records(source, 100, 1))
    assert len(sources.draw_records(source, 10**6, 0)) == 1442


def test_encoders_of_the_runs():
    config = {"encoders": {"a": {"weights": "org/vit", "image_size": 8}, "b": {"weights": "random", "image_size": None}}}
    assert sources.choose_encoders([], [None, config]) == {"vit": ("org/vit", 8)}
    assert sources.choose_encoders(["org/vit@224", "other/vit"], []) == {
        "vit": ("org/vit", 224), "other/vit": ("other/vit", None)
    }  # fmt: skip
    config["encoders"].pop("a")
    with pytest.raises(ValueError, match="no SOURCE is a run with a trained encoder: name one"):
        sources.choose_encoders([], [config])


@pytest.mark.integration
@pytest.mark.parametrize(
    "extra, message",
    [
        (("--image_size", "9"), "repae: image size 9 is not a multiple of the VAE's factor 2; allowed: e.g. 8 or 10"),
        (("--batch_size", "9"), "--batch_size=9 is not a multiple of the 8 devices"),
        (("--step", "7"), "7.*2, 4"),
        (("--cknna", "--cknna_images", "11"), "11 images are too few for CKNNA with k=10"),
        (("--cknna", "no/such/encoder/at/all"), "no/such/encoder"),
        (("--data", "nowhere"), "'nowhere' is no folder, and no source"),
    ],
)
def test_bad_arguments(workdir, loaded, tmp_path, monkeypatch, extra, message):
    monkeypatch.setattr(command, "load_vae", lambda path, step: loaded if step is None else load_vae(path, step))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analyze(workdir, "--num_images", "8", *(() if "--out" in extra else ("--out", tmp_path)), *extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_vae_alone(vae, analysis, tmp_path):
    whole = ("--data", "digits", "--image_size", "8")
    with pytest.raises(ValueError, match="no SOURCE is a run of ours.*give --data and --image_size"):
        analyze(vae, "--out", tmp_path)
    with pytest.raises(ValueError, match="--vae is for one SOURCE"):
        analyze(vae, "other", *whole, "--vae", "x")
    with pytest.raises(ValueError, match="give --out"):
        analyze(vae, *whole)
    with pytest.raises(ValueError, match="vae is a VAE: it has no SiT for --cknna"):
        analyze(vae, *whole, "--out", tmp_path, "--cknna")
    with pytest.raises(ValueError, match="analysis holds analysis.json, pca.png, .*: give another --out, or move it away"):
        analyze(vae, *whole, "--out", analysis)


@pytest.mark.integration
def test_too_much_for_the_memory(workdir, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_vae", lambda *_: loaded)
    monkeypatch.setattr(encoding, "MAX_BYTES", 2**10)
    with pytest.raises(ValueError, match=r"latents of 8 images by 1 VAEs take 0.0 GiB of memory; .* use fewer images"):
        analyze(workdir, "--num_images", "8", "--out", tmp_path)


def test_the_published_number_of_images_fits_with_the_largest_sit():
    size = 4 * 28 * sources.PUBLISHED_COUNT * 1152
    encoding.check_bytes(size, "hidden states", hidden_states.MAX_BYTES)
    with pytest.raises(ValueError, match="hidden states take 12.0 GiB of memory; allowed: 8; use fewer images"):
        encoding.check_bytes(10 * size, "hidden states", hidden_states.MAX_BYTES)


@pytest.mark.integration
def test_labels_of_a_folder_without_classes(workdir, tmp_path):
    """They are asked for, and never taken for class 0."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no class subfolders"):
        analyze(workdir, "--data", tmp_path, "--labels", "own", "--cknna", "--out", tmp_path / "out")


@pytest.mark.integration
def test_pictures_that_exist_are_kept(workdir, tmp_path):
    (tmp_path / "pca.png").write_text("mine")
    with pytest.raises(ValueError, match="holds pca.png: give another --out"):
        analyze(workdir, "--out", tmp_path)
    assert (tmp_path / "pca.png").read_text() == "mine"


@pytest.mark.integration
def test_errors_are_means_over_what_all_models_were_measured_under(workdir, loaded):
    source = data.make_source("digits", 8)
    model = encoding.encode_images(sources.Source("x", "x", None), loaded, source, np.arange(4), 32, sharding.make_mesh(1))
    rows = [{**row, "latent_error": error} for row, error in zip(model.equivariance, (0, 1, 2))]
    model = dataclasses.replace(model, equivariance=rows)
    all_of_them = numbers.describe(model, 2, {"none", "scale 0.5", "turn 90°"})["numbers"]
    assert all_of_them["scale_error"] == 1 and all_of_them["rotation_error"] == 2
    assert np.isnan(numbers.describe(model, 2, {"none", "turn 90°"})["numbers"]["scale_error"])


@pytest.mark.integration
def test_a_broken_image_is_named(workdir, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_vae", lambda *_: loaded)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png.* cannot be read .*repair or remove it"):
        analyze(workdir, "--data", folder, "--out", tmp_path / "out")


def test_mistakes_end_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["analyze_latents", str(tmp_path / "nothing"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: "):
        command.main()
    with pytest.raises(SystemExit):
        command.parse_args(["x", "--num_images", "0"])
    with pytest.raises(SystemExit):
        command.parse_args(["x", "--cknna", "--timesteps", "0.5", "1.5"])


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = command.parse_args(["~/a", "b=~/c@3", "--data=~/images", "--out=~/out"])
    assert [source.path for source in sources.parse_sources(args.sources)] == [f"{tmp_path}/a", f"{tmp_path}/c"]
    assert (args.data, args.out) == (f"{tmp_path}/images", f"{tmp_path}/out")


def test_transforms():
    x = np.arange(2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    for name, transform in encoding.TRANSFORMS.items():
        side = round(8 * float(name.split()[1])) if name.startswith("scale") else 8
        assert transform(x).shape == (2, side, side, 3), name
    assert encoding.transforms(6) == ["none", "scale 0.5", "turn 90°"]
    assert encoding.transforms(5) == ["none", "turn 90°"]
