"""The runs of the paper and the tokenizers: all can be built, their tiny variants take a step, their numbers are published."""

import dataclasses
import functools
import importlib
import inspect
import json
import re
from types import ModuleType

import jax
import numpy as np
import optax
import pytest
import small
from full_size import check_step, millions

from checkpoints_tools.artefacts import ARTEFACTS
from configs import common, ldm, paper, repae, vae
from repae_jax import train
from repae_jax.cost import flops
from repae_jax.diffusion.interpolant import shift_times
from repae_jax.job import build, compilation, frozen_weights, initial_state
from repae_jax.job.config import read_config
from repae_jax.models import encoders
from repae_jax.training.optimizer import learning_rate
from repae_jax.training.recipe import Optimizers

pytestmark = pytest.mark.integration

FILES = {"paper": paper, "vae": vae, "ldm": ldm, "repae": repae}
ARGUMENTS = {"repae": [""], "ldm": [""], "paper": list(paper.ROWS), "vae": [*vae.RECIPES, ""]}
NAMES = [(file, name) for file, names in ARGUMENTS.items() for name in names]


def described(file, name):
    return FILES[file].get_config(name)


@functools.cache
def built(file, name):
    return build.build(described(file, name), jax.devices()[:1])


def label(case):
    return f"{case[0]}:{case[1]}"


# ---- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NAMES, ids=label)
def test_all_can_be_built(case):
    job = built(*case)
    assert bool(job.encoders) == any(
        term in weights for weights in (job.recipe.vae_weights, job.recipe.sit_weights) for term in ("align", "vf")
    )


def parts(config):
    """The networks that a step puts together, but for their widths and depths; the tiny variants take every loss."""
    trains_vae = any(config.loss.get("vae", {}).values())
    fields = [config.job, trains_vae, config.vae.to_dict(), config.data.image_size, len(config.encoders)]
    if "sit" in config:
        fields += [config.sit.patch_size, config.sit.projector, config.sit.learned_sigma, bool(config.diffusion.mean_flow)]
    return json.dumps(fields, default=str)


PARTS = {parts(described(*case)): case for case in NAMES}
del PARTS[parts(repae.get_config())]  # test_configs.py takes its step


@pytest.mark.parametrize("case", PARTS.values(), ids=label)
def test_a_step_fits_together(case):
    metrics = check_step(built(*case))
    expected = {"vae": ["disc/loss"], "ldm": ["sit/loss"], "repae": ["vae/loss", "sit/loss"]}
    assert set(expected[built(*case).config["job"]]) <= set(metrics)


def test_sizes():
    """Table 2: 130, 458 and 675 million parameters."""
    for name, published in (("repae-b", 130), ("repae-l", 458), ("repae-xl", 675), ("repa", 675), ("dit", 675)):
        params = dict(initial_state.abstract_state(built("paper", name)).sit.params)
        params = {key: tree for key, tree in params.items() if not key.startswith("projectors")}
        assert millions(params) == pytest.approx(published, rel=0.01), name


def test_encoders():
    """Table 3."""
    published = {"ijepa-h": "ijepa_vith14_1k", "clip-l": "clip-vit-large-patch14", "dinov2-l": "dinov2-large"}
    for name, architecture in (published | {"l": "dinov2-base"}).items():
        for method in ("repae", "repa"):
            (encoder,) = built("paper", f"{method}-{name}").encoders
            assert encoder.name == architecture and encoder.grid == 16


def test_vaes():
    """Table 4; 'depending on the VAE's downsampling rate, SiT/2 and SiT/1'."""
    shapes = {"sdvae": (2, (32, 32, 4)), "invae": (1, (16, 16, 32)), "vavae": (1, (16, 16, 32))}
    for name, vae_name in (("l", "sdvae"), ("invae", "invae"), ("vavae", "vavae")):
        for method in ("repae", "repa"):
            job = built("paper", f"{method}-{name}")
            assert (job.nets.sit.patch_size, job.latent_shape) == shapes[vae_name]
            assert vae_name in job.config["init"]["vae"] or (method, name) == ("repa", "l")
            assert job.frozen_vae == (method == "repa")


def test_depths():
    """Table 5; by default 4 for B and 8 for L and XL."""
    depths = {"depth-6": 6, "l": 8, "depth-10": 10, "b": 4}
    for name, depth in depths.items():
        assert {built("paper", f"{method}-{name}").nets.sit.encoder_depth for method in ("repae", "repa")} == {depth}
    assert {built("paper", name).nets.sit.encoder_depth for name in ("repae-xl", "final", "repa")} == {8}


def test_components():
    """Table 6: each differs from the reference run in what its name says."""
    whole = built("paper", "repae-l").recipe
    without = {name: built("paper", f"without-{name}") for name in ("stop-gradient", "batch-norm", "gan")}
    assert without["stop-gradient"].recipe.vae_weights == {**whole.vae_weights, "diffusion": 1.0}
    assert without["batch-norm"].recipe.norm_momentum == 0 and without["batch-norm"].recipe.vae_weights == whole.vae_weights
    assert without["gan"].recipe.vae_weights == {name: x for name, x in whole.vae_weights.items() if name != "gan"}
    assert without["gan"].nets.disc is None
    for name in without:
        assert without[name].nets.sit == whole_net("repae-l") and without[name].config["steps"] == 100_000


def whole_net(name):
    return built("paper", name).nets.sit


def test_initialization():
    """Table 7, and the final recipe: 80 joint epochs give the VAE of 800."""
    scratch, init = described("paper", "from-scratch"), described("paper", "repae-xl")
    assert not any(scratch.init[name] for name in ("vae", "latent_stats", "disc")) and scratch.steps == 400_000
    scratch.unlock().init = init.init
    assert scratch.to_dict() == init.to_dict()
    joint, final = described("paper", "repae-xl-vavae"), described("paper", "final")
    assert (joint.steps, final.steps) == (80 * 5000, 800 * 5000)
    assert "vavae-f16d32" in joint.init.vae and "e2e-vavae-400k" in final.init.vae
    assert joint.vae.to_dict() == final.vae.to_dict()


@pytest.mark.parametrize("name", [name for name in paper.ROWS if "vavae" in name and paper.ROWS[name].file == "ldm"])
def test_vaes_in_place_of_others(name):
    """Table 8: DiT or SiT, with and without REPA."""
    if name == "repa-vavae":
        return
    job = built("paper", name)
    assert job.nets.sit.learned_sigma == name.startswith("dit") and job.nets.sit.hidden_size == 1152
    assert bool(job.encoders) == ("repa" in name) == ("align" in job.recipe.sit_weights)
    assert ("e2e" in job.config["init"]["vae"]) == ("e2e" in name) and job.config["steps"] == 400_000
    assert job.recipe.sit_weights.keys() - {"align"} == ({"noise", "bound"} if name.startswith("dit") else {"velocity"})


def test_512_pixels():
    """Table 12: 64 x 64 latents."""
    for name in ("repae-512", "repa-512"):
        job = built("paper", name)
        assert job.latent_shape == (64, 64, 4) and job.encoders[0].image_size == 448 and job.nets.sit.hidden_size == 1024


def test_neighbors():
    """iREPA: one 3x3 convolution, gamma 0.6, weight 1. SiT and DiT: 7M steps, mirrored images, no clipping."""
    job = built("paper", "irepa")
    assert job.nets.sit.projector == "conv" and job.encoders[0].spatial_gamma == 0.6 and job.recipe.sit_weights["align"] == 1.0
    factor = built("paper", "repa-early-stop").recipe.align_factor
    assert [float(factor(step)) for step in (0, 249_999, 250_000)] == [1, 1, 0]
    assert [e.name for e in built("paper", "repae-two-encoders").encoders] == ["dinov2-base", "ijepa_vith14_1k"]
    for name in ("sit", "dit"):
        config = described("paper", name)
        assert config.steps == 7_000_000 and config.data.flip_probability == 0.5 and config.optim.sit.clip_norm > 1e6
        assert not config.encoders and config.loss.sit.align == 0


FAST_FORWARD = ("mean-flow", "improved-mean-flow")


def test_one_step():
    """configs/default.py of Gsunshine/meanflow and Lyy-iiis/imeanflow; guidance of XL/2 as in NVIDIA's FastGen."""
    plain, improved = (built("paper", name) for name in FAST_FORWARD)
    for job in (plain, improved):
        adam = job.config["optim"]["sit"]
        assert (adam["learning_rate"], adam["b1"], adam["b2"], adam["weight_decay"]) == (1e-4, 0.9, 0.95, 0.0)
        assert (job.recipe.objective.time_mean, job.recipe.objective.time_std, job.config["ema_decay"]) == (-0.4, 1.0, 0.9999)
        assert (job.recipe.objective.weight_power, job.recipe.objective.weight_constant) == (1.0, 0.01)
        assert job.recipe.sit_weights == {"mean_flow": 1.0} and job.recipe.label_dropout == 0.1
        assert job.config["init"]["vae"] == job.config["init"]["latent_stats"] == "stabilityai/sd-vae-ft-mse"  # `dataset.vae`
        assert (job.sampling.sampler, job.sampling.steps, job.sampling.guidance_scale) == ("meanflow", 1, 1.0)
    objective = plain.recipe.objective
    assert objective.omega / (1 - objective.kappa) == pytest.approx(2.5) and objective.guidance_high == 0.75
    assert (objective.tangent, objective.velocity_share, plain.nets.sit.conditions) == ("data", 0.75, 1)
    assert plain.config["steps"] * 256 / 1_281_167 == pytest.approx(240, rel=2e-3)
    objective = improved.recipe.objective
    assert (objective.tangent, objective.velocity_share, objective.largest_scale) == ("network", 0.5, 8.0)
    assert improved.nets.sit.conditions == 2 and improved.config["steps"] * 1024 / 1_281_167 == pytest.approx(640, rel=2e-3)


def test_rae():
    """RAE's stage2/training/ImageNet256: batch 1024, rate 2e-4, b2 0.95, EMA 0.9995, times logit-normal, 768 channels."""
    config, job = described("paper", "rae-dit-xl"), built("paper", "rae-dit-xl")
    assert job.latent_shape == (16, 16, 768) and job.nets.vae.grid * job.nets.vae.encoder_patch_size == 224
    assert (config.data.batch_size, config.ema_decay, config.diffusion.time_distribution) == (1024, 0.9995, "lognormal")
    assert (config.optim.sit.learning_rate, config.optim.sit.b2, config.data.flip_probability) == (2e-4, 0.95, 0.5)
    assert config.steps == 80 * 1_281_167 // 1024 // 1000 * 1000
    # `scheduler`: linear from epoch 40, whose `warmup_epochs` are at the full rate, to 800; `clip_grad` 1
    section = read_config(config).optim.sit
    rates = [float(learning_rate(section)(epoch * 1250)) for epoch in (0, 40, 420, 800, 900)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5]) and section.clip_norm == 1
    # `misc.time_dist_shift_dim` and `_base`, 196608 and 4096, in training and sampling; 50 steps of Euler's method
    assert config.diffusion.time_shift == config.sampling.time_shift == pytest.approx(48**0.5)
    assert (config.sampling.sampler, config.sampling.steps) == ("euler", 50)


def test_vtp():
    """VTP's generation/configs/train_vtp_l_dit_xl.yaml: 100,000 steps of 1024, rate 2e-4, b2 0.95; 64 channels."""
    config, job = described("paper", "vtp-dit-xl"), built("paper", "vtp-dit-xl")
    assert job.latent_shape == (16, 16, 64) and (config.steps, config.data.batch_size) == (100_000, 1024)
    assert (config.optim.sit.learning_rate, config.optim.sit.b2, config.ema_decay) == (2e-4, 0.95, 0.9999)
    # no `max_grad_norm`, without which LightningDiT's train.py clips nothing
    assert config.optim.sit.clip_norm > 1e6 and config.optim.sit.schedule == "constant"
    # its t is 1 at data: `lognorm_mu: -0.75` and `timestep_shift: 0.075` have the opposite sign, and the inverse
    assert (config.diffusion.time_mean, config.diffusion.time_std, config.diffusion.time_shift) == (0.75, 1, 1)
    assert (config.sampling.sampler, config.sampling.steps) == ("euler", 250)
    t = np.linspace(0, 1, 9)
    ours, theirs = shift_times(t, config.sampling.time_shift), 1 - shift_times(1 - t, 0.075)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


# REPA-E's README and train_repae.py: lr 1e-4, batch 256, 0.5 and 1.5, momentum 0.1, EMA 0.9999, clipping 1, no decay, no flips
@pytest.mark.parametrize(
    "name", [name for name in paper.ROWS if name not in ("sit", "dit", "rae-dit-xl", "vtp-dit-xl", *FAST_FORWARD)]
)
def test_what_all_runs_share(name):
    config = described("paper", name)
    assert config.data.batch_size == 256 and config.ema_decay == 0.9999 and config.data.flip_probability == 0
    for section in config.optim.values():
        assert (section.learning_rate, section.clip_norm, section.weight_decay) == (1e-4, 1.0, 0.0)
        assert (section.b1, section.b2, section.schedule, section.warmup_steps) == (0.9, 0.999, "constant", 0)
    if config.job == "repae":
        assert config.loss.vae.align == (0 if name == "naive" else 1.5)
        assert "pixel_reduction" not in config.loss and config.loss.gan_start == 0  # joint training takes means over pixels
        assert config.diffusion.norm_momentum == (0.0 if name in ("without-batch-norm", "naive") else 0.1)
    else:
        assert "norm_momentum" not in config.diffusion and not config.sit.learned_positions
    assert config.loss.sit.align == {"irepa": 1.0}.get(name, 0.5 if config.encoders else 0.0)
    assert config.diffusion.label_dropout == 0.1


def test_files_are_known_artefacts():
    known = {artefact.name for artefact in ARTEFACTS}
    stages = {f"vavae-stage{i}{ending}" for i in (1, 2) for ending in (".pt", "-discriminator-ckpt.pt")}
    for case in NAMES:
        init = described(*case).init
        named = {init[field] for field in ("vae", "latent_stats", "disc") if init.get(field)}
        assert named <= known | stages, case


# ---- tokenizers -----------------------------------------------------------------------------------------------------

# name -> (reduction of pixels, reconstruction weights, GAN's, its largest adaptive factor, its start, VF, margins, rate, batch)
RECIPES = {
    # REPA-E: configs/l1_lpips_kl_gan.yaml
    "": ("mean", {"l1": 1.0, "lpips": 1.0}, 0.1, None, 0, None, (0, 0), 1e-4, 256),
    # latent diffusion: configs/autoencoder/autoencoder_kl_32x32x4.yaml, base rate 4.5e-6; LPIPSWithDiscriminator's clamp
    "sdvae": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 50_001, None, (0, 0), 4.5e-6 * 96, 96),
    # sd-vae-ft-mse's model card: MSE + 0.1 LPIPS, batch 192
    "sdvae-ft-mse": ("sum", {"l2": 1.0, "lpips": 0.1}, 0.5, 1e4, 0, None, (0, 0), 4.5e-6 * 192, 192),
    "invae": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 2501, None, (0, 0), 1e-4, 256),
    # LightningDiT: vavae/configs, three stages
    "vavae-stage1": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 2501, 0.5, (0, 0), 1e-4, 256),
    "vavae-stage2": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 1, 0.1, (0, 0), 1e-4, 256),
    "vavae-stage3": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 1, 0.1, (0.5, 0.25), 1e-4, 256),
    # EQ-VAE: train_eqvae/configs/eqvae_config.yaml
    "eqvae": ("sum", {"l1": 1.0, "lpips": 1.0}, 0.5, 1e4, 0, None, (0, 0), 4.5e-6 * 160, 160),
    # arXiv 2502.14831
    "se": ("mean", {"l1": 1.0, "lpips": 1.0, "se": 0.25}, 0.1, None, 0, None, (0, 0), 1e-4, 256),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    reduction, reconstruction, gan, clip, start, vf, margins, rate, batch = RECIPES[name]
    job = built("vae", name)
    weights, recipe, config = dict(job.recipe.vae_weights), job.recipe, job.config
    assert weights.pop("kl") == 1e-6 and weights.pop("gan") == gan and weights.pop("vf", None) == vf
    assert weights == pytest.approx(reconstruction) and recipe.pixel_reduction == reduction
    assert recipe.adaptive == {key: x for key, x in (("gan", clip), ("vf", vf and 1e8)) if x}
    assert recipe.gan_start == start and recipe.vf_margins == margins and config["data"]["batch_size"] == batch
    for section in config["optim"].values():
        assert section["learning_rate"] == pytest.approx(rate) and section["weight_decay"] == 0
        # latent diffusion's Adam, or REPA-E's
        adam = (section["b1"], section["b2"], section["clip_norm"])
        assert adam == ((0.5, 0.9, 1e9) if clip else (0.9, 0.999, 1.0))
    assert config["precision"]["compute"] == ("float32" if clip else "bfloat16")
    if vf:  # as many tokens as latent pixels: DINOv2-L at 224 pixels
        assert job.encoders[0].image_size == 224 and job.encoders[0].grid == job.latent_shape[0] == 16
        assert job.nets.vae.feature_dim == encoders.ARCHITECTURES["dinov2-large"]["hidden_size"]


def test_architectures_and_durations_of_tokenizers():
    shapes = {"f8d4": (32, 32, 4), "f8d16": (32, 32, 16), "f16d32": (16, 16, 32)}
    for name, recipe in vae.RECIPES.items():
        assert built("vae", name).latent_shape == shapes[recipe.vae], name
    epochs = [described("vae", f"vavae-stage{stage}").steps * 256 / 1_281_167 for stage in (1, 2, 3)]
    assert epochs == pytest.approx([100, 15, 15], rel=1e-3)
    assert [described("vae", name).steps for name in ("sdvae", "sdvae-ft-mse")] == [246_803, 280_000]  # the model card
    assert described("vae", "sdvae-ft-mse").ema_decay == 0.9999 and built("vae", "eqvae").recipe.eq_prior == 0.5
    assert built("vae", "se").recipe.se_factors == (2, 4)


def test_stages_follow_each_other():
    for stage in (2, 3):
        init = described("vae", f"vavae-stage{stage}").init
        assert init.vae == f"vavae-stage{stage - 1}.pt" and init.disc == f"vavae-stage{stage - 1}-discriminator-ckpt.pt"
    assert "extract-vae runs/vavae-stage1 vavae-stage1.pt" in vae.__doc__


def test_discriminator_alone():
    job = built("vae", "discriminator")
    assert job.frozen_vae and job.nets.disc is not None and job.nets.lpips is None and not job.recipe.vae_weights
    with pytest.raises(ValueError, match="config.init.vae is empty"):
        frozen_weights.load_frozen(job)


# ---- tiny variants --------------------------------------------------------------------------------------------------


def tiny(case):
    return described(case[0], ",".join(filter(None, [case[1], "tiny"])))


def structure(tree):
    """The config with numbers, and lists of them, replaced by whether they are zero: two that agree take the same steps.

    Margins, which are numbers, are left out, and so is mirroring, which the first runs of their kind have.
    """
    if isinstance(tree, dict):
        return {name: structure(value) for name, value in tree.items() if name not in ("flip_probability", "vf_margins")}
    return tree if isinstance(tree, str) else bool(np.any(tree or 0))


def smaller(config):
    """The tiny variant with one level of the VAE less, which is what takes long to compile."""
    if "family" in config.vae:
        return config
    config.vae.update(channel_multipliers=(1, 1))
    config.data.image_size = 16 if config.loss.get("eq_scales") else 8
    for encoder in config.encoders.values():
        encoder.image_size, encoder.architecture = 8, {**encoder.architecture, "patch_size": 2}
    if "disc" in config:
        config.disc.num_layers = 1
    return config


TINY = {json.dumps(structure(tiny(case).to_dict())): case for case in reversed(NAMES)}


@functools.cache
def built_tiny(text):
    (case,) = [case for case in NAMES if json.dumps(tiny(case).to_dict()) == text][:1]
    return build.build(tiny(case), jax.devices()[:1])


@pytest.mark.parametrize("case", NAMES, ids=label)
def test_the_tiny_variant_can_be_built(case):
    job, full = built_tiny(json.dumps(tiny(case).to_dict())), built(*case)
    assert job.latent_shape == (4, 4, 4) and len(job.encoders) == len(full.encoders)
    assert job.recipe.vae_weights.keys() == full.recipe.vae_weights.keys() - {"lpips"}
    assert job.recipe.sit_weights == full.recipe.sit_weights and millions(initial_state.abstract_state(job)) < 0.5


def plain_descent(tx):
    """Gradient descent for every network that is trained: Adam takes a third of the compilation, and is tested elsewhere."""
    return Optimizers(*(None if trained is None else optax.sgd(1e-3) for trained in (tx.vae, tx.sit, tx.disc)))


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: small._random_leaf(path, leaf, rng), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY.values(), ids=label)
def test_a_step_of_the_tiny_variant(case):
    """Rows that are not here differ from one that is in numbers alone."""
    job = build.build(smaller(tiny(case)), jax.devices()[:1])
    job = dataclasses.replace(job, tx=plain_descent(job.tx))
    frozen = random_tree(compilation.abstract_inputs(job)[1], 1)
    rng, data = np.random.default_rng(2), job.config["data"]
    batch = {
        "image": rng.integers(0, 256, (data["batch_size"], data["image_size"], data["image_size"], 3), np.uint8),
        "label": rng.integers(0, data["num_classes"], data["batch_size"], np.int32),
    }
    state = random_tree(initial_state.abstract_state(job), 3)
    new, metrics = jax.jit(job.step)(state, batch, frozen, jax.random.key(0))
    terms = [f"{net}/{term}" for net in ("vae", "sit") for term in getattr(job.recipe, f"{net}_weights")]
    assert set(terms) <= set(metrics)
    assert all(np.isfinite(x) for x in metrics.values()), {name: float(x) for name, x in metrics.items()}
    assert int(new.step) == 1 and int(new.skipped) == 0
    assert {name for name in ("vae", "sit", "disc") if small.differing(getattr(state, name), getattr(new, name))} == {
        name for name in ("vae", "sit", "disc") if getattr(job.tx, name) is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY.values(), ids=label)
def test_the_tiny_variant_trains(case, tmp_path):
    """The training loop runs it unchanged."""
    state, finished = train.train(tiny(case), tmp_path)
    assert finished and int(state.step) == tiny(case).steps and int(state.skipped) == 0


@pytest.mark.parametrize("case", [("paper", "sit"), ("paper", "without-gan"), ("vae", "eqvae"), ("vae", "se")], ids=label)
def test_digits(case):
    """The recipe stays, networks and data are the digits'; weights of the encoder are for the user to give."""
    config, full = described(case[0], f"{case[1]},digits"), built(*case)
    for encoder in config.encoders.values():
        assert encoder.weights == ""
        encoder.weights = "random"
        encoder.architecture = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    job = build.build(config, jax.devices()[:1])
    assert job.latent_shape == (4, 4, 8) and config.data.source == "digits" and not config.init.vae
    assert job.recipe.vae_weights.keys() == full.recipe.vae_weights.keys() - {"lpips"}
    assert job.recipe.sit_weights == full.recipe.sit_weights and job.recipe.flip_probability == full.recipe.flip_probability


# ---- what the docstrings say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_commands_have_no_flag_that_does_not_exist(file):
    module: ModuleType = importlib.import_module(f"configs.{file}")
    flags = re.findall(r"--?-?config\.([\w.]+)", module.__doc__)
    assert len(flags) >= 3
    named = re.findall(r"configs/(\w+)\.py(?::([\w=/,.-]+))?", module.__doc__)
    assert (file, "") in named or any(name == file for name, _ in named)
    for name, arg in named:
        if name in FILES and arg != "NAME":
            FILES[name].get_config(arg or ("repae-l" if name == "paper" else ""))
    config = module.get_config("repae-l" if file == "paper" else "")
    for flag in flags:
        section = config
        for name in flag.split("."):
            assert name in section, flag
            section = section[name]


def test_arguments_are_described():
    for module in (repae, ldm, vae):
        described_there = set(re.findall(r"^    (\w+)  ", module.__doc__, re.MULTILINE))
        assert {"vae", "encoder", "resolution", *common.SMALL} <= described_there, module.__name__


@functools.cache
def flop_per_image(file, name):
    return sum(flops.of_step(built(file, name)).values())


TOKENIZERS = re.findall(r"^    (\S+) {2,}(\S.*\S) {2,}(\S.*\S|-) {2,}(\d+)$", vae.__doc__, re.MULTILINE)


def test_the_table_of_tokenizers():
    """Names and reductions in the docstring are those of the configs."""
    assert [name for name, *_ in TOKENIZERS] == ["(none)", *vae.RECIPES]
    for name, words, *_ in TOKENIZERS:
        if name != "discriminator":
            config = described("vae", name if name in vae.RECIPES else "")
            assert words.split("; ")[-1].strip() == config.loss.pixel_reduction, name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "hours"), [(name, hours) for name, _, _, hours in TOKENIZERS])
def test_the_costs_of_tokenizers(name, hours):
    """Hours of an H100 in the docstring, to 1 %."""
    name = name if name in vae.RECIPES else ""
    assert flops.h100_hours(flop_per_image("vae", name), described("vae", name)) == pytest.approx(int(hours), rel=0.01, abs=0.6)


def test_the_table_of_the_paper():
    lines = paper.table()
    assert len(lines) == len(paper.ROWS) + 1
    for line, (name, row) in zip(lines[1:], paper.ROWS.items()):
        assert line.startswith(f"{name} ") and line.endswith(f"  {row.published}")


@pytest.mark.integration
def test_a_row_of_the_paper():
    command, preset, cost, *_ = paper.describe("sit-repa-e2e-vavae")
    assert command.endswith("guided 1.67 (IS 266.3)") and "configs/ldm.py:model=SiT-XL/1" in preset
    assert re.fullmatch(r"  0\.91 TFLOP an image, \d+ hours of an H100", cost)


def forward(module, *shapes, method=None):
    """TFLOP of a forward pass; an empty shape is that of an integer."""
    arguments = [jax.ShapeDtypeStruct(shape or (1,), np.float32 if shape else np.int32) for shape in shapes]
    variables = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *arguments)
    apply = functools.partial(module.apply, method=method, mutable=["batch_stats"])
    return sum(flops.count(lambda *args: jax.tree.leaves(apply(*args)), variables, *arguments).values()) / 1e12


IMAGE = (1, 256, 256, 3)


@pytest.mark.integration
@pytest.mark.parametrize(("name", "expected"), [("repae-xl", (0.273, 0.622)), ("repae-xl-vavae", (0.138, 0.252))])
def test_published_costs_of_vaes(name, expected):
    """TFLOP of published modules, counted by a profiler of the reference: one forward pass, one image of 256 pixels."""
    job = built("paper", name)
    both = forward(job.nets.vae, IMAGE, method="encode"), forward(job.nets.vae, (1, *job.latent_shape), method="decode")
    assert both == pytest.approx(expected, rel=5e-3)
    assert forward(job.nets.sit.clone(feature_dims=()), (1, *job.latent_shape), (1,), ()) == pytest.approx(0.237, rel=5e-3)


@pytest.mark.integration
def test_published_costs_of_other_networks():
    """TFLOP of one forward pass on one image of 256 pixels, counted in the same way."""
    job = built("paper", "repae-xl")
    (encoder,) = job.encoders
    size = encoder.image_size
    assert forward(encoder.module, (1, size, size, 3)) == pytest.approx(0.046, rel=0.01)
    assert forward(job.nets.disc, IMAGE) == pytest.approx(0.0063, rel=0.01)
    assert forward(job.nets.lpips, IMAGE, IMAGE) / 2 == pytest.approx(0.040, rel=0.01)


@pytest.mark.integration
@pytest.mark.parametrize(("module", "name", "expected"), [(repae, "repae-xl", "3.77"), (ldm, "sit-repa-e2e-vavae", "0.91")])
def test_costs_in_docstrings(module, name, expected):
    words, cost = " ".join(module.__doc__.split()), flop_per_image("paper", name)
    assert f"{expected} TFLOP" in words and f"{cost / 1e12:.2f}" == expected
    assert f"{flops.h100_hours(cost, described('paper', name)):.0f} hours" in words


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arg", "messages"),
    [
        ("paper", "repae-xxl", ["'repae-xxl'", "'repae-xl'", "'final'", "'digits', 'tiny'"]),
        ("paper", "", ["names no run", "'repae-xl'", "'final'"]),
        ("paper", "tiny", ["'tiny' names no run", "'repae-xl'"]),
        ("paper", "repae-l,final", ["'repae-l'", "'final'", "second"]),
        ("paper", "repae-l,tiny,digits", ["'tiny'", "'digits'", "second"]),
        ("paper", "repae-l,vae=f8d4", ["'vae'", "allowed: []"]),
        ("vae", "vavae", ["'vavae'", "'vavae-stage1'", "'discriminator'"]),
        ("vae", "sdvae,vae=f16d32", ["'sdvae'", "vae=f8d4", "vae=f16d32"]),
        ("vae", "sdvae,eqvae", ["'sdvae'", "'eqvae'", "second"]),
        ("vae", "vae=f16d32,tiny", ["'vae=f16d32'", "'tiny'"]),
        ("vae", "encoder=dino", ["encoder 'dino'", "dinov2-base"]),
        ("ldm", "model=SiT", ["SIZE/PATCH"]),
        ("ldm", "model=UViT-L/2", ["'UViT'", "SiT, DiT"]),
        ("ldm", "model=SiT-B/1,model=DiT-B/1", ["'model=SiT-B/1'", "'model=DiT-B/1'"]),
        ("ldm", "digits,model=SiT-B/1", ["'model=SiT-B/1'", "'digits'"]),
        ("repae", "sit=B/1,tiny", ["'sit=B/1'", "'tiny'"]),
        ("repae", "encoder=dinov2-base+dino", ["encoder 'dino'", "dinov2-base"]),
    ],
)
def test_arguments_that_cannot_be(file, arg, messages):
    with pytest.raises(ValueError) as caught:
        FILES[file].get_config(arg)
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_names_do_not_collide():
    """A bare word means one thing, and the presets of every file are described to be the same."""
    assert not set(paper.ROWS) & set(common.SMALL) and not set(vae.RECIPES) & set(common.SMALL)
    assert all(row.file in paper.FILES and row.published and row.table for row in paper.ROWS.values())
    assert inspect.getdoc(paper).startswith("The runs of REPA-E's tables")
