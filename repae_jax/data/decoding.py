"""Image files to cropped pixels, as Pillow decodes them and ADM crops them."""

import functools
import io
import math
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin

from repae_jax.images import MOST_PIXELS, center_crop
from repae_jax.ranges import Extent

# Image formats by Pillow's names, with their file extensions. Pillow knows more, some of which start other programs.
KINDS = {
    "PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "WEBP": (".webp",), "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"), "AVIF": (".avif",), "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"), "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}  # fmt: skip
_TILE = TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH
_MAX_FILE_BYTES = 2**30  # more than the largest image that Pillow decodes


def decode_crop(content: bytes, size: Extent) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file and crops it with `images.center_crop`; Pillow raises errors of many types if it cannot."""
    with open_image(content) as image:
        return center_crop(image, size)


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the bytes of an image file; raises ValueError before reading a file too large to be an image."""
    with open(path, "rb") as file:
        check_bytes(os.fstat(file.fileno()).st_size)
        return file.read()


def check_bytes(count: int) -> None:
    """Raises ValueError if a file of `count` bytes is too large to be an image."""
    if count > _MAX_FILE_BYTES:
        raise ValueError(f"the file has {count / 2**30:.1f} GiB; allowed: {_MAX_FILE_BYTES / 2**30:g}")


def open_image(content: bytes) -> Image.Image:
    """Opens an image file without decoding its pixels.

    It raises ValueError for floats and 32-bit integers, whose range is unknown, and for tiles of too many pixels; and Pillow's
    errors for formats other than KINDS, and for more pixels than Pillow considers safe (Image.MAX_IMAGE_PIXELS).
    """
    image = Image.open(io.BytesIO(content), formats=_available_kinds())
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of PIL's mode {image.mode}, 32 bits each; allowed: 8 or 16")
    tile = [getattr(image, "tag_v2", {}).get(tag, 0) for tag in _TILE]
    if math.prod(tile) > MOST_PIXELS:  # a tile is decoded as a whole, however small the image
        raise ValueError(f"tiles of {tile[0]} x {tile[1]} pixels; allowed: {MOST_PIXELS} pixels")
    return image


@functools.cache
def _available_kinds():
    """Returns the KINDS that this build of Pillow supports."""
    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)
