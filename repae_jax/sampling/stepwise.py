"""Sampling one step at a time, for people who change settings: one program serves all numbers of steps, scales and intervals.

    stepper = Stepper(model.nets, model.objective, model.latent_shape)
    for t, z in stepper.steps(model.params, labels, jax.random.key(0), Sampling("euler", 20, guidance_scale=2.0)):
        images = stepper.decode(model.params, z)

The noise is that of `generate.make_generate`, and the last latents are those that it decodes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from repae_jax.diffusion import guidance, latent_norm
from repae_jax.diffusion.samplers import SAMPLERS, Interval, Sampling, check_sampler
from repae_jax.images import to_uint8


class Point(NamedTuple):
    """Latents on the way from noise to data."""

    t: float  # from 1, noise, to 0, data; DiT's timestep 0 and data are both 0
    z: Float[Array, "B h w C"]  # normalized


@dataclasses.dataclass(frozen=True)
class Stepper:
    """Programs for single steps with networks of one shape; see `repae_jax.sampling.load_model.LoadedModel` for the fields."""

    nets: Any
    objective: Any
    latent_shape: tuple[int, int, int]

    @functools.cached_property
    def _noise(self):
        def noise(key, ids, index):
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), index))(ids)
            return jax.vmap(lambda k: jax.random.normal(k, self.latent_shape))(keys)

        return jax.jit(noise)

    @functools.cached_property
    def _step(self):
        sit = self.nets.sit.clone(dtype=jnp.float32, attention="xla")

        @functools.partial(jax.jit, static_argnames=("sampler", "is_last", "channels"))
        @jax.default_matmul_precision("high")
        def step(params, z, interval, labels, ids, key, scale, *, sampler, is_last, channels):
            def conditional(z_t, t, y):
                return sit.apply({"params": params["sit"]}, z_t, t, y)[0]

            def plain(z_t, t):
                return conditional(z_t, t, labels)

            guided = guidance.guide(conditional, labels, sit.null_label, scale, channels) if channels else plain
            method = SAMPLERS[sampler]
            one = method.last_step if is_last else method.step
            return one(z, interval, guided, lambda index: self._noise(key, ids, index), self.objective)

        return step

    @functools.cached_property
    def _decode(self):
        vae = self.nets.vae.clone(dtype=jnp.float32)

        @jax.jit
        @jax.default_matmul_precision("high")
        def decode(params, z):
            latents = latent_norm.denormalize(z, params["latent_stats"])
            return to_uint8(vae.apply({"params": params["vae"]}, latents, method="decode"))

        return decode

    def steps(self, params: Any, labels: Int[np.ndarray, " B"], key: Array, sampling: Sampling) -> Iterator[Point]:
        """Yields every point on the way from noise to data; image i depends on (key, i, labels[i]) and the settings alone.

        `params` and `key` are as of the function that `generate.make_generate` returns; the precision is float32.
        """
        check_sampler(sampling, self.objective)
        method = SAMPLERS[sampling.sampler]
        times = method.times(sampling.steps)
        coefficients = method.coefficients(times[:-1], times[1:])
        low, high = (end * times[0] for end in (sampling.guidance_low, sampling.guidance_high))
        channels = sampling.guidance_channels or self.latent_shape[-1]
        exception = None if method.last_step is None else sampling.steps - 1  # the step with a program of its own
        labels, ids = jnp.asarray(labels, jnp.int32), jnp.arange(len(labels))
        z = self._noise(key, ids, sampling.steps)
        yield Point(1.0, z)
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
            at_step = jax.tree.map(lambda table, i=i: table[i], coefficients)
            interval = jax.tree.map(jnp.asarray, Interval(t, t_next, i, at_step))
            is_guided = sampling.guidance_scale > 1 and low <= t <= high
            settings = {"sampler": sampling.sampler, "is_last": i == exception, "channels": channels * is_guided}
            z = self._step(params, z, interval, labels, ids, key, jnp.float32(sampling.guidance_scale), **settings)
            yield Point(max(float(t_next / times[0]), 0.0), z)

    def decode(self, params: Any, z: Float[Array, "B h w C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Returns the images of normalized latents."""
        return np.asarray(self._decode(params, z))
