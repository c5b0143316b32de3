"""Inputs of a training step: the batch, the encoders' targets, and every random number.

The losses draw nothing themselves, so that two passes which have to see the same noise do, and a step is a pure function.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from repae_jax.images import to_float
from repae_jax.models.encoders import encode
from repae_jax.training.rng import named_keys


@struct.dataclass
class Inputs:
    """Inputs of the losses of one step; every array has the batch first, so that micro-batches are cut from all."""

    images: Float[Array, "B H W 3"] | None  # in [-1, 1]; None if the step reads cached moments alone
    labels: Int[Array, " B"]  # none is dropped yet
    targets: tuple[Float[Array, "B T F"], ...]  # the encoders' patch tokens, one array per encoder
    posterior_noise: Float[Array, "B h w C"]  # N(0, 1), samples the VAE's posterior
    # [B], shared by both SiT passes: times in [0, 1], where 1 is noise, DiT's timesteps 0..999, or MeanFlow's Span; [B, h, w]
    # where tokens have times of their own
    t: Any
    noise: Float[Array, "B h w C"]  # N(0, 1), shared by both SiT passes
    label_drop: Bool[Array, " B"]  # True where SiT's own loss (phase 3) replaces the label by the null label
    moments: Float[Array, "B h w 2C"] | None = None  # mean and standard deviation of cached posteriors
    # un-normalized, added once the VAE was applied; detached, except in the ablation without stop-gradient
    latents: Float[Array, "B h w C"] | None = None
    recon: Float[Array, "B H W 3"] | None = None  # detached reconstruction, added likewise


def prepare(batch, step, frozen, key, *, nets, encoders, recipe) -> Inputs:
    """Returns the inputs of a step, a pure function of batch, step and key.

    Args:
      batch: 'label', with 'image' (uint8) or 'moments' (of a cache; of each image and its mirror image if images are flipped).
      step: steps taken so far.
      frozen: 'encoders' holds their parameters, in the order of `encoders`.
      key: the run's base key, the same at every step.
    """
    batch = flip(batch, key, step, recipe.flip_probability)
    image, moments = batch.get("image"), batch.get("moments")
    shape = nets.vae.latent_shape(image) if moments is None else (*moments.shape[:-1], moments.shape[-1] // 2)
    with jax.named_scope("encoders"):
        targets = tuple(encode(encoder, params, image) for encoder, params in zip(encoders, frozen["encoders"]))
    images = None if image is None else to_float(image)
    noise = sample_noise(key, step, shape, recipe)
    return Inputs(images=images, labels=batch["label"], targets=targets, moments=moments, **noise)


def sample_noise(key, step, latent_shape: tuple[int, ...], recipe) -> dict[str, Any]:
    """Returns the random fields of `Inputs` for latents [B, h, w, C]; each has a key of its own name."""
    keys = named_keys(key, step, "posterior", "time", "noise", "label_drop")
    return {
        "posterior_noise": jax.random.normal(keys["posterior"], latent_shape),
        "t": recipe.objective.draw_times(keys["time"], latent_shape),
        "noise": jax.random.normal(keys["noise"], latent_shape),
        "label_drop": jax.random.uniform(keys["label_drop"], latent_shape[:1]) < recipe.label_dropout,
    }


def flip(batch, key, step, probability):
    """Returns the batch with images mirrored at random; cached moments are chosen, not mirrored: the VAE is not equivariant."""
    if not probability:
        return batch
    flipped = jax.random.uniform(named_keys(key, step, "flip")["flip"], batch["label"].shape) < probability
    flipped = flipped[:, None, None, None]
    if "image" in batch:
        batch = {**batch, "image": jnp.where(flipped, batch["image"][:, :, ::-1], batch["image"])}
    if "moments" in batch:
        batch = {**batch, "moments": jnp.where(flipped, batch["moments"][:, 1], batch["moments"][:, 0])}
    return batch
