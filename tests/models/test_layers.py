import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import layers


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
