"""Shared parts of the tokenizers whose latents are tokens of a vision transformer, without a spread."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from repae_jax.models.autoencoder import DiagonalGaussian
from repae_jax.models.encoders import IMAGENET_MEAN, IMAGENET_STD


def to_imagenet(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns images in [-1, 1] as float32 with ImageNet's mean and standard deviation taken out of their channels."""
    pixels = (images.astype(jnp.float32) + 1) / 2
    return (pixels - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)


def from_imagenet(pixels: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns the inverse of `to_imagenet`."""
    pixels = pixels * np.asarray(IMAGENET_STD, np.float32) + np.asarray(IMAGENET_MEAN, np.float32)
    return 2 * pixels - 1


def point(latents: Float[Array, "B h w C"]) -> DiagonalGaussian:
    """Returns the posterior of standard deviation 0."""
    return DiagonalGaussian(mean=latents, logvar=jnp.full_like(latents, -jnp.inf))


class PointTokenizer(nn.Module):
    """A tokenizer with a `patch_size`, whose `encode` gives a point; subclasses define that and `decode`."""

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return self.patch_size

    @property
    def feature_dim(self) -> None:
        """Width of the tokens that latents are mapped to for VA-VAE's VF loss: there is no such map."""
        return None

    def __call__(self, images: Float[Array, "B H W 3"], noise: Float[Array, "B h w C"]) -> tuple[Array, DiagonalGaussian]:
        """Returns the reconstruction, and the posterior, whose samples are all its mean."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior
