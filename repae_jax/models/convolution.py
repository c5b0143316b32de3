"""A 3x3 convolution, and one whose gradient goes through the moments of its result."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLVED = "convolved"  # name of `measured_conv3x3`'s result: a jax.checkpoint around it must save that, or convolves twice


def conv3x3(x, kernel):
    """Convolution with stride 1 and zeros around the image: [B, H, W, C], [3, 3, C, D] of the same type -> [B, H, W, D]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def channel_moments(x):
    """Means of x and of its square over the positions: [B, H, W, C] -> float32 [2, B, C]."""
    x = x.astype(jnp.float32)
    return jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))])


@jax.custom_vjp
def measured_conv3x3(x, kernel):
    """`conv3x3`, and `channel_moments` of its result. Right for any use, of advantage where a normalisation is the only one.

    Backwards, both convolutions read a gradient that is little arithmetic on what the normalisation gives. On TPUs each does
    that as it reads, where by itself XLA would store the gradient first.
    """
    y = conv3x3(x, kernel)
    return y, channel_moments(y)


def _measured_forward(x, kernel):
    y = checkpoint_name(conv3x3(x, kernel), CONVOLVED)
    return (y, channel_moments(y)), (x, kernel, y)


def _through_moments(y, gradient, to_moments):
    """The gradient to y: what comes to it itself, and to its moments [2, B, C]."""
    to_mean, to_square = to_moments[:, :, None, None] / (y.shape[1] * y.shape[2])
    return (gradient.astype(jnp.float32) + to_mean + 2 * to_square * y.astype(jnp.float32)).astype(y.dtype)


def _measured_backward(saved, gradients):
    x, kernel, y = saved
    first = y, *gradients
    barrier = {"tpu": lambda *parts: jax.lax.optimization_barrier(parts), "default": lambda *parts: parts}
    second = jax.lax.platform_dependent(*first, **barrier)  # or XLA computes it once, and stores it
    (to_x,) = jax.linear_transpose(lambda x: conv3x3(x, kernel), x)(_through_moments(*first))
    (to_kernel,) = jax.linear_transpose(lambda kernel: conv3x3(x, kernel), kernel)(_through_moments(*second))
    return to_x, to_kernel


measured_conv3x3.defvjp(_measured_forward, _measured_backward)
