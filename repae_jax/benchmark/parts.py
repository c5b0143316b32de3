"""The parts of a training step as programs of their own: forward pass and the gradients that the step takes."""

import itertools
from collections.abc import Callable, Mapping
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
    """A program."""

    function: Callable  # pure
    arguments: tuple[Any, ...]  # trees of arrays
    out_shardings: Any  # argument of jax.jit
    of_whole: bool = False  # the step runs it on the whole batch, once, and not on every micro-batch


class Batch(NamedTuple):
    """Random images, and the inputs of a step from them; its latents and recon are random, too."""

    pixels: UInt8[Array, "B H W 3"]
    x: Inputs


class Context(NamedTuple):
    """Inputs of all parts: the job, its state and frozen weights, a batch and a micro-batch, and the sharding of a batch."""

    job: build.Job
    state: Any
    frozen: Mapping[str, Any]
    whole: Batch
    micro: Batch
    rows: Any


def make_batch(job: build.Job, pixels: UInt8[Array, "B H W 3"], key: Array) -> Batch:
    """Returns random inputs for the losses of a step on images."""
    count, keys = len(pixels), named_keys(key, 0, "labels", "targets", "latents", "recon")
    shape = (count, *job.latent_shape)
    x = Inputs(
        images=to_float(pixels),
        labels=jax.random.randint(keys["labels"], (count,), 0, job.config["data"]["num_classes"]),
        targets=tuple(jax.random.normal(keys["targets"], (count, e.num_tokens, e.module.hidden_size)) for e in job.encoders),
        latents=jax.random.normal(keys["latents"], shape),
        recon=jnp.tanh(jax.random.normal(keys["recon"], pixels.shape)),
        **sample_noise(key, 0, shape, job.recipe),
    )
    return Batch(pixels, x)


def make_parts(job: build.Job, state: Any, frozen: Mapping[str, Any], whole: Batch, micro: Batch) -> dict[str, Part]:
    """Returns the parts of a job's step by name, but for `update`; `whole` and `micro` are results of `make_batch`.

    They need not add up to the step, whose compiler fuses, shares and reorders across them, and which has more to do.
    """
    c = Context(job, state, frozen, whole, micro, sharding.batch_sharding(job.mesh))
    makers = (_encoders, _vae, _vae_terms, _discriminator, _sit)
    return dict(itertools.chain.from_iterable(make(c, bind(job.nets)) for make in makers))


def _shardings(net):
    return jax.tree.map(lambda x: x.sharding, net.params)


def _encoders(c, nets):
    for name, encoder, params in zip(sorted(c.job.config["encoders"]), c.job.encoders, c.frozen["encoders"]):
        yield f"encoder_{name}", Part(partial(encoders.encode, encoder), (params, c.whole.pixels), c.rows, of_whole=True)


def _last_kernel(name, tree):
    return tree[name]["conv_out"]["kernel"]


def _vae(c, nets):
    recipe = c.job.recipe
    adapts = getattr(recipe, "adaptive", ())  # each costs two gradients of one layer, and VF's the pixels' of the latents
    compares = "vf" in adapts and "gan" in recipe.vae_weights

    def encode(params, x):
        return nets.vae.encode(params, x.images).sample(x.posterior_noise)

    def encode_and_back(params, x):
        latents, vjp = jax.vjp(partial(encode, x=x), params)
        return latents, *vjp(x.latents), [_last_kernel("encoder", vjp(ct)[0]) for ct in (latents, -x.latents) if "vf" in adapts]

    def decode(params, x):
        return nets.vae.decode(params, x.latents)

    def decode_and_back(params, x):
        recon, vjp = jax.vjp(nets.vae.decode, params, x.latents)
        kernels = [_last_kernel("decoder", vjp(ct)[0]) for ct in (x.images, recon) if "gan" in adapts]
        return recon, vjp(x.recon), [vjp(x.images)[1]] if compares else [], kernels

    if c.state.vae is not None:
        arguments, params = (c.state.vae.params, c.micro.x), _shardings(c.state.vae)
        of_encoder = c.rows, params, [_last_kernel("encoder", params)] * 2 * ("vf" in adapts)
        of_decoder = c.rows, (params, c.rows), [c.rows] * compares, [_last_kernel("decoder", params)] * 2 * ("gan" in adapts)
        is_fixed = "encoder" in recipe.fixed["vae"]
        yield "vae_encoder", Part(encode, arguments, c.rows) if is_fixed else Part(encode_and_back, arguments, of_encoder)
        yield "vae_decoder", Part(decode_and_back, arguments, of_decoder)
        return
    of_whole = c.state.disc is None
    if not c.job.config["data"]["cache"]:
        yield "vae_encoder", Part(encode, (c.frozen["vae"], c.whole.x if of_whole else c.micro.x), c.rows, of_whole)
    if not of_whole:
        yield "vae_decoder", Part(decode, (c.frozen["vae"], c.micro.x), c.rows)


def _vae_terms(c, nets):
    """The VAE's loss terms and their gradients: of latents and reconstruction, or of parameters and latents."""
    recipe = c.job.recipe
    is_fixed = "encoder" in recipe.fixed.get("vae", ())  # then nothing needs the gradient of the latents

    def grads_of_pass(term, state, frozen, x):
        def loss(latents, recon):
            return VAE_TERMS[term](VaePass(x, recon, frozen, nets, recipe, latents=latents, state=state))

        return jax.value_and_grad(loss, (1,) if is_fixed else (0, 1))(x.latents, x.recon)

    def grads_of_latents(term, params, frozen, x):
        loss = partial(LATENT_TERMS[term], x=x, nets=nets, frozen=frozen, recipe=recipe)
        return jax.grad(loss, (0, 1))(params, x.latents)

    for term in recipe.vae_weights:
        if term in LATENT_TERMS:
            arguments = c.state.vae.params, c.frozen, c.micro.x
            yield term, Part(partial(grads_of_latents, term), arguments, (_shardings(c.state.vae), c.rows))
        elif term not in UNTIMED_TERMS:
            yield term, Part(partial(grads_of_pass, term), (c.state, c.frozen, c.micro.x), (None, (c.rows,) * (2 - is_fixed)))


def _discriminator(c, nets):
    """The discriminator's loss together with the generator's pass through it."""
    has_generator = "gan" in c.job.recipe.vae_weights

    def grads(net, lecam, x):
        def gan_loss(recon):
            return generator_loss(nets.disc(net.params, net.batch_stats, recon)[0])

        loss = partial(disc_loss, gan_factor=1.0, nets=nets, recipe=c.job.recipe)
        of_params, _ = jax.grad(loss, has_aux=True)(net.params, x, (net.batch_stats, lecam))
        return jax.grad(gan_loss)(x.recon) if has_generator else None, of_params

    if c.state.disc is not None:
        outs = c.rows if has_generator else None, _shardings(c.state.disc)
        yield "discriminator", Part(grads, (c.state.disc, c.state.lecam, c.micro.x), outs)


def _sit(c, nets):
    def grads(params, average, stats, x):
        fields = {"weights": c.job.recipe.sit_weights, "nets": nets, "recipe": c.job.recipe}
        loss = partial(sit_loss, stats=stats, average=average, **fields)
        return jax.grad(loss, has_aux=True)(params, x, None)[0]

    if c.state.sit is not None:
        arguments = c.state.sit.params, c.state.ema.params, c.state.latent_stats, c.micro.x
        yield "sit", Part(grads, arguments, _shardings(c.state.sit))


def update(state: Any, grads: Mapping[str, Any], *, tx: Any, recipe: Any) -> tuple[Any, dict[str, Array]]:
    """Runs the last part of a step, optimizers and averages; `grads` is name of a network -> tree like its parameters."""
    disc_carry = None if state.disc is None else (state.disc.batch_stats, state.lecam)
    return finish_step(state, grads, {}, tx=tx, recipe=recipe, latent_stats=state.latent_stats, disc_carry=disc_carry)
