"""Metrics of a run, as JSON lines and for trackers, and its line of progress with speed and ETA."""

import contextlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from repae_jax import buckets
from repae_jax.training import trackers

SPEED_NAMES = ("images_per_second", "seconds_per_step", "eta_seconds", "input_wait", "tflops_per_device", "mfu")
_ETA_MEMORY = 0.7  # share of the old estimate kept at each update: steady, yet slow first steps are soon forgotten


class Writer:
    """The metrics of a run: JSON lines and the trackers of `config.log`; in processes other than 0 it writes nothing.

    Scalars go to `<workdir>/metrics.jsonl` (see `JsonLines`) and to the trackers, pictures to the trackers alone. After
    `resume_step` the JSON lines continue without gap or duplicate, and so do TensorBoard's files, in `<workdir>/tensorboard`;
    other trackers may be given a step again, with equal values. If the workdir is in a bucket, these files are written to a
    local folder first, see `buckets.Mirror`; `flush` and `close` upload them. Training goes on where a tracker fails: that is
    a warning, once for each reason.

    Args:
      config: the run's, nested plain values.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int, config: Mapping[str, Any]):
        self._mirror: buckets.Mirror | None = None
        self._lines: JsonLines | None = None
        self._trackers: dict[str, trackers.Tracker] = {}
        self._warned: set[str] = set()
        self._is_failed = True  # until everything is open
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                self._start(stack, workdir, resume_step, config)
            self._open = stack.pop_all()
        self._is_failed = False

    def _start(self, stack, workdir, resume_step, config):
        folder, names = Path(workdir), config["log"]["trackers"]
        if buckets.is_address(workdir):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repae-metrics-")))
            self._mirror = buckets.Mirror(folder, workdir)
            self._mirror.fetch("metrics.jsonl*")
            stack.callback(self._mirror.close)
        self._lines = JsonLines(folder / "metrics.jsonl", resume_step)
        stack.callback(self._lines.close)
        identity = ""
        if any(trackers.TRACKERS[name].has_records for name in names):
            with buckets.reached(workdir):
                identity = trackers.identify(workdir, is_new=not resume_step)
        name, project = epath.Path(workdir).name, config["log"]["project"]
        run = trackers.Record(name, identity, resume_step + 1, project, config, folder)
        for tracker_name in names:
            self._trackers[tracker_name] = trackers.open_tracker(tracker_name, run)
            stack.callback(self._tell, tracker_name, lambda tracker: tracker.close(is_failed=self._is_failed))

    def _tell(self, name: str, tell: Callable[[trackers.Tracker], None]) -> None:
        """Calls a function of an open tracker; its failure is a warning."""
        try:
            tell(self._trackers[name])
        except Exception as error:  # the packages have errors of their own
            warning = f"{trackers.named(name)}, which failed ({trackers.reason(error)})"
            if warning not in self._warned:
                self._warned.add(warning)
                logging.warning("%s: training goes on without it, and metrics.jsonl has all metrics", warning)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, or arrays of one element, of a step."""
        if self._lines is None:
            return
        numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
        self._lines.write(step, numbers)
        for name in self._trackers:
            self._tell(name, lambda tracker: tracker.write_scalars(step, numbers))
        if self._mirror:
            self._mirror.update()

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "H W 3"]]) -> None:
        """Writes pictures of a step by their kind."""
        for name in self._trackers:
            self._tell(name, lambda tracker: tracker.write_images(step, images))

    def flush(self) -> None:
        """Uploads everything so far, if the workdir is in a bucket: files on a disk have it already."""
        if self._mirror:
            self._mirror.flush()

    def close(self, *, is_failed: bool = False) -> None:
        """Closes everything; `is_failed` tells the trackers that an error ends the run."""
        self._is_failed = is_failed
        self._open.close()


@contextlib.contextmanager
def open_writer(workdir: epath.PathLike, resume_step: int, config: Mapping[str, Any]) -> Iterator[Writer]:
    """Yields a Writer, and closes it; an error on closing does not hide an earlier one."""
    writer = Writer(workdir, resume_step, config)
    try:
        yield writer
    except BaseException:
        try:
            writer.close(is_failed=True)
        except OSError as error:
            logging.warning("the last metrics are lost: %s", error)
        raise
    writer.close()


class JsonLines:
    """A file with one JSON object per write, complete on disk after each: {"step": 5, "time": 1.7e9, "loss": 0.3}.

    Numbers that are not finite become the strings "nan", "inf" and "-inf", which `float()` reads back: JSON has no
    numbers for them. A step that is written twice (losses, then the metrics of a hook) has two lines. Lines of steps after
    `resume_step` are removed, since the resumed run writes them again, and so is a last line that a kill left unfinished; at
    step 0 an existing file is renamed to path.1, path.2, …
    """

    def __init__(self, path: epath.PathLike, resume_step: int = 0):
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step:
            _drop_lines_after(path, resume_step)
        elif path.exists() and path.stat().length:  # metrics of a run without checkpoints: archived, not continued
            number = next(n for n in itertools.count(1) if not (path.parent / f"{path.name}.{n}").exists())
            path.rename(path.parent / f"{path.name}.{number}")
        self._file = path.open("a")

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line of numbers or arrays of one element; ValueError if one is called "step" or "time"."""
        if reserved := sorted({"step", "time"} & set(scalars)):
            raise ValueError(f"metric names {reserved} are taken by the step and time of each line; rename the metrics")
        values = {name: _json_number(value) for name, value in scalars.items()}
        self._file.write(json.dumps({"step": int(step), "time": time.time(), **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def arithmetic_speed(images_per_second: float, flop_per_image: float, devices: int, peak: float | None) -> dict[str, float]:
    """Returns 'tflops_per_device', 1e12 FLOP/s, and its share of the peak, 'mfu' (model FLOPs utilization).

    Images are those of all devices, and FLOP those of a training step, without recomputation. The peak is in FLOP/s of one
    device, None if unknown, as for CPUs: then there is no 'mfu'.
    """
    per_device = flop_per_image * images_per_second / devices
    return {"tflops_per_device": per_device / 1e12} | ({"mfu": per_device / peak} if peak else {})


class Progress:
    """Speed and remaining time of a run, not counting pauses.

    It measures the wall time between two updates, less that spent in `paused`: from the end of one logged step to that of the
    next, with input, logging and everything else that training waits for. Create it after the first step, to leave out
    compilation, and pause it for checkpoints and pictures.

    Args:
      start_step: the step the run starts or resumes from.
      batch_size: images per step, over all devices.
      arithmetic: function of images per second that returns further numbers, as `arithmetic_speed` does; None for none.
      waited: seconds that each process has waited for input so far, as `update` takes them.
    """

    def __init__(
        self, total_steps: int, start_step: int, batch_size: int, *, arithmetic: Callable[[float], dict] | None = None,
        waited: Sequence[float] = (), clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._total_steps, self._batch_size, self._arithmetic, self._clock = total_steps, batch_size, arithmetic, clock
        self._last_step, self._last_time, self._paused_seconds, self._last_waited = start_step, clock(), 0.0, waited
        self._smooth_seconds_per_step: float | None = None
        self._speed: dict[str, float] = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count as training: sampling, evaluation, waiting for a checkpoint."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - began

    def update(self, step: int, waited: Sequence[float] = ()) -> dict[str, float]:
        """Returns the speed since the last update; ValueError if no step was finished since.

        Wait for the results of `step` first, or its time counts for the next update. `waited` are the seconds that each process
        has waited for input since the run's beginning, see `Loader.wait_seconds`.

        Returns:
          'images_per_second' and 'seconds_per_step'; 'eta_seconds' from a moving average; 'input_wait', 0..1, the share of the
          time without a batch to dispatch, in the process that waited longest, for which all others wait; and the numbers of
          `arithmetic`.
        """
        if step <= self._last_step:
            raise ValueError(f"step={step} does not exceed {self._last_step}, the last one; update after a step is done")
        now = self._clock()
        seconds = max(now - self._last_time - self._paused_seconds, 1e-9)  # a coarse clock may not have moved
        seconds_per_step = seconds / (step - self._last_step)
        old = self._smooth_seconds_per_step
        smooth = seconds_per_step if old is None else _ETA_MEMORY * old + (1 - _ETA_MEMORY) * seconds_per_step
        waits = [after - before for after, before in zip(waited, self._last_waited, strict=True)]
        images_per_second = self._batch_size / seconds_per_step
        self._speed = {
            "images_per_second": images_per_second, "seconds_per_step": seconds_per_step,
            "eta_seconds": smooth * max(self._total_steps - step, 0),
            "input_wait": min(max(waits, default=0.0) / seconds, 1.0),
        }  # fmt: skip
        if self._arithmetic is not None:
            self._speed |= self._arithmetic(images_per_second)
        self._last_step, self._last_time, self._paused_seconds, self._last_waited = step, now, 0.0, waited
        self._smooth_seconds_per_step = smooth
        return dict(self._speed)

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Returns one line: 'step 500/2000 (25 %)  sit 0.812  vae 0.33  142 img/s  MFU 41 %  input wait 0 %  ETA 3m12s'.

        Metrics are shown in their order, and last what `update` returned: the arithmetic as MFU where known, else in TFLOP/s.
        """
        parts = [f"step {step}/{self._total_steps} ({100 * step // max(self._total_steps, 1)} %)"]
        parts += [f"{name} {float(value):.4g}" for name, value in metrics.items() if name not in SPEED_NAMES]
        if speed := self._speed:
            parts.append(f"{speed['images_per_second']:.3g} img/s")
            if "mfu" in speed:
                parts.append(f"MFU {100 * speed['mfu']:.0f} %")
            elif "tflops_per_device" in speed:
                parts.append(f"{speed['tflops_per_device']:.3g} TFLOP/s per device")
            parts += [f"input wait {100 * speed['input_wait']:.0f} %", f"ETA {_duration(speed['eta_seconds'])}"]
        return "  ".join(parts)


def _drop_lines_after(path: epath.Path, last_step: int) -> None:
    """Removes the lines of later steps, and broken lines, from a file."""
    lines = path.read_bytes().splitlines()  # a broken one may be no text
    kept = [line for line in lines if (step := step_of(line)) is not None and step <= last_step]
    if broken := sum(step_of(line) is None for line in lines):
        logging.warning("%s: %d unfinished or broken line(s) removed", path, broken)
    rewritten = path.parent / f"{path.name}.tmp"
    rewritten.write_bytes(b"".join(line + b"\n" for line in kept))
    rewritten.replace(path)  # one rename: a kill leaves either the old file or the new one


def step_of(line: bytes) -> int | None:
    """Returns the step of a JSON line; None if the line is broken."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _json_number(value: Any) -> float | int | str:
    number = np.asarray(value).item()
    return number if math.isfinite(number) else str(float(number))


def _duration(seconds: float) -> str:
    """Returns seconds in two leading units: 45s, 3m12s, 2h05m, 4d03h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days or hours:
        return f"{days}d{hours:02d}h" if days else f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
