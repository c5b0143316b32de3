import json
import os

import ml_dtypes
import numpy as np
import pytest
import reference
from absl import logging
from flax import traverse_util
from golden_networks import drawn_params, golden_vae
from small_files import STATS
from weight_files import write_torch

from checkpoints_tools import mapping, torch_reference, vae, vae_layouts, vae_stats, weights
from repae_jax import files
from repae_jax.models.autoencoder import AutoencoderKL

NETWORKS = {
    "plain": AutoencoderKL(latent_channels=4, channels=32, channel_multipliers=(1, 2), num_res_blocks=1),
    "attention": AutoencoderKL(
        latent_channels=4, channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=2, attention_levels=(2,)
    ),
    "bare": AutoencoderKL(latent_channels=4, channels=32, channel_multipliers=(1, 3), num_res_blocks=1, quant_convs=False),
}


@pytest.fixture(scope="module")
def drawn():
    """name -> parameters of NETWORKS."""
    return {name: drawn_params(module) for name, module in NETWORKS.items()}


@pytest.fixture
def module():
    return NETWORKS["plain"]


@pytest.fixture
def params(drawn):
    return drawn["plain"]


@pytest.fixture
def state_dict(module, params):
    return mapping.to_torch(vae_layouts.vae_table(module), params)


@pytest.fixture
def folder(tmp_path, module, params):
    vae.save_diffusers(tmp_path / "diffusers", module, params, STATS)
    return tmp_path / "diffusers"


def same_tree(actual, expected):
    actual, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def same_stats(actual, expected=STATS):
    assert {name: array.dtype for name, array in actual.items()} == {"mean": np.float32, "var": np.float32}
    same_tree(actual, expected)


def save(path, state_dict):
    weights.write_safetensors(path, state_dict)
    return path


def edit_config(folder, **changes):
    config = files.read_json(folder / "config.json")
    config |= changes
    config = {name: value for name, value in config.items() if value is not ...}
    files.write_json(folder / "config.json", config, overwrite=True)


# ---------------------------------------------------------------------------------------------------------------------
# Every layout, in and out.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [vae_layouts.COMPVIS, vae_layouts.DIFFUSERS, vae_layouts.DIFFUSERS_2022])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_layout_is_recognised_with_its_sizes(tmp_path, drawn, network, names):
    table = vae_layouts.vae_table(NETWORKS[network], names)
    written = mapping.to_torch(table, drawn[network])
    loaded = vae.load_vae(save(tmp_path / "vae.safetensors", written))
    assert (loaded.module, loaded.layout, loaded.latent_stats) == (NETWORKS[network], names.layout, None)
    same_tree(loaded.params, drawn[network])
    same_tree(mapping.to_torch(table, loaded.params), written)


def test_the_two_tables_fill_the_same_leaves(module):
    def leaves(table):
        return {path for entry in table.entries for path in entry.flax}

    assert leaves(vae_layouts.vae_table(module)) == leaves(vae_layouts.vae_table(module, vae_layouts.DIFFUSERS))


@pytest.mark.integration
@pytest.mark.parametrize("name", reference.cases("vae_f16d32_small") + reference.cases("vae_f8d4_small"))
def test_golden_through_diffusers_and_back(tmp_path, name, record_property):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    case = reference.load(name)
    loaded = vae.load_vae(save(tmp_path / "golden.safetensors", case.weights))
    assert loaded.module == golden_vae(case.meta, case.weights)
    channels = loaded.module.latent_channels
    stats = {"mean": np.linspace(-1, 1, channels, dtype=np.float32), "var": np.linspace(0.1, 3, channels, dtype=np.float32)}
    vae.save_diffusers(tmp_path / "out", loaded.module, loaded.params, stats)

    theirs, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    np.testing.assert_allclose(theirs.config.latents_mean, stats["mean"])
    np.testing.assert_allclose(np.square(theirs.config.latents_std), stats["var"], rtol=1e-6)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(case.arrays["image"])).latent_dist
        decoded = theirs.decode(torch.from_numpy(case.arrays["latents"])).sample
    for key, actual in (("mean", posterior.mean), ("logvar", posterior.logvar), ("decoded", decoded)):
        reference.check(actual.numpy(), case.arrays[key], reference.NETWORK_RTOL, key, record_property)

    returned = vae.load_vae(tmp_path / "out")
    same_tree(mapping.to_torch(vae_layouts.vae_table(returned.module), returned.params), case.weights)
    same_stats(returned.latent_stats, stats)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_diffusers_saves_is_read(tmp_path, drawn, network):
    pytest.importorskip("diffusers")
    theirs = torch_reference.torch_vae(NETWORKS[network], drawn[network])
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = vae.load_vae(tmp_path / "pipeline")
    assert (loaded.module, loaded.layout) == (NETWORKS[network], "diffusers")
    same_tree(loaded.params, drawn[network])


def test_a_whole_stable_diffusion_file(tmp_path, module, params, state_dict):
    whole = {f"first_stage_model.{name}": array for name, array in state_dict.items()}
    whole |= {"model.diffusion_model.out.0.weight": np.ones(3, np.float16), "model_ema.num_updates": np.asarray(3, np.int64)}
    loaded = vae.load_vae(save(tmp_path / "sd.safetensors", whole))
    assert (loaded.module, loaded.layout) == (module, "compvis")
    same_tree(loaded.params, params)


@pytest.mark.parametrize(
    "extras",
    [
        ("foundation_model.model.cls_token", "linear_proj.weight", "loss.discriminator.main.0.weight", "loss.logvar"),
        ("model_ema.decay", "model_ema.encoderconv_inweight", "loss.perceptual_loss.lin0.model.1.weight"),
    ],
)
def test_extras_of_the_training_are_ignored(tmp_path, module, params, state_dict, extras):
    pytest.importorskip("torch")
    content = {"state_dict": {**state_dict, **{name: np.ones(2, np.float32) for name in extras}}, "global_step": 3}
    write_torch(tmp_path / "vavae.ckpt", content)
    same_tree(vae.load_vae(tmp_path / "vavae.ckpt").params, params)
    same_tree(vae.read_vae_params(tmp_path / "vavae.ckpt", module), params)


@pytest.mark.integration
def test_the_map_from_latents_to_tokens(tmp_path, module, monkeypatch):
    """VA-VAE's `linear_proj`, a 1x1 convolution without bias; one with a bias maps the other way round."""
    messages = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: messages.append(message % args))
    whole = module.clone(feature_dim=6)
    params = drawn_params(whole)
    rest = {name: tree for name, tree in params.items() if name != "vf_projection"}
    state_dict = mapping.to_torch(vae_layouts.vae_table(whole), params)
    np.testing.assert_array_equal(state_dict["linear_proj.weight"][:, :, 0, 0].T, params["vf_projection"]["kernel"])
    path = save(tmp_path / "vavae.safetensors", state_dict)
    loaded = vae.load_vae(path)
    assert loaded.module == whole
    same_tree(loaded.params, params)
    same_tree(vae.read_vae_params(path, whole), params)
    same_tree(vae.read_vae_params(path, module), rest)
    assert vae_layouts.published_name(AutoencoderKL(latent_channels=4, feature_dim=6)) == "f8d4" and not messages

    vae.save_diffusers(tmp_path / "folder", whole, params, STATS)
    assert vae.load_vae(tmp_path / "folder").module == module
    path = save(tmp_path / "backward.safetensors", {**state_dict, "linear_proj.bias": np.zeros(6, np.float32)})
    other = whole.clone(feature_dim=7)
    vavae = tmp_path / "vavae.safetensors"
    for source, described, width in ((tmp_path / "folder", whole, None), (path, whole, None), (vavae, other, 6)):
        same_tree(vae.read_vae_params(source, described), rest)
        assert f"tokens of width {described.feature_dim} starts afresh" in messages[-1]
        assert messages[-1].endswith(f"{source} is of width {width}")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_widened(tmp_path, params, state_dict, dtype, warnings):
    vae.load_vae(save(tmp_path / "single.safetensors", state_dict))
    assert not warnings
    halves = {name: array.astype(dtype) for name, array in state_dict.items()}
    loaded = vae.load_vae(save(tmp_path / "half.safetensors", halves))
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    same_tree(mapping.to_torch(vae_layouts.vae_table(loaded.module), loaded.params), expected)
    (message,) = warnings
    assert f"half.safetensors: {len(halves)} of {len(halves)} arrays are {np.dtype(dtype)}" in message


def test_the_modules_compute_dtype_and_remat_are_the_callers(tmp_path, module, state_dict):
    loaded = vae.load_vae(save(tmp_path / "vae.safetensors", state_dict), dtype=ml_dtypes.bfloat16, remat=True)
    assert loaded.module == module.clone(dtype=ml_dtypes.bfloat16, remat=True)


def test_norm_groups_come_from_config_json(tmp_path):
    module = AutoencoderKL(latent_channels=4, channels=16, channel_multipliers=(1, 3), num_res_blocks=1, norm_groups=8)
    params = drawn_params(module)
    vae.save_diffusers(tmp_path / "vae", module, params, STATS)
    assert vae.load_vae(tmp_path / "vae").module == module
    assert vae.load_vae(tmp_path / "vae" / "diffusion_pytorch_model.safetensors").module == module
    with pytest.raises(ValueError, match="norm_groups=8 cannot be told by this layout"):
        vae.save_published(tmp_path / "vae", module, params, STATS)
    compvis = save(tmp_path / "vae.safetensors", mapping.to_torch(vae_layouts.vae_table(module), params))
    with pytest.raises(ValueError, match=r"vae.safetensors: 32 group-norm groups do not divide the widths \[16, 48\]"):
        vae.load_vae(compvis)
    same_tree(vae.read_vae_params(compvis, module), params)


def test_a_state_dict_within_something_else(module, params, state_dict):
    loaded, tree = vae.from_state_dict(state_dict, "checkpoint: vae")
    assert loaded == module
    same_tree(tree, params)


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, -1, 1, 1), (-1,)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_statistics_files(tmp_path, suffix, shape):
    pytest.importorskip("torch")
    std = np.sqrt(STATS["var"])
    forms = {
        "repae": {"latents_scale": 1 / std, "latents_bias": STATS["mean"]},
        "lightningdit": {"mean": STATS["mean"], "std": std},
    }
    for name, arrays in forms.items():
        arrays = {key: array.reshape(shape) for key, array in arrays.items()}
        write = write_torch if suffix == ".pt" else weights.write_safetensors
        write(tmp_path / (name + suffix), arrays)
        stats = vae.read_latent_stats(tmp_path / (name + suffix))
        np.testing.assert_array_equal(stats["mean"], STATS["mean"])
        np.testing.assert_allclose(stats["var"], STATS["var"], rtol=3e-7)


def test_published_scales_survive_the_round_trip_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    near_powers = [np.nextafter(np.float32(2.0**k), np.float32(side)) for k in range(-8, 9) for side in (0, np.inf)]
    scale = np.concatenate([rng.lognormal(0, 2, 50_000), near_powers]).astype(np.float32)
    arrays = {"latents_scale": scale.reshape(1, -1, 1, 1), "latents_bias": -scale.reshape(1, -1, 1, 1)}
    same_tree(vae_stats.to_arrays(vae_stats.from_arrays(arrays, "file")), arrays)


def test_published_statistics_lie_beside_the_weights(tmp_path, module, params):
    pytest.importorskip("torch")
    assert len(vae.save_published(tmp_path / "e2e", module, params, STATS)) == 2
    loaded = vae.load_vae(tmp_path / "e2e.pt")
    same_tree(loaded.params, params)
    np.testing.assert_array_equal(loaded.latent_stats["mean"], STATS["mean"])
    np.testing.assert_allclose(loaded.latent_stats["var"], STATS["var"], rtol=3e-7)


def test_statistics_with_the_files_own_ending_count(tmp_path, module, params):
    pytest.importorskip("torch")
    other = {**STATS, "mean": STATS["mean"] + 1}
    vae.save_published(tmp_path / "e2e.pt", module, params, other)
    vae.save_published(tmp_path / "e2e.safetensors", module, params, STATS)
    for suffix, stats in ((".pt", other), (".safetensors", STATS)):
        np.testing.assert_array_equal(vae.load_vae(tmp_path / f"e2e{suffix}").latent_stats["mean"], stats["mean"])


def test_statistics_of_a_diffusers_config(folder):
    same_stats(vae.read_latent_stats(folder))
    assert files.read_json(folder / "config.json")["scaling_factor"] == 1, "not a statistic: pipelines multiply by it besides"
    edit_config(folder, latents_mean=None, latents_std=None, scaling_factor=0.3611, shift_factor=0.1159)
    flux = {"mean": np.full(4, 0.1159, np.float32), "var": np.full(4, 1 / 0.3611**2, np.float32)}
    same_stats(vae.read_latent_stats(folder), flux)
    same_stats(vae.load_vae(folder).latent_stats, flux)
    # sd-vae-ft-mse's config.json is silent: diffusers then takes Stable Diffusion's factor
    edit_config(folder, latents_mean=..., latents_std=..., scaling_factor=..., shift_factor=None)
    same_stats(vae.load_vae(folder).latent_stats, {"mean": np.zeros(4, np.float32), "var": np.full(4, 0.18215**-2, np.float32)})
    edit_config(folder, scaling_factor=None)
    assert vae.load_vae(folder).latent_stats is None
    with pytest.raises(ValueError, match="config.json has neither latents_mean and latents_std nor scaling_factor"):
        vae.read_latent_stats(folder)


def test_the_same_statistics_in_all_channels_are_factors_too(tmp_path, module, params):
    stats = {"mean": np.full(4, 0.1159, np.float32), "var": np.full(4, 7.5, np.float32)}
    vae.save_diffusers(tmp_path / "vae", module, params, stats)
    assert not {"latents_mean", "latents_std"} & set(files.read_json(tmp_path / "vae/config.json")), "pipelines would use both"
    same_stats(vae.load_vae(tmp_path / "vae").latent_stats, stats)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["scales", "factor", "shift and factor"])
def test_pipelines_of_diffusers_normalise_by_what_is_written(tmp_path, module, params, name):
    """Those of SDXL and of FLUX know statistics by channel and a factor, or a shift and a factor; SDXL's know no shift."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stats = {
        "scales": STATS,
        "factor": {"mean": np.zeros(4, np.float32), "var": np.full(4, 0.18215**-2, np.float32)},
        "shift and factor": {"mean": np.full(4, 0.1159, np.float32), "var": np.full(4, 7.5, np.float32)},
    }[name]
    vae.save_diffusers(tmp_path, module, params, stats)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        if name == "shift and factor":
            pipeline = diffusers.FluxImg2ImgPipeline(None, theirs, *[None] * 5)
            normalized = pipeline._encode_vae_image(images, generator)
        else:
            pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(theirs, *[None] * 6)
            normalized = pipeline.prepare_latents(images, None, 2, 1, torch.float32, "cpu", generator, add_noise=False)
    mean, std = stats["mean"][:, None, None], np.sqrt(stats["var"])[:, None, None]
    np.testing.assert_allclose(normalized, (latents.numpy() - mean) / std, rtol=1e-5, atol=1e-5)


SCALE = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"scale": SCALE},
            "stats.safetensors holds scale; latent statistics are latents_scale and latents_bias, or mean and std",
        ),
        ({"mean": SCALE, "std": SCALE, "count": SCALE}, "stats.safetensors holds count, mean, std; latent"),
        ({"latents_scale": 0 * SCALE, "latents_bias": SCALE}, "latents_scale must be positive; its smallest entry is 0.0"),
        ({"mean": SCALE, "std": -SCALE}, "std must be positive; its smallest entry is -1.0"),
        ({"mean": SCALE, "std": np.nan * SCALE}, "std is not finite"),
        ({"mean": np.inf * SCALE, "std": SCALE}, "mean is not finite"),
        ({"mean": SCALE, "std": SCALE[:3]}, "mean has 4 entries, std 3"),
        ({"mean": SCALE, "std": np.ones((2, 2), np.float32)}, r"std has shape \(2, 2\); allowed: \(C,\) or \(1, C, 1, 1\)"),
        ({"mean": SCALE, "std": 1e-30 * SCALE}, "mean or std is beyond the range of float32 variances"),
    ],
)
def test_bad_statistics(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        vae.read_latent_stats(save(tmp_path / "stats.safetensors", arrays))


def test_statistics_of_another_vae_beside_the_file(tmp_path, state_dict):
    save(tmp_path / "vae-latents-stats.safetensors", {"mean": SCALE[:3], "std": SCALE[:3]})
    with pytest.raises(ValueError, match="latents-stats.safetensors: mean has 3 entries, std 3; the VAE has 4 channels"):
        vae.load_vae(save(tmp_path / "vae.safetensors", state_dict))


# ---------------------------------------------------------------------------------------------------------------------
# Bad files.
# ---------------------------------------------------------------------------------------------------------------------


def test_another_network_than_described(tmp_path, drawn, module):
    other = NETWORKS["attention"]
    path = save(tmp_path / "other.safetensors", mapping.to_torch(vae_layouts.vae_table(other), drawn["attention"]))
    with pytest.raises(ValueError, match="other.safetensors holds another VAE than the one described") as error:
        vae.read_vae_params(path, module)
    assert str(error.value).splitlines()[1:] == [
        "  channel_multipliers: (1, 1, 2) in the file, (1, 2) here",
        "  num_res_blocks: 2 in the file, 1 here",
        "  attention_levels: (2,) in the file, () here",
    ]


def test_order_of_multipliers_counts(tmp_path, module, state_dict):
    path = save(tmp_path / "vae.safetensors", state_dict)
    turned = module.clone(channel_multipliers=(2, 1))
    with pytest.raises(ValueError, match=r"channel_multipliers: \(1, 2\) in the file, \(2, 1\) here"):
        vae.read_vae_params(path, turned)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encoder.down.1.block.0.conv1.weight", lambda x: None, "missing in file: encoder.down.1.block.0.conv1.weight"),
        ("encoder.conv_in.bias", lambda x: None, "missing in file: encoder.conv_in.bias, which tells the network's sizes"),
        ("decoder.conv_in.weight", lambda x: x[0, 0, 0], r"wrong shape: decoder.conv_in.weight \(3,\) has too few axes"),
        ("encoder.surprise", lambda x: np.ones((2, 3), np.float32), r"unexpected in file: encoder.surprise \(2, 3\)"),
        ("decoder.conv_out.bias", lambda x: np.nan * x, "not finite: decoder.conv_out.bias"),
        ("decoder.conv_out.bias", lambda x: x.astype(np.int32), "wrong dtype: decoder.conv_out.bias is int32"),
        ("decoder.mid.attn_1.q.weight", lambda x: x[..., 0, 0], r"wrong shape: decoder.mid.attn_1.q.weight \(64, 64\)"),
        ("encoder.down.1.block.0.conv2.bias", lambda x: x[:-1], r"widths \[32, 63\], which are no multiples of the base 32"),
        ("quant_conv.weight", lambda x: None, "missing in file: quant_conv.weight"),
    ],
)
def test_every_damage_is_named_with_its_file(tmp_path, state_dict, name, change, message):
    state_dict[name] = change(state_dict.get(name))
    state_dict = {key: array for key, array in state_dict.items() if array is not None}
    with pytest.raises(ValueError, match=message) as error:
        vae.load_vae(save(tmp_path / "damaged.safetensors", state_dict))
    assert "damaged.safetensors" in str(error.value)


@pytest.mark.parametrize("state_dict", [{"conv1.weight": np.ones(2, np.float32)}, {"encoder.downsamples.0.x": SCALE}])
def test_unknown_layouts(tmp_path, state_dict):
    with pytest.raises(ValueError, match="other.safetensors is no AutoencoderKL in a known layout"):
        vae.load_vae(save(tmp_path / "other.safetensors", state_dict))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKLQwenImage"}, "is of class 'AutoencoderKLQwenImage'; allowed here: 'AutoencoderKL', "),
        ({"_class_name": ...}, "config.json is of class None"),
        ({"latents_mean": [0.0] * 3}, "config.json: latents_mean has 3 entries, latents_std 4; the VAE has 4 channels"),
        ({"latents_std": None}, "config.json has only one of latents_mean and latents_std"),
        ({"latents_std": "wide"}, "config.json: latents_std is 'wide', no list of numbers"),
        ({"norm_num_groups": "32"}, "config.json: norm_num_groups is '32', no positive number"),
        ({"act_fn": "gelu"}, "act_fn: gelu in config.json, silu by the weights"),
        ({"block_out_channels": [32, 32]}, r"block_out_channels: \[32, 32\] in config.json, \[32, 64\] by the weights"),
    ],
)
def test_bad_config_json(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        vae.load_vae(folder)


def test_a_folder_without_a_model(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        vae.load_vae(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has none of .*diffusion_pytorch_model.safetensors"):
        vae.load_vae(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Writing.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_files(tmp_path, module, params, state_dict, suffix):
    pytest.importorskip("torch")
    disc = {"main.0.weight": np.ones((2, 3), np.float32), "main.3.num_batches_tracked": np.asarray(7, np.int64)}
    stem = tmp_path / "new" / ("e2e-0.5" + ("" if suffix == ".pt" else suffix))
    written = vae.save_published(stem, module, params, STATS, disc)
    expected = [f"e2e-0.5{part}{suffix}" for part in ("", "-latents-stats", "-discriminator-ckpt")]
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in stem.parent.iterdir()) == sorted(expected)
    for path, content in zip(written, (state_dict, vae_stats.to_arrays(STATS), disc)):
        same_tree(weights.read_state_dict(path), content)


def test_published_weights_need_no_statistics(tmp_path, module, params):
    written = vae.save_published(tmp_path / "vae.safetensors", module, params, None)
    assert [path.name for path in written] == ["vae.safetensors"]
    with pytest.raises(ValueError, match="vae: latent statistics are missing") as error:
        vae.save_diffusers(tmp_path / "vae", module, params, None)
    for part in ("--latent_stats", "NAME-latents-stats.pt or .safetensors", "latents_scale", "latents_bias", "mean and std"):
        assert part in str(error.value)
    assert not (tmp_path / "vae").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["e2e.safetensors", "e2e-latents-stats.safetensors", "e2e-discriminator-ckpt.safetensors"])
def test_published_files_that_exist_are_kept(tmp_path, module, params, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=name):
        vae.save_published(tmp_path / "e2e.safetensors", module, params, STATS, {"main.0.bias": SCALE})
    assert contents(tmp_path) == {name: b"precious"}
    vae.save_published(tmp_path / "e2e.safetensors", module, params, STATS, {"main.0.bias": SCALE}, overwrite=True)
    same_tree(vae.load_vae(tmp_path / "e2e.safetensors").params, params)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_diffusers_folder_that_exists_is_kept(tmp_path, module, params, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=name):
        vae.save_diffusers(tmp_path, module, params, STATS)
    assert contents(tmp_path) == {name: b"precious"}
    vae.save_diffusers(tmp_path, module, params, STATS, overwrite=True)
    same_tree(vae.load_vae(tmp_path).params, params)


def full_disk(monkeypatch, successes):
    """os.fsync fails after so many files, as on a disk that is full by then."""
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > successes:
            raise OSError("disk full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("successes", [0, 1])
def test_a_diffusers_folder_survives_a_full_disk(folder, module, params, monkeypatch, successes):
    before = contents(folder)
    full_disk(monkeypatch, successes)
    with pytest.raises(OSError, match="disk full.*nothing was changed there"):
        vae.save_diffusers(folder, module, params, {**STATS, "mean": STATS["mean"] + 1}, overwrite=True)
    assert contents(folder) == before


def test_a_folder_with_config_json_is_complete(folder, module, params, monkeypatch):
    real = os.replace

    def killed(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        vae.save_diffusers(folder, module, params, STATS, overwrite=True)
    assert not (folder / "config.json").exists()  # new weights must not meet an old description


@pytest.mark.parametrize("successes", [0, 1, 2])
def test_published_files_survive_a_full_disk(tmp_path, module, params, monkeypatch, successes):
    stem, disc = tmp_path / "e2e.safetensors", {"main.0.bias": SCALE}
    vae.save_published(stem, module, params, STATS, disc)
    before = contents(tmp_path)
    full_disk(monkeypatch, successes)
    stats = {**STATS, "mean": STATS["mean"] + 1}
    with pytest.raises(OSError, match="disk full.*nothing was changed there"):
        vae.save_published(stem, module, params, stats, {"main.0.bias": 2 * SCALE}, overwrite=True)
    assert contents(tmp_path) == before


def test_a_new_vae_never_lies_beside_old_statistics(tmp_path, module, params, monkeypatch):
    stem = tmp_path / "e2e.safetensors"
    vae.save_published(stem, module, params, STATS)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="e2e-latents-stats.safetensors is of the VAE that would be replaced; remove it"):
        vae.save_published(stem, module, params, None, overwrite=True)
    assert contents(tmp_path) == before
    real = os.replace

    def killed(source, target):
        if "stats" in target.name:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        vae.save_published(stem, module, params, STATS, overwrite=True)
    assert list(contents(tmp_path)) == ["e2e.safetensors"]


def test_the_file_says_that_it_is_pytorchs(folder):
    header = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + size])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({**STATS, "mean": STATS["mean"][:3]}, "mean has 3 entries, var 4; the VAE has 4 channels"),
        ({**STATS, "var": -STATS["var"]}, "var must be positive; its smallest entry is -30"),
        ({**STATS, "mean": np.nan * STATS["mean"]}, "mean is not finite"),
    ],
)
def test_statistics_that_are_not_the_modules(tmp_path, module, params, stats, message):
    for write in (vae.save_diffusers, vae.save_published):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "vae", module, params, stats)
    assert not list(tmp_path.iterdir())


def test_a_first_level_that_diffusers_cannot_express(tmp_path):
    module = AutoencoderKL(latent_channels=4, channels=32, channel_multipliers=(2, 1), num_res_blocks=1)
    params = drawn_params(module)
    with pytest.raises(ValueError, match=r"channel_multipliers=\(2, 1\): diffusers' first level is as wide as conv_in"):
        vae.save_diffusers(tmp_path / "vae", module, params, STATS)
    assert not list(tmp_path.iterdir())
    vae.save_published(tmp_path / "vae.safetensors", module, params, STATS)
    loaded = vae.load_vae(tmp_path / "vae.safetensors")
    assert loaded.module == module
    same_tree(loaded.params, params)


def test_parameters_that_are_not_the_modules(tmp_path, drawn, module):
    for write in (vae.save_diffusers, vae.save_published):
        with pytest.raises(ValueError, match="the tree does not fit the conversion table"):
            write(tmp_path / "vae", module, drawn["bare"], STATS)
    assert not list(tmp_path.iterdir())
