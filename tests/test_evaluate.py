"""Evaluation of runs, files and folders: the scores, what is said beside them, resumption, processes, mistakes."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from feature_stub import Noise, StubNetwork, StubSpace, save_images, write_adm
from PIL import Image
from processes import script_env
from scipy.spatial.distance import cdist
from weight_files import write_checkpoint

from checkpoints_tools import published
from checkpoints_tools.convert import convert
from repae_jax import files, sample
from repae_jax.distributed import multihost
from repae_jax.evaluate import __main__ as evaluate
from repae_jax.evaluate import measuring
from repae_jax.evaluation import inception_features, reference_stats
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.metrics.frechet_confidence import frechet_confidence, split
from repae_jax.metrics.inception_score import RunningInceptionScore
from repae_jax.metrics.kernel_distances import cmmd
from repae_jax.metrics.monge import monge_inception_distance
from repae_jax.metrics.precision_recall import precision_recall
from repae_jax.sampling.load_model import load_model
from repae_jax.training.checkpoint import fingerprint

COUNT = 70
ERRORS = {"fid_stderr", "fid_infinity", "fid_infinity_stderr"}
METRICS = {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "mind", "mind_stderr"} | ERRORS


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setattr(inception_features, "PART_SIZE", 16)
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    stubs = []
    monkeypatch.setattr(measuring, "load_network", lambda _, batch_size: stubs.append(StubNetwork(batch_size)) or stubs[-1])
    return stubs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps, as it is on disk; its weights are drawn."""
    return small.save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(workdir):
    return load_model(workdir)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A reference as ADM's, of 8 x 8 pixels."""
    path = tmp_path_factory.mktemp("real") / "adm.npz"
    write_adm(path, Noise(90, 8, seed=1).pixels)
    return path


def arguments(source, reference, *extra, size=8):
    given = [str(source), "--reference", str(reference), "--inception", "weights.pth", "--batch_size", str(size)]
    return evaluate.parse_args([*given, *map(str, extra)])


def result_of(source, reference, *extra, size=8):
    """The result file, without what depends on names and times of files."""
    path, result = measuring.run(arguments(source, reference, *extra, size=size))
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert not path.with_suffix(".parts").exists()
    return result


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "made.npz", Noise(COUNT, 8).pixels)
    return tmp_path / "made.npz"


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_of_an_npz(npz, real):
    result = result_of(npz, real)
    features, expected = StubNetwork(COUNT)(Noise(COUNT, 8).pixels), StubNetwork(90)(Noise(90, 8, seed=1).pixels)
    score = RunningInceptionScore()
    score.update(features.logits)
    mean, std = score.result()
    precision, recall = precision_recall(expected.pool, features.pool)
    confidence = frechet_confidence(split(features.pool), gaussian_stats(expected.pool))
    mind, mind_stderr = monge_inception_distance(expected.pool, features.pool)
    assert result["metrics"] == pytest.approx(
        {
            "fid": frechet_distance(*gaussian_stats(features.pool), *gaussian_stats(expected.pool)),
            "sfid": frechet_distance(*gaussian_stats(features.spatial), *gaussian_stats(expected.spatial)),
            "inception_score": mean, "inception_score_std": std, "precision": precision, "recall": recall,
            "fid_stderr": confidence.stderr, "fid_infinity": confidence.infinity,
            "fid_infinity_stderr": confidence.infinity_stderr, "mind": mind, "mind_stderr": mind_stderr,
        }, rel=1e-5,
    )  # fmt: skip
    fid, infinity = (result["metrics"][name] for name in ("fid", "fid_infinity"))
    of_published = f"of 50000 samples, it would be about {infinity + (fid - infinity) * COUNT / 50_000:.2f}"
    assert of_published in "\n".join(result["warnings"])
    assert result["kind"] == "generation" and result["step"] is None
    protocol = result["protocol"]
    assert protocol["num_samples"] == COUNT and protocol["image_size"] == [8, 8]
    assert protocol["inception"] == {"weights": "weights.pth", "checksum": "stub"}
    assert protocol["reference"]["npz"] == "adm.npz"
    assert (npz.parent / "made.evaluation.json").exists()
    shown = evaluate.table(result)
    assert f"FID{result['metrics']['fid']:25.4f}" in shown and "num_samples 70" in shown


def test_a_folder_scores_as_the_npz(npz, real, tmp_path):
    folder = save_images(tmp_path / "images", Noise(COUNT, 8).pixels)
    assert result_of(folder, real)["metrics"] == result_of(npz, real)["metrics"]


@pytest.mark.parametrize("size", [4, 32, 128])
def test_batches_change_nothing(npz, real, tmp_path, size):
    expected = result_of(npz, real, "--out", tmp_path / "a.json")
    result = result_of(npz, real, "--out", tmp_path / "b.json", size=size)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)


def test_reference_of_our_own_and_of_a_dataset(npz, tmp_path, stub):
    folder = save_images(tmp_path / "real", Noise(90, 8, seed=1).pixels)
    ours = tmp_path / "ours.npz"
    given = ["--make_reference", ours, "--data", folder, "--image_size", 8, "--inception", "weights.pth", "--batch_size", 8]
    assert measuring.make_reference(evaluate.parse_args(list(map(str, given)))) == ours
    assert not (tmp_path / "ours.parts").exists()
    expected = result_of(npz, ours, "--out", tmp_path / "a.json")
    assert stub[-1].images == COUNT, "features of the reference are not made again"
    result = result_of(npz, folder, "--out", tmp_path / "b.json")
    assert result["metrics"] == expected["metrics"] and set(result["metrics"]) == METRICS
    assert expected["protocol"]["reference"]["source"]["data"] == str(folder)
    with pytest.raises(ValueError, match="ours.npz exists; choose another name"):
        measuring.make_reference(evaluate.parse_args(list(map(str, given))))


def test_scores_that_cannot_be_computed(npz, tmp_path):
    pixels = Noise(90, 8, seed=1).pixels
    write_adm(tmp_path / "old.npz", pixels, "mu_s", "sigma_s", "arr_0")
    result = result_of(npz, tmp_path / "old.npz")
    assert set(result["metrics"]) == {"fid", "inception_score", "inception_score_std"} | ERRORS
    assert "no sfid: the reference has no mu_s and sigma_s" in result["warnings"]
    assert "no precision and recall: the reference has no images (arr_0)" in result["warnings"]
    assert "warning: no sfid" in evaluate.table(result)


def test_too_few_samples(real, tmp_path):
    np.savez(tmp_path / "few.npz", Noise(3, 8).pixels)
    result = result_of(tmp_path / "few.npz", real)
    warnings = "\n".join(result["warnings"])
    assert "features of 3 samples span at most 2 dimensions, of 6 in FID: the covariances are rank-deficient" in warnings
    assert "of 3 samples; published ones are of 50000. Fewer give larger distances" in warnings
    assert "no precision and recall: 3 samples and 90 reference images; needed: more than 3 of each" in warnings
    assert result["metrics"]["fid"] > 0 and result["protocol"]["num_samples"] == 3
    np.savez(tmp_path / "one.npz", Noise(1, 8).pixels)
    with pytest.raises(ValueError, match="features of 1 images; a covariance needs 2"):
        measuring.run(arguments(tmp_path / "one.npz", real))


# ---- other feature spaces -------------------------------------------------------------------------------------------

SIX = ("convnext", "dinov2_256", "mae", "siglip2", "clip_256")
OF_DINOV2 = {"fd_dinov2", "fd_dinov2_stderr", "precision_dinov2", "recall_dinov2", "memorized"}


@pytest.fixture
def spaces(monkeypatch):
    """Stands in for all networks; a list of the dicts that were loaded."""
    loaded = []

    def load(weights, batch_size):
        loaded.append({name: StubSpace(name) for name in weights})
        return loaded[-1]

    monkeypatch.setattr(measuring, "load_space_networks", load)
    return loaded


@pytest.fixture
def real_folder(tmp_path):
    return save_images(tmp_path / "real", Noise(90, 8, seed=1).pixels)


def test_several_spaces_from_one_pass(npz, real_folder, spaces, stub):
    result = result_of(npz, real_folder, "--features", "dinov2", "clip_336", "fdr6", "mae=mine.safetensors")
    metrics = result["metrics"]
    assert set(metrics) == METRICS | OF_DINOV2 | {"cmmd", "cmmd_stderr", "fdr6"} | {f"fd_{name}" for name in SIX}
    assert stub[-1].images == COUNT + 90 and {space.images for space in spaces[-1].values()} == {COUNT + 90}
    for name in ("dinov2", *SIX):
        samples, others = (StubSpace(name)(Noise(*given).pixels) for given in ((COUNT, 8), (90, 8, 1)))
        expected = frechet_distance(*gaussian_stats(samples), *gaussian_stats(others))
        assert metrics[f"fd_{name}"] == pytest.approx(expected, rel=1e-5)
        if name == "dinov2":  # equally many of each
            rng = np.random.default_rng(2020)
            chosen, some = (features[rng.permutation(len(features))[:COUNT]] for features in (samples, others))
            expected = precision_recall(some, chosen, 5)
            assert (metrics["precision_dinov2"], metrics["recall_dinov2"]) == pytest.approx(expected)
    samples, others = (StubSpace("clip_336")(Noise(*given).pixels) for given in ((COUNT, 8), (90, 8, 1)))
    assert (metrics["cmmd"], metrics["cmmd_stderr"]) == pytest.approx(cmmd(others, samples), rel=1e-5)
    divisors = {"convnext": 56.87, "dinov2_256": 14.19, "mae": 0.04, "siglip2": 0.60, "clip_256": 5.60}
    ratios = [metrics["fid"] / 1.68, *(metrics[f"fd_{name}"] / divisor for name, divisor in divisors.items())]
    assert metrics["fdr6"] == pytest.approx(np.mean(ratios))
    described = result["protocol"]["spaces"]
    assert described["mae"] == {"weights": "mine.safetensors", "checksum": "stub", "features": "a few numbers"}
    assert described["dinov2"]["weights"] == "facebook/dinov2-large"
    computed = result["protocol"]["computed"]
    of_adm = {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall"}
    assert {name for name in metrics if not name.endswith("_stderr")} - of_adm == set(computed) - {"fid_stderr"}
    assert computed["fdr6"].startswith("mean of fid / 1.68, fd_convnext / 56.87")
    warnings = "\n".join(result["warnings"])
    assert "fdr6: its divisors are of ImageNet at 256 px" in warnings and "the reference 90 images" in warnings
    assert "precision_dinov2 and recall_dinov2: of 70 of each; 10000 in published scores" in warnings
    assert "fd_dinov2, fd_convnext, fd_dinov2_256, fd_mae, fd_siglip2, fd_clip_256: of 70 samples; published" in warnings
    shown = evaluate.table(result)
    assert "FDr6" in shown and f"CMMD{evaluate._digits(metrics['cmmd']):>24}  ± " in shown
    assert [evaluate._digits(value) for value in (1.25, 0.00123456, 0.0)] == ["1.2500", "0.00123", "0"]


def test_copies_of_training_images_are_found(real_folder, spaces, tmp_path):
    pixels = Noise(COUNT, 8).pixels.copy()
    pixels[[5, 40]] = Noise(90, 8, seed=1).pixels[[77, 3]]
    np.savez(tmp_path / "made.npz", pixels)
    result = result_of(tmp_path / "made.npz", real_folder, "--features", "dinov2")
    found = result["memorization"]["closest"]
    assert {(pair["sample"], pair["reference_image"]) for pair in found[:2]} == {(5, 77), (40, 3)} and len(found) == 16
    assert [pair["distance"] for pair in found] == sorted(pair["distance"] for pair in found)
    samples, others = StubSpace("dinov2")(pixels), StubSpace("dinov2")(Noise(90, 8, seed=1).pixels)
    among_real = cdist(others, others)
    np.fill_diagonal(among_real, np.inf)
    threshold = np.quantile(among_real.min(axis=1), 0.01)
    assert result["memorization"]["threshold"] == pytest.approx(threshold, rel=1e-3)
    share = (cdist(samples, others).min(axis=1) <= threshold).mean()
    assert result["metrics"]["memorized"] == pytest.approx(share) and share >= 2 / COUNT
    picture = np.asarray(Image.open(tmp_path / "made.evaluation.png"))
    scale, side = 8, 8 * 8
    first, second = (picture[2 : 2 + side : scale, x : x + side : scale] for x in (2, 4 + side))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, pixels[found[0]["sample"]])


def test_copies_count_where_training_images_have_copies(spaces, tmp_path):
    """Every real image is there twice, so the threshold is zero."""
    pixels = Noise(45, 8, seed=1).pixels
    folder = save_images(tmp_path / "twice", np.concatenate([pixels, pixels]))
    np.savez(tmp_path / "made.npz", np.concatenate([Noise(37, 8).pixels, pixels[:3]]))
    result = result_of(tmp_path / "made.npz", folder, "--features", "dinov2")
    assert result["memorization"]["threshold"] == 0 and result["metrics"]["memorized"] == pytest.approx(3 / 40)


def test_a_reference_file_with_spaces(npz, real_folder, spaces, tmp_path, monkeypatch):
    out = tmp_path / "ours.npz"
    given = ["--make_reference", out, "--data", real_folder, "--image_size", 8, "--inception", "weights.pth", "--batch_size", 8]
    measuring.make_reference(evaluate.parse_args([*map(str, given), "--features", "dinov2", "mae"]))
    result = result_of(npz, out, "--features", "dinov2", "mae", "--out", tmp_path / "a.json")
    assert spaces[-1]["mae"].images == COUNT, "features of the reference are not made again"
    expected = result_of(npz, real_folder, "--features", "dinov2", "mae", "--out", tmp_path / "b.json")
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    monkeypatch.setattr(measuring, "load_space_networks", lambda *_: {"mae": StubSpace("mae", "other")})
    with pytest.raises(ValueError, match="mae of .*ours.npz was made with weights of checksum stub, these have other"):
        measuring.run(arguments(npz, out, "--features", "mae", "--out", tmp_path / "c.json"))


def test_adms_reference_has_images_alone_for_other_spaces(npz, real, spaces, tmp_path, monkeypatch):
    result = result_of(npz, real, "--features", "dinov2", "clip_336")
    assert set(result["metrics"]) == METRICS | {"precision_dinov2", "recall_dinov2", "memorized", "cmmd", "cmmd_stderr"}
    warnings = "\n".join(result["warnings"])
    assert "no fd_dinov2: the reference has 90 images to measure it with, and a distance needs statistics of all" in warnings
    assert "memorized: beside 90 reference images alone" in warnings
    write_adm(tmp_path / "old.npz", Noise(90, 8, seed=1).pixels, "arr_0")
    monkeypatch.setattr(measuring, "load_space_networks", lambda *_: pytest.fail("weights were read before"))
    with pytest.raises(ValueError, match=r"old.npz holds neither the feature spaces mae nor images \(arr_0\)"):
        measuring.run(arguments(npz, tmp_path / "old.npz", "--features", "mae", "--out", tmp_path / "x.json"))


def test_too_few_samples_for_other_spaces(real_folder, spaces, tmp_path):
    np.savez(tmp_path / "few.npz", Noise(3, 8).pixels)
    result = result_of(tmp_path / "few.npz", real_folder, "--features", "dinov2", "clip_336")
    warnings = "\n".join(result["warnings"])
    assert "fd_dinov2: 3 samples span at most 2 dimensions, of 4 in fd_dinov2: the distances are far too large" in warnings
    assert "no cmmd: 3 samples and 90 reference images; needed: 20 or more of each" in warnings
    assert "no precision_dinov2 and recall_dinov2: 3 samples" in warnings
    assert "no fid_stderr: 3 samples; needed: 20" in warnings and "no mind: 3 samples" in warnings and "no kid:" in warnings
    four = save_images(tmp_path / "four", Noise(4, 8).pixels)
    result = result_of(tmp_path / "few.npz", four, "--features", "mae", "--out", tmp_path / "four.json")
    assert "fd_mae: 4 reference images span at most 3 dimensions, of 4 in fd_mae" in "\n".join(result["warnings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dino",), "feature space 'dino' is unknown; allowed: dinov2, clip_336"),
        (("fdr6=folder",), "fdr6=folder: weights are those of one space"),
        (("mae=",), "mae=: weights are those of one space"),
    ],
)
def test_wrong_spaces(npz, real, capsys, words, message):
    with pytest.raises(SystemExit):
        arguments(npz, real, "--features", *words)
    assert message in capsys.readouterr().err


@pytest.mark.integration
def test_interrupted_evaluation_of_spaces_continues(npz, real_folder, spaces, tmp_path, monkeypatch):
    extra = ("--features", "dinov2", "mae")
    whole = result_of(npz, real_folder, *extra, "--out", tmp_path / "whole.json")
    out = tmp_path / "cut.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 90 + 20)
        measuring.run(arguments(npz, real_folder, *extra, "--out", out))
    with pytest.raises(ValueError, match="unfinished work with other settings.*spaces"):
        measuring.run(arguments(npz, real_folder, *extra, "clip_336", "--out", out))
    assert result_of(npz, real_folder, *extra, "--out", out) == whole
    assert spaces[-1]["mae"].images == COUNT - 16


# ---- confusions -----------------------------------------------------------------------------------------------------


def test_reconstructions_are_no_samples(tmp_path):
    pixels = Noise(90, 8, seed=1).pixels
    write_adm(tmp_path / "adm.npz", pixels)
    np.savez(tmp_path / "close.npz", pixels)
    warnings = "\n".join(result_of(tmp_path / "close.npz", tmp_path / "adm.npz")["warnings"])
    assert "it is not their rFID" in warnings and "1.83 to 1.90" in warnings and "evaluate_tokenizer" in warnings


def test_a_reference_that_was_encoded_again_is_told(npz, tmp_path):
    """From the folder, and from the file that was made of it."""
    folder, ours = tmp_path / "jpeg", tmp_path / "ours.npz"
    folder.mkdir()
    for i, pixels in enumerate(Noise(30, 8, seed=1).pixels):
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    given = ["--make_reference", ours, "--data", folder, "--image_size", 8, "--inception", "weights.pth", "--batch_size", 8]
    measuring.make_reference(evaluate.parse_args(list(map(str, given))))
    for number, reference in enumerate((folder, ours)):
        warnings = "\n".join(result_of(npz, reference, "--out", tmp_path / f"{number}.json")["warnings"])
        assert "reference: 30 of 30 files that were looked at are JPEG or WebP of exactly 8 x 8 pixels" in warnings


def test_random_labels_are_told(npz, real, tmp_path):
    pixels = Noise(40, 8).pixels
    for name, labels in {"equal": np.arange(40) % 4, "random": np.random.default_rng(0).integers(0, 4, 40)}.items():
        np.savez(tmp_path / f"{name}.npz", pixels, labels)
        warnings = "\n".join(result_of(tmp_path / f"{name}.npz", real)["warnings"])
        assert ("labels: random" in warnings) == (name == "random")


# ---- models ---------------------------------------------------------------------------------------------------------

MODEL = ("--num_samples", "40", "--steps", "3")


@pytest.mark.integration
def test_a_run_scores_as_its_samples(workdir, real, tmp_path):
    kept = tmp_path / "kept.npz"
    result = result_of(workdir, real, *MODEL, "--keep_samples", kept, "--guidance_scale", "2")
    name = "0000002-sde3-cfg2in0to1-balanced-40-seed0.json"
    assert (workdir / "evaluations" / name).exists()
    (workdir / "evaluations" / name).unlink()
    drawn = sample.run(sample.parse_args([
        "--workdir", str(workdir), *MODEL, "--guidance_scale", "2", "--out", str(tmp_path / "drawn"), "--batch_size", "8",
    ]))  # fmt: skip
    with np.load(kept) as ours, np.load(drawn) as expected:
        for key in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(ours[key], expected[key])
    assert result["metrics"] == result_of(drawn, real)["metrics"]
    protocol = result["protocol"]
    expected = {"step": 2, "sampler": "sde", "steps": 3, "guidance_scale": 2.0, "labels": "balanced", "seed": 0}
    assert expected.items() <= protocol.items() and result["step"] == 2
    assert len(protocol["model_checksum"]) == 16


@pytest.mark.integration
def test_closest_samples_of_a_run_are_drawn_again(workdir, trained, real_folder, spaces, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    out, kept = tmp_path / "x.json", tmp_path / "kept.npz"
    result = result_of(workdir, real_folder, *MODEL, "--features", "dinov2", "--out", out, "--keep_samples", kept)
    closest = result["memorization"]["closest"][0]
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    shown = [picture[2:66:8, x : x + 64 : 8] for x in (2, 68)]
    with np.load(kept) as archive:
        np.testing.assert_array_equal(shown[0], archive["arr_0"][closest["sample"]])
    np.testing.assert_array_equal(shown[1], Noise(90, 8, seed=1).pixels[closest["reference_image"]])


@pytest.mark.integration
def test_published_weights_score_the_same(workdir, trained, real, tmp_path, monkeypatch):
    convert(workdir, tmp_path / "weights.safetensors", optimizers=False)
    given = (*MODEL, "--guidance_scale", "1.5")
    result = result_of(tmp_path / "weights.safetensors", real, *given, "--out", tmp_path / "a.json")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "load_model", lambda *_, **__: trained)
        expected = result_of(workdir, real, *given, "--out", tmp_path / "b.json")
    assert result["metrics"] == expected["metrics"]
    with pytest.raises(ValueError, match="is no folder to keep the result in: give --out"):
        measuring.run(arguments(tmp_path / "weights.safetensors", real, *MODEL))

    checkpoint = published.read(tmp_path / "weights.safetensors")
    networks = {name: arrays for name, arrays in checkpoint.networks.items() if name != "ema"}
    without = dataclasses.replace(checkpoint, networks=networks, optimizers={})
    for ending in ("safetensors", "pt"):
        write_checkpoint(tmp_path / f"raw.{ending}", without)
        with pytest.raises(ValueError, match="but no ema, the averaged weights that samples are made with"):
            measuring.run(arguments(tmp_path / f"raw.{ending}", real, "--out", tmp_path / "x.json"))


@pytest.mark.integration
def test_autoguidance_by_an_earlier_step(tiny_run, real, tmp_path):
    given = (*MODEL, "--sampler", "euler", "--guidance_scale", 1)
    guided = ("--autoguidance", f"{tiny_run}@2", "--autoguidance_scale", 40)  # the two steps between change little
    result = result_of(tiny_run, real, *given, *guided, "--out", tmp_path / "a.json")
    weaker = load_model(tiny_run, 2).params["sit"]
    expected = {"source": f"{tiny_run}@2", "step": 2, "weights": fingerprint(weaker)}
    assert result["step"] == 4 and result["protocol"]["autoguidance"] == expected
    assert "guidance_scale 1.0, autoguidance_scale 40.0, computed in" in evaluate.table(result)
    plain = result_of(tiny_run, real, *given, "--out", tmp_path / "b.json")
    assert "autoguidance" not in plain["protocol"] and result["metrics"]["fid"] != plain["metrics"]["fid"]


@pytest.mark.integration
def test_random_labels(workdir, trained, real, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    monkeypatch.setattr(sample, "draw_labels", lambda *given: drawn.append(given) or np.zeros(given[1], np.int32))
    result = result_of(workdir, real, *MODEL, "--labels", "random", "--classes", 3, 5, "--out", tmp_path / "x.json")
    assert drawn == [("random", 40, [3, 5], 0)]
    assert result["protocol"]["labels"] == "random" and result["protocol"]["classes"] == [3, 5]


# ---- interruptions and processes ------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, count):
    class Interrupted(StubNetwork):
        def __call__(self, images):
            if self.images >= count:
                raise KeyboardInterrupt
            return super().__call__(images)

    monkeypatch.setattr(measuring, "load_network", lambda _, batch_size: Interrupted(batch_size))


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["npz", "run"])
def test_interrupted_evaluation_continues(kind, workdir, trained, npz, real, tmp_path, monkeypatch, stub):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    source, extra = (npz, ()) if kind == "npz" else (workdir, MODEL)
    whole = result_of(source, real, *extra, "--out", tmp_path / "whole.json")
    out = tmp_path / "cut.json"
    for count in (40, 20):  # in the reference; in the samples
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, count + (90 - 32 if count == 20 else 0))
            measuring.run(arguments(source, real, *extra, "--out", out))
    assert len(list(out.with_suffix(".parts").glob("samples/part-*.npz"))) == 1
    continued = result_of(source, real, *extra, "--out", out)
    assert stub[-1].images == whole["protocol"]["num_samples"] - 16
    assert continued == whole


@pytest.mark.integration
def test_other_settings_do_not_mix(workdir, trained, real, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    out = tmp_path / "x.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 90 + 20)
        measuring.run(arguments(workdir, real, *MODEL, "--out", out))
    with pytest.raises(ValueError, match="unfinished work with other settings.*seed.*choose another --out"):
        measuring.run(arguments(workdir, real, *MODEL, "--seed", 1, "--out", out))


def in_three_processes(monkeypatch, act):
    """Results of a function in three threads, each with the index of a process, that look at one folder."""
    which, results = threading.local(), {}
    monkeypatch.setattr(jax, "process_index", lambda: which.index)
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def work(index):
        which.index = index
        results[index] = act()

    threads = [threading.Thread(target=work, args=(index,)) for index in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[index] for index in range(3)]


def test_every_process_takes_its_share(npz, real, tmp_path, monkeypatch, stub):
    whole = result_of(npz, real, "--out", tmp_path / "one.json")
    results = in_three_processes(monkeypatch, lambda: measuring.run(arguments(npz, real, "--out", tmp_path / "three.json"))[1])
    assert results == [whole, None, None]
    assert sum(network.images for network in stub[-3:]) == COUNT + 90, "nothing is made twice"


def test_a_process_that_comes_when_all_is_done(npz, real, tmp_path, monkeypatch):
    """It had no share, as when there are more processes than parts."""
    measuring.run(arguments(npz, real, "--out", tmp_path / "x.json"))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert measuring.run(arguments(npz, real, "--out", tmp_path / "x.json")) == (tmp_path / "x.json", None)


@pytest.mark.integration
def test_every_process_takes_its_share_in_all_spaces(npz, real_folder, spaces, tmp_path, monkeypatch):
    extra = ("--features", "dinov2", "clip_336")
    whole = result_of(npz, real_folder, *extra, "--out", tmp_path / "one.json")
    given = (npz, real_folder, *extra, "--out", tmp_path / "three.json")
    results = in_three_processes(monkeypatch, lambda: measuring.run(arguments(*given))[1])
    assert results == [whole, None, None]
    assert {name: sum(networks[name].images for networks in spaces[-3:]) for name in extra[1:]} == {
        "dinov2": COUNT + 90, "clip_336": COUNT + 90
    }  # fmt: skip
    assert (tmp_path / "three.png").read_bytes() == (tmp_path / "one.png").read_bytes()


COMMAND = """
import feature_stub
from repae_jax.evaluate import __main__ as evaluate, measuring
from repae_jax.evaluation import inception_features
inception_features.PART_SIZE = 16
measuring.load_network = lambda _, batch_size: feature_stub.StubNetwork(batch_size)
evaluate.main()
"""


def start(*given, cwd=None):
    """Popen of the command, with a stub in the place of Inception, on four devices."""
    env = script_env(XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    command = [sys.executable, "-c", COMMAND, *given, "--inception", "x", "--batch_size", 8]
    return subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True, cwd=cwd)


def two_by_hand():
    """The flags of each of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [["--coordinator", address, "--num_processes", 2, "--process_id", index] for index in range(2)]


@pytest.mark.slow
def test_two_real_processes(workdir, real, tmp_path):
    started = [
        start(workdir, "--reference", real, *MODEL, "--out", tmp_path / name, *by_hand)
        for name, by_hand in [*(("2.json", by_hand) for by_hand in two_by_hand()), ("1.json", [])]
    ]
    outputs = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert json.loads((tmp_path / "2.json").read_text()) == json.loads((tmp_path / "1.json").read_text())


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_the_other(npz, real, tmp_path):
    """A file that only one host has."""
    started = [
        start(npz, "--reference", real.name, "--out", tmp_path / "x.json", *by_hand, cwd=folder)
        for folder, by_hand in zip((real.parent, tmp_path), two_by_hand())
    ]
    outputs = [process.communicate(timeout=300)[1] for process in started]
    assert 0 not in [process.returncode for process in started], outputs
    mistake = f"{real.name} does not exist; check --reference"
    assert f"error: {mistake}" in outputs[1] and "Traceback" not in outputs[0] + outputs[1]
    assert f"failed: FileNotFoundError: {mistake}" in outputs[0]


@pytest.mark.slow
def test_processes_that_differ_are_refused(npz, real, tmp_path):
    """They differ in their arguments, or in the disk that they write to."""
    for out, message in (
        (("x.json", "y.json"), f"out: '{tmp_path}/x.json' in process 0, '{tmp_path}/y.json' in process 1"),
        (None, f"what process 0 wrote to {Path('.')} is not seen by process 1"),
    ):
        started = []
        for index, by_hand in enumerate(two_by_hand()):
            folder = tmp_path / str(index)
            folder.mkdir(exist_ok=True)
            given = tmp_path / out[index] if out else "x.json"
            started.append(start(npz, "--reference", real, "--out", given, *by_hand, cwd=folder))
        outputs = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [1, 1], outputs
        assert message in outputs[0] and message in outputs[1] and "Traceback" not in outputs[0] + outputs[1]


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_an_existing_result_is_kept(npz, real, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(ValueError, match="x.json exists; choose another name"):
        measuring.run(arguments(npz, real, "--out", tmp_path / "x.json"))
    assert (tmp_path / "x.json").read_text() == "mine"


@pytest.mark.integration
def test_an_existing_file_is_no_place_for_samples(workdir, trained, real, tmp_path, monkeypatch):
    """It is kept even when the evaluation was interrupted before."""
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    out, mine = tmp_path / "x.json", tmp_path / "mine.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 90 + 20)
        measuring.run(arguments(workdir, real, *MODEL, "--out", out, "--keep_samples", tmp_path / "first.npz"))
    mine.write_text("my thesis")
    with pytest.raises(ValueError, match="mine.npz exists; choose another name"):
        measuring.run(arguments(workdir, real, *MODEL, "--out", out, "--keep_samples", mine))
    assert mine.read_text() == "my thesis"


def test_unfinished_samples(real, tmp_path):
    parts = tmp_path / "generated" / "x-cfg1.5.parts"
    parts.mkdir(parents=True)
    (parts / "settings.json").write_text("{}")
    for source in (parts, parts.with_suffix(".npz"), tmp_path / "generated"):
        with pytest.raises(ValueError, match="x-cfg1.5.parts holds unfinished samples: finish them with .*repae_jax.sample"):
            measuring.run(arguments(source, real))
    shutil.rmtree(parts)
    parts.with_suffix(".npz").touch()
    with pytest.raises(ValueError, match="generated holds x-cfg1.5.npz, not only images"):
        measuring.run(arguments(tmp_path / "generated", real))


@pytest.mark.integration
def test_sizes_that_do_not_fit(workdir, real, tmp_path):
    np.savez(tmp_path / "made.npz", Noise(9, 4).pixels)
    write_adm(tmp_path / "small.npz", Noise(9, 4).pixels)
    for source, reference, extra in ((tmp_path / "made.npz", real, ()), (workdir, tmp_path / "small.npz", MODEL)):
        with pytest.raises(
            ValueError, match="the samples have . x . pixels, the images of .* . x .; scores compare equal sizes"
        ):
            measuring.run(arguments(source, reference, *extra, "--out", tmp_path / "x.json"))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--batch_size", "9"), "batch_size=9 is not a multiple of the 8 devices"),
        (("--classes", "3", "10"), "allowed are 0..9"),
        (("--guidance_channels", "9"), "guidance_channels=9: the latents have 4"),
        (("--sampler", "ancestral"), "sampler 'ancestral'.* predicts a velocity"),
        (("--out", "x.txt"), "--out=x.txt: the result is a file ending in .json"),
        (("--reference", "absent.npz"), "absent.npz does not exist; check --reference"),
        (("--reference", "gs://bucket/a.npz"), "gs://bucket/a.npz: statistics of real images are kept on a disk"),
        (("--reference", "nothing"), "'nothing' is no folder, and no source"),
    ],
)
def test_bad_arguments(workdir, trained, real, tmp_path, extra, message, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    if "--batch_size" in extra:
        monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("weights were read before"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measuring.run(arguments(workdir, real, *MODEL, "--out", tmp_path / "x.json", *extra))


def test_statistics_go_to_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--data", "digits:split=test", "--image_size", "8", "--inception", files.RANDOM
    with pytest.raises(ValueError, match="gs://bucket/a.npz: statistics of real images are kept on a disk"):
        measuring.make_reference(evaluate.parse_args(["--make_reference", "gs://bucket/a.npz", *options]))
    assert not [*tmp_path.iterdir()]


def test_options_for_models_only(npz, real, tmp_path):
    given = ("--steps", 3, "--keep_samples", tmp_path / "x.npz", "--step", 4)
    with pytest.raises(ValueError, match="--keep_samples, --step, --steps: for models only; the images of .* are there"):
        measuring.run(arguments(npz, real, *given))


def test_no_such_source(real, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.npz does not exist"):
        measuring.run(arguments(tmp_path / "absent.npz", real))
    with pytest.raises(ValueError, match="no images below"):
        measuring.run(arguments(tmp_path, real))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--inception", "x"], "an evaluation needs source"),
        (["a.npz", "--inception", "x"], "an evaluation needs --reference"),
        (["--make_reference", "a.npz", "--inception", "x"], "--make_reference needs --data"),
        (["a.npz", "--reference", "b.npz", "--inception", "x", "--num_samples", "0"], "--num_samples: 0 must be at least 1"),
    ],
)
def test_command_lines_that_lack_something(given, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(given)
    assert message in capsys.readouterr().err


def test_mistakes_end_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "a.npz"), "--reference", "absent.npz", "--inception", "x"])
    with pytest.raises(SystemExit) as caught:
        evaluate.main()
    assert str(caught.value.code) == "error: absent.npz does not exist; check --reference"
    assert reference_stats.KEPT_IMAGES == 10_000 and jax.process_count() == 1


COST = """
import resource, time
import numpy as np
from repae_jax.metrics.frechet import RunningGaussian
from repae_jax.models.inception import InceptionFeatures
from repae_jax.evaluation.generation import score
from repae_jax.evaluation.reference_stats import Reference

rng = np.random.default_rng(0)

def draw(count):
    for first in range(0, count, 500):
        pool, spatial, logits = (rng.standard_normal((500, size), dtype=np.float32) for size in (2048, 2023, 1008))
        yield InceptionFeatures(pool=np.abs(pool), spatial=spatial, logits=logits)

pool, spatial, kept = RunningGaussian(), RunningGaussian(), []
for part in draw(10_000):
    pool.update(part.pool)
    spatial.update(part.spatial)
    kept.append(part.pool)
reference = Reference(pool.stats(), spatial.stats(), np.concatenate(kept), None, None, {})
start = time.monotonic()
metrics, _ = score(draw(50_000), reference)
assert len(metrics) == 13, metrics
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_the_cost_of_50000_samples(record_property):
    """Scores of features that are there take five minutes and 8 GB at most, on two cores."""
    done = subprocess.run([sys.executable, "-c", COST], env=script_env(), capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    record_property("seconds, GB", (round(seconds), round(gigabytes, 1)))
    assert seconds < 300 and gigabytes < 8
