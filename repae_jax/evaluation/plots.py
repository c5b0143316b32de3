"""Pictures of runs: curves of their metrics, settings side by side, images sorted by class, latents in colours."""

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repae_jax import files
from repae_jax import images as image_tools
from repae_jax.analysis.representation import principal_components


def plot_curves(metrics_jsonl, path, groups):
    """Writes a PNG with one panel per group: raw values light, their moving average on top.

    Args:
      metrics_jsonl: the run's metrics.jsonl.
      path: the PNG to write; its folder must exist.
      groups: title of a panel -> names of the metrics it shows.

    Raises:
      ValueError: if there are no groups, or the file has no value of a metric.
    """
    if not groups:
        raise ValueError("groups is empty; allowed: at least one panel title with the names of its metrics")
    curves = read_curves(metrics_jsonl)
    missing = sorted({name for names in groups.values() for name in names} - set(curves))
    if missing:
        raise ValueError(
            f"{metrics_jsonl} has no metric {', '.join(missing)}; allowed: {', '.join(sorted(curves)) or 'none yet'}"
        )
    columns = int(np.ceil(np.sqrt(len(groups))))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), dpi=120, layout="constrained")
    for i, (title, names) in enumerate(groups.items(), start=1):
        _draw_panel(figure.add_subplot(rows, columns, i), title, {name: curves[name] for name in names})
    _save(figure, path)


def read_curves(metrics_jsonl):
    """Metric name -> (steps int [N], values float [N]) of a run's metrics.jsonl; ValueError if a line is broken."""
    points = {}
    lines = Path(metrics_jsonl).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the run is still writing it, or was killed there
                break
            raise ValueError(f"{metrics_jsonl} line {number} is no JSON: {line[:60]!r}; remove the line") from error
        step = record.pop("step")
        del record["time"]
        for name, value in record.items():
            points.setdefault(name, []).append((step, float(value)))
    return {name: tuple(map(np.array, zip(*pairs))) for name, pairs in points.items()}


def _draw_panel(axes, title, curves):
    for i, (name, (steps, values)) in enumerate(curves.items()):
        color = f"C{i}"
        values = np.where(np.isfinite(values), values, np.nan)  # drawn as a gap
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        marker = "o" if len(steps) < 3 else None  # one point makes no line
        axes.plot(steps, moving_average(values), color=color, linewidth=1.6, marker=marker, markersize=3, label=name)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def moving_average(values):
    """Centred mean over about a twentieth of the curve, without the values that are not finite.

    Args:
      values: float [N].

    Returns:
      float64 [N]; nan where no value around is finite.
    """
    values = np.asarray(values, np.float64)
    half = len(values) // 40
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.clip(np.arange(len(values)) - half, 0, None)
    stop = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def label_rows(images, labels, scale=3):
    """Lays images out with one row per class, in ascending order; short rows end in white.

    Args:
      images: uint8 [N, H, W, 3].
      labels: integers [N].
      scale: whole number by which every image is enlarged.

    Returns:
      uint8 picture [height, width, 3].

    Raises:
      ValueError: if there are no images, or not as many labels as images.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if not len(images) or labels.shape != (len(images),):
        raise ValueError(
            f"{len(images)} images and labels of shape {list(labels.shape)}; allowed: at least one image, one label each"
        )
    classes, counts = np.unique(labels, return_counts=True)
    sheet = np.full((len(classes), counts.max(), *images.shape[1:]), 255, images.dtype)
    for row, label in zip(sheet, classes):
        row[: (labels == label).sum()] = images[labels == label]
    return image_tools.grid(sheet.reshape(-1, *images.shape[1:]), columns=int(counts.max()), scale=scale)


def plot_settings(path, values, value_title, curves, curve_title, log_scale=False):
    """Writes a PNG with two panels: a bar with a dot for every run per setting, and a curve per setting.

    Args:
      path: the PNG to write; its folder must exist.
      values: setting -> numbers of its runs; those that are not finite are left out.
      value_title: of the first panel.
      curves: setting, as in values -> (steps, values).
      curve_title: of the second panel.
      log_scale: of the curves' values.

    Raises:
      ValueError: if there are no settings.
    """
    if not values:
        raise ValueError("values is empty; allowed: at least one setting with its numbers")
    figure = Figure(figsize=(10, max(2.6, 0.42 * len(values) + 1)), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, numbers in enumerate(values.values()):
        finite = [x for x in numbers if np.isfinite(x)]
        if finite:
            left.barh(i, np.mean(finite), color=f"C{i % 10}", alpha=0.35)
        left.plot(finite, [i] * len(finite), "o", color=f"C{i % 10}", markersize=4)
    left.set_yticks(range(len(values)), list(values))
    left.invert_yaxis()
    left.set_title(value_title)
    for i, name in enumerate(values):
        if name in curves:
            steps, heights = curves[name]
            right.plot(steps, heights, color=f"C{i % 10}", marker="o" if len(steps) < 5 else None, markersize=4)
    right.set_title(curve_title)
    right.set_xlabel("step")
    if log_scale:
        right.set_yscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def show_pictures(path, pictures, columns=3):
    """Writes a PNG of pictures side by side, their names above.

    Args:
      path: the PNG to write; its folder must exist.
      pictures: name -> uint8 [H, W, 3], all of one size.
      columns: pictures per row.

    Raises:
      ValueError: if there are no pictures.
    """
    if not pictures:
        raise ValueError("pictures is empty; allowed: at least one name with its picture")
    height, width = next(iter(pictures.values())).shape[:2]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(4 * columns, rows * (4 * height / width + 0.3)), dpi=80, layout="constrained")
    for i, (name, picture) in enumerate(pictures.items(), start=1):
        axes = figure.add_subplot(rows, columns, i)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, fontsize="small")
        axes.axis("off")
    _save(figure, path)


def pca_colors(latents):
    """Latents as pictures: their first three principal components over all positions of all images, each from 0 to 255.

    Args:
      latents: float [B, h, w, C], C >= 3.

    Returns:
      uint8 [B, h, w, 3]; black where nothing varies.

    Raises:
      ValueError: if there are fewer channels.
    """
    components = principal_components(latents)
    low, high = components.min(axis=(0, 1, 2)), components.max(axis=(0, 1, 2))
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return np.round(255 * scaled).astype(np.uint8)


def show_rows(path, rows, size=96):
    """Writes a PNG of labelled rows of pictures, all enlarged to about one size.

    Args:
      path: the PNG to write; its folder must exist.
      rows: label -> uint8 [N, H, W, 3]; H and W may differ from row to row; or a text to show in its place.
      size: side of a picture in pixels, about.

    Raises:
      ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty; allowed: at least one label with its pictures")
    sheets = {
        label: image_tools.grid(row, columns=len(row), scale=max(1, round(size / row.shape[1])))
        for label, row in rows.items()
        if not isinstance(row, str)
    }
    width = max((sheet.shape[1] for sheet in sheets.values()), default=6 * size)
    height = max((sheet.shape[0] for sheet in sheets.values()), default=size)
    figure = Figure(figsize=(width / 100, len(rows) * (height + 26) / 100), dpi=100, layout="constrained")
    for i, (label, row) in enumerate(rows.items(), start=1):
        axes = figure.add_subplot(len(rows), 1, i)
        axes.set_title(label, fontsize="small", loc="left", pad=3)
        axes.axis("off")
        if label in sheets:
            axes.imshow(sheets[label], interpolation="antialiased")
        else:
            axes.text(0, 0.5, row, fontsize="small", verticalalignment="center")
    _save(figure, path)


def plot_lines(path, panels, x_title, y_titles, log_scale=False, reference=None):
    """Writes a PNG of panels with lines, side by side, with one legend for all.

    Args:
      path: the PNG to write; its folder must exist.
      panels: title -> name -> (x, y), or (x, y, style) with matplotlib's keywords for a line.
      x_title: of all panels.
      y_titles: one for each panel.
      log_scale: of y.
      reference: (name, x, y) of a dashed line in all panels.

    Raises:
      ValueError: if there are no panels.
    """
    if not panels:
        raise ValueError("panels is empty; allowed: at least one title with its lines")
    figure = Figure(figsize=(5.2 * len(panels) + 2, 4), dpi=100, layout="constrained")
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for number, (name, (x, y, *style)) in enumerate(lines.items()):
            marker = "o" if len(x) < 40 else None
            keywords = {"color": f"C{number % 10}", **(style[0] if style else {})}
            axes.plot(x, y, label=name, linewidth=1.5, marker=marker, markersize=3, **keywords)
        if reference is not None:
            name, x, y = reference
            axes.plot(x, y, label=name, color="black", linewidth=1.5, linestyle="--")
        axes.set_title(title)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_titles[i])
        axes.set_yscale("log" if log_scale else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    _save(figure, path)


def plot_channels(path, panels):
    """Writes a PNG with a panel per model: the histogram of every channel, upright, dark where values are frequent.

    Args:
      path: the PNG to write; its folder must exist.
      panels: title -> {'edges': bin edges [K + 1], 'shares': [C, K], 'median': [C], 'low': [C], 'high': [C]}; low and high
        are quantiles, drawn as ticks.

    Raises:
      ValueError: if there are no panels.
    """
    if not panels:
        raise ValueError("panels is empty; allowed: at least one model with its histograms")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), dpi=100, layout="constrained")
    for i, (title, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, i)
        shares = np.asarray(panel["shares"])
        channels = np.arange(len(shares))
        peaks = np.maximum(shares.max(axis=1, keepdims=True), 1e-12)
        axes.pcolormesh(np.arange(len(shares) + 1) - 0.5, panel["edges"], (shares / peaks).T, cmap="Blues", vmin=0, vmax=1)
        axes.hlines(panel["median"], channels - 0.4, channels + 0.4, color="C3", linewidth=1.4, label="median")
        for name in ("low", "high"):
            label = "1 % and 99 %" if name == "low" else None
            axes.hlines(panel[name], channels - 0.25, channels + 0.25, color="black", linewidth=0.8, label=label)
        axes.set_title(title)
        axes.set_xlabel("channel")
        axes.set_ylabel("latent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


def plot_bars(path, panels, names):
    """Writes a PNG of panels with groups of bars: a group per thing measured, in it a bar per model.

    Args:
      path: the PNG to write; its folder must exist.
      panels: title -> group -> values, one per name; nan is no bar.
      names: of the models.

    Raises:
      ValueError: if there are no panels or names.
    """
    if not panels or not names:
        raise ValueError(f"panels {list(panels)}, names {list(names)}; allowed: at least one of each")
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=100, layout="constrained")
    for i, (title, groups) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), i)
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
            heights = [values[number] for values in groups.values()]
            axes.bar(at, heights, width=0.92 * width, color=f"C{number % 10}", label=name)
        axes.set_xticks(range(len(groups)), list(groups), fontsize="x-small")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    _save(figure, path)


def _save(figure, path):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    files.save_png(path, np.asarray(canvas.buffer_rgba())[..., :3])
