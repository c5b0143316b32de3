"""Metrics files that survive kills and resumption, and the progress line."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.training import metric_log


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(path):
    return [line["step"] for line in read_lines(path)]


# -- JSON lines -------------------------------------------------------------------------------------------------------


def test_each_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    lines = metric_log.JsonLines(path)
    lines.write(1, {"loss": jnp.float32(0.5), "count": np.int64(3), "rate": 0.25, "bf16": jnp.bfloat16(1.5)})
    (line,) = read_lines(path)  # before close
    assert line.pop("time") > 1e9
    assert line == {"step": 1, "loss": 0.5, "count": 3, "rate": 0.25, "bf16": 1.5}
    lines.close()


def test_non_finite_numbers_stay_valid_json(tmp_path):
    lines = metric_log.JsonLines(tmp_path / "metrics.jsonl")
    lines.write(1, {"a": float("nan"), "b": jnp.inf, "c": -np.float32(np.inf)})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    assert np.isnan(float(line["a"])) and float(line["c"]) == -np.inf


def test_reserved_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['time'\]"):
        metric_log.JsonLines(tmp_path / "metrics.jsonl").write(1, {"time": 3.0})


def test_resume_leaves_neither_gap_nor_duplicate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = metric_log.JsonLines(path)
    for step in range(1, 8):
        first.write(step, {"loss": step / 2})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "time": 17')  # killed while writing
    resumed = metric_log.JsonLines(path, resume_step=5)
    assert steps_of(path) == [1, 2, 3, 4, 5]
    for step in range(6, 9):
        resumed.write(step, {"loss": step / 2})
    assert steps_of(path) == list(range(1, 9))
    assert [line["loss"] for line in read_lines(path)] == [step / 2 for step in range(1, 9)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"step": 2', "null", '{"time": 1}', "[1]", '{"step": "x"}', "\0\0"])
def test_broken_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0}\n' + tail)
    metric_log.JsonLines(path, resume_step=9).write(2, {})
    assert steps_of(path) == [1, 2]


@pytest.mark.parametrize("bad", [b'{"step": 2, "a\xff": 1}', b"\xff\xfe", b"\0" * 64, b'{"step": 1e999}', b"[" * 9999])
def test_lines_of_damaged_bytes_are_dropped(tmp_path, bad):
    """Disks leave such lines after a power cut; the run continues without them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 1.0}\n' + bad + b'\n{"step": 3, "time": 1.0}\n')
    metric_log.JsonLines(path, resume_step=9).write(4, {})
    assert steps_of(path) == [1, 3, 4]
    metric_log.JsonLines(path)
    assert (tmp_path / "metrics.jsonl.1").exists()  # a new run keeps the file of the one before, whatever is in it


def test_last_line_without_newline_is_kept_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0}')
    metric_log.JsonLines(path, resume_step=1).write(2, {})
    assert steps_of(path) == [1, 2]


# -- the writer -------------------------------------------------------------------------------------------------------


def writer(workdir, resume_step=0, trackers=("tensorboard",)):
    return metric_log.Writer(workdir, resume_step, {"log": {"trackers": trackers, "project": "p"}})


def test_the_writer_writes_lines_and_pictures(tmp_path):
    for resume_step, steps in [(0, (1, 2, 3)), (2, (3,))]:
        opened = writer(tmp_path, resume_step)
        for step in steps:
            opened.write_scalars(step, {"loss": jnp.float32(step), "bad": float("nan")})
        opened.write_images(3, {"samples": np.zeros((4, 4, 3), np.uint8)})
        opened.flush()
        opened.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert "samples" not in (tmp_path / "metrics.jsonl").read_text()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_lines_alone(tmp_path):
    opened = writer(tmp_path, trackers=())
    opened.write_scalars(1, {"loss": 1.0})
    opened.write_images(1, {"samples": np.zeros((4, 4, 3), np.uint8)})
    opened.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    opened = writer(tmp_path, 5, ("tensorboard", "wandb", "trackio", "mlflow"))
    opened.write_scalars(6, {"loss": 1.0})
    opened.write_images(6, {"samples": np.zeros((4, 4, 3), np.uint8)})
    opened.flush()
    opened.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_nothing_is_imported_unless_asked_for(tmp_path):
    """TensorFlow and torch least of all: TensorBoard's files need neither."""
    code = """
import sys
from repae_jax.training import metric_log
heavy = {"tensorflow", "torch", "clu", "wandb", "trackio", "mlflow"}
assert not {*heavy, "tensorboard"} & set(sys.modules)
for names in ((), ("tensorboard",)):
    metric_log.Writer(sys.argv[1], 0, {"log": {"trackers": names, "project": "p"}}).close()
    assert ("tensorboard" in sys.modules) == bool(names) and not heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


# -- progress ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_speed_since_the_last_update_without_pauses():
    clock = Clock()
    progress = metric_log.Progress(total_steps=100, start_step=10, batch_size=32, clock=clock)
    clock.now += 10
    assert progress.update(20) == {
        "images_per_second": 32.0, "seconds_per_step": 1.0, "eta_seconds": 80.0, "input_wait": 0.0
    }  # fmt: skip
    clock.now += 5
    with progress.paused():
        clock.now += 1000
    with pytest.raises(RuntimeError), progress.paused():
        clock.now += 1000
        raise RuntimeError
    speed = progress.update(30)
    assert speed["seconds_per_step"] == pytest.approx(0.5)
    assert speed["images_per_second"] == pytest.approx(64)
    assert 0.5 * 70 < speed["eta_seconds"] < 1.0 * 70  # between the new speed and the average so far
    clock.now += 10  # the pauses were counted once
    assert progress.update(40)["seconds_per_step"] == pytest.approx(1.0)


def test_input_wait_is_a_share_of_the_time_that_counts():
    clock = Clock()
    progress = metric_log.Progress(100, 0, 32, waited=[50.0], clock=clock)
    clock.now += 10
    with progress.paused():
        clock.now += 90
    assert progress.update(5, waited=[52.5])["input_wait"] == pytest.approx(0.25)
    clock.now += 10
    assert progress.update(6, waited=[52.5])["input_wait"] == 0
    clock.now += 1
    assert progress.update(7, waited=[60.0])["input_wait"] == 1  # two clocks need not agree


def test_input_wait_is_that_of_the_process_that_waited_longest_since_the_last_update():
    """The process that has waited longest since the beginning need not have waited at all lately."""
    clock = Clock()
    progress = metric_log.Progress(100, 0, 32, waited=[30.0, 0.0], clock=clock)
    waits = []
    for step, waited in enumerate(([30.0, 5.0], [35.0, 5.0], [35.0, 10.0], [35.0, 10.0]), 1):
        clock.now += 10
        waits.append(progress.update(step, waited)["input_wait"])
    assert waits == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("peak", "arithmetic", "shown"),
    [
        (200e12, {"tflops_per_device": 80.0, "mfu": 0.4}, "320 img/s  MFU 40 %  input wait 12 %  ETA 8s"),
        (None, {"tflops_per_device": 80.0}, "320 img/s  80 TFLOP/s per device  input wait 12 %  ETA 8s"),
    ],
)
def test_arithmetic(peak, arithmetic, shown):
    """320 images a second of 2 TFLOP on 8 devices; where nobody knows the peak, there is no share of it."""
    clock = Clock()
    speed_of = functools.partial(metric_log.arithmetic_speed, flop_per_image=2e12, devices=8, peak=peak)
    progress = metric_log.Progress(90, 0, 32, arithmetic=speed_of, waited=[0.0], clock=clock)
    clock.now += 1
    speed = progress.update(10, waited=[0.12])
    assert {name: speed[name] for name in ("tflops_per_device", "mfu") if name in speed} == arithmetic
    assert progress.line(10, speed) == f"step 10/90 (11 %)  {shown}"


def test_eta_forgets_the_compilation():
    clock = Clock()
    progress = metric_log.Progress(1000, 0, 1, clock=clock)
    clock.now += 500
    progress.update(1)
    for step in range(2, 30):
        clock.now += 1
        speed = progress.update(step)
    assert speed["eta_seconds"] == pytest.approx(971, rel=0.05)


def test_end_and_coarse_clock():
    progress = metric_log.Progress(5, 0, 4, clock=Clock())
    speed = progress.update(6)
    assert speed["eta_seconds"] == 0 and np.isfinite(speed["images_per_second"])


def test_update_without_a_step_is_an_error():
    with pytest.raises(ValueError, match="step=3 does not exceed 3"):
        metric_log.Progress(10, 3, 1).update(3)


def test_line():
    clock = Clock()
    progress = metric_log.Progress(2000, 0, 71, clock=clock)
    assert progress.line(0, {}) == "step 0/2000 (0 %)"
    clock.now += 64
    metrics = {"sit": jnp.float32(0.8124), "vae": 3.0} | progress.update(500)
    assert progress.line(500, metrics) == "step 500/2000 (25 %)  sit 0.8124  vae 3  555 img/s  input wait 0 %  ETA 3m12s"


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (45.4, "45s"), (59.7, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (99 * 3600, "4d03h")],
)
def test_duration(seconds, text):
    assert metric_log._duration(seconds) == text


def test_a_run_without_checkpoint_starts_another_file(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(text)
        metric_log.JsonLines(tmp_path / "metrics.jsonl").close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [(tmp_path / f"metrics.jsonl.{n}").read_text() for n in (1, 2)] == ["first", "second"]
