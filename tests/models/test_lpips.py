"""LPIPS; its parity with the published module is in tests/losses/test_vae_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.models.lpips import LPIPS, unit_length


def test_features_that_are_all_zero_have_gradients():
    """Tested before the ReLU, whose gradient would hide that of a root at zero."""
    gradient = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros((1, 2, 2, 8)))
    assert np.isfinite(gradient).all()


def test_nothing_is_kept_for_a_side_without_gradient():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)

    def bytes_kept(*varied):
        def back(params, *sides):
            def run(*new):
                return LPIPS().apply(params, *(dict(zip(varied, new)).get(i, side) for i, side in enumerate(sides)))

            return jax.vjp(run, *(sides[i] for i in varied))[1]

        kept = jax.tree.leaves(jax.eval_shape(back, params, images, images))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape[:1] == (2,))  # maps of the batch

    assert bytes_kept(1) < 0.7 * bytes_kept(0, 1)
