"""VTP's tokenizers: Hugging Face folders of MiniMax' VTPModel <-> our module. The text side is not read, nor written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from etils import epath

from checkpoints_tools import mapping, weights
from checkpoints_tools.mapping import Entry, Layout, StateDict, Table, Tree, linear, norm
from repae_jax import files
from repae_jax.models.vtp import VisualTokenizer

MODEL_TYPE = "vtp"
SIGNATURE = "pixel_decoder.proj_in."  # prefix of a name that only its files have
_AS_CONV = Layout(lambda x: rearrange(x, "o i 1 1 -> i o"), lambda x: rearrange(x, "i o -> o i 1 1"))
# prefixes of arrays that are the text's, or fixed by the network
_IGNORED = (
    "visual_proj.", "text_transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_",
    "attn_mask", "trunk.rope_embed.", "pixel_decoder.rope_embed.",
)  # fmt: skip
# key of config.json -> (field, default of VTPConfig)
_FIELDS = {
    "vision_patch_size": ("patch_size", 16), "vision_embed_dim": ("encoder_hidden_size", 768),
    "vision_depth": ("encoder_depth", 12), "vision_num_heads": ("encoder_heads", 12),
    "vision_feature_bottleneck": ("latent_channels", 64), "decoder_embed_dim": ("decoder_hidden_size", 768),
    "decoder_depth": ("decoder_depth", 12), "decoder_num_heads": ("decoder_heads", 12),
}  # fmt: skip
# what else config.json says of the network, and all that is known of it here; the first is VTPConfig's default
_FIXED = {
    "vision_mlp_ratio": (4.0, 4), "vision_ffn_layer": ("swiglu",), "vision_norm_layer": ("rmsnorm",),
    "vision_init_values": (None,), "vision_use_qk_norm": (False,), "decoder_ffn_layer": ("swiglu",),
    "decoder_norm_layer": ("layernorm",), "decoder_init_values": (None,), "decoder_use_qk_norm": (False,),
    "train_reconstruction": (True,),
}  # fmt: skip


def vtp_table(module: VisualTokenizer) -> Table:
    """Returns the table between the names in the released files and the parameters."""
    patches = mapping.patch_embedding(module.patch_size)
    entries = [
        Entry(("trunk.cls_token",), ("encoder/vit/cls_token",)),
        *linear("trunk.patch_embed.proj", "encoder/vit/patch_embed", patches),
        Entry(("trunk.norm.weight",), ("encoder/vit/norm/scale",)),
        Entry(("trunk.feature_bottleneck.weight",), ("encoder/bottleneck/kernel",), mapping.LINEAR),
        *linear("pixel_decoder.proj_in", "decoder/embed", _AS_CONV),
        *norm("pixel_decoder.norm", "decoder/norm"),
        *_pixel_shuffle("pixel_decoder.proj_out", "decoder/to_pixels", module.patch_size),
    ]
    for theirs, ours, depth in (
        ("trunk", "encoder/vit", module.encoder_depth), ("pixel_decoder", "decoder", module.decoder_depth)
    ):  # fmt: skip
        entries += mapping.stack(_block(f"{theirs}.blocks.{{i}}", f"{ours}/{{stack}}"), {"blocks": range(depth)})
    constants = {"trunk.mask_token": np.zeros((1, module.encoder_hidden_size), np.float32)}
    return Table(entries, constants, _IGNORED)


def _block(torch, flax):
    """Entries of a block; the encoder's norms, RMSNorm, have no bias."""
    norms = ("norm1", "norm2")
    entries = [Entry((f"{torch}.{name}.weight",), (f"{flax}/{name}/scale",)) for name in norms]
    if torch.startswith("pixel_decoder"):
        entries += [Entry((f"{torch}.{name}.bias",), (f"{flax}/{name}/bias",)) for name in norms]
    parts = [f"{flax}/attn/{name}" for name in ("query", "key", "value")]
    entries.append(Entry((f"{torch}.attn.qkv.weight",), tuple(f"{part}/kernel" for part in parts), mapping.LINEAR))
    entries.append(Entry((f"{torch}.attn.qkv.bias",), tuple(f"{part}/bias" for part in parts)))
    for theirs, ours in (("attn.proj", "attn/out"), ("mlp.w1", "mlp/gate"), ("mlp.w2", "mlp/fc1"), ("mlp.w3", "mlp/fc2")):
        entries += linear(f"{torch}.{theirs}", f"{flax}/{ours}")
    return entries


def _pixel_shuffle(torch, flax, patch):
    """Entries of a 1x1 convolution before a pixel shuffle, whose channels are in (channel, row, column) order."""
    sizes = {"c": 3, "p": patch, "q": patch}
    kernel = Layout(
        lambda x: rearrange(x, "(c p q) i 1 1 -> i (p q c)", **sizes),
        lambda x: rearrange(x, "i (p q c) -> (c p q) i 1 1", **sizes),
    )
    bias = Layout(lambda x: rearrange(x, "(c p q) -> (p q c)", **sizes), lambda x: rearrange(x, "(p q c) -> (c p q)", **sizes))
    return [Entry((f"{torch}.weight",), (f"{flax}/kernel",), kernel), Entry((f"{torch}.bias",), (f"{flax}/bias",), bias)]


def abstract_params(module: VisualTokenizer) -> dict[str, Any]:
    """Returns shapes and dtypes of the parameters."""
    inputs = (1, module.patch_size, module.patch_size, 3), (1, 1, 1, module.latent_channels)
    return mapping.abstract_variables(module, *inputs)["params"]


def is_vtp(state_dict: StateDict) -> bool:
    """Returns True if the names are those of a VTPModel with a decoder of pixels."""
    return any(name.startswith(SIGNATURE) for name in state_dict)


def read(state_dict: StateDict, config: Mapping[str, Any], source: Path, **fields: Any) -> tuple[VisualTokenizer, Tree]:
    """Returns the module and its parameters from the content of a folder; ValueError for what is not known here."""
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{source} has {key} {config[key]!r}; allowed: {', '.join(map(repr, allowed))}")
    sizes = {ours: config.get(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{source} has {name} {value!r}; allowed: a positive number")
    module = VisualTokenizer(**sizes, **fields)
    return module, mapping.to_flax(vtp_table(module), state_dict, abstract_params(module), source=str(source))


def save(
    folder: str | Path, module: VisualTokenizer, params: Tree, stats: StateDict | None = None, *, overwrite: bool = False
) -> list[Any]:
    """Writes a folder that `VTPModel.from_pretrained` reads, without the text side; arrays of statistics are a file beside."""
    names = "model.safetensors", "model-latents-stats.safetensors", "config.json"
    weights_file, stats_file, config_file = (epath.Path(folder) / name for name in names)
    config = {
        "architectures": ["VTPModel"], "model_type": MODEL_TYPE, "train_clip": False,
        **{key: allowed[0] for key, allowed in _FIXED.items()},
        **{theirs: getattr(module, ours) for theirs, (ours, _) in _FIELDS.items()},
    }  # fmt: skip
    state_dict = mapping.to_torch(vtp_table(module), params)
    writes = {weights_file: weights.safetensors_writer(state_dict, weights_file, {"format": "pt"})}
    if stats is not None:
        writes[stats_file] = weights.safetensors_writer(stats, stats_file)
    writes[config_file] = files.json_writer(config, config_file)  # last: with it the folder is complete
    return weights.write_files(writes, overwrite=overwrite)
