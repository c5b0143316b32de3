"""Figures of the miniature paper: the opening one, and of every table its values, curves, spectra and CKNNA.

Every function that draws a figure writes a PNG, whose folder must exist.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from launch.miniature.cknna import Points, fits
from launch.miniature.finished import Band, Finished, Runs, band
from launch.miniature.picture_rows import (
    LATENT_TITLES,
    PictureRow,
    axes_at,
    draw_picture_rows,
    height_of,
    latent_rows,
    samples_over_steps,
)
from launch.miniature.style import STYLE, WIDTH, Look, label_of, looks, save
from launch.miniature.verdicts import mean_interval

HEADLINE = ("sit", "repa", "repa-e")
CURVES_HEIGHT = 3.75  # inches of the opening figure
FRONT_DPI = 90  # 900 pixels wide
UNITS = {1e18: "EFLOP", 1e15: "PFLOP", 1e12: "TFLOP", 1e9: "GFLOP"}
WIDE = 8  # largest over smallest step, or compute, from which on the axis is logarithmic
NEARLY = 0.95  # share of the longest curve from which on a curve is as long as it
PICTURES = "pictures"  # label of their spectrum

Spectra = Mapping[str, tuple[str, Float[np.ndarray, " K"]]]  # label -> (color, amplitudes)


# ---- the opening figure ---------------------------------------------------------------------------------------------------


def has_headline(runs_of: Runs) -> bool:
    """Returns True if there are curves for the opening figure."""
    return bool(_headline(runs_of))


def _headline(runs_of: Runs) -> Runs:
    return {setting: runs_of[setting] for setting in HEADLINE if any(run.curve("fid") for run in runs_of.get(setting, []))}


@matplotlib.rc_context(STYLE)
def draw_opening(path: Path, runs_of: Runs) -> None:
    """Draws the headline: Frechet distance over steps and over compute, samples of all at the same steps, latents in colors."""
    look_of = looks([*HEADLINE, "vae"])
    latents = latent_rows({setting: runs_of[setting] for setting in ("vae", "repa-e") if runs_of.get(setting)}, look_of)
    _draw_headline(path, _headline(runs_of), latents, STYLE["figure.dpi"])


@matplotlib.rc_context(STYLE)
def draw_front(path: Path, runs_of: Runs) -> None:
    """Draws the headline for a front page, in fewer pixels and without latents."""
    _draw_headline(path, _headline(runs_of), [], FRONT_DPI)


def _draw_headline(path: Path, shown: Runs, latents: Sequence[PictureRow], dpi: int) -> None:
    look_of = looks(HEADLINE)
    samples, titles = samples_over_steps(shown, look_of)
    figure = Figure(figsize=(WIDTH, CURVES_HEIGHT + height_of(samples) + height_of(latents)), dpi=dpi)
    _draw_headline_curves(axes_at(figure, 0.75, 0.4, 4.3, 2.6), shown, look_of, compute=False)
    _draw_headline_curves(axes_at(figure, 5.5, 0.4, 4.3, 2.6), shown, look_of, compute=True)
    draw_picture_rows(figure, CURVES_HEIGHT, samples, titles)
    draw_picture_rows(figure, CURVES_HEIGHT + height_of(samples), latents, LATENT_TITLES)
    save(figure, path)


def _draw_headline_curves(axes: Axes, runs_of: Runs, look_of: Mapping[str, Look], compute: bool) -> None:
    """Draws Frechet distance over steps, or over training compute, and a line where the shortest curve ends."""
    per_step = {setting: _flop_per_step(runs) if compute else 1 for setting, runs in runs_of.items()}
    curves = {setting: band(runs, "fid") for setting, runs in runs_of.items()}
    ends = {setting: curve.steps[-1] * per_step[setting] for setting, curve in curves.items() if curve}
    unit, name = (
        next(((unit, name) for unit, name in UNITS.items() if max(ends.values()) > unit), (1, "FLOP")) if compute else (1, "")
    )
    for setting, curve in curves.items():
        if curve:
            _draw_band(axes, curve, curve.steps * per_step[setting] / unit, look_of[setting], label_of(setting))
    first, last = min(ends.values()) / unit, max(ends.values()) / unit
    if first < NEARLY * last:
        axes.axvline(first, color="black", linewidth=0.9, linestyle=":")
        axes.annotate(
            f"equal {'compute' if compute else 'steps'}", (first, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
            textcoords="offset points", horizontalalignment="right", verticalalignment="top", fontsize=8.5,
        )  # fmt: skip
    axes.set_title(f"Frechet distance over {'training compute' if compute else 'training steps'}", loc="left")
    axes.set_xlabel(f"training compute ({name})" if compute else "training steps")
    _scale_x(axes, [x for line in axes.lines[: len(ends)] for x in line.get_xdata()])
    _log_ticks(axes.yaxis)
    if not compute:
        axes.legend()


def _flop_per_step(runs: Sequence[Finished]) -> float:
    """Returns the training FLOP of a step, the same for all runs of a setting that did not diverge."""
    return next(run.number("flop_per_step") for run in runs if not run.diverged)


def _draw_band(axes: Axes, curve: Band, x: Float[np.ndarray, " N"], look: Look, label: str) -> None:
    """Draws the mean of runs as a line, and their range as a band; a curve with few points has markers."""
    marker = look.marker if len(x) <= 20 else None
    axes.fill_between(x, curve.low, curve.high, color=look.color, alpha=0.16, linewidth=0)
    axes.plot(x, curve.mean, color=look.color, marker=marker, markersize=4.5, linewidth=1.8, label=label)


def _scale_x(axes: Axes, x: Sequence[float]) -> None:
    """Scales x by logarithms if the values span a wide range, so that short runs are seen beside long ones."""
    if min(x) > 0 and max(x) >= WIDE * min(x):
        _log_ticks(axes.xaxis)
    else:
        axes.set_xlim(left=0)


def _log_ticks(axis: Axis) -> None:
    """Scales an axis by logarithms, with plain numbers at as many ticks as its range needs."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    within = (1, 3) if high > 300 * low else (1, 2, 5) if high > 12 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(ticker.LogLocator(subs=within))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.12g}"))
    axis.set_minor_locator(ticker.NullLocator())


# ---- figures of one table -------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_values(
    path: Path,
    look_of: Mapping[str, Look],
    values: Mapping[str, Sequence[float]],
    title: str,
    curves: Mapping[str, Band],
    curve_title: str,
) -> None:
    """Draws of every setting its runs, their mean and its confidence interval, and the curves of those that have one."""
    figure = Figure(figsize=(WIDTH, max(3.0, 0.38 * len(values) + 0.9)), layout="constrained")
    left = figure.add_subplot(1, 2 if curves else 1, 1)
    left.set_title(title, loc="left")
    for row, setting in enumerate(values):
        _draw_value(left, row, values[setting], look_of[setting])
    left.set_yticks(range(len(values)), [label_of(setting) for setting in values])
    for label, setting in zip(left.get_yticklabels(), values):
        label.set_color(look_of[setting].color)  # the legend of the curves, too
    left.set_ylim(len(values) - 0.5, -0.5)
    left.set_xscale("log" if _spans_decades(values) else "linear")
    if curves:
        right = figure.add_subplot(1, 2, 2)
        right.set_title(curve_title, loc="left")
        right.set_xlabel("training steps")
        for setting, curve in curves.items():
            _draw_band(right, curve, curve.steps, look_of[setting], label_of(setting))
        _scale_x(right, np.concatenate([curve.steps for curve in curves.values()]))
        if 0 < 3 * min(curve.low.min() for curve in curves.values()) < max(curve.high.max() for curve in curves.values()):
            _log_ticks(right.yaxis)
    save(figure, path)


def _draw_value(axes: Axes, row: int, values: Sequence[float], look: Look) -> None:
    finite = [value for value in values if np.isfinite(value)]
    if finite:
        mean = mean_interval(finite)
        spread = [[mean.center - mean.low], [mean.high - mean.center]] if len(finite) > 1 else None
        axes.errorbar(mean.center, row, xerr=spread, fmt=look.marker, color=look.color, markersize=6, capsize=3, linewidth=1.8)
    if len(finite) > 1:
        axes.plot(finite, [row + 0.22] * len(finite), ".", color=look.color, alpha=0.5, markersize=5)
    if failed := sum(np.isinf(values)):
        axes.annotate(
            f"{failed} diverged", (0.99, row), xycoords=("axes fraction", "data"), color=look.color,
            horizontalalignment="right", verticalalignment="center",
        )  # fmt: skip


def _spans_decades(values: Mapping[str, Sequence[float]]) -> bool:
    finite = [value for numbers in values.values() for value in numbers if np.isfinite(value)]
    return bool(finite) and 0 < 20 * min(finite) < max(finite)


@matplotlib.rc_context(STYLE)
def draw_representation(path: Path, look_of: Mapping[str, Look], spectra: Spectra, points: Mapping[str, Points]) -> None:
    """Draws spectra, and CKNNA against Frechet distance with the fit of every setting, whichever there are."""
    figure = Figure(figsize=(WIDTH, 3.6 + 0.2 * (max(len(spectra), len(points)) // 4)), layout="constrained")
    columns = 2 if spectra and points else 1
    if spectra:
        _draw_spectra(figure.add_subplot(1, columns, 1), spectra)
    if points:
        _draw_points(figure.add_subplot(1, columns, columns), look_of, points)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        _log_ticks(axes.yaxis)
        drawn, labels = axes.get_legend_handles_labels()
        handles = dict(zip(labels, drawn)) | handles
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    save(figure, path)


def _draw_spectra(axes: Axes, spectra: Spectra) -> None:
    for label, (color, amplitudes) in spectra.items():
        frequencies = np.arange(len(amplitudes)) / max(1, len(amplitudes) - 1)
        axes.plot(frequencies, amplitudes, "--" if label == PICTURES else "-", color=color, label=label, linewidth=1.6)
    axes.set_title("spectrum of latents and of pictures", loc="left")
    axes.set_ylabel("DCT amplitude, lowest is 1")
    axes.set_xlabel("frequency, from the lowest to the highest")


def _draw_points(axes: Axes, look_of: Mapping[str, Look], points: Mapping[str, Points]) -> None:
    fit_of = fits(points)
    for setting, (x, y) in points.items():
        look = look_of[setting]
        axes.plot(x, y, look.marker, color=look.color, markersize=5, alpha=0.75, label=label_of(setting))
        if fit := fit_of.get(setting):
            ends = np.array([min(x), max(x)])
            axes.plot(ends, np.exp(fit.intercept + fit.slope * ends), color=look.color, linewidth=1, linestyle="--")
    axes.set_title("checkpoints, and a line for each setting", loc="left")
    axes.set_ylabel("Frechet distance")
    axes.set_xlabel("CKNNA")
