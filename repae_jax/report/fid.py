"""FIDs of runs beside each other: epochs until one is low enough, and which of them differ by more than noise."""

from typing import Any

import numpy as np

from repae_jax.evaluation.metrics_file import Curve
from repae_jax.metrics.frechet_confidence import NORMAL_95, within_noise

THRESHOLDS = (100, 50, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2.5, 2, 1.8, 1.6, 1.5, 1.4, 1.3)


def epochs_to_fid(curves: dict[str, Curve], batch_size: int | None, records: int | None) -> list[dict[str, Any]]:
    """Returns EP_FID@k, the epochs until a logged FID is below k, for all k that lie between the first FID and the lowest.

    A row is {curve, k, step, epochs}: of the first FID below k, so the true number is at most the distance of two FIDs lower;
    epochs are step * batch_size / records, None where the size of a batch or of the data set is unknown.
    """
    rows = []
    for name, (steps, values) in curves.items():
        finite = np.isfinite(values)
        if not name.startswith("fid/") or not finite.any():
            continue
        steps, values = steps[finite], values[finite]
        for k in THRESHOLDS:
            if not values.min() < k <= values[0]:
                continue
            step = int(steps[np.argmax(values < k)])
            epochs = step * batch_size / records if batch_size and records else None
            rows.append({"curve": name, "k": k, "step": step, "epochs": epochs})
    return rows


def mark_noise(runs: list[dict[str, Any]]) -> None:
    """Adds to evaluations with a standard error, in place, how their FID compares with the lowest one of the same protocol."""
    groups: dict[Any, list] = {}
    for run in runs:
        for one in run["evaluations"]:
            if all(isinstance(one["metrics"].get(name), int | float) for name in ("fid", "fid_stderr")):
                groups.setdefault(_protocol(one), []).append(one)
    for members in groups.values():
        if len(members) < 2:
            continue
        best = min(members, key=lambda one: one["metrics"]["fid"])
        for one in members:
            one["noise"] = "lowest" if one is best else _compared(one["metrics"], best["metrics"])


def _protocol(one: dict[str, Any]) -> tuple:
    """Returns what must agree for two FIDs to compare: number of samples, their size, the reference, Inception's weights."""
    names = ("num_samples", "image_size", "inception.checksum", "reference.checksum", "reference.count")
    of_source = {name: value for name, value in one["protocol"].items() if name.startswith("reference.source.")}
    return (*(one["protocol"].get(name) for name in names), tuple(sorted(of_source.items())))


def _compared(metrics: dict[str, float], best: dict[str, float]) -> str:
    difference = metrics["fid"] - best["fid"]
    interval = NORMAL_95 * float(np.hypot(metrics["fid_stderr"], best["fid_stderr"]))
    is_noise = within_noise(metrics["fid"], metrics["fid_stderr"], best["fid"], best["fid_stderr"])
    return f"{'within' if is_noise else 'above'} noise: {difference:+.3g} ± {interval:.2g}"
