"""Encoders' files against the PyTorch modules that they are for, in and out, and files that are not what they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small_files import assert_same_bits, moco_weights, save_encoder, torch_model

from checkpoints_tools import vit, vit_formats, weights
from checkpoints_tools.mapping import to_torch
from checkpoints_tools.torch_reference import torch_tokens
from repae_jax.models import encoders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

NATIVE, OTHER = 28, 56  # pixels; the positions that the files hold are for NATIVE
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7, "image_size": NATIVE}
WIDE = {**SIZES, "intermediate_size": 48}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 50}
PATCHES = {**{key: value for key, value in WIDE.items() if key != "image_size"}, "num_patches": 16}
# kind -> transformers' class, fields of its configuration
KINDS = {
    "dinov2": ("Dinov2Model", SIZES),
    "dinov2_swiglu": ("Dinov2Model", {**SIZES, "use_swiglu_ffn": True, "mlp_ratio": 3}),
    "dinov2_unbiased": ("Dinov2Model", {**SIZES, "qkv_bias": False, "layer_norm_eps": 1e-3}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {**SIZES, "num_register_tokens": 3}),
    "dino": ("ViTModel", WIDE),
    "dino_classifier": ("ViTForImageClassification", WIDE),
    "ijepa": ("IJepaModel", WIDE),
    "mae": ("ViTMAEModel", WIDE),
    "mae_decoder": ("ViTMAEForPreTraining", {**WIDE, **{f"decoder_{key}": value for key, value in TEXT.items()}}),
    "clip": ("CLIPModel", {"vision_config": WIDE, "text_config": TEXT}),
    "clip_vision": ("CLIPVisionModel", {**WIDE, "hidden_act": "gelu"}),
    "dinov3": ("DINOv3ViTModel", {**WIDE, "num_register_tokens": 2}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        {**WIDE, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False, "proj_bias": False},
    ),
    "siglip": ("SiglipModel", {"vision_config": WIDE, "text_config": TEXT}),
    "siglip_vision": ("SiglipVisionModel", WIDE),
    "siglip2": ("Siglip2Model", {"vision_config": PATCHES, "text_config": TEXT}),
    "siglip2_vision": ("Siglip2VisionModel", PATCHES),
}


def tokens_of(model, pixels):
    """All tokens of the module: class tokens, registers, patches."""
    model = getattr(model, "vision_model", getattr(model, "vit", model))
    inputs = {"pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2)}
    if isinstance(model, transformers.ViTMAEModel):  # no masking, and the tokens before the final norm
        model.config.mask_ratio = 0.0
        model.layernorm = torch.nn.Identity()
        inputs["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    if isinstance(model, transformers.Siglip2VisionModel):  # patches instead of images
        patches = pixels.reshape(-1, 4, 7, 4, 7, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 7 * 7 * 3)
        inputs = {
            "pixel_values": torch.tensor(patches),
            "pixel_attention_mask": torch.ones(len(pixels), 16),
            "spatial_shapes": torch.full((len(pixels), 2), 4),
        }
    with torch.no_grad():
        return model(**inputs).last_hidden_state.numpy()


def random_pixels(size, count=2):
    return np.random.default_rng(size).standard_normal((count, size, size, 3)).astype(np.float32)


def nchw(pixels):
    return pixels.transpose(0, 3, 1, 2)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """(kind, transformers' module, the folder that it was saved in)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = torch_model(*KINDS[request.param])
    model.save_pretrained(folder)
    return request.param, model, folder


def test_tokens_are_those_of_transformers(saved, record_property):
    kind, model, folder = saved
    encoder, params = vit.load_encoder(folder, 256, image_size=NATIVE)
    assert (encoder.name, encoder.grid) == (str(folder), 4)
    pixels = random_pixels(NATIVE)
    cls, patches = jax.jit(encoder.module.apply)({"params": params}, pixels)
    expected = tokens_of(model, pixels)
    skipped = encoder.module.num_class_tokens + encoder.module.num_registers
    assert expected.shape[1] == skipped + 16
    reference.check(patches, expected[:, skipped:], reference.NETWORK_RTOL, f"{kind} patches", record_property)
    if encoder.module.num_class_tokens:
        reference.check(cls, expected[:, :1], reference.NETWORK_RTOL, f"{kind} class token", record_property)
    reference.check(torch_tokens(folder, nchw(pixels)), expected[:, skipped:], 1e-6, f"{kind} torch_tokens")


def test_on_another_grid_and_out_again(saved, tmp_path, record_property):
    kind, _, folder = saved
    encoder, params = vit.load_encoder(folder, 256, image_size=OTHER)
    assert encoder.grid == 8
    pixels = random_pixels(OTHER)
    _, patches = jax.jit(encoder.module.apply)({"params": params}, pixels)
    expected = torch_tokens(folder, nchw(pixels))
    reference.check(patches, expected, reference.NETWORK_RTOL, f"{kind} patches", record_property)

    vit.save_encoder(tmp_path / "out", encoder.module, params)
    again, read = vit.load_encoder(tmp_path / "out", 256, image_size=OTHER)
    assert again.module == encoder.module
    assert_same_bits(read, params)
    reference.check(torch_tokens(tmp_path / "out", nchw(pixels)), expected, 1e-5, f"{kind} out again")

    model_class = getattr(transformers, vit.format_of(tmp_path / "out")[0].model_class)
    settings = {"add_pooling_layer": False} if kind in ("dino", "dino_classifier", "ijepa") else {}
    _, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True, **settings)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info


def test_images_that_are_no_squares(tmp_path, record_property):
    """With the positions as transformers interpolates them, by another cubic filter than ours."""
    model = torch_model("Dinov2Model", SIZES)
    model.save_pretrained(tmp_path)
    encoder, params = vit.load_encoder(tmp_path, (32, 48), image_size=(28, 42))
    assert encoder.grid == (4, 6) and params["pos_embed"].shape == (1, 25, 32)
    pixels = np.random.default_rng(0).standard_normal((2, 28, 42, 3)).astype(np.float32)
    with torch.no_grad():
        positions = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 25, 32), 28, 42).numpy()
    _, patches = jax.jit(encoder.module.apply)({"params": {**params, "pos_embed": positions}}, pixels)
    reference.check(patches, tokens_of(model, pixels)[:, 1:], reference.NETWORK_RTOL, "dinov2 of 28 x 42", record_property)


def test_round_trip_is_the_identity(saved, tmp_path):
    kind, _, folder = saved
    _, module, params = vit.read_file(folder)
    assert module.grid == (4, 4) and module.dtype == jnp.float32
    stored, (format, _) = weights.read_state_dict(folder), vit.format_of(folder)
    table = vit.encoder_table(module, format)
    for name, array in to_torch(table, params).items():
        if name not in table.constants:
            (original,) = (stored[prefix + name] for prefix in ("", *format.renames) if prefix + name in stored)
            np.testing.assert_array_equal(array.view(np.int32), original.view(np.int32), err_msg=name)

    vit.save_encoder(tmp_path, module, params)
    _, again, read = vit.read_file(tmp_path)
    assert again == module
    assert_same_bits(read, params)


# ---------------------------------------------------------------------------------------------------------------------
# MoCo v3.
# ---------------------------------------------------------------------------------------------------------------------

MISNAMED = {
    "blocks.13.norm1.": "blocks.13.norm13.",
    "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13.",
    "blocks.14.norm2.": "blocks.14.norm14.",
    "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14.",
}


def timm_tokens(arrays, pixels, depth, num_heads):
    """All tokens of timm's VisionTransformer after its final norm, the positions resampled by timm's rule."""
    side, grid = int((arrays["pos_embed"].shape[1] - 1) ** 0.5), pixels.shape[1] // 16
    positions = torch.tensor(arrays["pos_embed"][:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(positions, size=(grid, grid), mode="bicubic", antialias=True)
    w = {name: torch.tensor(array) for name, array in arrays.items()}

    def linear(name, x):
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    patches = torch.nn.functional.conv2d(torch.tensor(nchw(pixels)), kernel, bias, stride=16).flatten(2).transpose(1, 2)
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(pixels), -1, -1)
    x = torch.cat([cls, patches + positions.flatten(2).transpose(1, 2)], dim=1)
    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(len(x), x.shape[1], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", attention.transpose(1, 2).flatten(2))
        hidden = torch.nn.functional.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x).numpy()


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """(state dict, the file as it is published: the training's, with four layers under wrong names)."""
    arrays, published = moco_weights(384, 15, 48, 2), {}
    for name, array in arrays.items():
        for right, wrong in MISNAMED.items():
            name = name.replace(right, wrong)
        published[f"module.base_encoder.{name}"] = torch.tensor(array)
        published[f"module.momentum_encoder.{name}"] = torch.tensor(2 * array)
    published["module.base_encoder.head.1.num_batches_tracked"] = torch.tensor(7)
    published["module.predictor.0.weight"] = torch.ones(2, 2)
    path = tmp_path_factory.mktemp("moco") / "mocov3_vitl.pth"
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 300, "arch": "vit_large", "state_dict": published, "optimizer": optimizer}, path)
    return arrays, path


def test_mocov3(moco, tmp_path, record_property):
    arrays, path = moco
    _, module, params = vit.read_file(path)
    assert (module.grid, module.mlp_dim) == ((2, 2), 48)
    returned = to_torch(vit.encoder_table(module, vit_formats.MOCOV3), params)
    assert set(returned) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(returned[name].view(np.int32), array.view(np.int32), err_msg=name)

    encoder, params = vit.load_encoder(path, 64)
    assert (encoder.image_size, encoder.family.mean) == (64, encoders.IMAGENET_MEAN)
    pixels = random_pixels(64)
    cls, patches = jax.jit(encoder.module.apply)({"params": params}, pixels)
    expected = timm_tokens(arrays, pixels, depth=15, num_heads=12)
    reference.check(cls, expected[:, :1], reference.NETWORK_RTOL, "MoCo v3 class token", record_property)
    reference.check(patches, expected[:, 1:], reference.NETWORK_RTOL, "MoCo v3 patches", record_property)

    vit.save_encoder(tmp_path, encoder.module, params)
    tokens = torch_tokens(tmp_path, nchw(pixels))
    reference.check(tokens, expected[:, 1:], reference.NETWORK_RTOL, "MoCo v3 as a ViT of transformers", record_property)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_embed.proj.weight": None}, "no MoCo v3 .*patch_embed.proj.weight has shape None.*folder with config.json"),
        ({"patch_embed.proj.weight": (32, 3, 4, 4)}, "width 32; allowed: 384, 768, 1024"),
        ({"pos_embed": (1, 4, 384)}, r"4 positions in pos_embed; allowed: 1 \+ a square number"),
        ({"blocks.14.attn.qkv.bias": None}, r"missing in file: blocks.14.attn.qkv.bias \(fills blocks/attn/query/bias"),
        ({"stem.0.weight": (2, 2)}, "unexpected in file: stem.0.weight"),
        ({"base_encoder.norm.bias": (384,)}, "holds norm.bias twice"),
        ({"module.base_encoder.norm.bias": (384,)}, "1 names begin with module., .* do not"),
    ],
)
def test_bad_mocov3_files(moco, tmp_path, change, message):
    arrays = moco[0] | {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in change.items()}
    path = tmp_path / "moco.safetensors"
    weights.write_safetensors(path, {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=f"(?s)moco.safetensors.*{message}"):
        vit.load_encoder(path, 256)


@pytest.mark.parametrize("shape", [(1, 28, 28, 3), (1, 3, 28, 35), (1, 3, 30, 30), (3, 28, 28)])
def test_torch_tokens_refuses_other_shapes(tmp_path, shape):
    save_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"shape .*; allowed: \[B, 3, S, S\] with S a multiple of 7"):
        torch_tokens(tmp_path, np.zeros(shape, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# The published models' sizes.
# ---------------------------------------------------------------------------------------------------------------------


def _sized(hidden_size, layers, heads, **fields):
    return {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads, **fields}


LARGE = _sized(1024, 24, 16)
DINOV2 = {"patch_size": 14, "image_size": 518}
DINOV3 = {"num_register_tokens": 4}
# architecture -> transformers' class, and the published config.json where it differs from that class's defaults
PUBLISHED = {
    "dinov2-base": ("Dinov2Model", DINOV2),
    "dinov2-large": ("Dinov2Model", {**LARGE, **DINOV2}),
    "dinov2-giant": ("Dinov2Model", _sized(1536, 40, 24, use_swiglu_ffn=True, **DINOV2)),
    "dinov2-base-with-registers": ("Dinov2WithRegistersModel", DINOV2),
    "dino-vitb16": ("ViTModel", {}),
    "vit-mae-large": ("ViTMAEModel", {**LARGE, "intermediate_size": 4096}),
    "ijepa_vith14_1k": ("IJepaModel", _sized(1280, 32, 16, intermediate_size=5120, patch_size=14, layer_norm_eps=1e-6)),
    "clip-vit-large-patch14": ("CLIPVisionModel", {**LARGE, "intermediate_size": 4096, "patch_size": 14}),
    "dinov3-vits16": ("DINOv3ViTModel", DINOV3),
    "dinov3-vitb16": ("DINOv3ViTModel", _sized(768, 12, 12, intermediate_size=3072, **DINOV3)),
    "dinov3-vitl16": ("DINOv3ViTModel", {**LARGE, "intermediate_size": 4096, **DINOV3}),
    "siglip2-base-patch16-256": ("SiglipVisionModel", {"image_size": 256}),
    "siglip2-so400m-patch16-256": ("SiglipVisionModel", _sized(1152, 27, 16, intermediate_size=4304, image_size=256)),
}


def check_published_size(name, path, tokens, folder, record_property):
    """One encoder of published size against PyTorch, in float32 and bfloat16, and out again."""
    described = encoders.make_encoder(name, 256)
    pixels = random_pixels(described.image_size, count=1)
    expected = tokens(pixels)
    encoder, params = vit.load_encoder(path, 256)
    assert encoder.module == described.module and encoder.image_size == described.image_size
    assert encoder.family == described.family
    for dtype, rtol in ((jnp.float32, reference.NETWORK_RTOL), (jnp.bfloat16, 0.02)):
        _, patches = jax.jit(encoder.module.clone(dtype=dtype).apply)({"params": params}, pixels)
        reference.check(patches, expected, rtol, f"{name} {jnp.dtype(dtype)}", record_property)
    vit.save_encoder(folder, encoder.module, params)
    reference.check(torch_tokens(folder, nchw(pixels)), expected, 1e-5, f"{name} out again", record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path, record_property):
    path = tmp_path / "in"
    torch_model(*PUBLISHED[name]).save_pretrained(path)
    check_published_size(name, path, lambda pixels: torch_tokens(path, nchw(pixels)), tmp_path / "out", record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mocov3-small", "mocov3-base", "mocov3-large"])
def test_published_sizes_of_mocov3(name, tmp_path, record_property):
    width, depth, heads = (encoders.ARCHITECTURES[name][field] for field in ("hidden_size", "depth", "num_heads"))
    arrays, path = moco_weights(width, depth, 4 * width, 14), tmp_path / "in.safetensors"
    weights.write_safetensors(path, arrays)
    check_published_size(
        name, path, lambda pixels: timm_tokens(arrays, pixels, depth, heads)[:, 1:], tmp_path / "out", record_property
    )
