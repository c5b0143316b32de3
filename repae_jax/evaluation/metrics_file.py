"""Curves of a run's metrics.jsonl, in any state: while training writes it, after it was killed, or damaged."""

import array
import dataclasses
import json

import numpy as np
from etils import epath
from jaxtyping import Float, Int

Curve = tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]  # steps, values


@dataclasses.dataclass(frozen=True)
class MetricsFile:
    """The content of a metrics.jsonl."""

    curves: dict[str, Curve]  # by name of the metric; values may be nan or infinite
    steps: Int[np.ndarray, " L"]  # step of every line
    times: Float[np.ndarray, " L"]  # time of every line, in seconds since 1970
    broken: list[int]  # numbers of the lines, from 1, that hold no metrics, without an unfinished last one


def read_metrics(path: epath.PathLike) -> MetricsFile:
    """Reads all lines that can be read; raises OSError if the file cannot."""
    points: dict[str, tuple[array.array, array.array]] = {}
    steps, times, broken = array.array("q"), array.array("d"), []
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                step, seconds = int(record.pop("step")), float(record.pop("time"))
                values = {name: float(value) for name, value in record.items()}
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                if line.endswith(b"\n"):  # otherwise the run is writing it, or was killed there
                    broken.append(number)
                continue
            steps.append(step)
            times.append(seconds)
            for name, value in values.items():
                of_metric = points.setdefault(name, (array.array("q"), array.array("d")))
                of_metric[0].append(step)
                of_metric[1].append(value)
    curves = {name: (np.array(at, np.int64), np.array(values, np.float64)) for name, (at, values) in points.items()}
    return MetricsFile(curves, np.array(steps, np.int64), np.array(times, np.float64), broken)
