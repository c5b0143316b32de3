import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.models import fused_ops
from repae_jax.models.fused_ops import NHWC, DeferredBias, channel_moments, conv_with_moments

RTOL = 1e-5  # relative to the largest entry, in float32


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)


def random_inputs(shape, features, dtype=jnp.float32):
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
def test_gradients_of_a_convolution_with_moments_go_through_them(shape, dtype, rtol):
    x, kernel, gradient = random_inputs(shape, 40, dtype)
    gradients = gradient, 40 * jax.random.normal(jax.random.key(1), (2, shape[0], 40))

    def apart(x, kernel):
        y = plain(x, kernel)
        return y, channel_moments(y)

    (result, moments), back = jax.vjp(functools.partial(conv_with_moments, plain), x, kernel)
    (expected, expected_moments), expected_back = jax.vjp(apart, x, kernel)
    np.testing.assert_allclose(moments, expected_moments, rtol=1e-6, atol=1e-5)
    check((result, *back(gradients)), (expected, *expected_back(gradients)), rtol)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_tpus_compute_the_gradient_for_each_reader(platform):
    x, kernel, gradient = random_inputs((2, 8, 8, 32), 32)
    gradients = gradient, jnp.ones((2, 2, 32))
    lowered = jax.jit(lambda *args: jax.vjp(functools.partial(conv_with_moments, plain), *args)[1](gradients)).trace(x, kernel)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == (platform == "tpu")


@pytest.mark.parametrize("method", [fused_ops.transposed_conv, fused_ops.phase_conv])
def test_other_methods_are_upsampling_and_convolution(method):
    """Values and both gradients, float32, relative to the largest entry; the first is what TPUs run, the second NVIDIA GPUs."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 6, 8, 5), (3, 3, 5, 7), (2, 12, 16, 7)
    x, kernel, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    results = []
    for run in (method, fused_ops.repeated_conv):
        y, back = jax.vjp(run, x, kernel)
        results.append((y, *back(cotangent)))
    for actual, repeated in zip(*results):
        assert actual.shape == repeated.shape
        np.testing.assert_allclose(actual, repeated, rtol=0, atol=2e-6 * np.abs(repeated).max())


@pytest.mark.parametrize(("platform", "kernel"), [("cpu", "3x3x5x5"), ("tpu", "4x4x5x5"), ("cuda", "2x2x5x20")])
def test_each_platform_upsamples_by_its_own_method(platform, kernel):
    layer = fused_ops.UpsampleConv(jnp.float32)
    x = DeferredBias(jnp.ones((1, 4, 4, 5)), jnp.zeros((5,)))
    variables = layer.init(jax.random.key(0), x)
    text = jax.jit(lambda x: layer.apply(variables, x).x).trace(x).lower(lowering_platforms=(platform,)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution(" in line]
    assert len(convolutions) == 1
    assert f"tensor<{kernel}xf32>" in convolutions[0]


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norm_is_linens(offset):
    x = offset + 3 * jax.random.normal(jax.random.key(0), (2, 6, 8, 64))
    bias = jax.random.normal(jax.random.key(2), (64,))
    norm = nn.GroupNorm(num_groups=32, epsilon=1e-6)
    variables = norm.init(jax.random.key(1), x)
    ours = fused_ops.GroupNorm(32, jnp.float32).apply(variables, DeferredBias(x - bias, bias))
    # at 30 linen's values are up to 2e-4 from those of float64, ours up to 1e-4, because XLA sums squares in another order
    np.testing.assert_allclose(ours, norm.apply(variables, x), rtol=0, atol=1e-5 if offset == 0 else 3e-4)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norm_in_bfloat16_rounds_its_result_alone(offset):
    """Values and gradients against those in float32, of the same bfloat16 input; a mean of ten deviations loses no more."""
    x = (offset + 3 * jax.random.normal(jax.random.key(0), (2, 6, 8, 64))).astype(jnp.bfloat16)
    variables = fused_ops.GroupNorm(32, jnp.float32).init(jax.random.key(1), DeferredBias(x, jnp.zeros((64,))))
    gradient = jax.random.normal(jax.random.key(2), x.shape, jnp.bfloat16)
    results = []
    for dtype in (jnp.bfloat16, jnp.float32):
        y, back = jax.vjp(
            lambda v, x, dtype=dtype: fused_ops.GroupNorm(32, dtype).apply(v, DeferredBias(x, jnp.zeros((64,)))), variables, x
        )
        results.append((y, *jax.tree.leaves(back(gradient.astype(y.dtype)))))
    for half, full in zip(*results):
        half, full = np.asarray(half, np.float32), np.asarray(full, np.float32)
        np.testing.assert_allclose(half, full, rtol=0, atol=2**-8 * np.abs(full).max())


def test_a_strided_convolution_has_moments_too():
    conv = fused_ops.Conv(8, 3, jnp.float32, strides=2, padding=((0, 1), (0, 1)), with_moments=True)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
    variables = conv.init(jax.random.key(1), x)

    def loss(conv, x):
        y = conv.apply(variables, x)
        moments = channel_moments(y.x) if y.moments is None else y.moments
        return jnp.sum(jnp.sin(moments)) + jnp.sum(jnp.square(y.to_array()))

    expected = jax.grad(functools.partial(loss, conv.clone(with_moments=False)))(x)
    np.testing.assert_allclose(jax.grad(functools.partial(loss, conv))(x), expected, rtol=1e-4, atol=1e-5)


def test_a_deferred_bias_passes_through_sums_and_1x1_convolutions():
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (DeferredBias(jax.random.normal(k, (1, 3, 3, 4)), jax.random.normal(k, (4,))) for k in keys[:2])
    np.testing.assert_allclose((x + y).to_array(), x.to_array() + y.to_array(), rtol=1e-5, atol=1e-5)
    conv = fused_ops.Conv(5, 1, jnp.float32)
    variables = conv.init(keys[2], x)
    expected = conv.apply(variables, x.to_array()).to_array()
    np.testing.assert_allclose(conv.apply(variables, x).to_array(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (1, 7, 5, 3)])
def test_compared_max_is_max_pooling(shape):
    """Values and gradients are equal to the last bit, with many equal pixels, and with a row and column left over."""
    x = jax.random.randint(jax.random.key(0), shape, 0, 3).astype(jnp.float32)
    results = []
    for pool in (fused_ops.compared_max, fused_ops.max_pool):
        y, back = jax.vjp(pool, x)
        results.append((y, *back(jax.random.normal(jax.random.key(1), y.shape))))
    for compared, pooled in zip(*results):
        np.testing.assert_array_equal(compared, pooled)


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", True), ("tpu", True), ("cuda", False)])
def test_gradients_of_max_pooling_are_scattered_where_that_is_faster(platform, scatters):
    gradient = jax.jit(jax.grad(lambda x: fused_ops.max_pool(x).sum())).trace(jnp.ones((1, 4, 4, 2)))
    assert ("select_and_scatter" in gradient.lower(lowering_platforms=(platform,)).as_text()) == scatters
