"""Regularizers of the VAE's latent space: VF, equivariance under transforms (EQ), scale equivariance (SE).

EQ and SE decode latents of another size, and shapes are static in a compiled program, so `scale` is a static argument. To draw
it inside one compiled step, `jax.lax.switch` over the drawn index, one branch per scale, each the whole gradient of the VAE's
loss at that scale, and of the discriminator's, because a reconstruction of another shape cannot leave its branch.
Differentiating *through* a switch gives the same numbers but holds the activations of all branches at once. Rotations keep the
shape of square images, so any of them runs in the same branch.

References: VA-VAE (arXiv 2501.01423), `vavae/ldm/modules/losses/contperceptual.py`; EQ-VAE (arXiv 2502.09509),
`train_eqvae/ldm/models/autoencoder.py`; scale equivariance (arXiv 2502.14831).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from repae_jax.losses.alignment import unit

Scalar = Float[Array, ""]


def vf_loss(
    projected: Float[Array, "B h w F"], tokens: Float[Array, "B h*w F"], cosine_margin: float, distance_margin: float
) -> Scalar:
    """Returns VA-VAE's alignment with a vision foundation model: both marginal terms, each with weight 1, mean over the batch.

    The grids must agree. The published code resamples no tokens: it resizes the images for the encoder until its tokens are as
    many as the latent pixels (224 pixels for patches of 14 and latents of 16 x 16).

    Args:
      projected: sampled latents, not normalized, after the trainable bias-free 1x1 convolution to F channels.
      tokens: the encoder's patch tokens, rows first.
      cosine_margin: m1 in [0, 2); published: 0.5, or 0 in the first stages.
      distance_margin: m2 in [0, 2); published: 0.25, or 0 in the first stages.

    Raises:
      ValueError: for shapes that do not fit or a margin out of range.

    Reference: LightningDiT `contperceptual.py`, `LPIPSWithDiscriminator.forward`.
    """
    return marginal_cosine_loss(projected, tokens, cosine_margin) + marginal_distance_loss(projected, tokens, distance_margin)


def marginal_cosine_loss(projected, tokens, margin: float) -> Scalar:
    """Returns mean relu(1 - margin - cos(z_i, f_i)) over batch and positions; arguments as in `vf_loss`."""
    _check_margin("cosine", margin)
    z, f = _unit_tokens(projected, tokens)
    return jnp.mean(jax.nn.relu(1 - margin - jnp.sum(z * f, axis=-1)))


def marginal_distance_loss(projected, tokens, margin: float) -> Scalar:
    """Returns mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin) over batch and pairs (i, j); arguments as in `vf_loss`."""
    _check_margin("distance", margin)
    z, f = _unit_tokens(projected, tokens)
    return jnp.mean(jax.nn.relu(jnp.abs(_gram(z) - _gram(f)) - margin))


def _gram(x):
    # a TPU multiplies in bfloat16 by default
    return jnp.einsum("bif,bjf->bij", x, x, precision=jax.lax.Precision.HIGHEST)


def _unit_tokens(projected, tokens):
    if projected.ndim != 4 or tokens.shape != (projected.shape[0], projected.shape[1] * projected.shape[2], projected.shape[3]):
        raise ValueError(
            f"projected latents {projected.shape} and encoder tokens {tokens.shape}; allowed: [B, h, w, F] and [B, h * w, F]; "
            "if only the grids differ, give the encoder another image size"
        )
    return unit(projected.reshape(tokens.shape)), unit(tokens)


def _check_margin(name, margin):
    if not 0 <= margin < 2:
        raise ValueError(f"{name} margin {margin}; allowed: 0 <= margin < 2, the range of what it is taken from")


@struct.dataclass
class Transform:
    """One transform for the whole batch.

    Attributes:
      scale_index: position in `scales`.
      quarter_turns: 0 to 3.
    """

    scale_index: Int[Array, ""]
    quarter_turns: Int[Array, ""]


def draw_transform(key: jax.Array, scales: tuple[float, ...], prior_probability: float) -> Transform:
    """Draws EQ-VAE's transform of a step.

    With probability `prior_probability` it is the identity, so that plain reconstruction is preserved; else one of scales[1:]
    and one of 1, 2, 3 quarter turns, each uniformly.

    Args:
      key: the same on every host: all devices must take the same branch.
      scales: static, 1 first, then scales in (0, 1). The published code has 8 / 32, 9 / 32, …, 31 / 32; its documented
        alternative (1, 0.25, 0.5, 0.75) needs four branches instead of 25.
      prior_probability: in [0, 1]; published: 0.5. The published code runs a quarter of these steps, encoder included, on an
        image of lower resolution; here all run at full resolution.

    Raises:
      ValueError: for scales or a probability out of range.
    """
    check_scales(scales, prior_probability)
    prior_key, scale_key, turn_key = jax.random.split(key, 3)
    changed = jax.random.uniform(prior_key) >= prior_probability
    return Transform(
        scale_index=jnp.where(changed, jax.random.randint(scale_key, (), 1, len(scales)), 0),
        quarter_turns=jnp.where(changed, jax.random.randint(turn_key, (), 1, 4), 0),
    )


def check_scales(scales: tuple[float, ...], prior_probability: float) -> None:
    """Raises ValueError for arguments that `draw_transform` does not take."""
    if len(scales) < 2 or scales[0] != 1 or not all(0 < scale < 1 for scale in scales[1:]):
        raise ValueError(f"scales {scales}; allowed: 1 first, then at least one scale strictly between 0 and 1")
    if not 0 <= prior_probability <= 1:
        raise ValueError(f"prior_probability {prior_probability}; allowed: 0 to 1")


def transform(x: Float[Array, "B n n C"], scale: float, quarter_turns) -> Float[Array, "B m m C"]:
    """Resizes to m = n * scale, then rotates: for EQ, latents and images alike.

    Args:
      x: latents (sampled, not normalized) or images.
      scale: static, in (0, 1], n * scale an integer.
      quarter_turns: int32 scalar, 0 to 3, may be traced; direction of torch.rot90(k, dims=(-1, -2)), which is clockwise.

    Raises:
      ValueError: if x is not square or the scaled size is no integer.
    """
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"cannot rotate shape {x.shape}; allowed: [B, n, n, C]")
    rotations = [lambda x, turns=turns: jnp.rot90(x, turns, axes=(2, 1)) for turns in range(4)]
    return jax.lax.switch(quarter_turns, rotations, downscale(x, scale))


def downscale(x: Float[Array, "B h w C"], scale: float) -> Float[Array, "B h' w' C"]:
    """Resizes without antialiasing, as torch.nn.functional.interpolate(mode='bilinear', align_corners=False).

    Raises:
      ValueError: for a static scale that is not in (0, 1], or a scaled size that is no integer.
    """
    if not 0 < scale <= 1 or x.ndim != 4:
        raise ValueError(f"scale {scale} of shape {x.shape}; allowed: 0 < scale <= 1 of [B, h, w, C]")
    b, h, w, c = x.shape
    height, width = round(h * scale), round(w * scale)
    if abs(height - h * scale) > 1e-4 or abs(width - w * scale) > 1e-4:
        raise ValueError(f"scale {scale} of a grid of {h} x {w} is {h * scale} x {w * scale}; allowed: whole sizes")
    return jax.image.resize(x, (b, height, width, c), "linear", antialias=False)


def scale_equivariance_loss(
    images: Float[Array, "B H W 3"],
    latents: Float[Array, "B h w C"],
    decode: Callable,
    reconstruction_fn: Callable,
    factor: int,
) -> Scalar:
    """Returns the reconstruction loss at a lower resolution: decoded downscaled latents against the downscaled image.

    A term beside the ordinary reconstruction loss; its gradient reaches decoder and encoder.

    Args:
      images: in [-1, 1].
      latents: sampled, not normalized.
      decode: latents -> images, with the parameters that are differentiated.
      reconstruction_fn: (images, recon) -> scalar, the caller's own reconstruction loss (L1 + LPIPS).
      factor: integer >= 2 that divides all four sizes; published: 2 to 4.

    Raises:
      ValueError: for another factor, a size it does not divide, or a decoder that gives another size than the image's.
    """
    if factor != int(factor) or factor < 2:
        raise ValueError(f"factor {factor}; allowed: an integer >= 2")
    small, recon = downscale(images, 1 / factor), decode(downscale(latents, 1 / factor))
    if small.shape != recon.shape:
        raise ValueError(f"downscaled images {small.shape} and decoded latents {recon.shape} differ; allowed: equal shapes")
    return reconstruction_fn(small, recon)
