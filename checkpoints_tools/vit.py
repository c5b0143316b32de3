"""Frozen encoders: Hugging Face folders and MoCo v3's files <-> our vision transformer.

Every kind of encoder is one `Format`: names, layouts and config.json keys as data. What follows the tokens that we take is not
read: heads, poolers, the text side, and CLIP's and MAE's final norm, which is written as scale 1 and bias 0.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from checkpoints_tools import locate, weights
from checkpoints_tools.mapping import COPY, LINEAR, Entry, Layout, Table, norm, patch_embedding, stack, to_flax, to_torch
from repae_jax import features
from repae_jax.models.vit import SWIGLU

_VECTOR = Layout(lambda x: x[None, None], lambda x: x[0, 0])  # [D] <-> [1, 1, D]
_EMBEDDING = Layout(lambda x: x[None], lambda x: x[0])  # [N, D] <-> [1, N, D]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of encoder is stored.

    Attributes:
      family: key of features.FAMILIES.
      model_class: its class in transformers.
      names: our top-level parameters and layers -> PyTorch's.
      blocks: beginning of PyTorch's names in block {i}.
      block: our layers in a block -> PyTorch's after that; several of ours, separated by a space, share one of PyTorch's.
      gated: the same of a SwiGLU, instead of the MLP's in `block`.
      layouts: axis order of those of `names` for which it is not the usual one.
      zeros: PyTorch name -> shape of what only training uses, with a leading D left out; transformers wants it in the file.
      renames: old beginnings of PyTorch names, removed or replaced, in this order.
      ignored: beginnings of PyTorch names, after that, of what is not ours.
      config: the keys of config.json that matter, with transformers' defaults.
      activations: its hidden_act -> VisionTransformer's activation.
      gate: the key of config.json that says whether the MLP is a SwiGLU, and hidden_act if it is.
      biases: keys of config.json that say whether these projections have a bias.
      extra: further content of a config.json that we write.
    """

    family: str
    model_class: str
    names: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    gated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    zeros: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Sequence[str] = ()
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"gelu": "gelu"})
    gate: tuple[str, str] | None = None
    biases: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _attention(names, joint):
    """Names of query, key, value and output projection, put into a pattern."""
    return {f"attn/{ours}": joint.format(name) for ours, name in zip(("query", "key", "value", "out"), names)}


_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_SCALES = {"layer_scale1": "layer_scale1.lambda1", "layer_scale2": "layer_scale2.lambda1"}
_CONFIG = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu", "num_channels": 3,
    "patch_size": 16, "image_size": 224,
}  # fmt: skip

_VIT = Format(
    family="dino",
    model_class="ViTModel",
    names={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
    blocks="encoder.layer.{i}.",
    block={
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        **_attention(("attention.query", "attention.key", "attention.value", "output.dense"), "attention.{}"),
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
    },
    renames={"vit.": ""},
    ignored=("pooler.", "classifier.", "embeddings.mask_token"),
    config={**_CONFIG, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True},
    biases={"qkv_bias": ("query", "key", "value")},
)
_DINOV2 = Format(
    family="dinov2",
    model_class="Dinov2Model",
    names=_VIT.names,
    blocks=_VIT.blocks,
    block={**_VIT.block, **_NORMS, **_MLP, **_SCALES},
    gated={"mlp/gate mlp/fc1": "mlp.weights_in", "mlp/fc2": "mlp.weights_out"},
    zeros={"embeddings.mask_token": (1,)},
    renames={"dinov2.": "", "dinov2_with_registers.": ""},
    ignored=("classifier.",),
    config={**_CONFIG, "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False},
    gate=("use_swiglu_ffn", "gelu"),
    biases=_VIT.biases,
)
_SIGLIP = Format(
    family="siglip2",
    model_class="SiglipVisionModel",
    names={
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed": "embeddings.patch_embedding",
        "norm": "post_layernorm",
    },
    blocks="encoder.layers.{i}.",
    block={
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        **_attention(("q_proj", "k_proj", "v_proj", "out_proj"), "self_attn.{}"),
        **_MLP,
    },
    layouts={"pos_embed": _EMBEDDING},
    renames={"vision_model.": ""},
    ignored=("embeddings.position_ids", "head.", "text_model.", "logit_scale", "logit_bias"),
    config={**_CONFIG, "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    extra={"vision_use_head": False},
)

# by config.json's model_type
FORMATS = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": dataclasses.replace(
        _DINOV2,
        model_class="Dinov2WithRegistersModel",
        names={**_DINOV2.names, "register_tokens": "embeddings.register_tokens"},
        config={**_DINOV2.config, "patch_size": 16, "num_register_tokens": 4},
    ),
    "vit": _VIT,
    "vit_mae": dataclasses.replace(_VIT, family="mae", model_class="ViTMAEModel", ignored=("decoder.",)),
    "ijepa": dataclasses.replace(_VIT, family="ijepa", model_class="IJepaModel", renames={"ijepa.": ""}),
    "clip_vision_model": dataclasses.replace(
        _SIGLIP,
        family="clip",
        model_class="CLIPVisionModel",
        names={**_SIGLIP.names, "cls_token": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"},
        layouts={**_SIGLIP.layouts, "cls_token": _VECTOR},
        ignored=("embeddings.position_ids", "text_model.", "visual_projection.", "text_projection.", "logit_scale"),
        config={**_SIGLIP.config, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        activations={"quick_gelu": "quick_gelu", "gelu": "gelu"},
        extra={},
    ),
    "siglip_vision_model": _SIGLIP,
    # NaFlex: pixels in (row, column, channel) order in a linear layer, and a number of positions instead of an image size
    "siglip2_vision_model": dataclasses.replace(
        _SIGLIP,
        model_class="Siglip2VisionModel",
        layouts={**_SIGLIP.layouts, "patch_embed": LINEAR},
        config={**{key: value for key, value in _SIGLIP.config.items() if key != "image_size"}, "num_patches": 256},
    ),
    "dinov3_vit": Format(
        family="dinov3",
        model_class="DINOv3ViTModel",
        names={
            "cls_token": "embeddings.cls_token",
            "register_tokens": "embeddings.register_tokens",
            "patch_embed": "embeddings.patch_embeddings",
            "norm": "norm",
        },
        blocks="layer.{i}.",
        block={
            **_NORMS,
            **_attention(("q", "k", "v", "o"), "attention.{}_proj"),
            "mlp/fc1": "mlp.up_proj",
            "mlp/fc2": "mlp.down_proj",
            **_SCALES,
        },
        gated={"mlp/gate": "mlp.gate_proj", "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj"},
        zeros={"embeddings.mask_token": (1, 1)},
        renames={"model.layer.": "layer."},
        config={
            **_CONFIG, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
            "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
            "num_register_tokens": 0, "rope_theta": 100.0, "use_gated_mlp": False,
        },
        gate=("use_gated_mlp", "silu"),
        biases={"query_bias": ("query",), "key_bias": ("key",), "value_bias": ("value",), "proj_bias": ("out",)},
    ),
}  # fmt: skip
# model_type of a model of images and texts -> of its vision part, which config.json has under vision_config
_VISION_PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}

MOCOV3 = Format(
    family="mocov3",
    model_class="ViTModel",
    names={"cls_token": "cls_token", "pos_embed": "pos_embed", "patch_embed": "patch_embed.proj", "norm": "norm"},
    blocks="blocks.{i}.",
    block={**_NORMS, "attn/query attn/key attn/value": "attn.qkv", "attn/out": "attn.proj", **_MLP},
    # the released ViT-L has four layers under wrong names
    renames={
        "module.base_encoder.": "",
        "blocks.13.norm13.": "blocks.13.norm1.",
        "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
        "blocks.14.norm14.": "blocks.14.norm2.",
        "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
    },
    ignored=("module.momentum_encoder.", "module.predictor.", "head.", "fc."),
)
_MOCOV3_HEADS = {384: 12, 768: 12, 1024: 16}  # by width; the file does not tell


def encoder_table(vit, format):
    """Conversion table of a VisionTransformer.

    Args:
      vit: the module (its sizes are read).
      format: one of FORMATS' values, or MOCOV3.

    Returns:
      Table between the names in the format's files, `renames` applied, and the module's 'params'.
    """
    absent = {
        "cls_token": not vit.num_class_tokens,
        "register_tokens": not vit.num_registers,
        "pos_embed": vit.rope_theta is not None,
        "pre_norm": not vit.pre_norm,
        "norm": not vit.final_norm,
        "layer_scale1": not vit.layer_scale,
        "layer_scale2": not vit.layer_scale,
    }
    layouts = {"patch_embed": patch_embedding(vit.patch_size), **format.layouts}

    def entries(names, torch_prefix="", flax_prefix=""):
        made = []
        for ours, theirs in names.items():
            if absent.get(ours):
                continue
            torch, paths = torch_prefix + theirs, [flax_prefix + path for path in ours.split()]
            part = ours.rpartition("/")[2]
            if "norm" in part:
                made += norm(torch, *paths)
            elif part.startswith("layer_scale"):
                made.append(Entry((torch,), (f"{paths[0]}/scale",)))
            elif part in ("cls_token", "register_tokens", "pos_embed"):
                made.append(Entry((torch,), (part,), layouts.get(part, COPY)))
            else:
                layer = Entry((f"{torch}.weight",), tuple(f"{path}/kernel" for path in paths), layouts.get(part, LINEAR))
                made.append(layer)
                if part not in vit.unbiased:
                    made.append(Entry((f"{torch}.bias",), tuple(f"{path}/bias" for path in paths)))
        return made

    block = dict(format.block)
    if vit.activation == SWIGLU:
        block = {ours: theirs for ours, theirs in block.items() if not ours.startswith("mlp/")} | dict(format.gated)
    stacked = stack(entries(block, format.blocks, "{stack}/"), {"blocks": range(vit.depth)})
    width = vit.hidden_size
    constants = {name: np.zeros((*shape, width), np.float32) for name, shape in format.zeros.items()}
    if not vit.final_norm:
        constants[f"{format.names['norm']}.weight"] = np.ones(width, np.float32)
        constants[f"{format.names['norm']}.bias"] = np.zeros(width, np.float32)
    if not vit.num_registers and "register_tokens" in format.names:
        constants[format.names["register_tokens"]] = np.zeros((1, 0, width), np.float32)
    return Table([*entries(format.names), *stacked], constants, format.ignored)


def load_encoder(path, resolution, image_size=None, dtype=jnp.float32):
    """Frozen encoder from its published files, its positions resampled to the grid in use.

    Args:
      path: folder with config.json, of a model_type in FORMATS or of the whole model around such a one ('clip', 'siglip',
        'siglip2'), and its weights; or a hub name such as 'facebook/dinov2-base'; or MoCo v3's .pth file.
      resolution: height and width of the training images in pixels.
      image_size: pixels that the network receives; by default as published, see features.FAMILIES.
      dtype: compute dtype; the parameters are float32.

    Returns:
      (features.Encoder, parameters as a nested dict of numpy arrays).

    Raises:
      FileNotFoundError: if the folder or one of its files cannot be had.
      ValueError: for another kind of model, weights that do not fit config.json, or an image_size that does not divide.
    """
    architecture, _, params = _read(path)
    encoder = features.make_encoder(architecture, resolution, image_size=image_size, dtype=dtype)
    if "pos_embed" in params:
        resampled = features.resample_positions(params["pos_embed"], encoder.grid, encoder.module.num_class_tokens)
        params["pos_embed"] = np.asarray(resampled)
    return dataclasses.replace(encoder, name=str(path)), params


def read_encoder(path):
    """Encoder from its published files, as they hold it: on the grid that its positions are for.

    Args:
      path: as load_encoder's.

    Returns:
      (VisionTransformer computing in float32, parameters as a nested dict of float32 numpy arrays).

    Raises:
      FileNotFoundError: if the folder or one of its files cannot be had.
      ValueError: for another kind of model, or weights that do not fit config.json.
    """
    return _read(path)[1:]


def _read(path):
    """(architecture as features.make_encoder takes it, VisionTransformer on the stored grid, its parameters)."""
    local = locate.resolve(path)
    if local.is_dir():
        format, config = format_of(local)
        architecture, side = _from_config(format, config, f"{local}/config.json")
        state_dict = _renamed(weights.read_state_dict(local), format, local)
    else:
        format = MOCOV3
        state_dict = _renamed(weights.read_state_dict(local), format, local)
        architecture, side = _from_mocov3(state_dict, local)
    try:
        encoder = _stored_encoder(architecture, side)
        target = jax.eval_shape(functools.partial(features.init_params, encoder), jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"{local}: {error}") from error
    return architecture, encoder.module, to_flax(encoder_table(encoder.module, format), state_dict, target, source=str(local))


def _stored_encoder(architecture, side):
    """features.Encoder on a grid of side * side tokens."""
    size = side * architecture["patch_size"]
    return features.make_encoder(architecture, size, image_size=size)


def format_of(folder):
    """What kind of encoder a Hugging Face folder holds.

    Args:
      folder: local folder.

    Returns:
      (Format, the part of config.json that describes the vision transformer).

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is damaged, or of another kind.
    """
    config = weights.read_config(folder)
    model_type = config.get("model_type")
    if model_type in _VISION_PARTS:
        model_type, config = _VISION_PARTS[model_type], config.get("vision_config") or {}
    if model_type not in FORMATS:
        raise ValueError(
            f"{folder}/config.json has model_type {model_type!r}; allowed: {', '.join([*FORMATS, *_VISION_PARTS])}"
        )
    return FORMATS[model_type], config


def _renamed(state_dict, format, source):
    """The state dict under the names of the format's table."""
    renamed = {}
    for name, array in state_dict.items():
        new = name
        for old, replacement in format.renames.items():
            if new.startswith(old):
                new = replacement + new.removeprefix(old)
        if new in renamed:
            raise ValueError(f"{source} holds {new} twice, once as {name}; allowed: one encoder per file")
        renamed[new] = array
    return renamed


def _from_config(format, given, source):
    """(architecture as features.make_encoder takes it, side of the position table)."""
    config = {**format.config, **given}

    def number(key, least=1):
        value = config[key]
        if isinstance(value, list) and len(set(value)) == 1:  # [height, width] of a square
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise ValueError(f"{source} has {key} {value!r}; allowed: a number of at least {least}, one for height and width")
        return value

    def check(key, allowed):
        if config[key] not in allowed:
            raise ValueError(f"{source} has {key} {config[key]!r}; allowed: {', '.join(map(repr, allowed))}")

    check("num_channels", [3])
    if "mlp_bias" in format.config:
        check("mlp_bias", [True])
    gated = format.gate is not None and config[format.gate[0]]
    check("hidden_act", [format.gate[1]] if gated else list(format.activations))
    fields = {
        "family": format.family,
        "patch_size": number("patch_size"),
        "hidden_size": number("hidden_size"),
        "depth": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "activation": SWIGLU if gated else format.activations[config["hidden_act"]],
        "norm_eps": number("layer_norm_eps", 0),
    }
    if "intermediate_size" in format.config:
        fields["mlp_dim"] = number("intermediate_size")
    else:
        fields["mlp_dim"] = _dinov2_mlp_dim(fields["hidden_size"], number("mlp_ratio"), gated)
    if "num_register_tokens" in format.config:
        fields["num_registers"] = number("num_register_tokens", 0)
    if "rope_theta" in format.config:
        fields["rope_theta"] = float(number("rope_theta"))
    if format.biases:
        fields["unbiased"] = tuple(name for key, names in format.biases.items() if not config[key] for name in names)
    if "num_patches" not in format.config:
        return fields, number("image_size") // fields["patch_size"]
    side = math.isqrt(number("num_patches"))
    if side**2 != config["num_patches"]:
        raise ValueError(f"{source} has num_patches {config['num_patches']}; allowed: a square number")
    return fields, side


def _dinov2_mlp_dim(hidden_size, mlp_ratio, gated):
    """DINOv2's MLP width; its SwiGLU has two thirds of it, rounded up to a multiple of 8."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _from_mocov3(state_dict, source):
    """As `_from_config`, from the sizes of the weights."""

    def shape(name, rank):
        found = np.shape(state_dict[name]) if name in state_dict else None
        if found is None or len(found) != rank:
            raise ValueError(
                f"{source} is no MoCo v3 checkpoint of a vision transformer: {name} has shape {found}, needed are {rank} axes; "
                "of other encoders, give the folder with config.json"
            )
        return found

    hidden_size, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    positions = shape("pos_embed", 3)[1]
    if hidden_size not in _MOCOV3_HEADS:
        raise ValueError(f"{source} has width {hidden_size}; allowed: {', '.join(map(str, _MOCOV3_HEADS))} (MoCo v3's S, B, L)")
    side = math.isqrt(max(positions - 1, 0))
    if positions != 1 + side**2:
        raise ValueError(f"{source} has {positions} positions in pos_embed; allowed: 1 + a square number")
    blocks = [int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))]
    fields = {
        "family": MOCOV3.family,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": 1 + max(blocks, default=0),
        "num_heads": _MOCOV3_HEADS[hidden_size],
        "mlp_dim": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }
    return fields, side


def save_encoder(folder, module, params, *, overwrite=False):
    """Writes a folder that `load_encoder` and transformers' from_pretrained read, of the first model_type that fits.

    MoCo v3 becomes a 'vit', and NaFlex a 'siglip_vision_model' of its grid's size.

    Args:
      folder: local, or an address such as gs://bucket/folder; created if absent.
      module: the VisionTransformer.
      params: its parameters.
      overwrite: replace files that exist.

    Raises:
      FileExistsError: if the folder holds an encoder and `overwrite` is False.
      ValueError: if the parameters do not fit the module, or no config.json can express it.
    """
    format, config = _config_of(module)
    state_dict = to_torch(encoder_table(module, format), params)
    folder = epath.Path(folder)
    files = folder / "model.safetensors", folder / "config.json"
    if not overwrite:
        weights.check_absent(*files)
    folder.mkdir(parents=True, exist_ok=True)
    # config.json last: a folder without it is not taken for an encoder. transformers asks for the format.
    weights.write_safetensors(files[0], state_dict, {"format": "pt"}, overwrite=overwrite)
    weights.write_json(files[1], config, overwrite=overwrite)


def _config_of(module):
    """(Format, config.json) of the first format whose config.json is read as this very module."""
    rows, columns = module.grid
    for model_type, format in FORMATS.items():
        gated = module.activation == SWIGLU
        acts = [theirs for theirs, ours in format.activations.items() if ours == module.activation]
        if format.gate is not None and gated:
            acts = [format.gate[1]]
        ratios = (ratio for ratio in range(1, 33) if _dinov2_mlp_dim(module.hidden_size, ratio, gated) == module.mlp_dim)
        values = {
            "num_channels": 3,
            "patch_size": module.patch_size,
            "image_size": rows * module.patch_size,
            "num_patches": rows * columns,
            "hidden_size": module.hidden_size,
            "num_hidden_layers": module.depth,
            "num_attention_heads": module.num_heads,
            "intermediate_size": module.mlp_dim,
            "mlp_ratio": next(ratios, None),
            "hidden_act": acts[0] if acts else None,
            "layer_norm_eps": module.norm_eps,
            "num_register_tokens": module.num_registers,
            "rope_theta": module.rope_theta,
            "mlp_bias": True,
            **{key: not set(names) & set(module.unbiased) for key, names in format.biases.items()},
        }
        if format.gate is not None:
            values[format.gate[0]] = gated
        config = {key: values[key] for key in format.config}
        try:
            architecture, side = _from_config(format, config, model_type)
        except ValueError:
            continue
        if _stored_encoder(architecture, side).module == module.clone(dtype=jnp.float32):
            return format, {"architectures": [format.model_class], "model_type": model_type, **config, **format.extra}
    raise ValueError(
        f"no config.json of {', '.join(FORMATS)} can express {module}; all know square grids only, and DINOv2's an mlp_dim "
        "that is a whole multiple of hidden_size"
    )
