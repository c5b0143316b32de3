"""Warnings of numbers that are taken for others: which comparison each would spoil, and by how much."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from repae_jax.data.folder import FolderSource
from repae_jax.ranges import height_width, in_words

RECONSTRUCTIONS_BELOW = 4.0  # FID of images so close to a reference that they may be reconstructions
LOOKED_AT = 64  # files of a folder, evenly spread
RANDOM_LABELS = (
    "labels: random; balanced ones give 0.1 less FID on ImageNet (RAE, arXiv 2510.11690, table 14): compare like with like"
)


def of_reconstructions(fid: float) -> list[str]:
    """Returns what to know of the FID of images that were there already, if it is as low as that of reconstructions."""
    if fid >= RECONSTRUCTIONS_BELOW:
        return []
    return [
        f"fid: {fid:.2f}; if these images are reconstructions, it is not their rFID, which compares them with their originals "
        "(python -m repae_jax.evaluate_tokenizer). Against statistics of the training images, ImageNet's validation images "
        "themselves have 1.68, and reconstructions by SD-VAEs 1.83 to 1.90, where their rFID is about 0.57"
    ]


def of_labels(labels: np.ndarray) -> list[str]:
    """Returns a warning if the counts of classes differ by more than one, as those of random labels do."""
    counts = np.unique(labels, return_counts=True)[1]
    return [RANDOM_LABELS] * bool(counts.max() - counts.min() > 1)


def of_real_images(source: Any) -> list[str]:
    """Returns warnings of a folder of real images that were resized, or encoded again, before they are cropped here."""
    if not isinstance(source, FolderSource):
        return []
    height, width = height_width(source.image_size)
    chosen = sorted({i * len(source) // LOOKED_AT for i in range(LOOKED_AT)})
    found = [opened for opened in (_kind_and_size(source, i) for i in chosen) if opened is not None]
    enlarged = sum(columns < width or rows < height for _, (columns, rows) in found)
    encoded = sum(kind in ("JPEG", "WEBP") and shape == (width, height) for kind, shape in found)
    sizes = in_words(source.image_size), f"{height} x {width}"
    return [*_share(enlarged, found, _ENLARGED.format(sizes[0])), *_share(encoded, found, _ENCODED.format(sizes[1]))]


_ENLARGED = (
    "have fewer than {} pixels and are enlarged: their blur counts as real, and samples that are sharp are punished; take the "
    "original images"
)
_ENCODED = (
    "are JPEG or WebP of exactly {} pixels: they were resized and encoded again, whose losses count as real; published "
    "references are cropped from the original files. Prepare with `python -m repae_jax.prepare_images`, or give the originals"
)


def _share(count: int, found: Sequence[Any], text: str) -> list[str]:
    return [f"{count} of {len(found)} files that were looked at {text}"] * bool(count)


def _kind_and_size(source: FolderSource, i: int) -> tuple[str, tuple[int, int]] | None:
    """Returns format and size of a file; None if it is no image, which is reported where it is read."""
    try:
        with Image.open(io.BytesIO(source.content(i))) as image:
            return str(image.format), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
