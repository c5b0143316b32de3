"""The three losses, of VAE, discriminator and SiT. Each is a function of one network's parameters; the rest is an argument."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repae_jax.diffusion import latent_norm
from repae_jax.distributed.sharding import unsharded
from repae_jax.losses import adversarial, reconstruction
from repae_jax.losses.alignment import alignment_loss
from repae_jax.losses.regularizers import scale_equivariance_loss, vf_loss
from repae_jax.models.channel_stats import batch_stats

PIXEL_TERMS = ("l1", "l2", "lpips")  # of the VAE's loss; what adaptive weights compare with
ADAPTIVE = ("gan", "vf")  # terms whose weight can be adapted: at the last layer of the decoder, and of the encoder


def weighted_sum(weights, terms):
    """Sum of weight x term over the named terms."""
    return sum(weight * terms[name] for name, weight in weights.items())


def weights_at(step, weights, recipe):
    """The weights of a step: the adversarial loss begins at its step, the alignment's follows its schedule."""
    factors = {"gan": adversarial.gan_factor(step, recipe.gan_start, recipe.gan_factor)}
    if recipe.align_factor is not None:
        factors["align"] = recipe.align_factor(step)
    return {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}


def vae_loss(params, images, posterior_noise, disc, regularizers, weights, *, frozen, nets, recipe, deform=lambda x: x):
    """Loss of the VAE and its gradient.

    The chain rule is written out at the two places where terms meet, the reconstruction and the latents: there the weight of a
    term can be adapted to the others' gradients for the price of one layer, out of the backward pass that is taken anyway.

    Args:
      params: VAE parameters.
      images: float32 [B, H, W, 3] in [-1, 1].
      posterior_noise: [B, h, w, C].
      disc: the discriminator's Net, frozen here, or None.
      regularizers: name -> function of (params, sampled latents [B, h, w, C]), a scalar. REPA-E's own contribution is one.
      weights: name -> weight; says which terms exist.
      frozen: {'lpips': parameters, …}.
      nets: Nets.
      recipe: Recipe; its `adaptive` says which weights are adapted.
      deform: EQ-VAE's transform, of the latents before the decoder and of the images that it shall give.

    Returns:
      loss: float32 scalar, the sum of weight x term; pixel terms are summed or averaged as recipe.pixel_reduction says.
      grads: tree like params.
      aux: VaeAux.
    """

    def encode(params):
        posterior = nets.vae.apply({"params": unsharded(params)}, images, method="encode")
        return posterior.sample(posterior_noise), reconstruction.kl(posterior)

    def decode(params, latents):
        return nets.vae.apply({"params": unsharded(params)}, deform(latents), method="decode")

    (latents, kl), encode_back = jax.vjp(encode, params)
    recon, decode_back = jax.vjp(decode, params, latents)
    target, terms, stats = deform(images), {}, None
    weights = {**weights, **pixel_weights(weights, target, recipe)}

    # 1. At the reconstruction: pixels and the adversarial term.
    def pixel_loss(recon):
        terms = pixel_terms(weights, target, recon, frozen, nets=nets, recipe=recipe)
        return jnp.float32(weighted_sum({name: weights[name] for name in terms}, terms)), terms

    (_, terms), pixels_to_recon = jax.value_and_grad(pixel_loss, has_aux=True)(recon)
    to_recon = pixels_to_recon
    if "gan" in weights:

        def generator_loss(recon):
            logits, stats = discriminate(nets.disc, disc.params, disc.batch_stats, recon)
            return adversarial.generator_loss(logits), stats

        (terms["gan"], stats), gan_to_recon = jax.value_and_grad(generator_loss, has_aux=True)(recon)
        if "gan" in recipe.adaptive:
            both = (decode_back(cotangent)[0]["decoder"]["conv_out"]["kernel"] for cotangent in (pixels_to_recon, gan_to_recon))
            weights["gan"] *= adversarial.adaptive_weight(*both, high=recipe.adaptive["gan"])
        to_recon = to_recon + weights["gan"] * gan_to_recon
    grads, to_latents = decode_back(to_recon)

    # 2. At the latents: the regularisers, some of which have parameters in the VAE's tree.
    no_kl = jnp.zeros_like(kl)
    for name, regularizer in regularizers.items():
        if name not in weights:
            continue
        terms[name], (to_params, term_to_latents) = jax.value_and_grad(regularizer, argnums=(0, 1))(params, latents)
        if name in recipe.adaptive:
            cotangents = decode_back(pixels_to_recon)[1], term_to_latents
            both = (encode_back((cotangent, no_kl))[0]["encoder"]["conv_out"]["kernel"] for cotangent in cotangents)
            weights[name] *= adversarial.adaptive_weight(*both, high=recipe.adaptive[name])
        grads = jax.tree.map(lambda total, x, weight=weights[name]: total + weight * x, grads, to_params)
        to_latents = to_latents + weights[name] * term_to_latents

    # 3. Through the encoder.
    if "kl" in weights:
        terms["kl"] = kl
    (to_params,) = encode_back((to_latents, jnp.float32(weights.get("kl", 0.0))))
    grads = jax.tree.map(jnp.add, grads, to_params)
    return weighted_sum(weights, terms), grads, VaeAux(terms, weights, latents, target, recon, stats)


class VaeAux(NamedTuple):
    """What the VAE's loss computes on its way.

    Attributes:
      terms: name -> unweighted scalar.
      weights: name -> weight, adapted; those of pixel terms times the number of pixels if they are summed.
      latents: [B, h, w, C], sampled, un-normalised.
      images: [B, H, W, 3], deformed.
      recon: the same shape.
      batch_stats: the discriminator's running statistics after it saw the reconstruction; None without an adversarial term.
    """

    terms: Mapping[str, jax.Array]
    weights: Mapping[str, jax.Array]
    latents: jax.Array
    images: jax.Array
    recon: jax.Array
    batch_stats: Any


def pixel_weights(weights, images, recipe):
    """The weights of the pixel terms, all of which are means, for sums over the pixels if the recipe says so."""
    factor = math.prod(images.shape[1:]) if recipe.pixel_reduction == "sum" else 1
    return {name: factor * weights[name] for name in PIXEL_TERMS if name in weights}


def pixel_terms(weights, images, recon, frozen, *, nets, recipe):
    """Those of L1, L2 and LPIPS that have a weight: name -> scalar; arguments as in `vae_loss`."""

    def lpips_fn(a, b):
        return nets.lpips.apply({"params": unsharded(frozen["lpips"])}, a, b)

    terms = {}
    if "l1" in weights:
        terms["l1"] = reconstruction.l1(images, recon)
    if "l2" in weights:
        terms["l2"] = reconstruction.l2(images, recon)
    if "lpips" in weights:
        terms["lpips"] = reconstruction.perceptual(lpips_fn, images, recon, recipe.lpips_input_range)
    return terms


def vae_regularizers(state, batch, frozen, *, nets, recipe):
    """What the VAE's latents are held to, besides pixels: name -> function of (VAE parameters, sampled latents), a scalar.

    Args:
      state: TrainState; its SiT is frozen here.
      batch: {'images', 'labels', 'targets', 'draws'}, as `vae_phase` takes it.
      frozen: {'lpips': …}.
      nets: Nets.
      recipe: Recipe.
    """
    draws = batch["draws"]

    def align(_, latents):
        """REPA-E: alignment through the frozen SiT; running statistics, no label dropout."""
        z = latent_norm.normalize(latents, state.latent_stats)
        z_t = recipe.objective.add_noise(z, draws.noise, draws.t)
        projections = nets.sit.apply({"params": unsharded(state.sit.params)}, z_t, draws.t, batch["labels"], method="align")
        return alignment_loss(projections, batch["targets"])

    def diffusion(_, latents):
        """The ablation that collapses: SiT's own loss without the stop-gradient, through the batch norm if there is one."""
        stats = batch_stats(latents) if recipe.norm_momentum else state.latent_stats
        weights = {name: weight for name, weight in recipe.sit_weights.items() if name != "align"}
        z, labels = latent_norm.normalize(latents, stats), dropped_labels(batch, nets)
        return sit_loss(state.sit.params, z, draws.t, draws.noise, labels, (), weights, nets=nets, recipe=recipe)[0]

    def vf(params, latents):
        """VA-VAE: a linear map of the latents resembles the encoder's tokens."""
        projected = nets.vae.apply({"params": unsharded(params)}, latents, method="project")
        return vf_loss(projected, batch["targets"][0], *recipe.vf_margins)

    def se(params, latents):
        """Scale equivariance: downscaled latents give the downscaled image."""
        def decode(latents):
            return nets.vae.apply({"params": unsharded(params)}, latents, method="decode")

        def pixel_loss(images, recon):
            weights = pixel_weights(recipe.vae_weights, images, recipe)
            return weighted_sum(weights, pixel_terms(weights, images, recon, frozen, nets=nets, recipe=recipe))

        losses = [scale_equivariance_loss(batch["images"], latents, decode, pixel_loss, f) for f in recipe.se_factors]
        return sum(losses) / len(losses)

    return {"align": align, "diffusion": diffusion, "vf": vf, "se": se}


def discriminate(module, params, running, images):
    """Logits of images, and the running statistics after seeing them."""
    logits, updates = module.apply({"params": unsharded(params), "batch_stats": running}, images, mutable=["batch_stats"])
    return logits, updates["batch_stats"]


def disc_loss(params, images, recon, running, lecam, *, step, nets, recipe):
    """Loss of the discriminator: hinge on real images against detached reconstructions, plus LeCam.

    Args:
      params: discriminator parameters.
      images: real, [B, H, W, 3] in [-1, 1].
      recon: fake, the same shape; no gradient flows into it.
      running: the discriminator's running statistics.
      lecam: LeCamEma before this step.
      step: int32, for the adversarial start.
      nets: Nets.
      recipe: Recipe.

    Returns:
      loss: float32 scalar.
      (terms, running statistics, LeCamEma): after this step.
    """
    recon = jax.lax.stop_gradient(recon)
    real, running = discriminate(nets.disc, params, running, images)
    fake, running = discriminate(nets.disc, params, running, recon)
    factor = adversarial.gan_factor(step, recipe.gan_start, recipe.gan_factor)
    terms = {
        "hinge": factor * adversarial.hinge_loss(real, fake),
        "lecam": adversarial.lecam_loss(real, fake, lecam),
        "logits_real": jnp.mean(real),
        "logits_fake": jnp.mean(fake),
    }
    loss = terms["hinge"] + recipe.lecam_weight * terms["lecam"]
    return loss, (terms, running, adversarial.update_lecam(lecam, real, fake))


def sit_loss(params, z, t, noise, labels, targets, weights, *, nets, recipe):
    """Loss of SiT: velocity error plus alignment. Of DiT: noise error, variational bound, alignment.

    Args:
      params: SiT parameters.
      z: normalised latents [B, h, w, C], detached from the VAE.
      t: [B] times.
      noise: [B, h, w, C].
      labels: int [B], null where dropped.
      targets: tuple of encoder features [B, T, F].
      weights: name -> weight; says which terms exist.
      nets: Nets.
      recipe: Recipe.

    Returns:
      loss: float32 scalar.
      terms: unweighted.
    """
    z_t = recipe.objective.add_noise(z, noise, t)
    output, projections = nets.sit.apply({"params": unsharded(params)}, z_t, t, labels)
    terms = recipe.objective.losses(output, z, noise, t)
    if "align" in weights:
        terms["align"] = alignment_loss(projections, targets)
    return weighted_sum(weights, terms), terms


def dropped_labels(batch, nets):
    """Labels as the SiT phase sees them: some replaced by the null label."""
    return jnp.where(batch["draws"].label_drop, nets.sit.null_label, batch["labels"])
