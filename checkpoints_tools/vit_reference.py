"""The encoders' tokens as transformers' own modules compute them, to compare ours with."""

import math

import numpy as np

from checkpoints_tools.vit import format_of

_POSITIONS = ("position_embeddings", "position_embedding.weight")


def torch_tokens(folder, pixel_values):
    """Tokens of the PyTorch encoder in a Hugging Face folder.

    Args:
      folder: local folder, of a kind that `vit.load_encoder` reads.
      pixel_values: float [B, 3, S, S] as `features.preprocess` gives it, channels first; S may differ from the size that the
        folder's positions are for, which are then resampled as for our encoder.

    Returns:
      float32 numpy [B, T, F], the same tokens as `features.encode`'s: of patches only, rows first.

    Raises:
      FileNotFoundError: if there is no config.json or no weights.
      ValueError: for a kind of model that `vit.load_encoder` does not know, or another shape of pixels.
      ImportError: if torch or transformers is not installed.
    """
    import torch
    import transformers

    format, _ = format_of(folder)
    model_class = getattr(transformers, format.model_class)
    settings = {"local_files_only": True, "dtype": torch.float32}
    if format.model_class in ("ViTModel", "IJepaModel"):
        settings["add_pooling_layer"] = False  # whose weights the files may lack
    model = model_class.from_pretrained(folder, **settings)
    config = model.config
    pixels = torch.tensor(np.asarray(pixel_values, np.float32))
    size = pixels.shape[-1]
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or size % config.patch_size:
        raise ValueError(
            f"pixel_values have shape {list(pixels.shape)}; allowed: [B, 3, S, S] with S a multiple of {config.patch_size}"
        )
    grid = size // config.patch_size

    table = _positions(model)
    if table is not None:
        width = table.shape[-1]
        table = table.detach().reshape(-1, width)
        prefix = len(table) - math.isqrt(len(table)) ** 2  # 1 with a class token
        if len(table) != prefix + grid**2:
            table = torch.cat([table[:prefix], _resample(table[prefix:], grid)])
            for key, value in (("image_size", size), ("num_patches", grid**2)):
                if hasattr(config, key):
                    setattr(config, key, value)
            # modules keep sizes and buffers made for their table: a model of the other size, then the table
            del model  # two large ones need not fit into memory
            model = model_class.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **settings)
            _positions(model).data.copy_(table.reshape(_positions(model).shape))

    inputs = {"pixel_values": pixels}
    if config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        inputs["noise"] = torch.arange(grid**2, dtype=torch.float32).expand(len(pixels), -1)  # patches in their order
        model.layernorm = torch.nn.Identity()
    if config.model_type == "siglip2_vision_model":
        patches = pixels.reshape(len(pixels), 3, grid, config.patch_size, grid, config.patch_size)
        inputs = {
            "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
            "pixel_attention_mask": torch.ones(len(pixels), grid**2, dtype=torch.long),
            "spatial_shapes": torch.full((len(pixels), 2), grid),
        }
    with torch.inference_mode():
        tokens = model.eval()(**inputs).last_hidden_state
    return tokens[:, -(grid**2) :].numpy()


def _positions(model):
    """The learned position table of a transformers module, if it has one."""
    return next((parameter for name, parameter in model.named_parameters() if name.endswith(_POSITIONS)), None)


def _resample(table, grid):
    """[N, D] -> [grid ** 2, D] by timm's rule."""
    import torch

    old = math.isqrt(len(table))
    maps = table.T.reshape(1, -1, old, old)
    resized = torch.nn.functional.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
    return resized.flatten(2)[0].T
