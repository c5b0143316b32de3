"""VisionTransformer against transformers' Dinov2, through the files that both read and write."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from checkpoints_tools import vit as conversion
from checkpoints_tools import weights
from checkpoints_tools.mapping import to_torch
from repae_jax import features
from repae_jax.models.vit import VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7}
init_params = jax.jit(features.init_params, static_argnums=0)
CASES = {
    "base": {"image_size": 518, "patch_size": 14},
    "giant": {**TINY, "image_size": 28, "use_swiglu_ffn": True, "mlp_ratio": 4},
    "giant_resampled": {**TINY, "image_size": 63, "use_swiglu_ffn": True, "mlp_ratio": 3},
    "registers": {**TINY, "image_size": 42, "num_register_tokens": 3},
}


def hugging_face_model(config):
    """Dinov2 with random weights, none of which is trivially 0 or 1."""
    registers = "num_register_tokens" in config
    if registers:
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "embeddings." not in name else 0.1
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith(("norm1.weight", "norm2.weight", "lambda1")) else noise)
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(case, its Hugging Face config, model, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = hugging_face_model(CASES[request.param])
    model.save_pretrained(folder)
    return request.param, CASES[request.param], model, folder


def test_matches_transformers(saved, record_property):
    case, config, model, folder = saved
    resolution = 256 if case == "base" else 32
    encoder, params = conversion.load_encoder(folder, resolution)
    assert encoder.image_size == 224 * resolution // 256
    assert encoder.name == str(folder)

    # transformers resamples positions by another rule: give it a model of the size in use, with our positions
    expected_model = type(model)(type(model.config)(**{**config, "image_size": encoder.image_size}))
    state_dict = {**model.state_dict(), "embeddings.position_embeddings": torch.tensor(params["pos_embed"])}
    expected_model.load_state_dict(state_dict)
    images = np.random.default_rng(1).standard_normal((2, encoder.image_size, encoder.image_size, 3), np.float32)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        expected = expected_model.eval()(pixels).last_hidden_state.numpy()

    cls, patches = jax.jit(encoder.module.apply)({"params": params}, images)
    assert patches.shape == (2, encoder.grid**2, model.config.hidden_size)
    skipped = 1 + config.get("num_register_tokens", 0)
    reference.check(cls, expected[:, 0], reference.NETWORK_RTOL, f"{case} cls", record_property)
    reference.check(patches, expected[:, skipped:], reference.NETWORK_RTOL, f"{case} patch tokens", record_property)


def test_round_trip_is_the_identity(saved):
    case, config, model, folder = saved
    encoder, params = conversion.load_encoder(folder, 32, image_size=config["image_size"])  # the grid stored
    stored = weights.read_state_dict(folder)
    returned = to_torch(conversion.dinov2_table(encoder.module), params)
    assert set(returned) == set(stored)
    for name in set(stored) - {"embeddings.mask_token"}:
        np.testing.assert_array_equal(returned[name].view(np.int32), stored[name].view(np.int32), err_msg=name)


@pytest.mark.parametrize("extra", [{}, {"num_registers": 2}, {"swiglu": True}])
def test_saved_encoder_is_read_by_transformers(tmp_path, record_property, extra):
    fields = {"patch_size": 7, "hidden_size": 24, "depth": 2, "num_heads": 3, **extra}
    encoder = features.make_encoder(fields, 32)
    params = init_params(encoder, jax.random.key(0))
    conversion.save_encoder(tmp_path / "encoder", encoder.module, params)

    loaded, again = conversion.load_encoder(tmp_path / "encoder", 32)
    assert loaded.module == encoder.module
    jax.tree.map(np.testing.assert_array_equal, params, again)

    model_class = transformers.Dinov2WithRegistersModel if "num_registers" in extra else transformers.Dinov2Model
    model, info = model_class.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not model.embeddings.mask_token.any()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with torch.no_grad():
        pixels = torch.tensor(np.array(features.preprocess(encoder, images))).permute(0, 3, 1, 2)
        expected = model.eval()(pixels).last_hidden_state[:, 1 + encoder.module.num_registers :].numpy()
    actual = jax.jit(features.encode, static_argnums=0)(encoder, params, images)
    reference.check(actual, expected, reference.NETWORK_RTOL, f"saved encoder {extra}", record_property)

    with pytest.raises(FileExistsError, match="overwrite"):
        conversion.save_encoder(tmp_path / "encoder", encoder.module, params)


@pytest.mark.parametrize("fields", [{"grid": (2, 3)}, {"mlp_ratio": 2.5}])
def test_save_refuses_what_the_config_cannot_express(tmp_path, fields):
    module = VisionTransformer(**{"patch_size": 7, "hidden_size": 8, "depth": 1, "num_heads": 2, "grid": (2, 2), **fields})
    with pytest.raises(ValueError, match="square grids and whole ratios"):
        conversion.save_encoder(tmp_path / "encoder", module, {})
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "vit"}, "model_type 'vit'; allowed: dinov2, dinov2_with_registers"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; allowed: 'gelu'"),
        ({"patch_size": [7, 14]}, r"patch_size \[7, 14\]"),
        ({"mlp_ratio": None}, "mlp_ratio None"),
        ({"num_hidden_layers": 2}, "missing in file: encoder.layer.1.norm1.weight"),
        ({"image_size": 35}, r"embeddings.position_embeddings \(1, 17, 8\)"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    encoder = features.make_encoder({"patch_size": 7, "hidden_size": 8, "depth": 1, "num_heads": 2}, 32)
    conversion.save_encoder(tmp_path, encoder.module, init_params(encoder, jax.random.key(0)))
    config = weights.read_config(tmp_path) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        conversion.load_encoder(tmp_path, 32)


def test_images_must_fill_the_grid():
    module = VisionTransformer(patch_size=7, hidden_size=8, depth=1, num_heads=2, grid=(4, 4))
    with pytest.raises(ValueError, match=r"\(28, 28\) pixels .* got \(32, 32\)"):
        module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
