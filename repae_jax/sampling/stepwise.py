"""Sampling one step at a time, for people who change settings: one program serves all of them that are numbers.

    stepper = Stepper(model.nets, model.objective, model.latent_shape)
    for t, z in stepper.steps(model.params, labels, jax.random.key(0), Sampling("euler", 20, guidance_scale=2.0)):
        images = stepper.decode(model.params, z)

The noise is that of `generate.make_generate`, and the last latents are those that it decodes; those of an adaptive sampler are
that within its tolerance, as it stops at every step here.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from repae_jax.diffusion import guidance, latent_norm
from repae_jax.diffusion.samplers import SAMPLERS, Interval, Sampling, check_sampler, check_weaker
from repae_jax.images import to_uint8
from repae_jax.sampling import generate


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

        @functools.partial(jax.jit, static_argnames=("method", "is_last", "channels", "internal_channels", "schedule"))
        @jax.default_matmul_precision("high")
        def step(params, state, interval, labels, ids, key, scales, *, method, is_last, channels, internal_channels, schedule):
            def conditional(z_t, t, y):
                return sit.apply({"params": params["sit"]}, z_t, t, y)[0]

            def plain(z_t, t):
                return output_fn(z_t, t, labels)

            scale, internal_scale, power, noise_time = scales
            output_fn = conditional
            if internal_channels:
                output_fn = guidance.away_from(generate.head_pair(sit, params), internal_scale, internal_channels)
            scale = guidance.scheduled_scale(schedule, scale, power, noise_time)
            guided = self.objective.guide(output_fn, labels, sit.null_label, scale, channels) if channels else plain
            given = interval, guided, lambda index: self._noise(key, ids, index), self.objective
            return method.start(method.last_step(method.position(state), *given)) if is_last else method.step(state, *given)

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
        check_weaker(sampling, sampling.internal_scale > 1 and self.nets.sit.internal_head, has_network=False)
        method, program = sampling.method, SAMPLERS[sampling.sampler]
        times = method.times(sampling.steps)
        segments = self._segments(times, sampling)
        exception = None if method.last_step is None else sampling.steps - 1  # the step with a program of its own
        labels, ids = jnp.asarray(labels, jnp.int32), jnp.arange(len(labels))
        scales = sampling.guidance_scale, sampling.internal_scale, sampling.guidance_power, times[0]
        given = labels, ids, key, tuple(map(jnp.float32, scales))
        z, index = self._noise(key, ids, sampling.steps), itertools.count()
        yield Point(1.0, z)
        for part, guided in segments:
            state = method.start(z)
            for interval in self._intervals(method, part, index):
                settings = {"is_last": interval.index == exception, "schedule": sampling.guidance_schedule, **guided}
                state = self._step(params, state, jax.tree.map(jnp.asarray, interval), *given, method=program, **settings)
                z = method.position(state)
                yield Point(max(float(interval.t_next / times[0]), 0.0), z)

    def _segments(self, times, sampling):
        """Returns the segments of a grid of times, each with the numbers of channels that are guided in it, and how."""
        channels = sampling.guidance_channels or self.latent_shape[-1]
        internal, guided = channels * (sampling.internal_scale > 1), channels * (sampling.guidance_scale > 1)
        ends = sampling.guidance_low * times[0], sampling.guidance_high * times[0]
        weaker_ends = sampling.weaker_low * times[0], sampling.weaker_high * times[0]
        return [
            (piece, {"internal_channels": inner, "channels": outer})
            for part, inner in guidance.segments(times, weaker_ends, internal, 0)
            for piece, outer in guidance.segments(part, ends, guided, 0)
        ]

    def _intervals(self, method, times, index):
        """Yields the steps of a segment, with numbers of the counter `index`."""
        coefficients = method.coefficients(times[:-1], times[1:], self.objective)
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            yield Interval(t, t_next, next(index), jax.tree.map(lambda table, i=i: table[i], coefficients))

    def decode(self, params: Any, z: Float[Array, "B h w C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Returns the images of normalized latents."""
        return np.asarray(self._decode(params, z))
