"""Rules across the sections of a config; each section's own ranges are in its dataclass, see `sections.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
from absl import logging

from repae_jax import tokenizer_step
from repae_jax.diffusion import ddpm
from repae_jax.diffusion.samplers import check_sampler
from repae_jax.losses import regularizers
from repae_jax.models.encoders import check_grid

CUDNN_HEAD = 128  # most channels of a head


def latent_shape(config, vae) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents; raises ValueError unless the VAE divides the images and SiT's patches the latents."""
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


def check_job(job, state_shapes) -> None:
    """Raises ValueError for sections that contradict each other; warns of ablations.

    `state_shapes()` returns shapes of the TrainState; the networks check their own fields then, when they are set up.
    """
    _check_attention(job)
    _check_cache(job)
    _check_scales(job)
    if job.nets.sit is not None:
        for encoder in job.encoders:
            check_grid(encoder, job.latent_shape[0] // job.nets.sit.patch_size)
        _check_sigma(job)
        check_sampler(job.sampling, job.recipe.objective)
    _check_vf(job)
    _check_discriminator(job)
    _check_fixed(job, state_shapes())
    if job.config["job"] == "repae":
        _warn_of_ablations(job.recipe)


def _check_attention(job):
    """Raises ValueError for cuDNN's attention where there is none."""
    if job.config["attention"] != "cudnn":
        return
    platform, precision = job.mesh.devices.flat[0].platform, job.config["precision"]["compute"]
    if platform != "gpu" or precision != "bfloat16":
        raise ValueError(
            f"config.attention='cudnn' is for NVIDIA GPUs in bfloat16, not for {platform} in {precision}: set it to 'xla'"
        )
    networks = [encoder.module for encoder in job.encoders] + ([] if job.nets.sit is None else [job.nets.sit])
    widths = {module.hidden_size // module.num_heads for module in networks}
    if wrong := [width for width in sorted(widths) if width % 8 or width > CUDNN_HEAD]:
        allowed = f"multiples of 8 up to {CUDNN_HEAD}"
        raise ValueError(f"config.attention='cudnn': heads of {wrong[0]} channels; it takes {allowed}: set it to 'xla'")


def _check_cache(job):
    if job.config["data"]["cache"] and "vae" in job.config["optim"]:
        raise ValueError(
            f"config.data.cache={job.config['data']['cache']!r} holds latents of a frozen VAE, but "
            f"config.job={job.config['job']!r} trains the VAE: empty it, or take configs/ldm.py"
        )


def _check_scales(job):
    """Raises ValueError unless images and latents can be resized to the scales of 'se' and EQ."""
    scales = [("se_factors", 1 / factor) for factor in getattr(job.recipe, "se_factors", ())]
    scales += [("eq_scales", scale) for scale in getattr(job.recipe, "eq_scales", ())]
    for (name, scale), side in itertools.product(scales, (job.config["data"]["image_size"], job.latent_shape[0])):
        square = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        try:
            jax.eval_shape(functools.partial(regularizers.downscale, scale=scale), square)
        except ValueError as error:
            raise ValueError(f"config.loss.{name} of {side} x {side} positions: {error}") from error


def _check_sigma(job):
    """Raises ValueError unless the network learns a variance exactly where the objective trains one."""
    learned = job.nets.sit.learned_sigma
    if isinstance(job.recipe.objective, ddpm.NoiseObjective) != learned:
        raise ValueError(
            f"config.sit.learned_sigma={learned} and config.diffusion.path={job.config['diffusion']['path']!r}: 'ddpm' "
            "needs learned_sigma=True, the variance its bound trains; the others False"
        )


def _check_vf(job):
    """Raises ValueError unless VF's encoder has a token for each latent position."""
    side = job.latent_shape[0]
    if job.nets.vae.feature_dim is not None and job.encoders[0].grid != side:
        grid, patch = job.encoders[0].grid, job.encoders[0].module.patch_size
        raise ValueError(
            f"config.loss.vae.vf compares each of the {side} x {side} latent positions with a token, but "
            f"config.encoders.{min(job.config['encoders'])} gives {grid} x {grid}: set its image_size to {side * patch}"
        )


def _check_discriminator(job):
    """Raises ValueError for settings of a discriminator that is not trained, or one with too many layers for the images."""
    config, disc, scales = job.config, job.nets.disc, getattr(job.recipe, "eq_scales", ())
    if disc is None and "disc" in config:
        for name, value in (("loss.lecam", config["loss"]["lecam"]), ("init.disc", config["init"]["disc"])):
            if value:
                given = f"config.{name}={value!r}"
                raise ValueError(f"{given} needs a discriminator, but config.loss.vae.gan is 0: change one of them")
    size = config["data"]["image_size"]
    if disc is not None and round(size * min(scales, default=1)) < disc.min_image_size:
        raise ValueError(
            f"config.disc.num_layers={disc.num_layers} leaves no logit of config.data.image_size={size} pixels"
            f"{f' at the scale {min(scales)}' if scales else ''}; lower num_layers, or use {disc.min_image_size} pixels or more"
        )


def _check_fixed(job, shapes):
    """Raises ValueError unless fixed parts exist, some part is trained, and adaptive weights find the gradients they need."""
    for name, optim in job.config["optim"].items():
        net, fixed = getattr(shapes, name), set(optim["fixed"])
        if net is not None and not fixed < set(net.params):
            allowed = sorted(net.params)
            raise ValueError(f"config.optim.{name}.fixed={sorted(fixed)}; allowed: some, not all, of {allowed}")
    limits = getattr(job.recipe, "adaptive", {})
    for term, part in (("gan", "decoder"), ("vf", "encoder")):
        if term in limits and part in job.config["optim"]["vae"]["fixed"]:
            raise ValueError(
                f"config.loss.adaptive.{term}={limits[term]} compares gradients in the {part}, which "
                "config.optim.vae.fixed keeps as it is: change one of them"
            )


def _warn_of_ablations(recipe):
    """Warns where joint training is one of the paper's ablations that lose or collapse."""
    weights, lines = recipe.vae_weights, []
    if "diffusion" in weights:
        lines.append(
            "config.loss.vae.diffusion lets the diffusion loss reach the VAE: in the paper the latent space collapsed (spatial "
            "variance 17.06 to 0.02; gFID 444 instead of 16.3 at 100k steps)"
        )
    if not set(weights) & set(tokenizer_step.PIXEL_TERMS):
        lines.append("config.loss.vae has no reconstruction term: nothing holds the latents to the images")
    elif "gan" not in weights:
        lines.append("config.loss.vae.gan=0: in the paper gFID was 19.2 instead of 16.3 at 100k steps")
    if not recipe.norm_momentum:
        lines.append("config.diffusion.norm_momentum=0, no latent batch norm: in the paper gFID was 18.1 instead of 16.3")
    for line in lines:
        logging.warning("ABLATION: %s", line)
