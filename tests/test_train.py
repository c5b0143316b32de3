"""Whole runs through the training loop: resuming, stopping, pictures, bad weights, and the command itself.

One config serves all runs, so that its programs are compiled once.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import feature_stub
import jax
import numpy as np
import pytest
import small
from PIL import Image

from checkpoints_tools.convert import convert
from configs import ldm
from repae_jax import cli, prepare_images, train
from repae_jax.cost import flops
from repae_jax.evaluation import hooks
from repae_jax.evaluation.reference_stats import read_reference
from repae_jax.job import build, compilation, frozen_weights, initial_state, training_data
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.sample import sample_batches
from repae_jax.sampling.load_model import load_model
from repae_jax.training import checkpoint, metric_log, trackers

ROOT = Path(__file__).parents[1]
CLOCK = {"time", *metric_log.SPEED_NAMES}
QUIET = {"hooks.samples_every": 0, "hooks.reconstructions_every": 0}


def config(steps, **changes):
    run = {"steps": steps, "checkpoint.every": 2, "checkpoint.keep_last": 2, "max_skipped_in_a_row": 2}
    return small.config({**run, **QUIET, "optim.sit.learning_rate": 2e-4, **changes})


def command(*arguments, compiled=None, timeout=300):
    environment = os.environ | ({"JAX_COMPILATION_CACHE_DIR": str(compiled)} if compiled else {})
    program = [sys.executable, "-m", "repae_jax.train", *arguments]
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


SMALL = ["data.image_size=8", "vae.channel_multipliers=(1,1)", "vae.norm_groups=4", "disc.num_layers=1"]
SMALL += ["encoders.target.image_size=8", "encoders.target.architecture.patch_size=2", "max_skipped_in_a_row=2"]
SMALL += ["optim.sit.learning_rate=2e-4", "hooks.samples_every=0", "hooks.reconstructions_every=0"]
SMALL = [f"--config.{field}" for field in SMALL]


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps without a break, with pictures: .workdir, .state, .metrics."""
    workdir = tmp_path_factory.mktemp("whole")
    pictures = {"hooks.samples_every": 2, "hooks.reconstructions_every": 4}
    state, finished = train.train(config(4, **pictures), workdir)
    assert finished
    return SimpleNamespace(workdir=workdir, state=jax.device_get(state), metrics=metrics_of(workdir))


@pytest.fixture(scope="module")
def half(tmp_path_factory, compiled):
    """Workdir of the first two of the four steps, by the command; .workdir is the folder, .output what it printed."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    done = command("--config", "configs/repae.py:tiny", "--workdir", str(workdir), *SMALL, compiled=compiled)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(workdir=workdir, output=done.stdout)


def copy_of(workdir, tmp_path):
    return Path(shutil.copytree(workdir, tmp_path / "run"))


def assert_same_run(state, workdir, whole):
    assert small.differing(state, whole.state) == []
    assert metrics_of(workdir) == whole.metrics


@pytest.mark.integration
def test_a_run_logs_every_step_and_leaves_its_checkpoints(whole):
    assert [line["step"] for line in whole.metrics] == [1, 2, 3, 4]
    assert {"vae/loss", "sit/loss", "disc/loss", "vae/align", "sit/velocity", "skipped", "bad_records"} <= set(whole.metrics[0])
    assert all(line["skipped"] == 0 for line in whole.metrics)
    first, *others = [json.loads(line) for line in (whole.workdir / "metrics.jsonl").read_text().splitlines()]
    names = set(metric_log.SPEED_NAMES) - {"mfu"}  # nobody knows the peak of a CPU
    assert not names & set(first) and all(set(line) & set(metric_log.SPEED_NAMES) == names for line in others)
    flop = sum(flops.of_step(build.build(config(4))).values())
    for line in others:
        assert line["tflops_per_device"] == pytest.approx(line["images_per_second"] * flop / 8 / 1e12)
        assert 0 <= line["input_wait"] <= 1
    with checkpoint.Checkpointer(whole.workdir) as checkpointer:
        assert checkpointer.steps() == [2, 4]
    assert int(whole.state.step) == 4
    assert list((whole.workdir / "tensorboard").iterdir())


@pytest.mark.integration
def test_pictures(whole):
    pictures = sorted(str(path.relative_to(whole.workdir)) for path in whole.workdir.rglob("*.png"))
    assert pictures == ["reconstructions/0000004.png", "samples/0000002.png", "samples/0000004.png"]
    for name in pictures:
        with Image.open(whole.workdir / name) as picture:
            picture.load()
            assert picture.mode == "RGB" and min(picture.size) >= 2 * 8
            assert np.asarray(picture).std() > 0


def replace_computing(monkeypatch):
    """Runs begin with random numbers, and nothing is computed in a step; returns a namespace with `step`, to be replaced."""

    def step(state, *_):
        return state.replace(step=state.step + 1), {"sit/loss": 0.5, "skipped_in_a_row": 0}

    steps = SimpleNamespace(step=step)
    compiled = SimpleNamespace(compile=lambda: steps.step)
    monkeypatch.setattr(frozen_weights, "load_frozen", lambda job: {})
    monkeypatch.setattr(initial_state, "create_initial_state", lambda job, frozen, make_batches: small.random_state(job))
    monkeypatch.setattr(compilation, "jit_step", lambda job, state: SimpleNamespace(lower=lambda *_: compiled))
    return steps


@pytest.fixture
def uncompiled(monkeypatch):
    """The namespace of `replace_computing`."""
    return replace_computing(monkeypatch)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Workdir of two steps that were not computed."""
    workdir = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_computing(monkeypatch)
        train.train(config(2), workdir)
    return workdir


@pytest.mark.integration
def test_a_tracker_without_its_package_ends_the_start(uncompiled, tmp_path, monkeypatch):
    missing = type("Missing", (trackers.Wandb,), {"package": "not_installed_anywhere"})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", missing)
    monkeypatch.setattr(train, "prepare_workdir", lambda *_: pytest.fail("the workdir was touched before"))
    with pytest.raises(ImportError, match=r"not_installed_anywhere is not installed: pip install -e .\[wandb\]$") as caught:
        train.train(config(2, **{"log.trackers": ("tensorboard", "wandb")}), tmp_path)
    assert cli.line_of(caught.value)


@pytest.mark.integration
def test_a_resumed_run_continues_its_record(uncompiled, tmp_path, monkeypatch):
    """MLflow's, the only tracker whose record can be read by its own client in this process."""
    mlflow = pytest.importorskip("mlflow", reason="pip install -e .[mlflow]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log = {"log.trackers": ("tensorboard", "mlflow"), "log.project": "resumed"}
    for steps in (2, 4):
        train.train(config(steps, **log), tmp_path / "run")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "sit/loss")] == [1, 2, 3, 4]
    assert run.data.params["job"] == "repae" and run.data.params["data.image_size"] == "8"


@pytest.mark.integration
def test_what_a_step_does_and_in_which_order(uncompiled, tmp_path, monkeypatch):
    """Metrics, the checkpoint, its reading back, hooks; a request to stop saves, and leaves the hooks out."""
    calls, stop = [], []

    def record(name):
        before = getattr(checkpoint.Checkpointer, name)

        def call(self, step, *args):
            calls.append((name, step))
            return before(self, step, *args)

        monkeypatch.setattr(checkpoint.Checkpointer, name, call)

    def draw(step, state):
        calls.append(("hook", step))
        stop.append(step == 4)

    record("save")
    record("read_back")
    monkeypatch.setattr(train.stopping, "stop_requests", lambda: contextlib.nullcontext(lambda: any(stop)))
    monkeypatch.setattr(train, "make_hooks", lambda *_: [hooks.Hook(4, draw, lambda step: True)])
    run = config(9, **{"log.every": 3, "checkpoint.every": 2})
    _, finished = train.train(run, tmp_path)
    expected = [("save", 2), ("read_back", 2), ("save", 4), ("hook", 4), ("save", 5)]
    assert not finished and calls == expected
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 3, 5]
    assert checkpoint.saved_steps(tmp_path) == [4, 5] and not (tmp_path / "owner.json").exists()
    assert checkpoint.read_data_state(tmp_path)["loader"]["next_batch"] == 5

    stop.clear()
    calls.clear()
    monkeypatch.setattr(train, "make_hooks", lambda *_: [hooks.Hook(5, draw, lambda step: False)])
    _, finished = train.train(run, tmp_path)  # the hook of step 5 was left out
    assert finished and calls == [("hook", 5), ("save", 6), ("read_back", 6), ("save", 8), ("save", 9), ("hook", 9)]
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 3, 5, 6, 9]


@pytest.mark.integration
def test_the_log_warns_of_a_fault_once_and_knows_what_earlier_starts_have_logged(uncompiled, tmp_path, monkeypatch):
    """The third log with a gradient of exactly 0 is the first one after the run was continued."""
    warnings, stop = [], []

    def step(state, *_):
        stop.append(int(state.step) == 1)
        return state.replace(step=state.step + 1), {"sit/loss": 0.5, "grad_norm/sit": 0.0, "skipped_in_a_row": 0}

    uncompiled.step = step
    monkeypatch.setattr(train.logging, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(train.stopping, "stop_requests", lambda: contextlib.nullcontext(lambda: any(stop)))
    assert not train.train(config(6, **{"log.every": 1}), tmp_path)[1]
    assert metrics_of(tmp_path)[-1]["step"] == 2 and not [text for text in warnings if "gradients" in text]
    stop.clear()
    assert train.train(config(6, **{"log.every": 1}), tmp_path)[1]
    (warning,) = (text for text in warnings if "gradients" in text)
    assert warning.startswith("step 3: zero gradients: grad_norm/sit exactly 0 in the last 3 logs. ")


@pytest.mark.integration
def test_steps_in_flight_before_a_hook_are_no_pause(uncompiled, tmp_path, monkeypatch):
    """A device that takes a second per step; hooks between logged steps, which wait for it and take nothing themselves."""
    now, numbers = [0.0], itertools.count(1)

    class Late(float):
        def block_until_ready(self):
            now[0] = max(now[0], float.__float__(self))

        def __float__(self):
            self.block_until_ready()
            return 0.0

        def __int__(self):
            return int(float(self))

    def step(state, *_):
        late = Late(next(numbers))
        return state, dict.fromkeys(("sit/loss", "skipped_in_a_row"), late)

    def wait_for_all(step, state):
        now[0] = max(now[0], float(step))

    uncompiled.step = step
    monkeypatch.setattr(train, "Progress", functools.partial(metric_log.Progress, clock=lambda: now[0]))
    monkeypatch.setattr(train, "make_hooks", lambda *_: [hooks.Hook(5, wait_for_all, lambda step: True)])
    train.train(config(14, **{"log.every": 4, "checkpoint.every": 14}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line.get("seconds_per_step") for line in lines[1:]} == dict.fromkeys((4, 8, 12, 14), 1.0)


@pytest.mark.integration
def test_fid_during_training(half, tmp_path, monkeypatch):
    """It is that of the checkpoint's samples."""
    network = feature_stub.StubNetwork(64)
    stats = [gaussian_stats(np.random.default_rng(0).normal(size=(50, size))) for size in (6, 5)]
    np.savez(tmp_path / "reference.npz", mu=stats[0][0], sigma=stats[0][1], mu_s=stats[1][0], sigma_s=stats[1][1])
    files = {"hooks.fid_reference": str(tmp_path / "reference.npz"), "hooks.fid_inception": "inception.pth"}
    monkeypatch.setattr(hooks.inception_features, "load_network", lambda *_: network)
    workdir = copy_of(half.workdir, tmp_path)
    train.train(config(4, **files, **{"hooks.fid_every": 2, "hooks.fid_samples": 20}), workdir)
    before, score = [line for line in metrics_of(workdir) if "fid/20_samples" in line]
    assert before["step"] == 2, "of the checkpoint it began with"
    trained, labels = load_model(workdir), np.arange(20, dtype=np.int32) % 10
    batches = [batch for _, batch in sample_batches(trained, trained.sampling, labels, 64, config(4).seed)]
    pool = np.concatenate([network(batch).pool for batch in batches])
    expected = frechet_distance(*gaussian_stats(pool), *read_reference(tmp_path / "reference.npz", network).pool)
    assert score == {"step": 4, "fid/20_samples": pytest.approx(expected)} and len(np.concatenate(batches)) == 20
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        train.train(config(4, **{**files, "hooks.fid_every": 2, "hooks.fid_reference": "absent.npz"}), tmp_path / "other")


@pytest.mark.slow
def test_two_halves_equal_the_whole(whole, half, tmp_path):
    """Pictures, too, change nothing: the halves are made without."""
    workdir = copy_of(half.workdir, tmp_path)
    state, finished = train.train(config(4), workdir)
    assert finished
    assert_same_run(state, workdir, whole)


@pytest.mark.slow
def test_a_run_that_aligns_with_its_average_continues_and_has_samples(tmp_path):
    """Bit for bit; samples need neither its projector nor a second time."""

    def run(steps, name):
        changes = {"steps": steps, "checkpoint.every": 2, "log.every": 1, "hooks.samples_every": 0}
        return train.train(small.config({**changes, **small.SIT_ALONE, **small.SELF_FLOW}, ldm), tmp_path / name)

    expected, _ = run(4, "whole")
    run(2, "halves")
    state, finished = run(4, "halves")
    assert finished and small.differing(state, expected) == []
    whole, halves = (metrics_of(tmp_path / name) for name in ("whole", "halves"))
    assert halves == whole and len({line["sit/self"] for line in whole}) == 4
    trained = load_model(tmp_path / "halves")
    (images,) = (batch for _, batch in sample_batches(trained, trained.sampling, np.arange(8, dtype=np.int32), 8, 0))
    assert len({image.tobytes() for image in images}) == 8


@pytest.mark.slow
def test_a_converted_run_continues_bit_for_bit(whole, half, tmp_path):
    """Two steps here, out to the published layout, and two more from there in another workdir."""
    convert(half.workdir, tmp_path / "published")
    workdir = tmp_path / "run"
    init = {"init.checkpoint": str(tmp_path / "published"), "init.vae": "", "init.disc": "", "init.latent_stats": ""}
    state, finished = train.train(config(4, **init), workdir)
    assert finished
    # LeCam's averages are in no published file; their weight is zero here, as it is there
    assert small.differing(state, whole.state) == ["lecam.real", "lecam.fake"]
    lines = [[{name: value for name, value in line.items() if "lecam" not in name} for line in metrics]
             for metrics in (metrics_of(workdir), whole.metrics[2:])]  # fmt: skip
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("steps", "read", "fixed", "warned"),
    [([2], 0, True, True), ([2], 1, True, False), ([], 0, True, False), ([2], 0, False, False)],
)
def test_a_deterministic_run_whose_program_is_lost_is_warned(monkeypatch, warnings, steps, read, fixed, warned):
    """Where XLA compiles again, it may choose other kernels."""
    monkeypatch.setattr(train, "reading_programs", lambda: contextlib.nullcontext(["hit"] * read))
    monkeypatch.setattr(train.compilation, "is_fixed", lambda job: fixed)
    monkeypatch.setattr(train.compilation, "jit_step", lambda job, state: jax.jit(lambda *args: args[0]))
    run = SimpleNamespace(job=None, state=np.zeros(2), frozen={}, checkpointer=SimpleNamespace(steps=lambda: steps))
    np.testing.assert_array_equal(train.compile_step(run, None, {}, np.zeros(3))(run.state, {}, {}, np.zeros(3)), run.state)
    assert ["may not continue bit for bit" in message for message in warnings] == [True] * warned


@pytest.mark.integration
def test_a_finished_run_ends_at_once(whole, tmp_path, monkeypatch):
    workdir = copy_of(whole.workdir, tmp_path)
    monkeypatch.setattr(initial_state, "create_initial_state", None)
    state, finished = train.train(config(4), workdir)
    assert finished
    assert_same_run(state, workdir, whole)


@pytest.mark.integration
def test_a_terminated_run_saves_itself_and_continues(whole, tmp_path, monkeypatch):
    put, calls = train.sharding.put_batch, []

    def terminate(mesh, batch):
        calls.append(batch)
        if len(calls) == 2 + 1 + 2:  # two for the latent statistics, and one ahead, then the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return put(mesh, batch)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.sharding, "put_batch", terminate)
    state, finished = train.train(config(4), tmp_path)
    monkeypatch.undo()
    stopped_at = int(state.step)
    assert not finished and 1 <= stopped_at < 4
    assert signal.getsignal(signal.SIGTERM) is before
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps()[-1] == stopped_at
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, stopped_at + 1))

    state, finished = train.train(config(4), tmp_path)
    assert finished
    assert_same_run(state, tmp_path, whole)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("owner", "function", "step"),
    [(initial_state, "abstract_state", "restoring"), (frozen_weights, "load_frozen", "loading weights"),
     (train, "make_hooks", "preparing"), (compilation, "jit_step", "compiling")],
)  # fmt: skip
def test_a_signal_before_the_first_step(uncompiled, begun, tmp_path, monkeypatch, warnings, owner, function, step):
    """It ends the run as soon as it can, says that nothing was trained, and leaves the workdir to the next start."""
    workdir, call = copy_of(begun, tmp_path), getattr(owner, function)

    def signal_and_call(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, function, signal_and_call)
    assert train.train(config(4), workdir) == (None, False)
    assert any(warning.startswith("asked to stop by SIGTERM") for warning in warnings)
    assert any(re.match(rf"asked to stop while {step}, \d+ s after the start: nothing was trained", text) for text in warnings)
    assert checkpoint.saved_steps(workdir) == [2] and not (workdir / "owner.json").exists()


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_while_waiting_for_metrics_loses_nothing(uncompiled, tmp_path, monkeypatch, number):
    """The signal comes after the step was dispatched: that step or the next is saved, never none."""
    check = train.check_finite

    def signal_and_check(step, *args):
        if step == 3:
            os.kill(os.getpid(), number)
        check(step, *args)

    monkeypatch.setattr(train, "check_finite", signal_and_check)
    state, finished = train.train(config(8), tmp_path)
    assert not finished
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps()[-1] == int(state.step) < 8


@pytest.mark.slow
def test_a_truncated_checkpoint_is_put_aside_and_made_again(whole, tmp_path):
    workdir = copy_of(whole.workdir, tmp_path)
    files = [path for path in (workdir / "checkpoints" / "4" / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    state, finished = train.train(config(4), workdir)
    assert finished
    assert_same_run(state, workdir, whole)
    assert [path.name for path in (workdir / "checkpoints_damaged").iterdir()] == ["4-0"]


@pytest.mark.slow
def test_bad_updates_in_a_row_stop_the_run(half, tmp_path, monkeypatch):
    workdir = copy_of(half.workdir, tmp_path)
    load_frozen = frozen_weights.load_frozen

    def broken(job):
        frozen = load_frozen(job)
        return {**frozen, "encoders": jax.tree.map(lambda x: x * np.nan, frozen["encoders"])}

    monkeypatch.setattr(frozen_weights, "load_frozen", broken)
    with pytest.raises(train.TrainingStopped) as caught:
        train.train(config(8), workdir)
    message = str(caught.value)
    assert "stopped at step 4" in message and "2 updates in a row (from step 3)" in message
    assert "vae/align=nan" in message and "sit/align=nan" in message and "sit/velocity" not in message
    assert "Parameters are those of step 2" in message

    monkeypatch.undo()
    with checkpoint.Checkpointer(workdir) as checkpointer:
        job = build.build(config(4))
        state, _, step = checkpointer.restore(initial_state.abstract_state(job), job.config)
    assert step == 2 and int(state.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


@pytest.mark.integration
def test_a_folder_with_a_corrupt_image(uncompiled, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    source = {"data.source": "folder", "data.options": {"path": str(tmp_path / "images"), "labels_file": None}}
    state, finished = train.train(config(2, **source, **{"data.max_bad_fraction": 0.2}), tmp_path / "run")
    assert finished and int(state.step) == 2
    assert metrics_of(tmp_path / "run")[-1]["bad_records"] == 1

    job = build.build(config(2, **source, **{"data.max_bad_fraction": 0.0}))
    with training_data.make_loader(job, training_data.make_images(job.config)) as loader, pytest.raises(RuntimeError) as caught:
        for _ in range(4):
            next(loader)
    assert re.search("1 of 16 records .* class1/15.png.*max_bad_fraction", str(caught.value))
    assert cli.line_of(caught.value)  # the command ends in this one line


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_command_trains_and_takes_overrides(whole, half):
    assert f"finished; everything is in {half.workdir}" in half.output
    assert re.search(r"^step 2/2 \(100 %\) .*sit/loss", half.output, re.MULTILINE)
    stored = checkpoint.read_config(half.workdir)
    assert stored["optim"]["sit"]["learning_rate"] == 2e-4 and stored["data"]["image_size"] == 8
    assert metrics_of(half.workdir) == whole.metrics[:2]  # the same run as from Python


@pytest.mark.slow
def test_the_command_saves_when_all_of_its_processes_are_asked_to_stop(compiled, tmp_path):
    """A terminal's Ctrl-C or a scheduler does so: the loader's workers go on until it has saved."""
    flags = [*SMALL, *(f"--config.{field}" for field in ("data.workers=1", "steps=100000", "checkpoint.every=100000"))]
    program = [
        sys.executable,
        "-u",
        "-m",
        "repae_jax.train",
        "--config",
        "configs/repae.py:tiny",
        "--workdir",
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    options = {"stdout": subprocess.PIPE, "stderr": (tmp_path / "errors").open("w"), "text": True, "start_new_session": True}
    with subprocess.Popen([*program, *flags], cwd=ROOT, env=environment, **options) as process:
        assert any(line.startswith("step 1/") for line in process.stdout), (tmp_path / "errors").read_text()[-3000:]
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=300)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 75 and "asked to stop: saved step" in errors and "Traceback" not in errors, errors[-3000:]
    assert int(next((tmp_path / "run/checkpoints").iterdir()).name) >= 1


@pytest.mark.slow
def test_hosts_compare_the_files_that_they_read(tmp_path, monkeypatch):
    """A run goes on with images that were prepared anew."""
    images, compared = tmp_path / "images", []
    monkeypatch.setattr(train.multihost, "assert_same", lambda **description: compared.append(description))
    for encoding in ("png", "raw"):
        options = ["--data=digits", "--image_size=8", f"--out={images / encoding}", f"--format={encoding}", "--workers=0"]
        prepare_images.run(prepare_images.parse_args(options))
        changes = {"data.source": "array_record", "data.options": {"path": str(images / encoding)}, "hooks.samples_every": 0}
        changes |= {"steps": {"png": 1, "raw": 2}[encoding]}
        _, finished = train.train(small.config({**changes, **small.SIT_ALONE}, ldm), tmp_path / "run")
        assert finished
    (first, again) = [description for description in compared if "files" in description]
    assert first["data"] == again["data"] and first["files"] != again["files"] and first["files"]


def main(workdir, *words, config="configs/repae.py:tiny"):
    """The command, in this process."""
    train.main(["--config", str(ROOT / config), f"--workdir={workdir}", *words])


@pytest.fixture
def quiet(monkeypatch):
    """The command leaves this process's cache of compiled programs and its log as they are."""
    monkeypatch.setattr(train, "use_compilation_cache", lambda workdir: None)
    monkeypatch.setattr(cli, "_log_information", lambda: None)


def test_what_is_wrong_with_a_file_is_said_in_one_line(quiet, monkeypatch, tmp_path):
    """Wherever it was opened; and whatever is wrong: the file is there, but no folder."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "train", lambda *_: (tmp_path / "file" / "images").stat())
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "run")
    assert caught.value.code == f"error: [Errno 20] Not a directory: '{tmp_path / 'file' / 'images'}'"


def test_a_workdir_of_a_refused_name_is_not_created(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(train, "use_compilation_cache", lambda folder: Path(folder).mkdir())
    with pytest.raises(SystemExit, match="pattern"):
        main(tmp_path / "[lr=1e-4]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("finished", "code"), [(True, None), (False, 75)])
def test_the_exit_code_says_whether_the_run_is_finished(finished, code, quiet, monkeypatch, capsys):
    """If it was saved before its end, the launch scripts know by it that there is more to do."""
    monkeypatch.setattr(train, "train", lambda *_: (None, finished))
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as caught:
        main("run")
    assert not code or caught.value.code == code
    assert ("finished; everything is in run" in capsys.readouterr().out) == finished


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.data.batch_size=9"], r"error: data.batch_size=9 is not divisible by 8 devices"),
        (["--config.sit.dpeth=2"], r"error: .*dpeth.*depth"),
    ],
)
def test_mistakes_end_in_one_line(words, expected, quiet, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "run", *words)
    assert re.match(expected, caught.value.code) and "\n" not in caught.value.code


@pytest.mark.parametrize(
    ("config", "words"),
    [("configs/repae.py:tinny", ["'tinny'", "allowed: one of ['digits', 'tiny']"]), ("configs/none.py", ["configs/none.py"])],
)
def test_configs_that_cannot_be_read(config, words, quiet, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "run", config=config)
    assert caught.value.code.startswith("error: ") and all(word in caught.value.code for word in words)
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_help_is_quick(tmp_path):
    began = time.monotonic()
    done = command("--help")
    seconds = time.monotonic() - began
    print(f"--help: {seconds:.1f} s")
    assert done.returncode == 0 and "--workdir" in done.stdout and "--config" in done.stdout
    assert seconds < 20 and "tensorflow" not in done.stderr.lower()
