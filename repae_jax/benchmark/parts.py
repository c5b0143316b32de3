"""The parts of a training step as programs of their own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repae_jax import train_losses, train_step
from repae_jax.diffusion import latent_norm
from repae_jax.distributed import sharding
from repae_jax.images import to_float
from repae_jax.losses import adversarial
from repae_jax.models import encoders as features
from repae_jax.training.rng import named_keys

REGULARIZERS = {"align": "align_pass", "diffusion": "diffusion_pass", "se": "scale_equivariance", "vf": "vf"}
OF_PARAMETERS = ("se", "vf")  # regularisers that give the VAE's parameters a gradient, too


class Part(NamedTuple):
    """A program.

    Attributes:
      function: of the arguments.
      arguments: trees of arrays.
      out_shardings: of what it returns, as jax.jit takes them.
      of_whole: whether a step runs it on the whole batch, once, and not on every micro-batch.
    """

    function: Callable
    arguments: tuple[Any, ...]
    out_shardings: Any
    of_whole: bool = False


def make_batch(job, pixels, key):
    """What the losses of a step take, and what stands for the results of one part in another, all random.

    Args:
      job: Job.
      pixels: uint8 [B, H, W, 3].
      key: random key.

    Returns:
      dict of arrays with a leading axis B: 'pixels', 'images', 'labels', 'targets', 'draws', 'latents', 'recon'.
    """
    count, keys = len(pixels), named_keys(key, 0, "labels", "targets", "latents", "recon")
    latents = (count, *job.latent_shape)

    def normal(name, shape):
        return jax.random.normal(keys[name], shape)

    return {
        "pixels": pixels,
        "images": to_float(pixels),
        "labels": jax.random.randint(keys["labels"], (count,), 0, job.config["data"]["num_classes"]),
        "targets": tuple(normal("targets", (count, e.grid**2, e.module.hidden_size)) for e in job.encoders),
        "draws": train_step.draw(key, 0, latents, job.recipe),
        "latents": normal("latents", latents),
        "recon": jnp.tanh(normal("recon", pixels.shape)),
    }


def make_parts(job, state, frozen, whole_batch, batch):
    """The networks' shares of a step: forward pass and the gradients that the step takes, one after the other.

    They need not add up to the step, whose compiler fuses, shares and reorders across them, and which has more to do.

    Args:
      job: Job.
      state: TrainState.
      frozen: what `frozen_weights.load_frozen` returns.
      whole_batch: what `make_batch` returns.
      batch: the same, of a micro-batch.

    Returns:
      dict, name as in `flops.parts` -> Part.
    """
    nets, recipe = job.nets, job.recipe
    how, rows, parts = {"nets": nets, "recipe": recipe}, sharding.batch_sharding(job.mesh), {}
    terms = recipe.vae_weights

    def shardings(net):
        return jax.tree.map(lambda x: x.sharding, net.params)

    for name, encoder, params in zip(sorted(job.config["encoders"]), job.encoders, frozen["encoders"]):
        encode_images = functools.partial(features.encode, encoder)
        parts[f"encoder_{name}"] = Part(encode_images, (params, whole_batch["pixels"]), rows, of_whole=True)

    # ---- the VAE's networks ----------------------------------------------------------------------------------------------
    def encode(params, batch):
        posterior = nets.vae.apply({"params": sharding.unsharded(params)}, batch["images"], method="encode")
        return posterior.sample(batch["draws"].posterior_noise)

    def encode_back(params, batch):
        latents, back = jax.vjp(lambda params: encode(params, batch), params)
        return latents, *back(batch["latents"])

    def decode(params, batch):
        return nets.vae.apply({"params": sharding.unsharded(params)}, batch["latents"], method="decode")

    def decode_back(params, batch):
        recon, back = jax.vjp(lambda params, x: decode(params, {"latents": x}), params, batch["latents"])
        compared = (back(batch["images"])[1],) if compares else ()
        return recon, back(batch["recon"]), *compared

    if terms:
        whole = shardings(state.vae)
        is_fixed = "encoder" in recipe.fixed["vae"]
        compares = "vf" in recipe.adaptive and "gan" in terms  # the pixels' own gradient at the latents with VF's
        arguments = (state.vae.params, batch)
        parts["vae_encoder"] = Part(encode, arguments, rows) if is_fixed else Part(encode_back, arguments, (rows, whole))
        parts["vae_decoder"] = Part(decode_back, arguments, (rows, (whole, rows), *((rows,) if compares else ())))
    elif not job.config["data"]["cache"]:
        of_whole = state.disc is None
        parts["vae_encoder"] = Part(encode, (frozen["vae"], whole_batch if of_whole else batch), rows, of_whole)
        if state.disc is not None:
            parts["vae_decoder"] = Part(decode, (frozen["vae"], batch), rows)

    # ---- the losses at the reconstruction --------------------------------------------------------------------------------
    def lpips(frozen, batch):
        def loss(recon):
            return train_losses.pixel_terms({"lpips": 1.0}, batch["images"], recon, frozen, **how)["lpips"]

        return jax.grad(loss)(batch["recon"])

    def discriminator(net, lecam, batch):
        def generator_loss(recon):
            return adversarial.generator_loss(train_losses.discriminate(nets.disc, net.params, net.batch_stats, recon)[0])

        grads, _ = jax.grad(train_losses.disc_loss, has_aux=True)(
            net.params, batch["images"], batch["recon"], net.batch_stats, lecam, step=recipe.gan_start, **how
        )
        return jax.grad(generator_loss)(batch["recon"]) if "gan" in terms else None, grads

    if "lpips" in terms:
        parts["lpips"] = Part(lpips, (frozen, batch), rows)
    if state.disc is not None:
        shards = (rows if "gan" in terms else None, shardings(state.disc))
        parts["discriminator"] = Part(discriminator, (state.disc, state.lecam, batch), shards)

    # ---- what the latents are held to, and the SiT ------------------------------------------------------------------------
    def regularizer(term, state, frozen, batch):
        function = train_losses.vae_regularizers(state, batch, frozen, **how)[term]
        return jax.grad(function, (0, 1) if term in OF_PARAMETERS else 1)(state.vae.params, batch["latents"])

    for term in (term for term in REGULARIZERS if term in terms):
        shards = (whole, rows) if term in OF_PARAMETERS else rows
        parts[REGULARIZERS[term]] = Part(functools.partial(regularizer, term), (state, frozen, batch), shards)

    def sit(net, stats, batch):
        z, draws = latent_norm.normalize(batch["latents"], stats), batch["draws"]
        labels = train_losses.dropped_labels(batch, nets)
        return jax.value_and_grad(train_losses.sit_loss, has_aux=True)(
            net.params, z, draws.t, draws.noise, labels, batch["targets"], recipe.sit_weights, **how
        )

    if state.sit is not None:
        everywhere = sharding.replicated(job.mesh)
        parts["sit"] = Part(sit, (state.sit, state.latent_stats, batch), (everywhere, shardings(state.sit)))
    return parts


def update(state, grads, *, tx, recipe):
    """The last part: optimizers and averages; `grads` is name of a network -> tree like its parameters."""
    disc_state = None if state.disc is None else (state.disc.batch_stats, state.lecam)
    return train_step.update(state, grads, {}, state.latent_stats, disc_state, tx=tx, recipe=recipe)
