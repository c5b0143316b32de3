"""VisionTransformer by itself; against transformers' modules in tests/checkpoints_tools/test_encoder_files.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models.vit import VisionTransformer, axial_rotation, rotate_patches

TINY = {"patch_size": 7, "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16, "grid": (2, 3)}
IMAGES = np.random.default_rng(0).standard_normal((2, 14, 21, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "fields, present",
    [
        ({}, {"cls_token", "pos_embed", "norm"}),
        ({"num_class_tokens": 0, "final_norm": False}, {"pos_embed"}),
        ({"num_registers": 3, "pre_norm": True}, {"cls_token", "register_tokens", "pos_embed", "pre_norm", "norm"}),
        ({"num_registers": 2, "rope_theta": 100.0, "activation": "swiglu"}, {"cls_token", "register_tokens", "norm"}),
    ],
)
def test_tokens_and_parameters(fields, present):
    module = VisionTransformer(**TINY | fields)
    (cls, patches), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), IMAGES)
    assert cls.shape == (2, module.num_class_tokens, 8) and patches.shape == (2, 6, 8)
    assert set(variables["params"]) == present | {"patch_embed", "blocks"}


def test_projections_listed_in_no_bias_have_none():
    module = VisionTransformer(**TINY, no_bias=("patch_embed", "key", "out"), layer_scale=False)
    params = jax.eval_shape(module.init, jax.random.key(0), IMAGES)["params"]
    with_bias = {name for name, layer in params["blocks"]["attn"].items() if "bias" in layer}
    assert with_bias == {"query", "value"} and "bias" not in params["patch_embed"]
    assert set(params["blocks"]) == {"norm1", "norm2", "attn", "mlp"}


def test_bfloat16_computes_with_float32_parameters_and_tokens():
    single, half = (VisionTransformer(**TINY, rope_theta=100.0, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(single.init, jax.random.key(0), IMAGES)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    expected, actual = (jax.jit(module.apply)(params, IMAGES)[1] for module in (single, half))
    assert actual.dtype == jnp.float32
    assert 0 < np.max(np.abs(actual - expected)) < 0.05 * np.max(np.abs(expected))


def test_rotated_products_depend_on_the_distance_alone():
    angles = axial_rotation(3, 4, 8, theta=100.0)
    assert angles.shape == (12, 4)
    q, k = (np.broadcast_to(x, (12, 8)) for x in np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32))
    q, k = (rotate_patches(angles, jnp.asarray(x)[None, :, None])[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T).reshape(3, 4, 3, 4)
    np.testing.assert_allclose(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:], rtol=1e-5, atol=1e-5)
    assert abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-2  # rows and columns differ


def test_class_tokens_and_registers_are_not_rotated():
    x = jnp.ones((1, 5, 2, 8), jnp.bfloat16)
    rotated = rotate_patches(axial_rotation(2, 1, 8, 100.0), x)
    assert rotated.dtype == x.dtype
    np.testing.assert_array_equal(rotated[:, :3], x[:, :3])
    assert np.all(np.any(rotated[:, 3:] != x[:, 3:], axis=(0, 2, 3)))


def test_rotation_refuses_narrow_heads():
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        axial_rotation(2, 2, 6, 100.0)


def test_images_must_fill_the_grid():
    module = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match=r"\(14, 21\) pixels .* got \(32, 32\)"):
        jax.eval_shape(functools.partial(module.init, jax.random.key(0)), jnp.zeros((1, 32, 32, 3)))
