"""FID's Inception against the published PyTorch port, its resizing against TensorFlow's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from checkpoints_tools import mapping
from checkpoints_tools.inception import inception_table
from repae_jax.models.inception import InceptionV3, pytorch_fid_input, resize_tf1

INPUT = jax.ShapeDtypeStruct((2, 40, 24, 3), jnp.float32)


@pytest.fixture(scope="module")
def case():
    case = reference.load("inception")
    gain = np.float32(case.meta["gain"])
    weights = {name: gain * value if value.ndim >= 2 else value for name, value in case.weights.items()}
    target = jax.eval_shape(InceptionV3().init, jax.random.key(0), INPUT)["params"]
    params = mapping.to_flax(inception_table(), weights, target)
    case.features = lambda images, dtype=jnp.float32: jax.jit(InceptionV3(dtype).apply)({"params": params}, images)
    case.full = case.features(case.arrays["images_64"])
    return case


@pytest.mark.parametrize("field, golden", {"pool": "pool_3", "spatial": "spatial", "logits": "logits_without_bias"}.items())
def test_features(case, field, golden, record_property):
    expected = case.arrays[golden]
    actual = getattr(case.full, field)
    assert actual.dtype == jnp.float32
    reference.check(actual, expected.reshape(len(expected), -1), reference.NETWORK_RTOL, field, record_property)


def test_features_do_not_depend_on_the_batch(case):
    alone = case.features(case.arrays["images_64"][1:2].astype(np.float32))
    for name in ("pool", "spatial", "logits"):
        reference.check(getattr(alone, name)[0], getattr(case.full, name)[1], 1e-5, name)


def test_bfloat16_is_close(case):
    half = case.features(case.arrays["images_64"], jnp.bfloat16)
    for name in ("pool", "spatial", "logits"):
        assert getattr(half, name).dtype == jnp.float32
        reference.check(getattr(half, name), getattr(case.full, name), 3e-2, name)


@pytest.mark.parametrize("images", ["64", "200x120"])
def test_resizing_of_the_golden_images(images, record_property):
    arrays = reference.load("inception").arrays
    resized = resize_tf1(arrays[f"images_{images}"], 299)[:, ::13, ::13]
    expected = arrays[f"resized_from_{images}_every_13th"]
    reference.check(resized, expected, reference.NETWORK_RTOL, "resized", record_property)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (299, 299), (512, 301), (1, 5)])
def test_resizing_is_tensorflows(shape):
    import tensorflow as tf

    images = np.random.default_rng(0).uniform(0, 255, (1, *shape, 2)).astype(np.float32)
    expected = tf.compat.v1.image.resize_bilinear(images, (299, 299), align_corners=False).numpy()
    reference.check(resize_tf1(images, 299), expected, 1e-6, "resized")
    reference.check(jax.jit(resize_tf1, static_argnums=1)(images, 299), expected, 1e-6, "resized, compiled")


def test_resizing_is_not_the_one_with_half_pixel_centres():
    images = np.random.default_rng(0).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32)
    other = jax.image.resize(images, (1, 16, 16, 3), "bilinear")
    assert np.abs(resize_tf1(images, 16) - other).max() > 1
    np.testing.assert_array_equal(resize_tf1(images, 16)[:, ::2, ::2], images)


@pytest.mark.parametrize("size", [16, 256, 299, 400])
def test_images_prepared_as_by_pytorch_fid(size):
    import torch

    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    expected = 2 * torch.nn.functional.interpolate(scaled, (299, 299), mode="bilinear", align_corners=False) - 1
    reference.check(pytorch_fid_input(images), expected.permute(0, 2, 3, 1).numpy(), 1e-5, "prepared")


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 3, 64, 64), jnp.float32, "needed: .B, H, W, 3."),
        ((64, 64, 3), jnp.float32, "needed: .B, H, W, 3."),
        ((2, 0, 64, 3), jnp.float32, "needed: .B, H, W, 3."),
        ((2, 64, 64, 3), jnp.int32, "int32; needed: float32 or uint8"),
        ((2, 64, 64, 3), jnp.bfloat16, "bfloat16; needed: float32 or uint8"),
    ],
)
def test_other_input_is_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def test_uint8_and_float32_images_are_the_same():
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    np.testing.assert_array_equal(resize_tf1(images, 299), resize_tf1(images.astype(np.float32), 299))
    shapes = jax.eval_shape(InceptionV3().init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((5, 20, 30, 3), jnp.uint8))
    features = shapes[0]
    assert (features.pool.shape, features.spatial.shape, features.logits.shape) == ((5, 2048), (5, 2023), (5, 1008))
