"""The networks that latents may come from: what `config.vae` describes -> the module."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.models.vtp import VisualTokenizer
from repae_jax.ranges import Extent, height_width

RAE, VTP = "rae", "vtp"
VaeModule = AutoencoderKL | RepresentationAutoencoder | VisualTokenizer


def make_vae(
    section: Mapping[str, Any], image_size: Extent, *, dtype: DTypeLike = jnp.float32, feature_dim: int | None = None
) -> VaeModule:
    """Returns the network of a `config.vae`: its `family`, or AutoencoderKL where it names none.

    Args:
      section: the network's fields.
      image_size: of the images in pixels, which some families are for.
      dtype: compute dtype.
      feature_dim: width of the tokens that AutoencoderKL maps latents to.

    Raises:
      ValueError: for an RAE and images that are no squares.
    """
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    family = fields.pop("family", None)
    if family == RAE:
        height, width = height_width(image_size)
        if height != width:
            raise ValueError(
                f"config.vae.family={RAE!r} has statistics of each position, which are published for squares alone, but "
                f"config.data.image_size={(height, width)}: use squares, or another VAE"
            )
        return RepresentationAutoencoder(**fields, grid=height // fields["patch_size"], dtype=dtype)
    if family == VTP:
        return VisualTokenizer(**fields, dtype=dtype)
    return AutoencoderKL(**fields, feature_dim=feature_dim, dtype=dtype)
