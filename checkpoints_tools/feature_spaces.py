"""Networks of feature spaces: weights as timm or transformers write them -> the parameters of `Space.module`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools import locate, mapping, vit, weights
from checkpoints_tools.mapping import CONV, COPY, LINEAR, Entry, Layout, StateDict, Table, linear, norm
from checkpoints_tools.vit_formats import MOCOV3, Format
from repae_jax.models.convnext import ConvNextV2
from repae_jax.models.feature_spaces import SPACES, ImageFeatures, Space

# timm's vision transformers; MoCo v3 is one of them
TIMM = dataclasses.replace(
    MOCOV3,
    names={**MOCOV3.names, "pre_norm": "norm_pre"},
    block={**MOCOV3.block, "layer_scale1": "ls1.gamma", "layer_scale2": "ls2.gamma"},
    layouts={}, renames={}, ignored=("head.",),
)  # fmt: skip
_RESPONSE = Layout(lambda x: x.reshape(-1), lambda x: x)  # transformers has three axes of 1 before
# our layers of a ConvNeXt's block -> PyTorch's, of timm and of transformers
_TIMM_BLOCK = {
    "depthwise": "conv_dw", "norm": "norm", "fc1": "mlp.fc1", "response_norm": "mlp.grn", "fc2": "mlp.fc2",
}  # fmt: skip
_HF_BLOCK = {"depthwise": "dwconv", "norm": "layernorm", "fc1": "pwconv1", "response_norm": "grn", "fc2": "pwconv2"}


def load_space(name: str, path: str | Path) -> tuple[Space, dict[str, Any]]:
    """Returns a feature space, one of SPACES, with the float32 parameters of its network, from a local path or a hub name.

    The weights are timm's or transformers'. ValueError if they are of another network.
    """
    if name not in SPACES:
        raise ValueError(f"feature space {name!r} is unknown; allowed: {', '.join(SPACES)}")
    return SPACES[name], read_params(SPACES[name], locate.resolve(path))


def read_params(space: Space, path: Path) -> dict[str, Any]:
    """Returns the parameters of a space's network from a local file or folder."""
    read = _read_convnext if isinstance(space.module, ConvNextV2) else _read_vit
    try:
        return read(space, weights.read_file(path), path)
    except ValueError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise
        found = f"{lines[0].rpartition(': ')[2]}, first {lines[1].strip()}"
        raise ValueError(f"{path} does not fit the network of {space.weights} ({found}): give those weights") from error


def convnext_table(module: ConvNextV2, of_timm: bool) -> Table:
    """Table of a ConvNeXt V2, with timm's names or with transformers'."""
    if of_timm:
        stem, reduce, blocks, block = ("stem.0", "stem.1"), "stages.{}.downsample", "stages.{}.blocks.{{i}}.", _TIMM_BLOCK
        ignored = ("head.",)
    else:
        stem = ("embeddings.patch_embeddings", "embeddings.layernorm")
        reduce, blocks = "encoder.stages.{}.downsampling_layer", "encoder.stages.{}.layers.{{i}}."
        block, ignored = _HF_BLOCK, ("layernorm.", "classifier.")
    entries = [*linear(stem[0], "stem", CONV), *norm(stem[1], "stem_norm")]
    for stage, depth in enumerate(module.depths):
        if stage:
            entries += norm(f"{reduce.format(stage)}.0", f"reduce{stage}_norm")
            entries += linear(f"{reduce.format(stage)}.1", f"reduce{stage}", CONV)
        names, layers = {ours: blocks.format(stage) + theirs for ours, theirs in block.items()}, []
        layers += linear(names["depthwise"], "{stack}/depthwise", CONV)
        layers += norm(names["norm"], "{stack}/norm")
        for part in ("fc1", "fc2"):
            layers += linear(names[part], f"{{stack}}/{part}")
        for theirs, ours in (("weight", "scale"), ("bias", "bias")):
            layers.append(Entry((f"{names['response_norm']}.{theirs}",), (f"{{stack}}/response_norm/{ours}",), _RESPONSE))
        entries += mapping.stack(layers, {f"stage{stage}": range(depth)})
    return Table(entries, ignored=ignored)


def _read_convnext(space, state_dict, path):
    of_timm = any(name.startswith("stem.") for name in state_dict)
    if not of_timm:
        state_dict = {name.removeprefix("convnextv2."): array for name, array in state_dict.items()}
    target = mapping.abstract_variables(space.module, (1, 64, 64, 3))["params"]
    return mapping.to_flax(convnext_table(space.module, of_timm), state_dict, target, source=str(path))


def _read_vit(space, state_dict, path):
    of_timm = any(name.startswith("blocks.") for name in state_dict)
    if not of_timm and not path.is_dir():
        found = f"{path} holds {min(state_dict, default='nothing')} and no blocks of a vision transformer by timm"
        raise ValueError(f"{found}: give {space.weights}, or of transformers' the folder, with its config.json")
    format = TIMM if of_timm else vit.format_of(path)[0]
    state_dict = vit.rename(state_dict, format, path)
    table = image_features_table(space.module, format)
    prefix, side = space.module.vit.num_class_tokens, _stored_side(space.module, format, state_dict, path)
    stored = space.module.clone(vit=space.module.vit.clone(grid=(side, side)))
    pixels = side * stored.vit.patch_size
    target = mapping.abstract_variables(stored, (1, pixels, pixels, 3))["params"]
    params = mapping.to_flax(table, state_dict, target, source=str(path))
    resampled = space.positions(params["vit"]["pos_embed"], space.module.vit.grid[0], prefix)
    return {**params, "vit": {**params["vit"], "pos_embed": np.asarray(resampled)}}


def _stored_side(module: ImageFeatures, format: Format, state_dict: StateDict, path: Path) -> int:
    """Returns the patches per side of the table of positions in a file."""
    name = format.names["pos_embed"]
    if np.ndim(state_dict.get(name)) not in (2, 3):  # transformers' may lack the axis of the batch
        needed = "a vision transformer's weights, as timm or transformers write them"
        raise ValueError(f"{path} has no {name} [1, positions, width]; needed: {needed}")
    return math.isqrt(max(1, np.shape(state_dict[name])[-2] - module.vit.num_class_tokens))


def image_features_table(module: ImageFeatures, format: Format) -> Table:
    """Table of a vision transformer with the head that makes one vector, in timm's format or one of transformers'."""
    table = vit.encoder_table(module.vit, format)
    entries = [dataclasses.replace(entry, flax=tuple(f"vit/{path}" for path in entry.flax)) for entry in table.entries]
    of_timm = format is TIMM
    if module.projection is not None:
        entries.append(Entry(("head.weight" if of_timm else "visual_projection.weight",), ("projection/kernel",), LINEAR))
    if not module.vit.num_class_tokens:
        entries += _TIMM_POOL if of_timm else _HF_POOL
    return dataclasses.replace(table, entries=entries)


def _pool(names: Mapping[str, str], weight: str, bias: str) -> list[Entry]:
    """Entries of layers of the attention pool; several of ours, with spaces between, share one of PyTorch's arrays."""
    entries = []
    for ours, theirs in names.items():
        paths = [f"pool/{part}" for part in ours.split()]
        entries.append(Entry((f"{theirs}{weight}",), tuple(f"{path}/kernel" for path in paths), LINEAR))
        entries.append(Entry((f"{theirs}{bias}",), tuple(f"{path}/bias" for path in paths)))
    return entries


_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_TIMM_POOL = [
    Entry(("attn_pool.latent",), ("pool/probe",), COPY),
    *_pool({"query": "attn_pool.q", "key value": "attn_pool.kv", "out": "attn_pool.proj"}, ".weight", ".bias"),
    *norm("attn_pool.norm", "pool/norm"),
    *_pool({ours: f"attn_pool.{theirs}" for ours, theirs in _MLP.items()}, ".weight", ".bias"),
]
_HF_POOL = [
    Entry(("head.probe",), ("pool/probe",), COPY),
    *_pool({"query key value": "head.attention.in_proj"}, "_weight", "_bias"),
    *_pool({"out": "head.attention.out_proj"}, ".weight", ".bias"),
    *norm("head.layernorm", "pool/norm"),
    *_pool({ours: f"head.{theirs}" for ours, theirs in _MLP.items()}, ".weight", ".bias"),
]
