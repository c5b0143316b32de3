"""SiT and DiT: the published state dicts <-> {'params': …, 'latent_stats': …}.

Three kinds of files share their names:
    'repae'       with `bn.*`, the latent batch norm, and projectors. t = 0 is data.
    'repa'        projectors, no `bn.*`: latents are the VAE's times 0.18215. t = 0 is data.
    'sit-or-dit'  neither. Plain SiT: t = 0 is noise, see plain_sit.py. DiT: t in 0..999, 0 is data, predicts the noise.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import mapping
from checkpoints_tools.mapping import CONV, COPY, LINEAR, Entry, StateDict, Table, counter, linear, norm, running_stats
from repae_jax.models.sit import SiT

# (hidden size, depth) -> (name, heads, blocks before the alignment tap), which no file holds
_PUBLISHED = {(384, 12): ("S", 6, 4), (768, 12): ("B", 12, 4), (1024, 24): ("L", 16, 8), (1152, 28): ("XL", 16, 8)}
_CONV_PROJECTOR = "projection_layer"  # iREPA's, by public forks of its code; unconfirmed by a file of its authors
_PATCHES, _CLASSES = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
_MLP, _OUTPUT, _Q_NORM = "blocks.0.mlp.fc1.weight", "final_layer.linear.weight", "blocks.0.attn.q_norm.weight"


def check_conditions(sit: SiT) -> None:
    """Raises ValueError for a network that is given more than a time, which neither the published code nor diffusers has."""
    if sit.conditions:
        raise ValueError(
            f"a SiT of MeanFlow is given {1 + sit.conditions} numbers in the place of the time: neither the published code nor "
            "diffusers has such a network"
        )


def sit_table(sit: SiT, updates: int = 0, latent_norm: bool = True) -> Table:
    """Table between the published names and {'params': SiT parameters, 'latent_stats': {'mean', 'var'}}.

    Files of REPA, SiT and DiT have no latent batch norm: without 'latent_stats' if `latent_norm` is False. `updates` is written
    for its `num_batches_tracked`. ValueError for a SiT with a head for internal guidance.
    """
    check_conditions(sit)
    if sit.internal_head:
        raise ValueError(
            "the SiT has a head for internal guidance, trained by config.loss.sit.internal, which neither the published layout "
            "nor diffusers' has a place for: sample and evaluate it here"
        )
    tap = sit.encoder_depth
    entries = [
        *linear("x_embedder.proj", "params/x_embedder", mapping.patch_embedding(sit.patch_size)),
        *linear("t_embedder.mlp.0", "params/t_embedder/fc1"),
        *linear("t_embedder.mlp.2", "params/t_embedder/fc2"),
        Entry(("pos_embed",), ("params/pos_embed/table",)),
        Entry((_CLASSES,), ("params/y_embedder/embedding",)),
        *mapping.stack(_block(sit), {"early_blocks": range(tap), "late_blocks": range(tap, sit.depth)}),
        *linear("final_layer.linear", "params/final_layer/linear"),
        *linear("final_layer.adaLN_modulation.1", "params/final_layer/adaLN_modulation"),
    ]
    for i in range(len(sit.feature_dims)):
        if sit.projector == "conv":
            entries += linear(f"projectors.{i}.{_CONV_PROJECTOR}", f"params/projectors_{i}/conv", CONV)
        else:
            for layer, torch in enumerate((0, 2, 4)):
                entries += linear(f"projectors.{i}.{torch}", f"params/projectors_{i}/fc{layer + 1}")
    if not latent_norm:
        return Table(entries)
    return Table([*entries, *running_stats("bn", "latent_stats")], counter("bn", updates))


def _block(sit):
    entries = []
    for kind, leaf, layout in (("weight", "kernel", LINEAR), ("bias", "bias", COPY)):
        paths = tuple(f"params/{{stack}}/attn/{part}/{leaf}" for part in ("query", "key", "value"))
        entries.append(Entry((f"blocks.{{i}}.attn.qkv.{kind}",), paths, layout))
    layers = {"attn.proj": "attn/out", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2", "adaLN_modulation.1": "adaLN_modulation"}
    for torch, flax in layers.items():
        entries += linear(f"blocks.{{i}}.{torch}", f"params/{{stack}}/{flax}")
    if sit.qk_norm:
        entries += norm("blocks.{i}.attn.q_norm", "params/{stack}/attn/query_norm")
        entries += norm("blocks.{i}.attn.k_norm", "params/{stack}/attn/key_norm")
    return entries


def abstract_sit(sit: SiT, grid: int, latent_norm: bool = True) -> dict[str, Any]:
    """Shapes and dtypes of the Flax side of `sit_table`, for `grid` tokens per side."""
    side, channels = grid * sit.patch_size, sit.latent_channels
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    variables = {"params": mapping.abstract_variables(sit, (1, side, side, channels), (1,), labels)["params"]}
    stats = jax.ShapeDtypeStruct((channels,), jnp.float32)
    return variables | ({"latent_stats": {"mean": stats, "var": stats}} if latent_norm else {})


def layout_of(names: Collection[str]) -> str:
    """Kind of file that a state dict is from, by its names: 'repae', 'repa' or 'sit-or-dit'."""
    if any(name.startswith("bn.") for name in names):
        return "repae"
    return "repa" if any(name.startswith("projectors.") for name in names) else "sit-or-dit"


def check_time(layout: str, source: str) -> None:
    """Raises ValueError for a plain SiT, or a DiT where none is asked for: their time or their output is another one."""
    if layout == "sit-or-dit":
        raise ValueError(
            f"{source} has neither a latent batch norm nor projectors: it is a plain SiT, whose t = 0 is noise, or a DiT, "
            "which predicts noise. Convert a SiT first: python -m checkpoints_tools convert --plain_sit. Of a DiT, which has "
            "sigma channels, ask for sampling with --sampler ancestral, for training with config.diffusion.path='ddpm'"
        )


def rename_legacy(state_dict: StateDict, encoder_depth: int | None = None) -> dict[str, np.ndarray]:
    """Renames blocks after the alignment tap that are called `decoder_blocks.i`, from 0, to today's `blocks.i`.

    ValueError if there are not `encoder_depth` blocks before them. Reference: REPA's `load_legacy_checkpoints`.
    """
    if not mapping.count_layers(state_dict, "decoder_blocks"):
        return dict(state_dict)
    early = mapping.count_layers(state_dict, "blocks")
    if encoder_depth not in (None, early):
        raise ValueError(f"encoder_depth={encoder_depth}, but the file has {early} blocks before its decoder_blocks")
    pattern = re.compile(r"^decoder_blocks\.(\d+)\.")
    return {pattern.sub(lambda m: f"blocks.{int(m[1]) + early}.", name): array for name, array in state_dict.items()}


def grid_of(state_dict: StateDict) -> int:
    """Tokens per side, from `pos_embed` [1, grid * grid, D]; ValueError if it is missing or not square."""
    shape = np.shape(state_dict["pos_embed"]) if "pos_embed" in state_dict else None
    if shape is None or len(shape) != 3 or math.isqrt(shape[1]) ** 2 != shape[1]:
        raise ValueError(f"pos_embed has shape {shape}; needed: (1, grid * grid, D)")
    return math.isqrt(shape[1])


def describe_sit(state_dict: StateDict, encoder_depth: int | None = None, num_heads: int | None = None) -> dict[str, Any]:
    """Fields of the SiT that a state dict of any of the three kinds belongs to, from names and shapes.

    Args:
      encoder_depth: blocks before the alignment tap. By default the number in legacy names; 4 for S and B, 8 for L and XL,
        as published, if there are projectors; otherwise all blocks.
      num_heads: by default the number that qk_norm's width implies, or the published one for S, B, L and XL.
    """
    projectors = mapping.count_layers(state_dict, "projectors")
    is_conv = f"projectors.0.{_CONV_PROJECTOR}.weight" in state_dict
    shapes = _checked_shapes(state_dict, projectors, is_conv)
    width, channels, patch, patch_width = shapes[_PATCHES]
    ratio, rest = divmod(shapes[_OUTPUT][0], patch * patch * channels)
    if patch != patch_width or rest or ratio not in (1, 2):
        advice = "expected square patches and one or two times as many outputs"
        raise ValueError(f"{_PATCHES} {shapes[_PATCHES]} and {_OUTPUT} {shapes[_OUTPUT]} do not fit: {advice}")
    early, late = mapping.count_layers(state_dict, "blocks"), mapping.count_layers(state_dict, "decoder_blocks")
    depth = early + late
    if encoder_depth is None and (late or not projectors):
        encoder_depth = early
    num_heads, encoder_depth = _heads_and_tap(width, depth, num_heads, encoder_depth, shapes.get(_Q_NORM))
    last = _CONV_PROJECTOR if is_conv else "4"
    fields = {
        "hidden_size": width, "depth": depth, "num_heads": num_heads, "encoder_depth": encoder_depth,
        "patch_size": patch, "latent_channels": channels,
        "num_classes": shapes[_CLASSES][0] - 1,  # the last row is "no class"
        "mlp_ratio": shapes[_MLP][0] / width, "qk_norm": _Q_NORM in shapes, "learned_sigma": ratio == 2,
        "feature_dims": tuple(shapes[f"projectors.{i}.{last}.weight"][0] for i in range(projectors)),
    }
    if is_conv:
        return fields | {"projector": "conv"}
    return fields | ({"projector_dim": shapes["projectors.0.0.weight"][0]} if projectors else {})


def _checked_shapes(state_dict, projectors, is_conv):
    """Shapes of the arrays that say the network's sizes, after checking their numbers of axes."""
    ranks = {_PATCHES: 4, _CLASSES: 2, _MLP: 2, _OUTPUT: 2} | ({_Q_NORM: 1} if _Q_NORM in state_dict else {})
    layers = {_CONV_PROJECTOR: 4} if is_conv else {"0": 2, "4": 2}
    ranks |= {f"projectors.{i}.{layer}.weight": rank for i in range(projectors) for layer, rank in layers.items()}
    shapes = {name: np.shape(state_dict[name]) for name in ranks if name in state_dict}
    problems = [f"missing: {name}" for name in ranks if name not in shapes]
    unfit = {name: shape for name, shape in shapes.items() if len(shape) != ranks[name] or 0 in shape}
    problems += [f"{name} {shape}: expected {ranks[name]} axes, none empty" for name, shape in unfit.items()]
    if problems:
        raise ValueError(f"no state dict of a SiT or DiT: {'; '.join(problems)}")
    return shapes


def _heads_and_tap(width, depth, num_heads, encoder_depth, q_norm):
    """(heads, blocks before the tap), published numbers where nothing else says them."""
    _, published_heads, published_tap = _PUBLISHED.get((width, depth), (None, None, None))
    if q_norm:
        implied = width // q_norm[0]
        if num_heads not in (None, implied):
            raise ValueError(f"num_heads={num_heads}, but {_Q_NORM} {q_norm} in width {width} makes {implied} heads")
        num_heads = implied
    num_heads = num_heads or published_heads
    encoder_depth = published_tap if encoder_depth is None else encoder_depth
    if num_heads is None or encoder_depth is None:
        tap = "after which block its projectors stand: give encoder_depth"
        missing = "the number of heads: give num_heads" if num_heads is None else tap
        size = f"hidden size {width} and depth {depth}"
        raise ValueError(f"{size} are none of S, B, L or XL, and the file does not tell {missing}")
    return num_heads, encoder_depth


def model_name(sit: SiT) -> str | None:
    """Published name of a SiT's size, such as 'SiT-XL/2'; None if it has none."""
    name, heads, _ = _PUBLISHED.get((sit.hidden_size, sit.depth), (None, None, None))
    return f"SiT-{name}/{sit.patch_size}" if name and heads == sit.num_heads and sit.mlp_ratio == 4 else None


@dataclass(frozen=True)
class LoadedSiT:
    """A SiT or DiT read from a file."""

    module: SiT
    variables: dict[str, Any]  # {'params': …}, float32, and of 'repae' files 'latent_stats': {'mean', 'var'}, each [C]
    layout: str  # 'repae', 'repa' or 'sit-or-dit'
    grid: int  # tokens per side


def from_state_dict(
    state_dict: StateDict, source: str, encoder_depth: int | None = None, num_heads: int | None = None, dtype: Any = jnp.float32
) -> LoadedSiT:
    """Returns a SiT or DiT from a published state dict, its sizes inferred. Time runs as in the file, see plain_sit.py.

    Raises ValueError, naming the source, for a damaged or another network, or if a number is needed, see `describe_sit`.
    """
    try:
        fields = describe_sit(state_dict, encoder_depth, num_heads)
        state_dict = rename_legacy(state_dict, fields["encoder_depth"])
        grid, layout = grid_of(state_dict), layout_of(state_dict)
        module = SiT(**fields, dtype=dtype)
        has_norm = layout == "repae"
        target = abstract_sit(module, grid, has_norm)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    variables = mapping.to_flax(sit_table(module, latent_norm=has_norm), state_dict, target, source=source)
    if has_norm and not (smallest := variables["latent_stats"]["var"].min()) > 0:
        raise ValueError(f"{source}: bn.running_var must be positive; its smallest entry is {smallest}")
    return LoadedSiT(module, variables, layout, grid)
