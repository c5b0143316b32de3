"""Frozen encoders: Hugging Face's Dinov2 checkpoints <-> our vision transformer."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import weights
from checkpoints_tools.mapping import Entry, Table, linear, norm, patch_embedding, stack, to_flax, to_torch
from repae_jax import features

_MODEL_TYPES = ("dinov2", "dinov2_with_registers")


def dinov2_table(vit):
    """Conversion table of a VisionTransformer module against the names in a hub folder's safetensors."""
    torch, flax, patches = "encoder.layer.{i}", "{stack}", "embeddings.patch_embeddings.projection"
    block = norm(f"{torch}.norm1", f"{flax}/norm1") + norm(f"{torch}.norm2", f"{flax}/norm2")
    for name in ("query", "key", "value"):
        block += linear(f"{torch}.attention.attention.{name}", f"{flax}/attn/{name}")
    block += linear(f"{torch}.attention.output.dense", f"{flax}/attn/out")
    for ours, theirs in (("fc1", "weights_in"), ("fc2", "weights_out")):
        block += linear(f"{torch}.mlp.{theirs if vit.swiglu else ours}", f"{flax}/mlp/{ours}")
    for name in ("layer_scale1", "layer_scale2"):
        block.append(Entry((f"{torch}.{name}.lambda1",), (f"{flax}/{name}/scale",)))
    entries = [
        Entry(("embeddings.cls_token",), ("cls_token",)),
        Entry(("embeddings.position_embeddings",), ("pos_embed",)),
        *linear(patches, "patch_embed", patch_embedding(vit.patch_size)),
        *stack(block, {"blocks": range(vit.depth)}),
        *norm("layernorm", "norm"),
    ]
    if vit.num_registers:
        entries.append(Entry(("embeddings.register_tokens",), ("register_tokens",)))
    # only masked training uses it; transformers expects it in the file
    return Table(entries, {"embeddings.mask_token": np.zeros((1, vit.hidden_size), np.float32)})


def load_encoder(path, resolution, image_size=None, dtype=jnp.float32):
    """Frozen encoder from a Hugging Face folder, its positions resampled to the grid in use.

    Args:
      path: folder with config.json and model.safetensors (or shards), or a hub name such as 'facebook/dinov2-base'.
      resolution: height and width of the training images in pixels.
      image_size: pixels that the network receives; by default 224 * resolution // 256.
      dtype: compute dtype; the parameters are float32.

    Returns:
      (features.Encoder, parameters as a nested dict of numpy arrays).

    Raises:
      FileNotFoundError: if the folder or one of its files cannot be had.
      ValueError: for another kind of model, or weights that do not fit config.json.
    """
    folder = weights.resolve(path)
    config = weights.read_config(folder)
    architecture = _architecture(config, folder)
    encoder = features.make_encoder(architecture, resolution, image_size=image_size, dtype=dtype)
    encoder = dataclasses.replace(encoder, name=str(path))
    stored = features.make_encoder(architecture, resolution, image_size=_number(config, "image_size", folder))
    target = jax.eval_shape(functools.partial(features.init_params, stored), jax.random.key(0))
    params = to_flax(dinov2_table(stored.module), weights.read_state_dict(folder), target, source=str(folder))
    params["pos_embed"] = np.asarray(features.resample_positions(params["pos_embed"], encoder.grid))
    return encoder, params


def _architecture(config, folder):
    """VisionTransformer fields from a Dinov2 config.json."""
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(f"{folder} has model_type {model_type!r}; allowed: {', '.join(_MODEL_TYPES)}")
    for key, needed in (("hidden_act", "gelu"), ("num_channels", 3), ("qkv_bias", True)):
        if config.get(key, needed) != needed:
            raise ValueError(f"{folder}/config.json has {key} {config[key]!r}; allowed: {needed!r}, as in DINOv2")
    number = functools.partial(_number, config, folder=folder)
    return {
        "patch_size": number("patch_size"),
        "hidden_size": number("hidden_size"),
        "depth": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "mlp_ratio": number("mlp_ratio"),
        "swiglu": config.get("use_swiglu_ffn", False),
        "num_registers": number("num_register_tokens") if model_type == "dinov2_with_registers" else 0,
        "norm_eps": number("layer_norm_eps"),
    }


def _number(config, key, folder):
    value = config.get(key)
    if isinstance(value, list) and len(set(value)) == 1:  # [height, width] of a square
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{folder}/config.json has {key} {value!r}; allowed: a number (the same for height and width)")
    return value


def save_encoder(folder, module, params, *, overwrite=False):
    """Writes a folder that `load_encoder` and transformers' Dinov2Model.from_pretrained read.

    Args:
      folder: created if absent.
      module: the VisionTransformer, on a square grid.
      params: its parameters.
      overwrite: replace files that exist.

    Raises:
      FileExistsError: if the folder holds an encoder and `overwrite` is False.
      ValueError: if the parameters do not fit the module, or config.json cannot express it.
    """
    rows, columns = module.grid
    if rows != columns or module.mlp_ratio != int(module.mlp_ratio):
        raise ValueError(
            f"grid {tuple(module.grid)}, mlp_ratio {module.mlp_ratio}: Dinov2's config.json knows square grids and "
            "whole ratios only; choose the encoder's sizes accordingly"
        )
    registers = {"num_register_tokens": module.num_registers} if module.num_registers else {}
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "image_size": rows * module.patch_size,
        "patch_size": module.patch_size,
        "num_channels": 3,
        "hidden_size": module.hidden_size,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "mlp_ratio": int(module.mlp_ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_swiglu_ffn": module.swiglu,
        "layer_norm_eps": module.norm_eps,
        **registers,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = to_torch(dinov2_table(module), params)
    # config.json last: a folder without it is not taken for an encoder. transformers asks for the format.
    weights.write_safetensors(folder / "model.safetensors", state_dict, {"format": "pt"}, overwrite=overwrite)
    weights.write_json(folder / "config.json", config, overwrite=overwrite)
