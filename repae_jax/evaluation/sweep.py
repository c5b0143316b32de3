"""Sweeps: evaluations of one model at several guidance scales and intervals, their table, their curves and the best of them."""

import argparse
import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from repae_jax.diffusion.samplers import Sampling
from repae_jax.evaluation import plots

_HINTS = typing.get_type_hints(Sampling).items()
SWEPT = {name: kind for name, hint in _HINTS for kind in (int, float) if hint in (kind, kind | None)}  # settings with numbers
# scores, as people call them
NAMES = {
    "fid": "FID", "sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall",
    "fid_infinity": "FID, infinite", "kid": "KID", "mind": "MIND", "cmmd": "CMMD", "fd_dinov2": "FD-DINOv2", "fdr6": "FDr6",
}  # fmt: skip
# a panel of curves for each, as far as they are known
DRAWN = ("fid", "inception_score", "precision", "recall", "fd_dinov2", "cmmd", "fdr6")
MOST_POINTS = 200  # of one sweep: more is most likely a slip of the pen, and would take weeks
_SLACK = 1e-9  # of a step, by which the last value of a range may be missed
_FORM = "allowed is NAME=FIRST:LAST:STEP, such as guidance_scale=1.5:3:0.25"

Point = dict[str, float]  # swept setting -> its value


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values of one setting."""

    name: str
    first: float
    last: float
    step: float

    @property
    def values(self) -> list[float]:
        """From the first in equal steps, up to the last: without it where no step ends there."""
        count = math.floor((self.last - self.first) / self.step + _SLACK) + 1
        values = [round(self.first + number * self.step, 10) for number in range(count)]
        return [int(value) if SWEPT[self.name] is int and value.is_integer() else value for value in values]

    def __str__(self):
        return f"{self.name}={self.first:g}:{self.last:g}:{self.step:g}"


def parse_axis(text: str) -> Axis:
    """Returns the Axis of a command line's 'NAME=FIRST:LAST:STEP', for the `type` of an option."""
    name, _, numbers = text.partition("=")
    if name not in SWEPT:
        raise argparse.ArgumentTypeError(f"{text!r}: the settings that can be swept are {', '.join(SWEPT)}; {_FORM}")
    try:
        first, last, step = map(float, numbers.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {_FORM}") from None
    if not all(map(math.isfinite, (first, last, step))) or step <= 0 or last < first:
        raise argparse.ArgumentTypeError(f"{text!r}: STEP must be positive, LAST not below FIRST, and all of them finite")
    if (last - first) / step >= MOST_POINTS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {MOST_POINTS} values: take a larger STEP")
    return Axis(name, first, last, step)


def points(axes: Sequence[Axis]) -> list[Point]:
    """Returns every combination of the axes' values; ValueError for an axis that comes twice, or too many points."""
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"--sweep {' '.join(map(str, axes))}: give each setting once")
    found = [dict(zip(names, values)) for values in itertools.product(*(axis.values for axis in axes))]
    if len(found) > MOST_POINTS:
        raise ValueError(f"--sweep {' '.join(map(str, axes))}: {len(found)} points; allowed: {MOST_POINTS}: take larger steps")
    return found


def differences(result: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what an evaluation's protocol has otherwise than expected: name -> (there, here).

    Settings of sampling that it does not have came later, and were before what is their default now. Weaker networks are told
    by their weights, not by where these are.
    """
    there = _with_weights({**dataclasses.asdict(Sampling()), **(result.get("protocol") or {})})
    return {name: (there.get(name), value) for name, value in _with_weights(expected).items() if there.get(name) != value}


def _with_weights(protocol):
    weaker = protocol.get("autoguidance")
    return protocol if weaker is None else {**protocol, "autoguidance": weaker["weights"]}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The finished evaluations of a sweep, by point."""

    axes: Sequence[Axis]
    results: Sequence[tuple[Point, Mapping[str, Any]]]  # points, and the content of their result files

    @property
    def best(self) -> int:
        """The number of the point with the lowest FID; the first of several."""
        return min(range(len(self.results)), key=lambda number: self.results[number][1]["metrics"]["fid"])

    def content(self, files: Sequence[str]) -> dict[str, Any]:
        """Returns the content of the sweep's own result file; `files` are the names of the points'."""
        return {
            "kind": "sweep", "axes": list(map(str, self.axes)), "best": self.results[self.best][0],
            "points": [
                {**point, "result": file, "metrics": result["metrics"]} for (point, result), file in zip(self.results, files)
            ],
        }  # fmt: skip

    def table(self) -> str:
        """Returns a line per point, for people."""
        shown = [name for name in NAMES if all(name in result["metrics"] for _, result in self.results)]
        swept = [axis.name for axis in self.axes]
        lines = ["".join(f"{name:>16}" for name in [*swept, *(NAMES[name] for name in shown)])]
        for number, (point, result) in enumerate(self.results):
            values = "".join(f"{point[name]:16g}" for name in swept)
            scores = "".join(f"{result['metrics'][name]:16.4f}" for name in shown)
            lines.append(values + scores + ("   lowest FID" if number == self.best else ""))
        warnings = dict.fromkeys(warning for _, result in self.results for warning in result["warnings"])
        return "\n".join(lines + [f"warning: {warning}" for warning in warnings])

    def draw(self, path: epath.PathLike) -> None:
        """Draws metrics over the first axis, with a line for each combination of the others; the best is a star."""
        shown = [name for name in DRAWN if all(name in result["metrics"] for _, result in self.results)]
        first, *others = (axis.name for axis in self.axes)
        best, best_result = self.results[self.best]
        panels = {}
        for name in shown:
            lines: dict[str, tuple] = {}
            for point, result in self.results:
                label = ", ".join(f"{other} {point[other]:g}" for other in others) or "samples"
                x, y = lines.setdefault(label, ([], []))
                x.append(point[first])
                y.append(result["metrics"][name])
            star = {"marker": "*", "markersize": 14, "linestyle": "none", "color": "black"}
            lines["lowest FID: " + ", ".join(f"{key} {value:g}" for key, value in best.items())] = (
                [best[first]], [best_result["metrics"][name]], star
            )  # fmt: skip
            panels[NAMES[name]] = lines
        plots.plot_lines(path, panels, first, [""] * len(panels))
