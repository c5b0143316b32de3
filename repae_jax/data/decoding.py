"""Image files to cropped pixels: those of `images.center_crop`, bit for bit, in about half the time.

JPEGs are decoded by libjpeg-turbo through simplejpeg, which gives Pillow's pixels without Pillow's detours. The crop is
Pillow's fixed-point arithmetic, compiled by numba, of the rows and columns that remain. Both are in the extra `data`; without
them, and for whatever they refuse, Pillow does the work.
"""

import functools
import io
import math
import os
import threading

import numpy as np
from absl import logging
from PIL import Image, TiffImagePlugin

from repae_jax.images import MOST_PIXELS, center_crop, check_enlarged

# What is read, as Pillow calls it, and how names of such files end. Pillow knows more, some of which start other programs.
KINDS = {
    "PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "WEBP": (".webp",), "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"), "AVIF": (".avif",), "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"), "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}  # fmt: skip
_TILE = TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH
_MOST_BYTES = 2**30  # of a file: the most pixels that Pillow takes are less

_BITS = 22  # of the fraction in Pillow's coefficients
_compiling = threading.Lock()
_GEOMETRIES = 4096  # whose coefficients are kept, some 20 kB each
_TILE_ROWS = 64
_JPEG = b"\xff\xd8\xff"  # begins with
_SAME_IN_PILLOW = ("YCbCr", "Gray")  # colors of JPEGs; Pillow has ways of its own with CMYK


def decode_crop(content, size):
    """Decodes an image file and crops it as `images.center_crop` does.

    Args:
      content: bytes of the file, of any kind that Pillow reads.
      size: side of the square in pixels.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      Exception: whatever Pillow raises for content that it cannot decode, truncated one included.
    """
    if content[:3] == _JPEG:
        with _compiling:
            _warn_if_slow()
    pixels = _decode_jpeg(content)
    if pixels is None:
        with open_image(content) as image:
            return center_crop(image, size)
    check_enlarged(pixels.shape[1], pixels.shape[0], size)
    return crop_pixels(pixels, size)


def read_file(path):
    """Returns the bytes of an image file; ValueError, before they are read, if they are more than any image's."""
    with open(path, "rb") as file:
        check_bytes(os.fstat(file.fileno()).st_size)
        return file.read()


def check_bytes(count):
    """Checks that an image file of so many bytes can be one; ValueError if not."""
    if count > _MOST_BYTES:
        raise ValueError(f"the file has {count / 2**30:.1f} GiB; allowed: {_MOST_BYTES / 2**30:g}")


def open_image(content):
    """Returns the PIL image of a file's bytes, whose pixels are still to be decoded.

    Raises:
      ValueError: for floats and 32-bit integers, whose range nothing tells, and for tiles of too many pixels.
      Exception: whatever Pillow raises for other than KINDS, and for more pixels than it thinks safe (Image.MAX_IMAGE_PIXELS).
    """
    image = Image.open(io.BytesIO(content), formats=_readable())
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of PIL's mode {image.mode}, 32 bits each; allowed: 8 or 16")
    tile = [getattr(image, "tag_v2", {}).get(tag, 0) for tag in _TILE]
    if math.prod(tile) > MOST_PIXELS:  # decoded as a whole, however small the image
        raise ValueError(f"tiles of {tile[0]} x {tile[1]} pixels; allowed: {MOST_PIXELS} pixels")
    return image


@functools.cache
def _readable():
    """Returns those of KINDS that this Pillow has."""
    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)


def crop_pixels(pixels, size):
    """`images.center_crop` of pixels.

    Args:
      pixels: uint8 `[H, W, 3]`.
      size: side of the square in pixels.

    Returns:
      uint8 `[size, size, 3]`.
    """
    with _compiling:  # threads come here at the same time
        compiled = _compiled()
    if compiled is None:
        return center_crop(Image.fromarray(pixels), size)
    resample, halve = compiled
    while min(pixels.shape[:2]) >= 2 * size:
        if pixels.shape[0] % 2 == pixels.shape[1] % 2 == 0:
            pixels = halve(pixels)
        else:
            rows, columns = (_coefficients(side, side // 2, "box", 0, side // 2) for side in pixels.shape[:2])
            pixels = resample(pixels, *columns, *rows)
    scale = size / min(pixels.shape[:2])
    rows, columns = (
        _coefficients(side, round(side * scale), "bicubic", (round(side * scale) - size) // 2, size)
        for side in pixels.shape[:2]
    )
    return resample(pixels, *columns, *rows)


@functools.cache
def _warn_if_slow():
    """Once in each process that meets JPEGs."""
    missing = [name for name, found in (("simplejpeg", _simplejpeg()), ("numba", _compiled())) if found is None]
    if missing:
        logging.warning(
            "%s cannot be imported, so Pillow decodes and crops JPEGs: the same pixels in about twice the time; install this "
            "package with its extra `data`: pip install -c constraints.txt -e .[data]",
            " and ".join(missing),
        )


@functools.cache
def _simplejpeg():
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(content):
    """Pixels of a JPEG, uint8 `[H, W, 3]`; None for what is left to Pillow, which knows what to say of damaged ones."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or content[:3] != _JPEG:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        # Beyond Pillow's limit an image is an attack on memory, or refused.
        if colors not in _SAME_IN_PILLOW or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        return simplejpeg.decode_jpeg(content)
    except ValueError:
        return None


def _bicubic(x):
    a, x = -0.5, np.abs(x)
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


@functools.lru_cache(_GEOMETRIES)
def _coefficients(inputs, outputs, kind, first, count):
    """Pillow's coefficients for resampling a side, in its order of operations.

    Args:
      inputs, outputs: pixels of the side before and after.
      kind: 'bicubic' or 'box'.
      first, count: the outputs wanted.

    Returns:
      (start int32 [count], taps int32 [count], coefficients int32 [count, k]): output j is made of the `taps[j]` inputs from
      `start[j]` on, in units of 2^-22.

    Reference: Pillow `src/libImaging/Resample.c` `precompute_coeffs`, `normalize_coeffs_8bpc`.
    """
    weigh, support = (_bicubic, 2.0) if kind == "bicubic" else (_box, 0.5)
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    support *= stretch
    centers = (np.arange(first, first + count) + 0.5) * scale
    start = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((centers + support + 0.5).astype(np.int64), inputs) - start
    weights = np.zeros((count, int(np.ceil(support)) * 2 + 1))
    total = np.zeros(count)
    for tap in range(weights.shape[1]):
        weights[:, tap] = np.where(tap < taps, weigh((tap + start - centers + 0.5) * (1 / stretch)), 0)
        total += weights[:, tap]
    fixed = weights / total[:, None] * (1 << _BITS)
    fixed = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5))
    return start.astype(np.int32), taps.astype(np.int32), fixed.astype(np.int32)


@functools.cache
def _compiled():
    """The compiled functions (resample, halve); None without numba.

    Of uint8 [H, W, 3] and the `_coefficients` of columns and rows, `resample` makes uint8 [rows, columns, 3]: first along the
    rows, rounded to 8 bits, then along the columns. `halve` is the same for the box filter and even sides: [H / 2, W / 2, 3].

    Reference: Pillow `src/libImaging/Resample.c` `ImagingResampleInner`, before version 13 (see `images.center_crop`).
    """
    try:
        import numba
    except ImportError:
        return None

    half, bits, tile_rows = np.int32(1 << (_BITS - 1)), _BITS, _TILE_ROWS

    coefficients = "int32[::1],int32[::1],int32[:,::1]"

    @numba.njit(f"uint8[:,:,::1](uint8[:,:,::1],{coefficients},{coefficients})", nogil=True)
    def resample(pixels, column_start, column_taps, column_weights, row_start, row_taps, row_weights):
        columns, rows, values = len(column_start), len(row_start), 3 * len(column_start)
        first, end = row_start[0], row_start[-1] + row_taps[-1]
        left, right = 3 * column_start[0], 3 * (column_start[-1] + column_taps[-1])
        lines = pixels.reshape(len(pixels), -1)
        narrow = np.empty((end - first, values), np.uint8)
        # Along the rows many of them at a time, turned on their side: only so do the innermost loops run over neighbors.
        tile, made = np.empty((right - left, tile_rows), np.uint8), np.empty((values, tile_rows), np.uint8)
        sums = np.empty(tile_rows, np.int32)
        for top in range(first, end, tile_rows):
            for value in range(right - left):
                for y in range(tile_rows):
                    tile[value, y] = lines[min(top + y, end - 1), left + value]
            for value in range(values):
                x, start = value // 3, 3 * column_start[value // 3] + value % 3 - left
                sums[:] = half
                for tap in range(column_taps[x]):
                    weight = column_weights[x, tap]
                    for y in range(tile_rows):
                        sums[y] += np.int32(weight * np.int32(tile[start + 3 * tap, y]))
                for y in range(tile_rows):
                    made[value, y] = min(max(sums[y] >> bits, 0), 255)
            for y in range(min(tile_rows, end - top)):
                for value in range(values):
                    narrow[top - first + y, value] = made[value, y]
        result, sums = np.empty((rows, values), np.uint8), np.empty(values, np.int32)
        for row in range(rows):
            sums[:] = half
            for tap in range(row_taps[row]):
                weight, line = row_weights[row, tap], narrow[row_start[row] - first + tap]
                for value in range(values):
                    sums[value] += np.int32(weight * np.int32(line[value]))
            for value in range(values):
                result[row, value] = min(max(sums[value] >> bits, 0), 255)
        return result.reshape(rows, columns, 3)

    @numba.njit("uint8[:,:,::1](uint8[:,:,::1])", nogil=True)
    def halve(pixels):
        result = np.empty((pixels.shape[0] // 2, pixels.shape[1] // 2, 3), np.uint8)
        for y in range(result.shape[0]):
            upper, lower = pixels[2 * y], pixels[2 * y + 1]
            for x in range(result.shape[1]):
                for color in range(3):
                    above = (upper[2 * x, color] + upper[2 * x + 1, color] + 1) >> 1
                    below = (lower[2 * x, color] + lower[2 * x + 1, color] + 1) >> 1
                    result[y, x, color] = (above + below + 1) >> 1
        return result

    return resample, halve
