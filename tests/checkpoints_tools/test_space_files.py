"""Networks of the feature spaces against the code that published numbers come from, and against transformers' modules."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
from feature_networks import small_space
from small_files import torch_model

from checkpoints_tools.feature_spaces import load_space, read_params
from repae_jax.models.feature_spaces import FDR6, SPACES, image_features, prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def golden():
    return reference.load("feature_spaces")


@pytest.fixture
def saved(golden, tmp_path):
    """Function of a name that writes the golden weights as timm's file, and returns (small space, path)."""

    def save(name):
        fields = {} if name == "convnext" else {"mlp_dim": golden.weights[name]["blocks.0.mlp.fc1.bias"].size}
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(golden.weights[name], path)
        return small_space(name, golden.meta["sizes"][name], **fields), path

    return save


@pytest.mark.parametrize("name", FDR6)
def test_golden(name, golden, saved, record_property):
    """From pixels to features, with resizing, filling up to whole patches and resampling of positions."""
    space, path = saved(name)
    features = jax.jit(functools.partial(image_features, space))(read_params(space, path), golden.arrays["images"])
    assert features.shape == (3, space.size)
    reference.check(features, golden.arrays[name], reference.NETWORK_RTOL, name, record_property)


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7, "image_size": 28}
WIDE = {**SIZES, "intermediate_size": 96}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 50}
# space -> transformers' class, its fields, its vector of an image
KINDS = {
    "dinov2": ("Dinov2Model", SIZES, lambda out: out.last_hidden_state[:, 0]),
    "dinov2_256": ("Dinov2Model", SIZES, lambda out: out.last_hidden_state[:, 0]),
    "mae": ("ViTModel", {**WIDE, "layer_norm_eps": 1e-6}, lambda out: out.last_hidden_state[:, 0]),
    "clip_256": (
        "CLIPVisionModelWithProjection", {**WIDE, "hidden_act": "gelu", "projection_dim": 10},
        lambda out: out.last_hidden_state[:, 0],
    ),
    "clip_336": ("CLIPVisionModelWithProjection", {**WIDE, "projection_dim": 10}, lambda out: out.image_embeds),
    "siglip2": ("SiglipModel", {"vision_config": WIDE, "text_config": TEXT}, lambda out: out.pooler_output),
    "convnext": (
        "ConvNextV2Model", {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 2, 1]},
        lambda out: out.last_hidden_state.mean(dim=(2, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_is_transformers(name, tmp_path, record_property):
    class_name, fields, vector = KINDS[name]
    model = torch_model(class_name, fields)
    model.save_pretrained(tmp_path)
    space = small_space(name, 64 if name == "convnext" else 28, **({} if name == "convnext" else {"patch_size": 7}))
    images = np.random.default_rng(0).integers(0, 256, (2, space.pixels, space.pixels, 3), np.uint8)
    features = jax.jit(functools.partial(image_features, space))(read_params(space, tmp_path), images)
    pixels = torch.tensor(np.asarray(prepare(space, images))).permute(0, 3, 1, 2)
    with torch.no_grad():
        if name == "clip_256":  # in the whole sequence of tokens the norm comes later
            tokens = model.vision_model(pixel_values=pixels).last_hidden_state
            expected = model.vision_model.post_layernorm(tokens)[:, 0]
        else:
            expected = vector((model.vision_model if name == "siglip2" else model)(pixel_values=pixels))
    expected = expected.numpy()
    if name == "clip_336":
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    reference.check(features, expected, reference.NETWORK_RTOL, name, record_property)


def test_weights_of_another_network(golden, saved, tmp_path):
    space, path = saved("mae")
    wider = dataclasses.replace(space, module=space.module.clone(vit=space.module.vit.clone(hidden_size=32)))
    with pytest.raises(ValueError, match="mae.safetensors does not fit the network of timm/vit_large_patch16_224.mae") as error:
        read_params(wider, path)
    assert "\n" not in str(error.value) and "give those weights" in str(error.value)
    convnext, convnext_path = saved("convnext")
    with pytest.raises(ValueError, match="does not fit the network of timm/convnextv2_base"):
        read_params(convnext, path)
    with pytest.raises(ValueError, match="convnext.safetensors holds head.* and no blocks of a vision .*: give timm/vit"):
        read_params(space, convnext_path)
    norm = {"blocks.0.norm1.weight": np.zeros(3, np.float32)}
    for arrays in (norm, {**norm, "pos_embed": np.zeros(5, np.float32)}):
        safetensors.numpy.save_file(arrays, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=r"odd.safetensors has no pos_embed \[1, positions, width\]; needed: a vision"):
            read_params(space, tmp_path / "odd.safetensors")


def test_unknown_spaces_and_missing_weights(tmp_path):
    with pytest.raises(ValueError, match="feature space 'dino' is unknown; allowed: dinov2, clip_336, convnext"):
        load_space("dino", tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_space("mae", tmp_path / "absent.safetensors")
    assert len(FDR6) == 5 and all(space.weights for space in SPACES.values())
