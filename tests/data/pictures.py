"""Small photographs-like images for tests of data sources."""

import io

import numpy as np
from PIL import Image


def picture(seed, size=(30, 20), noise=20):
    """uint8 [H, W, 3] that JPEG does not blur to nothing: smooth colors and some noise. `size` is (W, H)."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth) + rng.normal(0, noise, (size[1], size[0], 3)), 0, 255).astype(np.uint8)


def encoded(pixels, kind="jpeg", **options):
    """The file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
