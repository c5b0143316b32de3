"""Everything a user can get wrong ends in an error that names the value and what is allowed, before anything is compiled."""

import fnmatch
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
from ml_collections import ConfigDict
from PIL import Image

from configs import common, ldm, repae, vae
from repae_jax import cli, train
from repae_jax.distributed import sharding
from repae_jax.job import build, compilation, frozen_weights, initial_state, validate
from repae_jax.training import checkpoint

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    # constants take milliseconds
    lambda name, seconds, **_: (
        COMPILED.append(seconds) if name.endswith("/backend_compile_duration") and seconds > 0.1 else None
    )
)


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Compiles a random key, which even a check needs, once."""
    build.build(small.config())


@pytest.fixture(autouse=True)
def nothing_compiled(warm, monkeypatch):
    monkeypatch.setattr(initial_state, "create_initial_state", None)
    COMPILED.clear()
    yield
    assert not COMPILED


def refused(changes, *messages, run=None, file=repae):
    """Checks that a config with changes is refused with an error that contains every message."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        (run or build.build)(small.config(changes, file))
    for message in messages:
        assert message in str(caught.value), str(caught.value)
    assert cli.line_of(caught.value)


# ---- names ----------------------------------------------------------------------------------------------------------

SECTIONS = [
    "data", "vae", "sit", "disc", "lpips", "loss", "diffusion", "optim", "init", "precision", "mesh", "checkpoint", "log",
    "hooks", "sampling", "encoders.target", "optim.vae", "optim.sit", "optim.disc",
]  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_and_missing_fields(section):
    refused({f"{section}.colour": 1}, f"config.{section}: unknown fields ['colour']")
    config = small.config()
    fields = config
    for part in section.split("."):
        fields = fields[part]
    needed = [name for name in fields if section not in ("vae", "sit", "disc", "sampling")]  # modules have defaults
    if section in ("vae", "sit"):
        needed = ["latent_channels"] if section == "vae" else ["depth"]
    for name in needed[:1]:
        del fields[name]
        with pytest.raises(ValueError, match=re.escape(f"missing fields ['{name}']")):
            build.build(config)


def test_unknown_and_missing_sections():
    refused({"colour": 1}, "config: unknown fields ['colour'], missing fields []", "'diffusion'")
    config = small.config()
    del config.loss
    with pytest.raises(ValueError, match=re.escape("config: unknown fields [], missing fields ['loss']")):
        build.build(config)


def test_configs_are_locked():
    with pytest.raises(AttributeError, match="dpeth"):
        repae.get_config("tiny").sit.dpeth = 3


@pytest.mark.parametrize(
    ("arg", "messages"),
    [
        ("tinny", ["'tinny'", "['digits', 'tiny']"]),
        ("tiny,digits", ["second", "digits"]),
        ("colour=red", ["'colour'", "['encoder', 'resolution', 'sit', 'vae']"]),
        ("sit=Q/2", ["SiT size 'Q'", "S, B, L, XL"]),
        ("sit=B/3", ["'B/3'", "[1, 2, 4, 8]"]),
        ("sit=B", ["'B'", "SIZE/PATCH"]),
        ("vae=f4", ["VAE 'f4'", "f8d4, f8d16, f16d32"]),
        ("resolution=big", ["resolution=big", "256"]),
        ("resolution=", ["resolution=", "256"]),
    ],
)
def test_config_arguments(arg, messages):
    with pytest.raises(ValueError) as caught:
        repae.get_config(arg)
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_unknown_encoder_lists_the_known_ones():
    with pytest.raises(ValueError, match="'dinov3-base' is unknown; allowed: dinov2-small, dinov2-base"):
        repae.get_config("encoder=dinov3-base")
    config = repae.get_config()
    config.encoders.target.architecture = "dinov3-base"
    with pytest.raises(ValueError, match="'dinov3-base' is unknown; allowed: dinov2-small, dinov2-base"):
        build.build(config, jax.devices()[:1])


def test_tables_name_what_they_hold():
    with pytest.raises(ValueError, match="thing 'x' is unknown; allowed: a, b"):
        common.choose("thing", "x", {"a": 1, "b": 2})


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"job": "reape"}, ["config.job='reape'", "['repae', 'ldm', 'vae']"]),
        ({"steps": 0}, ["config.steps=0 must be at least 1"]),
        ({"steps": -5}, ["config.steps=-5 must be at least 1"]),
        ({"accumulation": 0}, ["config.accumulation=0 must be at least 1"]),
        ({"max_skipped_in_a_row": 0}, ["config.max_skipped_in_a_row=0 must be at least 1"]),
        ({"compiler_options": "b,xla_a=1"}, ["config.compiler_options='b,xla_a=1'", "'b' is not understood", "name=value"]),
        (
            {"deterministic": True, "compiler_options": "xla_gpu_exclude_nondeterministic_ops=False"},
            ["config.compiler_options='xla_gpu_exclude_nondeterministic_ops=False'", "config.deterministic=True", "leave one"],
        ),
        ({"compiler_options": "xla_a=1,xla_a=2"}, ["'xla_a=2' is not understood, or twice there"]),
        ({"attention": "flash"}, ["config.attention='flash'", "xla", "cudnn"]),
        ({"attention": "cudnn"}, ["config.attention='cudnn' is for NVIDIA GPUs in bfloat16, not for cpu", "set it to 'xla'"]),
        ({"ema_decay": 1.5}, ["config.ema_decay=1.5", "[0, 1)"]),
        ({"checkpoint.every": 0}, ["config.checkpoint.every=0 must be at least 1"]),
        ({"checkpoint.keep_last": 0}, ["config.checkpoint.keep_last=0"]),
        ({"log.every": 0}, ["config.log.every=0"]),
        ({"hooks.images": 0}, ["config.hooks.images=0"]),
        ({"hooks.samples_every": -1}, ["config.hooks.samples_every=-1"]),
        ({"hooks.fid_every": 5}, ["config.hooks.fid_every=5", "config.hooks.fid_reference is empty"]),
        ({"init.stats_images": 0}, ["config.init.stats_images=0"]),
        ({"data.batch_size": 0}, ["config.data.batch_size=0"]),
        ({"data.workers": -1}, ["config.data.workers=-1"]),
        ({"seed": -1}, ["config.seed=-1", "4294967295"]),
        ({"data.batch_size": -8}, ["config.data.batch_size=-8"]),
        ({"data.num_classes": 0}, ["config.data.num_classes=0"]),
        ({"data.image_size": 0}, ["config.data.image_size=0"]),
        ({"data.image_size": 9}, ["config.data.image_size=9", "factor 2", "use 8"]),
        ({"data.image_size": (8, 9)}, ["config.data.image_size=(8, 9)", "factor 2", "use 8"]),
        ({"data.image_size": (9, 13)}, ["config.data.image_size=(9, 13)", "config.vae.channel_multipliers", "use (8, 12)"]),
        ({"sit.patch_size": 3}, ["config.sit.patch_size=3", "4 x 4"]),
        (
            {"data.image_size": (8, 12), "sit.patch_size": 4},
            ["config.sit.patch_size=4", "4 x 6 positions", "config.data.image_size=(8, 12)"],
        ),
        ({"data.image_size": (8, 12)}, ["gives 4 x 4 tokens", "the SiT has 4 x 6", "image_size to (8, 12)"]),
        (
            {"data.image_size": (8, 12), "encoders.target.image_size": (8, 12), "init.checkpoint": "x.pt"},
            ["config.init.checkpoint='x.pt'", "for squares", "config.data.image_size=(8, 12)"],
        ),
        (
            {"data.image_size": (16, 4), "encoders.target.image_size": (16, 4)},
            ["config.disc.num_layers=1", "config.data.image_size=(16, 4)", "6 pixels or more"],
        ),
        ({"sit.num_heads": 5}, ["hidden_size=32", "num_heads=5"]),
        ({"sit.encoder_depth": 3}, ["encoder_depth=3", "1..depth=2"]),
        ({"sit.remat": "some"}, ["'some'", "'dots'"]),
        ({"vae.norm_groups": 3}, ["norm_groups=3", "width 8"]),
        ({"disc.num_layers": 4}, ["config.disc.num_layers=4", "image_size=8", "lower num_layers"]),
        ({"data.batch_size": 12}, ["data.batch_size=12", "8 devices x 1 micro-batches", "multiple of 8"]),
        ({"accumulation": 2}, ["data.batch_size=8", "8 devices x 2 micro-batches", "multiple of 16"]),
        ({"mesh.fsdp": 3}, ["mesh.fsdp=3", "8 devices", "[1, 2, 4, 8]"]),
        ({"encoders.target.image_size": 16}, ["8 x 8 tokens", "4 x 4", "image_size to 8"]),
        ({"encoders.target.image_size": 7}, ["image_size 7", "multiple of its patch size 2"]),
        ({"encoders.target.weights": ""}, ["config.encoders.target.weights is empty"]),
        ({"encoders.target.architecture": None}, ["config.encoders.target.architecture must be set", "dinov2-base"]),
        ({"encoders.target.architecture": "dinov9"}, ["'dinov9' is unknown", "dinov2-base"]),
        ({"encoders": {}}, ["config.loss.vae.align and config.loss.sit.align", "config.encoders is empty"]),
        ({"loss.vae.gan": 0.0, "loss.lecam": 0.1}, ["config.loss.lecam=0.1 needs a discriminator"]),
        ({"loss.vae.gan": 0.0, "init.disc": "x.pt"}, ["config.init.disc='x.pt' needs a discriminator"]),
        ({"encoders": {}, "loss.vae.align": 0.0}, ["config.loss.sit.align needs an encoder", "config.encoders is empty"]),
        ({"loss.vae.align": 0.0, "loss.sit.align": 0.0}, ["config.encoders has an encoder", "are all 0"]),
        ({"loss.vae.ssim": 1.0}, ["config.loss.vae has unknown terms ['ssim']", "'lpips'"]),
        ({"loss.sit.mse": 1.0}, ["config.loss.sit has unknown terms ['mse']", "'velocity'"]),
        ({"loss.sit.velocity": 0.0}, ["config.loss.sit.velocity must not be 0"]),
        ({"precision.compute": "float8"}, ["config.precision.compute='float8'", "['bfloat16', 'float32']"]),
        ({"loss.vae.lpips": 1.0, "precision.lpips": "half"}, ["config.precision.lpips='half'", "['bfloat16', 'float32']"]),
        ({"diffusion.path": "quadratic"}, ["config.diffusion.path='quadratic'", "['cosine', 'ddpm', 'linear']"]),
        ({"diffusion.time_distribution": "beta"}, ["config.diffusion.time_distribution='beta'", "['lognormal', 'uniform']"]),
        ({"diffusion.label_dropout": 1.0}, ["config.diffusion.label_dropout=1.0", "[0, 1)"]),
        ({"diffusion.predicts": "x"}, ["config.diffusion.predicts='x'", "['velocity', 'data']"]),
        ({"diffusion.time_shift": 0.0}, ["config.diffusion.time_shift=0.0 must lie in (0, 100]"]),
        ({"diffusion.time_std": 0.0}, ["config.diffusion.time_std=0.0 must lie in (0, 10]"]),
        ({"diffusion.time_mean": 0.8}, ["config.diffusion.time_mean=0.8", "time_distribution='uniform'", "'lognormal'"]),
        ({"diffusion.time_std": 0.8}, ["config.diffusion.time_std=0.8", "time_distribution='uniform'", "'lognormal'"]),
        ({"diffusion.predicts": "data", "diffusion.path": "cosine"}, ["config.diffusion.predicts='data'", "path='cosine'"]),
        ({"loss.vae.l1": -1.0}, ["config.loss.vae.l1=-1.0 must be at least 0"]),
        ({"loss.vae": {}}, ["all of config.loss.vae is 0", "config.job='repae'", "configs/ldm.py"]),
        ({"loss.gan_factor": 0.0}, ["config.loss.gan_factor=0.0 must be positive"]),
        ({"loss.align_shape": "cosine"}, ["config.loss.align_end=None and align_shape='cosine'", "the step where it ends"]),
        ({"loss.vae.diffusion": 1.0, "accumulation": 2}, ["config.loss.vae.diffusion=1.0", "config.accumulation=2"]),
        ({"optim.sit.b1": 1.5}, ["config.optim.sit.b1=1.5", "[0, 1)"]),
        ({"optim.sit.final_learning_rate": -1.0}, ["config.optim.sit.final_learning_rate=-1.0"]),
        ({"optim.sit.decay_steps": 9}, ["config.optim.sit: schedule='constant'", "decay_steps=9"]),
        ({"diffusion.norm_momentum": 1.5}, ["config.diffusion.norm_momentum=1.5", "[0, 1]"]),
        ({"lpips.input_range": (1.0, 0.0)}, ["config.lpips.input_range=(1.0, 0.0)", "low first"]),
        ({"optim.sit.learning_rate": -1e-4}, ["learning_rate=-0.0001 must be at least 0"]),
        ({"optim.vae.warmup_steps": -1}, ["warmup_steps=-1 must be at least 0"]),
        ({"optim.disc.clip_norm": 0.0}, ["config.optim.disc.clip_norm=0.0"]),
        ({"optim.vae.method": "muon"}, ["config.optim.vae.method='muon'", "config.vae has none", "set it to 'adamw'"]),
        ({"optim.disc.method": "muon"}, ["config.optim.disc.method='muon'", "config.disc has none"]),
        (
            {"optim.sit.method": "muon", "optim.sit.fixed": ("early_blocks", "late_blocks")},
            ["config.optim.sit.method='muon'", "config.optim.sit.fixed=('early_blocks', 'late_blocks')"],
        ),
        ({"ema_decays": (0.9, 0.99)}, ["config.ema_decays=(0.9, 0.99) beside ema_decay=0.99", "twice"]),
        ({"ema_sigmas": (0.1, 0.3)}, ["config.ema_sigmas=(0.1, 0.3) has an entry", "0.288"]),
        (
            {"loss.sit.internal": 0.5, "init.checkpoint": "x.pt"},
            ["config.init.checkpoint='x.pt'", "none with config.loss.sit.internal"],
        ),
        (
            {"diffusion.predicts": "data", "init.checkpoint": "x.pt"},
            ["config.init.checkpoint='x.pt'", "none with config.diffusion.predicts='data'"],
        ),
        ({"optim.sit.decay_start": 9}, ["config.optim.sit: schedule='constant'", "decay_start=9"]),
        ({"optim.vae.fixed": ("encoders",)}, ["config.optim.vae.fixed=['encoders']", "'encoder'", "'quant_conv'"]),
        ({"optim.sit.schedule": "exp"}, ["config.optim.sit.schedule='exp'", "['constant', 'linear', 'cosine', '1-sqrt']"]),
        ({"optim.sit.schedule": "cosine"}, ["config.optim.sit: schedule='cosine' needs decay_steps", "None"]),
        ({"sampling.guidance_channels": 9}, ["guidance_channels=9: the latents have 4"]),
        ({"sampling.internal_scale": 1.5}, ["internal_scale=1.5: the model has no head", "config.loss.sit.internal"]),
        ({"sampling.weaker_low": 0.7, "sampling.weaker_high": 0.2}, ["weaker_low=0.7 and weaker_high=0.2"]),
        ({"loss.sit.internal": 0.5, "sit.encoder_depth": 2}, ["encoder_depth=2 and depth=2", "lower encoder_depth"]),
        ({"loss.sit.self": 0.5}, ["config.loss.sit.self=0.5 and config.loss.self_depth=None", "give both"]),
        ({"loss.self_depth": 2}, ["config.loss.sit.self=0 and config.loss.self_depth=2", "give both"]),
        (
            {"loss.sit.self": 0.5, "loss.self_depth": 1},
            ["config.loss.self_depth=1", "config.sit.encoder_depth=1", "config.sit.depth=2"],
        ),
        ({"loss.sit.self": 0.5, "loss.self_depth": 3}, ["config.loss.self_depth=3", "at most config.sit.depth=2"]),
        ({"loss.self_depth": 0}, ["config.loss.self_depth=0 must be at least 1"]),
        ({"diffusion.second_time_share": 0.6}, ["config.diffusion.second_time_share=0.6 must lie in [0, 0.5]"]),
        ({"loss.align_end": 0}, ["config.loss.align_end=0", "at least 1"]),
        ({"loss.align_end": 5, "loss.align_shape": "step"}, ["align_shape='step'", "['constant', 'linear', 'cosine']"]),
        ({"data.flip_probability": 1.5}, ["config.data.flip_probability=1.5", "[0, 1]"]),
        ({"sit.projector": "linear"}, ["projector='linear'", "['mlp', 'conv']"]),
        ({"encoders.target.spatial_gamma": 2.0}, ["config.encoders.target.spatial_gamma=2.0", "[0, 1]"]),
        ({"sampling.guidance_channels": 0}, ["config.sampling.guidance_channels=0"]),
        ({"data.cache": "latents"}, ["config.data.cache='latents'", "config.job='repae'", "configs/ldm.py"]),
        ({"sampling.sampler": "dpm"}, ["sampler 'dpm' is unknown", "euler, heun, sde"]),
        ({"sampling.steps": 1}, ["steps=1", "at least 2"]),
        ({"sampling.precision": "float16"}, ["config.sampling.precision='float16'", "['float32', 'bfloat16']"]),
        ({"sampling.guidance_scale": 0.5}, ["guidance_scale=0.5", "at least 1"]),
        ({"sampling.time_shift": -1.0}, ["config.sampling.time_shift=-1.0 must lie in (0, 100]"]),
        ({"sampling.tolerance": 1e-7}, ["config.sampling.tolerance=1e-07 must lie in (1e-06, 1]"]),
        ({"sampling.tolerance": 1e-4}, ["tolerance=0.0001 does not go with sampler 'sde': it is of dopri5"]),
        ({"sampling.guidance_low": 0.9, "sampling.guidance_high": 0.1}, ["[0.9, 0.1]", "low first"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values(changes, messages):
    refused(changes, *messages)


DDPM = {"diffusion.path": "ddpm", "sit.learned_sigma": True}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"encoders": {}}, ["config.loss.sit.align needs an encoder", "config.encoders is empty"]),
        ({"loss.sit.align": 0.0}, ["config.encoders has an encoder", "config.loss.sit.align is 0"]),
        ({"loss.sit.noise": 1.0}, ["config.loss.sit.noise=1.0", "config.diffusion.path='linear'"]),
        (
            {**DDPM, "loss.sit": {"noise": 1.0, "internal": 0.5}},
            ["config.loss.sit.internal=0.5", "config.diffusion.path='ddpm'", "['noise', 'bound', 'align']"],
        ),
        (DDPM, ["config.loss.sit.velocity=1.0", "config.diffusion.path='ddpm'", "['noise', 'bound', 'align']"]),
        ({"sit.learned_sigma": True}, ["config.sit.learned_sigma=True", "config.diffusion.path='linear'"]),
        (
            {**DDPM, "sit.learned_sigma": False, "loss.sit": {"noise": 1.0, "align": 0.5}},
            ["config.sit.learned_sigma=False", "config.diffusion.path='ddpm'"],
        ),
        ({"diffusion.norm_momentum": 0.1}, ["config.diffusion: unknown fields ['norm_momentum']"]),
        ({"encoders": {}, "loss.sit.align": 0.0, "loss.align_end": 9}, ["config.loss.align_end=9", "no alignment has a"]),
        (
            {**DDPM, "diffusion.time_distribution": "lognormal"},
            ["config.diffusion.time_distribution='lognormal'", "path='ddpm'"],
        ),
        ({**DDPM, "diffusion.time_shift": 2.0}, ["config.diffusion.time_shift=2.0", "path='ddpm'", "uniform"]),
        (
            {**DDPM, "loss.sit": {"noise": 1.0, "self": 0.5}},
            ["config.loss.sit.self=0.5", "config.diffusion.path='ddpm'", "['noise', 'bound', 'align']"],
        ),
        ({**DDPM, "diffusion.second_time_share": 0.25}, ["config.diffusion.second_time_share=0.25", "path='ddpm'"]),
        ({**DDPM, "diffusion.predicts": "data"}, ["config.diffusion.predicts='data'", "path='ddpm'", "noise"]),
        (
            {**DDPM, "loss.sit": {"noise": 1.0, "align": 0.5}, "sampling.sampler": "ancestral", "sampling.time_shift": 2.0},
            ["time_shift=2.0 does not go with sampler 'ancestral'"],
        ),
        ({**DDPM, "loss.sit": {"noise": 1.0, "align": 0.5}}, ["sampler 'sde'", "DiT's noise", "ancestral"]),
        ({"sampling.sampler": "ancestral"}, ["sampler 'ancestral'", "a velocity", "euler, heun, sde"]),
    ],
)
def test_values_of_ldm(changes, messages):
    refused(changes, *messages, file=ldm)


MEAN_FLOW = {
    **small.SIT_ALONE, "diffusion.mean_flow": {"kappa": 0.5}, "diffusion.time_distribution": "lognormal",
    "loss.sit": {"mean_flow": 1.0}, "sampling.sampler": "meanflow", "sampling.steps": 1, "sampling.guidance_scale": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"diffusion.time_distribution": "uniform"},
            ["config.diffusion.time_distribution='uniform'", "mean_flow, which needs 'lognormal'"],
        ),
        ({"diffusion.path": "cosine"}, ["config.diffusion.path='cosine'", "mean_flow, which needs 'linear'"]),
        ({"diffusion.mean_flow": {"kappa": 1.0}}, ["config.diffusion.mean_flow.kappa=1.0", "[0, 1)"]),
        ({"diffusion.mean_flow": {"weight": 1.0}}, ["config.diffusion.mean_flow: unknown fields ['weight']", "'weight_power'"]),
        ({"diffusion.mean_flow": 3}, ["config.diffusion.mean_flow=3 must be a section"]),
        ({"loss.sit": {"velocity": 1.0}}, ["config.loss.sit.velocity=1.0", "config.diffusion.mean_flow", "'mean_flow', 'al"]),
        ({"diffusion.mean_flow": None}, ["config.loss.sit.mean_flow=1.0", "config.diffusion.path='linear'"]),
        ({"loss.sit": {"mean_flow": 0.0}}, ["config.loss.sit.mean_flow must not be 0"]),
        ({"sit.learned_sigma": True}, ["config.sit.learned_sigma=True", "config.diffusion.path='linear'"]),
        ({"sampling.sampler": "sde"}, ["sampler 'sde'", "an average velocity", "meanflow"]),
        ({"sampling.guidance_scale": 2.0}, ["guidance_scale=2", "config.diffusion.mean_flow.omega=1 and kappa=0.5"]),
        ({"attention": "cudnn"}, ["config.attention='cudnn'", "config.diffusion.mean_flow", "'xla'"]),
        ({"diffusion.predicts": "data"}, ["config.diffusion.predicts='data'", "mean_flow, which predicts an average velocity"]),
        ({"diffusion.time_mean": -0.4}, ["config.diffusion.time_mean=-0.4", "mean_flow, which has its own"]),
        ({"diffusion.time_std": 0.5}, ["config.diffusion.time_std=0.5", "mean_flow, which has its own", "mean_flow.time_std"]),
        ({"diffusion.time_shift": 2.0}, ["config.diffusion.time_shift=2.0", "mean_flow", "mean_flow.time_mean"]),
        (
            {"loss.sit": {"mean_flow": 1.0, "internal": 0.5}},
            ["config.loss.sit.internal=0.5", "config.diffusion.mean_flow", "'mean_flow', 'align'"],
        ),
        ({"loss.sit": {"mean_flow": 1.0, "self": 0.5}}, ["config.loss.sit.self=0.5", "config.diffusion.mean_flow"]),
        ({"diffusion.second_time_share": 0.25}, ["config.diffusion.second_time_share=0.25", "mean_flow, whose networks"]),
        ({"sampling.internal_scale": 1.5}, ["internal_scale=1.5", "sampler 'meanflow'", "set it to 1"]),
        (
            {"diffusion.label_dropout": 0.0},
            ["config.diffusion.label_dropout=0.0 trains no output without a class, which mean_flow guides away from"],
        ),
        (
            {"diffusion.label_dropout": 0.0, "diffusion.mean_flow": {"kappa": 0.0, "largest_scale": 2.0}},
            ["label_dropout=0.0", "mean_flow.omega to 1, kappa to 0 and largest_scale to 1"],
        ),
        ({"init.checkpoint": "x.pt"}, ["config.init.checkpoint='x.pt'", "none with config.diffusion.mean_flow"]),
    ],
)
def test_values_of_mean_flow(changes, messages):
    refused({**MEAN_FLOW, **changes}, *messages, file=ldm)


def test_mean_flow_needs_a_frozen_vae():
    messages = "config.diffusion.mean_flow learns on a frozen VAE", "config.job='repae'", "configs/ldm.py"
    refused({"diffusion.mean_flow": {}}, *messages)


def test_a_frozen_vae_must_be_given():
    def run(config):
        frozen_weights.load_frozen(build.build(config))

    refused({"init.vae": ""}, "config.init.vae is empty", "'random'", file=ldm, run=run)
    weights = {"init.vae": "", "loss.vae": {"l1": 0.0}}
    refused(weights, "config.init.vae is empty", "'vae'", file=vae, run=run)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"data.cache": "latents"}, ["config.data.cache='latents'", "config.job='vae'", "configs/ldm.py"]),
        ({"loss.vae.vf": 0.1}, ["config.loss.vae.vf needs an encoder", "config.encoders is empty"]),
        ({"loss.vae.align": 1.0}, ["config.loss.vae has unknown terms ['align']"]),
        ({"loss.vae.l1": 0.0}, ["config.loss.vae needs a reconstruction term", "'l1' or 'l2'"]),
        ({"loss.pixel_reduction": "max"}, ["config.loss.pixel_reduction='max'", "['mean', 'sum']"]),
        ({"loss.vf_margins": (2.5, 0.0)}, ["config.loss.vf_margins=(2.5, 0.0)", "[0, 2)"]),
        ({"loss.vf_margins": (0.5,)}, ["config.loss.vf_margins=(0.5,)", "2 entries"]),
        ({"loss.adaptive.gan": -1.0}, ["config.loss.adaptive.gan=-1.0 must be at least 0"]),
        ({"loss.adaptive.gan": 1e4, "optim.vae.fixed": ("decoder",)}, ["config.loss.adaptive.gan", "config.optim.vae.fixed"]),
        ({"loss.vae.se": 0.1, "loss.se_factors": (0,)}, ["config.loss.se_factors=(0,)", "at least 2"]),
        ({"loss.vae": {"l1": 0.0}, "loss.gan_start": 5}, ["config.loss.gan_start=5", "all of config.loss.vae is 0"]),
        ({"loss.vae": {"l1": 0.0}, "ema_decays": (0.9,)}, ["config.ema_decays=(0.9,)", "all of config.loss.vae is 0"]),
        ({"loss.vae": {"l1": 0.0}, "ema_sigmas": (0.1,)}, ["config.ema_sigmas=(0.1,)", "all of config.loss.vae is 0"]),
        ({"loss.adaptive.vf": 1.0}, ["config.loss.adaptive.vf=1.0", "config.loss.vae.vf"]),
        ({"loss.adaptive": {"gan": 1.0}}, ["config.loss.adaptive: unknown fields [], missing fields ['vf']"]),
        ({"loss.eq_scales": (0.5, 1.0)}, ["config.loss.eq_scales", "(0.5, 1.0)", "1 first"]),
        ({"loss.eq_scales": (1.0, 0.3)}, ["config.loss.eq_scales", "0.3", "whole sizes"]),
        ({"loss.eq_scales": (1.0, 0.5), "loss.eq_prior": 1.5}, ["config.loss.eq_prior=1.5", "[0, 1]"]),
        ({"loss.eq_scales": (1.0, 0.5)}, ["config.disc.num_layers=1", "at the scale 0.5"]),
        (
            {"data.image_size": (8, 12), "loss.eq_scales": (1.0, 0.5)},
            ["config.loss.eq_scales=(1.0, 0.5)", "only squares allow", "config.data.image_size=(8, 12)"],
        ),
        ({"data.image_size": (8, 12), "loss.vae.se": 1.0}, ["config.loss.se_factors of 4 x 6 positions", "whole sizes"]),
        ({"loss.vae.se": 0.1, "loss.se_factors": (3,)}, ["config.loss.se_factors", "8 x 8", "whole sizes"]),
        ({"loss.vae.se": 0.1, "loss.se_factors": ()}, ["config.loss.vae.se needs factors", "config.loss.se_factors"]),
        ({"loss.vae": {"l1": 0.0}, "loss.eq_scales": (1.0, 0.5)}, ["config.loss.eq_scales", "all of config.loss.vae is 0"]),
    ],
)
def test_values_of_vae(changes, messages):
    refused(changes, *messages, file=vae)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"loss.vae.diffusion": 1.0}, ["config.loss.vae.diffusion", "collapsed"]),
        ({"diffusion.norm_momentum": 0.0}, ["config.diffusion.norm_momentum=0", "18.1"]),
        ({"loss.vae.gan": 0.0}, ["config.loss.vae.gan=0", "19.2"]),
        ({"loss.vae": {"align": 1.5}}, ["no reconstruction term"]),
    ],
)
def test_ablations_that_lose_are_announced(changes, messages, monkeypatch):
    warnings = []
    monkeypatch.setattr(validate.logging, "warning", lambda text, *values: warnings.append(text % values))
    build.build(small.config(changes))
    assert len(warnings) == 1 and warnings[0].startswith("ABLATION: "), warnings
    assert all(message in warnings[0] for message in messages), warnings
    warnings.clear()
    build.build(small.config())
    assert not warnings


# numeric fields, * for any name -> values among NAN, INF, -1, 0 and 1e30 that they accept; whole numbers refuse 1e30
NAN, INF = float("nan"), float("inf")
ACCEPTED = {
    **dict.fromkeys(
        (
            "steps", "accumulation", "max_skipped_in_a_row", "data.image_size", "data.num_classes", "data.batch_size",
            "vae.latent_channels", "vae.channels", "vae.num_res_blocks", "vae.norm_groups", "sit.patch_size",
            "sit.hidden_size", "sit.depth", "sit.num_heads", "sit.encoder_depth", "sit.projector_dim", "sit.mlp_ratio",
            "sit.unroll", "disc.channels", "disc.num_layers", "init.stats_images", "mesh.fsdp", "mesh.slices",
            "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "log.every", "hooks.images", "vae_every",
            "hooks.fid_samples", "encoders.*.image_size", "loss.align_end", "loss.self_depth", "optim.*.decay_start",
            "optim.*.decay_steps", "sampling.steps", "sampling.guidance_channels", "sampling.guidance_power",
            "sampling.time_shift", "sampling.tolerance", "diffusion.time_shift", "diffusion.time_std",
        ),
        set(),
    ),
    **dict.fromkeys(
        (
            "seed", "ema_decay", "data.workers", "data.max_bad_fraction", "data.flip_probability", "loss.gan_start",
            "loss.eq_prior", "diffusion.label_dropout", "diffusion.norm_momentum", "optim.*.warmup_steps", "optim.*.b1",
            "optim.*.b2", "hooks.samples_every", "hooks.reconstructions_every", "hooks.fid_every", "encoders.*.spatial_gamma",
            "sampling.guidance_low", "sampling.guidance_high", "sampling.weaker_low", "sampling.weaker_high",
            "diffusion.time_mean", "diffusion.second_time_share",
        ),
        {0},
    ),
    **dict.fromkeys(
        (
            "loss.vae.*", "loss.sit.*", "loss.adaptive.*", "loss.lecam", "optim.*.learning_rate", "optim.*.final_learning_rate",
            "optim.*.weight_decay",
        ),
        {0, 1e30},
    ),
    **dict.fromkeys(
        ("loss.gan_factor", "optim.*.eps", "optim.*.clip_norm", "sampling.guidance_scale", "sampling.internal_scale"), {1e30}
    ),
    # every entry of a tuple
    "vae.channel_multipliers": set(), "vae.attention_levels": {0}, "lpips.input_range": {0, 1e30}, "loss.vf_margins": {0},
    "loss.se_factors": set(), "loss.eq_scales": set(), "ema_decays": {0}, "ema_sigmas": set(),
}  # fmt: skip


def numeric_fields(section, above=()):
    """Dotted names of numbers, tuples of them and numbers that are not set, of a ConfigDict."""
    for name in section:
        value, names = section[name], (*above, name)
        kind = int if name == "image_size" else section.get_type(name)  # it may also be a pair
        if isinstance(value, ConfigDict):
            yield from numeric_fields(value, names)
        elif kind in (int, float) or (kind is tuple and not any(isinstance(entry, str) for entry in value)):
            yield ".".join(names), kind


def all_numeric_fields():
    args = [(file, arg) for file in (repae, ldm, vae) for arg in ("", "tiny")] + [(vae, "eqvae"), (ldm, "model=DiT-XL/2")]
    files = {field: file for file, arg in args for field in numeric_fields(file.get_config(arg))}
    return sorted((name, kind, file) for (name, kind), file in files.items() if not name.endswith(".fixed"))


@pytest.mark.parametrize(("name", "kind", "file"), [pytest.param(*field, id=field[0]) for field in all_numeric_fields()])
def test_every_number_of_every_config_has_bounds(name, kind, file):
    """A new field fails here until it has a place in ACCEPTED."""
    entries = [entry for entry in ACCEPTED if fnmatch.fnmatch(name, entry)]
    assert len(entries) == 1, f"{name} is in no entry of ACCEPTED or in several"
    accepted = set()
    for value in (NAN, INF, -1, 0, 1e30, True, "1", 1e39):
        config = file.get_config("tiny").to_dict()
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        before = section[field]
        section[field] = (*before[:-1], value) if kind is tuple else value
        if name == "vae.attention_levels" or (kind is tuple and not before):
            section[field] = (value,)
        try:
            build.plain_config(config)
            accepted.add(value)
        except ValueError as error:
            assert f"{field}=" in str(error) and "\n" not in str(error), error
    assert accepted == ACCEPTED[entries[0]]


def test_none_is_refused_unless_the_field_may_be_none():
    config = small.config().to_dict()
    for section, field in (("checkpoint", "every"), ("optim", "vae"), ("data", "batch_size"), ("sit", "depth")):
        with pytest.raises(ValueError, match=f"config.{section}.{field}=None must be"):
            build.build({**config, section: {**config[section], field: None}})
    del config["optim"]["vae"]["fixed"]
    with pytest.raises(ValueError, match=re.escape("config.optim.vae: unknown fields [], missing fields ['fixed']")):
        build.build(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sit": 3}, "config.sit=3 must be a section with fields of its own"),
        ({"encoders": 3}, "config.encoders=3 must be a section"),
        ({"sit.qk_norm": 1}, "config.sit.qk_norm=1 must be True or False"),
        ({"data.source": 3}, "config.data.source=3 must be a text"),
        ({"steps": 2.0}, "config.steps=2.0 must be a whole number"),
        ({"sit.new": NAN}, "config.sit: unknown fields ['new'], missing fields []"),
        ({"optim.sit.b1": 1 - 1e-12}, "config.optim.sit.b1=0.999999999999 must lie in [0, 1)"),
        ({"optim.vae.fixed": "encoder"}, "config.optim.vae.fixed='encoder' must be a tuple"),
        ({"encoders.target.architecture.patch_size": 0}, "encoder architecture: patch_size=0 must lie in"),
        ({"vae.attention_levels": (7,)}, "attention_levels=(7,) must lie in 0..1"),
    ],
)
def test_types(changes, message):
    config = small.config().to_dict()  # not checked by ml_collections
    for name, value in changes.items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        build.build(config)


def test_home_folders_of_configs(monkeypatch, tmp_path):
    """Paths of encoders and LPIPS stay as they are: ~ is expanded where they are read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"init.vae": "~/a.pt", "data.cache": "~/b", "hooks.fid_reference": "~/c.npz", "hooks.fid_inception": "~/d.pth"}
    config = build.plain_config(small.config({**paths, "data.options": {"path": "~/e", "split": "~"}, "lpips.vgg16": "~/f"}))
    assert config["init"]["vae"] == f"{tmp_path}/a.pt" and config["data"]["cache"] == f"{tmp_path}/b"
    assert config["hooks"]["fid_reference"] == f"{tmp_path}/c.npz" and config["hooks"]["fid_inception"] == f"{tmp_path}/d.pth"
    assert config["data"]["options"] == {"path": f"{tmp_path}/e", "split": "~"} and config["lpips"]["vgg16"] == "~/f"


# ---- files ----------------------------------------------------------------------------------------------------------


def training(workdir):
    return lambda config: train.train(config, workdir)


def pictures(folder, classes=2):
    for label in range(classes):
        (folder / f"class{label:02d}").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"class{label:02d}" / "a.png")
    return folder


def folder_source(path):
    return {"data.source": "folder", "data.options": {"path": str(path), "labels_file": None}}


def test_unknown_source(tmp_path):
    known = "'digits', 'folder', 'imagenet', 'imagenet_tar', 'parquet', 'array_record'"
    refused({"data.source": "imagenette"}, "'imagenette'", known, run=training(tmp_path))
    refused({"data.options": {"colour": 1}}, "colour", "split", run=training(tmp_path))


def test_missing_and_empty_folders(tmp_path):
    run = training(tmp_path / "run")
    refused(folder_source(tmp_path / "none"), f"path is '{tmp_path / 'none'}', which is not a folder", run=run)
    (tmp_path / "empty").mkdir()
    refused(folder_source(tmp_path / "empty"), f"no images below '{tmp_path / 'empty'}'", ".png", run=run)


def test_labels_outside_the_classes(tmp_path):
    changes = folder_source(pictures(tmp_path / "images", 12))
    messages = "2 of 12 labels are out of range", "class10/a.png: 10", "allowed: 0..9", "has 12 classes"
    refused(changes, *messages, run=training(tmp_path / "run"))


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused({}, f"workdir '{tmp_path / 'file' / 'run'}' cannot be written to", run=training(tmp_path / "file" / "run"))


@pytest.mark.integration
def test_a_workdir_that_holds_another_run(tmp_path, monkeypatch):
    other = build.plain_config(small.config({"seed": 7, "sit.depth": 4, "steps": 99}))
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"step": jax.numpy.int32(1)}, {"next_batch": 1, "bad_records": []}, other)
        checkpointer.wait()
    # random weights are compiled, a file's are not
    monkeypatch.setattr(frozen_weights, "load_frozen", lambda job: {"vae": None})
    COMPILED.clear()
    with pytest.raises(ValueError) as caught:
        train.train(small.config(), tmp_path)
    message = str(caught.value)
    assert "seed: stored 7, given 0" in message and "sit.depth: stored 4, given 2" in message
    assert "steps" not in message  # may differ
    assert "another workdir" in message


def test_missing_lpips_weights(tmp_path, monkeypatch):
    lpips = {"loss.vae.lpips": 1.0, "lpips.vgg16": "", "lpips.linear": ""}
    monkeypatch.setattr(frozen_weights, "_encoder_params", lambda *_: {})
    run = training(tmp_path)
    refused(lpips, "config.lpips.vgg16=''", "torchvision's VGG16", "config.loss.vae.lpips=0", run=run)
    refused({**lpips, "lpips.vgg16": "random"}, "config.lpips.vgg16='random'", "'random' for both", run=run)
    none = str(tmp_path / "none.pth")
    refused({**lpips, "lpips.vgg16": none, "lpips.linear": none}, f"{none} does not exist", run=run)


def test_missing_encoder_weights(tmp_path):
    run = training(tmp_path)
    none = str(tmp_path / "none")
    refused({"encoders.target.weights": none}, f"{none} does not exist", "organization/name", run=run)
    described = {"encoders.target.weights": none, "encoders.target.architecture": None}
    refused(described, f"{none} does not exist", run=run)
    hub = "nobody/no-such-encoder"
    refused({"encoders.target.weights": hub}, hub, "cannot be had from the Hugging Face hub", run=run)


def test_options_that_the_compiler_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_weights, "load_frozen", lambda job: pytest.fail("weights were read before"))
    option = "xla_tpu_scoped_vmem_limit_kib"
    refused({"compiler_options": f"{option}=1"}, f"config.compiler_options='{option}=1', which", option, run=training(tmp_path))
    jax_own = "optimization_level=O9"
    refused({"compiler_options": jax_own}, f"config.compiler_options='{jax_own}', which", run=training(tmp_path))


def test_an_option_of_ours_that_the_compiler_does_not_know(monkeypatch):
    monkeypatch.setattr(compilation, "_COMPILER_OPTIONS", {"cpu": {"xla_not_there": "1"}})
    job = SimpleNamespace(mesh=sharding.make_mesh(1), config={"compiler_options": ""})
    with pytest.raises(ValueError, match="config.compiler_options='', which makes the compiler's .*xla_not_there"):
        compilation.check_compiler_options(job)


def test_trackers():
    allowed = "allowed: ['tensorboard', 'clu', 'wandb', 'trackio', 'mlflow']"
    refused({"log.trackers": ("tensorbord",)}, "config.log.trackers=('tensorbord',) has an entry that is unknown", allowed)
    refused({"log.trackers": ("wandb", "wandb")}, "config.log.trackers=('wandb', 'wandb') name one twice")
    refused({"log.trackers": ("clu", "tensorboard")}, "'clu' writes the same files as 'tensorboard'")
    refused({"log.project": ""}, "config.log.project='' must be the name of a project")
