"""Encoders' folders that are not what they should be, and modules that no folder can express."""

import json

import numpy as np
import pytest
from small_files import assert_same_bits, save_encoder

from checkpoints_tools import vit, weights
from repae_jax import files
from repae_jax.models.vit import VisionTransformer


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("dinov2", {"model_type": "resnet"}, "model_type 'resnet'; allowed: dinov2, dinov2_with_registers, vit, vit_mae"),
        ("dinov2", {"model_type": None}, "model_type None; allowed"),
        ("dinov2", {"hidden_act": "relu"}, "hidden_act 'relu'; allowed: 'gelu'"),
        ("clip", {"hidden_act": "relu"}, "hidden_act 'relu'; allowed: 'quick_gelu', 'gelu'"),
        ("dinov2", {"num_channels": 1}, "num_channels 1; allowed: 3"),
        ("dinov3", {"mlp_bias": False}, "mlp_bias False; allowed: True"),
        ("dinov2", {"patch_size": [7, 14]}, r"patch_size \[7, 14\]; allowed: a number"),
        ("dinov2", {"patch_size": 0}, "patch_size 0; allowed: a number of at least 1"),
        ("dinov2", {"mlp_ratio": None}, "mlp_ratio None"),
        ("dinov2", {"num_attention_heads": 3}, "hidden_size 8 is not divisible by num_heads 3"),
        ("dinov3", {"num_attention_heads": 4}, "width divisible by 4, got 2"),
        ("siglip2", {"model_type": "siglip2_vision_model", "num_patches": 15}, "num_patches 15; allowed: a square number"),
        ("dinov2", {"num_hidden_layers": 2}, "missing in file: encoder.layer.1.norm1.weight"),
        ("dinov2", {"image_size": 35}, r"embeddings.position_embeddings \(1, 17, 8\)"),
        ("clip", {"model_type": "clip"}, "wrong shape: "),  # vision_config is absent, so its defaults are meant
    ],
)
def test_bad_configs(tmp_path, family, change, message):
    save_encoder(tmp_path, family=family)
    config = files.read_json(tmp_path / "config.json") | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"(?s)^{tmp_path}.*{message}"):
        vit.load_encoder(tmp_path, 32)


NORM = "encoder.layer.0.norm1.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({NORM: None}, f"missing in file: {NORM}"),
        ({"encoder.layer.1.norm1.weight": np.ones(8, np.float32)}, "unexpected in file: encoder.layer.1.norm1.weight"),
        ({NORM: np.full(8, np.nan, np.float32)}, f"not finite: {NORM}"),
        ({NORM: np.ones(8, np.int64)}, f"wrong dtype: {NORM} is int64; allowed: float32, float16, bfloat16"),
        ({NORM: np.ones(9, np.float32)}, rf"wrong shape: {NORM} \(9,\)"),
        ({f"dinov2.{NORM}": np.ones(8, np.float32)}, f"holds {NORM} twice"),
    ],
)
def test_bad_weights(tmp_path, change, message):
    save_encoder(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = {name: array for name, array in (weights.read_state_dict(path) | change).items() if array is not None}
    weights.write_safetensors(path, arrays, overwrite=True)
    with pytest.raises(ValueError, match=f"(?s)^{tmp_path}.*{message}"):
        vit.load_encoder(tmp_path, 32)


@pytest.mark.parametrize(
    "content, message",
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"), (None, "damaged or incomplete")],
)
def test_damaged_weights(tmp_path, content, message):
    save_encoder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=f"^{path} .*{message}"):
        vit.load_encoder(tmp_path, 32)


def test_what_is_no_part_of_the_encoder_is_left_alone(tmp_path):
    save_encoder(tmp_path, family="clip")
    expected = vit.read_file(tmp_path).params
    path = tmp_path / "model.safetensors"
    others = ("vision_model.embeddings.position_ids", "text_model.norm.bias", "logit_scale", "visual_projection.weight")
    arrays = weights.read_state_dict(path) | {name: np.zeros(3, np.int64) for name in others}
    weights.write_safetensors(path, arrays, overwrite=True)
    assert_same_bits(vit.read_file(tmp_path).params, expected)


def test_missing_shard(tmp_path):
    save_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="lacks model-00001-of-00002.safetensors"):
        vit.load_encoder(tmp_path, 32)


def test_image_size_must_divide(tmp_path):
    save_encoder(tmp_path)
    with pytest.raises(ValueError, match="image_size 30 .* patch size 7; set .* 28 or 35"):
        vit.load_encoder(tmp_path, 32, image_size=30)


@pytest.mark.parametrize("fields", [{"grid": (2, 3)}, {"mlp_dim": 20}, {"num_class_tokens": 2}])
def test_save_refuses_what_no_config_can_express(tmp_path, fields):
    sizes = {"patch_size": 7, "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_dim": 32, "grid": (2, 2)}
    with pytest.raises(ValueError, match="(?s)no config.json of dinov2, .* square grids .* whole multiple of hidden_size"):
        vit.save_encoder(tmp_path / "encoder", VisionTransformer(**sizes | fields), {})
    assert not (tmp_path / "encoder").exists()


def test_save_overwrites_only_when_asked(tmp_path):
    save_encoder(tmp_path)
    _, module, params = vit.read_file(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileExistsError, match="config.json exists.*overwrite"):
        vit.save_encoder(tmp_path, module, params)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    vit.save_encoder(tmp_path, module, params, overwrite=True)
    assert_same_bits(vit.read_file(tmp_path).params, params)
