"""LPIPS; its parity with the published module is in tests/losses/test_vae_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import lpips


@pytest.fixture(scope="module")
def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 7))
    x = jax.random.normal(next(keys), (2, 7, 10, 3))
    y = x + 0.3 * jax.random.normal(next(keys), x.shape)
    filters = [
        (0.3 * jax.random.normal(next(keys), (3, 3, width, 8)), 0.1 * jax.random.normal(next(keys), (8,))) for width in (3, 8)
    ]
    return x, y, filters, jax.random.uniform(next(keys), (8,))


def test_pairs_of_neighbors_give_the_same_stage(inputs):
    def everything(stage):
        weigh = np.random.default_rng(0).normal(size=(2, 2, 3, 5, 8))

        def scalar(*inputs):
            distance, *pooled = stage(*inputs)
            return jnp.sum(distance) + jnp.sum(jnp.stack(pooled) * weigh)

        return stage(*inputs), jax.grad(scalar, argnums=(0, 1, 2, 3))(*inputs)

    with jax.default_matmul_precision("highest"):
        made, expected = (jax.tree.leaves(everything(stage)) for stage in (lpips.stage_of_pairs, lpips.stage))
    assert len(made) == len(expected) == 3 + 2 + 4 + 1
    for got, want in zip(made, expected):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("unit_length", [lpips._unit_length, lambda x: x * lpips._norms_of_pairs(x)])
def test_features_that_are_all_zero_have_gradients(unit_length):
    """Asked for before the ReLU, whose gradient would hide that of a root at zero."""
    gradient = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros((1, 2, 2, 8)))
    assert np.isfinite(gradient).all()


def test_nothing_is_kept_for_a_side_without_gradient(inputs):
    x, y, filters, weights = inputs

    def bytes_kept(run, *sides):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(run, *sides)[1]))

    one = bytes_kept(lambda y: lpips.stage(x, y, filters, weights), y)
    both = bytes_kept(lambda x, y: lpips.stage(x, y, filters, weights), x, y)
    assert one < 0.7 * both


@pytest.mark.parametrize("height, width", [(16, 16), (17, 33)])
def test_pairs_are_for_tpus_and_even_widths(height, width):
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    params = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), images, images)
    run = jax.jit(lpips.LPIPS().apply).trace(params, images, images)
    for platform in ("cpu", "cuda", "tpu"):
        of_pairs = "tensor<3x3x6x128xf32>" in run.lower(lowering_platforms=(platform,)).as_text()  # the first kernel, of pairs
        assert of_pairs == (platform == "tpu" and width % 2 == 0)
