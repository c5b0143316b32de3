"""VTP's tokenizers: against the published code's values, there and back, and folders that are not known here."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy

from checkpoints_tools import identify, mapping, vae, verify, vtp
from configs import common
from repae_jax.models.vae_families import make_vae
from repae_jax.models.vtp import VisualTokenizer, rounded_rotation, swiglu_width

STATS = {"mean": np.linspace(-1, 1, 8).astype(np.float32), "var": np.linspace(0.5, 2, 8).astype(np.float32)}
# rotations in bfloat16, which has 8 bits: one last bit that XLA rounds otherwise is 4e-3 of a query
BFLOAT16_RTOL = 4e-3


@pytest.fixture(scope="module")
def golden():
    """(case, module, parameters) of the published encoder and decoder, 3 x 4 latents of 12 x 16 pixels."""
    case = reference.load("vtp")
    sizes = {name: value for name, value in case.meta.items() if name not in ("prefix", "note")}
    module = VisualTokenizer(**sizes)
    params = mapping.to_flax(vtp.vtp_table(module), case.weights, vtp.abstract_params(module))
    return case, module, params


@pytest.fixture
def folder(golden, tmp_path):
    _, module, params = golden
    vae.save_diffusers(tmp_path / "vtp", module, params, STATS)
    return tmp_path / "vtp"


def test_rotations_are_the_published_ones(golden):
    """Exact: the same operations, each rounded to bfloat16."""
    case, _, _ = golden
    angles = jnp.asarray(rounded_rotation(3, 4, 16))
    for name, function in (("sin", jnp.sin), ("cos", jnp.cos)):
        actual = np.asarray(function(angles)).astype(np.float32)
        np.testing.assert_array_equal(np.tile(actual, 2), case.arrays[name], err_msg=name)


@pytest.mark.integration
def test_latents_and_images_are_the_published_ones(golden, record_property):
    case, module, params = golden
    pixels, latents, recon = (reference.nhwc(case.arrays[name]) for name in ("pixels", "latents", "recon"))
    encode = jax.jit(lambda x: module.apply({"params": params}, x, method=lambda m, x: m.encoder(x)))
    decode = jax.jit(lambda z: module.apply({"params": params}, z, method=lambda m, z: m.decoder(z)))
    reference.check(encode(pixels), latents, BFLOAT16_RTOL, "VTP latents", record_property)
    reference.check(decode(latents), recon, BFLOAT16_RTOL, "VTP images", record_property)


@pytest.mark.integration
def test_pixels_are_normalized_as_the_encoder_was_trained(golden):
    """ImageNet's mean and deviation of pixels in [0, 1], by hand, on the way in and out."""
    _, module, params = golden
    mean, std = np.asarray([0.485, 0.456, 0.406], np.float32), np.asarray([0.229, 0.224, 0.225], np.float32)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    posterior = module.apply({"params": params}, images, method="encode")
    inside = module.apply({"params": params}, ((images + 1) / 2 - mean) / std, method=lambda m, x: m.encoder(x))
    np.testing.assert_allclose(posterior.mean, inside, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(posterior.std, np.zeros_like(inside))
    decoded = module.apply({"params": params}, inside, method="decode")
    outside = module.apply({"params": params}, inside, method=lambda m, z: m.decoder(z))
    np.testing.assert_allclose(decoded, 2 * (outside * std + mean) - 1, rtol=1e-5, atol=1e-5)


def test_there_and_back_is_the_identity(golden, folder):
    case, module, params = golden
    assert identify.identify(folder).kind == "vae"
    loaded = vae.load_vae(folder)
    assert loaded.module == module and loaded.layout == "VTP"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    np.testing.assert_allclose(loaded.latent_stats["mean"], STATS["mean"])
    np.testing.assert_allclose(loaded.latent_stats["var"], STATS["var"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, vae.read_latent_stats(folder), loaded.latent_stats)
    written = safetensors.numpy.load_file(folder / "model.safetensors")
    published = {name for name in case.weights if "rope_embed" not in name}
    assert set(written) == published
    for name in published - {"trunk.mask_token"}:
        np.testing.assert_array_equal(written[name], case.weights[name], err_msg=name)


def test_the_text_side_is_left_out(golden, folder):
    case, _, params = golden
    text = {
        "text_transformer.resblocks.0.ln_1.weight": np.ones(4, np.float32), "logit_scale": np.ones((), np.float32),
        "visual_proj.weight": np.ones((4, 4), np.float32), "positional_embedding": np.ones((77, 4), np.float32),
        "trunk.rope_embed.periods": np.ones(4, np.float32),
    }  # fmt: skip
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | text, path)
    jax.tree.map(np.testing.assert_array_equal, vae.load_vae(folder).params, params)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_use_qk_norm", True, "has vision_use_qk_norm True; allowed: False"),
        ("vision_ffn_layer", "mlp", "has vision_ffn_layer 'mlp'; allowed: 'swiglu'"),
        ("decoder_norm_layer", "rmsnorm", "has decoder_norm_layer 'rmsnorm'; allowed: 'layernorm'"),
        ("decoder_depth", 0, "has decoder_depth 0; allowed: a positive number"),
        ("vision_embed_dim", 64, "wrong shape: trunk.patch_embed.proj.weight"),
        ("model_type", "vit", "is of class 'vit'; allowed here: 'AutoencoderKL', 'AutoencoderRAE', 'vtp'"),
    ],
)
def test_folders_that_are_refused(folder, key, value, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        vae.load_vae(folder)


def test_what_has_no_counterpart(golden, folder, tmp_path):
    _, module, params = golden
    with pytest.raises(ValueError, match="neither diffusers nor transformers has: nothing to compare with"):
        verify.verify(folder)
    next(folder.glob("*-latents-stats.*")).unlink()
    with pytest.raises(ValueError, match="give VTP's latents_stats.pt, or let them be measured"):
        vae.read_latent_stats(folder)
    with pytest.raises(ValueError, match="RAE and VTP are written as folders alone"):
        vae.save_published(tmp_path / "vtp.pt", module, params, STATS)


def test_the_released_sizes():
    """VTP-L: 'Image Feature Extraction, 0.7B' with a text side of 12 layers of 768, about 0.12B."""
    module = make_vae(common.OTHER_VAES["vtp-large"], 256)
    assert (module.factor, module.latent_channels, swiglu_width(1024), swiglu_width(768)) == (16, 64, 2736, 2048)
    shapes = vtp.abstract_params(module)
    assert vtp.vtp_table(module).leaves == set(mapping.flatten(shapes))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
    print(f"{count:.3f} B")
    assert count == pytest.approx(0.7 - 0.12, abs=0.05)
