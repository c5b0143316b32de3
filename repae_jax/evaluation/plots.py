"""Pictures of runs: curves of their metrics, models side by side, images sorted by class, latents in colors."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from repae_jax import files
from repae_jax import images as image_tools
from repae_jax.analysis.representation import principal_components
from repae_jax.evaluation.metrics_file import Curve, read_metrics

Picture = UInt8[np.ndarray, "H W 3"]


def read_curves(metrics_jsonl: epath.PathLike) -> dict[str, Curve]:
    """Returns (steps, values) of every metric of a run's metrics.jsonl; raises ValueError if a line is broken."""
    metrics = read_metrics(metrics_jsonl)
    if metrics.broken:
        number = metrics.broken[0]
        line = epath.Path(metrics_jsonl).read_bytes().splitlines()[number - 1]
        raise ValueError(f"{metrics_jsonl} line {number} is no JSON: {line[:60]!r}; remove the line")
    return metrics.curves


def moving_average(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Computes the centered mean over about a twentieth of the curve, of finite values; nan where there are none around."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    window = functools.partial(ndimage.uniform_filter1d, size=2 * (len(values) // 40) + 1, mode="constant")
    means, shares = window(np.where(finite, values, 0)), window(finite.astype(np.float64))
    return np.divide(means, shares, out=np.full(len(values), np.nan), where=shares > 0)


def label_rows(images: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, " N"], scale: int = 3) -> Picture:
    """Lays images out with one row per class, in ascending order, enlarged by a whole number; short rows end in white."""
    images, labels = np.asarray(images), np.asarray(labels)
    if not len(images) or labels.shape != (len(images),):
        allowed = "at least one image, one label each"
        raise ValueError(f"{len(images)} images and labels of shape {list(labels.shape)}; allowed: {allowed}")
    classes, counts = np.unique(labels, return_counts=True)
    sheet = np.full((len(classes), counts.max(), *images.shape[1:]), 255, images.dtype)
    for row, label in zip(sheet, classes):
        row[: (labels == label).sum()] = images[labels == label]
    return image_tools.grid(sheet.reshape(-1, *images.shape[1:]), columns=int(counts.max()), scale=scale)


def pca_colors(latents: Float[np.ndarray, "B h w C"]) -> UInt8[np.ndarray, "B h w 3"]:
    """Maps latents to colors: three principal components over all positions of all images, each from 0 to 255."""
    components = principal_components(latents)
    low, high = components.min(axis=(0, 1, 2)), components.max(axis=(0, 1, 2))
    return np.round(255 * (components - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)  # black if nothing varies


# ---- drawing --------------------------------------------------------------------------------------------------------
# Every function writes a PNG to `path`, whose folder must exist, and raises ValueError if there is nothing to draw.


def plot_curves(metrics_jsonl: epath.PathLike, path: epath.PathLike, groups: Mapping[str, Sequence[str]]) -> None:
    """Draws one panel per group, its title with names of metrics: raw values light, their moving average on top."""
    _require("groups", groups, "panel title with the names of its metrics")
    curves = read_curves(metrics_jsonl)
    if missing := sorted({name for names in groups.values() for name in names} - set(curves)):
        allowed = ", ".join(sorted(curves)) or "none yet"
        raise ValueError(f"{metrics_jsonl} has no metric {', '.join(missing)}; allowed: {allowed}")
    columns = int(np.ceil(np.sqrt(len(groups))))
    figure, panels = _panels(groups.items(), columns, (4.2, 3.2), dpi=120)
    for axes, names in panels:
        for i, name in enumerate(names):
            steps, values = curves[name]
            values = np.where(np.isfinite(values), values, np.nan)  # drawn as a gap
            axes.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
            _draw_curve(axes, steps, moving_average(values), i, max_marked=2, label=name)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def show_rows(path: epath.PathLike, rows: Mapping[str, UInt8[np.ndarray, "N H W 3"] | str], size: int = 96) -> None:
    """Draws labeled rows of pictures, or a text in their place, all enlarged to about `size` pixels, whatever their H and W."""
    _require("rows", rows, "label with its pictures")
    sheets = {
        label: image_tools.grid(row, columns=len(row), scale=max(1, round(size / row.shape[1])))
        for label, row in rows.items()
        if not isinstance(row, str)
    }
    width = max((sheet.shape[1] for sheet in sheets.values()), default=6 * size)
    height = max((sheet.shape[0] for sheet in sheets.values()), default=size)
    figure, panels = _panels(rows.items(), 1, (width / 100, (height + 26) / 100), fontsize="small", loc="left", pad=3)
    for (axes, row), label in zip(panels, rows):
        axes.axis("off")
        if label in sheets:
            axes.imshow(sheets[label], interpolation="antialiased")
            axes.set_anchor("W")  # short rows begin where long ones do
        else:
            axes.text(0, 0.5, row, fontsize="small", verticalalignment="center")
    _save(figure, path)


def plot_lines(
    path: epath.PathLike, panels: Mapping[str, Mapping[str, tuple]], x_title: str, y_titles: Sequence[str],
    log_scale: bool = False, reference: tuple[str, Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Draws panels with lines, side by side, with one legend for all.

    Lines, by title of the panel and name, are (x, y), or (x, y, matplotlib's keywords for the line). `reference` is a
    dashed line in all panels, (name, x, y).
    """
    _require("panels", panels, "title with its lines")
    figure, drawn = _panels(panels.items(), len(panels), (5.2 + 2 / len(panels), 4))
    for (axes, lines), y_title in zip(drawn, y_titles):
        for i, (name, (x, y, *style)) in enumerate(lines.items()):
            _draw_curve(axes, x, y, i, max_marked=39, label=name, **(style[0] if style else {}))
        if reference is not None:
            name, x, y = reference
            axes.plot(x, y, label=name, color="black", linewidth=1.5, linestyle="--")
        axes.set(xlabel=x_title, ylabel=y_title, yscale="log" if log_scale else "linear")
        if all(float(value).is_integer() for x, *_ in lines.values() for value in x):
            axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path, legend={"loc": "outside right upper"})


def plot_channels(path: epath.PathLike, panels: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws a panel per model: the histogram of every channel, upright, dark where values are frequent.

    Of each panel, 'edges' of the bins [K + 1], 'shares' [C, K], and 'median', 'low' and 'high' quantiles [C], drawn as ticks.
    """
    _require("panels", panels, "model with its histograms")
    figure, drawn = _panels(panels.items(), 2, (5.2, 3.4))
    for axes, panel in drawn:
        shares = np.asarray(panel["shares"])
        channels = np.arange(len(shares))
        peaks = np.maximum(shares.max(axis=1, keepdims=True), 1e-12)
        axes.grid(False)
        axes.pcolormesh(np.arange(len(shares) + 1) - 0.5, panel["edges"], (shares / peaks).T, cmap="Blues", vmin=0, vmax=1)
        axes.hlines(panel["median"], channels - 0.4, channels + 0.4, color="C3", linewidth=1.4, label="median")
        for name, label in (("low", "1 % and 99 %"), ("high", None)):
            axes.hlines(panel[name], channels - 0.25, channels + 0.25, color="black", linewidth=0.8, label=label)
        axes.set(xlabel="channel", ylabel="latent")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path, legend={"loc": "outside upper right", "ncols": 2})


def plot_bars(path: epath.PathLike, panels: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> None:
    """Draws panels with groups of bars: a group per measure, in it a bar per model of `names`; nan is no bar."""
    if not panels or not names:
        raise ValueError(f"panels {list(panels)}, names {list(names)}; allowed: at least one of each")
    figure, drawn = _panels(panels.items(), len(panels), (5.2, 3.8), fontsize="medium")
    for axes, groups in drawn:
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
            heights = [values[i] for values in groups.values()]
            axes.bar(at, heights, width=0.92 * width, color=f"C{i % 10}", label=name)
        axes.set_xticks(range(len(groups)), list(groups), fontsize="x-small")
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
    _save(figure, path, legend={"loc": "outside lower center", "ncols": 4})


def _require(name: str, values: Any, needed: str) -> None:
    if not values:
        raise ValueError(f"{name} is empty; allowed: at least one {needed}")


def _panels(
    contents: Collection[tuple[str, Any]], columns: int, size: tuple[float, float], dpi: int = 100, **title_keywords: Any
) -> tuple[Figure, list[tuple[Axes, Any]]]:
    """Returns a figure of panels of `size` in inches, and (axes, content) of each (title, content)."""
    columns = min(columns, len(contents))
    rows = -(-len(contents) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=dpi, layout="constrained")
    panels = []
    for i, (title, content) in enumerate(contents, start=1):
        axes = figure.add_subplot(rows, columns, i)
        axes.set_title(title, **title_keywords)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        panels.append((axes, content))
    return figure, panels


def _draw_curve(axes: Axes, x: Any, y: Any, index: int, max_marked: int, **keywords: Any) -> None:
    """Draws a line in the color of its index, with markers if it has few points: a single one makes no line."""
    marker = "o" if len(x) <= max_marked else None
    axes.plot(x, y, **{"color": f"C{index % 10}", "linewidth": 1.5, "marker": marker, "markersize": 3, **keywords})


def _save(figure: Figure, path: epath.PathLike, legend: Mapping[str, Any] | None = None) -> None:
    """Writes the figure; `legend` adds one for all panels, from the labels of the last."""
    if legend is not None:
        figure.legend(*figure.axes[-1].get_legend_handles_labels(), frameon=False, fontsize="small", **legend)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    files.save_png(path, np.asarray(canvas.buffer_rgba())[..., :3])
