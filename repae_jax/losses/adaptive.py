"""Loss weights that adapt to the gradients of the terms, as tokenizers train with.

Reference: taming-transformers `vqperceptual.py`, LDM and LightningDiT `contperceptual.py`, `calculate_adaptive_weight`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def adaptive_weight(reference_grad, grad, high: float, eps: float = 1e-4) -> jax.Array:
    """Returns the weight that gives a loss as large a gradient as the reference loss has.

    |reference_grad| / (|grad| + eps), clipped; the loss enters the total as `factor * adaptive_weight(…) * loss`. Published:
    high 1e4 and factor 0.5 for the adversarial loss at the kernel of the decoder's last convolution; high 1e8 and factor 0.1
    for VF at the kernel of the encoder's. The published reference loss (L1 + LPIPS) is summed over pixels and channels:
    `pixel_reduction` 'sum'. For means, weights are smaller by H * W * 3.

    Args:
      reference_grad: array or tree, gradient of the reconstruction loss at the last layer.
      grad: gradient of the loss to weight, at the same layer.
      high: largest weight.
      eps: added to the norm of `grad`.

    Returns:
      float32 scalar in [0, high], a constant for differentiation; NaN if a gradient is.

    Raises:
      ValueError: if the two trees differ in structure or shapes, or high is negative.
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (reference_grad, grad)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradients of {shapes[0]} and {shapes[1]}; allowed: both at the same layer")
    if high < 0:
        raise ValueError(f"high {high}; allowed: 0 and above")
    norms = [optax.tree.norm(jax.tree.map(jnp.float32, tree)) for tree in (reference_grad, grad)]
    return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + eps), 0.0, high))


class AdaptiveGrad(NamedTuple):
    """Result of `adaptive_value_and_grad`.

    Attributes:
      loss: sum of weight x term.
      grads: tree like the parameters.
      terms: name -> unweighted scalar.
      weights: name -> weight, adapted.
      latents, recon: results of `encode` and `decode`.
      gan_aux: auxiliary output of `gan_loss`; None without one.
    """

    loss: jax.Array
    grads: Any
    terms: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    latents: jax.Array
    recon: jax.Array
    gan_aux: Any


def adaptive_value_and_grad(
    params,
    *,
    encode: Callable,
    decode: Callable,
    pixel_loss: Callable,
    gan_loss: Callable,
    latent_losses: Mapping[str, Callable],
    weights: Mapping[str, Any],
    limits: Mapping[str, float],
) -> AdaptiveGrad:
    """Computes the loss of a tokenizer and its gradient, with weights adapted on the way.

    The chain rule is written out at the two places where terms meet, the reconstruction and the latents. There each term's
    gradient is still separate, and can be carried on to the kernel of one layer to adapt its weight. The GAN's costs that layer
    alone, as XLA leaves out the rest of `decode_vjp`; VF's costs another backward pass through the decoder. Names that end in
    `_ct` are cotangents: gradients with respect to the reconstruction or the latents.

    Args:
      params: the VAE's.
      encode: params -> (latents, KL).
      decode: (params, latents) -> reconstruction.
      pixel_loss: reconstruction -> (scalar weighted by `weights`, unweighted terms), the reference of adaptive weights.
      gan_loss: reconstruction -> (scalar, auxiliary output).
      latent_losses: name -> function of (params, latents), a scalar.
      weights: name -> weight; says which terms exist.
      limits: 'gan' or 'vf' -> largest adaptive factor of its weight; a name that is missing is not adapted.
    """
    weights = dict(weights)
    (latents, kl), encode_vjp = jax.vjp(encode, params)
    recon, decode_vjp = jax.vjp(decode, params, latents)

    # 1. At the reconstruction: pixels and the adversarial term.
    (_, terms), pixel_ct = jax.value_and_grad(pixel_loss, has_aux=True)(recon)
    recon_ct, gan_aux = pixel_ct, None
    if "gan" in weights:
        (terms["gan"], gan_aux), gan_ct = jax.value_and_grad(gan_loss, has_aux=True)(recon)
        if "gan" in limits:
            pixel_grad, gan_grad = (decode_vjp(ct)[0]["decoder"]["conv_out"]["kernel"] for ct in (pixel_ct, gan_ct))
            weights["gan"] *= adaptive_weight(pixel_grad, gan_grad, limits["gan"])
        recon_ct = recon_ct + weights["gan"] * gan_ct
    grads, latents_ct = decode_vjp(recon_ct)

    # 2. At the latents: losses of which some have parameters in the VAE's tree.
    zero_ct = jnp.zeros_like(kl)
    for name, loss in latent_losses.items():
        terms[name], (term_grads, term_ct) = jax.value_and_grad(loss, argnums=(0, 1))(params, latents)
        if name in limits:
            cotangents = decode_vjp(pixel_ct)[1], term_ct
            pixel_grad, term_grad = (encode_vjp((ct, zero_ct))[0]["encoder"]["conv_out"]["kernel"] for ct in cotangents)
            weights[name] *= adaptive_weight(pixel_grad, term_grad, limits[name])
        grads = jax.tree.map(lambda total, x, weight=weights[name]: total + weight * x, grads, term_grads)
        latents_ct = latents_ct + weights[name] * term_ct

    # 3. Through the encoder.
    if "kl" in weights:
        terms["kl"] = kl
    (encoder_grads,) = encode_vjp((latents_ct, jnp.float32(weights.get("kl", 0.0))))
    grads = jax.tree.map(jnp.add, grads, encoder_grads)
    loss = sum(weight * terms[name] for name, weight in weights.items())
    return AdaptiveGrad(loss, grads, terms, weights, latents, recon, gan_aux)
