"""Samplers over [(times, velocity function)] segments. They know no labels and no guidance.

State and times are float32; the published code keeps the state in float64 between float32 network calls, a difference below
2e-5 of the largest entry in the parity tests. Reference: REPA-E's `samplers.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.diffusion import ddpm, interpolant
from repae_jax.ranges import OrNone, check, real, whole

SAMPLERS = ("euler", "heun", "sde", "ancestral")


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
      sampler: 'euler' or 'heun' (ODE), or 'sde' (Euler-Maruyama, last step from t = 0.04), the paper's; 'ancestral' for DiT.
      steps: steps from noise to data; of Heun, two network calls each but the last.
      guidance_scale: 1 is no guidance.
      guidance_low: guidance applies to steps that start at guidance_low <= t <= guidance_high (t = 1 is noise).
      guidance_high: see above. DiT's timesteps count as t / 999.
      guidance_channels: guide the first ones only, as DiT's, SiT's and LightningDiT's published sampling does (3); None is all.

    Raises:
      ValueError: for an unknown sampler or values out of range.
    """

    sampler: str = "sde"
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
        check("steps", whole(2), self.steps)
        check("guidance_scale", real(1), self.guidance_scale)
        check("guidance_low", real(0, 1), self.guidance_low)
        check("guidance_high", real(0, 1), self.guidance_high)
        check("guidance_channels", OrNone(whole(1)), self.guidance_channels)
        if self.guidance_low > self.guidance_high:
            raise ValueError(f"guidance interval [{self.guidance_low}, {self.guidance_high}] must lie in [0, 1], low first")


def check_sampler(sampling, objective):
    """ValueError unless the sampler is one for what the network has learned."""
    is_ancestral = sampling.sampler == "ancestral"
    if isinstance(objective, ddpm.NoiseObjective) != is_ancestral:
        what, allowed = ("a velocity", SAMPLERS[:3]) if is_ancestral else ("DiT's noise", SAMPLERS[3:])
        raise ValueError(f"sampler {sampling.sampler!r}: the network predicts {what}; allowed: {', '.join(allowed)}")
    if is_ancestral:
        ddpm.timesteps(sampling.steps)

SDE_LAST_TIME = 0.04  # the SDE's diffusion ends here; one deterministic step remains


def ode_times(num_steps):
    """num_steps + 1 equal steps from 1 to 0, float64 numpy."""
    return np.linspace(1.0, 0.0, num_steps + 1)


def sde_times(num_steps):
    """num_steps network calls: equal steps from 1 to 0.04, then 0; float64 numpy [num_steps + 1]."""
    return np.append(np.linspace(1.0, SDE_LAST_TIME, num_steps), 0.0)


def _at(t, z):
    return jnp.full((z.shape[0],), t, jnp.float32)


def _scan_steps(step, z, times, first):
    """Apply step(z, t, t_next, index) over one segment."""
    pairs = (jnp.asarray(times[:-1], jnp.float32), jnp.asarray(times[1:], jnp.float32), first + jnp.arange(len(times) - 1))
    return jax.lax.scan(lambda z, pair: (step(z, *pair), None), z, pairs)[0]


def euler(segments, z):
    """Euler's method on dz/dt = v(z, t).

    Args:
      segments: list of (times [k + 1], velocity_fn(z, t [B]) -> velocity), in order.
      z: [B, ...] at the first time.

    Returns:
      z at the last time.
    """
    for times, velocity_fn in segments:

        def step(z, t, t_next, index, velocity_fn=velocity_fn):
            return z + (t_next - t) * velocity_fn(z, _at(t, z))

        z = _scan_steps(step, z, times, 0)
    return z


def heun(segments, z):
    """Heun's method; the very last step is Euler's. A step's guidance holds for both its evaluations. As `euler`."""
    for i, (times, velocity_fn) in enumerate(segments):

        def step(z, t, t_next, index, velocity_fn=velocity_fn):
            v = velocity_fn(z, _at(t, z))
            corrected = velocity_fn(z + (t_next - t) * v, _at(t_next, z))
            return z + (t_next - t) * 0.5 * (v + corrected)

        is_last = i == len(segments) - 1
        z = _scan_steps(step, z, times[:-1] if is_last else times, 0)
        if is_last:
            z = euler([(times[-2:], velocity_fn)], z)
    return z


def euler_maruyama(segments, z, path, noise_fn):
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = 2t; the last step is deterministic.

    Args:
      segments: list of (times [k + 1], velocity_fn(z, t [B]) -> velocity), in order; see `sde_times`.
      z: [B, ...] at the first time.
      path: the interpolant's name, for the score.
      noise_fn: step index (int32 scalar) -> N(0, 1) noise of z's shape.

    Returns:
      z at the last time.
    """

    def drift(z, t, velocity_fn):
        v = velocity_fn(z, _at(t, z))
        return v - 0.5 * (2 * t) * interpolant.score(path, v, z, t)

    first = 0
    for i, (times, velocity_fn) in enumerate(segments):

        def step(z, t, t_next, index, velocity_fn=velocity_fn):
            dt = t_next - t
            return z + dt * drift(z, t, velocity_fn) + jnp.sqrt(2 * t * jnp.abs(dt)) * noise_fn(index)

        is_last = i == len(segments) - 1
        z = _scan_steps(step, z, times[:-1] if is_last else times, first)
        first += len(times) - 1
        if is_last:
            t, t_next = (jnp.float32(time) for time in times[-2:])
            z = z + (t_next - t) * drift(z, t, velocity_fn)
    return z
