"""Images that are no squares, from training to the report, at the smallest size: 8 x 12 pixels, 4 x 6 latents."""

import json
import shutil

import jax
import numpy as np
import pytest
import small
from command_line import error_of
from feature_stub import StubNetwork
from PIL import Image

import repae_jax
from checkpoints_tools.convert import extract_vae
from configs import ldm
from repae_jax import cache_latents, evaluate_tokenizer, sample, train
from repae_jax.analyze_latents import __main__ as analysis
from repae_jax.analyze_latents import encoding
from repae_jax.data import latents
from repae_jax.evaluate import measuring
from repae_jax.evaluate.__main__ import parse_args
from repae_jax.report import __main__ as report

pytestmark = pytest.mark.integration
SIZE = (8, 12)
STEPS = {"steps": 4, "checkpoint.every": 2, "checkpoint.keep_last": 2, "hooks.samples_every": 4, "hooks.images": 4}
WIDE = {"data.image_size": SIZE, "encoders.target.image_size": SIZE}


def joint(changes):
    return small.config({**STEPS, "hooks.reconstructions_every": 4, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(Folder of a joint run of four steps, its state)."""
    folder = tmp_path_factory.mktemp("run") / "repae"
    state, finished = train.train(joint(WIDE), folder)
    assert finished
    return folder, jax.device_get(state)


def test_training_and_its_pictures(run):
    folder, state = run
    assert state.sit.params["pos_embed"]["table"].shape[1] == 24
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["skipped"] == 0 for line in lines)
    for kind, rows in (("samples", 2), ("reconstructions", 4)):  # pictures are enlarged eight times, with white between
        with Image.open(folder / kind / "0000004.png") as picture:
            assert picture.size == (2 + 2 * 98, 2 + rows * 66), kind


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(run, tmp_path):
    folder, whole = run
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    state, finished = train.train(joint(WIDE), again)
    assert finished and small.differing(state, whole) == []
    with pytest.raises(ValueError, match=r"data.image_size: stored \[8, 12\], given 8"):
        train.train(joint({}), again)


def measured(source, reference, *more):
    """The FID of images against a reference."""
    words = [source, "--reference", reference, "--inception", "weights.pth", "--batch_size", "8", *more]
    _, result = measuring.run(parse_args([*map(str, words)]))
    assert result["protocol"]["image_size"] == [8, 12]
    return result["metrics"]["fid"]


@pytest.mark.slow
def test_samples_and_their_scores(run, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_network", lambda _, batch_size: StubNetwork(batch_size))
    folder, drawn, real = run[0], ["--num_samples", "24", "--steps", "2"], tmp_path / "real.npz"
    words = ["--workdir", str(folder), *drawn, "--batch_size", "8", "--out", str(tmp_path / "made")]
    npz = sample.run(sample.parse_args(words))
    making = ["--make_reference", str(real), "--data", "digits:split=test", "--inception", "weights.pth"]
    measuring.make_reference(parse_args([*making, "--image_size=8,12"]))
    with np.load(npz) as made, np.load(real) as reference:
        assert made["arr_0"].shape == (24, *SIZE, 3) and reference["arr_0"].shape == (355, *SIZE, 3)
    expected = measured(npz, real, "--out", tmp_path / "a.json")
    assert measured(npz, "digits:split=test", "--out", tmp_path / "b.json") == pytest.approx(expected)
    assert measured(folder, real, *drawn) == pytest.approx(expected)
    making[1], making[3] = str(tmp_path / "other.npz"), str(npz)
    with pytest.raises(ValueError, match="the images of .* have 8 x 12 pixels, not 8"):
        measuring.make_reference(parse_args([*making, "--image_size=8"]))


@pytest.mark.slow
def test_the_tokenizer_and_its_latents(run, tmp_path, monkeypatch):
    folder, _ = run
    words = [str(folder), "--num_images", "16", "--batch_size", "8"]
    path, result = evaluate_tokenizer.run(evaluate_tokenizer.parse_args(words))
    assert result["protocol"]["image_size"] == SIZE and "digits-8-12px-16" in path.name
    assert 0 < result["metrics"]["psnr"] < 100
    with pytest.raises(ValueError, match="images of 8 x 13 pixels: this VAE makes one latent of 2 x 2 pixels"):
        evaluate_tokenizer.run(evaluate_tokenizer.parse_args([*words, "--image_size=8,13"]))

    few = {name: encoding.TRANSFORMS[name] for name in ("none", "scale 0.5", "turn 90°")}  # each is a program to compile
    monkeypatch.setattr(encoding, "TRANSFORMS", few)
    result = json.loads(analysis.run(analysis.parse_args([*words, "--out", str(tmp_path)])).read_text())
    assert result["protocol"]["image_size"] == [8, 12] and result["protocol"]["dct_block"] == 4
    turned = [row for row in result["models"][0]["equivariance"] if row["transform"] == "turn 90°"]
    assert turned and np.isfinite(turned[0]["latent_error"])


def test_what_knows_squares_alone_says_so(run, tmp_path, monkeypatch):
    folder, _ = run
    for command in (["convert", folder, tmp_path / "x.pt"], ["export", folder, tmp_path / "x", "--to", "diffusers"]):
        message = error_of(monkeypatch, *command)
        assert "8 x 12 pixels" in message and "for squares alone" in message and "extract-vae" in message
    extract_vae(folder, tmp_path / "vae")
    vae = repae_jax.load(str(tmp_path / "vae"))
    assert vae.encode(np.zeros((1, *SIZE, 3), np.uint8)).shape == (1, 4, 6, 4)
    page = report.run(report.parse_args([str(folder), "--out", str(tmp_path / "report.html")]))
    assert "data.image_size" in page.read_text()


@pytest.mark.slow
def test_cached_latents_and_a_sit_on_them(tmp_path):
    changes = {**small.SIT_ALONE, "steps": 2, "hooks.samples_every": 0, "data.image_size": SIZE, "data.options.split": "test"}
    cache = tmp_path / "cache"
    assert cache_latents.cache_latents(small.config(changes, ldm), str(cache), shard_size=200) == 2
    assert latents.CachedLatents(cache)[0]["moments"].shape == (4, 6, 8)
    changes |= {"init.latent_stats": str(cache / latents.STATS)}
    state, finished = train.train(small.config({**changes, "data.cache": str(cache)}, ldm), tmp_path / "run")
    assert finished and state.sit.params["pos_embed"]["table"].shape[1] == 24
    assert "Infinity" not in (text := (tmp_path / "run" / "metrics.jsonl").read_text()) and "NaN" not in text
    with pytest.raises(ValueError, match=r"latents of shape \(4, 6, 4\) .*an image size of \(8, 12\) \(this run's: 8\)"):
        train.train(small.config({**changes, "data.image_size": 8, "data.cache": str(cache)}, ldm), tmp_path / "other")
