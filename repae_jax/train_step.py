"""The training steps, from top to bottom: REPA-E, and the two jobs that are its halves.

A VAE and a SiT are trained together. The diffusion loss alone would collapse the latent space, so a stop-gradient keeps it from
the VAE; the representation-alignment (REPA) loss trains both. Reference: REPA-E (arXiv 2504.10483) and its `train_repae.py`.

The published loop updates VAE, discriminator and SiT one after the other. Each of its losses uses tensors made before any of
the three updates, so the simultaneous update written here gives the same numbers.

There are three losses (`train_losses.py`). `vae_phase` and `sit_phase` take their gradients, `update` applies them, and a job
is what it composes of these:

    repae_step  vae_phase + sit_phase + update
    ldm_step                sit_phase + update, on latents of a frozen VAE
    vae_step    vae_phase             + update, with other regularisers
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repae_jax.diffusion import latent_norm
from repae_jax.distributed.sharding import unsharded
from repae_jax.images import to_float
from repae_jax.losses.regularizers import draw_transform, transform
from repae_jax.models import encoders as features
from repae_jax.models.channel_stats import batch_stats, update_running
from repae_jax.train_losses import disc_loss, dropped_labels, sit_loss, vae_loss, vae_regularizers, weights_at
from repae_jax.training.accumulation import accumulate
from repae_jax.training.recipe import Nets, Optimizers, Recipe  # noqa: F401 (part of this file's story)
from repae_jax.training.rng import named_keys
from repae_jax.training.state import apply_update, keep_if_finite, update_ema


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
        t=recipe.objective.sample_time(keys["time"], batch_size),
        noise=jax.random.normal(keys["noise"], latent_shape),
        label_drop=jax.random.uniform(keys["label_drop"], (batch_size,)) < recipe.label_dropout,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The phases: gradients at the old parameters. The update: new parameters, statistics, averages.
# ---------------------------------------------------------------------------------------------------------------------


def vae_phase(state, batch, frozen, key, *, nets, recipe):
    """Gradients of the VAE's and the discriminator's losses.

    Args:
      state: TrainState; if its vae is None, frozen['vae'] is taken and the discriminator alone trained.
      batch: {'images': float32 [B, H, W, 3] in [-1, 1], 'labels', 'targets', 'draws'}.
      frozen: {'lpips': …}.
      key: the run's base key.
      nets: Nets.
      recipe: Recipe.

    Returns:
      grads: {'vae': tree, 'disc': tree}, of those that are trained.
      metrics: name -> scalar.
      latents: [B, h, w, C], un-normalised, detached.
      disc_state: (the discriminator's running statistics, LeCamEma) after the step; None each without one.
    """
    weights = weights_at(state.step, recipe.vae_weights, recipe)
    drawn = None
    if recipe.eq_scales:
        drawn = draw_transform(named_keys(key, state.step, "transform")["transform"], recipe.eq_scales, recipe.eq_prior)

    def at_scale(scale, carry, part):
        running, lecam = carry
        disc = None if state.disc is None else state.disc.replace(batch_stats=running)
        named = vae_regularizers(state, part, frozen, nets=nets, recipe=recipe)
        how = {"frozen": frozen, "nets": nets, "recipe": recipe}
        if drawn is not None:
            how["deform"] = functools.partial(transform, scale=scale, quarter_turns=drawn.quarter_turns)

        grads, metrics = {}, {}
        with jax.named_scope("vae"):
            params, terms = (frozen["vae"], {}) if state.vae is None else (state.vae.params, weights)
            loss, vae_grads, aux = vae_loss(params, part["images"], part["draws"].posterior_noise, disc, named, terms, **how)
        if state.vae is not None:
            grads["vae"] = vae_grads
            metrics = {"vae/loss": loss, **{f"vae/{name}": x for name, x in aux.terms.items()}}
            metrics |= {f"vae/weight_{name}": aux.weights[name] for name in recipe.adaptive}
            running = running if aux.batch_stats is None else aux.batch_stats
        if disc is not None:
            with jax.named_scope("discriminator"):
                (loss, (terms, running, lecam)), grads["disc"] = jax.value_and_grad(disc_loss, has_aux=True)(
                    disc.params, aux.images, aux.recon, running, lecam, step=state.step, nets=nets, recipe=recipe
                )
            metrics |= {"disc/loss": loss, **{f"disc/{name}": x for name, x in terms.items()}}
        return (running, lecam), (grads, metrics), aux.latents

    def one(carry, part):
        if drawn is None:
            return at_scale(1, carry, part)
        branches = [functools.partial(at_scale, scale) for scale in recipe.eq_scales]
        return jax.lax.switch(drawn.scale_index, branches, carry, part)

    carry = (None if state.disc is None else state.disc.batch_stats, state.lecam)
    disc_state, (grads, metrics), latents = accumulate(one, carry, batch, recipe.accumulation)
    return grads, metrics, jax.lax.stop_gradient(latents), disc_state


def sit_phase(state, batch, stats, *, nets, recipe):
    """Gradients of SiT's loss.

    Args:
      state: TrainState.
      batch: {'latents': [B, h, w, C] un-normalised and detached, 'labels', 'targets', 'draws'}.
      stats: ChannelStats that normalise the latents.
      nets: Nets.
      recipe: Recipe.

    Returns:
      grads: {'sit': tree}.
      metrics: name -> scalar.
    """
    weights = weights_at(state.step, recipe.sit_weights, recipe)

    def one(carry, part):
        z, draws = latent_norm.normalize(part["latents"], stats), part["draws"]
        with jax.named_scope("sit"):
            (loss, terms), grads = jax.value_and_grad(sit_loss, has_aux=True)(
                state.sit.params, z, draws.t, draws.noise, dropped_labels(part, nets), part["targets"], weights,
                nets=nets, recipe=recipe,
            )  # fmt: skip
        return carry, ({"sit": grads}, {"sit/loss": loss, **{f"sit/{name}": x for name, x in terms.items()}}), None

    _, (grads, metrics), _ = accumulate(one, None, batch, recipe.accumulation)
    return grads, metrics


def latent_stats_after(state, latents, recipe):
    """The latents' statistics: (those that normalise the batch, the running ones after the step, metrics).

    Without a batch norm (momentum 0), the first are the initial ones, and the second None: they do not move.
    """
    stats = batch_stats(latents)
    metrics = {"latents/mean": jnp.mean(stats.mean), "latents/std": jnp.mean(jnp.sqrt(stats.var))}
    if not recipe.norm_momentum:
        return state.latent_stats, None, metrics
    running = update_running(state.latent_stats, stats, latents.size // latents.shape[-1], recipe.norm_momentum)
    return stats, running, metrics | {"latents/running_std": jnp.mean(jnp.sqrt(running.var))}


def keep_fixed(grads, parts):
    """Gradients with zeros for the parts, top-level names, that stay as they are."""
    return {name: jax.tree.map(jnp.zeros_like, tree) if name in parts else tree for name, tree in grads.items()}


def update(state, grads, metrics, latent_stats, disc_state, *, tx, recipe):
    """The state after a step; unchanged but for its counters if a loss or a gradient was not finite.

    Args:
      state: TrainState.
      grads: name of a network -> its gradients, taken at this state.
      metrics: name -> scalar.
      latent_stats: running statistics after the step; None if they are fixed.
      disc_state: as `vae_phase` returns it; None if the job has none.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      (TrainState, metrics), see `repae_step`.
    """
    grads = {name: keep_fixed(tree, recipe.fixed.get(name, ())) for name, tree in grads.items()}
    metrics = metrics | {f"grad_norm/{name}": optax.tree.norm(tree) for name, tree in grads.items()}
    watched = [value for name, value in metrics.items() if name.startswith("grad_norm/") or name.endswith("/loss")]
    finite = jnp.all(jnp.isfinite(jnp.stack(watched)))
    with jax.named_scope("update"):
        new = state if latent_stats is None else state.replace(latent_stats=latent_stats)
        new = new.replace(**{name: apply_update(getattr(state, name), tree, getattr(tx, name)) for name, tree in grads.items()})
        if state.disc is not None:
            running, lecam = disc_state
            new = new.replace(disc=new.disc.replace(batch_stats=running), lecam=lecam)
        if state.ema is not None:
            averaged = new.vae if new.sit is None else new.sit
            new = new.replace(ema=update_ema(state.ema, averaged.params, latent_stats, recipe.ema_decay))
        new = keep_if_finite(finite, new, state)
    metrics |= {"skipped": new.skipped.astype(jnp.float32), "skipped_in_a_row": new.skipped_in_a_row.astype(jnp.float32)}
    return new, metrics


# ---------------------------------------------------------------------------------------------------------------------
# The steps of the three jobs.
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
    images = flip(batch, key, state.step, recipe)["image"]
    targets = encode_targets(encoders, frozen, images)
    draws = draw(key, state.step, latent_shape_of(nets, images), recipe)
    return repae_update(state, to_float(images), batch["label"], targets, draws, frozen, key, nets=nets, tx=tx, recipe=recipe)


def repae_update(state, images, labels, targets, draws, frozen, key, *, nets, tx, recipe):
    """`repae_step` once the random numbers and the targets are there.

    Args:
      state: TrainState.
      images: float32 [B, H, W, 3] in [-1, 1].
      labels: int32 [B].
      targets: tuple of [B, T, F].
      draws: Draws.
      frozen: {'lpips': …}.
      key: the run's base key, for EQ-VAE's transform.
      nets: Nets.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      As `repae_step`.
    """
    batch = {"labels": labels, "targets": targets, "draws": draws}

    # 1. VAE: reconstruction + KL + GAN, and REPA seen through the frozen SiT: running statistics, no label dropout.
    # 2. Discriminator: real images against the detached reconstruction.
    how = {"nets": nets, "recipe": recipe}
    vae_grads, vae_metrics, latents, disc_state = vae_phase(state, {**batch, "images": images}, frozen, key, **how)

    # 3. SiT: the diffusion loss must not reach the VAE, so the latents are detached; normalised with the statistics of the
    #    whole batch, also under accumulation. The same t and noise as in 1, but another input: the two passes cannot be merged.
    stats, latent_stats, latent_metrics = latent_stats_after(state, latents, recipe)
    sit_grads, sit_metrics = sit_phase(state, {**batch, "latents": latents}, stats, **how)

    # 4. Updates and EMA. All gradients were taken at the old parameters.
    metrics = vae_metrics | sit_metrics | latent_metrics
    return update(state, vae_grads | sit_grads, metrics, latent_stats, disc_state, tx=tx, recipe=recipe)


def ldm_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """One step of a SiT, or a DiT, on a frozen VAE with fixed latent statistics.

    Args:
      state: TrainState whose vae and disc are None.
      batch: {'label': int32 [B]} with 'image', uint8 [B, H, W, 3], or 'moments' from a cache, or, if there are encoders too,
        both. Moments are the posterior's mean and standard deviation, float32 [B, h, w, 2C], or [B, 2, h, w, 2C] with those
        of the mirrored image.
      frozen: {'encoders': tuple of parameters, 'vae': parameters}.
      key: the run's base key.
      nets: Nets.
      encoders: tuple of features.Encoder.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      As `repae_step`.
    """
    batch = flip(batch, key, state.step, recipe)
    if "moments" in batch:
        mean, std = jnp.split(batch["moments"], 2, axis=-1)
    else:
        with jax.named_scope("vae"):
            posterior = nets.vae.apply({"params": unsharded(frozen["vae"])}, to_float(batch["image"]), method="encode")
        mean, std = posterior.mean, posterior.std
    targets = encode_targets(encoders, frozen, batch["image"]) if encoders else ()
    draws = draw(key, state.step, mean.shape, recipe)
    part = {"labels": batch["label"], "targets": targets, "draws": draws, "latents": mean + std * draws.posterior_noise}
    grads, metrics = sit_phase(state, part, state.latent_stats, nets=nets, recipe=recipe)
    return update(state, grads, metrics, None, None, tx=tx, recipe=recipe)


def vae_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """One step of a tokenizer, or of the discriminator of a frozen one.

    Args:
      state: TrainState whose sit is None, and whose vae is None if only the discriminator is trained.
      batch: {'image': uint8 [B, H, W, 3], 'label': int32 [B]}.
      frozen: {'encoders': tuple of parameters, 'lpips': parameters or None, 'vae': parameters if it is frozen}.
      key: the run's base key.
      nets: Nets.
      encoders: tuple of features.Encoder, for VF.
      tx: Optimizers.
      recipe: Recipe.

    Returns:
      As `repae_step`.
    """
    images = flip(batch, key, state.step, recipe)["image"]
    targets = encode_targets(encoders, frozen, images)
    draws = draw(key, state.step, latent_shape_of(nets, images), recipe)
    part = {"images": to_float(images), "labels": batch["label"], "targets": targets, "draws": draws}
    grads, metrics, latents, disc_state = vae_phase(state, part, frozen, key, nets=nets, recipe=recipe)
    _, latent_stats, latent_metrics = latent_stats_after(state, latents, recipe)
    return update(state, grads, metrics | latent_metrics, latent_stats, disc_state, tx=tx, recipe=recipe)


def encode_targets(encoders, frozen, images):
    """Tuple of the encoders' tokens [B, T, F] of uint8 images."""
    with jax.named_scope("targets"):
        return tuple(features.encode(encoder, params, images) for encoder, params in zip(encoders, frozen["encoders"]))


def latent_shape_of(nets, images):
    """[B, h, w, C] of images [B, H, W, 3]."""
    b, height, width = images.shape[:3]
    return b, height // nets.vae.factor, width // nets.vae.factor, nets.vae.latent_channels


def flip(batch, key, step, recipe):
    """The batch with images mirrored at random; moments of a cache are chosen, not mirrored: the VAE is not equivariant."""
    if not recipe.flip_probability:
        return batch
    drawn = jax.random.uniform(named_keys(key, step, "flip")["flip"], batch["label"].shape) < recipe.flip_probability
    drawn = drawn[:, None, None, None]
    if "image" in batch:
        batch = {**batch, "image": jnp.where(drawn, batch["image"][:, :, ::-1], batch["image"])}
    if "moments" in batch:
        batch = {**batch, "moments": jnp.where(drawn, batch["moments"][:, 1], batch["moments"][:, 0])}
    return batch
