"""Our networks as diffusers' and transformers' own modules compute them, to compare ours with. NCHW; all need torch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from checkpoints_tools import rae
from checkpoints_tools.dit_names import to_diffusers
from checkpoints_tools.mapping import Tree, to_torch
from checkpoints_tools.sit import sit_table
from checkpoints_tools.vae import diffusers_config
from checkpoints_tools.vae_layouts import DIFFUSERS, vae_table, without_projection
from checkpoints_tools.vit import format_of
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.layers import sincos_position_embedding
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.models.sit import SiT

_POSITIONS = ("position_embeddings", "position_embedding.weight")


def torch_vae(module: AutoencoderKL, params: Tree) -> Any:
    """Returns diffusers' AutoencoderKL with the same weights, in eval mode."""
    import diffusers
    import torch
    module, params = without_projection(module, params)
    config = {name: value for name, value in diffusers_config(module).items() if name != "_class_name"}
    vae = diffusers.AutoencoderKL(**config)
    state_dict = to_torch(vae_table(module, DIFFUSERS), params)
    vae.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, strict=True)
    return vae.eval()


def torch_rae(module: RepresentationAutoencoder, params: Tree) -> Any:
    """Returns diffusers' AutoencoderRAE with the same weights, in eval mode, whichever version of transformers is installed.

    Its decoder has our positions, those of the published code: diffusers' own are stretched to a grid of 16.
    """
    import diffusers
    import torch
    config = {name: value for name, value in rae.config_of(module, params).items() if name != "_class_name"}
    network, state_dict = diffusers.AutoencoderRAE(**config), rae.state_dict_of(module, params)
    if any(new in name for name in network.state_dict() for new in rae.RENAMED):
        state_dict = {rae.to_transformers_5(name): array for name, array in state_dict.items()}
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, strict=True)
    table = sincos_position_embedding(module.decoder_hidden_size, module.grid, module.grid)
    network.decoder.decoder_pos_embed[:, 1:] = torch.from_numpy(table)
    return network.eval()


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
    weights = to_diffusers(to_torch(sit_table(module, latent_norm=False), {"params": params}))
    network.pos_embed.pos_embed.copy_(torch.tensor(weights["pos_embed.pos_embed"]))  # a fixed buffer there
    for name, parameter in network.named_parameters():  # a shared one is listed once
        parameter.data.copy_(torch.tensor(weights[name]))
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


def torch_tokens(folder: Path, pixel_values: Float[np.ndarray, "B 3 S S"]) -> Float[np.ndarray, "B T F"]:
    """Returns the tokens of the PyTorch encoder in a Hugging Face folder: of patches only, rows first, as `encoders.encode`'s.

    Pixels are as `encoders.preprocess` gives them, channels first. S may differ from the size that the folder's positions are
    for, which are then resampled as for our encoder.
    """
    import torch
    import transformers
    format, _ = format_of(folder)
    model_class = getattr(transformers, format.model_class)
    options = {"local_files_only": True, "dtype": torch.float32, **format.torch_options}
    model = model_class.from_pretrained(folder, **options)
    pixels = torch.tensor(np.asarray(pixel_values, np.float32))
    size, patch = pixels.shape[-1], model.config.patch_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or size % patch:
        raise ValueError(f"pixel_values have shape {list(pixels.shape)}; allowed: [B, 3, S, S] with S a multiple of {patch}")
    grid = size // patch
    positions = _positions(model)
    if positions is not None and (table := _on_grid(positions, grid)) is not None:
        config = model.config
        for key, value in (("image_size", size), ("num_patches", grid**2)):
            if hasattr(config, key):
                setattr(config, key, value)
        # modules keep sizes and buffers made for their table: a model of the other size, then the table
        del model, positions  # two large ones need not fit into memory
        model = model_class.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **options)
        _positions(model).data.copy_(table.reshape(_positions(model).shape))
    with torch.inference_mode():
        tokens = model.eval()(**_inputs(model, pixels, grid)).last_hidden_state
    return tokens[:, -(grid**2) :].numpy()


def _inputs(model, pixels, grid):
    """Arguments of the module's forward pass; a MAE without masking and without the norm behind the tokens."""
    import torch
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        model.layernorm = torch.nn.Identity()
        return {"pixel_values": pixels, "noise": torch.arange(grid**2, dtype=torch.float32).expand(len(pixels), -1)}
    if model.config.model_type == "siglip2_vision_model":
        patches = pixels.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [B, 3, grid, p, grid, p]
        return {
            "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
            "pixel_attention_mask": torch.ones(len(pixels), grid**2, dtype=torch.long),
            "spatial_shapes": torch.full((len(pixels), 2), grid),
        }
    return {"pixel_values": pixels}


def _positions(model):
    """The learned position table of a transformers module, if it has one."""
    return next((parameter for name, parameter in model.named_parameters() if name.endswith(_POSITIONS)), None)


def _on_grid(positions, grid):
    """The table for grid ** 2 patches, resampled by timm's rule, as [T, D]; None if that is its own grid."""
    import torch
    table = positions.detach().reshape(-1, positions.shape[-1])
    old = math.isqrt(len(table))
    prefix = len(table) - old**2  # 1 with a class token
    if old == grid:
        return None
    maps = table[prefix:].T.reshape(1, -1, old, old)
    resized = torch.nn.functional.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([table[:prefix], resized.flatten(2)[0].T])
