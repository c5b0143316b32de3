"""From images to latents, and how latents and pixels answer to transforms of the images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from repae_jax import images
from repae_jax.analysis import equivariance
from repae_jax.analyze_latents.sources import Source
from repae_jax.data import reading
from repae_jax.distributed import sharding
from repae_jax.losses.regularizers import downscale
from repae_jax.sampling.load_model import LoadedTokenizer

SCALES = (0.75, 0.5, 0.25)
MAX_BYTES = 2**30  # of latents; some numbers take four times as much for a while


@dataclasses.dataclass(frozen=True)
class Model:
    """One VAE and what it makes of the images.

    Attributes:
      source: Source.
      vae: LoadedTokenizer.
      latents: float32 numpy [N, h, w, C], posterior means, un-normalised.
      equivariance: [{'transform', 'latent_error', 'psnr', 'l1'}], the identity first.
    """

    source: Source
    vae: LoadedTokenizer
    latents: np.ndarray
    equivariance: list[dict[str, Any]]


def in_float32(function):
    """float32 means float32 on every platform."""

    @functools.wraps(function)
    def precise(*args):
        with jax.default_matmul_precision("high"):
            return function(*args)

    return jax.jit(precise)


def check_bytes(count, what, allowed=None):
    """ValueError if `what` is more than fits in memory, MAX_BYTES if not told otherwise."""
    allowed = allowed or MAX_BYTES
    if count > allowed:
        raise ValueError(f"{what} take {count / 2**30:.1f} GiB of memory; allowed: {allowed / 2**30:g}; use fewer images")


def read_batches(source, records, batch_size):
    """Images, decoded in threads.

    Args:
      source: see `repae_jax.data`.
      records: positions in it.
      batch_size: images at a time.

    Yields:
      uint8 numpy [batch_size, H, W, 3], and how many of them count: the last batch is filled up, for one program to serve all.

    Raises:
      ValueError: for an image that cannot be decoded, by its name.
      OSError: if the disk, or what else holds the images, cannot be read.
    """

    def read(record):
        fields, wrong = reading.attempt(source, record)
        if wrong:
            raise ValueError(f"{source.name(record)} cannot be decoded ({wrong}): repair or remove it")
        return fields["image"]

    for first in range(0, len(records), batch_size):
        part = records[first : first + batch_size]
        pixels = np.stack(reading.at_once(read, part))
        yield pixels[np.minimum(np.arange(batch_size), len(part) - 1)], len(part)


# what equivariance is measured under: name -> function of images and of latents
TRANSFORMS = {
    "none": lambda x: x,
    **{f"scale {scale:g}": functools.partial(downscale, scale=scale) for scale in SCALES},
    **{f"turn {90 * k}°": functools.partial(jnp.rot90, k=k, axes=(1, 2)) for k in (1, 2, 3)},
}


def transforms(grid):
    """Names of the TRANSFORMS that leave latents of grid x grid a whole size."""
    odd = [f"scale {scale:g}" for scale in SCALES if not (scale * grid).is_integer()]
    return [name for name in TRANSFORMS if name not in odd]


def _check_sizes(vae, name, size):
    if size % vae.factor or size < vae.factor:
        below = size // vae.factor * vae.factor
        allowed = " or ".join(str(n) for n in (below, below + vae.factor) if n)
        raise ValueError(
            f"{name}: image size {size} is not a multiple of the VAE's factor {vae.factor}; allowed: e.g. {allowed}"
        )


def check_finite(latents, name, source, records):
    """ValueError that names the first of the images whose latents [N, h, w, C] are not finite."""
    bad = np.flatnonzero(~np.isfinite(latents).all(axis=(1, 2, 3)))
    if len(bad):
        raise ValueError(
            f"{name}: latents of {len(bad)} of {len(latents)} images are not finite, first of {source.name(records[bad[0]])}; "
            "the weights are broken, or overflow"
        )


@functools.cache  # the checkpoints of a run share programs
def make_encode(module):
    """(VAE parameters, uint8 [B, H, W, 3]) -> posterior means [B, h, w, C], compiled."""
    return in_float32(lambda params, pixels: posterior_mean(module, params, images.to_float(pixels)))


def posterior_mean(module, params, x):
    """Latents [B, h, w, C] of images float [B, H, W, 3] in [-1, 1]."""
    return module.apply({"params": params}, x, method="encode").mode()


@functools.cache
def make_compare(module, transform):
    """`equivariance.compare` under one of TRANSFORMS: compiled function of (VAE parameters, uint8 images, their latents)."""

    def compare(params, pixels, latents):
        decode = functools.partial(module.apply, {"params": params}, method="decode")
        encode = functools.partial(posterior_mean, module, params)
        return equivariance.compare(encode, decode, TRANSFORMS[transform], images.to_float(pixels), latents)

    return in_float32(compare)


def encode_images(source, vae, images_source, records, batch_size, mesh):
    """What one VAE makes of the images.

    Args:
      source: Source, for messages.
      vae: LoadedTokenizer.
      images_source: see `repae_jax.data`.
      records: positions in it.
      batch_size: images at a time, a multiple of the devices.
      mesh: device mesh.

    Returns:
      Model.

    Raises:
      ValueError: for an image size that the VAE cannot take, or latents that are not finite.
    """
    size, factor = images_source.image_size, vae.module.factor
    _check_sizes(vae.module, source.name, size)
    made = np.empty((len(records), size // factor, size // factor, vae.module.latent_channels), np.float32)
    encode = make_encode(vae.module)
    compare = {name: make_compare(vae.module, name) for name in transforms(size // factor)}
    sums, pixel_errors = dict.fromkeys(compare, 0), {name: [] for name in compare}
    params = jax.device_put(vae.params, sharding.replicated(mesh))
    first = 0
    with tqdm(total=len(records), unit="img", desc=source.name) as bar:
        for pixels, count in read_batches(images_source, records, batch_size):
            pixels = jax.device_put(pixels, sharding.batch_sharding(mesh))
            latents = encode(params, pixels)
            made[first : first + count] = np.asarray(latents)[:count]
            check_finite(made[first : first + count], source.name, images_source, records[first:])
            for name, function in compare.items():
                encoded, transformed, psnr, l1 = (np.asarray(x)[:count] for x in function(params, pixels, latents))
                sums[name] = sums[name] + equivariance.difference_sums(encoded, transformed)
                pixel_errors[name].append((psnr, l1))
            first += count
            bar.update(count)
    rows = []
    for name in compare:
        psnr, l1 = (float(np.concatenate(values).mean()) for values in zip(*pixel_errors[name]))
        rows.append({"transform": name, "latent_error": equivariance.relative_error(sums[name]), "psnr": psnr, "l1": l1})
    return Model(source, vae, made, rows)
