"""LPIPS; its parity with the published module is in tests/losses/test_vae_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import lpips


@pytest.fixture(scope="module")
def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 7))
    x = jax.random.normal(next(keys), (2, 6, 10, 3))
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


def test_features_that_are_all_zero_have_gradients(inputs):
    x, y, filters, weights = inputs
    dead = [filters[0], (filters[1][0], jnp.full(8, -1e4))]
    for stage in (lpips.stage, lpips.stage_of_pairs):
        distance, gradient = jax.value_and_grad(lambda y, stage=stage: stage(x, y, dead, weights)[0].sum())(y)
        assert distance == 0 and not gradient.any()


@pytest.mark.parametrize("height, width", [(16, 16), (17, 33)])
def test_pairs_are_for_tpus_and_even_widths(height, width):
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    params = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), images, images)
    run = jax.jit(lpips.LPIPS().apply).trace(params, images, images)
    for platform in ("cpu", "cuda", "tpu"):
        of_pairs = "tensor<3x3x6x128xf32>" in run.lower(lowering_platforms=(platform,)).as_text()  # the first kernel, of pairs
        assert of_pairs == (platform == "tpu" and width % 2 == 0)
