import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import convolution
from repae_jax.models.convolution import NHWC, channel_moments, conv3x3, measured_conv3x3

RTOL = 3e-5  # of the largest entry: Winograd's numbers are up to 8 times the result's, and float32 rounds each to 6e-8


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)


def gradients(conv, x, kernel, gradient):
    result, back = jax.vjp(conv, x, kernel)
    return result, *back(gradient)


def drawn(shape, features, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (*shape[:3], features), dtype)
    return x, jax.random.normal(keys[2], (3, 3, shape[3], features), dtype), gradient


def check(actual, expected, rtol):
    for name, a, b in zip(("result", "to x", "to the kernel"), actual, expected):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(2, 16, 16, 32), (1, 17, 18, 36), (3, 19, 33, 32), (1, 64, 4, 32)])
@pytest.mark.parametrize("features", [32, 40])
def test_gradients_are_those_of_the_plain_convolution(shape, features):
    values = drawn(shape, features)
    lowered = jax.jit(lambda *args: gradients(conv3x3, *args)).lower(*values)
    assert "ptc" in lowered.as_text(debug_info=True)  # the products of tiles are what is tested here
    check(lowered.compile()(*values), gradients(plain, *values), RTOL)


@pytest.mark.parametrize("shape", [(2, 8, 8, 32), (1, 5, 7, 32), (2, 16, 16, 3)])
def test_small_images_and_few_channels_take_the_plain_gradient(shape):
    values = drawn(shape, 32)
    lowered = jax.jit(lambda *args: gradients(conv3x3, *args)).lower(*values)
    assert "ptc" not in lowered.as_text(debug_info=True)
    check(lowered.compile()(*values), gradients(plain, *values), 1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_take_the_plain_gradient(platform):
    values = drawn((2, 16, 16, 32), 32)
    lowered = jax.jit(lambda *args: gradients(conv3x3, *args)).trace(*values).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert text.count("stablehlo.convolution") == 3 and "dot_general" not in text


def test_bfloat16_gradients_are_rounded_once():
    values = drawn((2, 16, 16, 32), 32, jnp.bfloat16)
    wide = gradients(plain, *(x.astype(jnp.float32) for x in values))[2]
    actual = jax.jit(lambda *args: gradients(conv3x3, *args)[2])(*values)
    assert actual.dtype == jnp.bfloat16
    check([actual], [wide.astype(jnp.bfloat16)], 2**-8)


def test_tiles_do_not_leave_out_the_last_rows_and_columns():
    x, kernel, gradient = drawn((1, 18, 19, 32), 32)
    alone = jnp.zeros_like(gradient).at[:, -1, -1].set(gradient[:, -1, -1])
    arguments = x, alone, kernel
    expected = convolution._plain_to_kernel(*arguments)
    np.testing.assert_allclose(convolution._winograd_to_kernel(*arguments), expected, atol=RTOL * np.abs(expected).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_devices_share_the_images_of_a_batch(devices):
    """And exchange products of tiles, not images."""
    values = drawn((8, 16, 16, 32), 32)
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    rows, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = jax.device_put(values, (rows, whole, rows))
    compiled = jax.jit(lambda *args: gradients(conv3x3, *args), out_shardings=(rows, rows, whole)).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    check(compiled(*placed), gradients(plain, *values), RTOL)


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
