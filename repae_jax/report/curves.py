"""Curves of runs, made so short that a page can hold them."""

import json
import math

import numpy as np

CURVE_POINTS = 2000
CURVES_BYTES = 2_800_000  # of all curves of a page, as JSON


def thin_curve(steps, values, limit=CURVE_POINTS):
    """Fewer points of a curve, among them the lowest and highest of every stretch of it.

    Args:
      steps: int [N].
      values: float [N]; what is not finite counts as a gap, of which every stretch keeps one point.
      limit: points to keep, at least 8.

    Returns:
      (steps, values) of at most `limit` points, in order, the first and the last among them.
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
    kept = np.array(sorted(kept))
    return steps[kept], values[kept]


def plain_curves(curves, limit):
    """Curves as lists for JSON: name -> {s: steps, v: values or null, n: points before thinning}."""
    plain = {}
    for name, (steps, values) in curves.items():
        thin_steps, thin_values = thin_curve(steps, values, limit)
        heights = [float(f"{value:.5g}") if math.isfinite(value) else None for value in thin_values.tolist()]
        bad = int((~np.isfinite(values)).sum())
        plain[name] = {"s": thin_steps.tolist(), "v": heights, "n": len(steps), "bad": bad}
    return plain


def fit_curves(runs):
    """Replaces the curves, in place, by lists that leave room for everything else; returns notes."""
    everything, limit = [run["curves"] for run in runs], CURVE_POINTS
    longest = max((len(steps) for curves in everything for steps, _ in curves.values()), default=0)
    while True:
        plain = [plain_curves(curves, limit) for curves in everything]
        if limit <= 16 or len(json.dumps(plain)) <= CURVES_BYTES:
            break
        limit //= 2
    for run, curves in zip(runs, plain):
        run["curves"] = curves
    if longest <= limit:
        return []
    return [f"Curves of more than {limit} points are thinned out; the lowest and highest of every stretch are kept."]
