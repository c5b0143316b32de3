"""Stochastic interpolants: z_t = alpha_t z + sigma_t noise, with t = 0 data and t = 1 noise.

Reference: SiT (arXiv 2401.08740) section 3; REPA-E's `models/sit.py` and `samplers.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from repae_jax.diffusion import guidance, token_times

Tensor = Float[Array, "B ..."]
Times = Float[Array, "B *hw"]  # one for each sample, or for each position of the latents
MIN_TIME = 0.05  # the least time by which a `DataObjective` divides, JiT's t_eps


class Coefficients(NamedTuple):
    """Returns alpha_t, sigma_t and their time derivatives, each with t's shape."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


def _module_of(t):
    return np if isinstance(t, np.ndarray) else jnp


def _linear(t):
    ones = _module_of(t).ones_like(t)
    return Coefficients(1 - t, t, -ones, ones)


def _cosine(t):
    angle, rate, module = t * math.pi / 2, math.pi / 2, _module_of(t)
    cos, sin = module.cos(angle), module.sin(angle)
    return Coefficients(cos, sin, -rate * sin, rate * cos)


PATHS = {"linear": _linear, "cosine": _cosine}
TIME_DISTRIBUTIONS = ("uniform", "lognormal")


def coefficients(path: str, t: Array | np.ndarray) -> Coefficients:
    """Returns the coefficients of the path 'linear' or 'cosine' at t; arrays of numpy keep their precision."""
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


def shift_times(t: Any, shift: float) -> Any:
    """Returns shift t / (1 + (shift - 1) t), times of more noise where the shift is above 1; 0 and 1 stay.

    On the linear path it multiplies sigma / alpha. Latents of m numbers take the shift sqrt(m / n) if times without one suit
    latents of n numbers, as the same noise hides less of what more numbers say together.

    Reference: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2, for resolutions; RAE (2510.11690) for latents of any shape,
    n = 4096, in training and sampling: its `transport.py` and `integrators.py`.
    """
    return shift * t / (1 + (shift - 1) * t)


class Objective:
    """Base of objectives; subclasses define `predicts`, `sample_time`, `to_times`, `add_noise`, and `losses` or `terms`."""

    guide = staticmethod(guidance.guide)

    @property
    def conditions(self) -> int:
        """Numbers that the network is given besides the time, see `SiT.conditions`."""
        return 0

    def sample_time(self, key: Array, batch_size: int) -> Any:
        """Draws a training time for each sample."""
        raise NotImplementedError

    def draw_times(self, key: Array, latent_shape: tuple[int, ...]) -> Any:
        """Draws the times of a batch of latents [B, h, w, C]: here those of `sample_time`, one for each sample."""
        return self.sample_time(key, latent_shape[0])

    def check_guidance(self, scale: float, channels: int | None, schedule: str) -> None:
        """Raises ValueError for guidance, of a scale above 1, that samples of the network cannot have."""

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, t: Any) -> dict[str, Float[Array, ""]]:
        """Returns name -> loss of the network's output at z_t, a mean over the batch; arguments as in `terms`."""
        raise NotImplementedError

    def add_noise(self, z: Tensor, noise: Tensor, t: Any) -> Tensor:
        """Returns z_t; t as of `draw_times`."""
        raise NotImplementedError

    def terms(
        self, network: Callable, z: Tensor, noise: Tensor, t: Any, labels: Int[Array, " B"], null_label: int
    ) -> tuple[dict[str, Float[Array, ""]], Any]:
        """Computes the losses of a network.

        Args:
          network: (z_t, t, labels) -> (output, what its tap gives); gradients flow through it.
          z: normalized latents.
          noise: N(0, 1).
          t: of `draw_times`.
          labels: some are null_label, which stands for no class.

        Returns:
          name -> loss, a mean over the batch; and what the network's tap gives at z_t.
        """
        del null_label
        output, tap = network(self.add_noise(z, noise, t), t, labels)
        return self.losses(output, z, noise, t), tap


@dataclass(frozen=True)
class VelocityObjective(Objective):
    """SiT's objective: the squared error of the velocity."""

    path: str = "linear"  # or 'cosine'
    time_distribution: str = "uniform"  # or 'lognormal'
    time_mean: float = 0.0  # mean and standard deviation of log(sigma / alpha) of 'lognormal'
    time_std: float = 1.0
    time_shift: float = 1.0  # of the drawn times, see `shift_times`
    second_time_share: float = 0.0  # probability that a token has a second time, drawn likewise, see `token_times`
    patch_size: int = 1  # latent pixels per token side, which it needs
    predicts: ClassVar[str] = "a velocity"  # for messages

    def sample_time(self, key: Array, batch_size: int) -> Times:
        """Draws training times, uniform on [0, 1) or those at which sigma / alpha is exp(N(mean, std^2)), and shifts them."""
        if self.time_distribution == "uniform":
            t = jax.random.uniform(key, (batch_size,))
        elif self.time_distribution == "lognormal":
            sigma = jnp.exp(self.time_mean + self.time_std * jax.random.normal(key, (batch_size,)))
            t = sigma / (1 + sigma) if self.path == "linear" else 2 / math.pi * jnp.arctan(sigma)
        else:
            raise ValueError(f"time distribution {self.time_distribution!r} is unknown; allowed: {TIME_DISTRIBUTIONS}")
        return t if self.time_shift == 1 else shift_times(t, self.time_shift)

    def draw_times(self, key: Array, latent_shape: tuple[int, ...]) -> Times:
        """Draws the times of a batch of latents [B, h, w, C], [B]; with a second time in an image, [B, h, w]."""
        if not self.second_time_share:
            return super().draw_times(key, latent_shape)
        batch_size, height, width, _ = latent_shape
        time_key, token_key = jax.random.split(key)
        first, second = jnp.split(self.sample_time(time_key, 2 * batch_size), 2)
        return token_times.mix(token_key, first, second, self.second_time_share, (height, width), self.patch_size)

    def to_times(self, t: Times) -> Times:
        """Returns the network's times for t in [0, 1]: t itself."""
        return t

    def add_noise(self, z: Tensor, noise: Tensor, t: Times) -> Tensor:
        """Returns z_t, see `interpolate`."""
        return interpolate(self.path, z, noise, t)

    def velocity(self, output: Tensor, z_t: Tensor, t: Times | Float[Array, ""]) -> Tensor:
        """Returns the velocity that the network's output at (z_t, t) means: here the output."""
        del z_t, t
        return output

    def data(self, output: Tensor, z_t: Tensor, t: Times | Float[Array, ""]) -> Tensor:
        """Returns the latents without noise that the network's output at (z_t, t) means."""
        c = coefficients(self.path, expand(t, z_t))
        return (c.d_sigma * z_t - c.sigma * output) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, t: Times) -> dict[str, Float[Array, ""]]:
        """Returns 'velocity', a mean over batch, positions and channels; arguments as in `velocity_target`."""
        return {"velocity": jnp.mean(mean_squared_velocity_error(self.path, output, z, noise, t))}


@dataclass(frozen=True)
class DataObjective(VelocityObjective):
    """JiT's objective, on the linear path: the network predicts latents without noise, and the loss is still the velocity's.

    The velocity is (z_t - output) / max(t, MIN_TIME), the target's likewise, so that the loss is the squared error of the
    latents over max(t, MIN_TIME)^2. The output is affine in the velocity: guidance of the one is guidance of the other.

    Reference: JiT (arXiv 2511.13720), table 1 (3)(a), and its `denoiser.py`, where t and the velocity have the opposite sign: 1
    is data. For latents: JLT (2605.27102).
    """

    predicts: ClassVar[str] = "latents"

    def velocity(self, output: Tensor, z_t: Tensor, t: Times | Float[Array, ""]) -> Tensor:
        """Returns the velocity that the predicted latents mean."""
        return (z_t - output) / jnp.maximum(expand(t, z_t), MIN_TIME)

    def data(self, output: Tensor, z_t: Tensor, t: Times | Float[Array, ""]) -> Tensor:
        """Returns the output."""
        del z_t, t
        return output

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, t: Times) -> dict[str, Float[Array, ""]]:
        """Returns 'velocity', as `VelocityObjective.losses`."""
        del noise
        error = (output - z) / jnp.maximum(expand(t, z), MIN_TIME)
        return {"velocity": jnp.mean(jnp.square(error))}


OBJECTIVES = {"velocity": VelocityObjective, "data": DataObjective}  # by what the network predicts
