"""Trained networks for notebooks and other programs: load one, then encode, decode, sample or compute features.

    import repae_jax

    model = repae_jax.load("runs/repae")              # a run, a file, a folder, or a name on the Hugging Face hub
    samples = model.sample([207, 360], seed=0, steps=50, guidance_scale=2.2)
    latents = model.encode(images)                    # uint8 [B, H, W, 3] -> float32 [B, h, w, C]
    features = model.features(images)                 # float32 [B, T, D]

`load` returns what its source holds: a model with its VAE, a VAE alone, or a vision encoder. `load_model`, `load_vae` and
`load_encoder` insist on one of them. Everything is computed on the first device, or the one asked for, in float32 unless
`sample` is told otherwise. Images are uint8 arrays [B, H, W, 3].
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

from checkpoints_tools import identify, locate, vit
from repae_jax import images as pixels
from repae_jax.diffusion import latent_norm
from repae_jax.models import encoders
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.models.vae_families import VaeModule
from repae_jax.ranges import Extent, check, whole
from repae_jax.sampling import generate
from repae_jax.sampling import load_model as loading
from repae_jax.training import checkpoint

Device = jax.Device | str | None


def _device(device):
    """Returns a device of JAX: the first by default, or that of a name such as 'cpu' or 'gpu:1'; ValueError for another."""
    if device is None or isinstance(device, jax.Device):
        return device or jax.devices()[0]
    if not isinstance(device, str):
        raise ValueError(f"device {device!r}: allowed: one of jax.devices(), or a name such as 'cpu' or 'gpu:1'")
    platform, _, index = device.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        here = sorted({f"{found.platform}:{i}" for i, found in enumerate(jax.devices())} | {"cpu"})
        raise ValueError(f"device {device!r} is not on this machine; allowed: {', '.join(here)}") from error


def _batch(images):
    """Returns images as an array; ValueError if one axis is missing or there are other channels than three."""
    if np.ndim(images) != 4 or np.shape(images)[-1] != 3:
        raise ValueError(f"images have the shape {np.shape(images)}; allowed: uint8 [B, H, W, 3], also of a single image")
    return jnp.asarray(images)


@dataclasses.dataclass(frozen=True)
class Vae:
    """A trained VAE."""

    module: VaeModule
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
        channels = self.module.latent_channels
        if np.ndim(latents) != 4 or np.shape(latents)[-1] != channels:
            raise ValueError(f"latents have the shape {np.shape(latents)}; allowed: float32 [B, h, w, {channels}]")
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
        return functools.cache(lambda sampling, weaker: jax.jit(make(sampling, weaker)))  # one program per setting

    @functools.cached_property
    def _features(self):
        loaded, sit = self.loaded, self.loaded.nets.sit.clone(dtype=jnp.float32, attention="xla")

        def features(params, latents, t, labels, key):
            z = latent_norm.normalize(latents, params["latent_stats"])
            times = loaded.objective.to_times(jnp.full(len(z), t))
            z_t = loaded.objective.add_noise(z, jax.random.normal(key, z.shape), times)
            return sit.apply({"params": params["sit"]}, z_t, times, labels, method="tap_tokens")

        return loading.jit_in_float32(features)

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
        self, labels: Int[Array, " N"] | Sequence[int], *, seed: int = 0, batch_size: int = 64,
        autoguidance: "Model | None" = None, **sampling: Any,
    ) -> UInt8[np.ndarray, "N H W 3"]:  # fmt: skip
        """Returns one image for each label, 0 to num_classes - 1; image i depends on the seed, i and its label alone.

        Args:
          batch_size: images at a time, if there are so many.
          autoguidance: a weaker model of the same VAE and classes, to guide away from by `autoguidance_scale`.
          **sampling: fields of `repae_jax.diffusion.samplers.Sampling` that differ from the run's config: `sampler`, `steps`,
            `guidance_scale`, `guidance_low`, `guidance_high`, `guidance_channels`, `guidance_schedule`, `guidance_power`,
            `autoguidance_scale`, `internal_scale`, `weaker_low`, `weaker_high`, `precision`, `time_shift`, `tolerance`.

        Raises:
          ValueError: for a label or a field out of range, or a sampler or a weaker model that does not fit the model.
          TypeError: for a field that does not exist.
        """
        classes = self._checked(labels)
        check("batch_size", whole(1), batch_size)
        settings, params, weaker = dataclasses.replace(self.loaded.sampling, **sampling), self.loaded.params, None
        if autoguidance is not None:
            found = loading.add_weaker(self.loaded, autoguidance.loaded, "Model").weaker
            weaker, params = found.sit, {**params, "weaker": found.params}
        run = self._generators(settings, weaker)
        size = min(batch_size, len(classes))
        batches = generate.in_batches(run, params, classes, size, jax.random.key(seed), jnp.asarray)
        return np.concatenate([images for _, images in batches])

    def encode(self, images: UInt8[Array, "B H W 3"], key: Array | None = None) -> Float[Array, "B h w C"]:
        """Returns un-normalized latents, see `Vae.encode`."""
        return self.vae.encode(images, key)

    def decode(self, latents: Float[Array, "B h w C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Returns the images of un-normalized latents, see `Vae.decode`."""
        return self.vae.decode(latents)

    def features(
        self, images: UInt8[Array, "B H W 3"], labels: Int[Array, " B"] | Sequence[int] | None = None, *, t: float = 0.0,
        seed: int = 0,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """Returns the transformer's hidden states where they are aligned with the encoder, one for each token, row by row.

        Args:
          images: of the size that the model makes.
          labels: the images' classes; without them, as of no class.
          t: noise that is added to the latents first, from 0, none, to 1, nothing else.
          seed: of that noise.

        ValueError for images of another size, a label or a time out of range.
        """
        latents, expected = self.encode(images), self.loaded.latent_shape
        if latents.shape[1:] != expected:
            made = "x".join(str(side * self.vae.module.factor) for side in expected[:2])
            raise ValueError(f"images of {'x'.join(map(str, np.shape(images)[1:3]))} pixels: the model is for {made}")
        if not 0 <= t <= 1:
            raise ValueError(f"t={t} is out of range; allowed: 0 (no noise) to 1")
        classes = np.full(len(latents), self.num_classes) if labels is None else self._checked(labels)
        if len(classes) != len(latents):
            raise ValueError(f"{len(classes)} labels for {len(latents)} images")
        return self._features(self.loaded.params, latents, t, jnp.asarray(classes, jnp.int32), jax.random.key(seed))

    def _checked(self, labels):
        """Returns labels as an array; ValueError unless they are a list of classes."""
        classes = np.asarray(labels)
        is_whole = np.issubdtype(classes.dtype, np.integer) and classes.ndim == 1 and classes.size
        if not is_whole or classes.min() < 0 or classes.max() >= self.num_classes:
            raise ValueError(f"labels {classes.tolist()}: expected a list of whole numbers from 0 to {self.num_classes - 1}")
        return classes.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen vision encoder, whose features are what REPA aligns to."""

    encoder: encoders.Encoder  # the network and its preprocessing
    params: Mapping[str, Any] = dataclasses.field(repr=False)

    @functools.cached_property
    def _features(self):
        return loading.jit_in_float32(functools.partial(encoders.encode, self.encoder))

    def features(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B T F"]:
        """Returns the patch tokens, row by row."""
        return self._features(self.params, _batch(images))


def load(source: str, step: int | None = None, *, vae: str | None = None, device: Device = None) -> Model | Vae | Encoder:
    """Returns whatever a source holds: a diffusion model with its VAE, a VAE alone, or a vision encoder.

    Args:
      source: folder of a run, a file, a folder, or a name on the Hugging Face hub; also in a bucket, gs://bucket/folder.
      step: checkpoint of a run; default the newest.
      vae: path or name of the VAE of a diffusion model whose source holds none.
      device: one of `jax.devices()`, or a name such as 'cpu' or 'gpu:1'; default the first.

    FileNotFoundError or ValueError if there is nothing of the kind.
    """
    source = str(source)
    if locate.pipeline(source):
        return load_model(source, step, vae=vae, device=device)
    found = identify.identify(source, step)
    kind, config = found.kind, checkpoint.read_config(source, step) if found.kind == "run" else {}
    del found  # frees the arrays of a file, which is read again
    if kind in ("training", "sit") or (kind == "run" and config["job"] != "vae"):
        return load_model(source, step, vae=vae, device=device)
    if vae is not None:
        raise ValueError(f"{source} is a {identify.KINDS[kind]}, no diffusion model: leave vae={vae!r} out")
    if kind in ("run", "vae"):
        return load_vae(source, step, device=device)
    if kind in ("encoder", "mocov3"):
        return load_encoder(source, device=device)
    allowed = "a run, a diffusion model, a VAE or a vision encoder"
    raise ValueError(f"{source} is of the kind {identify.KINDS[kind]!r}; allowed: {allowed}")


def load_vae(source: str, step: int | None = None, *, device: Device = None) -> Vae:
    """Returns the VAE of a run or of a published checkpoint, or one in a file, a folder or on the Hugging Face hub.

    `step` is that of a run's checkpoint, by default the newest; the device is as of `load`. FileNotFoundError or ValueError if
    there is no such VAE.
    """
    loaded = loading.load_vae(str(source), step)
    return Vae(loaded.module, jax.device_put(loaded.params, _device(device)), loaded.latent_stats)


def load_model(
    source: str, step: int | None = None, *, vae: str | None = None, sampler: str | None = None, ema: str | None = None,
    device: Device = None,
) -> Model:  # fmt: skip
    """Returns the averaged diffusion model of a run or of a published checkpoint, with its VAE.

    Args:
      source: folder of a run, or a published training folder or checkpoint, by path or name.
      step: checkpoint; default the newest.
      vae: path or name of the VAE where `source` holds none.
      sampler: 'ancestral' marks published weights as a DiT's, whose files look like a plain SiT's.
      ema: which average of a run: a decay that it has kept, as '0.999', or 'sigma=S'; default config.ema_decay's.
      device: as of `load`.

    FileNotFoundError or ValueError if there is no such model, or its VAE is missing.
    """
    return Model(loading.load_model(str(source), step, [_device(device)], vae, sampler, ema))


def load_encoder(
    source: str, resolution: Extent = 256, image_size: Extent | None = None, *, device: Device = None
) -> Encoder:
    """Returns a frozen vision encoder with its published preprocessing.

    Args:
      source: folder or name such as 'facebook/dinov2-base', or MoCo v3's file.
      resolution: pixels of the images, a square's side or (height, width), on which the number of tokens depends.
      image_size: pixels to which the encoder's input is resized; default as published for the resolution, in proportion.
      device: as of `load`.

    FileNotFoundError or ValueError if there is nothing of that name, or a network of another kind.
    """
    if (epath.Path(source).expanduser() / "checkpoints").is_dir():
        raise ValueError(
            f"{source} is the folder of a run, which holds no vision encoder: give the folder or name of one, such as "
            "'facebook/dinov2-base' or what the run's config.encoders names; load_vae takes a run, for its VAE's encoder"
        )
    encoder, params = vit.load_encoder(source, resolution, image_size)
    return Encoder(encoder, jax.device_put(params, _device(device)))
