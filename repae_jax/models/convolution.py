"""3x3 convolutions with gradients of their own, where XLA's are slow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

NHWC = ("NHWC", "HWIO", "NHWC")
MIN_POSITIONS, MIN_CHANNELS = 16 * 16, 32  # below which XLA's own gradient is as fast
TILE = 4
CONVOLVED = "convolved"  # name of `measured_conv3x3`'s result: a jax.checkpoint around it must save that, or convolves twice

# Winograd's F(4x4, 3x3) of Lavin & Gray (arXiv 1509.09308): along each side a tile of 4 results of 6 inputs is
# TO_RESULT @ ((KERNEL @ kernel) * (INPUT @ inputs))
TO_RESULT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)
INPUT = np.array([
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
], np.float32)  # fmt: skip
KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / 24


def plain_conv3x3(x, kernel):
    """`conv3x3` with XLA's own gradients."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


@jax.custom_vjp
def conv3x3(x, kernel):
    """Convolution with stride 1 and zeros around the image: [B, H, W, C], [3, 3, C, D] of the same type -> [B, H, W, D].

    In the gradient to the kernel the images of the batch stand where channels stand else, and they are few. On CPUs XLA then
    reaches a third of its speed; there matrix products of Winograd's tiles take the place of that convolution.
    """
    return plain_conv3x3(x, kernel)


def _plain_to_kernel(x, gradient, kernel):
    return jax.linear_transpose(lambda kernel: plain_conv3x3(x, kernel), kernel)(gradient)[0]


def _tiles(x, matrix):
    """Combines the values of each tile linearly, along both sides.

    Args:
      x: [B, 4 * (m - 1) + s, 4 * (n - 1) + s, C]: m x n tiles of side s, one at every fourth value.
      matrix: [6, s].

    Returns:
      [6 * 6, B * m * n, C], combinations of columns before those of rows.
    """
    for axis in (1, 3):  # the combinations of rows become the leading axis
        tiles = (x.shape[axis] - matrix.shape[1]) // TILE + 1
        parts = [jax.lax.slice_in_dim(x, i, i + (tiles - 1) * TILE + 1, TILE, axis) for i in range(matrix.shape[1])]
        x = jnp.stack([sum(factor * part for factor, part in zip(row, parts) if factor) for row in matrix])
    return x.reshape(len(matrix) ** 2, -1, x.shape[-1])


def _winograd_to_kernel(x, gradient, kernel):
    more = [-side % TILE for side in x.shape[1:3]]  # a whole number of tiles
    x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), *((1, 1 + n) for n in more), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), *((0, n) for n in more), (0, 0)))
    products = jnp.einsum("ptc,ptd->pcd", _tiles(x, INPUT), _tiles(gradient, TO_RESULT.T))
    products = products.reshape(6, 6, *kernel.shape[2:])
    return jnp.einsum("ia,jb,jicd->abcd", KERNEL, KERNEL, products).astype(kernel.dtype)


def _to_input(x, kernel, gradient):
    return jax.linear_transpose(lambda x: plain_conv3x3(x, kernel), x)(gradient)[0]


def _to_kernel(x, kernel, gradient):
    if x.shape[1] * x.shape[2] < MIN_POSITIONS or min(kernel.shape[2:]) < MIN_CHANNELS:
        return _plain_to_kernel(x, gradient, kernel)
    return jax.lax.platform_dependent(x, gradient, kernel, cpu=_winograd_to_kernel, default=_plain_to_kernel)


def _backward(saved, gradient):
    return _to_input(*saved, gradient), _to_kernel(*saved, gradient)


conv3x3.defvjp(lambda x, kernel: (plain_conv3x3(x, kernel), (x, kernel)), _backward)


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
    y = plain_conv3x3(x, kernel)
    return y, channel_moments(y)


def _measured_forward(x, kernel):
    y = checkpoint_name(plain_conv3x3(x, kernel), CONVOLVED)
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
    return _to_input(x, kernel, _through_moments(*first)), _to_kernel(x, kernel, _through_moments(*second))


measured_conv3x3.defvjp(_measured_forward, _measured_backward)
