"""CKNNA against Frechet distance: how far one explains the other, over the checkpoints of a setting and at one step."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from launch.miniature import markdown
from launch.miniature.finished import Finished, Runs, common_steps
from launch.miniature.style import label_of

PUBLISHED_R2 = 0.97  # of CKNNA and gFID
LEAST_POINTS = 6  # of a fit at one step

Points = tuple[Sequence[float], Sequence[float]]  # CKNNA, Frechet distance


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A line through CKNNA and the logarithm of the Frechet distance."""

    r2: float
    slope: float
    intercept: float
    points: int


def correlation(points: Points) -> Correlation | None:
    """Fits a line by least squares; None for fewer than three points or equal CKNNA."""
    x, y = points
    if len(x) < 3 or not np.ptp(x):
        return None
    fit = stats.linregress(x, np.log(y))
    return Correlation(float(fit.rvalue**2), float(fit.slope), float(fit.intercept), len(x))


def checkpoints_of(settings: Iterable[str], runs_of: Runs) -> dict[str, Points]:
    """Returns the points of all checkpoints of every setting that has some."""
    points = {setting: _points(runs_of.get(setting, [])) for setting in settings}
    return {setting: of_setting for setting, of_setting in points.items() if of_setting[0]}


def at_last_common_step(settings: Iterable[str], runs_of: Runs) -> tuple[int, dict[str, Points]] | None:
    """Returns the last step that all runs with points have, and its points by setting; None if there is none."""
    runs = {setting: [run for run in runs_of.get(setting, []) if _points([run])[0]] for setting in settings}
    every = [run for of_setting in runs.values() for run in of_setting]
    steps = common_steps(every) if every else []
    if not steps:
        return None
    points = {setting: _points(of_setting, steps[-1]) for setting, of_setting in runs.items()}
    return steps[-1], {setting: of_setting for setting, of_setting in points.items() if of_setting[0]}


def _points(runs: Iterable[Finished], step: int | None = None) -> Points:
    """Returns the points of runs, of one step or of all, with a finite and positive distance."""
    rows = [row for run in runs for row in zip(run.steps, run.curve("cknna"), run.curve("fid"))]
    pairs = [(x, y) for at, x, y in rows if step in (None, at) and math.isfinite(x) and math.isfinite(y) and y > 0]
    return [x for x, _ in pairs], [y for _, y in pairs]


def fits(points: Mapping[str, Points]) -> dict[str, Correlation]:
    """Returns the fit of every setting that has one."""
    return {setting: fit for setting, of_setting in points.items() if (fit := correlation(of_setting))}


def lines(settings: Sequence[str], runs_of: Runs) -> list[str]:
    """Returns what the fits say, and what they cannot say, as items of a list; none without a fit."""
    within = fits(checkpoints_of(settings, runs_of))
    if not within:
        return []
    each = [f"{fit.r2:.2f} with {label_of(setting)} ({fit.points} checkpoints)" for setting, fit in within.items()]
    found = [
        f"* CKNNA and the logarithm of the Frechet distance (published: R² = {PUBLISHED_R2}). Over the checkpoints of one "
        f"setting R² is {markdown.listed(each)}. Both change while a run trains, so these numbers alone do not say that "
        "alignment makes samples better."
    ]
    common = at_last_common_step(settings, runs_of)
    if common is None or sum(len(x) for x, _ in common[1].values()) < LEAST_POINTS:
        return found
    step, points = common
    fit = correlation(([x for xs, _ in points.values() for x in xs], [y for _, ys in points.values() for y in ys]))
    if fit:
        found.append(
            f"* The same after {step:,} steps, over {fit.points} runs of {len(points)} settings: R² = {fit.r2:.2f}, slope "
            f"{fit.slope:+.1f}. Here training time explains nothing, but runs of a setting lie close together, which makes it "
            f"hardly more than {len(points)} points, and the settings differ in more than their alignment."
        )
    return found
