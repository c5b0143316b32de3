"""Config -> networks, optimizers, frozen weights, step and initial state. The only file that reads config names.

Everything that can be wrong with a config is found here, before anything is compiled.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from checkpoints_tools import mapping, published, weights
from checkpoints_tools import vae as vae_files
from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.lpips import load_lpips
from checkpoints_tools.sit import layout_of
from checkpoints_tools.training_state import OPT_STATES, PLACES, Networks, to_trees
from checkpoints_tools.vit import load_encoder
from repae_jax import data, features, sharding, train_losses, train_step
from repae_jax.data.latents import CachedLatents, WithMoments, check_cache
from repae_jax.data.loader import Loader
from repae_jax.diffusion import ddpm, interpolant
from repae_jax.generate import Sampling, check_sampler
from repae_jax.images import to_float
from repae_jax.losses import alignment, regularizers
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.running_stats import ChannelStats
from repae_jax.train_state import create_net, create_state

RANDOM = "random"  # instead of a weight file: to measure speed, or for tests
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
VAE_TERMS = ("l1", "l2", "lpips", "kl", "gan", "vf", "se")
THROUGH_SIT = ("align", "diffusion")  # further terms of the VAE's loss where there is a SiT
_VAE_LOSS = {
    "vae", "pixel_reduction", "adaptive", "gan_start", "gan_factor", "lecam", "vf_margins", "se_factors", "eq_scales",
    "eq_prior",
}  # fmt: skip
_SIT_LOSS = {"sit", "align_shape", "align_end"}
_SHARED = {
    "job", "seed", "steps", "accumulation", "ema_decay", "max_skipped_in_a_row", "data", "vae", "encoders", "loss", "optim",
    "init", "precision", "mesh", "checkpoint", "log", "hooks",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the three jobs.

    Attributes:
      step: its function in train_step.
      trains: names of the networks.
      sections: of the config.
      loss, init: fields of those sections.
    """

    step: Callable
    trains: tuple[str, ...]
    sections: set[str]
    loss: set[str]
    init: set[str]


JOBS = {
    "repae": Kind(
        train_step.repae_step, ("vae", "disc", "sit"), _SHARED | {"sit", "disc", "lpips", "diffusion", "sampling"},
        _VAE_LOSS | _SIT_LOSS, {"checkpoint", "vae", "latent_stats", "disc", "stats_images"},
    ),
    "ldm": Kind(
        train_step.ldm_step, ("sit",), _SHARED | {"sit", "diffusion", "sampling"}, _SIT_LOSS,
        {"checkpoint", "vae", "latent_stats", "stats_images"},
    ),
    "vae": Kind(train_step.vae_step, ("vae", "disc"), _SHARED | {"disc", "lpips"}, _VAE_LOSS, {"vae", "disc"}),
}  # fmt: skip
# options that no callable of ours takes whole; those of loss, optim and init depend on the job
FIELDS = {
    "data": {
        "source", "options", "image_size", "num_classes", "batch_size", "workers", "max_bad_fraction", "cache",
        "flip_probability",
    },
    "lpips": {"vgg16", "linear", "input_range"},
    "diffusion": {"path", "time_distribution", "label_dropout"},
    "mesh": {"fsdp"},
    "checkpoint": {"every", "keep_last", "keep_every"},
    "log": {"every"},
}  # fmt: skip
AT_LEAST = (
    ("data", "image_size", 1), ("data", "num_classes", 1), ("data", "batch_size", 1), ("init", "stats_images", 1),
    ("checkpoint", "every", 1), ("checkpoint", "keep_last", 1), ("log", "every", 1),
    ("hooks", "images", 1), ("hooks", "samples_every", 0), ("hooks", "reconstructions_every", 0),
)  # fmt: skip
ENCODER_FIELDS = {"architecture", "weights", "image_size", "spatial_gamma"}
OBJECTIVES = (*sorted(interpolant.PATHS), "ddpm")
REDUCTIONS = ("mean", "sum")
LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, built.

    Attributes:
      config: the config as nested plain values, as stored in checkpoints.
      nets: Nets.
      encoders: tuple of features.Encoder.
      tx: Optimizers.
      recipe: Recipe.
      sampling: Sampling of the training pictures; None without a SiT.
      latent_shape: (h, w, C).
      mesh: device mesh.
    """

    config: Mapping[str, Any]
    nets: train_step.Nets
    encoders: tuple[features.Encoder, ...]
    tx: train_step.Optimizers
    recipe: train_step.Recipe
    sampling: Sampling | None
    latent_shape: tuple[int, int, int]
    mesh: jax.sharding.Mesh

    @property
    def frozen_vae(self) -> bool:
        """Whether the VAE is an input, `frozen['vae']`, and no part of the state."""
        return self.tx.vae is None

    @property
    def step(self) -> Callable:
        """(state, batch, frozen, key) -> (state, metrics), not yet jitted."""
        fields = {"nets": self.nets, "encoders": self.encoders, "tx": self.tx, "recipe": self.recipe}
        return functools.partial(JOBS[self.config["job"]].step, **fields)


def check_names(where, given, allowed):
    """ValueError that names every field of `given` that is not allowed, and every allowed one it lacks."""
    unknown, missing = sorted(set(given) - set(allowed)), sorted(set(allowed) - set(given))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; it has {sorted(allowed)}")


def construct(where, function, section, **extra):
    """function(**section, **extra), with a readable error for a field it does not take or that it needs."""
    parameters = inspect.signature(function).parameters
    allowed = [name for name in parameters if name not in extra and name not in ("parent", "name")]
    unknown = sorted(set(section) - set(allowed))
    missing = [name for name in allowed if parameters[name].default is inspect.Parameter.empty and name not in section]
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; allowed: {sorted(allowed)}")
    try:
        return function(**section, **extra)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _at_least(where, value, low):
    if value < low:
        raise ValueError(f"{where}={value} must be at least {low}")


def plain_config(config):
    """Nested dict of plain values of a ConfigDict, tuples kept; placeholders are None."""
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def build(config, devices=None, encoders=None):
    """Build a job.

    Args:
      config: ConfigDict or nested dict, see configs/.
      devices: devices of the mesh; default all.
      encoders: tuple of features.Encoder; default those that the config describes. () leaves projectors and
        alignment out of the networks, for sampling.

    Returns:
      Job.

    Raises:
      ValueError: for anything in the config that cannot work, naming the field, the value and what is allowed.
    """
    config = plain_config(config)
    kind = _check_fields(config)
    recipe = _recipe(config)
    mesh = sharding.make_mesh(config["mesh"]["fsdp"], devices)
    sharding.check_batch(config["data"]["batch_size"], config["accumulation"], mesh)
    dtype = _dtype("compute", config)
    if encoders is None:
        encoders = tuple(_describe_encoder(name, config) for name in sorted(config["encoders"]))
    feature_dims = tuple(encoder.module.hidden_size for encoder in encoders)
    vf_dim = feature_dims[0] if "vf" in recipe.vae_weights and encoders else None
    vae = construct("config.vae", AutoencoderKL, _tuples(config["vae"]), dtype=dtype, feature_dim=vf_dim)
    latent_shape = _latent_shape(config, vae)
    _check_scales(config, recipe, latent_shape)
    sit = sampling = None
    if "sit" in kind.trains:
        for encoder in encoders:
            features.check_grid(encoder, latent_shape[0] // config["sit"]["patch_size"])
        sit = construct(
            "config.sit", SiT, config["sit"], dtype=dtype, num_classes=config["data"]["num_classes"],
            latent_channels=vae.latent_channels, feature_dims=feature_dims,
        )  # fmt: skip
        _check_sigma(config, sit, recipe.objective)
        sampling = construct("config.sampling", Sampling, config["sampling"])
        check_sampler(sampling, recipe.objective)
    if vf_dim is not None and encoders[0].grid != latent_shape[0]:
        raise ValueError(
            f"config.loss.vae.vf compares each of the {latent_shape[0]} x {latent_shape[0]} latent positions with a token, but "
            f"config.encoders.{min(config['encoders'])} gives {encoders[0].grid} x {encoders[0].grid}: set its image_size to "
            f"{latent_shape[0] * encoders[0].module.patch_size}"
        )
    trains = [name for name in kind.trains if name != "vae" or recipe.vae_weights]
    disc = lpips = None
    if "disc" in trains and "gan" not in recipe.vae_weights and recipe.vae_weights:
        trains.remove("disc")
        for name, value in (("loss.lecam", config["loss"]["lecam"]), ("init.disc", config["init"]["disc"])):
            if value:
                raise ValueError(
                    f"config.{name}={value!r} needs a discriminator, but config.loss.vae.gan is 0: change one of them"
                )
    if "disc" in trains:
        disc = construct("config.disc", PatchDiscriminator, config["disc"], dtype=dtype)
        smallest = round(config["data"]["image_size"] * min(recipe.eq_scales, default=1))
        if smallest < disc.min_image_size:
            raise ValueError(
                f"config.disc.num_layers={disc.num_layers} leaves no logit of config.data.image_size="
                f"{config['data']['image_size']} pixels{f' at the scale {min(recipe.eq_scales)}' if recipe.eq_scales else ''}; "
                f"lower num_layers, or use {disc.min_image_size} pixels or more"
            )
    if "lpips" in recipe.vae_weights:
        lpips = LPIPS(dtype=_dtype("lpips", config))
    tx = dict.fromkeys(train_step.Optimizers._fields)
    for name in kind.trains:
        fields = config["optim"][name]
        if name == "sit" and not sit.learned_positions:
            fields = {**fields, "fixed": (*fields["fixed"], "pos_embed")}
        made = construct(f"config.optim.{name}", optimizer, fields)
        tx[name] = made if name in trains else None
    job = Job(
        config=config,
        nets=train_step.Nets(vae=vae, sit=sit, disc=disc, lpips=lpips),
        encoders=encoders,
        tx=train_step.Optimizers(**tx),
        recipe=recipe,
        sampling=sampling,
        latent_shape=latent_shape,
        mesh=mesh,
    )
    shapes = jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))  # checks of the networks, uncompiled
    for name in trains:
        parts = set(getattr(shapes, name).params)
        fixed = set(recipe.fixed[name])
        if fixed - parts or fixed >= parts:
            raise ValueError(f"config.optim.{name}.fixed={sorted(fixed)}; allowed: some, not all, of {sorted(parts)}")
    for term, part in (("gan", "decoder"), ("vf", "encoder")):
        if term in recipe.adaptive and part in recipe.fixed["vae"]:
            raise ValueError(
                f"config.loss.adaptive.{term}={recipe.adaptive[term]} compares gradients in the {part}, which "
                "config.optim.vae.fixed keeps as it is: change one of them"
            )
    warn_of_ablations(job)
    return job


def _check_fields(config):
    """The config's Kind; ValueError for unknown or missing fields and numbers out of range."""
    if config.get("job") not in JOBS:
        raise ValueError(f"config.job={config.get('job')!r} is unknown; allowed: {list(JOBS)}")
    kind = JOBS[config["job"]]
    check_names("config", config, kind.sections)
    fields = {**FIELDS, "loss": kind.loss, "init": kind.init, "optim": kind.trains}
    fields |= {"precision": {"compute"}, "hooks": {"images"}}
    if {"vae", "sit"} <= set(kind.trains):
        fields["diffusion"] = fields["diffusion"] | {"norm_momentum"}
    if "vae" in kind.trains:
        fields["precision"] |= {"lpips"}
        fields["hooks"] |= {"reconstructions_every"}
    if "sit" in kind.trains:
        fields["hooks"] |= {"samples_every"}
    for section in sorted(set(fields) & kind.sections):
        check_names(f"config.{section}", config[section], fields[section])
    for name in ("steps", "accumulation", "max_skipped_in_a_row"):
        _at_least(f"config.{name}", config[name], 1)
    for section, name, low in AT_LEAST:
        if name in config[section]:
            _at_least(f"config.{section}.{name}", config[section][name], low)
    if not 0 <= config["ema_decay"] < 1:
        raise ValueError(f"config.ema_decay={config['ema_decay']} must lie in [0, 1)")
    if not 0 <= config["data"]["flip_probability"] <= 1:
        raise ValueError(f"config.data.flip_probability={config['data']['flip_probability']} must lie in [0, 1]")
    if config["data"]["cache"] and "vae" in kind.trains:
        raise ValueError(
            f"config.data.cache={config['data']['cache']!r} holds latents of a frozen VAE, but config.job={config['job']!r} "
            "trains the VAE: empty it, or take configs/ldm.py"
        )
    return kind


def warn_of_ablations(job):
    """Says so, loudly, where a config is one of the paper's ablations that lose or collapse."""
    weights, recipe = job.recipe.vae_weights, job.recipe
    if job.config["job"] != "repae":
        return
    found = []
    if "diffusion" in weights:
        found.append(
            "config.loss.vae.diffusion lets the diffusion loss reach the VAE: in the paper the latent space collapsed (spatial "
            "variance 17.06 to 0.02; gFID 444 instead of 16.3 at 100k steps)"
        )
    if not set(weights) & set(train_losses.PIXEL_TERMS):
        found.append("config.loss.vae has no reconstruction term: nothing holds the latents to the images")
    elif "gan" not in weights:
        found.append("config.loss.vae.gan=0: in the paper gFID was 19.2 instead of 16.3 at 100k steps")
    if not recipe.norm_momentum:
        found.append("config.diffusion.norm_momentum=0, no latent batch norm: in the paper gFID was 18.1 instead of 16.3")
    for line in found:
        logging.warning("ABLATION: %s", line)


def _check_scales(config, recipe, latent_shape):
    """ValueError unless images and latents can be had at the scales of 'se' and EQ."""
    size = config["data"]["image_size"]
    factors = [("se_factors", [1 / factor for factor in recipe.se_factors]), ("eq_scales", recipe.eq_scales)]
    for name, scales in factors:
        for scale in scales:
            for side in (size, latent_shape[0]):
                square = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
                try:
                    jax.eval_shape(functools.partial(regularizers.downscale, scale=scale), square)
                except ValueError as error:
                    raise ValueError(f"config.loss.{name} of {side} x {side} positions: {error}") from error


def _check_sigma(config, sit, objective):
    is_ddpm = isinstance(objective, ddpm.NoiseObjective)
    if is_ddpm != sit.learned_sigma:
        raise ValueError(
            f"config.sit.learned_sigma={sit.learned_sigma} and config.diffusion.path={config['diffusion']['path']!r}: 'ddpm' "
            "needs learned_sigma=True, the variance its bound trains; the others False"
        )


def _tuples(section):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _dtype(name, config):
    value = config["precision"][name]
    if value not in DTYPES:
        raise ValueError(f"config.precision.{name}={value!r} is unknown; allowed: {list(DTYPES)}")
    return DTYPES[value]


def _latent_shape(config, vae):
    size, patch = config["data"]["image_size"], config.get("sit", {"patch_size": 1})["patch_size"]
    if size % vae.factor:
        raise ValueError(
            f"config.data.image_size={size} is not a multiple of the VAE's factor {vae.factor} "
            f"(config.vae.channel_multipliers has {len(vae.channel_multipliers)} levels): "
            f"use {size // vae.factor * vae.factor or vae.factor}"
        )
    side = size // vae.factor
    if side % patch:
        raise ValueError(f"config.sit.patch_size={patch} does not divide the latents' {side} x {side} positions")
    return side, side, vae.latent_channels


def _recipe(config):
    kind, loss, diffusion = JOBS[config["job"]], config["loss"], config.get("diffusion")
    fields, terms = {"vae_weights": {}, "sit_weights": {}}, {}
    if "vae" in loss:
        terms["vae"] = VAE_TERMS + (THROUGH_SIT if "sit" in kind.trains else ())
    if diffusion is not None:
        fields["objective"] = _objective(diffusion)
        is_ddpm = diffusion["path"] == "ddpm"
        terms["sit"] = ("noise", "bound", "align") if is_ddpm else ("velocity", "align")
        if not 0 <= diffusion["label_dropout"] < 1:
            raise ValueError(f"config.diffusion.label_dropout={diffusion['label_dropout']} must lie in [0, 1)")
        fields["label_dropout"] = diffusion["label_dropout"]
        if "norm_momentum" in diffusion:
            fields["norm_momentum"] = diffusion["norm_momentum"]
            if not 0 <= diffusion["norm_momentum"] <= 1:
                raise ValueError(
                    f"config.diffusion.norm_momentum={diffusion['norm_momentum']} must lie in [0, 1]; 0 is no batch norm"
                )
    for name, allowed in terms.items():
        named = {term: float(weight) for term, weight in loss[name].items() if weight}
        for term, weight in named.items():
            _at_least(f"config.loss.{name}.{term}", weight, 0)
        other = sorted(set(named) & {"velocity", "noise", "bound"} - set(allowed)) if name == "sit" else ()
        if other:
            raise ValueError(
                f"config.loss.sit.{other[0]}={named[other[0]]} does not go with config.diffusion.path={diffusion['path']!r}, "
                f"whose terms are {list(allowed)}: DiT is path 'ddpm' with noise and bound, SiT another path with velocity"
            )
        known = (*allowed, "velocity", "noise", "bound") if name == "sit" else allowed
        unknown = sorted(set(loss[name]) - set(known))
        if unknown:
            raise ValueError(f"config.loss.{name} has unknown terms {unknown}; allowed: {list(allowed)}")
        fields[f"{name}_weights"] = named
    if "sit" in terms and terms["sit"][0] not in fields["sit_weights"]:
        raise ValueError(f"config.loss.sit.{terms['sit'][0]} must not be 0: it is the diffusion loss")
    if "vae" in terms:
        fields |= _vae_recipe(config, fields["vae_weights"])
    _check_encoders(config, fields)
    if "sit" in terms:
        _check_align_schedule(config, fields)
    if "sit" in terms and loss["align_end"] is not None:
        factor = functools.partial(alignment.schedule_factor, shape=loss["align_shape"], end=loss["align_end"])
        fields["align_factor"] = factor
    return train_step.Recipe(
        **fields,
        flip_probability=config["data"]["flip_probability"],
        accumulation=config["accumulation"],
        ema_decay=config["ema_decay"],
        fixed={name: tuple(section["fixed"]) for name, section in config["optim"].items()},
    )


def _check_align_schedule(config, fields):
    loss = config["loss"]
    where = f"config.loss.align_end={loss['align_end']} and align_shape={loss['align_shape']!r}"
    if loss["align_shape"] not in alignment.SCHEDULES or (loss["align_end"] is not None and loss["align_end"] < 1):
        raise ValueError(f"{where}: allowed are a step of at least 1, and one of {list(alignment.SCHEDULES)}")
    if loss["align_end"] is None and loss["align_shape"] != "constant":
        raise ValueError(f"{where}: a decay needs the step where it ends")
    if loss["align_end"] is not None and not any("align" in fields[f"{name}_weights"] for name in ("vae", "sit")):
        raise ValueError(f"{where}, but no alignment has a weight: leave the end out, or give config.loss.sit.align one")


def _objective(diffusion):
    for name, allowed in (("path", OBJECTIVES), ("time_distribution", interpolant.TIME_DISTRIBUTIONS)):
        if diffusion[name] not in allowed:
            raise ValueError(f"config.diffusion.{name}={diffusion[name]!r} is unknown; allowed: {sorted(allowed)}")
    if diffusion["path"] == "ddpm":
        if diffusion["time_distribution"] != "uniform":
            raise ValueError(
                f"config.diffusion.time_distribution={diffusion['time_distribution']!r} does not go with path='ddpm', whose "
                "timesteps are uniform"
            )
        return ddpm.NoiseObjective()
    return interpolant.VelocityObjective(diffusion["path"], diffusion["time_distribution"])


def _vae_recipe(config, named):
    """Fields of the Recipe that the VAE's loss needs, besides its weights."""
    loss = config["loss"]
    if config["job"] == "repae" and not named:
        raise ValueError("all of config.loss.vae is 0, so config.job='repae' would not train its VAE: take configs/ldm.py")
    if loss["gan_factor"] <= 0:
        raise ValueError(f"config.loss.gan_factor={loss['gan_factor']} must be positive; config.loss.vae.gan=0 is no GAN")
    if not named and loss["gan_start"] > 0:
        raise ValueError(
            f"config.loss.gan_start={loss['gan_start']}, but all of config.loss.vae is 0: there is nothing to train before it"
        )
    if "diffusion" in named and config["accumulation"] > 1 and config["diffusion"]["norm_momentum"]:
        raise ValueError(
            f"config.loss.vae.diffusion={named['diffusion']} goes through the statistics of the whole batch, which "
            f"config.accumulation={config['accumulation']} divides: set one of them to 0 or 1"
        )
    if config["job"] == "vae" and named and not {"l1", "l2"} & set(named):
        raise ValueError(
            "config.loss.vae needs a reconstruction term: give 'l1' or 'l2' a weight; all weights 0 train the discriminator "
            "alone"
        )
    if loss["pixel_reduction"] not in REDUCTIONS:
        raise ValueError(f"config.loss.pixel_reduction={loss['pixel_reduction']!r} is unknown; allowed: {list(REDUCTIONS)}")
    check_names("config.loss.adaptive", loss["adaptive"], train_losses.ADAPTIVE)
    adaptive = {term: float(high) for term, high in loss["adaptive"].items() if high}
    for term in adaptive:
        _at_least(f"config.loss.adaptive.{term}", adaptive[term], 0)
        if term not in named or not set(train_losses.PIXEL_TERMS) & set(named):
            raise ValueError(
                f"config.loss.adaptive.{term}={adaptive[term]} compares the gradients of config.loss.vae.{term} and of a "
                "reconstruction term: give both a weight, or set it to 0"
            )
    low, high = config["lpips"]["input_range"]
    if not low < high:
        raise ValueError(f"config.lpips.input_range={(low, high)} must be (low, high), low first")
    margins = tuple(loss["vf_margins"])
    if len(margins) != 2 or not all(0 <= margin < 2 for margin in margins):
        raise ValueError(f"config.loss.vf_margins={margins} must be two numbers in [0, 2), of cosines and of distances")
    if "se" in named and not loss["se_factors"]:
        raise ValueError("config.loss.vae.se needs factors, but config.loss.se_factors is empty: give integers, such as (2, 4)")
    factors = tuple(loss["se_factors"])
    if not all(factor == int(factor) >= 2 for factor in factors):
        raise ValueError(f"config.loss.se_factors={factors} must be integers of at least 2")
    scales = tuple(loss["eq_scales"])
    if scales:
        try:
            regularizers.check_scales(scales, loss["eq_prior"])
        except ValueError as error:
            raise ValueError(f"config.loss.eq_scales, eq_prior: {error}") from error
        if not named:
            raise ValueError(f"config.loss.eq_scales={scales} need a trained VAE, but all of config.loss.vae is 0: empty them")
    return {
        "adaptive": adaptive,
        "lpips_input_range": (low, high),
        "gan_start": loss["gan_start"],
        "gan_factor": loss["gan_factor"],
        "lecam_weight": loss["lecam"],
        "vf_margins": margins,
        "se_factors": factors if "se" in named else (),
        "pixel_reduction": loss["pixel_reduction"],
        "eq_scales": scales,
        "eq_prior": loss["eq_prior"],
    }


def _check_encoders(config, fields):
    users = [("vae", "align"), ("vae", "vf"), ("sit", "align")]
    named = [f"config.loss.{name}.{term}" for name, term in users if term in fields[f"{name}_weights"]]
    if named and not config["encoders"]:
        verb, what = ("needs", "its weight") if len(named) == 1 else ("need", "the weights")
        raise ValueError(
            f"{' and '.join(named)} {verb} an encoder, but config.encoders is empty: add one or set {what} to 0"
        )
    if config["encoders"] and not named:
        terms = [f"config.loss.{name}.{term}" for name, term in users if term in config["loss"].get(name, ())]
        state = "are all 0" if len(terms) > 1 else "is 0"
        raise ValueError(f"config.encoders has an encoder, but {' and '.join(terms)} {state}: remove one")
    if "vf" in fields["vae_weights"] and len(config["encoders"]) > 1:
        raise ValueError(
            f"config.loss.vae.vf takes one encoder, config.encoders has {sorted(config['encoders'])}: remove the others"
        )


def optimizer(
    learning_rate, warmup_steps, schedule, decay_steps, final_learning_rate, b1, b2, eps, weight_decay, clip_norm, fixed
):
    """AdamW behind clipping by the network's global gradient norm.

    The rate rises linearly over `warmup_steps`; from there it stays ('constant'), or falls on a line or a cosine to
    `final_learning_rate`, which it reaches at step `decay_steps`. Parameters below the top-level names in `fixed` stay as they
    are, as they have no gradients: they do not decay.
    """
    at_least_0 = {
        "learning_rate": learning_rate, "warmup_steps": warmup_steps, "final_learning_rate": final_learning_rate, "eps": eps,
        "weight_decay": weight_decay,
    }  # fmt: skip
    for name, value in at_least_0.items():
        _at_least(name, value, 0)
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must lie in [0, 1)")
    if clip_norm <= 0:
        raise ValueError(f"clip_norm={clip_norm} must be positive; a large one never clips")
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; allowed: {list(LR_SCHEDULES)}")
    if schedule == "constant" and decay_steps is not None:
        raise ValueError(f"schedule='constant' does not decay, but decay_steps={decay_steps}: change one of them")
    if schedule != "constant" and (decay_steps is None or decay_steps <= warmup_steps):
        raise ValueError(f"schedule={schedule!r} needs decay_steps above warmup_steps={warmup_steps}; it is {decay_steps}")
    if schedule == "cosine" and learning_rate:
        rate = optax.cosine_decay_schedule(learning_rate, decay_steps - warmup_steps, alpha=final_learning_rate / learning_rate)
    elif schedule == "linear":
        rate = optax.linear_schedule(learning_rate, final_learning_rate, decay_steps - warmup_steps)
    else:
        rate = learning_rate
    if warmup_steps:
        after = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])

    def moves(params):
        return {name: jax.tree.map(lambda _, value=name not in fixed: value, tree) for name, tree in params.items()}

    adamw = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=moves)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen weights.
# ---------------------------------------------------------------------------------------------------------------------


def _describe_encoder(name, config):
    """features.Encoder of one entry, from its architecture or its folder's config.json."""
    fields = config["encoders"][name]
    check_names(f"config.encoders.{name}", fields, ENCODER_FIELDS)
    where, path, resolution = f"config.encoders.{name}", fields["weights"], config["data"]["image_size"]
    if not path:
        raise ValueError(
            f"{where}.weights is empty: give a Hugging Face name or folder, or {RANDOM!r} for tests and benchmarks"
        )
    dtype = _dtype("compute", config)
    if fields["architecture"]:
        described = features.make_encoder(fields["architecture"], resolution, image_size=fields["image_size"], dtype=dtype)
    elif path == RANDOM:
        raise ValueError(
            f"{where}.architecture must be set when the weights are {RANDOM!r}; allowed: {list(features.ARCHITECTURES)}"
        )
    else:
        described = load_encoder(path, resolution, fields["image_size"], dtype)[0]
    gamma = fields["spatial_gamma"]
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"{where}.spatial_gamma={gamma} must lie in [0, 1], or be None for no normalisation")
    return dataclasses.replace(described, spatial_gamma=gamma)


def _encoder_params(name, described, config):
    fields = config["encoders"][name]
    if fields["weights"] == RANDOM:
        logging.warning("encoder %s has RANDOM weights: for tests and benchmarks only", name)
        return jax.jit(functools.partial(features.init_params, described))(jax.random.key(0))
    loaded, params = load_encoder(fields["weights"], config["data"]["image_size"], fields["image_size"], described.module.dtype)
    if loaded.module != described.module:
        raise ValueError(
            f"config.encoders.{name}: {fields['weights']} holds {loaded.module}, but architecture="
            f"{fields['architecture']!r} is {described.module}; correct one of the two"
        )
    return params


def _lpips_params(job):
    files = {name: job.config["lpips"][name] for name in ("vgg16", "linear")}
    sizes = [jnp.zeros((1, 32, 32, 3))] * 2
    init = functools.partial(job.nets.lpips.init, jax.random.key(0))
    if set(files.values()) == {RANDOM}:
        logging.warning("LPIPS has RANDOM weights: for tests and benchmarks only")
        return jax.jit(init)(*sizes)["params"]
    for name, path in files.items():
        if path == RANDOM or (not path and name == "vgg16"):  # one file may hold the whole module
            raise ValueError(
                f"config.lpips.{name}={path!r}: config.loss.vae.lpips needs torchvision's VGG16 weights (vgg16) and the linear "
                f"weights of LPIPS v0.1 (linear); give both files, or {RANDOM!r} for both, or set config.loss.vae.lpips=0"
            )
    return load_lpips(files["vgg16"], files["linear"])


def load_frozen_vae(job):
    """Parameters of the frozen VAE, replicated on the mesh."""
    path, init = job.config["init"]["vae"], functools.partial(initial_vae, job)
    if path == RANDOM:
        logging.warning("the frozen VAE has RANDOM weights: for tests and benchmarks only")
        return jax.jit(init, out_shardings=sharding.replicated(job.mesh))(jax.random.key(0))
    if not path:
        raise ValueError(
            f"config.init.vae is empty, but the VAE is not trained (config.job={job.config['job']!r}): give its "
            f"file, such as REPA-E/e2e-vavae/e2e-vavae-400k.pt, or {RANDOM!r} for tests and benchmarks"
        )
    params = vae_files.read_vae_params(path, job.nets.vae, jax.eval_shape(init, jax.random.key(0)))
    return jax.device_put(params, sharding.replicated(job.mesh))


def load_frozen(job):
    """Frozen parameters, on the mesh by the rule of `sharding`: {'encoders': tuple, 'lpips': tree or None, 'vae': or None}."""
    frozen = {
        "vae": load_frozen_vae(job) if job.frozen_vae else None,
        "encoders": tuple(
            _encoder_params(name, encoder, job.config) for name, encoder in zip(sorted(job.config["encoders"]), job.encoders)
        ),
        "lpips": None if job.nets.lpips is None else _lpips_params(job),
    }
    return jax.device_put(frozen, sharding.tree_sharding(job.mesh, frozen))


# ---------------------------------------------------------------------------------------------------------------------
# State.
# ---------------------------------------------------------------------------------------------------------------------


def initial_vae(job, key):
    """Parameters of the VAE from scratch; a pure function of the key."""
    size = job.config["data"]["image_size"]
    return job.nets.vae.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, *job.latent_shape)))["params"]


def initial_state(job, key):
    """TrainState from scratch, latent statistics 0 and 1; a pure function of the key."""
    nets, tx, size, c = job.nets, job.tx, job.config["data"]["image_size"], job.latent_shape[-1]
    keys = dict(zip(("vae", "disc", "sit"), jax.random.split(key, 3)))
    vae = sit = disc = None
    if tx.vae is not None:
        vae = create_net(initial_vae(job, keys["vae"]), tx.vae)
    if tx.sit is not None:
        inputs = jnp.zeros((1, *job.latent_shape)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
        sit = create_net(nets.sit.init(keys["sit"], *inputs)["params"], tx.sit)
    if nets.disc is not None:
        variables = nets.disc.init(keys["disc"], jnp.zeros((1, size, size, 3)))
        disc = create_net(variables["params"], tx.disc, variables["batch_stats"])
    return create_state(
        vae=vae,
        disc=disc,
        sit=sit,
        latent_stats=ChannelStats(mean=jnp.zeros((c,)), var=jnp.ones((c,))),
    )


def abstract_state(job):
    """Shapes, dtypes and shardings of the TrainState; computes nothing."""
    shapes = jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))
    shardings = sharding.tree_sharding(job.mesh, shapes)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def create_initial_state(job, frozen, make_batches):
    """TrainState at step 0: random or from the files of config.init, created on the mesh.

    Args:
      job: Job.
      frozen: what `load_frozen` returns.
      make_batches: () -> iterator of global batches, whose first images give the latent statistics if no file does.

    Returns:
      TrainState.
    """
    abstract = abstract_state(job)
    places, opt_states, steps = _read_init(job, abstract)  # files first: a wrong one is found before anything is compiled

    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    state = jax.jit(functools.partial(initial_state, job), out_shardings=shardings)(jax.random.key(job.config["seed"]))
    if "vae.params" in places:  # VA-VAE's map from latents to tokens, which a file may lack, stays as it was drawn
        places["vae.params"] = {**state.vae.params, **places["vae.params"]}
    if "latent_stats" not in places and state.sit is not None:
        if "vae.params" in places:
            state = _fill(state, "vae.params", jax.device_put(places.pop("vae.params"), shardings.vae.params))
        vae_params = frozen["vae"] if job.frozen_vae else state.vae.params
        places["latent_stats"] = _measure_latent_stats(job, vae_params, make_batches)
    averaged = "vae.params" if state.sit is None else "sit.params"
    for place, average in ((averaged, "ema.params"), ("latent_stats", "ema.latent_stats")):
        if place in places and average not in places and state.ema is not None:
            places[average] = jax.tree.map(np.copy, places[place])  # donation refuses two leaves that share one buffer
    for place, tree in places.items():
        state = _fill(state, place, jax.device_put(tree, operator.attrgetter(place)(shardings)))
    for place, (updates, mu, nu) in opt_states.items():
        filled = optax.tree.set(operator.attrgetter(place)(state), count=np.int32(updates), mu=mu, nu=nu)
        state = _fill(state, place, jax.device_put(filled, operator.attrgetter(place)(shardings)))
    stats = state.latent_stats
    logging.info("latent statistics: mean %s, var %s", np.asarray(stats.mean), np.asarray(stats.var))
    return state.replace(step=jax.device_put(jnp.asarray(steps, jnp.int32), shardings.step))


def _fill(state, place, tree):
    """The state with `tree` at a dotted place, such as 'sit.params'."""
    first, _, rest = place.partition(".")
    return state.replace(**{first: _fill(getattr(state, first), rest, tree) if rest else tree})


def _read_init(job, abstract):
    """What the files of config.init hold: (place in the state -> tree, place -> Adam's (updates, mu, nu), steps taken)."""
    init, places, opt_states, steps = job.config["init"], {}, {}, 0
    if init.get("checkpoint"):
        places, opt_states, steps = _read_checkpoint(job, abstract)
        for name, place in (("vae", "vae.params"), ("disc", "disc.params"), ("latent_stats", "latent_stats")):
            if init.get(name) and place in places:
                raise ValueError(f"config.init.{name}={init[name]!r}, but {init['checkpoint']} holds it too: empty one of them")
    if init["vae"] and not job.frozen_vae:
        places["vae.params"] = vae_files.read_vae_params(init["vae"], job.nets.vae, abstract.vae.params)
    if init.get("disc"):
        target = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
        state_dict = weights.read_state_dict(init["disc"])
        made = mapping.to_flax(discriminator_table(job.nets.disc), state_dict, target, source=init["disc"])
        places |= {f"disc.{name}": tree for name, tree in made.items()}
    if init.get("latent_stats"):
        stats = vae_files.read_latent_stats(init["latent_stats"])
        if len(stats["mean"]) != job.latent_shape[-1]:
            raise ValueError(
                f"{init['latent_stats']} has statistics of {len(stats['mean'])} channels; the VAE has {job.latent_shape[-1]}"
            )
        places["latent_stats"] = ChannelStats(**stats)
    elif job.config["data"]["cache"] and "latent_stats" not in places:
        places["latent_stats"] = ChannelStats(**CachedLatents(job.config["data"]["cache"]).latent_stats)
    return places, opt_states, steps


def _read_checkpoint(job, abstract):
    """As `_read_init`, of a published training checkpoint."""
    source = job.config["init"]["checkpoint"]
    checkpoint = published.read(source)
    for difference in published.check_args(checkpoint.args, job.config, checkpoint.source):
        logging.warning("differs from the run that made %s: %s", checkpoint.source, difference)
    if "vae" not in checkpoint.networks and not job.config["init"]["vae"]:
        asked = checkpoint.args.get("vae_ckpt")
        hint = f" ({asked})" if asked else ""
        raise ValueError(f"{checkpoint.source} holds no VAE: set config.init.vae to the one it was trained on{hint}")
    if job.config["steps"] <= (checkpoint.steps or 0):
        raise ValueError(
            f"{checkpoint.source} has taken {checkpoint.steps} steps already, config.steps is {job.config['steps']}: raise it"
        )
    stats = {"mean": abstract.latent_stats.mean, "var": abstract.latent_stats.var}
    targets = {"model": {"params": abstract.sit.params, "latent_stats": stats}}
    targets["ema"] = targets["model"]
    if abstract.vae is not None:
        targets["vae"] = {"params": abstract.vae.params}
    if abstract.disc is not None:
        targets["discriminator"] = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
    networks = Networks(sit=job.nets.sit, vae=None if job.frozen_vae else job.nets.vae, disc=job.nets.disc)
    trees, moments = to_trees(checkpoint, networks, targets)
    if layout_of(checkpoint.networks["model"]) != "repae" and not job.config["init"]["latent_stats"]:
        raise ValueError(
            f"{checkpoint.source} has no latent batch norm, as REPA and DiT have none: set config.init.latent_stats to the "
            "statistics its latents were normalised with, such as diffusers' folder of its VAE (for 0.18215, "
            "stabilityai/sd-vae-ft-ema)"
        )
    places = {PLACES[name][leaf]: tree for name, made in trees.items() for leaf, tree in made.items()}
    for place in ("latent_stats", "ema.latent_stats"):
        if place in places:
            places[place] = ChannelStats(**places[place])
    opt_states = {OPT_STATES[name]: adam for name, adam in moments.items()}
    logging.info("%s: %s after %s steps", checkpoint.source, sorted([*places, *opt_states]), checkpoint.steps)
    return places, opt_states, checkpoint.steps or 0


def _measure_latent_stats(job, vae_params, make_batches):
    """Statistics of the VAE's sampled latents over the first config.init.stats_images images."""

    @jax.jit
    def moments(params, images, key):
        posterior = job.nets.vae.apply({"params": params}, to_float(images), method="encode")
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return latents.mean((0, 1, 2)), jnp.square(latents).mean((0, 1, 2))

    count = -(-job.config["init"]["stats_images"] // job.config["data"]["batch_size"])
    keys = jax.random.split(jax.random.key(job.config["seed"]), count)
    sums = [jax.device_get(moments(vae_params, batch["image"], key)) for batch, key in zip(make_batches(), keys)]
    mean, square = (np.mean(np.asarray(column, np.float64), axis=0) for column in zip(*sums))
    return ChannelStats(mean=mean.astype(np.float32), var=(square - mean**2).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------------------------------


def make_images(config):
    """The images of config.data, their labels checked against num_classes."""
    section = plain_config(config)["data"]
    source = data.make_source(section["source"], section["image_size"], **section["options"])
    data.check_labels(source, section["num_classes"])
    return source


def make_cached_source(job, frozen_vae):
    """Latents from config.data.cache, with their images if there are encoders to show them to.

    Args:
      job: Job.
      frozen_vae: fingerprint of the frozen VAE, whose cache it must be.
    """
    section = job.config["data"]
    cache = CachedLatents(section["cache"])
    check_cache(cache, frozen_vae, job.latent_shape, section["image_size"])
    if bool(section["flip_probability"]) != cache.flips:
        raise ValueError(
            f"config.data.flip_probability={section['flip_probability']}, but {section['cache']} was made "
            f"{'with' if cache.flips else 'without'} mirrored images: change the probability, or make a cache "
            f"{'without' if cache.flips else 'with'} --flips"
        )
    data.check_labels(cache, section["num_classes"])
    return WithMoments(make_images(job.config), cache) if job.encoders else cache


def make_loader(job, source, workers=None):
    """Loader of this process's share of every batch, with config.data.workers processes unless told otherwise."""
    section = job.config["data"]
    return Loader(
        source,
        batch_size=section["batch_size"],
        seed=job.config["seed"],
        workers=section["workers"] if workers is None else workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=section["max_bad_fraction"],
    )
