"""Rows of pictures with labels: samples of settings at the same steps, latents in colors, reconstructions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.miniature.finished import Finished, Runs, common_steps
from launch.miniature.style import STYLE, WIDTH, Look, label_of, save
from repae_jax import images
from repae_jax.evaluation import plots

LABELS = 1.75  # inches left of rows of pictures
GAP = 0.16  # inches between blocks of pictures
TITLE = 0.3  # inches for titles above rows
MOST_COLUMNS = 20  # pictures in a row
MOST_OF_TWO_LINES = 4  # settings that have two lines of samples each; more have one
LATENT_TITLES = ("latents: three principal components as colors", "pictures and reconstructions")

Pictures = UInt8[np.ndarray, "rows columns H W 3"]


class PictureRow(NamedTuple):
    """Blocks of pictures side by side, and a label left of them."""

    label: str
    color: str
    blocks: Sequence[Pictures]


def row_height(row: PictureRow) -> float:
    """Returns a row's height in inches, with the space below it."""
    return _tile(row) * len(row.blocks[0]) + 0.07


def height_of(rows: Sequence[PictureRow]) -> float:
    """Returns the height of rows with their titles in inches, 0 without rows."""
    return TITLE + sum(map(row_height, rows)) if rows else 0.0


def _tile(row: PictureRow) -> float:
    """Returns the side of a picture in inches."""
    columns = sum(block.shape[1] for block in row.blocks)
    return min(0.75, (WIDTH - LABELS - 0.1 - GAP * (len(row.blocks) - 1)) / columns)


def draw_picture_rows(figure: Figure, top: float, rows: Sequence[PictureRow], titles: Sequence[str]) -> float:
    """Draws rows from `top` inches below the figure's upper edge on, a title above each block; returns where they end."""
    height = figure.get_figheight()
    for number, row in enumerate(rows):
        tile, left = _tile(row), LABELS
        middle = 1 - (top + tile * len(row.blocks[0]) / 2) / height
        figure.text(
            (LABELS - 0.12) / WIDTH, middle, row.label, color=row.color, horizontalalignment="right",
            verticalalignment="center", weight="bold", wrap=False,
        )  # fmt: skip
        for title, block in zip(titles, row.blocks):
            axes = axes_at(figure, left, top, tile * block.shape[1], tile * block.shape[0])
            axes.axis("off")
            sheet = images.grid(
                block.reshape(-1, *block.shape[2:]), block.shape[1], padding=1, scale=max(1, 96 // block.shape[2])
            )
            axes.imshow(sheet, interpolation="antialiased", aspect="auto")
            if not number:
                axes.set_title(title, loc="left", pad=4)
            left += tile * block.shape[1] + GAP
        top += row_height(row)
    return top


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes at a place in inches, from the figure's upper left corner."""
    total = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))


def samples_over_steps(runs_of: Runs, look_of: Mapping[str, Look]) -> tuple[list[PictureRow], list[str]]:
    """Returns a row per setting with samples of its first run, and titles: two checkpoints that all settings have.

    They are the last one of these, and the one nearest to a third of its steps.
    """
    runs = _with_samples(runs_of)
    steps = common_steps(runs.values()) if runs else []
    if not steps:
        return [], []
    chosen = [min(steps, key=lambda step: abs(step - steps[-1] / 3)), steps[-1]] if len(steps) > 1 else steps
    rows = []
    for setting, run in runs.items():
        samples = run.array("samples")
        blocks = [_by_class(samples[run.steps.index(step)], len(chosen), lines=2) for step in chosen]
        rows.append(PictureRow(broken(label_of(setting)), look_of[setting].color, blocks))
    return rows, [f"samples after {step:,} steps" for step in chosen]


def compared_samples(runs_of: Runs, look_of: Mapping[str, Look]) -> tuple[list[PictureRow], list[str]]:
    """Returns a row per setting with samples of its first run, at the step of the tables' numbers, and the title."""
    runs = {setting: run for setting, run in _with_samples(runs_of).items() if run.compared is not None}
    steps = {setting: run.steps[run.compared] for setting, run in runs.items()}
    rows, lines, same = [], 2 if len(runs) <= MOST_OF_TWO_LINES else 1, len(set(steps.values())) == 1
    for setting, run in runs.items():
        label = broken(label_of(setting)) if same else f"{broken(label_of(setting))}\n({steps[setting]:,} steps)"
        blocks = [_by_class(run.array("samples")[run.compared], 1, lines)]
        rows.append(PictureRow(label, look_of[setting].color, blocks))
    return rows, [f"samples after {max(steps.values()):,} steps" if same else "samples"]


def _with_samples(runs_of: Runs) -> dict[str, Finished]:
    """Returns the first run of every setting whose samples can be shown."""
    shown = {
        setting: next((run for run in runs if run.steps and (run.folder / "samples.npy").exists()), None)
        for setting, runs in runs_of.items()
    }
    return {setting: run for setting, run in shown.items() if run}


def _by_class(samples: UInt8[np.ndarray, "classes shown H W 3"], blocks: int, lines: int) -> Pictures:
    """Lays out lines of samples, a class after the other, in as many columns as fit if there are several blocks."""
    columns = MOST_COLUMNS // blocks
    lines = min(lines, samples.shape[1])
    each = max(1, min(samples.shape[1] // lines, columns // len(samples)))
    chosen = samples[:columns]
    parts = [chosen[:, i * each : (i + 1) * each] for i in range(lines)]
    return np.stack([part.reshape(-1, *chosen.shape[2:]) for part in parts])


def latent_rows(runs_of: Runs, look_of: Mapping[str, Look], count: int = 9) -> list[PictureRow]:
    """Returns a row of held-out pictures, then a row per VAE with its latents as colors and its reconstructions.

    Colors of a VAE are scaled together for all of its pictures. Runs without these arrays have no row.
    """
    rows = []
    for setting in runs_of:
        for run in runs_of[setting]:
            latents, pictures, recon = (run.array(name) for name in ("latents", "pictures", "reconstructions"))
            if latents is None or pictures is None or recon is None:
                continue
            chosen = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
            if not rows:
                rows.append(PictureRow("pictures", "black", [pictures[chosen][None]] * 2))
            colors = plots.pca_colors(latents)[chosen]
            rows.append(PictureRow(broken(label_of(setting)), look_of[setting].color, [colors[None], recon[chosen][None]]))
            break
    return rows


def broken(label: str) -> str:
    """Breaks a long label into lines that fit left of pictures."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + len(word) > 17:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


@matplotlib.rc_context(STYLE)
def draw_rows(path: Path, rows: Sequence[PictureRow], titles: Sequence[str]) -> None:
    """Draws a figure of rows of pictures."""
    figure = Figure(figsize=(WIDTH, height_of(rows)), dpi=100)
    draw_picture_rows(figure, TITLE, rows, titles)
    save(figure, path)
