"""The training step of REPA-E, from top to bottom.

A VAE and a SiT are trained together. The diffusion loss alone would collapse the latent space, so a stop-gradient keeps it from
the VAE; the representation-alignment (REPA) loss trains both. Reference: REPA-E (arXiv 2504.10483) and its `train_repae.py`.

    images ─┬─ encoders ─► targets                                                                              (frozen)
            └─ VAE.encode ─► posterior ─► latents ─► VAE.decode ─► recon
      1  normalize(latents, running stats) ─► add_noise(t, noise) ─► SiT.align (held fixed) ─► projections
      3  normalize(stop_gradient(latents), batch stats) ─► add_noise(same t, noise) ─► SiT ─► velocity, projections

    phase             updates         gradient of                                     SiT normalizes with          labels
    1  vae_loss       VAE             reconstruction, KL, GAN, alignment through SiT  running stats, as they were  all
    2  disc_loss      discriminator   hinge and LeCam on images and recon             -                            -
    3  sit_loss       SiT             velocity, alignment                             stats of this batch          some dropped

The published SiT is in evaluation mode in phase 1, in training mode in phase 3; hence the last two columns. The published loop
updates VAE, discriminator and SiT one after the other. Each of its losses uses tensors made before any of the three updates,
so the simultaneous update written here, phase 4, gives the same numbers.

Letters in shapes: B batch, H W pixels, h w latent grid, C latent channels, T tokens, F features of an encoder.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from repae_jax.diffusion import token_times
from repae_jax.diffusion.latent_norm import normalize
from repae_jax.losses import reconstruction
from repae_jax.losses.adversarial import generator_loss, hinge_loss, lecam_loss, update_lecam
from repae_jax.losses.alignment import alignment_loss
from repae_jax.models.autoencoder import DiagonalGaussian
from repae_jax.models.channel_stats import batch_stats
from repae_jax.models.sit import Tap
from repae_jax.training.accumulation import Aux, accumulated_grad
from repae_jax.training.inputs import Inputs, prepare
from repae_jax.training.networks import BoundNets
from repae_jax.training.recipe import Recipe
from repae_jax.training.state import TrainState, finish_step, update_latent_stats

# ---- losses ---------------------------------------------------------------------------------------------------------
# The three losses, (params, inputs, carry) -> (loss, Aux), are differentiated by params alone: every other network in them is
# held fixed. The carry is what one micro-batch hands to the next, and phase 1 to phase 2.


class VaePass(NamedTuple):
    """Tensors that a term of the VAE's loss may use; gradients flow through posterior, latents, recon and logits_fake.

    A tokenizer's terms of the pixels get the first five alone.
    """

    x: Inputs
    recon: Float[Array, "B H W 3"]
    frozen: dict[str, Any]  # parameters of LPIPS and the encoders
    nets: BoundNets
    recipe: Recipe
    posterior: DiagonalGaussian | None = None
    latents: Float[Array, "B h w C"] | None = None  # sampled, un-normalized
    logits_fake: Array | None = None  # the discriminator's, of recon; None if the GAN has no weight
    state: TrainState | None = None  # before the step: parameters of SiT and discriminator, running statistics


def align_through_sit(v: VaePass):
    """REPA-E's own term: aligns the latents, as SiT sees them, with the encoders' targets. All labels are kept."""
    z_t = v.recipe.objective.add_noise(normalize(v.latents, v.state.latent_stats), v.x.noise, v.x.t)
    projections = v.nets.sit.align(v.state.sit.params, z_t, v.x.t, v.x.labels)
    return alignment_loss(projections[: len(v.x.targets)], v.x.targets)


def diffusion_without_stop_gradient(v: VaePass):
    """The paper's ablation that collapses the latent space: SiT's own loss, through the statistics of the batch."""
    stats = batch_stats(v.latents) if v.recipe.norm_momentum else v.state.latent_stats
    weights = {name: weight for name, weight in v.recipe.sit_weights.items() if name not in SIT_TERMS}
    x = v.x.replace(latents=v.latents)
    return sit_loss(v.state.sit.params, x, None, stats=stats, weights=weights, nets=v.nets, recipe=v.recipe)[0]


VAE_TERMS = {  # name, as in config.loss.vae, -> function of a VaePass
    "l1": lambda v: reconstruction.l1(v.x.images, v.recon),
    "l2": lambda v: reconstruction.l2(v.x.images, v.recon),
    "lpips": lambda v: reconstruction.perceptual(
        partial(v.nets.lpips, v.frozen["lpips"]), v.x.images, v.recon, v.recipe.lpips_input_range
    ),
    "kl": lambda v: reconstruction.kl(v.posterior),
    "gan": lambda v: generator_loss(v.logits_fake),
    "align": align_through_sit,
    "diffusion": diffusion_without_stop_gradient,
}


def vae_loss(params, x: Inputs, disc_stats, *, state, frozen, weights, nets, recipe):
    """1. Loss of the VAE: reconstruction + KL + GAN, and REPA through SiT, which is held fixed. Returns (loss, Aux).

    Aux.rows are latents and recon, for phases 2 and 3. The carry is the discriminator's running statistics: each of its three
    passes updates them (recon here, images and recon in phase 2), none normalizes with them.
    """
    posterior = nets.vae.encode(params, x.images)
    latents = posterior.sample(x.posterior_noise)
    recon = nets.vae.decode(params, latents)
    logits_fake = None
    if "gan" in weights:
        logits_fake, disc_stats = nets.disc(state.disc.params, disc_stats, recon)
    v = VaePass(x, recon, frozen, nets, recipe, posterior, latents, logits_fake, state)
    terms = {name: VAE_TERMS[name](v) for name in weights}
    return weighted_sum(weights, terms), Aux(terms, rows=(latents, recon), carry=disc_stats)


def disc_loss(params, x: Inputs, carry, *, gan_factor, nets, recipe):
    """2. Loss of the discriminator: hinge on real images against detached reconstructions, plus LeCam. Returns (loss, Aux).

    The carry is its running statistics and LeCam's averages. `gan_factor` is 0 before the GAN starts.
    """
    disc_stats, lecam = carry
    real, disc_stats = nets.disc(params, disc_stats, x.images)
    fake, disc_stats = nets.disc(params, disc_stats, x.recon)
    terms = {
        "hinge": gan_factor * hinge_loss(real, fake),
        "lecam": lecam_loss(real, fake, lecam),
        "logits_real": jnp.mean(real),
        "logits_fake": jnp.mean(fake),
    }
    loss = terms["hinge"] + recipe.lecam_weight * terms["lecam"]
    return loss, Aux(terms, carry=(disc_stats, update_lecam(lecam, real, fake)))


class SitPass(NamedTuple):
    """Tensors that a term of SiT's loss may use beside the objective's own; gradients flow through the last one."""

    x: Inputs
    z: Float[Array, "B h w C"]  # normalized latents
    labels: Int[Array, " B"]  # some dropped
    average: Any  # parameters of the averaged SiT
    nets: BoundNets
    recipe: Recipe
    tap: Tap


def internal_velocity_error(s: SitPass):
    """Internal guidance's term (arXiv 2512.24176, weight 0.5): the objective's own loss, of the head at the tap."""
    return s.recipe.objective.losses(s.tap.output, s.z, s.x.noise, s.x.t)["velocity"]


def self_alignment(s: SitPass):
    """Self-Flow's term (arXiv 2603.06507, equation 6, weight 0.8): -cos(h(f_l(z_tau, tau)), g_k(z_min, min tau)), a mean.

    f_l is the SiT up to the tap, g_k its average up to a later block, held fixed, and h a projector of its own. tau are the
    times of the tokens: the average sees the whole image as clean as the cleanest token is, with the same noise. The paper does
    not say with which labels; that the same are dropped is as in the code of SRA (2505.02831).
    """
    t = token_times.least(s.x.t)
    z_t = s.recipe.objective.add_noise(s.z, s.x.noise, t)
    target = stop_gradient(s.nets.sit.tokens_after(s.average, z_t, t, s.labels, s.recipe.self_depth))
    return alignment_loss(s.tap.projections[-1:], (target,))


SIT_TERMS = {  # name, as in config.loss.sit, -> function of a SitPass
    "align": lambda s: alignment_loss(s.tap.projections[: len(s.x.targets)], s.x.targets),
    "internal": internal_velocity_error,
    "self": self_alignment,
}


def sit_loss(params, x: Inputs, carry, *, stats, weights, nets, recipe, average=None):
    """3. Loss of SiT: error of the velocity, or what else its objective has, plus REPA. Returns (loss, Aux).

    The latents are normalized with `stats`; some labels become the null label, for guidance. `average` are the parameters of
    the averaged SiT, for the term 'self'. The carry is unused.
    """
    z = normalize(x.latents, stats)
    labels = jnp.where(x.label_drop, nets.sit.null_label, x.labels)
    terms, tap = recipe.objective.terms(partial(nets.sit, params), z, x.noise, x.t, labels, nets.sit.null_label)
    s = SitPass(x, z, labels, average, nets, recipe, tap)
    terms |= {name: term(s) for name, term in SIT_TERMS.items() if name in weights}
    return weighted_sum(weights, terms), Aux(terms, carry=carry)


def weighted_sum(weights, terms):
    """Returns the sum of weight x term over the terms that have a weight."""
    return sum(weight * terms[name] for name, weight in weights.items())


def scheduled(weights, factors):
    """Returns the weights at this step: times the factors, which are 1 for terms that have none; see `Recipe.factors`."""
    return {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}


def named(prefix, terms):
    """Returns the terms under the names that metrics have."""
    return {f"{prefix}/{name}": value for name, value in terms.items()}


# ---- the step -------------------------------------------------------------------------------------------------------


def repae_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """Takes one REPA-E step: a pure function, to be jitted with the state donated.

    Args:
      state: TrainState.
      batch: {'image': uint8 [B, H, W, 3], 'label': int32 [B]}.
      frozen: {'encoders': tuple of parameters, 'lpips': parameters or None}.
      key: the run's base key, the same at every step; the step's number is folded in.
      nets: BoundNets, applied to parameters that are passed in.
      encoders: tuple of encoders.Encoder, in the order of their parameters.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      state: TrainState after the step; unchanged but for its counters if a loss or gradient was not finite.
      metrics: name -> float32 scalar. Loss terms are unweighted; gradient norms are before clipping.
    """
    # 0. Inputs: targets of the encoders and all random numbers. t and noise are shared by both SiT passes.
    x = prepare(batch, state.step, frozen, key, nets=nets, encoders=encoders, recipe=recipe)
    factors = recipe.factors(state.step)  # the GAN starts late, the alignment may end early
    grad_of = partial(accumulated_grad, micro_batches=recipe.accumulation)
    grads = {}

    # 1. VAE: reconstruction + KL + GAN, and REPA seen through SiT, held fixed. The diffusion loss never reaches the VAE.
    with jax.named_scope("vae"):
        disc_stats = None if state.disc is None else state.disc.batch_stats
        weights = scheduled(recipe.vae_weights, factors)
        loss = partial(vae_loss, state=state, frozen=frozen, weights=weights, nets=nets, recipe=recipe)
        grads["vae"], vae_terms, (latents, recon), disc_stats = grad_of(loss, state.vae.params, x, disc_stats)
        x = x.replace(latents=stop_gradient(latents), recon=stop_gradient(recon))
        metrics = named("vae", vae_terms)

    # 2. Discriminator: real images against the detached reconstruction.
    disc_carry = None
    if state.disc is not None:
        with jax.named_scope("discriminator"):
            loss = partial(disc_loss, gan_factor=factors["gan"], nets=nets, recipe=recipe)
            grads["disc"], disc_terms, _, disc_carry = grad_of(loss, state.disc.params, x, (disc_stats, state.lecam))
            metrics |= named("disc", disc_terms)

    # 3. SiT: velocity + REPA on the detached latents, normalized with the statistics of the whole batch, not of a micro-batch.
    #    The same t and noise as in 1, but other statistics and labels: the two passes cannot be merged.
    with jax.named_scope("sit"):
        stats, latent_stats, latent_metrics = update_latent_stats(state.latent_stats, x.latents, recipe.norm_momentum)
        weights = scheduled(recipe.sit_weights, factors)
        loss = partial(sit_loss, stats=stats, weights=weights, nets=nets, recipe=recipe, average=state.ema.params)
        grads["sit"], sit_terms, _, _ = grad_of(loss, state.sit.params, x)
        metrics |= named("sit", sit_terms) | latent_metrics

    # 4. Optimizers and averages. All gradients were taken at the old parameters; one that is not finite skips the whole update.
    with jax.named_scope("update"):
        return finish_step(state, grads, metrics, tx=tx, recipe=recipe, latent_stats=latent_stats, disc_carry=disc_carry)
