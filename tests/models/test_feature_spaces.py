"""Images and positions, as they are prepared for the networks of the feature spaces."""

import jax
import numpy as np
import pytest
import reference
from feature_networks import small_space
from PIL import Image

from repae_jax.models.feature_spaces import (
    FDR6,
    INCEPTION_DIVISOR,
    SPACES,
    image_features,
    prepare,
    resample_as_dinov2,
    resize_antialiased,
    resize_pil,
)


@pytest.mark.parametrize("shape", [(256, 256), (64, 64), (100, 37)])
def test_resizes_as_pillow(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    images[1] = np.asarray(Image.fromarray(images[1, :8, :8]).resize(shape[::-1], Image.Resampling.BILINEAR))  # a smooth one
    resized = np.asarray(resize_pil(images, 48))
    bicubic = Image.Resampling.BICUBIC  # in two steps: of images that are not square, Pillow 13 may resize rows first
    expected = [Image.fromarray(image).resize((48, shape[0]), bicubic).resize((48, 48), bicubic) for image in images]
    expected = np.stack([np.asarray(image) for image in expected])
    # Pillow's weights have 22 binary places: where a value lies between two gray levels, the other one may come out
    assert np.abs(resized - expected).max() <= 1 and (resized != expected).mean() < 1e-3


@pytest.mark.parametrize("size", [24, 91])
def test_resizes_as_torch(size, record_property):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 80, 3), np.uint8)
    floats = torch.tensor(images).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(floats, size=(size, size), mode="bicubic", antialias=True)
    reference.check(resize_antialiased(images, size), expected.permute(0, 2, 3, 1), 1e-5, "resize", record_property)


@pytest.mark.parametrize("grid", [4, 16, 41])
def test_positions_as_dinov2(grid, record_property):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(2).normal(size=(1, 1 + 37**2, 6)).astype(np.float32)
    patches = torch.tensor(table[:, 1:]).reshape(1, 37, 37, 6).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / 37
    expected = torch.nn.functional.interpolate(patches, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    expected = expected.permute(0, 2, 3, 1).reshape(1, grid**2, 6).numpy()
    resampled = resample_as_dinov2(table, grid)
    np.testing.assert_array_equal(resampled[:, :1], table[:, :1])
    reference.check(resampled[:, 1:], expected, 1e-5, "positions", record_property)


def test_unchanged_positions():
    table = np.random.default_rng(3).normal(size=(1, 17, 2)).astype(np.float32)
    np.testing.assert_array_equal(resample_as_dinov2(table, 4), table)


def test_images_are_filled_up_to_whole_patches():
    space = small_space("dinov2_256", 64)
    prepared = np.asarray(prepare(space, np.full((1, 64, 64, 3), 255, np.uint8)))
    assert prepared.shape == (1, 70, 70, 3)  # five patches of 14
    expected = (1 - np.array(space.mean)) / np.array(space.std)
    np.testing.assert_allclose(prepared[0, :64, :64], np.broadcast_to(expected, (64, 64, 3)), rtol=1e-6)
    assert not prepared[0, 64:].any() and not prepared[0, :, 64:].any()


@pytest.mark.parametrize("name", ["dinov2", "clip_336"])
def test_gray_levels_as_published(name):
    """FD-DINOv2's and CMMD's code read images resized by Pillow, which rounds to 8 bits and clips."""
    space = SPACES[name]
    image = np.random.default_rng(4).integers(0, 256, (61, 61, 3), np.uint8)  # of which bicubic leaves the range
    resized = np.asarray(Image.fromarray(image).resize((space.pixels, space.pixels), Image.Resampling.BICUBIC))
    levels = (np.asarray(prepare(space, image[None])[0]) * space.std + space.mean) * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert np.abs(levels - resized).max() < 1.01 and (np.abs(levels - resized) > 0.01).mean() < 1e-3


@pytest.mark.parametrize("name", SPACES)
def test_published_sizes(name):
    """The networks as they are published, their shapes alone."""
    space = SPACES[name]
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), np.uint8)
    inputs = jax.ShapeDtypeStruct((1, space.side, space.side, 3), np.float32)
    params = jax.eval_shape(space.module.init, jax.random.key(0), inputs)["params"]
    features = jax.eval_shape(lambda params, images: image_features(space, params, images), params, images)
    assert features.shape == (2, space.size) and features.dtype == np.float32


def test_divisors():
    """arXiv 2604.28190; FD-loss `eval_all_fds.py` `FDR_VALIDATION_FD`."""
    divisors = {name: SPACES[name].divisor for name in FDR6}
    assert divisors == {"convnext": 56.87, "dinov2_256": 14.19, "mae": 0.04, "siglip2": 0.60, "clip_256": 5.60}
    assert INCEPTION_DIVISOR == 1.68
