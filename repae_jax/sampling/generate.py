"""Noise -> latents -> images, with the averaged SiT; shared by the training pictures and `repae_jax.sample`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from repae_jax.diffusion import guidance, latent_norm
from repae_jax.diffusion.samplers import Sampling, Segments, check_channels, check_sampler, check_weaker
from repae_jax.distributed.sharding import unsharded
from repae_jax.images import to_uint8
from repae_jax.models.sit import with_tap


class SamplesNotFinite(ValueError):
    """A sample was not finite, which as a pixel would look like a color."""


def make_generate(
    nets: Any, objective: Any, latent_shape: tuple[int, int, int], sampling: Sampling, weaker: Any = None
) -> Callable:
    """Returns the sampling function, to be jitted. Its precision is the sampling's, whatever the compute dtype of training.

    In bfloat16 the SiT computes as it does in training, with its matrices cast once for all steps; the sampler's state,
    denormalization and decoding stay in float32.

    Args:
      nets, objective, latent_shape: as of a `load_model.LoadedModel`.
      sampling: the settings.
      weaker: SiT to guide away from, of autoguidance.

    Returns:
      (params, labels int [B], ids int [B], key) -> (uint8 images [B, H, W, 3], bool [B]: which had only finite values before
      they became pixels). `params` is {'sit': …, 'vae': …, 'latent_stats': ChannelStats}: the averaged SiT and statistics, and
      the VAE; and 'weaker', if there is one. Image i depends on (key, ids[i], labels[i]) alone, not on the batch it is in; but
      an adaptive sampler's steps suit its whole batch.
    """
    check_sampler(sampling, objective)
    check_channels(sampling, latent_shape[-1])
    check_weaker(sampling, sampling.internal_scale > 1 and nets.sit.internal_head, weaker is not None)
    dtype, sampler = jnp.dtype(sampling.precision), sampling.method
    vae = nets.vae.clone(dtype=jnp.float32)

    def sample_latents(params, labels, noise_fn):
        matrices = {name: cast_matrices(params[name], dtype) for name in ("sit", "weaker") if name in params}
        fields = {"nets": nets, "weaker": weaker, "objective": objective, "sampling": sampling, "channels": latent_shape[-1]}
        segments = guided_segments(sampler.times(sampling.steps), matrices, labels, **fields)
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


def guided_segments(
    times: np.ndarray, params: Mapping[str, Any], labels: Int[Array, " B"], *, nets: Any, weaker: Any, objective: Any,
    sampling: Sampling, channels: int,
) -> Segments:  # fmt: skip
    """Returns the segments of a grid of times with their output functions, guided as the settings say.

    Args:
      params: {'sit': …}, and 'weaker' if there is such a network.
      channels: of the latents; the others are arguments of `make_generate`.
    """
    computed = {"dtype": jnp.dtype(sampling.precision), "attention": "xla"}
    sit, guided_channels = nets.sit.clone(**computed), sampling.guidance_channels or channels

    def conditional(z_t, t, y):
        return sit.apply({"params": unsharded(params["sit"])}, z_t, t, y)[0]

    def fixed(output_fn):
        return lambda z_t, t: output_fn(z_t, t, labels)

    def interval(low, high):
        return low * times[0], high * times[0]

    pieces = [(times, conditional)]
    if sampling.autoguidance_scale > 1 or sampling.internal_scale > 1:
        pair = head_pair(sit, params) if weaker is None else _network_pair(sit, weaker.clone(**computed), params)
        scale = max(sampling.autoguidance_scale, sampling.internal_scale)  # the other one is 1
        guided = guidance.away_from(pair, scale, guided_channels)
        pieces = guidance.segments(times, interval(sampling.weaker_low, sampling.weaker_high), guided, conditional)
    if sampling.guidance_scale == 1:
        return [(part, fixed(output_fn)) for part, output_fn in pieces]
    by = guidance.scheduled_scale(sampling.guidance_schedule, sampling.guidance_scale, sampling.guidance_power, float(times[0]))
    ends, segments = interval(sampling.guidance_low, sampling.guidance_high), []
    for part, output_fn in pieces:
        guided = objective.guide(output_fn, labels, sit.null_label, by, guided_channels)
        segments += guidance.segments(part, ends, guided, fixed(output_fn))
    return segments


def head_pair(sit: Any, params: Mapping[str, Any]) -> Callable:
    """Returns (z_t, t, labels) -> (output, that of the head at the tap), from one pass."""

    def outputs(z_t, t, y):
        output, tap = with_tap(sit, unsharded(params["sit"]), z_t, t, y)
        return output, tap.output

    return outputs


def _network_pair(sit, weaker, params):
    """Returns (z_t, t, labels) -> (output, the weaker network's)."""

    def outputs(z_t, t, y):
        modules = {"sit": sit, "weaker": weaker}
        return tuple(module.apply({"params": unsharded(params[name])}, z_t, t, y)[0] for name, module in modules.items())

    return outputs


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
