"""The encoders' tokens as transformers' own modules compute them, to compare ours with."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float

from checkpoints_tools.vit import format_of

_POSITIONS = ("position_embeddings", "position_embedding.weight")


def torch_tokens(folder: Path, pixel_values: Float[np.ndarray, "B 3 S S"]) -> Float[np.ndarray, "B T F"]:
    """Returns the tokens of the PyTorch encoder in a Hugging Face folder: of patches only, rows first, as `encoders.encode`'s.

    Args:
      folder: local folder, of a kind that `vit.load_encoder` reads.
      pixel_values: as `encoders.preprocess` gives them, channels first; S may differ from the size that the folder's positions
        are for, which are then resampled as for our encoder.
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
