"""SiT: a scalable interpolant transformer with an alignment tap.

The network only maps (z_t, t, labels) to a velocity and to projections. It draws no randomness, normalizes no latents and
computes no loss. Reference: SiT (arXiv 2401.08740), REPA (2410.06940), REPA-E (2504.10483).
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from repae_jax.distributed.sharding import unsharded
from repae_jax.models import layers
from repae_jax.models.fused_ops import rows_major

normal_02 = nn.initializers.normal(0.02)
PROJECTORS = ("mlp", "conv")
_INTERNAL = "internal"  # Flax's collection for the output of the head at the tap
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
Latents = Float[Array, "B h w C"]
Times = Float[Array, "B *hw"]  # one for each sample, or for each position of the latents, alike in a token
Labels = Int[Array, " B"]


class TimestepEmbedder(nn.Module):
    """Embeds t in [0, 1] by 256 float32 sinusoids and a two-layer SiLU MLP."""

    hidden_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        x = layers.timestep_embedding(t, 256).astype(self.dtype)
        x = layers.Dense(self.hidden_size, kernel_init=normal_02, dtype=self.dtype, name="fc1")(x)
        return layers.Dense(self.hidden_size, kernel_init=normal_02, dtype=self.dtype, name="fc2")(nn.silu(x))


class SiTBlock(nn.Module):
    """An adaLN-zero transformer block, conditioned on c, of samples or tokens; returns (x, None), as `nn.scan` takes it."""

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    attention: layers.Implementation
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B *T D"]) -> tuple[Float[Array, "B T D"], None]:
        width, zeros = x.shape[-1], nn.initializers.zeros
        modulation = layers.Dense(6 * width, kernel_init=zeros, dtype=self.dtype, name="adaLN_modulation")(nn.silu(c))
        # in float32, so that their gradients are summed over the tokens in float32
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation.astype(jnp.float32), 6, axis=-1)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)
        # Xavier's bound of the published code's fused (3D, D) matrix is 1.41 x smaller than that of (D, D)
        qkv_init = layers.uniform(math.sqrt(6 / (4 * width)))
        attention = layers.Attention(
            self.num_heads, self.qk_norm, qkv_init, implementation=self.attention, dtype=self.dtype, name="attn"
        )
        mlp = layers.Mlp(int(width * self.mlp_ratio), gelu_tanh, dtype=self.dtype, name="mlp")
        x = x + layers.over_tokens(gate_msa) * attention(layers.modulate(norm()(x), shift_msa, scale_msa))
        x = x + layers.over_tokens(gate_mlp) * mlp(layers.modulate(norm()(x), shift_mlp, scale_mlp))
        return x, None


class FinalLayer(nn.Module):
    """The last layer: adaLN and a linear map to patches; zero at initialization."""

    out_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B *T D"]) -> Float[Array, "B T out_dim"]:
        zeros = nn.initializers.zeros
        modulation = layers.Dense(2 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="adaLN_modulation")(nn.silu(c))
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)(x)
        x = layers.modulate(x, shift, scale)
        return layers.Dense(self.out_dim, kernel_init=zeros, dtype=self.dtype, name="linear")(x)


class Projector(nn.Module):
    """Three-layer SiLU MLP from SiT tokens, one by one, to one encoder's features."""

    hidden_dim: int
    feature_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        for i, width in enumerate((self.hidden_dim, self.hidden_dim, self.feature_dim)):
            x = layers.Dense(width, kernel_init=layers.xavier, dtype=self.dtype, name=f"fc{i + 1}")(x if i == 0 else nn.silu(x))
        return x


class ConvProjector(nn.Module):
    """The projector of iREPA: one 3x3 convolution over the grid of SiT tokens, to one encoder's features."""

    feature_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rows: int) -> Float[Array, "B T F"]:
        grid = x.reshape(x.shape[0], rows, x.shape[1] // rows, x.shape[2])
        init = layers.torch_default_init(9 * x.shape[2])
        conv = layers.Conv(self.feature_dim, (3, 3), dtype=self.dtype, name="conv", **init)
        return conv(grid).reshape(*x.shape[:2], self.feature_dim)


class PositionEmbedding(nn.Module):
    """Adds a table of positions, initially 2D sin-cos, to tokens; the result is float32."""

    learned: bool  # whether gradients reach the table

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], height: int, width: int) -> Float[Array, "B T D"]:
        def sincos(key, shape):
            return jnp.asarray(layers.sincos_position_embedding(shape[2], height, width)[None])

        table = self.param("table", sincos, (1, height * width, x.shape[-1]))
        return rows_major(x + (table if self.learned else jax.lax.stop_gradient(table)))


class SiT(nn.Module):
    """Scalable interpolant transformer with projectors at block `encoder_depth`.

    Parameters are float32; `dtype` is the compute dtype of matrix products, with the residual stream, layer norms, softmax and
    embeddings in float32, as they are in the published mixed-precision run.

    Published SiTs predict 2C channels, too, but leave the second half unused, and training them needs C. REPA-E's loop trains
    the position table, because it enables the gradients of all parameters again after its VAE phase; SiT, REPA and training on
    a frozen VAE keep the sin-cos table.
    """

    num_classes: int
    latent_channels: int
    patch_size: int  # latent pixels per token side
    hidden_size: int  # D, divisible by num_heads and by 4
    depth: int
    num_heads: int
    encoder_depth: int  # blocks before the alignment tap, 1..depth
    # feature width of each encoder to align with, and last, where it aligns with its average, its own; () builds no projector
    feature_dims: tuple[int, ...] = ()
    projector: str = "mlp"  # REPA's; or 'conv', iREPA's 3x3 convolution
    projector_dim: int = 2048  # hidden width of an 'mlp' projector
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    learned_sigma: bool = False  # predict 2C channels, as DiT does for its variance
    learned_positions: bool = False
    internal_head: bool = False  # a second output layer at the tap, for internal guidance, see `with_tap`
    conditions: int = 0  # numbers besides the time, each with an embedder; then t is a sequence of it and them, as MeanFlow's
    remat: str = "none"  # 'none', 'dots' or 'full', see `layers.scan_blocks`
    unroll: int = 1  # blocks per iteration of the scanned stacks
    attention: layers.Implementation = "xla"
    dtype: DTypeLike = jnp.float32

    @property
    def null_label(self) -> int:
        """Label that stands for "no class", after those of the classes."""
        return self.num_classes

    def setup(self):
        if not 1 <= self.encoder_depth <= self.depth:
            raise ValueError(f"encoder_depth={self.encoder_depth} must lie in 1..depth={self.depth}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        self.x_embedder = layers.Dense(self.hidden_size, kernel_init=layers.xavier, dtype=self.dtype)
        self.pos_embed = PositionEmbedding(self.learned_positions)
        self.t_embedder = TimestepEmbedder(self.hidden_size, dtype=self.dtype)
        self.condition_embedders = [TimestepEmbedder(self.hidden_size, dtype=self.dtype) for _ in range(self.conditions)]
        self.y_embedder = nn.Embed(self.num_classes + 1, self.hidden_size, embedding_init=normal_02)
        self.early_blocks = self._stack("early_blocks", self.encoder_depth)
        if self.encoder_depth < self.depth:  # Orbax refuses zero-size arrays: an empty stack is no stack
            self.late_blocks = self._stack("late_blocks", self.depth - self.encoder_depth)
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector={self.projector!r} is unknown; allowed: {list(PROJECTORS)}")
        projector = ConvProjector if self.projector == "conv" else functools.partial(Projector, self.projector_dim)
        self.projectors = [projector(dim, dtype=self.dtype) for dim in self.feature_dims]
        out_channels = (2 if self.learned_sigma else 1) * self.latent_channels
        self.final_layer = FinalLayer(self.patch_size**2 * out_channels, dtype=self.dtype)
        if self.internal_head:
            if self.encoder_depth == self.depth:
                given = f"encoder_depth={self.encoder_depth} and depth={self.depth}"
                raise ValueError(f"{given}: a head for internal guidance needs blocks after it; lower encoder_depth")
            self.internal_layer = FinalLayer(self.patch_size**2 * out_channels, dtype=self.dtype)

    def _stack(self, name, length):
        return layers.scan_blocks(
            SiTBlock, length, name=name, remat=self.remat, unroll=self.unroll, num_broadcast=1,
            num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, attention=self.attention,
            dtype=self.dtype,
        )  # fmt: skip

    def _embed(self, z_t, t, labels):
        height, width = (side // self.patch_size for side in z_t.shape[1:3])
        x = self.x_embedder(layers.patchify(z_t.astype(self.dtype), self.patch_size))
        x = self.pos_embed(x, height, width)  # the residual stream is float32
        t, *others = t[: 1 + self.conditions] if self.conditions else [t]
        if t.ndim == 3:
            t = t[:, :: self.patch_size, :: self.patch_size].reshape(x.shape[:2])
        times, classes = self.t_embedder(t), self.y_embedder(labels)
        c = times + (classes if times.ndim == 2 else layers.over_tokens(classes))
        return x, sum((embed(number) for embed, number in zip(self.condition_embedders, others)), c)

    def _to_tap(self, z_t, t, labels):
        x, c = self._embed(z_t, t, labels)
        return self.early_blocks(x, c)[0], c

    def _project(self, tokens, z_t):
        rows = () if self.projector == "mlp" else (z_t.shape[1] // self.patch_size,)  # an MLP takes tokens one by one
        return tuple(projector(tokens, *rows).astype(jnp.float32) for projector in self.projectors)

    def tap_tokens(self, z_t: Latents, t: Times, labels: Labels) -> Float[Array, "B T D"]:
        """Returns the hidden states after block `encoder_depth`. Arguments as in `__call__`."""
        return self._to_tap(z_t, t, labels)[0]

    def tokens_after(self, z_t: Latents, t: Times, labels: Labels, blocks: int) -> Float[Array, "B T D"]:
        """Returns the hidden states after so many blocks, more than `encoder_depth`; arguments as in `__call__`.

        Only the parameters of `late_blocks` that it needs are read, and nothing after them is computed.
        """
        x, c = self._to_tap(z_t, t, labels)
        block = self._lone_block()

        def apply_block(x, params):
            return block.apply({"params": unsharded(params)}, x, c)

        late = jax.tree.map(lambda leaf: leaf[: blocks - self.encoder_depth], self.late_blocks.variables["params"])
        return jax.lax.scan(apply_block, x, late)[0]

    def _lone_block(self):
        """Returns a block to apply to the parameters of one layer of a stack."""
        return SiTBlock(self.num_heads, self.mlp_ratio, self.qk_norm, self.attention, self.dtype, parent=None)

    def mean_tokens(self, z_t: Latents, t: Times, labels: Labels) -> Float[Array, "depth B D"]:
        """Returns the hidden states after every block, averaged over the tokens, float32. Arguments as in `__call__`."""
        x, c = self._embed(z_t, t, labels)
        block = self._lone_block()

        def apply_block(x, params):
            x, _ = block.apply({"params": params}, x, c)
            return x, jnp.mean(x, axis=1)

        means = []
        for stack in [self.early_blocks] + ([self.late_blocks] if self.encoder_depth < self.depth else []):
            x, stack_means = jax.lax.scan(apply_block, x, stack.variables["params"])  # calling it gives the last block's x only
            means.append(stack_means)
        return jnp.concatenate(means)

    def align(self, z_t: Latents, t: Times, labels: Labels) -> tuple[Float[Array, "B T F"], ...]:
        """Returns the projections of `__call__`; computes nothing past the tap and needs no `late_blocks`."""
        return self._project(self.tap_tokens(z_t, t, labels), z_t)

    def __call__(self, z_t: Latents, t: Times, labels: Labels) -> tuple[Latents, tuple[Float[Array, "B T F"], ...]]:
        """Returns the float32 velocity of noisy normalized latents, and the projections at the tap, one for each encoder.

        Time 0 is data, 1 is noise; a DiT has 0..999; with `conditions`, t is (t, *conditions). With a time for each token, the
        blocks are modulated token by token. If learned_sigma, the velocity, or DiT's noise, is the first half of 2C channels.
        The output of the head at the tap, if there is one, is sown, see `with_tap`.
        """
        x, c = self._to_tap(z_t, t, labels)
        projections = self._project(x, z_t)
        if self.internal_head:
            internal = self._to_latents(self.internal_layer(x, c), z_t)
            self.sow(_INTERNAL, "output", internal, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if self.encoder_depth < self.depth:
            x, _ = self.late_blocks(x, c)
        return self._to_latents(self.final_layer(x, c), z_t), projections

    def _to_latents(self, patches, z_t):
        return layers.unpatchify(patches.astype(jnp.float32), self.patch_size, z_t.shape[1] // self.patch_size)


class Tap(NamedTuple):
    """What the tap gives."""

    projections: tuple[Float[Array, "B T F"], ...]  # one for each of `feature_dims`
    output: Latents | None  # of the head for internal guidance, which predicts what the SiT does; None without one


def with_tap(sit: SiT, params: Any, z_t: Latents, t: Times, labels: Labels) -> tuple[Latents, Tap]:
    """Returns a SiT's output, and what its tap gives, from one pass.

    The head is another `FinalLayer` after block `encoder_depth`, as in Internal Guidance (arXiv 2512.24176; its LightningDiT's
    `final_layer_xr` after block 8). RAEv2's released network has one, too (2605.18324, `DiTwDDTHeadIG.base_final_layer`); its
    paper derives it from REPA's head, whose predicted features are clean latents where the encoder is the tokenizer.
    """
    (output, projections), sown = sit.apply({"params": params}, z_t, t, labels, mutable=[_INTERNAL])
    return output, Tap(projections, sown.get(_INTERNAL, {}).get("output"))
