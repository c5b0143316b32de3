"""The training step of a tokenizer, a VAE without a SiT, and of the discriminator of a frozen one.

Beside REPA-E's reconstruction, KL and GAN there are VF (VA-VAE), scale equivariance, EQ-VAE's transform of latents and images,
and weights that adapt to gradients. Phases have the numbers of `train_step`; there is no SiT, and so no phase 3. Phases 1 and 2
run together on each micro-batch, because EQ-VAE's reconstructions differ in size from step to step.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from repae_jax.losses import adaptive, reconstruction, regularizers
from repae_jax.losses.adversarial import generator_loss
from repae_jax.train_step import VAE_TERMS, VaePass, disc_loss, named, scheduled, weighted_sum
from repae_jax.training.accumulation import accumulate
from repae_jax.training.inputs import Inputs, prepare
from repae_jax.training.rng import named_keys
from repae_jax.training.state import finish_step, update_latent_stats

# the terms of VAE_TERMS that a tokenizer can have, besides 'kl' and 'gan': functions of images and reconstruction alone. Their
# sum is the reference of adaptive weights
PIXEL_TERMS = ("l1", "l2", "lpips")


def vf(params, latents, x: Inputs, *, nets, frozen, recipe):
    """VA-VAE: a linear map of the latents resembles the encoder's tokens."""
    return regularizers.vf_loss(nets.vae.project(params, latents), x.targets[0], *recipe.vf_margins)


def scale_equivariance(params, latents, x: Inputs, *, nets, frozen, recipe):
    """The decoder of downscaled latents gives the downscaled image; mean over the recipe's factors."""
    decode = partial(nets.vae.decode, params)

    def pixel_loss_of(images, recon):
        return pixel_loss(recon, x.replace(images=images), recipe.vae_weights, nets=nets, frozen=frozen, recipe=recipe)[0]

    losses = [regularizers.scale_equivariance_loss(x.images, latents, decode, pixel_loss_of, f) for f in recipe.se_factors]
    return sum(losses) / len(losses)


LATENT_TERMS = {"vf": vf, "se": scale_equivariance}  # name, as in config.loss.vae, -> loss of parameters, latents and inputs
TERMS = (*PIXEL_TERMS, "kl", "gan", *LATENT_TERMS)  # all terms that a tokenizer can have


def pixel_weights(weights, images, recipe):
    """Returns the weights of the pixel terms, which are means; times H * W * 3 if the recipe wants sums over an image."""
    factor = math.prod(images.shape[1:]) if recipe.pixel_reduction == "sum" else 1
    return {name: factor * weights[name] for name in PIXEL_TERMS if name in weights}


def pixel_loss(recon, x: Inputs, weights, *, nets, frozen, recipe):
    """Returns the weighted sum of the pixel terms, float32, and the unweighted terms."""
    v = VaePass(x, recon, frozen, nets, recipe)
    terms = {name: VAE_TERMS[name](v) for name in PIXEL_TERMS if name in weights}
    return jnp.float32(weighted_sum(pixel_weights(weights, x.images, recipe), terms)), terms


def tokenizer_grads(transform, carry, x: Inputs, *, state, frozen, weights, gan_factor, nets, recipe):
    """Computes the gradients of VAE and discriminator on one micro-batch.

    Args:
      transform: function applied to the latents before the decoder, and to the images that the decoder is to give.
      carry: the discriminator's running statistics and LeCam's averages; None each without one.
      weights: name -> weight of the VAE's terms.
      gan_factor: factor of the discriminator's hinge loss; 0 before the GAN starts.

    Returns:
      carry, (grads by network, metrics), latents before the transform: what `accumulate` passes on, averages and joins.
    """
    disc_stats, lecam = carry
    images, grads, metrics = transform(x.images), {}, {}

    def encode(params):
        posterior = nets.vae.encode(params, x.images)
        return posterior.sample(x.posterior_noise), reconstruction.kl(posterior)

    def decode(params, latents):
        return nets.vae.decode(params, transform(latents))

    def gan_loss(recon):
        logits, stats = nets.disc(state.disc.params, disc_stats, recon)
        return generator_loss(logits), stats

    # 1. VAE.
    if state.vae is None:
        latents, _ = encode(frozen["vae"])
        recon = decode(frozen["vae"], latents)
    else:
        with jax.named_scope("vae"):
            options = {"nets": nets, "frozen": frozen, "recipe": recipe}
            vae = adaptive.adaptive_value_and_grad(
                state.vae.params,
                encode=encode,
                decode=decode,
                pixel_loss=partial(pixel_loss, x=x.replace(images=images), weights=weights, **options),
                gan_loss=gan_loss,
                latent_losses={name: partial(LATENT_TERMS[name], x=x, **options) for name in LATENT_TERMS if name in weights},
                weights=weights | pixel_weights(weights, images, recipe),
                limits=recipe.adaptive,
            )
        grads["vae"], latents, recon = vae.grads, vae.latents, vae.recon
        metrics |= named("vae", {"loss": vae.loss, **vae.terms})
        metrics |= {f"vae/weight_{name}": vae.weights[name] for name in recipe.adaptive}
        disc_stats = disc_stats if vae.gan_aux is None else vae.gan_aux

    # 2. Discriminator.
    if state.disc is not None:
        with jax.named_scope("discriminator"):
            pair = x.replace(images=images, recon=stop_gradient(recon))
            loss = partial(disc_loss, gan_factor=gan_factor, nets=nets, recipe=recipe)
            (value, aux), grads["disc"] = jax.value_and_grad(loss, has_aux=True)(state.disc.params, pair, (disc_stats, lecam))
        disc_stats, lecam = aux.carry
        metrics |= named("disc", {"loss": value, **aux.terms})
    return (disc_stats, lecam), (grads, metrics), latents


def at_drawn_scale(grads_at, key, step, recipe):
    """EQ-VAE: returns the function of (carry, x) that computes gradients under a transform drawn for the step.

    Differentiation is inside the branches: a reconstruction of another size cannot leave its branch.
    """
    key = named_keys(key, step, "transform")["transform"]
    drawn = regularizers.draw_transform(key, recipe.eq_scales, recipe.eq_prior)
    transforms = [partial(regularizers.transform, scale=s, quarter_turns=drawn.quarter_turns) for s in recipe.eq_scales]
    branches = [partial(grads_at, transform) for transform in transforms]
    return lambda carry, x: jax.lax.switch(drawn.scale_index, branches, carry, x)


def vae_step(state, batch, frozen, key, *, nets, encoders, tx, recipe):
    """Takes one step of a tokenizer, or of the discriminator of a frozen one; otherwise as `train_step.repae_step`.

    Args:
      state: TrainState whose sit is None, and whose vae is None if only the discriminator is trained.
      frozen: {'encoders': tuple of parameters, 'lpips': parameters or None, 'vae': parameters if it is frozen}.
      encoders: tuple of encoders.Encoder, for VF.
      recipe: TokenizerRecipe.
    """
    # 0. Inputs.
    x = prepare(batch, state.step, frozen, key, nets=nets, encoders=encoders, recipe=recipe)
    factors = recipe.factors(state.step)
    options = {"state": state, "frozen": frozen, "weights": scheduled(recipe.vae_weights, factors), "nets": nets}
    grads_at = partial(tokenizer_grads, gan_factor=factors["gan"], recipe=recipe, **options)
    grads_of = at_drawn_scale(grads_at, key, state.step, recipe) if recipe.eq_scales else partial(grads_at, lambda x: x)

    # 1. and 2. VAE and discriminator, micro-batch after micro-batch.
    carry = (None, None) if state.disc is None else (state.disc.batch_stats, state.lecam)
    carry, (grads, metrics), latents = accumulate(grads_of, carry, x, recipe.accumulation)

    # 4. Update. The latents' statistics serve the SiT that will be trained on this tokenizer.
    with jax.named_scope("update"):
        _, latent_stats, latent_metrics = update_latent_stats(state.latent_stats, latents, recipe.norm_momentum)
        disc_carry = None if state.disc is None else carry
        metrics |= latent_metrics
        return finish_step(state, grads, metrics, tx=tx, recipe=recipe, latent_stats=latent_stats, disc_carry=disc_carry)
