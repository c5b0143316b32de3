"""Tables, scheduling and command line of the miniature paper, without training."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from launch import small_networks
from launch.miniature import beyond, experiments, miniature, report, tables
from launch.miniature import run as miniature_run
from launch.miniature.scales import SCALES, SDVAE_STD
from repae_jax import cli, files
from repae_jax.cost import flops
from repae_jax.job import build
from repae_jax.job.recipe import make_recipe
from repae_jax.sampling.load_model import load_vae

# ---- the declaration ----------------------------------------------------------------------------------------------------


@functools.cache
def built(scale, setting):
    return build.build(experiments.config_of(SCALES[scale], experiments.Run(setting)), jax.devices()[:1])


@pytest.fixture
def later(monkeypatch):
    """A setting, and a table, beyond the paper."""
    setting = tables.Setting("SiT in two steps", "ldm", tables.NO_REPA, sampling={"steps": 2})
    table = dataclasses.replace(tables.TABLES["depth"], title="Fewer steps", rows={"sit": "", "fewer": ""}, claims=())
    monkeypatch.setitem(experiments.SETTINGS, "fewer", setting)
    for place in (experiments, beyond):
        monkeypatch.setitem(place.TABLES, "fewer", table)


@functools.cache
def recipe_of(setting):
    return make_recipe(build.plain_config(experiments.config_of(DIGITS, experiments.Run(setting))))


DIGITS = SCALES["digits"]


@pytest.mark.parametrize("setting", experiments.SETTINGS)
def test_every_config_is_valid(setting):
    for scale in SCALES.values():
        config = experiments.config_of(scale, experiments.Run(setting))
        plain = build.plain_config(config)
        assert plain["steps"] % plain["checkpoint"]["every"] == 0
        if network := experiments.SETTINGS[setting].network:
            assert plain["steps"] >= scale.steps
            assert (plain["sampling"]["sampler"] == "ancestral") == (network == "dit")
    alone = experiments.SETTINGS[setting].job == "vae"
    assert bool(config.init.get("disc")) == (setting != "scratch" and "gan" in recipe_of(setting).vae_weights and not alone)


@pytest.mark.parametrize("setting", ["vae", "repa-e-other", "dit-repa", "naive", "deep"])
def test_configs_build(setting):
    job = built("digits", setting)
    assert job.latent_shape == (4, 4, 8 if "other" in setting else 32)
    assert (job.nets.sit is not None) == bool(experiments.SETTINGS[setting].network)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small"])
def test_scales(scale):
    """Tokens of SiT and encoder match, and runs compared at equal compute end when they have cost what REPA-E costs."""
    flop = {}
    for name in ("repa-e", *SCALES[scale].compute_ratio):
        job = built(scale, name)
        flop[name] = sum(flops.of_step(job).values())
    for name, ratio in SCALES[scale].compute_ratio.items():
        assert 4 * ratio == round(4 * ratio) and abs(flop["repa-e"] / flop[name] - ratio) <= 0.2
        steps = experiments.evaluated_steps(SCALES[scale], experiments.SETTINGS[name])
        assert steps[-1] == ratio * tables.LONG * SCALES[scale].steps
        assert {SCALES[scale].steps, tables.LONG * SCALES[scale].steps} <= set(steps)


def test_published_scale_of_latents():
    """KL pulls the latents together as strongly as published: weight times the sum of squared latents, 0.12 for SD-VAE."""
    for scale, setting in itertools.product(SCALES.values(), ("repa-e", "repa-e-other")):
        config = experiments.config_of(scale, experiments.Run(setting))
        side = scale.image_size // 2 ** (len(config.vae.channel_multipliers) - 1)
        latents = side**2 * config.vae.latent_channels
        assert config.loss.vae.kl * latents * SDVAE_STD**2 == pytest.approx(0.12, rel=0.05)
        assert experiments.config_of(scale, experiments.Run("vae-other")).loss.vae.kl == 1e-6


def test_settings_are_what_they_are_called():
    weights = {name: recipe_of(name) for name in experiments.SETTINGS}
    assert "align" in weights["repa-e"].vae_weights and weights["repa-e"].norm_momentum
    assert weights["naive"].vae_weights["diffusion"] == 1 and not weights["naive"].norm_momentum
    assert "align" not in weights["naive"].vae_weights and "align" in weights["naive"].sit_weights
    assert "diffusion" in weights["no-stop-gradient"].vae_weights and weights["no-stop-gradient"].norm_momentum
    for name in ("sit", "dit", "e2e-sit", "e2e-dit"):
        assert "align" not in weights[name].sit_weights
    for name in ("repa", "dit-repa", "e2e-repa", "e2e-dit-repa"):
        assert weights[name].sit_weights["align"] == weights["repa-e"].sit_weights["align"]
    configs = {name: experiments.config_of(DIGITS, experiments.Run(name)) for name in ("vae", "repa-e", "fast-vae")}
    rates = {name: config.optim.vae.learning_rate for name, config in configs.items()}
    assert rates == {
        "vae": 1e-3,
        "repa-e": 1e-4,
        "fast-vae": experiments.config_of(DIGITS, experiments.Run("sit")).optim.sit.learning_rate,
    }


def test_tables_are_consistent():
    for table in experiments.TABLES.values():
        assert set(table.rows) <= set(experiments.SETTINGS) and set(table.measures) <= set(tables.MEASURES)
        assert table.expected
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(table.rows) and claim.measure in table.measures
    rows = {setting for table in experiments.TABLES.values() for setting in table.rows}
    assert rows | {"vae-other"} == set(experiments.SETTINGS)
    assert not set(beyond.SETTINGS) & set(tables.SETTINGS) and not set(beyond.TABLES) & set(tables.TABLES)


def test_number_of_runs():
    counts = {
        (name, seeds): experiments.runs_per_setting(DIGITS, name, seeds)
        for name in ("vae", "repa", "deep")
        for seeds in (None, 2)
    }
    assert counts == {("vae", None): 1, ("vae", 2): 1, ("repa", None): 6, ("repa", 2): 2, ("deep", None): 3, ("deep", 2): 2}
    assert experiments.runs_per_setting(SCALES["small"], "repa") == 3


def test_runs_come_after_what_they_need():
    runs = experiments.runs_of(DIGITS, experiments.TABLES)
    assert len(set(runs)) == len(runs)
    for index, run in enumerate(runs):
        assert set(run.needs) <= set(runs[:index])
    assert experiments.runs_of(DIGITS, ["drop-in"], seeds=1).count(experiments.Run("repa-e")) == 1
    tasks = miniature.make_tasks(DIGITS, runs, Path("/work"), Path("/emoji"))
    names = list(tasks)
    for name, task in tasks.items():
        assert all(names.index(need) < names.index(name) for need in task.needs), name
    assert len({task.folder for task in tasks.values()}) == len(tasks)
    assert tasks["repa-e-weak seed 0"].needs == ("vae seed 0", "weak encoder", "classifier", "trained encoder")
    assert tasks["sit seed 0"].needs == ("vae seed 0", "classifier", "trained encoder")


def test_unknown_field_is_an_error(monkeypatch):
    setting = dataclasses.replace(experiments.SETTINGS["sit"], changes={"loss.vae.gan": 0.0})
    monkeypatch.setitem(experiments.SETTINGS, "sit", setting)
    with pytest.raises(ValueError, match="changes loss.vae.gan, which the config of job 'ldm' does not have"):
        experiments.config_of(DIGITS, experiments.Run("sit"))


def test_a_changed_description_is_another_folder():
    """A folder's name does not depend on where the runs and the pictures are, but on all that a result depends on."""
    scale = SCALES["small"]
    changed = dataclasses.replace(scale, vae_steps=7)
    for run in experiments.runs_of(scale, ["main"], seeds=1):
        assert experiments.folder_name(scale, run) != experiments.folder_name(changed, run)  # all start from that VAE
    runs = [experiments.Run("repa-e")]
    one, other = (miniature.make_tasks(scale, runs, Path(folder), Path(folder)) for folder in ("/a", "/b"))
    assert one["repa-e seed 0"].folder.name == other["repa-e seed 0"].folder.name


def test_scaled_latents_make_the_same_images():
    """The posterior's means and deviations grow by one factor, and reconstructions stay: 1e-5 of values of about 1."""
    module = built("digits", "vae").nets.vae
    encode, decode = (jax.jit(functools.partial(module.apply, method=method)) for method in ("encode", "decode"))
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1)
    params = jax.jit(module.init)(jax.random.key(1), images, jnp.zeros((2, 4, 4, 32)))["params"]
    before = encode({"params": params}, images)
    stats = {"mean": np.full(32, 0.5), "var": np.linspace(0.5, 1.5, 32)}
    scaled, new_stats = miniature_run.scale_latents(jax.device_get(params), stats, 3.0)
    after = encode({"params": scaled}, images)
    np.testing.assert_allclose(after.mean, 3 * before.mean, atol=1e-5)
    np.testing.assert_allclose(after.std, 3 * before.std, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.mean(new_stats["var"])), 3.0)
    np.testing.assert_allclose(new_stats["mean"], 1.5)
    images = (decode({"params": tree}, z.mean) for tree, z in ((params, before), (scaled, after)))
    np.testing.assert_allclose(*images, atol=1e-5)


CONFIG = small.ROOT / "launch/miniature/config.py"


def config_read(argument):
    return cli.ConfigParser().parse_args([f"--config={CONFIG}:{argument}", "--config.log.every=7"]).config


def test_every_command_takes_the_config_of_a_setting(tmp_path, monkeypatch):
    """It is that of the run which the miniature starts in its default folders, with the changes of the command line."""
    monkeypatch.chdir(tmp_path)
    args = miniature.parse_args(["--scale", "medium"])
    assert args.pictures == tmp_path / "runs/miniature/medium/emoji-64"
    run = experiments.Run("repa-e", 1)
    expected = experiments.config_of(args.scale, run, args.workdir, args.pictures).unlock()
    expected.log.every = 7
    assert config_read("medium,repa-e,seed=1").to_dict() == expected.to_dict()
    assert config_read("digits,vae").job == "vae"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("large,repa-e", "preset 'large' in 'large,repa-e' is unknown; allowed: one of .*'digits', 'medium', 'small'"),
        ("medium,repa-f", "preset 'repa-f' in 'medium,repa-f' is unknown; allowed: .*'repa-e'"),
        ("medium", "expected SCALE,SETTING after the colon, such as medium,repa-e: SCALE is one of digits, small, medium; "),
        ("repa-e", "expected SCALE,SETTING after the colon"),
        ("medium,repa-e,seed=x", "config argument 'seed=x': expected a value like 0"),
    ],
)
def test_a_config_of_no_setting(argument, message):
    with pytest.raises(SystemExit, match=f"^error: --config={CONFIG}:{argument}: {message}") as caught:
        config_read(argument)
    assert "\n" not in caught.value.code


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
    tasks = miniature.make_tasks(DIGITS, experiments.runs_of(DIGITS, ["main"], seeds=1), tmp_path, tmp_path)
    for task in tasks.values():
        finish(task)
    assert miniature.unused_results(tmp_path, tasks) == []
    old = tmp_path / "repa-e-seed0-00000000"
    finish(dataclasses.replace(tasks["repa-e seed 0"], folder=old))
    finish(dataclasses.replace(tasks["repa-e seed 0"], folder=tmp_path / "mine"))
    assert miniature.unused_results(tmp_path, tasks) == [old]


# ---- one task -----------------------------------------------------------------------------------------------------------


def run_task(tmp_path, monkeypatch, train):
    task = miniature.make_tasks(DIGITS, [experiments.Run("vae")], tmp_path, tmp_path)["vae seed 0"]
    task.folder.mkdir()
    (task.folder / "task.json").write_text(json.dumps(task.content))
    monkeypatch.setattr(miniature_run, "train", train)
    return task, miniature_run.perform(task.folder)


def test_divergence_is_a_result(tmp_path, monkeypatch):
    def train(config, folder):
        assert config.to_dict()["vae"]["channels"] == DIGITS.fields["vae.channels"]
        raise miniature_run.TrainingStopped("stopped at step 40: vae/loss=nan")

    task, finished = run_task(tmp_path, monkeypatch, train)
    assert finished and task.result()["status"] == "diverged" and "vae/loss=nan" in task.result()["message"]


def test_an_interrupted_run_has_no_result(tmp_path, monkeypatch):
    task, finished = run_task(tmp_path, monkeypatch, lambda config, folder: (None, False))
    assert not finished and task.result() is None


def test_last_losses(tmp_path):
    lines = [{"step": step, "time": 1.0, "sit/noise": float(step)} for step in (10, 20, 30, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert miniature_run.last_losses(tmp_path, 40) == {"velocity": 40.0}
    assert miniature_run.last_losses(tmp_path, 20) == {"velocity": 20.0}


@pytest.mark.slow
def test_runs_are_trained_and_evaluated(tmp_path, monkeypatch):
    """A toy VAE by itself, REPA-E from it, and REPA-E's checkpoints sampled in another way, by the processes' own function."""
    fields = {
        "ema_decay": 0.9,
        "vae.channels": 4,
        "vae.latent_channels": 2,
        "sit.hidden_size": 16,
        "sit.depth": 2,
        "sit.encoder_depth": 1,
    }
    toy = dataclasses.replace(
        DIGITS, name="toy", fields={**DIGITS.fields, **fields}, encoder_steps={"trained": 1, "weak": 1}, vae_steps=4, steps=4,
        samples=40, encoder={"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
    )  # fmt: skip
    monkeypatch.setitem(SCALES, "toy", toy)
    monkeypatch.setitem(small_networks.CLASSIFIER_RECIPES, "digits", small_networks.Recipe(1, 32, 4e-3))
    resampled = tables.Setting("REPA-E in two steps", samples_of="repa-e", sampling={"steps": 2})
    monkeypatch.setitem(experiments.SETTINGS, "again", resampled)
    tasks = miniature.make_tasks(toy, [experiments.Run(name) for name in ("vae", "repa-e", "again")], tmp_path, tmp_path)
    for task in tasks.values():
        task.folder.mkdir(exist_ok=True)
        files.write_json(task.folder / "task.json", task.content)
        assert miniature_run.perform(task.folder) and task.result()["status"] == "done"
    alone, joint, again = (tasks[f"{name} seed 0"] for name in ("vae", "repa-e", "again"))
    stats = load_vae(experiments.vae_files(alone.folder)["vae"]).latent_stats
    assert np.sqrt(np.mean(stats.var)) == pytest.approx(SDVAE_STD)
    numbers = joint.result()["numbers"]
    assert set(tables.MEASURES) <= set(numbers) and 0 <= numbers["drift"] <= 1
    assert numbers["steps"] == [1, 2, 3, 4, 6, 8] and len(numbers["curves"]["fid"]) == 6
    assert numbers["fid"] == numbers["curves"]["fid"][3] and numbers["fid_long"] == numbers["curves"]["fid"][5]
    shapes = {name: np.load(joint.folder / f"{name}.npy").shape for name in ("samples", "latents", "pictures", "spectrum")}
    assert shapes == {
        "samples": (6, 10, 4, 16, 16, 3), "latents": (40, 4, 4, 2), "pictures": (40, 16, 16, 3), "spectrum": (2, 16)
    }  # fmt: skip
    assert again.needs[:2] == ("vae seed 0", "repa-e seed 0") and not (again.folder / "checkpoints").exists()
    other = again.result()["numbers"]
    assert other["steps"] == [2, 4] and other["psnr"] == numbers["psnr"] and other["fid"] != numbers["fid"]
    # the latents are of the VAE at the end of the run, as the one that others start from
    shown = np.load(joint.folder / "pictures.npy")
    end = miniature_run.latents_of(load_vae(experiments.vae_files(joint.folder)["vae"]), shown)
    np.testing.assert_allclose(np.load(joint.folder / "latents.npy"), end, atol=1e-4)


def test_labels_of_samples_are_as_frequent_as_in_training():
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    np.testing.assert_array_equal(miniature_run.sample_labels(labels, 10), np.repeat([0, 1, 2], [5, 3, 2]))
    assert len(miniature_run.sample_labels(labels, 999)) == 999


def test_drift_does_not_depend_on_scale():
    """Latents that are only scaled and shifted have not drifted, and half of the variance is lost with as much noise."""
    random = np.random.default_rng(0)
    latents, noise = random.normal(size=(2, 200, 4, 4, 8))
    assert miniature_run.drift(latents, 3 * latents + 1) == pytest.approx(0, abs=1e-6)
    assert miniature_run.drift(latents, latents + noise) == pytest.approx(0.5, abs=0.02)


def test_time_of_interrupted_tasks_adds_up(tmp_path):
    miniature_run.add_seconds(tmp_path / "seconds.json", 10.0, 8.0)
    assert miniature_run.add_seconds(tmp_path / "seconds.json", 1.0, 2.0) == {"seconds": 11.0, "cpu_seconds": 10.0}


# ---- the command line ----------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        miniature.parse_args(["--help"])
    assert "drop-in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        miniature.parse_args(["--seeds", "0"])
    assert "--seeds: 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        miniature.parse_args(["--jobs", "4096"])
    assert "--jobs 4096: every run takes a core" in capsys.readouterr().err
    assert miniature.parse_args(["--workdir", "work"]).results == Path("work/report/README.md").absolute()


def test_tables_beyond_the_paper_run_if_named(tmp_path, monkeypatch, capsys, later):
    asked = []
    monkeypatch.setattr(miniature, "perform_all", lambda tasks, *_, **__: asked.append(set(tasks)) or {})
    arguments = ["--scale", "digits", "--workdir", str(tmp_path), "--seeds", "1"]
    miniature.main(arguments)
    miniature.main([*arguments, "--table", "fewer"])
    miniature.main([*arguments, "--table", "depth", "fewer"])
    every, named, both = asked
    assert "fewer seed 0" not in every and "dit seed 0" in every
    runs = {name for name in named if "seed" in name}
    assert runs == {"vae seed 0", "sit seed 0", "fewer seed 0"} and named | {"deep seed 0"} < both
    with pytest.raises(SystemExit):
        miniature.parse_args(["--help"])
    text = capsys.readouterr().out
    named = text.index("beyond the paper, only where named:\n")
    assert text.index("tables of the paper:\n  main") < named < text.index("  fewer        Fewer steps")


def test_a_setting_may_be_sampled_in_another_way(later):
    def evaluation(setting):
        return experiments.description(DIGITS, experiments.Run(setting))["evaluation"]

    assert evaluation("sit")["sampler"] == {"sampler": "heun", "steps": 8} and evaluation("vae")["sampler"] is None
    assert evaluation("fewer")["sampler"] == {"sampler": "heun", "steps": 2}


def test_folders_of_finished_runs():
    """Of the first versions, whose configs had fewer fields: those runs are found again."""
    runs = {"vae": "11616ed4", "sit": "c28cf0eb", "repa-e": "e36f0266", "dit-repa": "5ddce2a0"}
    for setting, code in runs.items():
        assert experiments.folder_name(DIGITS, experiments.Run(setting)) == f"{setting}-seed0-{code}"


def test_fields_that_came_later_are_described_if_they_change_something(monkeypatch):
    assert "trackers" not in experiments.description(DIGITS, experiments.Run("sit"))["config"]["log"]
    changed = dataclasses.replace(tables.SETTINGS["sit"], changes={**tables.NO_REPA, "log.project": "mine"})
    monkeypatch.setitem(experiments.SETTINGS, "sit", changed)
    log = experiments.description(DIGITS, experiments.Run("sit"))["config"]["log"]
    assert log == {"every": 20, "project": "mine"}


def test_results_are_of_finished_runs(tmp_path, monkeypatch, capsys):
    """A classifier alone does not replace a page, and a page is not written but where `--results` says."""
    work, written = tmp_path / "work", []
    monkeypatch.setattr(report, "write", lambda path, scale, tasks, front: written.append((path, front)))
    arguments = ["--scale", "digits", "--workdir", str(work), "--report"]
    scale, runs = SCALES["digits"], experiments.runs_of(SCALES["digits"], experiments.TABLES)
    tasks = miniature.make_tasks(scale, runs, work, work / "emoji-16")
    finish(tasks["classifier"])
    assert miniature.main(arguments) == 1 and not written
    assert f"no run is finished in {work}: no page is written" in capsys.readouterr().err
    finish(tasks["vae seed 0"])
    assert miniature.main(arguments) == 0 and written == [(work / "report" / "README.md", None)]
    assert miniature.main([*arguments, "--results", str(tmp_path / "R.md"), "--front", str(tmp_path / "f.png")]) == 0
    assert written[1:] == [(tmp_path / "R.md", tmp_path / "f.png")]
