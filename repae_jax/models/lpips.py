"""LPIPS with VGG16 features: a learned perceptual distance between images.

Reference: Zhang et al. 2018 (arXiv 1801.03924), version 0.1, in the form vendored by taming-transformers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from repae_jax.models.convolution import conv3x3

# channels of VGG16's convolutions; each tuple ends before a max pooling and gives one feature map
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class _Filter(nn.Module):
    """Parameters of a 3x3 convolution: (channels of its input) -> kernel [3, 3, channels, features], bias [features]."""

    features: int

    @nn.compact
    def __call__(self, channels):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


def _features(x, filters):
    """3x3 convolutions, each with a ReLU: [B, H, W, C] -> [B, H, W, D]."""
    for kernel, bias in filters:
        x = nn.relu(conv3x3(x, kernel.astype(x.dtype)) + bias.astype(x.dtype))
    return x


def _inverse_norm(sum_of_squares):
    # 1e-20 keeps the root's gradient finite where every feature is zero
    return 1 / (jnp.sqrt(sum_of_squares + 1e-20) + 1e-10)


def _unit_length(x):
    """Feature maps with unit length at each position, float32."""
    x = x.astype(jnp.float32)
    return x * _inverse_norm(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def _distance(x, y, weights):
    """Mean over positions of the weighted squared difference of unit-length maps: [B, H, W, C] twice, [C] -> [B]."""
    return jnp.mean(jnp.sum(jnp.square(x - y) * weights, axis=-1), axis=(1, 2))


def _pool(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def stage(x, y, filters, weights):
    """One stage of the network, for both sides of a pair.

    Args:
      x: [B, H, W, C] in the compute dtype: normalised images, or the stage before's result.
      y: the same of the others.
      filters: (kernel [3, 3, C, D], bias [D]) of each convolution.
      weights: [D].

    Returns:
      float32 [B] distances, and the pooled features [B, H/2, W/2, D] of x and of y.
    """
    x, y = _features(x, filters), _features(y, filters)
    return _distance(_unit_length(x), _unit_length(y), weights), _pool(x), _pool(y)


def _kernel_of_pairs(kernel):
    """[3, 3, C, D] -> [3, 3, 2C, 2D]: the same convolution where channels hold two neighbors of a row, one after the other."""
    pair, source, result = np.ogrid[-1:2, 0:2, 0:2]
    column = 1 + 2 * pair + source - result  # of the kernel; outside 0..2 is no tap
    taps = jnp.pad(kernel, ((0, 0), (2, 2), (0, 0), (0, 0)))[:, column + 2]
    return rearrange(taps, "h pair source result c d -> h pair (source c) (result d)")


def _sum_each(x):
    """Sums over the channels of each neighbor: [..., 2C] -> [..., 2]. A matrix product, for TPUs are slow to sum over lanes."""
    neighbors = np.repeat(np.eye(2, dtype=np.float32), x.shape[-1] // 2, axis=0)
    return jnp.dot(x, neighbors, precision="highest")


def _repeat_each(x, channels):
    """[..., 2] -> [..., 2 * channels]."""
    return jnp.where(np.arange(2 * channels) < channels, x[..., :1], x[..., 1:])


@jax.custom_vjp
def _norms_of_pairs(x):
    """Of float32 features [..., 2C], 1 / norm of each neighbor's, repeated over its channels: [..., 2C]."""
    return _norms_of_pairs_forward(x)[0]


def _norms_of_pairs_forward(x):
    inverse, to_sums = jax.vjp(_inverse_norm, _sum_each(jnp.square(x)))
    return _repeat_each(inverse, x.shape[-1] // 2), (x, to_sums)


def _norms_of_pairs_backward(saved, gradient):
    x, to_sums = saved
    (to_squares,) = to_sums(_sum_each(gradient))  # the transpose of repeating is summing
    return (2 * x * _repeat_each(to_squares, x.shape[-1] // 2),)


_norms_of_pairs.defvjp(_norms_of_pairs_forward, _norms_of_pairs_backward)


def stage_of_pairs(x, y, filters, weights):
    """`stage`, equal but for rounding, with two neighbors of a row side by side in the channels; W must be even.

    The first features have 64 channels, half of a TPU's 128 lanes: the other half would be stored and computed for nothing.
    Where neighbors are equal, max pooling here gives each half of the gradient, while `stage` gives one of them all.
    """
    paired = [(_kernel_of_pairs(kernel), jnp.tile(bias, 2)) for kernel, bias in filters]
    x, y = (_features(rearrange(side, "b h (w pair) c -> b h w (pair c)", pair=2), paired) for side in (x, y))
    maps = [side.astype(jnp.float32) * _norms_of_pairs(side.astype(jnp.float32)) for side in (x, y)]

    def pool(x):
        return jnp.maximum(*jnp.split(nn.max_pool(x, (2, 1), strides=(2, 1)), 2, axis=-1))

    return _distance(*maps, jnp.tile(weights, 2)) / 2, pool(x), pool(y)


def _stage_on(index, width):
    if index > 0 or width % 2:
        return stage
    return functools.partial(jax.lax.platform_dependent, tpu=stage_of_pairs, default=stage)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs.

    Attributes:
      dtype: compute dtype of the convolutions; normalisation and distances are float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, others):
        """Distance of each pair.

        Where one of the sides needs no gradient (real images), nothing is kept for it.

        Args:
          images: [B, H, W, 3] in [-1, 1], H and W at least 16.
          others: the same shape and range.

        Returns:
          float32 [B]: per stage the mean over positions of the weighted squared difference, summed over the five stages.
        """
        x, y = (((side - SHIFT) / SCALE).astype(self.dtype) for side in (images, others))
        distance = 0.0
        for i, widths in enumerate(VGG16_STAGES):
            inputs = (x.shape[-1], *widths)
            filters = [_Filter(width, name=f"conv_{i}_{j}")(inputs[j]) for j, width in enumerate(widths)]
            weights = self.param(f"linear_{i}", nn.initializers.uniform(1.0), (widths[-1],))
            of_stage, x, y = _stage_on(i, x.shape[2])(x, y, filters, weights)
            distance += of_stage
        return distance
