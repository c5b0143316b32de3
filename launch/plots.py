"""Pictures of a run: curves of its metrics, and images sorted by class."""

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repae_jax import images as image_tools


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
    curves = _read_curves(metrics_jsonl)
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
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image_tools.save_png(path, np.asarray(canvas.buffer_rgba())[..., :3])


def _read_curves(metrics_jsonl):
    """Metric name -> (steps int [N], values float [N])."""
    points = {}
    lines = Path(metrics_jsonl).read_text().splitlines()
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
