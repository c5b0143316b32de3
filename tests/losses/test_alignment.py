import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.losses.alignment import alignment_loss


def test_is_minus_one_for_parallel_and_plus_one_for_opposite_vectors():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(alignment_loss((3 * x,), (x,)), -1, rtol=1e-6)
    np.testing.assert_allclose(alignment_loss((x, x), (-x, -x)), 1, rtol=1e-6)


def test_means_over_encoders():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(alignment_loss((x, x), (x, -x)), 0, atol=1e-6)


def test_zero_vectors_have_finite_gradients():
    grad = jax.grad(lambda p: alignment_loss((p,), (jnp.ones((1, 2, 4)),)))(jnp.zeros((1, 2, 4)))
    assert np.isfinite(grad).all()


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(1, 2, 4\).*\(1, 3, 4\)"):
        alignment_loss((jnp.zeros((1, 2, 4)),), (jnp.zeros((1, 3, 4)),))
