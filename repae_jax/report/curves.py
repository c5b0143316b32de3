"""Curves of runs, thinned so that a page can hold them."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from repae_jax.evaluation.metrics_file import Curve

CURVE_POINTS = 2000
CURVES_BYTES = 2_800_000  # most bytes of all curves of a page, as JSON


def thin_curve(steps, values, limit: int = CURVE_POINTS) -> Curve:
    """Returns at most `limit` >= 8 points of a curve: its ends, and the lowest and highest point of every stretch of it.

    Values that are not finite count as a gap, of which every stretch keeps one point.
    """
    if len(steps) <= limit:
        return steps, values
    finite = np.isfinite(values)
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), (limit - 2) // (2 if finite.all() else 3)):
        good, bad = part[finite[part]], part[~finite[part]]
        if len(good):
            kept |= {good[np.argmin(values[good])], good[np.argmax(values[good])]}
        kept |= set(bad[:1])
    order = np.array(sorted(kept))
    return steps[order], values[order]


def plain_curves(curves: Mapping[str, Curve], limit: int) -> dict[str, dict[str, Any]]:
    """Returns thinned curves as lists for JSON: {s: steps, v: values or null, n: points before, bad: not finite} by name."""
    plain = {}
    for name, (steps, values) in curves.items():
        thin_steps, thin_values = thin_curve(steps, values, limit)
        heights = [float(f"{value:.5g}") if math.isfinite(value) else None for value in thin_values.tolist()]
        bad = int((~np.isfinite(values)).sum())
        plain[name] = {"s": thin_steps.tolist(), "v": heights, "n": len(steps), "bad": bad}
    return plain


def fit_curves(runs: list[dict[str, Any]]) -> list[str]:
    """Replaces the curves of runs, in place, by lists that leave room for everything else; returns notes."""
    curves, limit = [run["curves"] for run in runs], CURVE_POINTS
    longest = max((len(steps) for of_run in curves for steps, _ in of_run.values()), default=0)
    while True:
        plain = [plain_curves(of_run, limit) for of_run in curves]
        if limit <= 16 or len(json.dumps(plain)) <= CURVES_BYTES:
            break
        limit //= 2
    for run, of_run in zip(runs, plain):
        run["curves"] = of_run
    if longest <= limit:
        return []
    return [f"Curves of more than {limit} points are thinned out; the lowest and highest of every stretch are kept."]
