"""Steps that train a SiT, or a DiT, on a VAE that stays as it is: phases 0, 3 and 4 of `train_step.repae_step`.

`ldm_step` is of a run on a frozen VAE, `sit_step` of those steps of joint training that leave the VAE alone.
"""

from functools import partial

import jax
import jax.numpy as jnp

from repae_jax.train_step import named, scheduled, sit_loss
from repae_jax.training.accumulation import accumulate, accumulated_grad
from repae_jax.training.inputs import Inputs, prepare
from repae_jax.training.state import finish_step, update_latent_stats


def ldm_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """Takes one step of a SiT, or a DiT, on a frozen VAE with fixed latent statistics: phases 0, 3 and 4 of `repae_step`.

    Args:
      state: TrainState whose vae and disc are None.
      batch: {'label': int32 [B]} with 'image', uint8 [B, H, W, 3], or 'moments' from a cache, or, if there are encoders too,
        both. Moments are the posterior's mean and standard deviation, float32 [B, h, w, 2C], or [B, 2, h, w, 2C] with those
        of the mirrored image.
      frozen: {'encoders': tuple of parameters, 'vae': parameters}.
      key, nets, encoders, tx, recipe: as in `repae_step`.

    Returns:
      As `repae_step`.
    """
    # 0. Inputs, and latents of the frozen VAE.
    x = prepare(batch, state.step, frozen, key, nets=nets, encoders=encoders, recipe=recipe)
    if x.moments is not None:
        mean, std = jnp.split(x.moments, 2, axis=-1)
    else:
        with jax.named_scope("vae"):
            posterior = nets.vae.encode(frozen["vae"], x.images)
        mean, std = posterior.mean, posterior.std
    x = x.replace(latents=mean + std * x.posterior_noise)

    # 3 and 4. SiT, and the update.
    return update_sit(state, x, state.latent_stats, nets=nets, tx=tx, recipe=recipe)


def sit_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """Takes one step of the SiT between two of `repae_step`: its phases 0, 3 and 4, on the VAE as it is.

    Nothing is decoded, no gradient reaches the VAE, and the discriminator rests; the latents' running statistics go on.
    `config.vae_every` says how many there are. UNITE (arXiv 2603.22283, figure 5) varies this number, of flow steps per step of
    reconstruction, in a network that does both; that each step has a batch of its own is ours.

    Args:
      state, batch, frozen, key, nets, encoders, tx, recipe: as in `repae_step`.

    Returns:
      As `repae_step`; metrics of the VAE and the discriminator are missing.
    """

    def latents_of(carry, x):
        return carry, {}, nets.vae.encode(state.vae.params, x.images).sample(x.posterior_noise)

    # 0. Inputs, and latents of the VAE as the last joint step left it.
    x = prepare(batch, state.step, frozen, key, nets=nets, encoders=encoders, recipe=recipe)
    with jax.named_scope("vae"):
        x = x.replace(latents=accumulate(latents_of, None, x, recipe.accumulation)[2])

    # 3 and 4. SiT, on latents normalized with the statistics of the whole batch, and the update.
    stats, latent_stats, metrics = update_latent_stats(state.latent_stats, x.latents, recipe.norm_momentum)
    return update_sit(state, x, stats, metrics, nets=nets, tx=tx, recipe=recipe, latent_stats=latent_stats)


def update_sit(state, x: Inputs, stats, latent_metrics=None, *, nets, tx, recipe, latent_stats=None):
    """Takes phases 3 and 4 of the steps that train the SiT alone, on `x.latents`; returns as `repae_step`.

    `stats` normalize the latents, whose running statistics become `latent_stats` unless they are fixed.
    """
    with jax.named_scope("sit"):
        weights = scheduled(recipe.sit_weights, recipe.factors(state.step))
        loss = partial(sit_loss, stats=stats, weights=weights, nets=nets, recipe=recipe, average=state.ema.params)
        grads, terms, _, _ = accumulated_grad(loss, state.sit.params, x, micro_batches=recipe.accumulation)
    metrics = named("sit", terms) | (latent_metrics or {})
    with jax.named_scope("update"):
        return finish_step(state, {"sit": grads}, metrics, tx=tx, recipe=recipe, latent_stats=latent_stats)
