"""Rules across the sections of a config; each section's own ranges are in its dataclass, see `sections.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
from absl import logging

from repae_jax import tokenizer_step
from repae_jax.diffusion import ddpm
from repae_jax.diffusion.mean_flow import MeanFlow
from repae_jax.diffusion.samplers import check_channels, check_sampler, check_weaker
from repae_jax.losses import regularizers
from repae_jax.models import rae
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.encoders import check_grid
from repae_jax.models.vae_families import RAE, VTP
from repae_jax.ranges import as_extent, height_width
from repae_jax.training.muon import is_matrix
from repae_jax.training.state import trained_parts

CUDNN_HEAD = 128  # most channels of a head
# of the families in which a posterior is one point: parts that stay as they are, and terms that the others learn from
FROZEN = {RAE: rae.FROZEN, VTP: ()}
TERMS = {RAE: (*tokenizer_step.PIXEL_TERMS, "gan"), VTP: (*tokenizer_step.PIXEL_TERMS, "gan", "align", "diffusion", "se")}


def latent_shape(config, vae) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents; raises ValueError unless the VAE divides the images and SiT's patches the latents."""
    size, patch = config["data"]["image_size"], config.get("sit", {"patch_size": 1})["patch_size"]
    sides = height_width(size)
    if any(side % vae.factor for side in sides):
        multiples = as_extent([side // vae.factor * vae.factor or vae.factor for side in sides])
        origin = "config.vae.patch_size"
        if isinstance(vae, AutoencoderKL):
            origin = f"config.vae.channel_multipliers has {len(vae.channel_multipliers)} levels"
        raise ValueError(
            f"config.data.image_size={size} is not a multiple of the VAE's factor {vae.factor} ({origin}): use {multiples}"
        )
    height, width = (side // vae.factor for side in sides)
    if height % patch or width % patch:
        raise ValueError(
            f"config.sit.patch_size={patch} does not divide the latents' {height} x {width} positions, of "
            f"config.data.image_size={size} and the VAE's factor {vae.factor}"
        )
    return height, width, vae.latent_channels


def check_job(job, state_shapes) -> None:
    """Raises ValueError for sections that contradict each other; warns of ablations.

    `state_shapes()` returns shapes of the TrainState; the networks check their own fields then, when they are set up.
    """
    _check_attention(job)
    _check_cache(job)
    _check_family(job)
    _check_scales(job)
    _check_squares(job)
    _check_start(job)
    if job.nets.sit is not None:
        for encoder in job.encoders:
            check_grid(encoder, [side // job.nets.sit.patch_size for side in job.latent_shape[:2]])
        _check_sigma(job)
        _check_self(job)
        check_sampler(job.sampling, job.recipe.objective)
        check_channels(job.sampling, job.latent_shape[-1])
        check_weaker(job.sampling, job.nets.sit.internal_head, has_network=False)
    _check_vf(job)
    _check_discriminator(job)
    shapes = state_shapes()
    _check_fixed(job, shapes)
    _check_muon(job, shapes)
    _check_averages(job, shapes)
    if job.config["job"] == "repae":
        _warn_of_ablations(job.recipe)


def _check_attention(job):
    """Raises ValueError for cuDNN's attention where there is none, or where it has no derivative."""
    if job.config["attention"] != "cudnn":
        return
    if isinstance(job.recipe.objective, MeanFlow):
        raise ValueError(
            "config.attention='cudnn' has no derivative forward, which config.diffusion.mean_flow takes: set it to 'xla'"
        )
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


def _check_family(job):
    """Raises ValueError where a VAE without randomness is trained by a term that it cannot learn from, or a frozen part is."""
    config, loss, name = job.config, job.config["loss"], job.config["vae"].get("family")
    if job.tx.vae is None or name is None:
        return
    family, fixed, terms = f"config.vae.family={name!r}", config["optim"]["vae"]["fixed"], TERMS[name]
    if missing := set(FROZEN[name]) - set(fixed):
        raise ValueError(
            f"{family} has an encoder that no training changes, but config.optim.vae.fixed={fixed} lacks "
            f"{', '.join(sorted(missing))}: set it to {FROZEN[name]}, or take config.job='ldm', which trains no VAE"
        )
    others = {f"vae.{term}": weight for term, weight in job.recipe.vae_weights.items() if term not in terms}
    others |= {f"adaptive.{term}": limit for term, limit in loss.get("adaptive", {}).items() if limit}
    if loss.get("eq_scales") and "se" not in terms:
        others["eq_scales"] = loss["eq_scales"]
    if others:
        term, value = next(iter(others.items()))
        learns = f"is not for {family}, which learns from {', '.join(terms)} with fixed weights"
        raise ValueError(f"config.loss.{term}={value} {learns}: set it to {() if term == 'eq_scales' else 0}")


def _check_scales(job):
    """Raises ValueError unless images and latents can be resized to the scales of 'se' and EQ."""
    scales = [("se_factors", 1 / factor) for factor in getattr(job.recipe, "se_factors", ())]
    scales += [("eq_scales", scale) for scale in getattr(job.recipe, "eq_scales", ())]
    grids = height_width(job.config["data"]["image_size"]), job.latent_shape[:2]
    for (name, scale), (height, width) in itertools.product(scales, grids):
        grid = jax.ShapeDtypeStruct((1, height, width, 1), jnp.float32)
        try:
            jax.eval_shape(functools.partial(regularizers.downscale, scale=scale), grid)
        except ValueError as error:
            raise ValueError(f"config.loss.{name} of {height} x {width} positions: {error}") from error


def _check_squares(job):
    """Raises ValueError if the images are no squares, but something is for squares alone."""
    size, start = job.config["data"]["image_size"], job.config["init"].get("checkpoint")
    if isinstance(size, int):
        return
    if scales := getattr(job.recipe, "eq_scales", ()):
        raise ValueError(
            f"config.loss.eq_scales={scales} also turns images by a quarter, which only squares allow, but "
            f"config.data.image_size={size}: change one of them; config.loss.vae.se changes the size alone"
        )
    if start:
        raise ValueError(
            f"config.init.checkpoint={start!r} has a table of positions for squares, but config.data.image_size={size}: start "
            "from config.init.vae alone, or train on squares"
        )


def _check_start(job):
    """Raises ValueError for a published checkpoint as the start of a network of which the published code has none."""
    start, diffusion = job.config["init"].get("checkpoint"), job.config.get("diffusion", {})
    fields = {
        "diffusion.mean_flow": "mean_flow" in diffusion, "diffusion.predicts='data'": "predicts" in diffusion,
        "loss.sit.internal": "internal" in job.recipe.sit_weights,
    }  # fmt: skip
    if start and (found := [name for name, is_there in fields.items() if is_there]):
        raise ValueError(
            f"config.init.checkpoint={start!r} continues a SiT or DiT of the published code, which has none with "
            f"config.{found[0]}: leave one of them out; config.init.vae alone starts a new SiT"
        )


def _check_sigma(job):
    """Raises ValueError unless the network learns a variance exactly where the objective trains one."""
    learned = job.nets.sit.learned_sigma
    if isinstance(job.recipe.objective, ddpm.NoiseObjective) != learned:
        raise ValueError(
            f"config.sit.learned_sigma={learned} and config.diffusion.path={job.config['diffusion']['path']!r}: 'ddpm' "
            "needs learned_sigma=True, the variance its bound trains; the others False"
        )


def _check_self(job):
    """Raises ValueError unless the averaged SiT has the block to align with."""
    sit, depth = job.nets.sit, job.recipe.self_depth
    if depth and not sit.encoder_depth < depth <= sit.depth:
        raise ValueError(
            f"config.loss.self_depth={depth} must be above config.sit.encoder_depth={sit.encoder_depth}, the tap, and at most "
            f"config.sit.depth={sit.depth}: change one of them"
        )


def _check_vf(job):
    """Raises ValueError unless VF's encoder has a token for each latent position."""
    height, width = job.latent_shape[:2]
    if job.nets.vae.feature_dim is not None and height_width(job.encoders[0].grid) != (height, width):
        (rows, columns), patch = height_width(job.encoders[0].grid), job.encoders[0].module.patch_size
        raise ValueError(
            f"config.loss.vae.vf compares each of the {height} x {width} latent positions with a token, but "
            f"config.encoders.{min(job.config['encoders'])} gives {rows} x {columns}: set its image_size to "
            f"{as_extent((height * patch, width * patch))}"
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
    if disc is not None and round(min(height_width(size)) * min(scales, default=1)) < disc.min_image_size:
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


def _check_muon(job, shapes):
    """Raises ValueError where Muon would have no matrix to update, as in a convolutional VAE or a discriminator."""
    for name, optim in job.config["optim"].items():
        if optim.get("method") != "muon":
            continue
        net, where = getattr(shapes, name), f"config.optim.{name}.method='muon'"
        if net is None or not any(jax.tree.leaves(is_matrix(net.params))):
            raise ValueError(
                f"{where} is for the matrices of a transformer's blocks, and config.{name} has none: convolutions and all "
                "else are AdamW's; set it to 'adamw'"
            )
        if not any(jax.tree.leaves(is_matrix(trained_parts(net.params, optim["fixed"])))):
            raise ValueError(
                f"{where} has no matrix to update, because config.optim.{name}.fixed={tuple(optim['fixed'])} keeps all blocks "
                "as they are: change one of them"
            )


def _check_averages(job, shapes):
    """Raises ValueError for averages of nothing."""
    config = job.config
    for name in ("ema_decays", "ema_sigmas"):
        if config.get(name) and shapes.ema is None:
            raise ValueError(
                f"config.{name}={config[name]} are averages of a SiT or a VAE, but all of config.loss.vae is 0, so that "
                "neither is trained: empty it"
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
