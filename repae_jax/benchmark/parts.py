"""The parts of a training step as programs of their own: forward pass and the gradients that the step takes."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from repae_jax.distributed import sharding
from repae_jax.images import to_float
from repae_jax.job import build
from repae_jax.losses.adversarial import generator_loss
from repae_jax.models import encoders
from repae_jax.tokenizer_step import LATENT_TERMS
from repae_jax.train_step import VAE_TERMS, VaePass, disc_loss, sit_loss
from repae_jax.training.inputs import Inputs, sample_noise
from repae_jax.training.networks import bind
from repae_jax.training.rng import named_keys
from repae_jax.training.state import finish_step

UNTIMED_TERMS = ("l1", "l2", "kl", "gan")  # no products in them, or timed with the discriminator


class Part(NamedTuple):
    """A program.

    Attributes:
      function: pure function of the arguments.
      arguments: trees of arrays.
      out_shardings: argument of jax.jit.
      of_whole: the step runs it on the whole batch, once, and not on every micro-batch.
    """

    function: Callable
    arguments: tuple[Any, ...]
    out_shardings: Any
    of_whole: bool = False


class Batch(NamedTuple):
    """Random images, and the inputs of a step from them; its latents and recon are random, too."""

    pixels: UInt8[Array, "B H W 3"]
    x: Inputs


class Context(NamedTuple):
    """Everything that parts are made of.

    Attributes:
      job: Job.
      state: TrainState.
      frozen: result of `build.load_frozen`.
      whole, micro: the batch, and a micro-batch.
    """

    job: build.Job
    state: Any
    frozen: Mapping[str, Any]
    whole: Batch
    micro: Batch

    @property
    def rows(self) -> Any:
        """Returns the sharding of arrays with a leading batch axis."""
        return sharding.batch_sharding(self.job.mesh)

    @property
    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of every loss."""
        return {"nets": bind(self.job.nets), "recipe": self.job.recipe}


def make_batch(job: build.Job, pixels: UInt8[Array, "B H W 3"], key: Array) -> Batch:
    """Returns random inputs for the losses of a step on images."""
    count, keys = len(pixels), named_keys(key, 0, "labels", "targets", "latents", "recon")
    shape = (count, *job.latent_shape)
    inputs = Inputs(
        images=to_float(pixels),
        labels=jax.random.randint(keys["labels"], (count,), 0, job.config["data"]["num_classes"]),
        targets=tuple(jax.random.normal(keys["targets"], (count, e.grid**2, e.module.hidden_size)) for e in job.encoders),
        latents=jax.random.normal(keys["latents"], shape),
        recon=jnp.tanh(jax.random.normal(keys["recon"], pixels.shape)),
        **sample_noise(key, 0, shape, job.recipe),
    )
    return Batch(pixels, inputs)


def make_parts(job: build.Job, state: Any, frozen: Mapping[str, Any], whole: Batch, micro: Batch) -> dict[str, Part]:
    """Returns the parts of a job's step by name, but for `update`.

    They need not add up to the step, whose compiler fuses, shares and reorders across them, and which has more to do.

    Args:
      job: Job.
      state: TrainState.
      frozen: result of `build.load_frozen`.
      whole, micro: results of `make_batch`, of the step's batch and of a micro-batch.
    """
    c = Context(job, state, frozen, whole, micro)
    makers = (encoder_parts, vae_parts, vae_term_parts, discriminator_parts, sit_parts)
    return dict(itertools.chain.from_iterable(make(c) for make in makers))


def _shardings(net):
    return jax.tree.map(lambda x: x.sharding, net.params)


def encoder_parts(c: Context) -> Iterator[tuple[str, Part]]:
    """Yields a forward pass of each encoder."""
    for name, encoder, params in zip(sorted(c.job.config["encoders"]), c.job.encoders, c.frozen["encoders"]):
        yield f"encoder_{name}", Part(partial(encoders.encode, encoder), (params, c.whole.pixels), c.rows, of_whole=True)


# ---- the VAE ----------------------------------------------------------------------------------------------------------


def vae_parts(c: Context) -> Iterator[tuple[str, Part]]:
    """Yields encoder and decoder, with gradients where they are trained."""
    recipe, nets, x = c.job.recipe, c.options["nets"], c.micro.x
    if c.state.vae is None:
        if not c.job.config["data"]["cache"]:
            of_whole = c.state.disc is None
            arguments = c.frozen["vae"], c.whole.x if of_whole else x
            yield "vae_encoder", Part(partial(encode, nets), arguments, c.rows, of_whole)
        if c.state.disc is not None:
            yield "vae_decoder", Part(partial(decode, nets), (c.frozen["vae"], x), c.rows)
        return
    params = _shardings(c.state.vae)
    compares = "vf" in getattr(recipe, "adaptive", ()) and "gan" in recipe.vae_weights
    if "encoder" in recipe.fixed["vae"]:
        yield "vae_encoder", Part(partial(encode, nets), (c.state.vae.params, x), c.rows)
    else:
        yield "vae_encoder", Part(partial(encode_and_back, nets), (c.state.vae.params, x), (c.rows, params))
    outs = c.rows, (params, c.rows), *((c.rows,) if compares else ())
    yield "vae_decoder", Part(partial(decode_and_back, nets, compares), (c.state.vae.params, x), outs)


def encode(nets, params, x: Inputs):
    """Returns sampled latents."""
    return nets.vae.encode(params, x.images).sample(x.posterior_noise)


def encode_and_back(nets, params, x: Inputs):
    """Returns sampled latents and a gradient of the parameters."""
    latents, vjp = jax.vjp(lambda params: encode(nets, params, x), params)
    return latents, *vjp(x.latents)


def decode(nets, params, x: Inputs):
    """Returns reconstructions."""
    return nets.vae.decode(params, x.latents)


def decode_and_back(nets, compares, params, x: Inputs):
    """Returns reconstructions, gradients of parameters and latents and, if VF's weight adapts, the pixels' own of latents."""
    recon, vjp = jax.vjp(nets.vae.decode, params, x.latents)
    return recon, vjp(x.recon), *((vjp(x.images)[1],) if compares else ())


def vae_term_parts(c: Context) -> Iterator[tuple[str, Part]]:
    """Yields the gradients of the VAE's loss terms where they meet, at latents and reconstruction or at parameters."""
    for term in c.job.recipe.vae_weights:
        if term in LATENT_TERMS:
            arguments = c.state.vae.params, c.frozen, c.micro.x
            yield term, Part(partial(latent_term, term, **c.options), arguments, (_shardings(c.state.vae), c.rows))
        elif term not in UNTIMED_TERMS:
            yield term, Part(partial(vae_term, term, **c.options), (c.state, c.frozen, c.micro.x), (c.rows, c.rows))


def vae_term(term, state, frozen, x: Inputs, *, nets, recipe):
    """Returns gradients of latents and reconstruction."""

    def loss(latents, recon):
        return VAE_TERMS[term](VaePass(x, None, latents, recon, None, state, frozen, nets, recipe))

    return jax.grad(loss, (0, 1))(x.latents, x.recon)


def latent_term(term, params, frozen, x: Inputs, *, nets, recipe):
    """Returns gradients of parameters and latents."""
    loss = partial(LATENT_TERMS[term], x=x, nets=nets, frozen=frozen, recipe=recipe)
    return jax.grad(loss, (0, 1))(params, x.latents)


# ---- discriminator, SiT, update -----------------------------------------------------------------------------------------


def discriminator_parts(c: Context) -> Iterator[tuple[str, Part]]:
    """Yields the discriminator's loss together with the generator's pass through it."""
    if c.state.disc is not None:
        has_generator = "gan" in c.job.recipe.vae_weights
        outs = c.rows if has_generator else None, _shardings(c.state.disc)
        function = partial(discriminate, has_generator, **c.options)
        yield "discriminator", Part(function, (c.state.disc, c.state.lecam, c.micro.x), outs)


def discriminate(has_generator, net, lecam, x: Inputs, *, nets, recipe):
    """Returns the generator's gradient of the reconstruction, or None, and the discriminator's of its parameters."""

    def gan(recon):
        return generator_loss(nets.disc(net.params, net.batch_stats, recon)[0])

    loss = partial(disc_loss, gan_factor=1.0, nets=nets, recipe=recipe)
    grads, _ = jax.grad(loss, has_aux=True)(net.params, x, (net.batch_stats, lecam))
    return jax.grad(gan)(x.recon) if has_generator else None, grads


def sit_parts(c: Context) -> Iterator[tuple[str, Part]]:
    """Yields the SiT's loss and its gradient."""
    if c.state.sit is not None:
        outs = sharding.replicated(c.job.mesh), _shardings(c.state.sit)
        yield "sit", Part(partial(train_sit, **c.options), (c.state.sit.params, c.state.latent_stats, c.micro.x), outs)


def train_sit(params, stats, x: Inputs, *, nets, recipe):
    """Returns the loss and the gradient of the parameters."""
    loss = partial(sit_loss, stats=stats, weights=recipe.sit_weights, nets=nets, recipe=recipe)
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, x, None)
    return value, grads


def update(state: Any, grads: Mapping[str, Any], *, tx: Any, recipe: Any) -> tuple[Any, dict[str, Array]]:
    """Runs the last part of a step, optimizers and averages; `grads` is name of a network -> tree like its parameters."""
    disc_carry = None if state.disc is None else (state.disc.batch_stats, state.lecam)
    return finish_step(state, grads, {}, tx=tx, recipe=recipe, latent_stats=state.latent_stats, disc_carry=disc_carry)
