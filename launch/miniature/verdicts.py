"""Verdicts on published comparisons, by 95 % confidence intervals of the difference between the means of two settings.

A setting is better if the whole interval lies on that side of 0, and two are alike if it lies within a margin around 0. An
interval that does neither decides nothing, nor does a single run, except of a VAE that is trained alone: there is one of each,
from which all others start. Runs that diverged have no mean: a setting with one loses.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from launch.miniature import experiments, tables
from launch.miniature.finished import Runs

AGREES, UNDECIDED, DISAGREES, DIVERGED, NOT_RUN = "agrees", "undecided", "disagrees", "both diverged", "not run"
OUTCOMES = (AGREES, UNDECIDED, DISAGREES, DIVERGED, NOT_RUN)
CONFIDENCE = 0.95
MARGIN = 0.1  # share of the second mean up to which two settings are alike


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, or a difference of means, with its confidence interval; an unbounded one says that the spread is unknown."""

    center: float
    low: float
    high: float

    def text(self, digits: int, sign: str = "") -> str:
        """Returns 'center [low, high]', and of an unbounded interval the center alone; `sign` '+' shows plus signs."""
        center, low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in (self.center, self.low, self.high))
        return f"{center} [{low}, {high}]" if math.isfinite(self.high) else center


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An outcome of a comparison, and the numbers that it rests on."""

    claim: tables.Claim
    outcome: str  # one of OUTCOMES
    values: str = ""  # of both settings
    difference: str = ""  # with its interval, '' if there is none


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean of values with the confidence interval of Student's t; one value has an unbounded one."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    if not np.ptp(values):
        return Interval(mean, mean, mean)
    return Interval(mean, *map(float, stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)))


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Returns mean(first) - mean(second) with Welch's confidence interval.

    A side of one value is taken as given: the interval is the other side's. One value on each side leaves it unbounded.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    center = float(first.mean() - second.mean())
    if len(first) == len(second) == 1:
        return Interval(center, -math.inf, math.inf)
    if not np.ptp(first) and not np.ptp(second):
        return Interval(center, center, center)
    if len(first) == 1 or len(second) == 1:
        return mean_interval(first - second[0] if len(second) == 1 else first[0] - second)
    return Interval(center, *map(float, stats.ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)))


def judge(claim: tables.Claim, runs_of: Runs) -> Verdict:
    """Compares our runs with a claim; one run of a setting that is meant to have several decides nothing."""
    measure, names = tables.MEASURES[claim.measure], (claim.first, claim.second)
    sides = [[run.number(claim.measure) for run in runs_of.get(name, [])] for name in names]
    if not all(sides) or np.isnan([*sides[0], *sides[1]]).any():
        return Verdict(claim, NOT_RUN)
    values = " against ".join(cell(side, measure) for side in sides)
    failed = [not np.isfinite(side).all() for side in sides]
    if all(failed):
        return Verdict(claim, DIVERGED, values)
    few = [name for name, side in zip(names, sides) if len(side) == 1 and experiments.SETTINGS[name].job != "vae"]
    if any(failed):
        outcome = UNDECIDED if few else DISAGREES if claim.alike or failed[0] else AGREES
        return Verdict(claim, outcome, values, _one_run(few))
    gap = difference(*sides)
    text = gap.text(measure.digits, "+")
    if few or not math.isfinite(gap.high):
        center = dataclasses.replace(gap, low=-math.inf, high=math.inf).text(measure.digits, "+")
        return Verdict(claim, UNDECIDED, values, f"{center} {_one_run(few or names)}")
    if claim.alike:
        margin = MARGIN * abs(float(np.mean(sides[1])))
        return Verdict(claim, _alike(gap, margin), values, f"{text}, margin ±{margin:.{measure.digits}f}")
    return Verdict(claim, _better(gap, measure.more_is_better), values, text)


def _one_run(names: Sequence[str]) -> str:
    """Returns a remark on the sides that have one run; '' if there are none."""
    if not names:
        return ""
    return "(one run each)" if len(names) > 1 else f"(one run of “{experiments.SETTINGS[names[0]].label}”)"


def _better(gap: Interval, more_is_better: bool) -> str:
    if gap.low <= 0 <= gap.high:
        return UNDECIDED
    return AGREES if (gap.low > 0) == more_is_better else DISAGREES


def _alike(gap: Interval, margin: float) -> str:
    if -margin <= gap.low and gap.high <= margin:
        return AGREES
    return DISAGREES if gap.low > margin or gap.high < -margin else UNDECIDED


def cell(values: Sequence[float], measure: tables.Measure) -> str:
    """Returns 'mean ± half of the confidence interval' of runs, and the number of those that diverged."""
    known = [value for value in values if not math.isnan(value)]
    finite = [value for value in known if math.isfinite(value)]
    if not known:
        return "–"
    if not finite:
        return "diverged"
    mean = mean_interval(finite)
    text = f"{mean.center:.{measure.digits}f}".replace("-", "−")
    if len(finite) > 1:
        text += f" ± {mean.high - mean.center:.{measure.digits}f}"
    return text if len(finite) == len(known) else f"{text} ({len(known) - len(finite)} of {len(known)} diverged)"
