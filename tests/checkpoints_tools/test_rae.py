"""Representation autoencoders: against diffusers' AutoencoderRAE on random weights, there and back, files that are wrong."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from small_files import save_vae

from checkpoints_tools import identify, mapping, rae, torch_reference, vae, verify
from configs import common
from repae_jax.models.vae_families import make_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "encoder_input_size": 224, "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 48, "patch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """diffusers' module, 16 x 16 latents of 64 x 64 pixels, with random weights of which none is trivially 0 or 1."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    shape = TINY["encoder_hidden_size"], 16, 16
    mean, std = torch.randn(shape, generator=generator), 0.5 + torch.rand(shape, generator=generator)
    network = diffusers.AutoencoderRAE(**TINY, latents_mean=mean, latents_std=std)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("rae")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return vae.load_vae(folder)


def changed(folder, target, config=None, arrays=None):
    """A copy of a folder with other entries of config.json and other arrays; None drops an array."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | (config or {})))
    state_dict = safetensors.numpy.load_file(folder / WEIGHTS) | (arrays or {})
    safetensors.numpy.save_file({name: array for name, array in state_dict.items() if array is not None}, target / WEIGHTS)
    return target


@pytest.mark.integration
def test_latents_and_images_are_diffusers(theirs, loaded, record_property):
    import torch

    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        latents = theirs.encode(torch.from_numpy((images + 1) / 2).permute(0, 3, 1, 2)).latent
        recon = 2 * theirs.decode(latents).sample.permute(0, 2, 3, 1).numpy() - 1
    latents = latents.permute(0, 2, 3, 1).numpy()
    posterior = jax.jit(lambda x: loaded.module.apply({"params": loaded.params}, x, method="encode"))(images)
    decoded = jax.jit(lambda z: loaded.module.apply({"params": loaded.params}, z, method="decode"))(latents)
    for name, actual, expected in (("latents", posterior.mean, latents), ("images", decoded, recon)):
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        record_property(f"RAE {name}", f"{error:.1e}")
        print(f"{name}: largest difference {error:.1e} of the largest entry")
        assert error < 2e-5
    np.testing.assert_array_equal(posterior.sample(np.ones_like(latents)), posterior.mean)
    assert np.isinf(posterior.kl()).all()  # of a point to N(0, 1)


def test_there_and_back_is_the_identity(loaded, folder, tmp_path):
    vae.save_diffusers(tmp_path / "out", loaded.module, loaded.params, loaded.latent_stats)
    again = vae.load_vae(tmp_path / "out")
    assert again.module == loaded.module and again.layout == "diffusers' RAE"
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.latent_stats, {"mean": np.zeros(64), "var": np.ones(64)})
    written = safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)
    assert "encoder.encoder.layer.1.attention.attention.query.weight" in written  # as in the released files
    # transformers 5 has renamed the encoder's attention
    original = safetensors.numpy.load_file(folder / WEIGHTS)
    renamed = {name if name in original else rae.to_transformers_5(name): array for name, array in written.items()}
    assert renamed.keys() == original.keys()
    for name, array in original.items():
        trained = "mask_token" not in name
        np.testing.assert_array_equal(renamed[name], array if trained else np.zeros_like(array), err_msg=name)


def test_diffusers_takes_what_is_written(theirs, loaded):
    ours, reference = torch_reference.torch_rae(loaded.module, loaded.params).state_dict(), theirs.state_dict()
    assert ours.keys() == reference.keys()
    assert all((ours[name] == reference[name]).all() for name in ours if "mask_token" not in name)


@pytest.mark.integration
def test_verify_and_identify(folder):
    assert identify.identify(folder).kind == "vae"
    differences = verify.verify(folder)
    assert [difference.output for difference in differences] == ["RAE encoder", "RAE decoder"]
    assert all(difference.float32 < 2e-5 < difference.bfloat16 < 0.2 for difference in differences)


def test_statistics_of_the_published_file(loaded, tmp_path):
    """(z - mean) / sqrt(var + 1e-5), as `stage1/rae.py` has it, by hand."""
    torch, rng = pytest.importorskip("torch"), np.random.default_rng(0)
    mean, var = rng.standard_normal((64, 16, 16)).astype(np.float32), rng.uniform(1e-3, 2, (64, 16, 16)).astype(np.float32)
    torch.save({"mean": torch.from_numpy(mean), "var": torch.from_numpy(var)}, tmp_path / "stat.pt")
    params = vae.with_latent_stats(loaded, tmp_path / "stat.pt").params
    tokens = rng.standard_normal((1, 16, 16, 64)).astype(np.float32)
    norm = params["latent_norm"]
    actual = (tokens - norm["mean"]) / (norm["std"] + rae.STD_EPSILON)
    expected = (tokens[0].transpose(2, 0, 1) - mean.astype(np.float64)) / np.sqrt(var.astype(np.float64) + 1e-5)
    np.testing.assert_allclose(actual[0].transpose(2, 0, 1), expected, rtol=2e-6)
    for arrays, message in (
        ({"mean": mean}, "holds mean; the statistics of an RAE are mean and var"),
        ({"mean": mean, "var": -var}, "must be finite, and var not negative"),
        ({"mean": mean, "var": var[:7]}, "var has shape (7, 16, 16); allowed: (64, 16, 16)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rae.with_statistics(loaded.params, arrays, "stat.pt")


def test_a_folder_without_statistics(folder, loaded, tmp_path):
    none = {"latents_mean": None, "latents_std": None}
    one = {"_latents_mean": np.zeros(1, np.float32), "_latents_std": np.ones(1, np.float32)}
    bare = changed(folder, tmp_path / "bare", none, one)
    without = vae.load_vae(bare)
    assert without.latent_stats is None and not rae.has_statistics(without.params)
    with pytest.raises(ValueError, match=r"no latents_mean and latents_std.*config.init.latent_stats=''"):
        vae.read_latent_stats(bare)
    vae.save_diffusers(tmp_path / "out", without.module, without.params, None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["latents_mean"] is None
    assert safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)["_latents_std"].tolist() == [1.0]
    stats = vae.read_latent_stats(folder)
    assert not stats["mean"].any() and (stats["var"] == 1).all() and len(stats["var"]) == 64


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        ({"encoder_type": "mae"}, {}, "encoder_type 'mae'; allowed: 'dinov2'"),
        ({"scaling_factor": 0.5}, {}, "scaling_factor 0.5"),
        ({"encoder_input_size": 40}, {}, "encoder_input_size 40 and encoder_hidden_size 64; allowed: multiples of"),
        ({"decoder_hidden_size": "wide"}, {}, "decoder_hidden_size 'wide'; allowed: a positive number"),
        ({"_class_name": "AutoencoderKL"}, {}, "is of class 'AutoencoderKL'; allowed here: 'AutoencoderRAE'"),
        ({}, {"_latents_mean": np.zeros((64, 2, 2), np.float32)}, "_latents_mean has shape (64, 2, 2); allowed: (64, 16, 16)"),
        ({}, {"decoder.decoder_norm.bias": None}, "missing in file: decoder.decoder_norm.bias"),
        ({}, {"encoder_mean": np.zeros((1, 3, 1, 1), np.float32)}, "differs from the value this network fixes: encoder_mean"),
        ({"encoder_num_hidden_layers": 1}, {}, "unexpected in file: encoder.encoder.layer.1."),
    ],
)
def test_files_that_are_refused(folder, tmp_path, config, arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vae.load_vae(changed(folder, tmp_path / "changed", config, arrays))


def test_one_network_in_the_place_of_another(folder, loaded, tmp_path):
    convolutional, _ = save_vae(tmp_path / "kl")
    with pytest.raises(ValueError, match="an AutoencoderKL, config.vae describes an RepresentationAutoencoder: correct one"):
        vae.read_vae_params(tmp_path / "kl", loaded.module)
    with pytest.raises(ValueError, match="an RepresentationAutoencoder, config.vae describes an AutoencoderKL: correct one"):
        vae.read_vae_params(folder, convolutional)
    with pytest.raises(ValueError, match="grid: 16 in the file, 4 here"):
        vae.read_vae_params(folder, loaded.module.clone(grid=4))
    with pytest.raises(ValueError, match="RAE and VTP are written as folders alone"):
        vae.save_published(tmp_path / "rae.pt", loaded.module, loaded.params, None)
    with pytest.raises(ValueError, match="cannot express 2 heads of an encoder"):
        rae.config_of(loaded.module.clone(encoder_heads=2), loaded.params)


def test_images_have_the_one_size(loaded):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="32 x 32 pixels; this RAE is for 64 x 64"):
        jax.eval_shape(lambda x: loaded.module.apply({"params": loaded.params}, x, method="encode"), images)


def test_the_released_sizes():
    """The defaults of diffusers' config.json are overridden in the released ones by those of configs/decoder/ViTXL."""
    module = make_vae(common.OTHER_VAES["rae-dinov2-base"], 256)
    assert (module.grid, module.factor, module.latent_channels) == (16, 16, 768)
    names = {name for entry in rae.rae_table(module).entries for name in entry.torch}
    assert {"decoder.decoder_layers.27.output.dense.bias", "encoder.encoder.layer.11.norm2.weight"} <= names
    shapes = rae.abstract_params(module)
    millions = {name: sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) / 1e6 for name in ("encoder", "decoder")}
    print(millions)
    assert rae.rae_table(module).leaves == set(mapping.flatten(shapes))
    # DINOv2-B is 86.58 M, here without its final norm, its table of positions and its mask token, with four registers
    assert millions["encoder"] == pytest.approx(86.58 - 1370 * 768 / 1e6, abs=0.01)
    # 28 blocks of 4 d^2 + 2 d m weights and 9 d + m biases and norms, with d = 1152 and m = 4096, besides embedding and head
    block = 4 * 1152**2 + 2 * 1152 * 4096 + 9 * 1152 + 4096
    rest = 768 * 1152 + 1152 + 1152 + 2 * 1152 + 1152 * 768 + 768
    assert millions["decoder"] == pytest.approx((28 * block + rest) / 1e6, rel=1e-9)
