"""SiT, and DiT with the time embedding that it was published with, on the blocks of diffusers' DiTTransformer2DModel."""

from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from torch import nn


class SiTTransformer2DModel(DiTTransformer2DModel):
    """DiTTransformer2DModel with what SiT and DiT have and it has not.

    The frequencies of the time embedding are the published ones, time and label are embedded once and not in every block, and
    the positions are stored, as they may be trained. Queries and keys may be normalized (`qk_norm`), and the hidden layers of
    the blocks may have another width (`mlp_ratio`).
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        norm_eps: float = 1e-6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_eps=norm_eps,
        )
        width = num_attention_heads * attention_head_dim
        embedder = self.transformer_blocks[0].norm1.emb
        embedder.time_proj.downscale_freq_shift = 0
        for block in self.transformer_blocks:
            if block.norm1.emb is not embedder:
                del block.norm1.emb
                object.__setattr__(block.norm1, "emb", embedder)  # past torch, which would store it with every block
            if mlp_ratio != 4:
                block.ff = FeedForward(width, activation_fn="gelu-approximate", inner_dim=int(width * mlp_ratio))
            if qk_norm:
                block.attn1.norm_q = nn.LayerNorm(attention_head_dim, eps=1e-5)
                block.attn1.norm_k = nn.LayerNorm(attention_head_dim, eps=1e-5)
        self.pos_embed.register_buffer("pos_embed", self.pos_embed.pos_embed, persistent=True)
