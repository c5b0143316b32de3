"""Samplers, from noise to data: a table of methods, and the settings of a run of one.

A sampler integrates an output function over segments of time; it knows no labels and no guidance. State and times are float32.
The published code keeps the state in float64 between float32 network calls, a difference below 2e-5 of the largest entry in the
parity tests. Reference: REPA-E's `samplers.py`; for DiT's, `ddpm.py`.

To add a sampler, write a subclass of `Sampler` with a `step` and put it into `SAMPLERS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from repae_jax.diffusion import ddpm, interpolant
from repae_jax.diffusion.ddpm import NoiseObjective
from repae_jax.diffusion.interpolant import Tensor, VelocityObjective
from repae_jax.ranges import Choice, OrNone, check, real, whole

OutputFn = Callable[[Tensor, Shaped[Array, " B"]], Tensor]  # (z, t) -> the network's output
NoiseFn = Callable[[Any], Tensor]  # step index -> N(0, 1) noise of z's shape
Segments = Sequence[tuple[np.ndarray, OutputFn]]  # (times [k + 1], output function that holds for their k steps), in order


class Interval(NamedTuple):
    """One step of a sampler."""

    t: Any  # start of the step, a scalar: float32, or int32 for DiT's timesteps
    t_next: Any  # end of the step, nearer to data
    index: Any  # number of the step, from 0; names its noise
    coefficients: Any  # entry of `Sampler.coefficients`


@dataclass(frozen=True)
class Sampler:
    """A sampling method; subclasses define `step`, and whatever else differs from these defaults. Multistep: `integrate`."""

    objective: ClassVar[type] = VelocityObjective  # objective of the networks it samples from
    last_step: ClassVar[Callable | None] = None  # a method like `step` for the very last one, if that is an exception

    def times(self, steps: int) -> np.ndarray:
        """Decreasing times [steps + 1], float64; here equal steps from 1 to 0."""
        return np.linspace(1.0, 0.0, steps + 1)

    def coefficients(self, t: np.ndarray, t_next: np.ndarray) -> Any:
        """Tree of arrays [k]: what all steps t -> t_next [k] need and float32 is too coarse to compute; here nothing."""
        del t, t_next
        return ()

    def step(self, z: Tensor, interval: Interval, output_fn: OutputFn, noise_fn: NoiseFn, objective: Any) -> Tensor:
        """Returns z at interval.t_next."""
        raise NotImplementedError

    def integrate(self, segments: Segments, z: Tensor, noise_fn: NoiseFn | None = None, objective: Any = None) -> Tensor:
        """Takes all steps from z, N(0, 1) at the first time, to the last; the segments' times are `self.times(steps)`.

        ODE samplers need neither noise_fn nor objective, whose path the SDE's score depends on.
        """
        first = 0
        for number, (times, output_fn) in enumerate(segments, 1):
            given = {"output_fn": output_fn, "noise_fn": noise_fn, "objective": objective}
            t, t_next = times[:-1], times[1:]
            index = first + np.arange(len(t))
            intervals = jax.tree.map(jnp.asarray, Interval(t, t_next, index, self.coefficients(t, t_next)))
            last_step = self.last_step if number == len(segments) else None
            looped = intervals if last_step is None else jax.tree.map(lambda x: x[:-1], intervals)
            z, _ = jax.lax.scan(partial(_step_in_scan, partial(self.step, **given)), z, looped)
            if last_step is not None:
                z = last_step(z, jax.tree.map(lambda x: x[-1], intervals), **given)
            first += len(t)
        return z


def _step_in_scan(step, z, interval):
    return step(z, interval), None


def _at_time(output_fn, z, t):
    return output_fn(z, jnp.full((z.shape[0],), t))


def _velocity(output_fn, z, t):
    return _at_time(output_fn, z, t)[..., : z.shape[-1]]  # a learned sigma, if there is one, is unused


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on dz/dt = v(z, t)."""

    def step(self, z, interval, output_fn, noise_fn, objective):
        return z + (interval.t_next - interval.t) * _velocity(output_fn, z, interval.t)


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method, two network calls a step; the last step is Euler's. A step's guidance holds for both its calls."""

    last_step: ClassVar[Callable] = Euler.step

    def step(self, z, interval, output_fn, noise_fn, objective):
        dt = interval.t_next - interval.t
        v = _velocity(output_fn, z, interval.t)
        corrected = _velocity(output_fn, z + dt * v, interval.t_next)
        return z + dt * 0.5 * (v + corrected)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = 2t; the last step is deterministic."""

    last_time: float = 0.04  # start of the last step; all others are equal steps from 1 to there

    def times(self, steps):
        return np.append(np.linspace(1.0, self.last_time, steps), 0.0)

    def step(self, z, interval, output_fn, noise_fn, objective):
        variance = 2 * interval.t * jnp.abs(interval.t_next - interval.t)
        drifted = self.last_step(z, interval, output_fn, noise_fn, objective)
        return drifted + jnp.sqrt(variance) * noise_fn(interval.index)

    def last_step(self, z, interval, output_fn, noise_fn, objective):
        v = _velocity(output_fn, z, interval.t)
        drift = v - 0.5 * (2 * interval.t) * interpolant.score(objective.path, v, z, interval.t)
        return z + (interval.t_next - interval.t) * drift


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM sampling: each step draws from the network's Gaussian, the one that ends at ddpm.DATA takes its mean.

    The output is (eps, v) [B, ..., 2C]; the published guidance is that of eps and keeps the conditional v.
    """

    objective: ClassVar[type] = NoiseObjective

    def times(self, steps):
        return ddpm.timesteps(steps)

    def coefficients(self, t, t_next):
        return ddpm.step_coefficients(t, t_next)

    def step(self, z, interval, output_fn, noise_fn, objective):
        c = interval.coefficients
        eps, v = ddpm.split_output(_at_time(output_fn, z, interval.t), z)
        std = jnp.exp(0.5 * (c.log_low + c.excess(v)))
        mean = c.z_scale * z - c.eps_scale * eps
        return mean + jnp.where(interval.t_next == ddpm.DATA, 0.0, std * noise_fn(interval.index))


PRECISIONS = ("float32", "bfloat16")
SAMPLERS: dict[str, Sampler] = {"euler": Euler(), "heun": Heun(), "sde": EulerMaruyama(), "ancestral": Ancestral()}


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Guidance applies to steps that start at guidance_low <= t <= guidance_high (1 is noise; DiT's timesteps count as t / 999).
    DiT's, SiT's and LightningDiT's published sampling guides the first 3 channels only.
    """

    sampler: str = "sde"  # name in SAMPLERS: 'euler' or 'heun' (ODE), 'sde' (the paper's), 'ancestral' (DiT's)
    steps: int = 250
    guidance_scale: float = 1.0  # 1 is no guidance
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int | None = None  # so many, the first ones; None is all
    precision: str = "float32"  # of the network's matrix products: 'float32' as published, or 'bfloat16'

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
        check("steps", whole(2), self.steps)
        check("guidance_scale", real(1), self.guidance_scale)
        check("guidance_low", real(0, 1), self.guidance_low)
        check("guidance_high", real(0, 1), self.guidance_high)
        check("guidance_channels", OrNone(whole(1)), self.guidance_channels)
        check("precision", Choice(PRECISIONS), self.precision)
        if self.guidance_low > self.guidance_high:
            raise ValueError(f"guidance interval [{self.guidance_low}, {self.guidance_high}] must lie in [0, 1], low first")


def check_sampler(sampling: Sampling, objective: Any) -> None:
    """ValueError unless the sampler is for networks of this objective, and can take so many steps."""
    sampler = SAMPLERS[sampling.sampler]
    if not isinstance(objective, sampler.objective):
        allowed = [name for name, other in SAMPLERS.items() if isinstance(objective, other.objective)]
        predicts = f"the network predicts {objective.predicts}"
        raise ValueError(f"sampler {sampling.sampler!r}: {predicts}; allowed: {', '.join(allowed)}")
    sampler.times(sampling.steps)
