"""InceptionV3 as it scores generated images: FID, sFID, inception score, precision and recall.

Reference: Szegedy et al. 2015 (arXiv 1512.00567) in the form of TensorFlow's graph of 2015-12-05, with which the published
scores are computed. torchvision's InceptionV3 differs in its poolings and its weights; scores from it cannot be compared.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

IMAGE_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # channels of mixed_6/conv; 17 x 17 x 7 = 2023 numbers are few enough for a covariance matrix

he_normal = nn.initializers.he_normal()  # keeps the activations' size where the weights are random
max_pool_2 = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


@struct.dataclass
class InceptionFeatures:
    """Features that the metrics use, float32."""

    pool: Float[Array, "B 2048"]  # the graph's pool_3, for FID, precision and recall
    spatial: Float[Array, "B 2023"]  # the first 7 channels of mixed_6/conv, rows first, for sFID
    logits: Float[Array, "B 1008"]  # softmax/logits/MatMul, without the bias, for the inception score


def resize_tf1(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes bilinearly as TensorFlow 1's ResizeBilinear with align_corners=False, in float32.

    Output pixel i lies at input i * (old / new), without half-pixel centers, so the picture shifts towards the upper left when
    it is enlarged, and nothing is averaged when it shrinks. The published statistics were computed so; `jax.image.resize`
    gives other features. Pixels are gathered, not multiplied by a matrix, so that the result does not depend on the precision
    of matrix products.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # columns before rows, and float32 positions, as TensorFlow does
        old = x.shape[axis]
        position = np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size))
        low = np.floor(position).astype(np.int32)
        fraction = np.expand_dims(position - low, tuple(range(1, x.ndim - axis)))
        a, b = (jnp.take(x, np.minimum(index, old - 1), axis=axis) for index in (low, low + 1))
        x = a + (b - a) * fraction
    return x


def graph_input(images: Float[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Returns images in 0..255 as TensorFlow's graph prepares them, float32 in [-1, 1)."""
    return (resize_tf1(images, IMAGE_SIZE) - 128) / 128


def pytorch_fid_input(images: Float[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Returns images in 0..255 as pytorch-fid prepares them for the same weights: half-pixel centers, float32 in [-1, 1].

    Reference: pytorch-fid `inception.py` `InceptionV3.forward`, torch's `F.interpolate(mode='bilinear', align_corners=False)`.
    """
    shape = (images.shape[0], IMAGE_SIZE, IMAGE_SIZE, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=False) / 127.5 - 1


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, in float32; they are parameters, since nothing here is trained."""

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        shape = (x.shape[-1],)
        scale, var = (self.param(name, nn.initializers.ones, shape) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ("bias", "mean"))
        return (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    features: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype, name="conv")
        x = conv(self.features, self.kernel, self.strides, self.padding)(x)
        return nn.relu(FrozenBatchNorm(name="bn")(x)).astype(self.dtype)


def conv_branch(x: Float[Array, "B H W C"], dtype: DTypeLike, name: str, *convs: tuple[Any, ...]) -> Float[Array, "B h w D"]:
    """Applies units NAME_1, NAME_2, … in turn, each given as (features, kernel) or (features, kernel, strides, padding)."""
    conv = functools.partial(ConvUnit, dtype=dtype)
    for number, settings in enumerate(convs, 1):
        x = conv(*settings, name=f"{name}_{number}")(x)
    return x


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns 3 x 3 averages, computed in float32; pixels beyond the border do not count."""
    y = nn.avg_pool(x.astype(jnp.float32), (3, 3), padding="SAME", count_include_pad=False)
    return y.astype(x.dtype)


class InceptionA(nn.Module):
    """35 x 35 block with 224 + pool_features output channels."""

    pool_features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv = functools.partial(ConvUnit, dtype=self.dtype)
        single = conv(64, (1, 1), name="branch1x1")(x)
        five = conv_branch(x, self.dtype, "branch5x5", (48, (1, 1)), (64, (5, 5)))
        double = conv_branch(x, self.dtype, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
        pool = conv(self.pool_features, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([single, five, double, pool], axis=-1)


class InceptionB(nn.Module):
    """Reduces 35 x 35 to 17 x 17; adds 480 channels."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = ConvUnit(384, (3, 3), 2, "VALID", self.dtype, name="branch3x3")(x)
        double = conv_branch(x, self.dtype, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3), 2, "VALID"))
        return jnp.concatenate([three, double, max_pool_2(x)], axis=-1)


class InceptionC(nn.Module):
    """17 x 17 block with 768 output channels; its 7 x 7 convolutions are in two parts, with `width` channels between them."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv, width = functools.partial(ConvUnit, dtype=self.dtype), self.width
        single = conv(192, (1, 1), name="branch1x1")(x)
        seven = conv_branch(x, self.dtype, "branch7x7", (width, (1, 1)), (width, (1, 7)), (192, (7, 1)))
        convs = (width, (1, 1)), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))
        double = conv_branch(x, self.dtype, "branch7x7dbl", *convs)
        pool = conv(192, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([single, seven, double, pool], axis=-1)


class InceptionD(nn.Module):
    """Reduces 17 x 17 to 8 x 8; adds 512 channels."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = conv_branch(x, self.dtype, "branch3x3", (192, (1, 1)), (320, (3, 3), 2, "VALID"))
        convs = (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, "VALID")
        seven = conv_branch(x, self.dtype, "branch7x7x3", *convs)
        return jnp.concatenate([three, seven, max_pool_2(x)], axis=-1)


class InceptionE(nn.Module):
    """8 x 8 block with 2048 output channels."""

    pool: str  # 'average' or 'max'; the graph of 2015 has 'max' in its last block, unlike the paper
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv = functools.partial(ConvUnit, dtype=self.dtype)
        single = conv(320, (1, 1), name="branch1x1")(x)
        three = conv(384, (1, 1), name="branch3x3_1")(x)
        threes = [conv(384, (1, 3), name="branch3x3_2a")(three), conv(384, (3, 1), name="branch3x3_2b")(three)]
        double = conv_branch(x, self.dtype, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        doubles = [conv(384, (1, 3), name="branch3x3dbl_3a")(double), conv(384, (3, 1), name="branch3x3dbl_3b")(double)]
        pooled = average_pool(x) if self.pool == "average" else nn.max_pool(x, (3, 3), padding="SAME")
        pool = conv(192, (1, 1), name="branch_pool")(pooled)
        return jnp.concatenate([single, *threes, *doubles, pool], axis=-1)


class Classifier(nn.Module):
    """Product of the last layer; its bias is kept for conversion and never added, as in the published inception scores."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B 2048"]) -> Float[Array, "B 1008"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], NUM_CLASSES))
        self.param("bias", nn.initializers.zeros, (NUM_CLASSES,))
        return (x.astype(self.dtype) @ kernel.astype(self.dtype)).astype(jnp.float32)


class InceptionV3(nn.Module):
    """Features of images of any size."""

    dtype: DTypeLike = jnp.float32  # compute dtype of convolutions and the last product; the rest is float32
    prepare: Callable[[jax.Array], jax.Array] = graph_input  # for samples; `pytorch_fid_input` for VAEs' reconstructions

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> InceptionFeatures:
        """Resizes images in [0, 255], float32 or uint8, and extracts their features."""
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(f"images have shape {images.shape}; needed: [B, H, W, 3]")
        if images.dtype not in (jnp.float32, jnp.uint8):
            raise ValueError(f"images are {images.dtype}; needed: float32 or uint8, in [0, 255]")
        conv = functools.partial(ConvUnit, dtype=self.dtype)
        x = self.prepare(images)
        x = conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = max_pool_2(x)
        x = conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = max_pool_2(x)
        x = InceptionA(32, self.dtype, name="Mixed_5b")(x)
        x = InceptionA(64, self.dtype, name="Mixed_5c")(x)
        x = InceptionA(64, self.dtype, name="Mixed_5d")(x)
        x = InceptionB(self.dtype, name="Mixed_6a")(x)
        x = InceptionC(128, self.dtype, name="Mixed_6b")(x)
        x = InceptionC(160, self.dtype, name="Mixed_6c")(x)
        x = InceptionC(160, self.dtype, name="Mixed_6d")(x)
        # the block's first channels are those of its 1 x 1 branch, mixed_6/conv
        spatial = x[..., :SPATIAL_CHANNELS].astype(jnp.float32).reshape(x.shape[0], -1)
        x = InceptionC(192, self.dtype, name="Mixed_6e")(x)
        x = InceptionD(self.dtype, name="Mixed_7a")(x)
        x = InceptionE("average", self.dtype, name="Mixed_7b")(x)
        x = InceptionE("max", self.dtype, name="Mixed_7c")(x)
        pool = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return InceptionFeatures(pool=pool, spatial=spatial, logits=Classifier(self.dtype, name="fc")(pool))
