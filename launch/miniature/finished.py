"""Finished runs of the miniature paper, as the report reads them: their numbers, curves over checkpoints, and arrays."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from launch.miniature import experiments
from repae_jax.evaluation import plots


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has ended: its folder and the content of its result.json."""

    folder: Path
    result: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Returns True if the training was stopped because a loss or gradient was no longer finite."""
        return self.result["status"] == "diverged"

    def number(self, measure: str) -> float:
        """Returns a measure: infinite if the run diverged or the number is not finite, nan if there is no such number."""
        if self.diverged:
            return math.inf
        value = self.result["numbers"].get(measure)
        return math.nan if value is None else float(value) if math.isfinite(value) else math.inf

    @property
    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that were evaluated, ascending; none if the run diverged."""
        return list(self.result["numbers"].get("steps", []))

    @property
    def compared(self) -> int | None:
        """Returns the index in `steps` of the checkpoint whose Frechet distance stands in the tables; None if there is none."""
        distances = self.curve("fid")
        return distances.index(self.number("fid")) if self.number("fid") in distances else None

    def curve(self, name: str) -> list[float]:
        """Returns a value per checkpoint of `steps`, none if the run has no such curve."""
        return list(self.result["numbers"].get("curves", {}).get(name, []))

    def array(self, name: str) -> np.ndarray | None:
        """Reads an array that lies beside the result; None if there is none."""
        path = self.folder / f"{name}.npy"
        return np.load(path) if path.exists() else None


Runs = Mapping[str, Sequence[Finished]]  # by setting, in the order of seeds


def finished_runs(tasks: Iterable[Any]) -> dict[str, list[Finished]]:
    """Returns the finished runs of every setting that has tasks, of miniature.Task, in the order of the tasks.

    Where a run diverged, so have all that would sample it in another way: without them the others would be judged alone.
    """
    tasks = [task for task in tasks if task.kind in experiments.PRESETS]
    results = {str(task.folder): task.result() for task in tasks}
    runs: dict[str, list[Finished]] = {}
    for task in tasks:
        setting, result = task.content["description"]["setting"], results[str(task.folder)]
        ended = runs.setdefault(setting, [])
        if not result and experiments.SETTINGS[setting].samples_of:
            source = results.get(task.content["trained"])
            result = source if source and source["status"] == "diverged" else None
        if result:
            ended.append(Finished(task.folder, result))
    return runs


class Band(NamedTuple):
    """A curve over checkpoints: mean, smallest and largest value of several runs."""

    steps: Int[np.ndarray, " N"]
    mean: Float[np.ndarray, " N"]
    low: Float[np.ndarray, " N"]
    high: Float[np.ndarray, " N"]


def common_steps(runs: Iterable[Finished]) -> list[int]:
    """Returns the steps that all of the runs have, ascending."""
    return sorted(set.intersection(*(set(run.steps) for run in runs)))


def band(runs: Iterable[Finished], name: str, last: float = math.inf) -> Band | None:
    """Returns a curve over the checkpoints, up to step `last`, that all runs with this curve have; None without such."""
    curves = [zip(run.steps, run.curve(name)) for run in runs if run.curve(name)]
    return _band_of([{step: value for step, value in curve if step <= last} for curve in curves])


def logged_band(runs: Iterable[Finished], metric: str) -> Band | None:
    """Returns a metric of the training logs over the steps that all runs with this metric have logged; None without such."""
    paths = [path for run in runs if (path := run.folder / "metrics.jsonl").exists()]
    return _band_of([dict(zip(*read[metric])) for path in paths if metric in (read := plots.read_curves(path))])


def _band_of(curves: Sequence[Mapping[int, float]]) -> Band | None:
    """Returns the band of curves, step -> value, over the steps that all have."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in curves], np.float64)
    return Band(np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0))
