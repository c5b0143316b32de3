"""AutoencoderKL: the names of the published layouts <-> our parameters.

One description of the network's modules (`_entries`), and for each layout the names of these modules there.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from checkpoints_tools.mapping import CONV, LINEAR, Entry, Layout, StateDict, Table, Tree, abstract_variables, linear, norm
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.vae_families import VaeModule

NORM_GROUPS = 32  # every published network has 32; only diffusers' config.json can say otherwise
# 1x1 convolution [1, 1, in, out] kept as a linear layer [out, in]
_POINTWISE = Layout(lambda x: LINEAR.to_flax(x)[None, None], lambda x: LINEAR.to_torch(x[0, 0]))
# and the other way round: our linear layer [in, out] kept as a 1x1 convolution [out, in, 1, 1]
_AS_CONV = Layout(lambda x: rearrange(x, "o i 1 1 -> i o"), lambda x: rearrange(x, "i o -> o i 1 1"))
_Contents = TypeVar("_Contents", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Names:
    """Names of our modules in one layout."""

    layout: str  # its name, for messages
    modules: Mapping[str, str]  # our path -> the name there; {depth} counts the decoder's levels from the lowest resolution
    shortcut: str  # the 1x1 convolution of a residual block
    attention: tuple[str, str, str, str, str]  # norm, q, k, v, proj_out
    projection: Layout  # layout of the weights of the last four
    vf_projection: str | None = None  # our map from latents to an encoder's tokens, of LightningDiT's training
    ignored: tuple[str, ...] = ()  # prefixes of names that a file may hold besides


_IN_BOTH = {name: name.replace("/", ".") for name in ("{half}/conv_in", "{half}/conv_out", "quant_conv", "post_quant_conv")}
COMPVIS = Names(
    layout="compvis",
    modules=_IN_BOTH | {
        "{half}/mid_block_{i}": "{half}.mid.block_{i}",
        "{half}/mid_attn_{i}": "{half}.mid.attn_{i}",
        "{half}/norm_out": "{half}.norm_out",
        "encoder/down_{level}_block_{i}": "encoder.down.{level}.block.{i}",
        "encoder/down_{level}_attn_{i}": "encoder.down.{level}.attn.{i}",
        "encoder/down_{level}_downsample": "encoder.down.{level}.downsample.conv",
        "decoder/up_{level}_block_{i}": "decoder.up.{level}.block.{i}",
        "decoder/up_{level}_attn_{i}": "decoder.up.{level}.attn.{i}",
        "decoder/up_{level}_upsample": "decoder.up.{level}.upsample.conv",
    },
    shortcut="nin_shortcut", attention=("norm", "q", "k", "v", "proj_out"), projection=CONV, vf_projection="linear_proj",
    # losses and averages of the original training; VA-VAE's encoder, and the other way round, its map from tokens to latents
    ignored=("loss.", "model_ema.", "foundation_model.", "linear_proj."),
)
DIFFUSERS = Names(
    layout="diffusers",
    modules=_IN_BOTH | {
        "{half}/mid_block_{i}": "{half}.mid_block.resnets.{before}",
        "{half}/mid_attn_{i}": "{half}.mid_block.attentions.{before}",
        "{half}/norm_out": "{half}.conv_norm_out",
        "encoder/down_{level}_block_{i}": "encoder.down_blocks.{level}.resnets.{i}",
        "encoder/down_{level}_attn_{i}": "encoder.down_blocks.{level}.attentions.{i}",
        "encoder/down_{level}_downsample": "encoder.down_blocks.{level}.downsamplers.0.conv",
        "decoder/up_{level}_block_{i}": "decoder.up_blocks.{depth}.resnets.{i}",
        "decoder/up_{level}_attn_{i}": "decoder.up_blocks.{depth}.attentions.{i}",
        "decoder/up_{level}_upsample": "decoder.up_blocks.{depth}.upsamplers.0.conv",
    },
    shortcut="conv_shortcut", attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"), projection=_POINTWISE,
)
# files of 2022, such as stabilityai/sd-vae-ft-mse
DIFFUSERS_2022 = replace(DIFFUSERS, layout="diffusers of 2022", attention=("group_norm", "query", "key", "value", "proj_attn"))
# by the name that the published scripts know
_PUBLISHED = {
    "f8d4": AutoencoderKL(latent_channels=4, channel_multipliers=(1, 2, 4, 4)),
    "f16d32": AutoencoderKL(latent_channels=32, channel_multipliers=(1, 1, 2, 2, 4), attention_levels=(4,)),
}
# fields of AutoencoderKL that say which weights it has
SIZES = (
    "latent_channels", "channels", "channel_multipliers", "num_res_blocks", "attention_levels", "norm_groups", "quant_convs"
)


def published_name(vae: VaeModule) -> str | None:
    """The published scripts' name of a VAE of these sizes, 'f8d4' or 'f16d32'; None if they have none."""
    if not isinstance(vae, AutoencoderKL):
        return None
    plain = vae.clone(dtype=jnp.float32, remat=False, feature_dim=None)
    return next((name for name, published in _PUBLISHED.items() if plain == published), None)


def vae_table(vae: AutoencoderKL, names: Names = COMPVIS) -> Table:
    """Table between a layout's names and the parameters of an AutoencoderKL module, which says the sizes."""
    return Table(list(_entries(vae, names)), ignored=names.ignored)


def abstract_params(vae: AutoencoderKL) -> dict[str, Any]:
    """Shapes and dtypes of an AutoencoderKL's parameters."""
    size = 2 * vae.factor
    return abstract_variables(vae, (1, size, size, 3), (1, 2, 2, vae.latent_channels))["params"]


def without_projection(vae: AutoencoderKL, params: Tree) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Returns the module and the parameters without the map from latents to tokens, if there is one."""
    return vae.clone(feature_dim=None), {name: tree for name, tree in params.items() if name != "vf_projection"}


def _entries(vae, names):
    widths = [vae.channels * multiplier for multiplier in vae.channel_multipliers]
    top, blocks = len(widths) - 1, vae.num_res_blocks

    def place(path, **at):
        return names.modules[path].format(**at), path.format(**at)

    def conv(path, **at):
        return linear(*place(path, **at), CONV)

    def resnet(path, shortcut=False, **at):
        torch, flax = place(path, **at)
        for name in ("norm1", "norm2"):
            yield from norm(f"{torch}.{name}", f"{flax}/{name}")
        for name in ("conv1", "conv2"):
            yield from linear(f"{torch}.{name}", f"{flax}/{name}", CONV)
        if shortcut:
            yield from linear(f"{torch}.{names.shortcut}", f"{flax}/nin_shortcut", CONV)

    def attention(path, **at):
        torch, flax = place(path, **at)
        yield from norm(f"{torch}.{names.attention[0]}", f"{flax}/norm")
        for theirs, ours in zip(names.attention[1:], ("q", "k", "v", "proj_out")):
            yield from linear(f"{torch}.{theirs}", f"{flax}/{ours}", names.projection)

    def level_blocks(half, side, level, count, before):
        for i in range(count):
            at = {"level": level, "depth": top - level, "i": i}
            yield from resnet(f"{half}/{side}_{{level}}_block_{{i}}", shortcut=i == 0 and before != widths[level], **at)
            if level in vae.attention_levels:
                yield from attention(f"{half}/{side}_{{level}}_attn_{{i}}", **at)

    for half in ("encoder", "decoder"):
        yield from conv("{half}/conv_in", half=half)
        for i in (1, 2):
            yield from resnet("{half}/mid_block_{i}", half=half, i=i, before=i - 1)
        yield from attention("{half}/mid_attn_{i}", half=half, i=1, before=0)
        yield from norm(*place("{half}/norm_out", half=half))
        yield from conv("{half}/conv_out", half=half)
    for level in range(top + 1):
        yield from level_blocks("encoder", "down", level, blocks, widths[level - 1] if level else vae.channels)
        yield from level_blocks("decoder", "up", level, blocks + 1, widths[min(level + 1, top)])
        if level < top:
            yield from conv("encoder/down_{level}_downsample", level=level)
        if level > 0:
            yield from conv("decoder/up_{level}_upsample", level=level, depth=top - level)
    if vae.quant_convs:
        yield from conv("quant_conv")
        yield from conv("post_quant_conv")
    if vae.feature_dim is not None and names.vf_projection:
        yield Entry((f"{names.vf_projection}.weight",), ("vf_projection/kernel",), _AS_CONV)


def detect_layout(state_dict: _Contents, source: str | Path) -> tuple[Names, _Contents]:
    """Returns the layout of a state dict, from its names alone, and the part that belongs to the VAE; ValueError if unknown.

    That part is all, or within a whole Stable Diffusion file the names after its prefix.
    """
    prefix = "first_stage_model."
    inside = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    state_dict = inside or state_dict
    if _has(state_dict, "encoder.down.", "decoder.up."):
        return COMPVIS, state_dict
    if _has(state_dict, "encoder.down_blocks.", "decoder.up_blocks."):
        is_old = _has(state_dict, *(f"{half}.mid_block.attentions.0.query." for half in ("encoder", "decoder")))
        return (DIFFUSERS_2022 if is_old else DIFFUSERS), state_dict
    raise ValueError(
        f"{source} is no AutoencoderKL in a known layout: neither CompVis names (encoder.down.0.block.0…, alone or after "
        f"{prefix}) nor diffusers' (encoder.down_blocks.0.resnets.0…), but {', '.join(sorted(state_dict)[:3]) or 'nothing'}…"
    )


def _has(names, *prefixes):
    return any(name.startswith(prefixes) for name in names)


def infer_module(
    state_dict: StateDict, names: Names, source: str | Path, norm_groups: int = NORM_GROUPS, **fields: Any
) -> AutoencoderKL:
    """Returns the AutoencoderKL of these weights, by names and shapes; no shape implies its group-norm groups.

    Only arrays that say a size have to be there; the others are the table's to check.
    """

    def has(path, **at):
        return _has(state_dict, names.modules[path].format(**at) + ".")

    def count(is_there):
        return next(n for n in itertools.count() if not is_there(n))

    def size(path, leaf, axis, **at):
        name = f"{names.modules[path].format(**at)}.{leaf}"
        if name not in state_dict:
            raise ValueError(f"{source}: missing in file: {name}, which tells the network's sizes")
        shape = np.shape(state_dict[name])
        if len(shape) <= axis:
            raise ValueError(f"{source}: wrong shape: {name} {shape} has too few axes")
        return shape[axis]

    levels = count(lambda level: has("encoder/down_{level}_block_{i}", level=level, i=0))
    channels = size("{half}/conv_in", "bias", 0, half="encoder")
    widths = [size("encoder/down_{level}_block_{i}", "conv2.bias", 0, level=level, i=0) for level in range(levels)]
    if not channels or not widths or any(width % channels for width in widths):
        raise ValueError(f"{source}: the encoder's levels have widths {widths}, which are no multiples of the base {channels}")
    if any(width % norm_groups for width in widths):
        raise ValueError(f"{source}: {norm_groups} group-norm groups do not divide the widths {widths}")
    to_tokens = np.shape(state_dict.get(f"{names.vf_projection}.weight", 0))
    # VA-VAE's `linear_proj` of the other direction has a bias
    has_map = len(to_tokens) == 4 and f"{names.vf_projection}.bias" not in state_dict
    return AutoencoderKL(
        latent_channels=size("{half}/conv_in", "weight", 1, half="decoder"),
        channels=channels, channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=count(lambda i: has("encoder/down_{level}_block_{i}", level=0, i=i)),
        attention_levels=tuple(n for n in range(levels) if has("encoder/down_{level}_attn_{i}", level=n, i=0)),
        quant_convs=has("quant_conv") or has("post_quant_conv"),
        norm_groups=norm_groups, feature_dim=to_tokens[0] if has_map else None, **fields,
    )
