"""Stochastic interpolants: z_t = alpha_t z + sigma_t noise, with t = 0 data and t = 1 noise.

Reference: SiT (arXiv 2401.08740) section 3; REPA-E's `models/sit.py` and `samplers.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tensor = Float[Array, "B ..."]
Times = Float[Array, " B"]


class Coefficients(NamedTuple):
    """Returns alpha_t, sigma_t and their time derivatives, each with t's shape."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


def _cosine(t):
    angle, rate = t * math.pi / 2, math.pi / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Coefficients(cos, sin, -rate * sin, rate * cos)


PATHS = {"linear": lambda t: Coefficients(1 - t, t, -jnp.ones_like(t), jnp.ones_like(t)), "cosine": _cosine}
TIME_DISTRIBUTIONS = ("uniform", "lognormal")


def coefficients(path: str, t: Array) -> Coefficients:
    """Returns the coefficients of the path 'linear' or 'cosine' at t."""
    if path not in PATHS:
        raise ValueError(f"interpolant {path!r} is unknown; allowed: {sorted(PATHS)}")
    return PATHS[path](t)


def expand(t: Array, like: Array) -> Array:
    """Appends axes of size 1 to t, [B] or scalar, to broadcast against `like` [B, ...]."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def interpolate(path: str, z: Tensor, noise: Tensor, t: Times) -> Tensor:
    """Returns z_t = alpha_t z + sigma_t noise on the path 'linear' or 'cosine'; t in [0, 1], noise ~ N(0, 1)."""
    c = coefficients(path, expand(t, z))
    return c.alpha * z + c.sigma * noise


def velocity_target(path: str, z: Tensor, noise: Tensor, t: Times) -> Tensor:
    """Returns d z_t / dt = alpha'_t z + sigma'_t noise; arguments as in `interpolate`."""
    c = coefficients(path, expand(t, z))
    return c.d_alpha * z + c.d_sigma * noise


def score(path: str, velocity: Tensor, z_t: Tensor, t: Times | Float[Array, ""] | float) -> Tensor:
    """Computes grad log p_t(z_t) from the velocity d z_t / dt (SiT equation 9); t in (0, 1], as it is undefined at 0."""
    c = coefficients(path, expand(jnp.asarray(t, z_t.dtype), z_t))
    ratio = c.alpha / c.d_alpha
    variance = jnp.square(c.sigma) - ratio * c.d_sigma * c.sigma
    return (ratio * velocity - z_t) / variance


def mean_squared_velocity_error(path: str, velocity: Tensor, z: Tensor, noise: Tensor, t: Times) -> Float[Array, " B"]:
    """Computes SiT's loss of each sample, a mean over positions and channels."""
    error = velocity - velocity_target(path, z, noise, t)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


@dataclass(frozen=True)
class VelocityObjective:
    """SiT's objective: the squared error of the velocity."""

    path: str = "linear"  # or 'cosine'
    time_distribution: str = "uniform"  # or 'lognormal'
    predicts: ClassVar[str] = "a velocity"  # for messages

    def sample_time(self, key: Array, batch_size: int) -> Times:
        """Draws training times, uniform on [0, 1) or those at which sigma / alpha is exp(N(0, 1))."""
        if self.time_distribution == "uniform":
            return jax.random.uniform(key, (batch_size,))
        if self.time_distribution != "lognormal":
            raise ValueError(f"time distribution {self.time_distribution!r} is unknown; allowed: {TIME_DISTRIBUTIONS}")
        sigma = jnp.exp(jax.random.normal(key, (batch_size,)))
        return sigma / (1 + sigma) if self.path == "linear" else 2 / math.pi * jnp.arctan(sigma)

    def to_times(self, t: Times) -> Times:
        """Returns the network's times for t in [0, 1]: t itself."""
        return t

    def add_noise(self, z: Tensor, noise: Tensor, t: Times) -> Tensor:
        """Returns z_t, see `interpolate`."""
        return interpolate(self.path, z, noise, t)

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, t: Times) -> dict[str, Float[Array, ""]]:
        """Returns 'velocity', a mean over batch, positions and channels; arguments as in `velocity_target`."""
        return {"velocity": jnp.mean(mean_squared_velocity_error(self.path, output, z, noise, t))}
