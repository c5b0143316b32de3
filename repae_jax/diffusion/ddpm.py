"""DiT's objective and the steps of its sampler: 1000 discrete noise levels, t = 0 nearest to data and t = 999 to noise.

The network's output [B, h, w, 2C] is (eps, v): the noise it predicts, and where the log variance of a step back lies between
that of the posterior (v = -1) and of beta (v = 1); v is not clipped, as published. Schedules are float64, all else float32.

Means of steps are written with eps, not with the z that it implies: the same in exact arithmetic, as the published sampling of
latents clips nothing, but without the rounding of a difference divided by a small alpha.

Reference: DDPM (arXiv 2006.11239) equation 11, improved DDPM (2102.09672) section 3.1, DiT (2212.09748) section 3.1; DiT's
`diffusion/gaussian_diffusion.py` with LossType.MSE and ModelVarType.LEARNED_RANGE, and `diffusion/respace.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from repae_jax.diffusion.interpolant import Objective, Tensor, expand

NUM_TIMESTEPS = 1000
Timesteps = Int[Array, " B"]
DATA = -1  # the timestep after the last step: no noise
_BETAS = np.linspace(1e-4, 0.02, NUM_TIMESTEPS)
_ALPHA_BAR = np.append(np.cumprod(1 - _BETAS), 1.0)  # entry DATA is 1
_ALPHA = np.sqrt(_ALPHA_BAR[:-1]).astype(np.float32)
_SIGMA = np.sqrt(1 - _ALPHA_BAR[:-1]).astype(np.float32)
_SMALLEST_VARIANCE = _BETAS[1] * (1 - _ALPHA_BAR[0]) / (1 - _ALPHA_BAR[1])  # posterior at t = 1; it vanishes at t = 0
_HALF_BIN = 1 / 255  # 256 gray levels in [-1, 1]: the published likelihood at t = 0 is that of images, for latents too


class StepCoefficients(NamedTuple):
    """Steps z_t -> z_t_next: mean z_scale z_t - eps_scale eps, log variance from log_low to log_low + log_range. float32."""

    z_scale: np.ndarray
    eps_scale: np.ndarray
    log_low: np.ndarray
    log_range: np.ndarray

    def excess(self, v: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the network's log variance minus log_low."""
        return (v + 1) / 2 * self.log_range


def step_coefficients(t: Int[np.ndarray, " k"], t_next: Int[np.ndarray, " k"]) -> StepCoefficients:
    """Coefficients [k] of the steps from t to t_next, t > t_next >= DATA; skipped timesteps have their betas merged."""
    alpha_bar, alpha_bar_next = _ALPHA_BAR[t], _ALPHA_BAR[t_next]
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    posterior = np.where(t_next == DATA, _SMALLEST_VARIANCE, beta * (1 - alpha_bar_next) / (1 - alpha_bar))
    scales = 1 / np.sqrt(alpha), beta / np.sqrt(alpha * (1 - alpha_bar))
    return StepCoefficients(*(x.astype(np.float32) for x in (*scales, np.log(posterior), np.log(beta / posterior))))


_EVERY_STEP = step_coefficients(np.arange(NUM_TIMESTEPS), np.arange(NUM_TIMESTEPS) - 1)


def _at(table, t, like):
    """Returns table[t] in the shape [B, 1, ...] to go with `like`; NaN where t is above the table."""
    return jnp.take(jnp.asarray(table), expand(t, like))


def split_output(output: Tensor, like: Tensor) -> list[Tensor]:
    """Splits the network's output into eps and v; ValueError unless it has 2C channels."""
    expected = (*like.shape[:-1], 2 * like.shape[-1])
    if output.shape != expected:
        raise ValueError(f"the network's output is {output.shape}; allowed: {expected}, epsilon and variance of {like.shape}")
    return jnp.split(output, 2, axis=-1)


def sample_time(key: Array, batch_size: int) -> Timesteps:
    """Draws training timesteps, uniform in 0..999."""
    return jax.random.randint(key, (batch_size,), 0, NUM_TIMESTEPS)


def q_sample(z: Tensor, noise: Tensor, t: Timesteps) -> Tensor:
    """Returns z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise; NaN for timesteps above 999."""
    return _at(_ALPHA, t, z) * z + _at(_SIGMA, t, z) * noise


def mean_squared_noise_error(output: Tensor, noise: Tensor) -> Float[Array, " B"]:
    """Computes DiT's first loss of each sample, a mean over positions and channels; arguments as in `variational_bound`."""
    eps, _ = split_output(output, noise)
    return jnp.mean(jnp.square(eps - noise), axis=tuple(range(1, noise.ndim)))


def _gaussian_cdf(x):
    """Approximates the cumulative normal distribution by the published tanh, as a sigmoid to stay precise for x << 0."""
    return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _bin_log_likelihood(z, error, inverse_std):
    """Returns log P(bin of z), error = z - mean. Bins at -1 and 1 are open, so latents beyond have them too (published)."""
    inner = -jnp.abs(error)  # an inner bin's probability is even in the error: take the tail that float32 resolves
    probability = _gaussian_cdf((inner + _HALF_BIN) * inverse_std) - _gaussian_cdf((inner - _HALF_BIN) * inverse_std)
    probability = jnp.where(z < -0.999, _gaussian_cdf((error + _HALF_BIN) * inverse_std), probability)
    probability = jnp.where(z > 0.999, _gaussian_cdf((_HALF_BIN - error) * inverse_std), probability)
    return jnp.log(jnp.maximum(probability, 1e-12))


def variational_bound(output: Tensor, z: Tensor, noise: Tensor, t: Timesteps) -> Float[Array, " B"]:
    """Computes DiT's second loss of each sample, added to the first with weight 1. It trains v; eps gets no gradient.

    KL(q(z_{t-1} | z_t, z) || p(z_{t-1} | z_t)), and at t = 0 -log p(z | z_0) on a grid of 256 values in [-1, 1]; in bits, a
    mean over positions and channels; of one random step, not summed over the steps. The output is the network's at
    q_sample(z, noise, t), with 2C channels, t in 0..999.
    """
    eps, v = split_output(output, z)
    step = StepCoefficients(*(_at(table, t, z) for table in _EVERY_STEP))
    error = step.eps_scale * (jax.lax.stop_gradient(eps) - noise)  # the posterior's mean minus the network's; at t = 0, of z
    excess = step.excess(v)
    kl = 0.5 * (excess + jnp.expm1(-excess) + jnp.square(error) * jnp.exp(-excess - step.log_low))
    nll = -_bin_log_likelihood(z, error, jnp.exp(-0.5 * (excess + step.log_low)))
    bits = jnp.where(expand(t, z) == 0, nll, kl) / math.log(2)
    return jnp.mean(bits, axis=tuple(range(1, z.ndim)))


def timesteps(num_steps: int) -> Int[np.ndarray, " N"]:
    """Returns the published respacing, N = num_steps + 1: num_steps of 999..0, evenly spaced with both ends, then DATA."""
    if not 2 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"num_steps={num_steps} is out of range; allowed: 2..{NUM_TIMESTEPS}")
    strides = np.full(num_steps - 1, (NUM_TIMESTEPS - 1) / (num_steps - 1))
    kept = np.rint(np.cumsum([0.0, *strides])).astype(int)  # halves round as the published running sum does
    return np.append(kept[::-1], DATA)


@dataclass(frozen=True)
class NoiseObjective(Objective):
    """DiT's objective: the squared error of the noise and the variational bound. Methods as in `VelocityObjective`."""

    predicts: ClassVar[str] = "DiT's noise"
    sample_time = staticmethod(sample_time)
    add_noise = staticmethod(q_sample)

    def to_times(self, t: Float[Array, " B"]) -> Timesteps:
        """Returns the timesteps nearest to t in [0, 1]."""
        return jnp.round((NUM_TIMESTEPS - 1) * t).astype(jnp.int32)

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, t: Timesteps) -> dict[str, Float[Array, ""]]:
        """Returns means over the batch, 'noise' and 'bound'; arguments as in `variational_bound`."""
        noise_error, bound = mean_squared_noise_error(output, noise), variational_bound(output, z, noise, t)
        return {"noise": jnp.mean(noise_error), "bound": jnp.mean(bound)}
