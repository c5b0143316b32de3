"""Decoding against Pillow: the pixels of `images.center_crop`, bit for bit, with the fast libraries and without."""

import io
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


@pytest.fixture(params=["fast", "pillow"])
def libraries(request, monkeypatch):
    """The extra `data`, and a machine without it."""
    if request.param == "pillow":
        monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
        monkeypatch.setattr(decoding, "_compiled", lambda: None)
    else:
        assert decoding._simplejpeg() and decoding._compiled()


def by_pillow(content, size):
    return center_crop(Image.open(io.BytesIO(content)), size)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_kinds(kind, libraries):
    content = encoded(picture(0, (75, 53)), **KINDS[kind])
    np.testing.assert_array_equal(decoding.decode_crop(content, 32), by_pillow(content, 32))


def test_jpegs_take_the_fast_way(monkeypatch):
    content = encoded(picture(0, (75, 53)))
    monkeypatch.setattr(decoding, "center_crop", None)
    assert decoding.decode_crop(content, 32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("missing", "named"), [(("_compiled",), "numba"), (("_simplejpeg", "_compiled"), "simplejpeg and numba")]
)
def test_the_slow_way_is_told_once(monkeypatch, warnings, missing, named):
    decoding._warn_if_slow.cache_clear()
    for library in missing:
        monkeypatch.setattr(decoding, library, lambda: None)
    decoding.decode_crop(encoded(picture(0), kind="png"), 8)
    assert not warnings
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: decoding.decode_crop(content, 8), [encoded(picture(0))] * 8))
    assert len(warnings) == 1 and warnings[0].startswith(f"{named} cannot be imported") and ".[data]" in warnings[0]
    decoding._warn_if_slow.cache_clear()


def test_with_the_fast_libraries_nothing_is_told(warnings):
    decoding._warn_if_slow.cache_clear()
    decoding.decode_crop(encoded(picture(0)), 8)
    assert not warnings


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_colors_of_jpegs(mode):
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).convert(mode).save(buffer, "jpeg")
    np.testing.assert_array_equal(decoding.decode_crop(buffer.getvalue(), 16), by_pillow(buffer.getvalue(), 16))


def test_crops_of_all_shapes():
    """Smaller and larger than the crop, odd and even sides, tall and wide, noise: where roundings would show."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.integers(5, 250, 2)
        size = int(rng.integers(4, 80))
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = center_crop(Image.fromarray(pixels), size)
        np.testing.assert_array_equal(decoding.crop_pixels(pixels, size), expected, f"{height} x {width} to {size}")


def test_a_photograph_of_usual_size():
    content = encoded(picture(2, (500, 375)))
    np.testing.assert_array_equal(decoding.decode_crop(content, 256), by_pillow(content, 256))


def test_threads():
    contents = [encoded(picture(i, (40 + i, 30))) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda content: decoding.decode_crop(content, 16), contents))
    for content, pixels in zip(contents, made):
        np.testing.assert_array_equal(pixels, by_pillow(content, 16))


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty"])
def test_what_cannot_be_decoded_is_said_by_pillow(damage, libraries):
    content = encoded(picture(3))
    content = {"truncated": content[: len(content) // 2], "no image": b"hello", "empty": b""}[damage]
    with pytest.raises(Exception) as expected:  # noqa: B017
        by_pillow(content, 16)
    with pytest.raises(type(expected.value), match="(?i)truncated" if damage == "truncated" else "cannot identify"):
        decoding.decode_crop(content, 16)


def test_a_bomb_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        decoding.decode_crop(encoded(picture(4)), 16)


PROGRAMS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(np.zeros((1, 60000, 3), np.uint8), "png"), "60000 x 1 pixels, too narrow an image to be enlarged to 256"),
        (encoded(np.zeros((60000, 1, 3), np.uint8)), "1 x 60000 pixels, too narrow an image to be enlarged to 256"),
        (encoded(np.zeros((4, 4), np.float32), "tiff"), "PIL's mode F"),
        (encoded(np.zeros((4, 4), np.int32), "tiff"), "PIL's mode I"),
        (PROGRAMS, "cannot identify"),  # which Pillow would give to Ghostscript
    ],
    ids=["wide PNG", "high JPEG", "floats", "integers", "EPS"],
)
def test_what_is_refused_before_memory_is_taken(content, message, libraries, monkeypatch):
    monkeypatch.setattr(images, "_resize", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(Exception, match=message) as caught:
        decoding.decode_crop(content, 256)
    assert not faults.is_of_the_system(caught.value)


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "avif", "tiff", "gif", "ppm"])
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
