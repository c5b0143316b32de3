"""Building blocks shared by the networks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.distributed.sharding import unsharded

Initializer = Callable[..., Array]
# of jax.nn.dot_product_attention; 'cudnn' takes half precision on NVIDIA GPUs, keeps no array of probabilities, and adds up
# gradients in any order unless XLA is told to be deterministic (--xla_gpu_exclude_nondeterministic_ops)
Implementation = Literal["xla", "cudnn"]
xavier = nn.initializers.xavier_uniform()


def uniform(bound: float) -> Initializer:
    """Returns an initializer that draws from U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_default_init(fan_in: int) -> dict[str, Any]:
    """Returns kernel_init and bias_init of torch's Conv2d and Linear: both U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    init = uniform(1 / math.sqrt(fan_in))
    return {"kernel_init": init, "bias_init": init}


def timestep_embedding(t: Float[Array, "*B"], dim: int, max_period: float = 10_000.0) -> Float[Array, "*B dim"]:
    """Returns the float32 sinusoidal embedding, cosines first; t is used as it is, in [0, 1], not scaled to 1000.

    Reference: SiT's TimestepEmbedder.timestep_embedding.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@functools.lru_cache(maxsize=16)
def sincos_position_embedding(width: int, height_tokens: int, width_tokens: int) -> Float[np.ndarray, "T D"]:
    """Returns the fixed 2D sin-cos table of MAE and DiT, float32: half of the width encodes the column, half the row."""
    if width % 4:
        raise ValueError(f"2D sin-cos positions need a width divisible by 4, got {width}")
    omega = 1.0 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))

    def encode(positions):
        angles = np.outer(positions, omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.divmod(np.arange(height_tokens * width_tokens), width_tokens)
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B T D"]:
    """Returns the patches as tokens, rows first; D = p*p*C, the pixels of a patch in (row, column, channel) order."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Float[Array, "B T D"], patch: int, height_tokens: int) -> Float[Array, "B H W C"]:
    """Inverse of `patchify`."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", p=patch, q=patch, h=height_tokens)


def _promote_all_but_bias(inputs, kernel, bias, dtype):
    inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=dtype)
    return inputs, kernel, bias


class Dense(nn.Dense):
    """Linen's Dense, with the bias added in float32 and the result in the compute dtype.

    The gradient of a bias is a sum over all positions. Added in bfloat16, it is summed in bfloat16: a million ones make 8192
    where every addition is rounded, and on TPUs the rounding is most of the sum's time.
    """

    promote_dtype: Callable = _promote_all_but_bias

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        return super().__call__(x).astype(self.dtype)


class Conv(nn.Conv):
    """Linen's Conv, with the bias added in float32 as in `Dense`."""

    promote_dtype: Callable = _promote_all_but_bias

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return super().__call__(x).astype(self.dtype)


def over_tokens(x: Float[Array, "B *T D"]) -> Float[Array, "B T D"]:
    """Returns numbers of each sample with an axis for its tokens; numbers of each token as they are."""
    return x[:, None] if x.ndim == 2 else x


def modulate(x: Float[Array, "B T D"], shift: Float[Array, "B *T D"], scale: Float[Array, "B *T D"]) -> Float[Array, "B T D"]:
    """Returns x * (1 + scale) + shift, adaLN's modulation, the same for all tokens of a sample or that of each."""
    return x * (1 + over_tokens(scale)) + over_tokens(shift)


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v projections and a float32 softmax.

    One fused matrix, as published, would be split over heads with a relayout per block: 37 ms of a SiT-XL's 191 by the TPU
    compiler's estimate (v5e, 16 images a chip).
    """

    num_heads: int  # divides the width
    qk_norm: bool = False  # LayerNorm (eps 1e-5, affine) on each head's q and k, as timm does
    qkv_init: Initializer = xavier
    no_bias: Sequence[str] = ()  # any of 'query', 'key', 'value', 'out'
    rotate: Callable | None = None  # position encoding of q and k, [B, T, num_heads, D / num_heads] to the same shape
    implementation: Implementation = "xla"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]

        def dense(name, init):
            return Dense(width, name not in self.no_bias, kernel_init=init, dtype=self.dtype, name=name)

        def heads(name):
            return rearrange(dense(name, self.qkv_init)(x), "b t (n d) -> b t n d", n=self.num_heads)

        q, k, v = map(heads, ("query", "key", "value"))
        if self.qk_norm:
            q = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="query_norm")(q)
            k = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="key_norm")(k)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        y = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return dense("out", xavier)(rearrange(y, "b t n d -> b t (n d)"))


class Mlp(nn.Module):
    """Two dense layers with an activation between them."""

    hidden_dim: int
    activation: Callable
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = Dense(self.hidden_dim, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(self.activation(y))


def scan_blocks(
    block: type[nn.Module], length: int, *, name: str, remat: str = "none", unroll: int = 1, num_broadcast: int = 0, **fields
) -> nn.Module:
    """Stacks copies of a block as one scanned module, whose parameters carry a leading layer axis.

    Like the block, the stack is called as stack(x, *shared) -> (x, None).

    Args:
      block: class of the block, whose attributes are `fields`.
      length: number of layers.
      remat: what the backward pass recomputes: 'none' (nothing), 'dots' (all but matmul results), 'full'.
      unroll: layers per loop iteration; more compile longer and, on CPUs, run faster.
      num_broadcast: number of arguments after x that all layers share.
    """
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    if remat not in ("none", *policies):
        raise ValueError(f"remat={remat!r} is unknown; allowed: 'none', 'dots', 'full'")
    block = nn.map_variables(block, "params", trans_in_fn=unsharded, init=True, mutable=True)
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=policies[remat])
    scan = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
    stacked = scan(block, length=length, unroll=min(unroll, length), in_axes=(nn.broadcast,) * num_broadcast)
    return stacked(name=name, **fields)
