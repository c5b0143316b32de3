"""Layers of the VAE, and a hint for transformers, written so that XLA compiles them to fast programs.

Conv, GroupNorm and UpsampleConv have the parameters and, up to rounding, the values and gradients of the published layers
(tests/models/test_fused_ops.py). What differs is when a bias is added, what the backward pass keeps, and how upsampling is
computed. Each docstring says what that is worth for the main run (SiT-XL/2, f8d4, 256 px), on two devices:

* TPUs, by the compiler's estimate for 16 images a chip of a v5e: a step takes about 440 ms, the VAE 308. None was measured.
* One H200, measured in turns (jax 0.11.2, 32 images, bfloat16): a step takes 339.5 ms (338.7 to 339.8), 94 images/s, where an
  earlier version of the networks took 337.0 ms (336.4 to 342.5); the VAE alone, forward and all gradients, takes 196.0 ms.
  What is said by roofline is newer, and an estimate (docs/tuning_log.md).
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.distributed.sharding import of_each_device
from repae_jax.models.layers import torch_default_init

NHWC = ("NHWC", "HWIO", "NHWC")
KEPT = "kept_by_recompute_norms"


@struct.dataclass
class DeferredBias:
    """The sum x + bias, where the bias waits for the next group norm.

    There it is a few numbers an image, and its gradient comes with that of the mean; added behind the convolution, it costs a
    sum over all positions in the backward pass. Worth 28 ms, 6 % of a step, on TPUs; on the H200 5.2 ms, 1.5 % of a step.
    """

    x: Float[Array, "B H W C"]  # result of a convolution, in the compute dtype
    bias: Float[Array, " C"]  # float32
    moments: Float[Array, "2 B C"] | None = None  # `channel_moments` of x, where the convolution gives them

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the sum."""
        return self.x.shape

    def __add__(self, other: "DeferredBias") -> "DeferredBias":
        return DeferredBias(self.x + other.x, self.bias + other.bias)

    def to_array(self) -> Float[Array, "B H W C"]:
        """Returns the sum in the compute dtype."""
        return (self.x + self.bias).astype(self.x.dtype)


def channel_moments(x: Float[Array, "B H W C"]) -> Float[Array, "2 B C"]:
    """Returns the means of x and of its square over the positions, in float32."""
    x = x.astype(jnp.float32)
    return jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def conv_with_moments(
    conv: Callable[[Array, Array], Array], x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"]
) -> tuple[Float[Array, "B h w D"], Float[Array, "2 B D"]]:
    """Returns conv(x, kernel) and its `channel_moments`.

    The two convolutions of the backward pass read a gradient that is little arithmetic on the gradient of the group norm that
    follows. On TPUs each of them does this arithmetic as it reads; left to itself, XLA stores the gradient first. Worth 1.5 ms
    a block at full resolution, about 3 % of a step, on TPUs; nothing on the H200, whose VAE takes 195.7 ms without it.
    """
    y = conv(x, kernel)
    return y, channel_moments(y)


def _conv_with_moments_forward(conv, x, kernel):
    y = checkpoint_name(conv(x, kernel), KEPT)
    return (y, channel_moments(y)), (x, kernel, y)


def _conv_with_moments_backward(conv, saved, gradients):
    x, kernel, y = saved
    reader = y, *gradients
    barrier = {"tpu": lambda *arrays: jax.lax.optimization_barrier(arrays), "default": lambda *arrays: arrays}
    other_reader = jax.lax.platform_dependent(*reader, **barrier)  # without it, XLA computes the gradient once and stores it
    (x_gradient,) = jax.linear_transpose(lambda x: conv(x, kernel), x)(_gradient_through_moments(*reader))
    (kernel_gradient,) = jax.linear_transpose(lambda k: conv(x, k), kernel)(_gradient_through_moments(*other_reader))
    return x_gradient, kernel_gradient


def _gradient_through_moments(y, gradient, moments_gradient):
    mean_gradient, square_gradient = moments_gradient[:, :, None, None] / (y.shape[1] * y.shape[2])
    return (gradient.astype(jnp.float32) + mean_gradient + 2 * square_gradient * y.astype(jnp.float32)).astype(y.dtype)


conv_with_moments.defvjp(_conv_with_moments_forward, _conv_with_moments_backward)


class Conv(nn.Module):
    """Convolution with PyTorch's default initialization, whose bias is deferred."""

    features: int
    kernel_size: int
    dtype: DTypeLike
    strides: int = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    with_moments: bool = False  # pays where a group norm is the result's only reader

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"] | DeferredBias) -> DeferredBias:
        channels = x.shape[-1]
        init = torch_default_init(self.kernel_size**2 * channels)
        kernel = self.param("kernel", init["kernel_init"], (self.kernel_size, self.kernel_size, channels, self.features))
        bias = self.param("bias", init["bias_init"], (self.features,))
        if isinstance(x, DeferredBias) and self.kernel_size == 1:
            bias += jnp.dot(x.bias, kernel[0, 0], precision="highest")
            x = x.x
        elif isinstance(x, DeferredBias):
            x = x.to_array()
        conv = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(self.strides,) * 2, padding=self.padding, dimension_numbers=NHWC
        )
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y, moments = conv_with_moments(conv, x, kernel) if self.with_moments else (conv(x, kernel), None)
        return DeferredBias(y, bias, moments)


def group_stats(x: DeferredBias, groups: int) -> tuple[Float[Array, "B 1 1 C"], Float[Array, "B 1 1 C"]]:
    """Returns the mean and variance of each image's groups of channels, in float32, repeated for the channels of a group.

    The moments that they are made of are kept by `recompute_norms`: the gradients need them, and summing again takes 2.3 ms of
    the VAE, 1 % of a step, by roofline for an H200.
    """
    # as a checkpoint it keeps x alone, which the normalization keeps anyway, and not its float32 copy
    moments = jax.checkpoint(channel_moments)(x.x) if x.moments is None else x.moments
    mean, square = checkpoint_name(moments, KEPT)
    moments = jnp.stack([mean + x.bias, square + x.bias * (2 * mean + x.bias)])
    moments = moments.reshape(2, len(mean), groups, -1).mean(-1)
    mean, square = jnp.repeat(moments, x.shape[-1] // groups, axis=-1)[:, :, None, None]
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


class GroupNorm(nn.Module):
    """Group norm with epsilon 1e-6 and a scale and bias per channel; computed in float32, returned in the compute dtype.

    Reading the moments, instead of x twice, is worth 4.2 ms, 1.2 % of a step, on the H200. In half precision, x times a factor
    plus a term has two sums as gradients, fused with what they add up: 2.3 ms, 1 % of a step, by roofline. Its rounding, that
    of float32 times the mean over the deviation, would show in float32 alone.
    """

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: DeferredBias) -> Float[Array, "B H W C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        mean, var = group_stats(x, self.groups)
        mean, factor = mean - x.bias, jax.lax.rsqrt(var + 1e-6) * scale
        if self.dtype == jnp.float32:
            return (x.x - mean) * factor + bias
        return (x.x * factor + (bias - mean * factor)).astype(self.dtype)


def recompute_norms(block):
    """Wraps a Linen module class, or function of a module, so that its backward pass recomputes normalizations and activations.

    Kept are the input, the moments of group norms, and results of convolutions with moments. What is recomputed is several
    times the size, partly in float32, and cheap. The main run needs it on TPUs: 37 of the VAE's 44 GiB of residuals less, on
    chips of 16 GB. On the H200 it saves 10 GiB and costs 10.6 ms, 3 % of a step; the moments were not kept then.
    """
    return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(KEPT))


def repeated_conv(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B 2*H 2*W D"]:
    """Upsamples by 2 with nearest neighbors, then convolves."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=NHWC)


def transposed_conv(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B 2*H 2*W D"]:
    """Computes `repeated_conv` as one transposed convolution.

    The kernel's taps that fall on copies of one pixel are added first, which leaves 4 of 9 multiplications. Worth 43 ms, 9 % of
    a step, on TPUs, and used there alone: on CPUs it takes four times as long as `repeated_conv`, and cuDNN is known to be slow
    at it, too.
    """
    taps = jnp.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], jnp.float32)
    kernel = jnp.einsum("ua,vb,abcd->uvcd", taps, taps, kernel, precision="highest").astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=NHWC)


def phase_conv(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B 2*H 2*W D"]:
    """Computes `repeated_conv` as one 2x2 convolution of x, whose channels are the four phases of the result.

    Rows 2i of the result read rows i - 1 and i of x, rows 2i + 1 read i and i + 1; columns likewise. This leaves 4 of 9
    multiplications, too, and moves as many bytes as repeating the pixels. Worth 11 ms of the VAE's 154 by roofline for an H200;
    used on NVIDIA GPUs alone, and not measured yet.
    """
    height, width = x.shape[1:3]
    taps = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    kernel = jnp.einsum("aui,bvj,ijcd->uvcabd", taps, taps, kernel, precision="highest").astype(x.dtype)
    # the barrier keeps the zeros out of the convolution, whose gradient to the kernel XLA else turns into one with a kernel
    # as large as the image
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    y = jax.lax.conv_general_dilated(x, kernel.reshape(2, 2, x.shape[3], -1), (1, 1), "VALID", dimension_numbers=NHWC)
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    rows = [jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in range(2)], axis=3) for a in range(2)]
    return jnp.stack(rows, axis=2).reshape(len(x), 2 * height, 2 * width, -1)


class UpsampleConv(nn.Module):
    """Nearest-neighbor upsampling by 2 and a 3x3 convolution with PyTorch's default initialization."""

    dtype: DTypeLike

    @nn.remat  # keeps x, not its sum with the bias
    @nn.compact
    def __call__(self, x: DeferredBias) -> DeferredBias:
        channels = x.shape[-1]
        init = torch_default_init(9 * channels)
        kernel = self.param("kernel", init["kernel_init"], (3, 3, channels, channels))
        bias = self.param("bias", init["bias_init"], (channels,))
        methods = {"tpu": transposed_conv, "cuda": phase_conv, "default": repeated_conv}
        return DeferredBias(jax.lax.platform_dependent(x.to_array(), kernel, **methods), bias)


def rows_major(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns x; it and its gradient are laid out in memory with the last axis innermost.

    Use it on tokens after a table of positions is added to them, where blocks are unrolled. The table's gradient is a sum over
    the batch, and on GPUs XLA lays out all of a SiT's residual stream for that one sum, the batch innermost; layer norms then
    take passes of their own. Worth 0.22 ms a block, 2 % of a step, by roofline for an H200.
    """
    return of_each_device(lambda rows: with_layout_constraint(rows, Layout(tuple(range(rows.ndim)))), x)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """Returns the largest of each 2 x 2 pixels; the gradient goes to the first of equal ones, as in PyTorch.

    On NVIDIA GPUs by comparisons: a pooling's gradient is scattered, in millions of turns of a loop where XLA must add in a
    fixed order (`config.deterministic`); by roofline for an H200, LPIPS takes 19.4 ms for 21.3. TPUs take longer: 55 for 39.5.
    """
    return jax.lax.platform_dependent(x, cuda=compared_max, default=lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))


def compared_max(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """Computes `max_pool` by comparing the four pixels."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    a, b, c, d = (x[:, i:height:2, j:width:2] for i in range(2) for j in range(2))
    top, bottom = jnp.where(a >= b, a, b), jnp.where(c >= d, c, d)
    return jnp.where(top >= bottom, top, bottom)
