import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import layers
from repae_jax.models.sit import SiT
from repae_jax.models.vit import VisionTransformer


@pytest.mark.parametrize(
    ("module", "shape"),
    [(layers.Dense(3, dtype=jnp.bfloat16), (2, 2**14, 4)), (layers.Conv(3, (3, 3), dtype=jnp.bfloat16), (2, 128, 128, 4))],
)
def test_the_gradient_of_a_bias_is_summed_in_float32(module, shape):
    """In bfloat16 the sum of as many ones stops growing at a small fraction of them."""
    x = jnp.ones(shape, jnp.bfloat16)
    variables = module.init(jax.random.key(0), x[:1])

    def loss(variables):
        y = module.apply(variables, x)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(variables)["params"]["bias"]
    np.testing.assert_array_equal(gradient, np.prod(shape[:-1]))


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_every_block_of_both_transformers_takes_the_implementation(implementation, monkeypatch):
    taken = []

    def attention(query, key, value, implementation):
        taken.append(implementation)
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    sizes = {"patch_size": 2, "hidden_size": 16, "depth": 3, "num_heads": 2, "attention": implementation}
    sit = SiT(num_classes=3, latent_channels=4, encoder_depth=1, **sizes)
    key, t, labels = jax.random.key(0), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    jax.eval_shape(sit.init, key, jnp.zeros((1, 8, 8, 4)), t, labels)
    vit = VisionTransformer(mlp_dim=16, grid=(4, 4), **sizes)
    jax.eval_shape(vit.init, key, jnp.zeros((1, 8, 8, 3)))
    assert set(taken) == {implementation}
    assert len(taken) >= 3  # one stack of the ViT, two of the SiT


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (4, 4)])
def test_positions_are_those_of_mae(rows, columns):
    """One by one, from the formula of MAE's and DiT's code: the column first, sines before cosines; float64, rounded."""
    table = layers.sincos_position_embedding(16, rows, columns)
    assert table.shape == (rows * columns, 16)
    for row in range(rows):
        for column in range(columns):
            waves = [math.sin, math.cos]
            expected = [wave(at / 10_000 ** (i / 4)) for at in (column, row) for wave in waves for i in range(4)]
            np.testing.assert_allclose(table[row * columns + column], expected, atol=1e-7)
