"""Decoding of image files: formats, colors, damage, and what is refused before memory is taken."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import encoded, picture
from PIL import Image, ImageFile, features

from repae_jax import faults, images
from repae_jax.data import decoding
from repae_jax.images import center_crop

KINDS = {
    "jpeg": {"kind": "jpeg"},
    "best": {"kind": "jpeg", "quality": 100, "subsampling": 0},
    "progressive": {"kind": "jpeg", "progressive": True},
    "png": {"kind": "png"},
    "webp": {"kind": "webp"},
}


def by_pillow(content, size):
    return center_crop(Image.open(io.BytesIO(content)), size)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_kinds(kind):
    content = encoded(picture(0, (75, 53)), **KINDS[kind])
    np.testing.assert_array_equal(decoding.decode_crop(content, 32), by_pillow(content, 32))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_colors_of_jpegs(mode):
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).convert(mode).save(buffer, "jpeg")
    np.testing.assert_array_equal(decoding.decode_crop(buffer.getvalue(), 16), by_pillow(buffer.getvalue(), 16))


def test_a_photograph_of_usual_size():
    content = encoded(picture(2, (500, 375)))
    np.testing.assert_array_equal(decoding.decode_crop(content, 256), by_pillow(content, 256))


def test_threads():
    contents = [encoded(picture(i, (40 + i, 30))) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda content: decoding.decode_crop(content, 16), contents))
    for content, pixels in zip(contents, images):
        np.testing.assert_array_equal(pixels, by_pillow(content, 16))


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty"])
def test_what_cannot_be_decoded_is_said_by_pillow(damage):
    content = encoded(picture(3))
    content = {"truncated": content[: len(content) // 2], "no image": b"hello", "empty": b""}[damage]
    with pytest.raises(Exception) as expected:  # noqa: B017
        by_pillow(content, 16)
    with pytest.raises(type(expected.value), match="(?i)truncated" if damage == "truncated" else "cannot identify"):
        decoding.decode_crop(content, 16)


PROGRAMS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def huge_tiles():
    """TIFF of 10 x 10 pixels in one tile of 30000 x 30000."""
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30000, 323: 30000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI8xH", b"II", 42, 16, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (huge_tiles(), "tiles of 30000 x 30000 pixels"),
        (encoded(np.zeros((1, 60000, 3), np.uint8), "png"), "60000 x 1 pixels, too narrow an image to be enlarged to 256"),
        (encoded(np.zeros((60000, 1, 3), np.uint8)), "1 x 60000 pixels, too narrow an image to be enlarged to 256"),
        (encoded(np.zeros((4, 4), np.float32), "tiff"), "PIL's mode F"),
        (encoded(np.zeros((4, 4), np.int32), "tiff"), "PIL's mode I"),
        (PROGRAMS, "cannot identify"),  # Pillow would give this to Ghostscript
    ],
    ids=["huge tiles", "wide PNG", "high JPEG", "floats", "integers", "EPS"],
)
def test_what_is_refused_before_memory_is_taken(content, message, monkeypatch):
    monkeypatch.setattr(images, "_resize", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(Exception, match=message) as caught:
        decoding.decode_crop(content, 256)
    assert not faults.is_of_the_system(caught.value)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp", "avif", "tiff", "gif", "ppm"])
def test_sizes_are_checked_before_pixels_are_decoded(kind, monkeypatch):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = encoded(picture(4, (40, 40)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(Image.DecompressionBombError) as caught:
        decoding.decode_crop(content, 16)
    assert not faults.is_of_the_system(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**31)  # a hole
    with pytest.raises(ValueError, match="the file has 2.0 GiB; allowed: 1"):
        decoding.read_file(tmp_path / "a.png")
