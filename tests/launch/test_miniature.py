"""Tables, scheduling and report of the miniature paper, without training."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.miniature import miniature, report, tables
from launch.miniature import run as miniature_run
from repae_jax.evaluation import plots
from repae_jax.job import build

# ---- the declaration ----------------------------------------------------------------------------------------------------


@functools.cache
def built(setting):
    return build.build(tables.config_of(tables.Run(setting)))


@pytest.mark.parametrize("setting", tables.SETTINGS)
def test_every_config_builds(setting):
    config, job = tables.config_of(tables.Run(setting)), built(setting)
    assert job.latent_shape == (4, 4, 8)
    assert (job.nets.sit is not None) == bool(tables.SETTINGS[setting].network)
    if job.nets.sit is not None:
        assert config.steps == tables.STEPS and config.steps % 2 == 0
        assert (job.sampling.sampler == "ancestral") == (tables.SETTINGS[setting].network == "dit")
    assert bool(config.init.get("disc")) == (setting != "scratch" and "gan" in job.recipe.vae_weights and setting != "vae")


def test_settings_are_what_they_are_called():
    weights = {name: built(name).recipe for name in tables.SETTINGS}
    assert "align" in weights["repa-e"].vae_weights and weights["repa-e"].norm_momentum
    assert weights["naive"].vae_weights["diffusion"] == 1 and not weights["naive"].norm_momentum
    assert "align" not in weights["naive"].vae_weights and "align" in weights["naive"].sit_weights
    assert "diffusion" in weights["no-stop-gradient"].vae_weights and weights["no-stop-gradient"].norm_momentum
    assert set(weights["no-regularisation"].vae_weights) == {"align"}
    for name in ("sit", "dit", "e2e-sit", "e2e-dit"):
        assert "align" not in weights[name].sit_weights
    for name in ("repa", "dit-repa", "e2e-repa", "e2e-dit-repa"):
        assert weights[name].sit_weights["align"] == weights["repa-e"].sit_weights["align"]


def test_tables_are_consistent():
    for table in tables.TABLES.values():
        assert set(table.rows) <= set(tables.SETTINGS) and set(table.measures) <= set(tables.MEASURES)
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(table.rows) and claim.measure in table.measures
    assert {setting for table in tables.TABLES.values() for setting in table.rows} == set(tables.SETTINGS)


def test_runs_come_after_what_they_need():
    runs = tables.runs_of(tables.TABLES)
    assert len(set(runs)) == len(runs)
    for index, run in enumerate(runs):
        assert run.source is None or run.source in runs[:index]
    assert tables.runs_of(["drop-in"], seeds=1).count(tables.Run("repa-e")) == 1
    tasks = miniature.make_tasks(runs, Path("/work"))
    names = list(tasks)
    for name, task in tasks.items():
        assert all(names.index(need) < names.index(name) for need in task.needs), name
    assert len({task.folder for task in tasks.values()}) == len(tasks)
    assert tasks["repa-e-weak seed 0"].needs == ("vae seed 0", "classifier", "weak encoder")
    assert tasks["sit seed 0"].needs == ("vae seed 0", "classifier")


def test_unknown_field_is_an_error(monkeypatch):
    setting = dataclasses.replace(tables.SETTINGS["sit"], changes={"loss.vae.gan": 0.0})
    monkeypatch.setitem(tables.SETTINGS, "sit", setting)
    with pytest.raises(ValueError, match="changes loss.vae.gan, which the config of job 'ldm' does not have"):
        tables.config_of(tables.Run("sit"))


def test_a_changed_description_is_another_folder(monkeypatch):
    before = {run: tables.folder_name(run) for run in tables.runs_of(["main"])}
    monkeypatch.setattr(tables, "VAE_STEPS", 7)
    tables.folder_name.cache_clear()
    try:
        assert not set(before.values()) & {tables.folder_name(run) for run in before}  # all start from that VAE
    finally:
        tables.folder_name.cache_clear()


# ---- scheduling ---------------------------------------------------------------------------------------------------------


class Process:
    """Ends at its second poll, having written what the task's name asks for."""

    def __init__(self, task, outcome):
        self.task, self.outcome, self.polls, self.terminated = task, outcome, 0, False

    def poll(self):
        self.polls += 1
        if self.polls < 2:
            return None
        self.task.folder.mkdir(parents=True, exist_ok=True)
        if self.outcome != "failed":
            finish(self.task, self.outcome)
        return 0

    def terminate(self):
        self.terminated = True

    def wait(self):
        pass


def finish(task, status="done", **numbers):
    task.folder.mkdir(parents=True, exist_ok=True)
    result = {"status": status, "numbers": numbers, "message": "", "seconds": 2.0, "cpu_seconds": 1.0}
    result["description"] = task.content["description"]
    (task.folder / "result.json").write_text(json.dumps(result))


def toy_tasks(folder):
    needs = {"a": (), "b": ("a",), "c": ("b",), "d": ()}
    return {name: miniature.Task(name, "repae", folder / name, {"description": name}, need) for name, need in needs.items()}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(miniature, "POLL_SECONDS", 0)


def test_all_are_done_in_order_and_once(tmp_path):
    tasks, started, lines = toy_tasks(tmp_path), [], []

    def start(task, slot):
        started.append((task.name, slot))
        return Process(task, "done")

    assert miniature.perform_all(tasks, 2, start, report=lines.append) == {}
    assert started[:2] == [("a", 0), ("d", 1)] and [name for name, _ in started] in (["a", "d", "b", "c"],)
    assert lines[-1] == "[4/4] c: done in 2 s" and "min left" in lines[1]
    assert miniature.perform_all(tasks, 2, start, report=lines.append) == {}
    assert len(started) == 4  # nothing is done again
    (tasks["b"].folder / "result.json").unlink()
    miniature.perform_all(tasks, 2, start, report=lines.append)
    assert [name for name, _ in started[4:]] == ["b"]


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_what_needs_a_run_without_weights_is_left_out(tmp_path, status):
    tasks = toy_tasks(tmp_path)
    undone = miniature.perform_all(
        tasks, 2, lambda task, _: Process(task, status if task.name == "b" else "done"), report=lambda _: None
    )
    assert undone["c"] == "needs b" and ("b" in undone) == (status == "failed")
    assert tasks["d"].result()["status"] == "done"


def test_interruption_stops_the_processes(tmp_path):
    tasks, processes = toy_tasks(tmp_path), []

    class Interrupting(Process):
        def poll(self):
            raise KeyboardInterrupt

    def start(task, _):
        processes.append(Interrupting(task, "done"))
        return processes[-1]

    with pytest.raises(KeyboardInterrupt):
        miniature.perform_all(tasks, 2, start, report=lambda _: None)
    assert len(processes) == 2 and all(process.terminated for process in processes)


def test_a_result_of_something_else_is_refused(tmp_path):
    task = toy_tasks(tmp_path)["a"]
    finish(dataclasses.replace(task, content={"description": "another"}))
    with pytest.raises(ValueError, match="is the result of another task than a: move"):
        task.result()


def test_unused_results_are_named(tmp_path):
    tasks = miniature.make_tasks(tables.runs_of(["main"], seeds=1), tmp_path)
    for task in tasks.values():
        finish(task)
    assert miniature.unused_results(tmp_path, tasks) == []
    old = tmp_path / "repa-e-seed0-00000000"
    finish(dataclasses.replace(tasks["repa-e seed 0"], folder=old))
    finish(dataclasses.replace(tasks["repa-e seed 0"], folder=tmp_path / "mine"))
    assert miniature.unused_results(tmp_path, tasks) == [old]


# ---- one task -----------------------------------------------------------------------------------------------------------


def run_task(tmp_path, monkeypatch, train):
    task = miniature.make_tasks([tables.Run("vae")], tmp_path)["vae seed 0"]
    task.folder.mkdir()
    (task.folder / "task.json").write_text(json.dumps(task.content))
    monkeypatch.setattr(miniature_run, "train", train)
    return task, miniature_run.perform(task.folder)


def test_divergence_is_a_result(tmp_path, monkeypatch):
    def train(config, folder):
        assert config.to_dict()["vae"]["channels"] == tables.SIZE["vae.channels"]
        raise miniature_run.TrainingStopped("stopped at step 40: vae/loss=nan")

    task, finished = run_task(tmp_path, monkeypatch, train)
    assert finished and task.result()["status"] == "diverged" and "vae/loss=nan" in task.result()["message"]


def test_an_interrupted_run_has_no_result(tmp_path, monkeypatch):
    task, finished = run_task(tmp_path, monkeypatch, lambda config, folder: (None, False))
    assert not finished and task.result() is None


def test_last_losses(tmp_path):
    lines = [{"step": step, "time": 1.0, "sit/noise": float(step)} for step in (10, 20, 30, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert miniature_run.last_losses(tmp_path / "metrics.jsonl") == {"velocity": 40.0}


# ---- the report ---------------------------------------------------------------------------------------------------------


def runs_of(**values):
    """setting -> runs with these Frechet distances; None is a run that diverged."""

    def run(fid):
        return Path("folder"), {"status": "diverged" if fid is None else "done", "numbers": {"fid": fid}}

    return {name: list(map(run, distances)) for name, distances in values.items()}


@pytest.mark.parametrize(
    "first, second, alike, expected",
    [
        ([10, 11, 12], [20, 21, 22], False, report.AGREES),
        ([20, 21, 22], [10, 11, 12], False, report.DISAGREES),
        ([10, 20, 30], [12, 22, 32], False, report.NOISE),
        ([10], [20], False, report.AGREES),
        ([10, 11, 12], [20, 21, 22], True, report.DISAGREES),
        ([20, 20, 20], [21, 21, 21], True, report.AGREES),
        ([1, 2], [None, 3], False, report.AGREES),
        ([1, math.nan], [3, 3], False, report.DISAGREES),
        ([None], [None], False, report.DIVERGED),
        ([], [1], False, report.NOT_RUN),
    ],
)
def test_verdicts(first, second, alike, expected):
    claim = tables.Claim("repa-e", "repa", "4.07 against 7.90", alike=alike)
    verdict, ours = report.judge(claim, runs_of(**{"repa-e": first, "repa": second}))
    assert verdict == expected
    assert ("one run each" in ours) == (len(first) == len(second) == 1 and None not in first)


def test_more_is_better():
    claim = tables.Claim("repa-e", "repa", "", "label_accuracy")
    runs = runs_of(**{"repa-e": [0], "repa": [0]})
    runs["repa-e"][0][1]["numbers"]["label_accuracy"], runs["repa"][0][1]["numbers"]["label_accuracy"] = 0.9, 0.5
    assert report.judge(claim, runs)[0] == report.AGREES


def test_cells():
    measure = tables.MEASURES["fid"]
    assert report.cell([1.0, 3.0], measure) == "2.0 ± 1.4"
    assert report.cell([1.0], measure) == "1.0"
    assert report.cell([1.0, math.inf], measure) == "1.0 (1 of 2 diverged)"
    assert report.cell([math.inf], measure) == "diverged"
    assert report.cell([math.nan], measure) == report.cell([], measure) == "–"


@pytest.fixture
def partly_done(tmp_path):
    """Tasks of all tables, of which the first two have results: REPA-E is worse than REPA, one naive run diverged."""
    tasks = miniature.make_tasks(tables.runs_of(tables.TABLES), tmp_path / "work")
    rng = np.random.default_rng(0)
    finish(tasks["classifier"], accuracy=0.99, fid_of_held_out_digits=2.5)
    for name, fid in (("sit", 30.0), ("repa", 20.0), ("repa-e", 25.0), ("naive", 90.0)):
        for seed in range(2):
            task = tasks[f"{name} seed {seed}"]
            distances = {"fid": fid + seed, "fid_halfway": 2 * fid, "fid_steps": [5, 10], "fid_of_reconstructions": 3}
            others = {"l1": 0.1, "psnr": 20, "spatial_variance": 0.3, "total_variation": 4.0, "velocity": 1.0}
            finish(task, **distances, **others, label_accuracy=0.5)
            if seed:
                continue
            np.save(task.folder / "samples.npy", rng.integers(0, 256, (10, 4, 16, 16, 3), np.uint8))
            np.save(task.folder / "latents.npy", rng.normal(size=(10, 4, 4, 8)))
            lines = [json.dumps({"step": step, "time": 1.0, "latents/std": 1 / step}) for step in (1, 10, 20)]
            (task.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    naive = tasks["naive seed 1"]
    finish(naive, "diverged")
    result = naive.result() | {"message": "stopped at step 40: sit/loss=nan. Parameters are those of step 20"}
    (naive.folder / "result.json").write_text(json.dumps(result))
    return tasks


def test_report(partly_done, tmp_path):
    report.write(tmp_path / "R.md", partly_done)
    text = (tmp_path / "R.md").read_text()
    assert "| SiT + REPA | 2 | 20.5 ± 0.7 | 40.0 ± 0.0 | 3.00 ± 0.00 | 0.500 ± 0.000 |" in text
    assert "“REPA-E” than with “SiT + REPA” (4.07 against 7.90): **disagrees**, 25.5 ± 0.7 against 20.5 ± 0.7." in text
    assert "0.3000 (1 of 2 diverged)" in text and "* Diverged: stopped at step 40: sit/loss=nan." in text
    assert "VAE by itself | 0 | – |" in text and f"**{report.NOT_RUN}**" in text
    assert "## Alignment depth" in text  # from the row of REPA-E
    assert "Not run yet" not in text and "nan" not in text.replace("sit/loss=nan", "")
    for name in ("main.png", "main-samples.png", "collapse.png", "collapse-samples.png", "collapse-latents.png"):
        assert f"](results/{name})" in text
        with Image.open(tmp_path / "results" / name) as picture:
            assert min(picture.size) > 100, name
    assert max(map(len, text.split("## Summary")[0].splitlines())) <= 128


def test_report_of_nothing(tmp_path):
    report.write(tmp_path / "R.md", miniature.make_tasks(tables.runs_of(tables.TABLES), tmp_path / "work"))
    text = (tmp_path / "R.md").read_text()
    assert "Of 0 published comparisons: none run yet." in text and "Not run yet: `main`, `collapse`" in text


# ---- pictures and the command line ----------------------------------------------------------------------------------------


def test_pca_colors():
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 8)) * np.array([9, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    colors = plots.pca_colors(latents)
    assert colors.shape == (3, 4, 4, 3) and colors.min() == 0 and colors.max() == 255
    correlation = np.corrcoef(colors[..., 0].ravel(), latents[..., 0].ravel())[0, 1]
    assert abs(correlation) > 0.99
    assert plots.pca_colors(np.ones((1, 2, 2, 4))).shape == (1, 2, 2, 3)  # collapsed latents


def test_empty_pictures_are_errors(tmp_path):
    with pytest.raises(ValueError, match="values is empty"):
        plots.plot_settings(tmp_path / "a.png", {}, "", {}, "")
    with pytest.raises(ValueError, match="pictures is empty"):
        plots.show_pictures(tmp_path / "a.png", {})


def test_command_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        miniature.parse_args(["--help"])
    assert "drop-in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        miniature.parse_args(["--seeds", "0"])
    assert "--seeds: 0 must be at least 1" in capsys.readouterr().err
    assert miniature.parse_args([]).results.is_file()  # the committed results, which a run replaces
    monkeypatch.setattr(miniature, "start_task", None)
    arguments = ["--workdir", str(tmp_path / "work"), "--results", str(tmp_path / "R.md"), "--report"]
    assert miniature.main(arguments) == 0 and (tmp_path / "R.md").exists()
    (tmp_path / "R.md").write_text("results of other runs")
    assert miniature.main(arguments) == 0 and (tmp_path / "R.md").read_text() == "results of other runs"
    assert "no run is finished: " in capsys.readouterr().err
