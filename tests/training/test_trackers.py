"""Trackers, each with its real package on this machine's disk: metrics, pictures, and runs that are resumed.

A package that is not installed is skipped by name; `pip install -e .[wandb]` and so on bring them.
"""

import importlib.util
import json
import logging
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from repae_jax.training import metric_log, trackers
from repae_jax.training.trackers import base, experiments

CONFIG = {"job": "ldm", "steps": 9, "log": {"every": 1, "trackers": (), "project": "digits"}, "sit": {"depth": 2}}
PICTURE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
# what every tracker is given: by its first start, killed after step 3, and by its second, which repeats that step
FIRST, SECOND = (1, 2, 3), (3, 4)


def needs(package):
    is_missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(is_missing, reason=f"{package} is not installed: pip install -e .[{package}]")


def record(folder, first_step=1):
    return trackers.Record("run", "abc", first_step, "digits", CONFIG, folder)


def train(workdir, name, *resume_steps):
    """Writes what a run would write from these steps on; nan is a loss that is not finite."""
    for resume_step in resume_steps:
        config = {**CONFIG, "log": {**CONFIG["log"], "trackers": (name,)}}
        with metric_log.open_writer(workdir, resume_step, config) as writer:
            for step in SECOND if resume_step else FIRST:
                writer.write_scalars(step, {"sit/loss": step / 2, "vae/kl": float("nan") if step == 2 else 1.0})
                writer.write_images(step, {"samples": PICTURE})
            writer.write_scalars(step, {"fid/8_samples": 30.0})


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder):
    """TensorBoard's own reader of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


@pytest.mark.integration
def test_tensorboard_reads_metrics_and_pictures(tmp_path):
    from PIL import Image

    train(tmp_path, "tensorboard", 0, 2)
    read = events(tmp_path)
    loss = read.Scalars("sit/loss")
    assert [(event.step, event.value) for event in loss] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)], "steps come once"
    assert np.isnan(read.Scalars("vae/kl")[1].value)
    assert [event.step for event in read.Scalars("fid/8_samples")] == [4], "that of step 3 is dropped with the step"
    (picture,) = [event for event in read.Images("samples") if event.step == 4]
    path = tmp_path / "shown.png"
    path.write_bytes(picture.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), PICTURE)


def test_tensorboards_events_are_on_disk_at_once(tmp_path):
    with metric_log.open_writer(tmp_path, 0, {"log": {"trackers": ("tensorboard",), "project": "p"}}) as writer:
        (file,) = (tmp_path / "tensorboard").iterdir()
        before = file.stat().st_size
        writer.write_scalars(1, {"loss": 0.5})
        assert file.stat().st_size > before


@pytest.mark.integration
def test_clu_writes_what_we_write(tmp_path):
    from tensorboard.util import tensor_util

    for name in ("clu", "tensorboard"):
        train(tmp_path / name, name, 0)
    clu = events(tmp_path / "clu")
    written = events(tmp_path / "tensorboard")
    assert set(clu.Tags()["tensors"]) == set(written.Tags()["scalars"]) | set(written.Tags()["images"])
    ours = [event.value for event in written.Scalars("sit/loss")]
    assert [float(tensor_util.make_ndarray(event.tensor_proto)) for event in clu.Tensors("sit/loss")] == ours


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def records(file):
    """The records of a file that wandb keeps offline: a log as LevelDB's, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts, at = parts + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(file):
    """(run, rows of its history by step, its config); wandb's process completes the file soon after the end of a run."""
    deadline, rows = time.monotonic() + 20, {}
    while "exit" not in {kept.WhichOneof("record_type") for kept in records(file)}:
        assert time.monotonic() < deadline, f"{file} is not completed"
        time.sleep(0.1)
    for kept in records(file):
        if kept.WhichOneof("record_type") == "run":
            run = kept.run
        elif kept.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in kept.history.item}
            rows[row["_step"]] = row
    return run, rows, {item.key: json.loads(item.value_json) for item in run.config.update}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb's, in a folder of its own."""
    folder = tmp_path / "offline"
    folder.mkdir()
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_CONSOLE": "off", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    return folder


@needs("wandb")
@pytest.mark.integration
def test_wandb_offline(tmp_path, offline):
    workdir = tmp_path / "run"
    trackers.check(["wandb"])
    train(workdir, "wandb", 0, 2)
    files = sorted(offline.rglob("run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 2, "one of each start; `wandb sync` joins them by the run's id"
    identity = json.loads((workdir / "trackers.json").read_text())["run"]
    for file, steps in zip(files, (FIRST, SECOND)):
        run, rows, config = history(file)
        assert run.run_id == identity and run.display_name == "run" and run.project == "digits"
        assert config["sit"] == {"depth": 2}
        assert {step: row["sit/loss"] for step, row in rows.items()} == {step: step / 2 for step in steps}
        assert all(row["step"] == step for step, row in rows.items())
        assert {step: row["samples.height"] for step, row in rows.items()} == dict.fromkeys(steps, 6)
        assert [step for step, row in rows.items() if "fid/8_samples" in row] == [steps[-1]]
    assert len(list(offline.rglob("samples_*.png"))) == len(FIRST) + len(SECOND)
    train(workdir, "wandb", 0)  # without a checkpoint a run begins anew
    assert json.loads((workdir / "trackers.json").read_text())["run"] != identity


@needs("wandb")
@pytest.mark.integration
def test_wandb_gets_what_comes_late(tmp_path, offline):
    """A record that is continued ends with a step that the run repeats, or whose score is still missing."""
    tracker = trackers.open_tracker("wandb", record(tmp_path))
    file = Path(tracker._run.settings.sync_file)  # wandb reads WANDB_DIR once in a process
    assert tracker._run.settings.finish_timeout == experiments.CLOSE_SECONDS
    tracker._run.log({}, step=5)
    tracker.write_scalars(4, {"fid/8_samples": 30.0})
    tracker.write_scalars(5, {"sit/loss": 2.5})
    tracker.write_scalars(9, {"sit/loss": 4.5})
    tracker.write_images(9, {"samples": PICTURE})
    tracker.close(is_failed=False)
    rows = history(file)[1]
    assert {row["step"]: row["fid/8_samples"] for row in rows.values() if "fid/8_samples" in row} == {4: 30.0}
    assert {row["step"]: row["sit/loss"] for row in rows.values() if "sit/loss" in row} == {5: 2.5, 9: 4.5}
    assert rows[9]["samples.height"] == 6


@needs("wandb")
@pytest.mark.integration
def test_wandb_without_a_key(tmp_path):
    code = """
from repae_jax import cli
from repae_jax.training import trackers
with cli.ending():
    trackers.check(["wandb"])
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: config.log.trackers has 'wandb': No API key") and "set WANDB_API_KEY, or" in line


# ---- Trackio ---------------------------------------------------------------------------------------------------------

READ_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("digits")
rows, config = SQLiteStorage.get_logs("digits", run), SQLiteStorage.get_run_config("digits", run)
print(json.dumps({"run": run, "rows": rows, "config": config}, default=str))
"""
WRITE = """
import sys
sys.path.insert(0, {tests!r})
import test_trackers
test_trackers.train({workdir!r}, {name!r}, *{resume_steps!r})
"""


def in_a_process(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(workdir, name, *resume_steps, **env):
    """`train` in a process of its own: these packages read their folders from the environment when they are imported."""
    tests = os.path.dirname(__file__)
    in_a_process(WRITE.format(tests=tests, workdir=str(workdir), name=name, resume_steps=resume_steps), **env)


@needs("trackio")
@pytest.mark.integration
def test_trackio_on_this_machine(tmp_path):
    env = {"TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1"}
    started(tmp_path / "run", "trackio", 0, **env)
    started(tmp_path / "run", "trackio", 2, **env)
    kept = json.loads(in_a_process(READ_TRACKIO, **env).splitlines()[-1])
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["run"]
    assert kept["run"] == f"run-{identity}" and kept["config"]["sit"] == {"depth": 2}
    losses = {row["step"]: row["sit/loss"] for row in kept["rows"] if "sit/loss" in row}
    assert losses == {step: step / 2 for step in range(1, 5)}
    assert {row["step"] for row in kept["rows"] if "samples" in row} == {1, 2, 3, 4}
    assert len(list((tmp_path / "kept").rglob("*.png"))) == len(FIRST) + len(SECOND)


def test_a_space_needs_a_token(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/curves")
    with pytest.raises(
        ValueError, match="TRACKIO_SPACE_ID=me/curves needs a token of the hub: run `hf auth login`, set HF_TOKEN"
    ):
        trackers.check(["trackio"])


# ---- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """A client of a database in a folder of its own."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow.MlflowClient()


def runs_of(client):
    return client.search_runs([client.get_experiment_by_name("digits").experiment_id])


@needs("mlflow")
@pytest.mark.integration
def test_mlflow_in_a_local_database(tmp_path, mlflow):
    train(tmp_path / "run", "mlflow", 0, 2)
    (run,) = runs_of(mlflow)
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["sit.depth"] == "2" and run.data.params["job"] == "ldm"
    losses = {metric.step: metric.value for metric in mlflow.get_metric_history(run.info.run_id, "sit/loss")}
    assert losses == {step: step / 2 for step in range(1, 5)}
    (bad,) = [metric for metric in mlflow.get_metric_history(run.info.run_id, "vae/kl") if metric.step == 2]
    assert np.isnan(bad.value)
    pictures = [file.path for file in mlflow.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert {int(re.search(r"step\D(\d+)\D", path)[1]) for path in pictures} == {1, 2, 3, 4}
    with pytest.raises(RuntimeError), metric_log.open_writer(tmp_path / "run", 4, {**CONFIG, "log": log_of("mlflow")}):
        raise RuntimeError
    (run,) = runs_of(mlflow)
    assert run.info.status == "FAILED"


def log_of(*names):
    return {"every": 1, "trackers": names, "project": "digits"}


@needs("mlflow")
@pytest.mark.integration
def test_what_mlflow_never_takes_is_left_out(tmp_path, mlflow, caplog):
    caplog.set_level(logging.WARNING)
    with metric_log.open_writer(tmp_path / "run", 0, {**CONFIG, "log": log_of("mlflow")}) as writer:
        writer.write_scalars(1, {"no%name": 1.0})
        writer.write_scalars(2, {"loss": 1.0})
    assert any("'mlflow', which refuses an entry (" in line and "no%name" in line for line in caplog.messages)
    (run,) = runs_of(mlflow)
    assert [metric.step for metric in mlflow.get_metric_history(run.info.run_id, "loss")] == [2]
    assert run.info.status == "FINISHED"


@needs("mlflow")
@pytest.mark.integration
def test_a_server_of_mlflow_that_hangs_does_not_hold_the_end(tmp_path, mlflow, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(experiments, "CLOSE_SECONDS", 0.2)
    answers, tracker = threading.Event(), trackers.open_tracker("mlflow", record(tmp_path))
    monkeypatch.setattr(tracker._client, "log_batch", lambda *_, **__: answers.wait(60))
    for step in (1, 2):
        tracker.write_scalars(step, {"loss": 0.5})
    began = time.monotonic()
    tracker.close(is_failed=False)
    assert time.monotonic() - began < 10
    answers.set()
    assert "3 entries could not be sent (no end within 0.2 s); they are lost" in caplog.messages[-1]


@needs("mlflow")
@pytest.mark.integration
def test_what_mlflow_refuses_for_a_while_is_sent_again(tmp_path, mlflow, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    refusing = [True]

    def opened(first_step):
        tracker = trackers.open_tracker("mlflow", record(tmp_path, first_step))
        log_batch = tracker._client.log_batch

        def refuse(*given, **more):
            if refusing:
                raise ConnectionError("nobody answers")
            log_batch(*given, **more)

        monkeypatch.setattr(tracker._client, "log_batch", refuse)
        return tracker

    tracker = opened(1)
    for step in (1, 2):
        tracker.write_scalars(step, {"loss": float(step)})
        with pytest.raises(ConnectionError):
            tracker._sending.result()
    assert any("1 entries could not be sent (ConnectionError: nobody answers)" in line for line in caplog.messages)
    refusing.clear()
    tracker.close(is_failed=False)
    (run,) = runs_of(mlflow)
    assert {metric.step for metric in mlflow.get_metric_history(run.info.run_id, "loss")} == {1, 2}
    assert run.info.status == "FINISHED"

    refusing.append(True)
    tracker = opened(3)
    tracker.write_scalars(3, {"loss": 3.0})
    tracker.close(is_failed=False)
    assert "2 entries could not be sent" in caplog.messages[-1] and "metrics.jsonl has them" in caplog.messages[-1]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, install",
    [
        ("wandb", "-e .[wandb]"),
        ("trackio", "-e .[trackio]"),
        ("mlflow", "-e .[mlflow]"),
        ("clu", "-e .[clu]"),
        ("tensorboard", "tensorboard"),
    ],
)
def test_a_package_that_is_not_installed(name, install, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        trackers.check([name])
    package = trackers.TRACKERS[name].package
    assert (
        str(caught.value)
        == f"config.log.trackers has {name!r}, whose package {package} is not installed: pip install {install}"
    )


def test_a_tracker_that_cannot_be_opened_ends_with_one_line(tmp_path, monkeypatch):
    class Refusing(trackers.TensorBoard):
        def __init__(self, run):
            raise LookupError("the server says no\nin many words")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Refusing)
    with pytest.raises(OSError, match=r"'tensorboard', which cannot be opened \(LookupError: the server says no\): leave"):
        metric_log.Writer(tmp_path, 0, {**CONFIG, "log": log_of("tensorboard")})


def test_training_goes_on_without_a_tracker_that_fails(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    class Failing(trackers.TensorBoard):
        def write_scalars(self, step, scalars):
            raise LookupError("the server is gone")

        def close(self, *, is_failed):
            raise RuntimeError("nobody is there\nin many words")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    config = {**CONFIG, "log": log_of("mlflow", "tensorboard")}
    with metric_log.open_writer(tmp_path, 0, config) as writer:
        for step in (1, 2):
            writer.write_scalars(step, {"loss": 0.5})
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1, 2], "the others still get everything"
    assert [line.partition(": training goes on")[0] for line in caplog.messages if "goes on" in line] == [
        "config.log.trackers has 'mlflow', which failed (LookupError: the server is gone)",
        "config.log.trackers has 'mlflow', which failed (RuntimeError: nobody is there)",
    ]


def test_the_name_of_a_run_is_kept_until_it_begins_anew(tmp_path):
    first = trackers.identify(tmp_path, is_new=True)
    assert trackers.identify(tmp_path, is_new=False) == first != trackers.identify(tmp_path, is_new=True)
    for content in ("", "{}", "[]"):
        (tmp_path / "trackers.json").write_text(content)
        with pytest.raises(ValueError, match="trackers.json is damaged: remove it, and the trackers begin a new record"):
            trackers.identify(tmp_path, is_new=False)


def test_passwords_stay_out_of_messages():
    error = OSError("http://user:p@ss:word@host:80/api and sqlite:///mlflow.db failed")
    assert base.reason(error) == "OSError: http://host:80/api and sqlite:///mlflow.db failed"
    assert base.reason(LookupError()) == "LookupError"


def test_trackers_opened_before_are_closed_where_one_cannot_be(tmp_path, monkeypatch):
    ends = []

    class Watched(trackers.TensorBoard):
        def close(self, *, is_failed):
            ends.append(is_failed)
            super().close(is_failed=is_failed)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Watched)
    monkeypatch.setattr(trackers, "identify", lambda workdir, is_new: "abc")
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", type("Broken", (trackers.TensorBoard,), {"__init__": lambda *_: 1 / 0}))
    with pytest.raises(OSError, match="'mlflow', which cannot be opened"):
        metric_log.Writer(tmp_path, 0, {**CONFIG, "log": log_of("tensorboard", "mlflow")})
    assert ends == [True]


def test_nested_sections_are_flattened():
    assert experiments.flatten({"a": 1, "b": {"c": (2, 3), "d": {"e": None}}}) == {"a": 1, "b.c": (2, 3), "b.d.e": None}
