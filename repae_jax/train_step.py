"""The training step of REPA-E, from top to bottom.

A VAE and a SiT are trained together. The diffusion loss alone would collapse the latent space, so a stop-gradient keeps it from
the VAE; the representation-alignment (REPA) loss trains both. Reference: REPA-E (arXiv 2504.10483) and its `train_repae.py`.

The published loop updates VAE, discriminator and SiT one after the other. Each of its losses uses tensors made before any of
the three updates, so the simultaneous update written here gives the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repae_jax import features
from repae_jax.diffusion import interpolant, latent_norm
from repae_jax.images import to_float
from repae_jax.losses import adversarial, reconstruction
from repae_jax.losses.alignment import alignment_loss
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.rng import named_keys
from repae_jax.running_stats import batch_stats, update_running
from repae_jax.train_state import apply_update, keep_if_finite, update_ema


class Nets(NamedTuple):
    """The Linen modules of a job; None where a job has none."""

    vae: AutoencoderKL
    sit: SiT
    disc: PatchDiscriminator | None
    lpips: LPIPS | None


class Optimizers(NamedTuple):
    """optax transformations, clipping included."""

    vae: optax.GradientTransformation
    sit: optax.GradientTransformation
    disc: optax.GradientTransformation | None


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. A loss term exists only if its weight is named.

    Attributes:
      vae_weights: of 'l1', 'l2', 'lpips', 'kl', 'gan', 'align'.
      sit_weights: of 'velocity', 'align'.
      lpips_input_range: see `reconstruction.perceptual`.
      gan_start: first step with an adversarial loss.
      gan_factor: multiplies both adversarial losses from then on.
      lecam_weight: of the LeCam term in the discriminator's loss.
      path: 'linear' or 'cosine' interpolant.
      time_distribution: 'uniform' or 'lognormal'.
      label_dropout: share of labels replaced by the null label in the SiT phase.
      norm_momentum: of the latent batch norm (torch's convention).
      ema_decay: of SiT and the latent statistics.
      accumulation: micro-batches per step.
    """

    vae_weights: Mapping[str, float]
    sit_weights: Mapping[str, float]
    lpips_input_range: tuple[float, float] = (-1.0, 1.0)
    gan_start: int = 0
    gan_factor: float = 1.0
    lecam_weight: float = 0.0
    path: str = "linear"
    time_distribution: str = "uniform"
    label_dropout: float = 0.1
    norm_momentum: float = 0.1
    ema_decay: float = 0.9999
    accumulation: int = 1


@struct.dataclass
class Draws:
    """Every random number of a step.

    Attributes:
      posterior_noise: [B, h, w, C] N(0, 1), samples the VAE's posterior.
      t: [B] diffusion times, shared by both SiT passes.
      noise: [B, h, w, C] N(0, 1), shared by both SiT passes.
      label_drop: bool [B], True where the SiT phase sees the null label.
    """

    posterior_noise: jax.Array
    t: jax.Array
    noise: jax.Array
    label_drop: jax.Array


def draw(key, step, latent_shape, recipe):
    """All draws of a step, a pure function of (key, step); latent_shape is [B, h, w, C]."""
    keys = named_keys(key, step, "posterior", "time", "noise", "label_drop")
    batch_size = latent_shape[0]
    return Draws(
        posterior_noise=jax.random.normal(keys["posterior"], latent_shape),
        t=interpolant.sample_time(keys["time"], batch_size, recipe.path, recipe.time_distribution),
        noise=jax.random.normal(keys["noise"], latent_shape),
        label_drop=jax.random.uniform(keys["label_drop"], (batch_size,)) < recipe.label_dropout,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The three losses. Each is a function of one network's parameters; everything else is an argument.
# ---------------------------------------------------------------------------------------------------------------------


def weighted_sum(weights, terms):
    """Sum of weight x term over the named terms."""
    return sum(weight * terms[name] for name, weight in weights.items())


def vae_loss(params, images, posterior_noise, disc, regularizers, *, step, frozen, nets, recipe):
    """Loss of the VAE.

    Args:
      params: VAE parameters.
      images: float32 [B, H, W, 3] in [-1, 1].
      posterior_noise: [B, h, w, C].
      disc: the discriminator's Net, frozen here, or None.
      regularizers: name -> function of the sampled latents [B, h, w, C], a scalar. REPA-E's own contribution is one of them.
      step: int32, for the adversarial start.
      frozen: {'lpips': parameters, …}.
      nets: Nets.
      recipe: Recipe; its vae_weights say which terms exist.

    Returns:
      loss: float32 scalar.
      (terms, latents, recon, batch_stats): unweighted terms; un-normalised latents; reconstruction; the discriminator's
        running statistics after it saw the reconstruction (None without one).
    """
    posterior = nets.vae.apply({"params": params}, images, method="encode")
    latents = posterior.sample(posterior_noise)
    recon = nets.vae.apply({"params": params}, latents, method="decode")

    def lpips_fn(a, b):
        return nets.lpips.apply({"params": frozen["lpips"]}, a, b)

    stats = None
    terms = {name: regularizer(latents) for name, regularizer in regularizers.items()}
    if "l1" in recipe.vae_weights:
        terms["l1"] = reconstruction.l1(images, recon)
    if "l2" in recipe.vae_weights:
        terms["l2"] = reconstruction.l2(images, recon)
    if "lpips" in recipe.vae_weights:
        terms["lpips"] = reconstruction.perceptual(lpips_fn, images, recon, recipe.lpips_input_range)
    if "kl" in recipe.vae_weights:
        terms["kl"] = reconstruction.kl(posterior)
    if "gan" in recipe.vae_weights:
        logits, stats = discriminate(nets.disc, disc.params, disc.batch_stats, recon)
        factor = adversarial.gan_factor(step, recipe.gan_start, recipe.gan_factor)
        terms["gan"] = factor * adversarial.generator_loss(logits)
    return weighted_sum(recipe.vae_weights, terms), (terms, latents, recon, stats)


def discriminate(module, params, running, images):
    """Logits of images, and the running statistics after seeing them."""
    logits, updates = module.apply({"params": params, "batch_stats": running}, images, mutable=["batch_stats"])
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


def sit_loss(params, z, t, noise, labels, targets, *, nets, recipe):
    """Loss of SiT: velocity error plus alignment.

    Args:
      params: SiT parameters.
      z: normalised latents [B, h, w, C], detached from the VAE.
      t: [B] times.
      noise: [B, h, w, C].
      labels: int [B], null where dropped.
      targets: tuple of encoder features [B, T, F].
      nets: Nets.
      recipe: Recipe; its sit_weights say which terms exist.

    Returns:
      loss: float32 scalar.
      terms: unweighted.
    """
    z_t = interpolant.interpolate(recipe.path, z, noise, t)
    velocity, projections = nets.sit.apply({"params": params}, z_t, t, labels)
    terms = {"velocity": jnp.mean(interpolant.mean_squared_velocity_error(recipe.path, velocity, z, noise, t))}
    if "align" in recipe.sit_weights:
        terms["align"] = alignment_loss(projections, targets)
    return weighted_sum(recipe.sit_weights, terms), terms


# ---------------------------------------------------------------------------------------------------------------------
# The step.
# ---------------------------------------------------------------------------------------------------------------------


def repae_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """One REPA-E step: a pure function, to be jitted with the state donated.

    Args:
      state: TrainState.
      batch: {'image': uint8 [B, H, W, 3], 'label': int32 [B]}.
      frozen: {'encoders': tuple of parameters, 'lpips': parameters or None}.
      key: the run's base key, the same at every step.
      nets: Nets.
      encoders: tuple of features.Encoder.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      state: TrainState after the step; unchanged but for its counters if a loss or gradient was not finite.
      metrics: name -> float32 scalar. Loss terms are unweighted; gradient norms are before clipping.
    """
    images, labels = batch["image"], batch["label"]
    b, height, width = images.shape[:3]
    with jax.named_scope("targets"):
        pairs = zip(encoders, frozen["encoders"])
        targets = tuple(features.encode(encoder, params, images) for encoder, params in pairs)
    latent_shape = (b, height // nets.vae.factor, width // nets.vae.factor, nets.vae.latent_channels)
    draws = draw(key, state.step, latent_shape, recipe)
    return repae_update(state, to_float(images), labels, targets, draws, frozen, nets=nets, tx=tx, recipe=recipe)


def repae_update(state, images, labels, targets, draws, frozen, *, nets, tx, recipe):
    """`repae_step` once the random numbers and the targets are there.

    Args:
      state: TrainState.
      images: float32 [B, H, W, 3] in [-1, 1].
      labels: int32 [B].
      targets: tuple of [B, T, F].
      draws: Draws.
      frozen: {'lpips': …}.
      nets: Nets.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      As `repae_step`.
    """

    # 1. VAE: reconstruction + KL + GAN, and REPA seen through the frozen SiT: running statistics, no label dropout.
    # 2. Discriminator: real images against the detached reconstruction.
    def vae_and_disc(carry, part):
        running, lecam = carry
        disc = None if state.disc is None else state.disc.replace(batch_stats=running)

        def align(latents):
            z = latent_norm.normalize(latents, state.latent_stats)
            z_t = interpolant.interpolate(recipe.path, z, part["draws"].noise, part["draws"].t)
            sit_params = {"params": state.sit.params}
            projections = nets.sit.apply(sit_params, z_t, part["draws"].t, part["labels"], method="align")
            return alignment_loss(projections, part["targets"])

        regularizers = {"align": align} if "align" in recipe.vae_weights else {}
        with jax.named_scope("vae"):
            (loss, (terms, latents, recon, running)), grads = jax.value_and_grad(vae_loss, has_aux=True)(
                state.vae.params, part["images"], part["draws"].posterior_noise, disc, regularizers,
                step=state.step, frozen=frozen, nets=nets, recipe=recipe,
            )  # fmt: skip
        means = {"vae": grads, "metrics": {"vae/loss": loss, **{f"vae/{name}": x for name, x in terms.items()}}}
        if disc is not None:
            with jax.named_scope("discriminator"):
                (loss, (terms, running, lecam)), means["disc"] = jax.value_and_grad(disc_loss, has_aux=True)(
                    disc.params, part["images"], recon, running, lecam, step=state.step, nets=nets, recipe=recipe
                )
            means["metrics"] |= {"disc/loss": loss, **{f"disc/{name}": x for name, x in terms.items()}}
        return (running, lecam), means, latents

    carry = (None if state.disc is None else state.disc.batch_stats, state.lecam)
    batch = {"images": images, "labels": labels, "targets": targets, "draws": draws}
    (running, lecam), vae_means, latents = accumulate(vae_and_disc, carry, batch, recipe.accumulation)

    # 3. SiT: the diffusion loss must not reach the VAE, so the latents are detached; normalised with the statistics of the
    #    whole batch, also under accumulation. The same t and noise as in 1, but another input: the two passes cannot be merged.
    latents = jax.lax.stop_gradient(latents)
    stats = batch_stats(latents)
    latent_stats = update_running(state.latent_stats, stats, latents.size // latents.shape[-1], recipe.norm_momentum)

    def sit(carry, part):
        labels = jnp.where(part["draws"].label_drop, nets.sit.null_label, part["labels"])
        with jax.named_scope("sit"):
            (loss, terms), grads = jax.value_and_grad(sit_loss, has_aux=True)(
                state.sit.params, latent_norm.normalize(part["latents"], stats), part["draws"].t, part["draws"].noise,
                labels, part["targets"], nets=nets, recipe=recipe,
            )  # fmt: skip
        return carry, {"sit": grads, "metrics": {"sit/loss": loss, **{f"sit/{n}": x for n, x in terms.items()}}}, None

    del batch["images"]
    _, sit_means, _ = accumulate(sit, None, {**batch, "latents": latents}, recipe.accumulation)

    # 4. Updates and EMA. All gradients were taken at the old parameters.
    metrics = vae_means.pop("metrics") | sit_means.pop("metrics")
    grads = vae_means | sit_means
    metrics |= {f"grad_norm/{name}": optax.tree.norm(tree) for name, tree in grads.items()}
    watched = [value for name, value in metrics.items() if name.startswith("grad_norm/") or name.endswith("/loss")]
    finite = jnp.all(jnp.isfinite(jnp.stack(watched)))
    with jax.named_scope("update"):
        new = state.replace(
            vae=apply_update(state.vae, grads["vae"], tx.vae),
            sit=apply_update(state.sit, grads["sit"], tx.sit),
            latent_stats=latent_stats,
        )
        if state.disc is not None:
            disc = apply_update(state.disc, grads["disc"], tx.disc)
            new = new.replace(disc=disc.replace(batch_stats=running), lecam=lecam)
        new = new.replace(ema=update_ema(state.ema, new.sit.params, latent_stats, recipe.ema_decay))
        new = keep_if_finite(finite, new, state)
    metrics |= {
        "latents/mean": jnp.mean(stats.mean),
        "latents/std": jnp.mean(jnp.sqrt(stats.var)),
        "latents/running_std": jnp.mean(jnp.sqrt(new.latent_stats.var)),
        "skipped": new.skipped.astype(jnp.float32),
        "skipped_in_a_row": new.skipped_in_a_row.astype(jnp.float32),
    }
    return new, metrics


def accumulate(fn, carry, batch, parts):
    """Run `fn` over equal micro-batches one after the other.

    Args:
      fn: (carry, micro-batch) -> (carry, tree to average over micro-batches, tree with a leading batch axis or None).
      carry: passed from one micro-batch to the next.
      batch: tree of [B, ...]; B divisible by `parts`. Micro-batch j takes rows j, j + parts, …, so that a batch sharded over
        its first axis stays where it is.
      parts: number of micro-batches.

    Returns:
      carry, mean tree, batch tree [B, ...] in the original order.
    """
    if parts == 1:
        return fn(carry, batch)

    def split(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(state, part):
        carry, total = state
        carry, means, rows = fn(carry, part)
        return (carry, jax.tree.map(jnp.add, total, means)), rows

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(fn, carry, jax.tree.map(lambda x: x[0], batch))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (carry, total), rows = jax.lax.scan(body, (carry, zeros), batch)
    return carry, jax.tree.map(lambda x: x / parts, total), jax.tree.map(join, rows)
