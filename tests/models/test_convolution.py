import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models.convolution import NHWC, channel_moments, measured_conv3x3

RTOL = 1e-5  # of the largest entry, in float32


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)


def drawn(shape, features, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (*shape[:3], features), dtype)
    return x, jax.random.normal(keys[2], (3, 3, shape[3], features), dtype), gradient


def check(actual, expected, rtol):
    for name, a, b in zip(("result", "to x", "to the kernel"), actual, expected):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(2, 16, 16, 32), (2, 5, 7, 3)])
@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, RTOL), (jnp.bfloat16, 2**-7)])
def test_gradients_of_a_measured_convolution_go_through_its_moments(shape, dtype, rtol):
    x, kernel, gradient = drawn(shape, 40, dtype)
    gradients = gradient, 40 * jax.random.normal(jax.random.key(1), (2, shape[0], 40))

    def apart(x, kernel):
        y = plain(x, kernel)
        return y, channel_moments(y)

    (result, moments), back = jax.vjp(measured_conv3x3, x, kernel)
    (expected, expected_moments), expected_back = jax.vjp(apart, x, kernel)
    np.testing.assert_allclose(moments, expected_moments, rtol=1e-6, atol=1e-5)
    check((result, *back(gradients)), (expected, *expected_back(gradients)), rtol)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_tpus_alone_keep_the_gradients_of_a_measured_convolution_apart(platform):
    x, kernel, gradient = drawn((2, 8, 8, 32), 32)
    gradients = gradient, jnp.ones((2, 2, 32))
    lowered = jax.jit(lambda *args: jax.vjp(measured_conv3x3, *args)[1](gradients)).trace(x, kernel)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == (platform == "tpu")
