import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from repae_jax.files import save_png
from repae_jax.images import center_crop, grid, to_float, to_uint8

GOLDEN = Path(os.environ.get("REPAE_GOLDEN_DIR", Path(__file__).parent / "golden"))


def golden_crops():
    sizes = json.loads((GOLDEN / "preprocessing.json").read_text())["meta"]["sizes"]
    return [pytest.param(i, *size, id=f"{size[0]}x{size[1]}_to_{size[2]}") for i, size in enumerate(sizes)]


@pytest.mark.parametrize("i, height, width, size", golden_crops())
def test_center_crop_equals_the_reference(i, height, width, size):
    golden = np.load(GOLDEN / "preprocessing.npz")
    source = Image.fromarray(golden[f"crop{i}_low"]).resize((width, height), Image.Resampling.BICUBIC)
    crop = center_crop(source, size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    expected = golden[f"crop{i}_to_{size}"]
    stride = size // expected.shape[0]  # large crops are stored thinned out
    np.testing.assert_array_equal(crop[::stride, ::stride], expected)


@pytest.mark.parametrize(
    ("height", "width", "size", "crc32"),
    [
        (90, 20, 16, 2286001443),
        (300, 41, 32, 3049103584),
        (61, 47, 32, 1906250604),
        (40, 300, 32, 907278316),
        (500, 375, 256, 283223293),
    ],
)
def test_center_crop_does_not_depend_on_the_version_of_pillow(height, width, size, crc32):
    """Checksums of ADM's own function under Pillow 12.3; 13.0 resizes tall images along the columns first."""
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    assert zlib.crc32(np.ascontiguousarray(center_crop(Image.fromarray(pixels), size)).tobytes()) == crc32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_center_crop_converts_any_mode(mode):
    assert center_crop(Image.new(mode, (9, 7)), 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("height", "width", "size", "cut"),
    [
        (16, 40, (16, 24), np.s_[:, 8:32]),
        (30, 24, (16, 24), np.s_[7:23]),
        (17, 24, (16, 24), np.s_[:16]),
        (16, 40, (16, 16), np.s_[:, 12:28]),
    ],
)
def test_center_crop_of_other_shapes_cuts_the_middle(height, width, size, cut):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), size), image[cut])


def test_center_crop_of_other_shapes_resizes_until_both_sides_are_covered():
    """Twice halved by boxes, and once by the bicubic filter; Pillow in one step, within one rounding of each of two steps."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8))
    boxed = np.asarray(image, np.float64).reshape(20, 2, 36, 2, 3).mean((1, 3))
    np.testing.assert_allclose(center_crop(image, (20, 36)), boxed, atol=1)
    enlarged = np.asarray(image.resize((90, 50), Image.Resampling.BICUBIC), int)
    np.testing.assert_allclose(center_crop(image, (50, 60)), enlarged[:, 15:75], atol=1)
    upright = np.asarray(image.resize((81, 45), Image.Resampling.BICUBIC), int)
    np.testing.assert_allclose(center_crop(image, (30, 81)), upright[7:37], atol=1)


def test_center_crop_of_a_pair_of_equal_sides_is_that_of_a_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 50, 3), np.uint8))
    np.testing.assert_array_equal(center_crop(image, (16, 16)), center_crop(image, 16))


@pytest.mark.parametrize("height", range(1, 90, 7))
def test_center_crop_has_the_size_that_was_asked_for(height):
    for width in (1, 5, 23, 64):
        for size in ((16, 24), (31, 9), (1, 7)):
            assert center_crop(Image.new("RGB", (width, height)), size).shape == (*size, 3)


def test_center_crop_keeps_an_image_that_fits():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), 16), image)


def test_center_crop_rejects_a_size_of_zero():
    with pytest.raises(ValueError, match="size is 0"):
        center_crop(Image.new("RGB", (8, 8)), 0)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_to_float_maps_to_minus_one_and_one(array):
    images = array(np.array([0, 51, 255], np.uint8).reshape(1, 1, 3))
    floats = to_float(images)
    assert isinstance(floats, type(images)) and floats.dtype == np.float32
    np.testing.assert_allclose(np.ravel(floats), [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_to_uint8_clips_and_truncates(array):
    # 0.999 is 254.87: truncation gives 254 where rounding would give 255.
    images = array(np.array([-3, -1, 0, 0.999, 1, 3], np.float32))
    pixels = to_uint8(images)
    assert isinstance(pixels, type(images)) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, [0, 0, 127, 254, 255, 255])


def test_round_trip_loses_at_most_one_level():
    levels = np.arange(256, dtype=np.uint8)
    lost = levels.astype(int) - to_uint8(to_float(levels))
    assert set(lost) == {0, 1} and (lost == 1).sum() == 63


def test_conversions_work_under_jit_and_in_bfloat16():
    levels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_allclose(jax.jit(to_float)(levels), to_float(np.asarray(levels)), atol=1e-6)
    assert jax.jit(to_uint8)(jnp.ones(3, jnp.bfloat16)).tolist() == [255] * 3


def test_conversions_reject_images_that_are_converted_already():
    with pytest.raises(ValueError, match="float32; allowed: uint8"):
        to_float(np.zeros((2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="uint8; allowed: a float"):
        to_uint8(np.zeros((2, 2, 3), np.uint8))


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = grid(images, columns=2, padding=1, scale=2)
    assert sheet.shape == (2 * 5 + 1, 2 * 7 + 1, 3)
    assert sheet[1, 1, 0] == sheet[4, 6, 0] == 10
    assert sheet[1, 8, 0] == 20 and sheet[6, 1, 0] == 30
    assert (sheet[0] == 255).all() and (sheet[6:, 8:] == 255).all()  # padding and the empty cell


def test_grid_is_no_wider_than_its_images():
    assert grid(np.zeros((2, 4, 4, 3), np.uint8), columns=8, padding=0).shape == (4, 8, 3)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), {"columns": 1}, "images are float32"),
        (np.zeros((4, 4, 3), np.uint8), {"columns": 1}, r"\[4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), {"columns": 1}, "N >= 1"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"columns": 0}, "columns=0"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"columns": 1, "scale": 0}, "scale=0"),
    ],
)
def test_grid_errors(images, options, message):
    with pytest.raises(ValueError, match=message):
        grid(images, **options)


def test_save_png_replaces_the_file_and_leaves_nothing_else(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(tmp_path / "a.png", image * 0)
    save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_png_from_several_places_at_once(tmp_path):
    images = [np.full((64, 64, 3), i, np.uint8) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda image: save_png(tmp_path / "a.png", image), images))
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")))) == 1
    assert os.listdir(tmp_path) == ["a.png"]


def test_save_png_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))

    def full_disk(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", np.ones((2, 2, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert np.array(Image.open(tmp_path / "a.png")).max() == 0


def test_save_png_rejects_floats(tmp_path):
    with pytest.raises(ValueError, match="image is float64"):
        save_png(tmp_path / "a.png", np.zeros((2, 2, 3)))


def test_center_crop_scales_sixteen_bits():
    image = Image.fromarray(np.full((8, 8), 32896, np.uint16))  # half of 65535
    np.testing.assert_array_equal(center_crop(image, 8), np.full((8, 8, 3), 128, np.uint8))
