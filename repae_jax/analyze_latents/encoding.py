"""Encodes images to latents, and measures the equivariance of latents and pixels under transforms of the images."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from repae_jax import images
from repae_jax.analysis import equivariance
from repae_jax.analyze_latents.sources import Source
from repae_jax.distributed import sharding
from repae_jax.evaluation.image_sets import source_blocks
from repae_jax.losses.regularizers import downscale
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.ranges import Extent, as_option, height_width, in_words
from repae_jax.sampling.load_model import LoadedTokenizer, jit_in_float32

SCALES = (0.75, 0.5, 0.25)
MAX_BYTES = 2**30  # most bytes of latents; some numbers take four times as much for a while
# transforms of images and of latents
TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    **{f"scale {scale:g}": functools.partial(downscale, scale=scale) for scale in SCALES},
    **{f"turn {90 * k}°": functools.partial(jnp.rot90, k=k, axes=(1, 2)) for k in (1, 2, 3)},
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A VAE and its latents of the images."""

    source: Source
    vae: LoadedTokenizer
    latents: Float[np.ndarray, "N h w C"]  # posterior means, not normalized
    equivariance: list[dict[str, Any]]  # [{'transform', 'latent_error', 'psnr', 'l1'}], the identity first


def check_bytes(count: int, arrays: str, allowed: int | None = None) -> None:
    """Raises ValueError if arrays take more bytes than allowed, MAX_BYTES by default."""
    allowed = allowed or MAX_BYTES
    if count > allowed:
        raise ValueError(f"{arrays} take {count / 2**30:.1f} GiB of memory; allowed: {allowed / 2**30:g}; use fewer images")


def read_batches(source: Any, records, batch_size: int) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], int]]:
    """Yields images of a source, and how many of them count: the last batch is padded, for one program to serve all."""
    batches = [records[first : first + batch_size] for first in range(0, len(records), batch_size)]
    for pixels in source_blocks(source, batches):
        yield pixels[np.minimum(np.arange(batch_size), len(pixels) - 1)], len(pixels)


def map_images(
    function: Callable[[Array], Array], source: Any, records, batch_size: int, mesh: jax.sharding.Mesh, description: str
) -> Iterator[np.ndarray]:
    """Yields a function's results for batches of images on the devices of a mesh, under a progress bar."""
    with tqdm(total=len(records), unit="img", desc=description) as bar:
        for pixels, count in read_batches(source, records, batch_size):
            yield np.asarray(function(jax.device_put(pixels, sharding.batch_sharding(mesh))))[:count]
            bar.update(count)


def transforms(grid: Extent) -> list[str]:
    """Returns the names of the TRANSFORMS that leave latents on a grid, a square's side or (height, width), a whole size."""
    odd = [f"scale {scale:g}" for scale in SCALES if not all((scale * side).is_integer() for side in height_width(grid))]
    return [name for name in TRANSFORMS if name not in odd]


def takes(module: Any, transform: str) -> bool:
    """Returns False if a transform changes the size of images, and the VAE is for one size."""
    return not (transform.startswith("scale") and isinstance(module, RepresentationAutoencoder))


def check_finite(latents: Float[np.ndarray, "N h w C"], name: str, source: Any, records) -> None:
    """Raises ValueError, naming the first of the images, if latents are not finite."""
    bad = np.flatnonzero(~np.isfinite(latents).all(axis=(1, 2, 3)))
    if len(bad):
        raise ValueError(
            f"{name}: latents of {len(bad)} of {len(latents)} images are not finite, first of {source.name(records[bad[0]])}; "
            "the weights are broken, or overflow"
        )


def posterior_mean(module: Any, params: Any, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
    """Returns the latents of images in [-1, 1]."""
    return module.apply({"params": params}, x, method="encode").mode()


@functools.cache  # the checkpoints of a run share programs
def make_encode(module: Any) -> Callable:
    """Makes the compiled function of (VAE parameters, uint8 images) that returns posterior means."""
    return jit_in_float32(lambda params, pixels: posterior_mean(module, params, images.to_float(pixels)))


@functools.cache
def make_compare(module: Any, transform: str) -> Callable:
    """Makes the compiled `equivariance.compare` of one transform, of (VAE parameters, uint8 images, their latents)."""

    def compare(params, pixels, latents):
        decode = functools.partial(module.apply, {"params": params}, method="decode")
        encode = functools.partial(posterior_mean, module, params)
        return equivariance.compare(encode, decode, TRANSFORMS[transform], images.to_float(pixels), latents)

    return jit_in_float32(compare)


def _errors(transform, parts):
    """Returns an entry of `Model.equivariance` from the sums and pixel errors of each batch."""
    sums, psnr, l1 = zip(*parts)
    pixel_errors = {name: float(np.concatenate(values).mean()) for name, values in (("psnr", psnr), ("l1", l1))}
    return {"transform": transform, "latent_error": equivariance.relative_error(sum(sums)), **pixel_errors}


def encode_images(
    source: Source, vae: LoadedTokenizer, images_source: Any, records, batch_size: int, mesh: jax.sharding.Mesh
) -> Model:
    """Encodes records of images with a VAE, and measures its equivariance; ValueError if latents are not finite."""
    size, factor = images_source.image_size, vae.module.factor
    grid = [side // factor for side in height_width(size)]
    if any(side % factor for side in height_width(size)):
        multiples = [[side * factor for side in grid], [(side + 1) * factor for side in grid]]
        allowed = " or ".join(as_option(pair) for pair in multiples if min(pair))
        wrong = f"image size {in_words(size)} is not a multiple of the VAE's factor {factor}"
        raise ValueError(f"{source.name}: {wrong}; allowed: e.g. {allowed}")
    encode = make_encode(vae.module)
    parts = {name: [] for name in transforms(grid) if takes(vae.module, name)}  # of the errors, by batch
    params = jax.device_put(vae.params, sharding.replicated(mesh))
    batches, first = [], 0
    with tqdm(total=len(records), unit="img", desc=source.name) as bar:
        for pixels, count in read_batches(images_source, records, batch_size):
            pixels = jax.device_put(pixels, sharding.batch_sharding(mesh))
            latents = encode(params, pixels)
            batches.append(np.asarray(latents)[:count])
            check_finite(batches[-1], source.name, images_source, records[first:])
            for name, part in parts.items():
                compared = make_compare(vae.module, name)(params, pixels, latents)
                encoded, transformed, *pixel_errors = (np.asarray(x)[:count] for x in compared)
                part.append((equivariance.difference_sums(encoded, transformed), *pixel_errors))
            first += count
            bar.update(count)
    return Model(source, vae, np.concatenate(batches), [_errors(name, part) for name, part in parts.items()])
