"""Adversarial terms: hinge PatchGAN and LeCam. Logits are positive for real; reductions are means over batch and patches.

Reference: REPA-E's `loss/losses.py`; LeCam, arXiv 2104.03310.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

LECAM_DECAY = 0.999


@struct.dataclass
class LeCamEma:
    """Moving averages of the mean logits, float32 scalars, zero at the start."""

    real: jax.Array
    fake: jax.Array


def generator_loss(logits_fake):
    """-mean(D(recon))."""
    return -jnp.mean(logits_fake)


def hinge_loss(logits_real, logits_fake):
    """0.5 * (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - logits_real)) + jnp.mean(jax.nn.relu(1 + logits_fake)))


def lecam_loss(logits_real, logits_fake, ema):
    """relu(mean real - EMA fake)^2 + relu(EMA real - mean fake)^2, with the averages before this step."""
    real, fake = jnp.mean(logits_real), jnp.mean(logits_fake)
    return jnp.square(jax.nn.relu(real - ema.fake)) + jnp.square(jax.nn.relu(ema.real - fake))


def update_lecam(ema, logits_real, logits_fake):
    """The moving averages after this step."""
    new = LeCamEma(real=jnp.mean(logits_real), fake=jnp.mean(logits_fake))
    return jax.tree.map(lambda e, x: LECAM_DECAY * e + (1 - LECAM_DECAY) * jax.lax.stop_gradient(x), ema, new)


def gan_factor(step, start, factor):
    """`factor` from step `start` on, 0 before."""
    return jnp.where(step >= start, jnp.float32(factor), 0.0)


def adaptive_weight(reference_grad, grad, high, eps=1e-4):
    """Weight that gives a loss as large a gradient as the reference loss has: |reference_grad| / (|grad| + eps), clipped.

    The loss enters the total as `factor * adaptive_weight(…) * loss`. Published: high 1e4 and factor 0.5 for the adversarial
    loss at the kernel of the decoder's last convolution; high 1e8 and factor 0.1 for VF at the kernel of the encoder's.

    The published reference loss (L1 + LPIPS) is summed over pixels and channels: `pixel_reduction` 'sum'. For means, weights
    are smaller by H * W * 3.

    Args:
      reference_grad: array or tree, gradient of the reconstruction loss at the last layer.
      grad: the same of the loss to weight.
      high: largest weight.
      eps: added to the norm of `grad`.

    Returns:
      float32 scalar in [0, high], a constant for differentiation; NaN if a gradient is.

    Raises:
      ValueError: if the two trees differ in structure or shapes, or high is negative.

    Reference: taming-transformers `vqperceptual.py`, LDM and LightningDiT `contperceptual.py`, `calculate_adaptive_weight`.
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (reference_grad, grad)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradients of {shapes[0]} and {shapes[1]}; allowed: both at the same layer")
    if high < 0:
        raise ValueError(f"high {high}; allowed: 0 and above")
    norms = [optax.tree.norm(jax.tree.map(jnp.float32, tree)) for tree in (reference_grad, grad)]
    return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + eps), 0.0, high))
