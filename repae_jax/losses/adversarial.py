"""Adversarial terms: hinge PatchGAN and LeCam. Logits are positive for real; reductions are means over batch and patches.

Reference: REPA-E's `loss/losses.py`; LeCam, arXiv 2104.03310.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

Logits = Float[Array, "B h w 1"]
Scalar = Float[Array, ""]
LECAM_DECAY = 0.999


@struct.dataclass
class LeCamEma:
    """Moving averages of the mean logits, zero at the start."""

    real: Scalar
    fake: Scalar


def generator_loss(logits_fake: Logits) -> Scalar:
    """Returns -mean(D(recon))."""
    return -jnp.mean(logits_fake)


def hinge_loss(logits_real: Logits, logits_fake: Logits) -> Scalar:
    """Returns 0.5 * (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - logits_real)) + jnp.mean(jax.nn.relu(1 + logits_fake)))


def lecam_loss(logits_real: Logits, logits_fake: Logits, ema: LeCamEma) -> Scalar:
    """Returns relu(mean real - EMA fake)^2 + relu(EMA real - mean fake)^2, with the averages before this step."""
    real, fake = jnp.mean(logits_real), jnp.mean(logits_fake)
    return jnp.square(jax.nn.relu(real - ema.fake)) + jnp.square(jax.nn.relu(ema.real - fake))


def update_lecam(ema: LeCamEma, logits_real: Logits, logits_fake: Logits) -> LeCamEma:
    """Returns the moving averages after this step."""
    new = LeCamEma(real=jnp.mean(logits_real), fake=jnp.mean(logits_fake))
    return jax.tree.map(lambda e, x: LECAM_DECAY * e + (1 - LECAM_DECAY) * jax.lax.stop_gradient(x), ema, new)


def gan_factor(step, start: int, factor: float) -> Scalar:
    """Returns `factor` from step `start` on, 0 before."""
    return jnp.where(step >= start, jnp.float32(factor), 0.0)
