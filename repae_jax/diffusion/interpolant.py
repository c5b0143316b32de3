"""Stochastic interpolants: z_t = alpha_t z + sigma_t noise, with t = 0 data and t = 1 noise.

Reference: SiT (arXiv 2401.08740) section 3; REPA-E's `models/sit.py` and `samplers.py`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Coefficients(NamedTuple):
    """alpha_t, sigma_t and their time derivatives, each with t's shape."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array


def _linear(t):
    return Coefficients(1 - t, t, -jnp.ones_like(t), jnp.ones_like(t))


def _cosine(t):
    angle, rate = t * math.pi / 2, math.pi / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Coefficients(cos, sin, -rate * sin, rate * cos)


PATHS = {"linear": _linear, "cosine": _cosine}
TIME_DISTRIBUTIONS = ("uniform", "lognormal")


def coefficients(path, t):
    """Coefficients of the path named 'linear' or 'cosine' at t; ValueError for another name."""
    if path not in PATHS:
        raise ValueError(f"interpolant {path!r} is unknown; allowed: {sorted(PATHS)}")
    return PATHS[path](t)


def _expand(t, like):
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(path, z, noise, t):
    """z_t = alpha_t z + sigma_t noise.

    Args:
      path: 'linear' or 'cosine'.
      z: [B, ...] normalised latents.
      noise: the same shape, N(0, 1).
      t: [B] in [0, 1].

    Returns:
      z_t of z's shape.
    """
    c = coefficients(path, _expand(t, z))
    return c.alpha * z + c.sigma * noise


def velocity_target(path, z, noise, t):
    """d z_t / dt = alpha'_t z + sigma'_t noise; arguments as in `interpolate`."""
    c = coefficients(path, _expand(t, z))
    return c.d_alpha * z + c.d_sigma * noise


def score(path, velocity, z_t, t):
    """grad log p_t(z_t) from the velocity (SiT equation 9).

    Args:
      path: 'linear' or 'cosine'.
      velocity: [B, ...].
      z_t: [B, ...].
      t: scalar or [B], in (0, 1]: at t = 0 the score is undefined.

    Returns:
      Score of z_t's shape.
    """
    t = jnp.asarray(t, z_t.dtype)
    c = coefficients(path, _expand(t, z_t) if t.ndim else t)
    ratio = c.alpha / c.d_alpha
    variance = jnp.square(c.sigma) - ratio * c.d_sigma * c.sigma
    return (ratio * velocity - z_t) / variance


def sample_time(key, batch_size, path, distribution):
    """Training times.

    Args:
      key: PRNG key.
      batch_size: B.
      path: 'linear' or 'cosine'; fixes how a lognormal sigma maps to t.
      distribution: 'uniform' on [0, 1), or 'lognormal': sigma = exp(N(0, 1)), t = sigma / (1 + sigma) on the linear path,
        2 / pi * arctan(sigma) on the cosine path.

    Returns:
      float32 [B].

    Raises:
      ValueError: for an unknown distribution or path.
    """
    if path not in PATHS:
        raise ValueError(f"interpolant {path!r} is unknown; allowed: {sorted(PATHS)}")
    if distribution == "uniform":
        return jax.random.uniform(key, (batch_size,))
    if distribution == "lognormal":
        sigma = jnp.exp(jax.random.normal(key, (batch_size,)))
        return sigma / (1 + sigma) if path == "linear" else 2 / math.pi * jnp.arctan(sigma)
    raise ValueError(f"time distribution {distribution!r} is unknown; allowed: {TIME_DISTRIBUTIONS}")


def mean_squared_velocity_error(path, velocity, z, noise, t):
    """SiT's loss of each sample: [B], mean over positions and channels, float32."""
    error = velocity - velocity_target(path, z, noise, t)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


@dataclass(frozen=True)
class VelocityObjective:
    """SiT's objective: the squared error of the velocity.

    Attributes:
      path: 'linear' or 'cosine'.
      time_distribution: 'uniform' or 'lognormal'.
    """

    path: str = "linear"
    time_distribution: str = "uniform"

    def sample_time(self, key, batch_size):
        """Times [B], see the function of this name."""
        return sample_time(key, batch_size, self.path, self.time_distribution)

    def add_noise(self, z, noise, t):
        """z_t, see `interpolate`."""
        return interpolate(self.path, z, noise, t)

    def losses(self, output, z, noise, t):
        """{'velocity': float32 scalar, mean over the batch, positions and channels}; arguments as in `velocity_target`."""
        return {"velocity": jnp.mean(mean_squared_velocity_error(self.path, output, z, noise, t))}
