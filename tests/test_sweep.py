"""Evaluations at several guidance scales and intervals in one command: points, results, resumption, mistakes."""

import json
import threading

import numpy as np
import pytest
import small
from feature_stub import Noise, StubNetwork, StubSpace, write_adm
from PIL import Image

from repae_jax import sample
from repae_jax.distributed import multihost
from repae_jax.evaluate import __main__ as evaluate
from repae_jax.evaluate import measuring, sweeping
from repae_jax.evaluation import inception_features, sweep
from repae_jax.sampling.load_model import load_model

MODEL = ("--num_samples", "16", "--steps", "2", "--sampler", "euler", "--batch_size", "8")


# ---- points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("guidance_scale=1.5:3:0.25", [1.5, 1.75, 2, 2.25, 2.5, 2.75, 3]),
        ("guidance_high=0.1:0.7:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),  # not 0.30000000000000004
        ("guidance_low=0:0.5:0.2", [0, 0.2, 0.4]),
        ("guidance_scale=2:2:1", [2]),
        ("steps=10:30:10", [10, 20, 30]),
        ("time_shift=1:2:0.5", [1, 1.5, 2]),
    ],
)
def test_values_of_an_axis(text, values):
    axis = sweep.parse_axis(text)
    assert axis.values == values and str(axis) == text
    assert {type(value) for value in axis.values} == {int if text.startswith("steps") else float}


def test_points_are_all_combinations():
    axes = [sweep.parse_axis(text) for text in ("guidance_scale=1:2:1", "guidance_high=0.5:1:0.25")]
    found = [(point["guidance_scale"], point["guidance_high"]) for point in sweep.points(axes)]
    assert found == [(1, 0.5), (1, 0.75), (1, 1), (2, 0.5), (2, 0.75), (2, 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["guidance=1:2:1"],
            "'guidance=1:2:1': the settings that can be swept are steps, guidance_scale, guidance_low, guidance_high, "
            "guidance_channels, guidance_power, autoguidance_scale, internal_scale, weaker_low, weaker_high, "
            "time_shift, tolerance",
        ),
        (["guidance_scale"], "allowed is NAME=FIRST:LAST:STEP, such as guidance_scale=1.5:3:0.25"),
        (["guidance_scale=1:x:1"], "allowed is NAME=FIRST:LAST:STEP"),
        (["guidance_scale=1:2"], "allowed is NAME=FIRST:LAST:STEP"),
        (["guidance_scale=1:2:0"], "STEP must be positive, LAST not below FIRST"),
        (["guidance_scale=3:2:1"], "STEP must be positive, LAST not below FIRST"),
        (["guidance_scale=1:inf:1"], "all of them finite"),
        (["guidance_scale=1:3:0.001"], "has more than 200 values: take a larger STEP"),
        (["guidance_scale=1:2:0.05", "guidance_high=0.5:1:0.05"], "231 points; allowed: 200: take larger steps"),
        (["guidance_scale=1:2:1", "guidance_scale=3:4:1"], "give each setting once"),
        (["guidance_scale=0.5:2:0.5"], "guidance_scale=0.5 must be at least 1"),
        (["steps=2:5:1.5"], "steps=3.5 must be a whole number"),
        (["steps=10:20:10", "--steps", "5"], "does not go with --steps: leave one of them out"),
        (["guidance_high=0.5:1.5:0.5"], "guidance_high=1.5 must lie in [0, 1]"),
        (["guidance_low=0:0.8:0.4", "guidance_high=0.5:1:0.5"], "guidance interval [0.8, 0.5] must lie in [0, 1], low first"),
        (["autoguidance_scale=1:3:1"], "sweep of autoguidance_scale, but --autoguidance names no weaker network"),
        (["guidance_scale=1:2:1", "--guidance_scale", "2"], "does not go with --guidance_scale: leave one of them out"),
        (["guidance_scale=1:2:1", "--keep_samples", "a.npz"], "does not go with --keep_samples"),
        (["guidance_scale=1:2:1", "--out", "a.json"], "--out=a.json: with --sweep it is a folder for the results"),
        (
            ["guidance_scale=1:2:1", "--reference", "/real"],
            "write its statistics once, with --make_reference REAL.npz --data /real",
        ),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(given, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["runs/x", "--reference", "real.npz", "--inception", "x", "--sweep", *given])
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# ---- the table and the curves ---------------------------------------------------------------------------------------


def results(*fids):
    axes = [sweep.parse_axis(f"guidance_scale=1:{len(fids)}:1")]
    metrics = [{"fid": fid, "inception_score": 2 * fid, "inception_score_std": 0.1} for fid in fids]
    done = [(point, {"metrics": scores, "warnings": ["few"]}) for point, scores in zip(sweep.points(axes), metrics)]
    return sweep.Sweep(axes, done)


def test_the_table_marks_the_lowest_fid():
    lines = results(5.0, 3.0, 4.0, 3.0).table().splitlines()
    assert lines[0].split() == ["guidance_scale", "FID", "inception", "score"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        [str(n), f"{f}.0000", f"{2 * f}.0000"] for n, f in enumerate((5, 3, 4, 3), 1)
    ]
    assert [line.endswith("lowest FID") for line in lines] == [False, False, True, False, False, False]
    assert lines[5:] == ["warning: few"]


def test_the_curves_are_drawn(tmp_path):
    results(5.0, 3.0, 4.0).draw(tmp_path / "a.png")
    one = np.asarray(Image.open(tmp_path / "a.png"))
    results(5.0, 2.0, 4.0).draw(tmp_path / "b.png")
    other = np.asarray(Image.open(tmp_path / "b.png"))
    assert one.std() > 1 and one.shape[1] > 800 and (one.shape != other.shape or (one != other).any())


def test_scores_of_other_spaces_are_drawn(monkeypatch):
    panels = []
    monkeypatch.setattr(sweep.plots, "plot_lines", lambda path, given, *_: panels.extend(given))
    done = results(5.0, 3.0)
    for _, result in done.results:
        result["metrics"] |= {"fd_dinov2": 90.0, "cmmd": 0.5, "fdr6": 4.0, "fd_mae": 0.3}
    done.draw("x.png")
    assert panels == ["FID", "inception score", "FD-DINOv2", "CMMD", "FDr6"]


def test_a_weaker_network_is_told_by_its_weights():
    def protocol(source, weights):
        weaker = {"source": source, "step": 2, "weights": weights}
        return {"steps": 4, "autoguidance_scale": 2.0, "autoguidance": weaker, "time_shift": 1.0}

    there = {"protocol": protocol("runs/small@2", "12ab")}
    assert sweep.differences(there, protocol("/data/runs/small@2", "12ab")) == {}
    assert sweep.differences(there, protocol("runs/small@2", "34cd")) == {"autoguidance": ("12ab", "34cd")}


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return small.save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(workdir):
    return load_model(workdir)


@pytest.fixture
def real(tmp_path):
    write_adm(tmp_path / "real.npz", Noise(20, 8, seed=1).pixels)
    return tmp_path / "real.npz"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Images that depend on the guidance alone, in the place of the sampler; the list of the settings they were drawn with."""
    monkeypatch.setattr(inception_features, "PART_SIZE", 8)
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(measuring, "load_network", lambda _, batch_size: StubNetwork(batch_size))
    calls = []

    def sample_batches(model, sampling, labels, batch_size, seed, skip=()):
        calls.append((sampling.guidance_scale, sampling.guidance_high))
        seed = int(100 * sampling.guidance_scale + 10 * sampling.guidance_high)
        for index in sorted(set(range(-(-len(labels) // batch_size))) - set(skip)):
            yield index, Noise(batch_size, 8, seed=1000 * seed + index).pixels

    monkeypatch.setattr(sample, "sample_batches", sample_batches)
    return calls


def swept(workdir, real, *axes, extra=MODEL):
    given = [str(workdir), "--reference", str(real), "--inception", "weights.pth", "--sweep", *axes, *map(str, extra)]
    return sweeping.run_sweep(evaluate.parse_args(given))


@pytest.mark.integration
def test_every_point_is_an_evaluation_of_its_own(workdir, trained, real, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    axes = ("guidance_scale=1:2:0.5", "guidance_high=0.5:1:0.5")
    out, done = swept(workdir, real, *axes)
    points = [(point["guidance_scale"], point["guidance_high"]) for point, _ in done.results]
    assert points == [(1, 0.5), (1.5, 0.5), (1.5, 1), (2, 0.5), (2, 1)], "without guidance there is but one interval"
    name = "0000002-euler2-cfg1.5in0to0.5-balanced-16-seed0.json"
    kept = json.loads((workdir / "evaluations" / name).read_text())
    assert kept["kind"] == "generation" and kept["protocol"]["guidance_high"] == 0.5
    (alone,) = [result for point, result in done.results if point == {"guidance_scale": 1.5, "guidance_high": 0.5}]
    command = [str(workdir), "--reference", str(real), "--inception", "weights.pth", *MODEL, "--guidance_scale", "1.5"]
    path, expected = measuring.run(evaluate.parse_args([*command, "--guidance_high", "0.5", "--out", str(tmp_path / "x.json")]))
    assert alone["metrics"] == kept["metrics"] == expected["metrics"]

    content = json.loads(out.read_text())
    lowest = min(content["points"], key=lambda point: point["metrics"]["fid"])
    assert content["best"] == {"guidance_scale": lowest["guidance_scale"], "guidance_high": lowest["guidance_high"]}
    assert out.parent == workdir / "sweeps" and out.with_suffix(".png").exists()
    assert out.stem.endswith("-sweep-guidance_scale1_2_0.5-guidance_high0.5_1_0.5")

    # a wider sweep makes what is missing
    drawn.clear()
    _, wider = swept(workdir, real, "guidance_scale=1:2.5:0.5", axes[1])
    assert drawn == [(2.5, 0.5), (2.5, 1.0)]
    assert [result["metrics"] for _, result in wider.results[:5]] == [result["metrics"] for _, result in done.results]


@pytest.mark.integration
def test_an_interrupted_sweep_continues(workdir, trained, real, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    extra = (*MODEL, "--out", tmp_path / "swept")
    whole, interrupted = sample.sample_batches, []

    def interrupting(model, sampling, *others, **more):
        for index, batch in whole(model, sampling, *others, **more):
            if sampling.guidance_scale == 2 and index == 1:
                interrupted.append(index)
                raise KeyboardInterrupt
            yield index, batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "sample_batches", interrupting)
        swept(workdir, real, "guidance_scale=1.5:2:0.5", extra=extra)
    assert interrupted and len(list((tmp_path / "swept").glob("*.json"))) == 1
    drawn.clear()
    out, done = swept(workdir, real, "guidance_scale=1.5:2:0.5", extra=extra)
    assert drawn == [(2.0, 1.0)] and out.parent == tmp_path / "swept"
    assert len(done.results) == 2 and not list((tmp_path / "swept").glob("*.parts"))


@pytest.mark.integration
def test_the_reference_is_measured_once(workdir, trained, real, tmp_path, monkeypatch):
    """Its 20 images, of which ADM's form has no features; the picture of the closest pairs shows them at every point."""
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    seen, networks = StubSpace("dinov2"), StubNetwork(8)
    monkeypatch.setattr(measuring, "load_network", lambda *_: networks)
    monkeypatch.setattr(measuring, "load_space_networks", lambda *_: {"dinov2": seen})
    extra = (*MODEL, "--features", "dinov2", "--out", tmp_path / "swept")
    _, done = swept(workdir, real, "guidance_scale=1.5:2.5:0.5", extra=extra)
    assert networks.images == seen.images == 20 + 3 * 16
    assert len(list((tmp_path / "swept").glob("0*seed0.png"))) == 3
    _, alone = swept(workdir, real, "guidance_scale=2.5:2.5:0.5", extra=(*extra[:-1], tmp_path / "alone"))
    assert alone.results[0][1]["metrics"] == done.results[2][1]["metrics"]
    assert alone.results[0][1]["memorization"] == done.results[2][1]["memorization"]


@pytest.mark.integration
@pytest.mark.parametrize("count", [16, 8])  # of 8 there is one part: two processes have none of the samples
def test_several_processes_sweep_together(workdir, trained, real, tmp_path, monkeypatch, count):
    """Three threads, each with the index of a process, stand for processes that look at one folder."""
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    monkeypatch.setattr(measuring, "load_space_networks", lambda weights, _: {name: StubSpace(name) for name in weights})
    extra, axis = (*MODEL, "--num_samples", count, "--features", "dinov2", "--out"), "guidance_scale=1.5:2.5:0.5"
    _, alone = swept(workdir, real, axis, extra=(*extra, tmp_path / "alone"))
    which, done = threading.local(), {}
    monkeypatch.setattr(sweeping.jax, "process_index", lambda: which.index)
    monkeypatch.setattr(sweeping.jax, "process_count", lambda: 3)

    def work(index):
        which.index = index
        done[index] = swept(workdir, real, axis, extra=(*extra, tmp_path / "together"))[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done[1] is done[2] is None
    assert [result["metrics"] for _, result in done[0].results] == [result["metrics"] for _, result in alone.results]


@pytest.mark.integration
def test_results_of_other_settings_are_no_points(workdir, trained, real, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    extra = (*MODEL, "--out", tmp_path / "swept")
    swept(workdir, real, "guidance_scale=2:2:1", extra=extra)
    (path,) = [path for path in (tmp_path / "swept").glob("*.json") if "sweep" not in path.name]
    write_adm(real, Noise(20, 8, seed=2).pixels)
    with pytest.raises(ValueError, match=r"'checksum of the reference': \('[0-9a-f]{16}', '[0-9a-f]{16}'\)}; move it away"):
        swept(workdir, real, "guidance_scale=2:2:1", extra=extra)
    real.rename(tmp_path / "other.npz")
    message = rf"{path.name} is of other settings \(there, here\): .*'reference': \('real.npz', 'other.npz'\).*; move it away"
    with pytest.raises(ValueError, match=message):
        swept(workdir, tmp_path / "other.npz", "guidance_scale=2:2:1", extra=extra)
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "protocol": {**result["protocol"], "model_checksum": "another"}}))
    with pytest.raises(ValueError, match="'model_checksum': \\('another', "):
        swept(workdir, tmp_path / "other.npz", "guidance_scale=2:2:1", extra=extra)


@pytest.mark.integration
def test_weights_are_told_by_what_they_hold(workdir, trained, real, tmp_path, monkeypatch):
    """A file of the same name with other weights is refused, in one line; the same weights by another name are taken."""
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    monkeypatch.setattr(measuring, "load_space_networks", lambda weights, _: {name: StubSpace(name) for name in weights})
    extra = (*MODEL, "--features", "dinov2", "--out", tmp_path / "swept")
    axis = "guidance_scale=2:2:1"
    _, done = swept(workdir, real, axis, extra=extra)
    _, again = swept(workdir, real, axis, extra=(*extra, "--inception", "copy.pth"))
    assert again.results[0][1] == done.results[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(StubNetwork, "checksum", "other")
        message = (
            r"of other settings \(there, here\): {'weights of inception': \('weights.pth of checksum stub', "
            r"'weights.pth of checksum other'\)}; move it away[^\n]*$"
        )
        with pytest.raises(ValueError, match=message):
            swept(workdir, real, axis, extra=extra)
    monkeypatch.setattr(measuring, "load_space_networks", lambda *_: {"dinov2": StubSpace("dinov2", "other")})
    with pytest.raises(ValueError, match="{'weights of dinov2': .*of checksum stub', '.*of checksum other'"):
        swept(workdir, real, axis, extra=extra)
    with pytest.raises(ValueError, match=r"'features': \(\['dinov2', 'inception'\], \['inception'\]\)"):
        swept(workdir, real, axis, extra=(*MODEL, "--out", tmp_path / "swept"))


@pytest.mark.integration
def test_points_that_do_not_fit_the_runs_own_interval(workdir, trained, real, tmp_path, monkeypatch):
    import dataclasses

    narrow = dataclasses.replace(trained, sampling=dataclasses.replace(trained.sampling, guidance_high=0.5))
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: narrow)
    with pytest.raises(ValueError, match=r"guidance interval \[0.6, 0.5\] must lie in \[0, 1\], low first"):
        swept(workdir, real, "guidance_low=0.4:0.6:0.2", extra=(*MODEL, "--guidance_scale", "2", "--out", tmp_path / "swept"))
    assert not (tmp_path / "swept").exists()


@pytest.mark.integration
def test_points_that_are_all_the_same(workdir, trained, real, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: trained)
    message = r"--sweep weaker_low=0:0.5:0.1: every point is 0000002-euler2-cfg1-\S+, because .* needs a scale above 1"
    with pytest.raises(ValueError, match=message):
        swept(workdir, real, "weaker_low=0:0.5:0.1", extra=(*MODEL, "--guidance_scale", "1", "--out", tmp_path / "swept"))
    assert not drawn


def test_a_missing_reference_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("weights were read before"))
    with pytest.raises(FileNotFoundError, match="absent.npz does not exist; check --reference"):
        swept(tmp_path / "run", tmp_path / "absent.npz", "guidance_scale=1:2:1")


def test_images_are_not_swept(real, tmp_path):
    np.savez(tmp_path / "made.npz", Noise(9, 8).pixels)
    with pytest.raises(ValueError, match="--sweep: for models only; the images of .*made.npz are there already"):
        swept(tmp_path / "made.npz", real, "guidance_scale=1:2:1")
