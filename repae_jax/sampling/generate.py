"""Noise -> latents -> images, with the averaged SiT; shared by the training pictures and `repae_jax.sample`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from repae_jax.diffusion import guidance, latent_norm
from repae_jax.diffusion.samplers import SAMPLERS, Sampling, check_sampler
from repae_jax.distributed.sharding import unsharded
from repae_jax.images import to_uint8


class SamplesNotFinite(ValueError):
    """A sample was not finite, which as a pixel would look like a color."""


def make_generate(nets: Any, objective: Any, latent_shape: tuple[int, int, int], sampling: Sampling) -> Callable:
    """Returns the sampling function, to be jitted. Its precision is the sampling's, whatever the compute dtype of training.

    In bfloat16 the SiT computes as it does in training, with its matrices cast once for all steps; the sampler's state,
    denormalization and decoding stay in float32.

    Returns:
      (params, labels int [B], ids int [B], key) -> (uint8 images [B, H, W, 3], bool [B]: which had only finite values before
      they became pixels). `params` is {'sit': …, 'vae': …, 'latent_stats': ChannelStats}: the averaged SiT and statistics, and
      the VAE. Image i depends on (key, ids[i], labels[i]) alone, not on the batch it is in.
    """
    check_sampler(sampling, objective)
    dtype, sampler = jnp.dtype(sampling.precision), SAMPLERS[sampling.sampler]
    sit, vae = nets.sit.clone(dtype=dtype, attention="xla"), nets.vae.clone(dtype=jnp.float32)

    def sample_latents(params, labels, noise_fn):
        matrices = cast_matrices(params["sit"], dtype)

        def conditional(z_t, t, y):
            return sit.apply({"params": unsharded(matrices)}, z_t, t, y)[0]

        def plain(z_t, t):
            return conditional(z_t, t, labels)

        times = sampler.times(sampling.steps)
        segments = [(times, plain)]
        if sampling.guidance_scale > 1:
            channels = sampling.guidance_channels or latent_shape[-1]
            guided = guidance.guide(conditional, labels, sit.null_label, sampling.guidance_scale, channels)
            interval = sampling.guidance_low * times[0], sampling.guidance_high * times[0]
            segments = guidance.segments(times, interval, guided, plain)
        initial = noise_fn(sampling.steps)  # an index that no step uses
        return latent_norm.denormalize(sampler.integrate(segments, initial, noise_fn, objective), params["latent_stats"])

    # float32 means float32 on every platform: at least three bfloat16 passes on TPUs, TF32 on GPUs as published
    @jax.default_matmul_precision("high")
    def generate(params, labels, ids, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)

        def noise_fn(index):
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), latent_shape))(keys)

        latents = sample_latents(params, labels, noise_fn)
        decoded = vae.apply({"params": unsharded(params["vae"])}, latents, method="decode")
        return to_uint8(decoded), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    return generate


def cast_matrices(params: Any, dtype: DTypeLike) -> Any:
    """Returns a SiT's parameters with the kernels in its compute dtype, which it would cast them to at every call."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def in_batches(
    run: Callable, params: Mapping[str, Any], labels: Int[np.ndarray, " N"], batch_size: int, key: Array, put: Callable,
    skip: Collection[int] = (),
) -> Iterator[tuple[int, UInt8[np.ndarray, "b H W 3"]]]:  # fmt: skip
    """Samples any number of images; SamplesNotFinite for one that is not finite.

    Args:
      run: result of `make_generate`, jitted.
      params: its first argument.
      labels: the ids are 0..N - 1.
      batch_size: images at a time; a multiple of the devices.
      key: for the noise.
      put: places an array with one entry per image on the devices.
      skip: indices of batches to leave out.

    Yields:
      (index of the batch, its images); the last batch is shorter if batch_size does not divide N.
    """
    for index, first in enumerate(range(0, len(labels), batch_size)):
        if index in skip:
            continue
        ids = np.arange(first, first + batch_size)  # the last batch is filled up, so that one program serves all
        images, finite = run(params, put(labels[np.minimum(ids, len(labels) - 1)]), put(ids), key)
        broken = ids[~np.asarray(finite)]
        if len(broken):
            found = f"{len(broken)} of {batch_size} samples are not finite, first number {broken[0]}"
            cause = "the weights are damaged, or their training has diverged; take an earlier step"
            raise SamplesNotFinite(f"{found}: {cause}")
        yield index, np.asarray(images)[: len(labels) - first]


def sampling_params(state: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters for `make_generate` from a TrainState, with the frozen VAE if it has none."""
    vae = frozen["vae"] if state.vae is None else state.vae.params
    return {"sit": state.ema.params, "vae": vae, "latent_stats": state.ema.latent_stats}


def make_reconstruct(nets: Any) -> Callable:
    """Returns (VAE parameters, float images in [-1, 1]) -> uint8 reconstructions through the posterior's mean."""

    def reconstruct(vae_params: Any, images: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        variables = {"params": unsharded(vae_params)}
        posterior = nets.vae.apply(variables, images, method="encode")
        return to_uint8(nets.vae.apply(variables, posterior.mode(), method="decode"))

    return reconstruct
