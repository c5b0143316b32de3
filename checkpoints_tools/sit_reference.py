"""SiT's output as diffusers' own module computes it, to compare ours with."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from checkpoints_tools.mapping import Tree, to_torch
from checkpoints_tools.sit import sit_table
from repae_jax.models.sit import SiT

# layers' names -> diffusers'
_ENDS = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2", "final_layer.adaLN_modulation.1": "proj_out_1"
}
_EMBEDDERS = {  # in every block, with equal weights
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_LAYERS = {
    "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"
}


def torch_sit(module: SiT, params: Tree, grid: int) -> Callable[[Any, Any, Any], Float[np.ndarray, "B h w C"]]:
    """Returns a function of z_t [B, h, w, C], t [B] and labels [B]: the velocity that diffusers' DiT has with our weights.

    Projectors are left out; `grid` is the number of tokens per side. ValueError for qk_norm or an mlp_ratio other than 4.
    """
    if module.qk_norm or module.mlp_ratio != 4:
        raise ValueError("diffusers' DiT has no qk_norm, and no mlp_ratio but 4: no independent implementation to compare with")
    import torch
    from diffusers import DiTTransformer2DModel
    network = DiTTransformer2DModel(
        num_attention_heads=module.num_heads, attention_head_dim=module.hidden_size // module.num_heads,
        in_channels=module.latent_channels, out_channels=(2 if module.learned_sigma else 1) * module.latent_channels,
        num_layers=module.depth, sample_size=grid * module.patch_size, patch_size=module.patch_size,
        num_embeds_ada_norm=module.num_classes, norm_eps=1e-6,
    )
    embedding = network.transformer_blocks[0].norm1.emb
    embedding.time_proj.downscale_freq_shift = 0  # the frequencies of the published code
    for block in network.transformer_blocks:
        block.norm1.emb = embedding  # theirs embeds time and label in every block, with equal weights
    weights = _diffusers_names(to_torch(sit_table(module, latent_norm=False), {"params": params}), module.depth)
    network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    network.pos_embed.pos_embed.copy_(torch.tensor(np.asarray(params["pos_embed"]["table"])))  # a fixed buffer there
    network.eval()

    def velocity(z_t, t, labels):
        z_t = torch.tensor(np.asarray(z_t, np.float32)).permute(0, 3, 1, 2)
        t, labels = torch.tensor(np.asarray(t, np.float32)), torch.tensor(np.asarray(labels, np.int64))
        with torch.no_grad():
            return network(z_t, t, labels).sample.permute(0, 2, 3, 1).contiguous().numpy()

    return velocity


def torch_projections(module: SiT, params: Tree, tokens: Float[np.ndarray, "B T D"]) -> list[Float[np.ndarray, "B T F"]]:
    """Returns the projections of tokens as torch's own functions compute them."""
    import torch
    from torch.nn.functional import conv2d, linear, silu
    state_dict = to_torch(sit_table(module, latent_norm=False), {"params": params})
    state_dict = {name: torch.tensor(array) for name, array in state_dict.items() if name.startswith("projectors.")}
    projections, side = [], math.isqrt(tokens.shape[1])
    for i in range(len(module.feature_dims)):
        names = sorted({name.rpartition(".")[0] for name in state_dict if name.startswith(f"projectors.{i}.")})
        layers = [(state_dict[f"{name}.weight"], state_dict[f"{name}.bias"]) for name in names]
        x = torch.tensor(np.asarray(tokens, np.float32))
        if module.projector == "conv":
            grid = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            x = conv2d(grid, *layers[0], padding=1).flatten(2).permute(0, 2, 1)
        else:
            for layer in layers:
                x = linear(x if layer is layers[0] else silu(x), *layer)
        projections.append(x.numpy())
    return projections


def _diffusers_names(state_dict, depth):
    renamed = {}
    for name, array in state_dict.items():
        stem, _, kind = name.rpartition(".")
        if stem in _ENDS:
            renamed[f"{_ENDS[stem]}.{kind}"] = array
        elif stem in _EMBEDDERS:
            for i in range(depth):
                renamed[f"transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[stem]}.{kind}"] = array
        elif stem.startswith("blocks."):
            _, i, layer = stem.split(".", 2)
            block = f"transformer_blocks.{i}"
            if layer == "attn.qkv":
                for part, piece in zip("qkv", np.split(array, 3)):
                    renamed[f"{block}.attn1.to_{part}.{kind}"] = piece
            else:
                renamed[f"{block}.{_LAYERS[layer]}.{kind}"] = array
    return renamed
