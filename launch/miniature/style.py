"""How figures of the miniature paper look: size, fonts, and a color and a marker of every setting.

The colors are Okabe and Ito's and some more, which color-blind people can tell apart; the headline's settings always have the
same.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.miniature import experiments
from repae_jax import files

WIDTH = 10.0  # inches; pages show about 1000 pixels
LEVELS = 32  # of a color in a PNG
STYLE = {
    "figure.dpi": 130, "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "legend.fontsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
}  # fmt: skip


class Look(NamedTuple):
    """A setting's color and marker."""

    color: str
    marker: str


FIXED = {"vae": Look("#000000", "P"), "sit": Look("#8C8C8C", "o"), "repa": Look("#0072B2", "D"), "repa-e": Look("#D55E00", "s")}
FREE = tuple(map(Look, ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#A6761D", "#1B4F72", "#B2182B"), "^v<>Xp*h"))


def looks(settings: Iterable[str]) -> dict[str, Look]:
    """Returns the look of every setting of a table: the headline's own, and the next free one for others."""
    free = itertools.cycle(FREE)
    return {setting: FIXED.get(setting) or next(free) for setting in dict.fromkeys(settings)}


def label_of(setting: str) -> str:
    """Returns a setting's name in figures and tables."""
    return experiments.SETTINGS[setting].label


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG with 32 levels of each color, which nobody sees and which takes half of the space."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    files.save_png(path, np.round(np.round(pixels * (LEVELS - 1)) * 255 / (LEVELS - 1)).astype(np.uint8))
