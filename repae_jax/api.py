"""Trained networks for notebooks and other programs: load one, then encode, decode, sample or compute features.

    import repae_jax

    vae = repae_jax.load_vae("REPA-E/e2e-sdvae-hf")   # a run, a file, a folder, or a name on the Hugging Face hub
    latents = vae.encode(images)                      # uint8 [B, H, W, 3] -> float32 [B, h, w, C]
    model = repae_jax.load_model("runs/repae")        # a run, or a published checkpoint
    samples = model.sample([207, 360], seed=0, steps=50, guidance_scale=2.2)

Everything is computed on the first device, in float32 unless `sample` is told otherwise. Images are uint8 arrays [B, H, W, 3].
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from checkpoints_tools import vit
from repae_jax import images as pixels
from repae_jax.diffusion import latent_norm
from repae_jax.models import encoders
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling import generate
from repae_jax.sampling import load_model as loading


def _batch(images):
    """Returns images as an array; ValueError if one axis is missing or there are other channels than three."""
    if np.ndim(images) != 4 or np.shape(images)[-1] != 3:
        raise ValueError(f"images have the shape {np.shape(images)}; allowed: uint8 [B, H, W, 3], also of a single image")
    return jnp.asarray(images)


@dataclasses.dataclass(frozen=True)
class Vae:
    """A trained VAE."""

    module: AutoencoderKL
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    latent_stats: ChannelStats | None  # mean and variance of each latent channel; None if the files hold none

    @functools.cached_property
    def _encode(self):
        return loading.jit_in_float32(lambda params, images: self.module.apply({"params": params}, images, method="encode"))

    @functools.cached_property
    def _decode(self):
        return loading.jit_in_float32(lambda params, latents: self.module.apply({"params": params}, latents, method="decode"))

    def encode(self, images: UInt8[Array, "B H W 3"], key: Array | None = None) -> Float[Array, "B h w C"]:
        """Returns un-normalized latents: the posterior's mean, or a sample of the posterior if a random key is given."""
        posterior = self._encode(self.params, pixels.to_float(_batch(images)))
        return posterior.mode() if key is None else posterior.sample(jax.random.normal(key, posterior.mode().shape))

    def decode(self, latents: Float[Array, "B h w C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Returns the images of un-normalized latents."""
        return np.asarray(pixels.to_uint8(self._decode(self.params, jnp.asarray(latents))))

    def normalize(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns latents of mean 0 and variance 1 in each channel; ValueError if the statistics are unknown."""
        return latent_norm.normalize(latents, self._known_stats())

    def denormalize(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns un-normalized latents, which `decode` takes; ValueError if the statistics are unknown."""
        return latent_norm.denormalize(z, self._known_stats())

    def _known_stats(self):
        if self.latent_stats is None:
            raise ValueError("the files of this VAE hold no latent statistics: put NAME-latents-stats.pt beside NAME.pt")
        return self.latent_stats


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained SiT or DiT with its VAE; `loaded` is described in `repae_jax.sampling.load_model`."""

    loaded: Any = dataclasses.field(repr=False)

    @functools.cached_property
    def _generators(self):
        make = functools.partial(generate.make_generate, self.loaded.nets, self.loaded.objective, self.loaded.latent_shape)
        return functools.cache(lambda sampling: jax.jit(make(sampling)))  # one program per setting

    @functools.cached_property
    def vae(self) -> Vae:
        """The VAE that the model was trained with or on."""
        vae = self.loaded.tokenizer
        return Vae(vae.module, vae.params, vae.latent_stats)

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""
        return self.loaded.num_classes

    @property
    def step(self) -> int | None:
        """Training steps taken; None if unknown."""
        return self.loaded.step

    def sample(
        self, labels: Int[Array, " N"] | Sequence[int], *, seed: int = 0, batch_size: int = 64, **sampling: Any
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns one image for each label, 0 to num_classes - 1; image i depends on the seed, i and its label alone.

        Args:
          batch_size: images at a time, if there are so many.
          **sampling: fields of `repae_jax.diffusion.samplers.Sampling` that differ from the run's config: `sampler`, `steps`,
            `guidance_scale`, `guidance_low`, `guidance_high`, `guidance_channels`, `precision`.

        Raises:
          ValueError: for a label out of range, a field out of range, or a sampler that does not fit the model.
          TypeError: for a field that does not exist.
        """
        classes = np.asarray(labels, np.int32)
        if classes.ndim != 1 or not classes.size or classes.min() < 0 or classes.max() >= self.num_classes:
            raise ValueError(f"labels {classes.tolist()}: expected a list of numbers from 0 to {self.num_classes - 1}")
        run = self._generators(dataclasses.replace(self.loaded.sampling, **sampling))
        size = min(batch_size, len(classes))
        batches = generate.in_batches(run, self.loaded.params, classes, size, jax.random.key(seed), jnp.asarray)
        return np.concatenate([images for _, images in batches])


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen vision encoder, whose features are what REPA aligns to."""

    encoder: encoders.Encoder  # the network and its preprocessing
    params: Mapping[str, Any] = dataclasses.field(repr=False)

    @functools.cached_property
    def _features(self):
        return loading.jit_in_float32(functools.partial(encoders.encode, self.encoder))

    def features(self, images: UInt8[Array, "B H H 3"]) -> Float[Array, "B T F"]:
        """Returns the patch tokens, row by row."""
        return self._features(self.params, _batch(images))


def load_vae(source: str, step: int | None = None) -> Vae:
    """Returns the VAE of a run or of a published checkpoint, or one in a file, a folder or on the Hugging Face hub.

    `step` is that of a run's checkpoint, by default the newest. FileNotFoundError or ValueError if there is no such VAE.
    """
    loaded = loading.load_vae(str(source), step)
    return Vae(loaded.module, jax.device_put(loaded.params), loaded.latent_stats)


def load_model(source: str, step: int | None = None, *, vae: str | None = None, sampler: str | None = None) -> Model:
    """Returns the averaged diffusion model of a run or of a published checkpoint, with its VAE.

    Args:
      source: folder of a run, or a published training folder or checkpoint, by path or name.
      step: checkpoint; default the newest.
      vae: path or name of the VAE where `source` holds none.
      sampler: 'ancestral' marks published weights as a DiT's, whose files look like a plain SiT's.

    FileNotFoundError or ValueError if there is no such model, or its VAE is missing.
    """
    return Model(loading.load_model(str(source), step, jax.devices()[:1], vae, sampler))


def load_encoder(source: str, resolution: int = 256, image_size: int | None = None) -> Encoder:
    """Returns a frozen vision encoder with its published preprocessing.

    Args:
      source: folder or name such as 'facebook/dinov2-base', or MoCo v3's file.
      resolution: side of the images in pixels, on which the number of tokens depends.
      image_size: side in pixels to which the encoder's input is resized; default as published for the resolution.

    FileNotFoundError or ValueError if there is nothing of that name, or a network of another kind.
    """
    if (epath.Path(source).expanduser() / "checkpoints").is_dir():
        raise ValueError(
            f"{source} is the folder of a run, which holds no vision encoder: give the folder or name of one, such as "
            "'facebook/dinov2-base' or what the run's config.encoders names; load_vae takes a run, for its VAE's encoder"
        )
    encoder, params = vit.load_encoder(source, resolution, image_size)
    return Encoder(encoder, jax.device_put(params))
