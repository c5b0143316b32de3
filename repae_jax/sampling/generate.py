"""Noise -> latents -> images, with the averaged SiT; shared by the training pictures and `repae_jax.sample`."""

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.diffusion import ddpm, guidance, latent_norm, samplers
from repae_jax.diffusion.samplers import SAMPLERS, Sampling, check_sampler  # noqa: F401
from repae_jax.distributed.sharding import unsharded
from repae_jax.images import to_uint8


class SamplesNotFinite(ValueError):
    """Something in a sample was not finite, which as a pixel would look like a color."""


def make_generate(nets, objective, latent_shape, sampling):
    """Sampling function, to be jitted.

    Everything runs in float32, as published, whatever the compute dtype of training.

    Args:
      nets: Nets.
      objective: what SiT has learned, interpolant.VelocityObjective or ddpm.NoiseObjective.
      latent_shape: (h, w, C).
      sampling: Sampling.

    Returns:
      (params, labels int [B], ids int [B], key) -> (uint8 images [B, H, W, 3], bool [B]: which had only finite values before
      they became pixels). `params` is {'sit': …, 'vae': …, 'latent_stats': ChannelStats}: the averaged SiT and statistics, and
      the VAE. Image i depends on (key, ids[i], labels[i]) alone, not on the batch it is in.

    Raises:
      ValueError: if the sampler does not fit the objective.
    """
    check_sampler(sampling, objective)
    sit, vae = nets.sit.clone(dtype=jnp.float32), nets.vae.clone(dtype=jnp.float32)

    def generate(params, labels, ids, key):
        is_ancestral = sampling.sampler == "ancestral"

        def velocity_fn(z_t, t, y):
            output = sit.apply({"params": unsharded(params["sit"])}, z_t, t, y)[0]
            return output if is_ancestral else output[..., : latent_shape[-1]]  # a SiT's sigma, if it has one, is unused

        def plain(z_t, t):
            return velocity_fn(z_t, t, labels)

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)

        def noise_fn(index):
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), latent_shape))(keys)

        make_times = {"sde": samplers.sde_times, "ancestral": ddpm.timesteps}.get(sampling.sampler, samplers.ode_times)
        times = make_times(sampling.steps)
        segments = [(times, plain)]
        if sampling.guidance_scale > 1:
            channels = sampling.guidance_channels or latent_shape[-1]
            guided = guidance.guide(velocity_fn, labels, sit.null_label, sampling.guidance_scale, channels)
            last = ddpm.NUM_TIMESTEPS - 1 if is_ancestral else 1
            interval = sampling.guidance_low * last, sampling.guidance_high * last
            segments = guidance.segments(times, interval, guided, plain)
        z = noise_fn(sampling.steps)  # an index that no step uses
        if is_ancestral:
            z = ddpm.ancestral(segments, z, noise_fn)
        elif sampling.sampler == "sde":
            z = samplers.euler_maruyama(segments, z, objective.path, noise_fn)
        else:
            z = (samplers.heun if sampling.sampler == "heun" else samplers.euler)(segments, z)
        latents = latent_norm.denormalize(z, params["latent_stats"])
        decoded = vae.apply({"params": unsharded(params["vae"])}, latents, method="decode")
        return to_uint8(decoded), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    def precise(*args):
        # float32 means float32 on every platform: at least three bfloat16 passes on TPUs, TF32 on GPUs as published
        with jax.default_matmul_precision("high"):
            return generate(*args)

    return precise


def in_batches(run, params, labels, batch_size, key, put, skip=()):
    """Any number of samples, batch by batch.

    Args:
      run: what `make_generate` returns, jitted.
      params: its first argument.
      labels: int32 numpy [N]; the ids are 0..N - 1.
      batch_size: images at a time; a multiple of the devices.
      key: of the noise.
      put: places an array with one entry per image on the devices.
      skip: indices of batches not to make.

    Yields:
      (index of the batch, uint8 numpy [b, H, W, 3]); the last batch is shorter if batch_size does not divide N.

    Raises:
      SamplesNotFinite: if one is not.
    """
    for index, first in enumerate(range(0, len(labels), batch_size)):
        if index in skip:
            continue
        ids = np.arange(first, first + batch_size)  # the last batch is filled up, so that one program serves all
        made, finite = run(params, put(labels[np.minimum(ids, len(labels) - 1)]), put(ids), key)
        broken = ids[~np.asarray(finite)]
        if len(broken):
            raise SamplesNotFinite(
                f"{len(broken)} of {batch_size} samples are not finite, first number {broken[0]}: the weights are damaged, or "
                "their training has diverged; take an earlier step"
            )
        yield index, np.asarray(made)[: len(labels) - first]


def sampling_params(state, frozen):
    """What `make_generate` needs of a TrainState, with the frozen VAE if it has none."""
    vae = frozen["vae"] if state.vae is None else state.vae.params
    return {"sit": state.ema.params, "vae": vae, "latent_stats": state.ema.latent_stats}


def make_reconstruct(nets):
    """(VAE parameters, float images [B, H, W, 3] in [-1, 1]) -> uint8 reconstructions through the posterior's mean."""

    def reconstruct(vae_params, images):
        variables = {"params": unsharded(vae_params)}
        posterior = nets.vae.apply(variables, images, method="encode")
        return to_uint8(nets.vae.apply(variables, posterior.mode(), method="decode"))

    return reconstruct
