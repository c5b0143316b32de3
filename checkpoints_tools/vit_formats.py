"""Formats of the frozen encoders' files: names, layouts and config.json keys, as data.

A new kind of encoder is one entry of FORMATS, beside its family in `repae_jax.models.encoders`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_tools.mapping import LINEAR, Layout

_VECTOR = Layout(lambda x: x[None, None], lambda x: x[0, 0])  # [D] <-> [1, 1, D]
_EMBEDDING = Layout(lambda x: x[None], lambda x: x[0])  # [N, D] <-> [1, N, D]


def _mapping(**default: str) -> Any:
    return dataclasses.field(default_factory=lambda: default)


@dataclasses.dataclass(frozen=True)
class Format:
    """Format of one kind of encoder's files."""

    family: str  # key of encoders.FAMILIES
    model_class: str  # in transformers
    names: Mapping[str, str]  # our top-level parameters and layers -> PyTorch's
    blocks: str  # prefix of PyTorch's names in block {i}
    block: Mapping[str, str]  # our layers in a block -> PyTorch's name there; several of ours, with spaces between, share one
    gated: Mapping[str, str] = _mapping()  # the layers of a SwiGLU, instead of the MLP's in `block`
    layouts: Mapping[str, Layout] = _mapping()  # axis order of those of `names` for which it is not the usual one
    zeros: Mapping[str, tuple[int, ...]] = _mapping()  # PyTorch name -> leading axes of [..., D] that only training uses
    renames: Mapping[str, str] = _mapping()  # prefixes of PyTorch names -> their replacements, applied in this order
    ignored: Sequence[str] = ()  # prefixes of PyTorch names, after that, of arrays that are not ours
    config: Mapping[str, object] = _mapping()  # the keys of config.json that matter, with transformers' defaults
    activations: Mapping[str, str] = _mapping(gelu="gelu")  # its hidden_act -> VisionTransformer's activation
    gate: tuple[str, str] | None = None  # key of config.json that says whether the MLP is a SwiGLU, and hidden_act if it is
    biases: Mapping[str, Sequence[str]] = _mapping()  # keys of config.json that say whether these projections have a bias
    extra: Mapping[str, object] = _mapping()  # further content of a config.json that we write
    torch_options: Mapping[str, object] = _mapping()  # options of from_pretrained, for modules that the files may lack


def _attention(names, joint):
    """Attention layers: the names of query, key, value and output projection, put into a pattern."""
    return {f"attn/{ours}": joint.format(name) for ours, name in zip(("query", "key", "value", "out"), names)}


_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_SCALES = {"layer_scale1": "layer_scale1.lambda1", "layer_scale2": "layer_scale2.lambda1"}
_CONFIG = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu", "num_channels": 3,
    "patch_size": 16, "image_size": 224,
}
_VIT = Format(
    family="dino", model_class="ViTModel",
    names={
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    },
    blocks="encoder.layer.{i}.",
    block={
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        **_attention(("attention.query", "attention.key", "attention.value", "output.dense"), "attention.{}"),
        "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense",
    },
    renames={"vit.": ""}, ignored=("pooler.", "classifier.", "embeddings.mask_token"),
    config={**_CONFIG, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True},
    biases={"qkv_bias": ("query", "key", "value")}, torch_options={"add_pooling_layer": False},
)
_DINOV2 = Format(
    family="dinov2", model_class="Dinov2Model",
    names=_VIT.names, blocks=_VIT.blocks,
    block={**_VIT.block, **_NORMS, **_MLP, **_SCALES},
    gated={"mlp/gate mlp/fc1": "mlp.weights_in", "mlp/fc2": "mlp.weights_out"},
    zeros={"embeddings.mask_token": (1,)},
    renames={"dinov2.": "", "dinov2_with_registers.": ""}, ignored=("classifier.",),
    config={**_CONFIG, "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False},
    gate=("use_swiglu_ffn", "gelu"), biases=_VIT.biases,
)
_SIGLIP = Format(
    family="siglip2", model_class="SiglipVisionModel",
    names={
        "pos_embed": "embeddings.position_embedding.weight", "patch_embed": "embeddings.patch_embedding",
        "norm": "post_layernorm",
    },
    blocks="encoder.layers.{i}.",
    block={
        "norm1": "layer_norm1", "norm2": "layer_norm2",
        **_attention(("q_proj", "k_proj", "v_proj", "out_proj"), "self_attn.{}"), **_MLP,
    },
    layouts={"pos_embed": _EMBEDDING}, renames={"vision_model.": ""},
    ignored=("embeddings.position_ids", "head.", "text_model.", "logit_scale", "logit_bias"),
    config={**_CONFIG, "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    activations={"gelu_pytorch_tanh": "gelu_tanh"}, extra={"vision_use_head": False},
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
    "vit_mae": dataclasses.replace(_VIT, family="mae", model_class="ViTMAEModel", ignored=("decoder.",), torch_options={}),
    "ijepa": dataclasses.replace(_VIT, family="ijepa", model_class="IJepaModel", renames={"ijepa.": ""}),
    "clip_vision_model": dataclasses.replace(
        _SIGLIP,
        family="clip", model_class="CLIPVisionModel",
        names={**_SIGLIP.names, "cls_token": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"},
        layouts={**_SIGLIP.layouts, "cls_token": _VECTOR},
        ignored=("embeddings.position_ids", "text_model.", "visual_projection.", "text_projection.", "logit_scale"),
        config={**_SIGLIP.config, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        activations={"quick_gelu": "quick_gelu", "gelu": "gelu"}, extra={},
    ),
    "siglip_vision_model": _SIGLIP,
    # NaFlex: pixels in (row, column, channel) order in a linear layer, and a number of positions instead of an image size
    "siglip2_vision_model": dataclasses.replace(
        _SIGLIP,
        model_class="Siglip2VisionModel", layouts={**_SIGLIP.layouts, "patch_embed": LINEAR},
        config={**{key: value for key, value in _SIGLIP.config.items() if key != "image_size"}, "num_patches": 256},
    ),
    "dinov3_vit": Format(
        family="dinov3", model_class="DINOv3ViTModel",
        names={
            "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens",
            "patch_embed": "embeddings.patch_embeddings", "norm": "norm",
        },
        blocks="layer.{i}.",
        block={
            **_NORMS, **_attention(("q", "k", "v", "o"), "attention.{}_proj"),
            "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj", **_SCALES,
        },
        gated={"mlp/gate": "mlp.gate_proj", "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj"},
        zeros={"embeddings.mask_token": (1, 1)}, renames={"model.layer.": "layer."},
        config={
            **_CONFIG, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
            "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
            "num_register_tokens": 0, "rope_theta": 100.0, "use_gated_mlp": False,
        },
        gate=("use_gated_mlp", "silu"),
        biases={"query_bias": ("query",), "key_bias": ("key",), "value_bias": ("value",), "proj_bias": ("out",)},
    ),
}
# model_type of a model of images and texts -> model_type of its vision part, which config.json has under vision_config
VISION_PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}

MOCOV3 = Format(
    family="mocov3", model_class="ViTModel",
    names={"cls_token": "cls_token", "pos_embed": "pos_embed", "patch_embed": "patch_embed.proj", "norm": "norm"},
    blocks="blocks.{i}.",
    block={**_NORMS, "attn/query attn/key attn/value": "attn.qkv", "attn/out": "attn.proj", **_MLP},
    # the released ViT-L has four layers under wrong names
    renames={
        "base_encoder.": "",
        "blocks.13.norm13.": "blocks.13.norm1.", "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
        "blocks.14.norm14.": "blocks.14.norm2.", "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
    },
    ignored=("momentum_encoder.", "predictor.", "head.", "fc."),
)
MOCOV3_HEADS = {384: 12, 768: 12, 1024: 16}  # heads by width; they are not in the file
