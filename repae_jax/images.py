"""Images: the only place that knows how pixels 0..255 map to the networks' range [-1, 1]."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from repae_jax.ranges import Extent, height_width, in_words

MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow decodes no more


def to_float(images: UInt8[Any, "*B H W C"]) -> Float[Any, "*B H W C"]:
    """Maps pixels 0..255 of a NumPy or JAX array to float32 in [-1, 1], the range of the VAE."""
    if images.dtype != np.uint8:  # a second conversion would silently give values near -1
        raise ValueError(f"images have dtype {images.dtype}; allowed: uint8 with values 0..255")
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(images: Float[Any, "*B H W C"]) -> UInt8[Any, "*B H W C"]:
    """Maps outputs of networks, nominally in [-1, 1], to pixels by the rule behind published samples: scale, clip, TRUNCATE.

    REPA and REPA-E truncate where DiT and SiT round to nearest. So these pixels are half a gray level darker on
    average, and `to_uint8(to_float(x))` is `x - 1` where float32 falls just below an integer (63 of the 256 levels).
    """
    if np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"images have dtype {images.dtype}; allowed: a float type with values in [-1, 1]")
    return (255 * (images.astype(np.float32) + 1) / 2).clip(0, 255).astype(np.uint8)


def grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, padding: int = 2, scale: int = 1
) -> UInt8[np.ndarray, "height width 3"]:
    """Lays images out row by row, `padding` white pixels around and between, each enlarged `scale` times (nearest neighbor)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; allowed: uint8 [N, H, W, 3] with N >= 1")
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(f"{columns=}, {padding=}, {scale=}; allowed: columns >= 1, padding >= 0, scale >= 1")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiles = np.pad(images, [(0, rows * columns - len(images)), (0, padding), (0, padding), (0, 0)], constant_values=255)
    height, width = tiles.shape[1:3]
    sheet = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return np.pad(sheet, [(padding, 0), (padding, 0), (0, 0)], constant_values=255)


def viewing_scale(size: Extent) -> int:
    """Returns the factor by which images of `size` pixels are enlarged for people to see: small ones to about 64 pixels."""
    return max(1, 64 // min(height_width(size)))


def center_crop(image: Image.Image, size: Extent) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes an image to the smallest that covers `size`, and cuts out its center; squares exactly as ADM prepares ImageNet.

    A square's shorter side becomes `size`. Images of any mode are converted to RGB. An alpha channel is dropped, as the
    published code does. A file opened lazily that turns out undecodable may raise anything.

    Reference: ADM `guided_diffusion/image_datasets.py` `center_crop_arr`.
    """
    height, width = height_width(size)
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}; allowed: a positive number of pixels")
    if image.width * image.height * max(width / image.width, height / image.height) ** 2 > MOST_PIXELS:
        side = "on its shorter side" if height == width else "pixels"
        raise ValueError(
            f"{image.width} x {image.height} pixels, too narrow an image to be enlarged to {in_words(size)} {side}"
        )
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits to white instead of scaling them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = image.convert("RGB")
    # Box halving first: one bicubic step by a large factor would differ from the published statistics.
    while image.width >= 2 * width and image.height >= 2 * height:
        image = _resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = _resize(image, (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes along the rows, rounds to 8 bits, then along the columns, whichever order this version of Pillow would choose."""
    return image.resize((size[0], image.height), resample=resample).resize(size, resample=resample)
