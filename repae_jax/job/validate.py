"""What a config may say: fields of every job, ranges, contradictions; the recipe and the optimizers that it describes.

Only names and numbers are read here, no file; nothing is compiled. `build` does the rest.
"""

import dataclasses
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from absl import logging

from repae_jax import tokenizer_step, train_step
from repae_jax.diffusion import ddpm
from repae_jax.losses import regularizers
from repae_jax.ranges import PATH, SEED, OrNone, Several, check, real, whole

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
_GAN_LOSS = {"vae", "gan_start", "gan_factor", "lecam"}
_TOKENIZER_LOSS = _GAN_LOSS | {"pixel_reduction", "adaptive", "vf_margins", "se_factors", "eq_scales", "eq_prior"}
_SIT_LOSS = {"sit", "align_shape", "align_end"}
_SHARED = {
    "job", "seed", "steps", "accumulation", "ema_decay", "max_skipped_in_a_row", "data", "vae", "encoders", "loss", "optim",
    "init", "precision", "mesh", "compiler_options", "checkpoint", "log", "hooks",
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
        _GAN_LOSS | _SIT_LOSS, {"checkpoint", "vae", "latent_stats", "disc", "stats_images"},
    ),
    "ldm": Kind(
        train_step.ldm_step, ("sit",), _SHARED | {"sit", "diffusion", "sampling"}, _SIT_LOSS,
        {"checkpoint", "vae", "latent_stats", "stats_images"},
    ),
    "vae": Kind(
        tokenizer_step.vae_step, ("vae", "disc"), _SHARED | {"disc", "lpips"}, _TOKENIZER_LOSS, {"vae", "disc"},
    ),
}  # fmt: skip
# options that no callable of ours takes whole; those of loss, optim and init depend on the job
FIELDS = {
    "data": {
        "source", "options", "image_size", "num_classes", "batch_size", "workers", "max_bad_fraction", "cache",
        "flip_probability",
    },
    "lpips": {"vgg16", "linear", "input_range"},
    "diffusion": {"path", "time_distribution", "label_dropout"},
    "mesh": {"fsdp", "slices"},
    "checkpoint": {"every", "keep_last", "keep_every"},
    "log": {"every"},
}  # fmt: skip
FID_HOOK = ("fid_every", "fid_samples", "fid_reference", "fid_inception")
_SIZE = whole(1, 2**20)  # of one axis of an array
_SHARE = real(0, 1)
# what each field may be alone; * is any name. Of sampling, an encoder's architecture and the sources the constructors say it
RULES = {
    "job": str, "seed": SEED, "steps": whole(1), "accumulation": whole(1), "ema_decay": real(0, below=1),
    "max_skipped_in_a_row": whole(1), "compiler_options": str,
    "data.source": str, "data.image_size": _SIZE, "data.num_classes": _SIZE, "data.batch_size": whole(1),
    "data.workers": whole(0, 4096), "data.max_bad_fraction": _SHARE, "data.cache": PATH,
    "data.flip_probability": _SHARE, "data.options.labelled": OrNone(bool),
    **{f"data.options.{name}": OrNone(str) for name in ("split", "dataset", "image_column", "label_column")},
    **{f"data.options.{name}": OrNone(PATH) for name in ("path", "labels_file", "data_dir")},
    "vae.latent_channels": _SIZE, "vae.channels": _SIZE, "vae.channel_multipliers": Several(_SIZE, least=1),
    "vae.num_res_blocks": whole(1, 1000), "vae.attention_levels": Several(whole(0)), "vae.norm_groups": _SIZE,
    "vae.quant_convs": bool, "vae.remat": bool,
    "sit.patch_size": _SIZE, "sit.hidden_size": _SIZE, "sit.depth": whole(1, 1000), "sit.num_heads": _SIZE,
    "sit.encoder_depth": whole(1, 1000), "sit.projector": str, "sit.projector_dim": _SIZE,
    "sit.mlp_ratio": real(above=0, most=1000), "sit.qk_norm": bool, "sit.learned_sigma": bool,
    "sit.learned_positions": bool, "sit.remat": str, "sit.unroll": whole(1, 1000),
    "disc.channels": _SIZE, "disc.num_layers": whole(1, 16),
    "encoders.*.weights": str, "encoders.*.image_size": OrNone(_SIZE), "encoders.*.spatial_gamma": OrNone(_SHARE),
    "lpips.vgg16": str, "lpips.linear": str, "lpips.input_range": Several(real(), count=2),
    "loss.vae.*": real(0), "loss.sit.*": real(0), "loss.pixel_reduction": str, "loss.adaptive.*": real(0),
    "loss.gan_start": whole(0), "loss.gan_factor": real(above=0), "loss.lecam": real(0),
    "loss.vf_margins": Several(real(0, below=2), count=2), "loss.se_factors": Several(whole(2)),
    "loss.eq_scales": Several(real(above=0, most=1)), "loss.eq_prior": _SHARE, "loss.align_shape": str,
    "loss.align_end": OrNone(whole(1)),
    "diffusion.path": str, "diffusion.time_distribution": str, "diffusion.label_dropout": real(0, below=1),
    "diffusion.norm_momentum": _SHARE,
    "optim.*.learning_rate": real(0), "optim.*.warmup_steps": whole(0), "optim.*.schedule": str,
    "optim.*.decay_steps": OrNone(whole(1)), "optim.*.final_learning_rate": real(0), "optim.*.b1": real(0, below=1),
    "optim.*.b2": real(0, below=1), "optim.*.eps": real(above=0), "optim.*.weight_decay": real(0),
    "optim.*.clip_norm": real(above=0), "optim.*.fixed": Several(str),
    "init.stats_images": whole(1), **{f"init.{name}": PATH for name in ("checkpoint", "vae", "latent_stats", "disc")},
    "precision.compute": str, "precision.lpips": str,
    "mesh.fsdp": whole(1), "mesh.slices": whole(1),
    "checkpoint.every": whole(1), "checkpoint.keep_last": whole(1), "checkpoint.keep_every": OrNone(whole(1)),
    "log.every": whole(1),
    "hooks.samples_every": whole(0), "hooks.reconstructions_every": whole(0), "hooks.images": _SIZE,
    "hooks.fid_every": whole(0), "hooks.fid_samples": whole(2), "hooks.fid_reference": PATH,
    "hooks.fid_inception": PATH,
}  # fmt: skip
_SECTIONS = {name.rsplit(".", depth)[0] for name in RULES for depth in range(1, name.count(".") + 1)} | {"sampling"}
LR_SCHEDULES = ("constant", "linear", "cosine")


def _check_section(where, value):
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} must be a section with fields of its own")


def check_names(where, given, allowed):
    """ValueError that names every field of `given` that is not allowed, and every allowed one it lacks."""
    _check_section(where, given)
    unknown, missing = sorted(set(given) - set(allowed)), sorted(set(allowed) - set(given))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; it has {sorted(allowed)}")


def construct(where, function, section, **extra):
    """function(**section, **extra), with a readable error for a field it does not take or that it needs."""
    _check_section(where, section)
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


def checked(config):
    """Returns the config with the user's folder for the ~ of its paths; ValueError for a value that RULES do not allow.

    Args:
      config: nested dict of plain values; names may be unknown or missing.
    """
    return _checked(config, ())


def _checked(value, names):
    where, rule = ".".join(("config", *names)), _rule_of(names)
    if rule is not None:
        check(where, rule, value)
        return os.path.expanduser(value) if PATH in (rule, getattr(rule, "rule", None)) and value else value
    if isinstance(value, Mapping):
        return {name: _checked(inner, (*names, str(name))) for name, inner in value.items()}
    if ".".join(names) in _SECTIONS:
        _check_section(where, value)
    entries = value if isinstance(value, tuple | list) else [value]
    if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
        raise ValueError(f"{where}={value!r} must be finite")
    return value


def _rule_of(names):
    """Returns the rule of a field, None if it has none; its own name comes before that with a *."""
    starred = (".".join((*names[:i], "*", *names[i + 1 :])) for i in range(len(names)))
    return next((RULES[name] for name in (".".join(names), *starred) if name in RULES), None)


def check_fields(config):
    """Returns the config's Kind; ValueError for unknown or missing fields, or if scores are wanted without their files."""
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
        fields["hooks"] |= {"samples_every", *FID_HOOK}
    for section in sorted(set(fields) & kind.sections):
        check_names(f"config.{section}", config[section], fields[section])
    for name, section in config["optim"].items():
        check_names(f"config.optim.{name}", section, inspect.signature(optimizer).parameters)
    compiler_options(config)
    if config["hooks"].get("fid_every"):
        for name in ("fid_reference", "fid_inception"):
            if not config["hooks"][name]:
                raise ValueError(
                    f"config.hooks.fid_every={config['hooks']['fid_every']}, but config.hooks.{name} is empty: give its file, "
                    "or set fid_every=0"
                )
    if config["data"]["cache"] and "vae" in kind.trains:
        raise ValueError(
            f"config.data.cache={config['data']['cache']!r} holds latents of a frozen VAE, but config.job={config['job']!r} "
            "trains the VAE: empty it, or take configs/ldm.py"
        )
    return kind


def latent_shape(config, vae):
    """(h, w, C) of the latents; ValueError unless the VAE divides the images and SiT's patches the latents."""
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


def check_scales(config, recipe, latent_shape):
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


def check_sigma(config, sit, objective):
    """ValueError unless the network has a variance to learn exactly where the objective trains one."""
    is_ddpm = isinstance(objective, ddpm.NoiseObjective)
    if is_ddpm != sit.learned_sigma:
        raise ValueError(
            f"config.sit.learned_sigma={sit.learned_sigma} and config.diffusion.path={config['diffusion']['path']!r}: 'ddpm' "
            "needs learned_sigma=True, the variance its bound trains; the others False"
        )


def compiler_options(config):
    """config.compiler_options as name -> value, which may be empty or have commas; ValueError for what is not name=value."""
    options = {}
    for part in filter(None, re.split(r",(?=[^,]*=)", config["compiler_options"])):
        name, equals, value = (word.strip(" ,") for word in part.partition("="))
        if not (name and equals) or name in options:
            raise ValueError(
                f"config.compiler_options={config['compiler_options']!r}: {part!r} is not understood, or twice there; "
                "expected name=value,name=value, e.g. 'xla_tpu_scoped_vmem_limit_kib=32768'"
            )
        options[name] = value
    return options


def compute_dtype(name, config):
    """The dtype that config.precision gives for `name`."""
    value = config["precision"][name]
    if value not in DTYPES:
        raise ValueError(f"config.precision.{name}={value!r} is unknown; allowed: {list(DTYPES)}")
    return DTYPES[value]


def optimizer(
    learning_rate, warmup_steps, schedule, decay_steps, final_learning_rate, b1, b2, eps, weight_decay, clip_norm, fixed
):
    """AdamW behind clipping by the network's global gradient norm.

    The rate rises linearly over `warmup_steps`; from there it stays ('constant'), or falls on a line or a cosine to
    `final_learning_rate`, which it reaches at step `decay_steps`. Parameters below the top-level names in `fixed` stay as they
    are, as they have no gradients: they do not decay.
    """
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


def warn_of_ablations(job_name, recipe):
    """Says so, loudly, where a recipe is one of the paper's ablations that lose or collapse."""
    weights = recipe.vae_weights
    if job_name != "repae":
        return
    found = []
    if "diffusion" in weights:
        found.append(
            "config.loss.vae.diffusion lets the diffusion loss reach the VAE: in the paper the latent space collapsed (spatial "
            "variance 17.06 to 0.02; gFID 444 instead of 16.3 at 100k steps)"
        )
    if not set(weights) & set(tokenizer_step.PIXEL_TERMS):
        found.append("config.loss.vae has no reconstruction term: nothing holds the latents to the images")
    elif "gan" not in weights:
        found.append("config.loss.vae.gan=0: in the paper gFID was 19.2 instead of 16.3 at 100k steps")
    if not recipe.norm_momentum:
        found.append("config.diffusion.norm_momentum=0, no latent batch norm: in the paper gFID was 18.1 instead of 16.3")
    for line in found:
        logging.warning("ABLATION: %s", line)
