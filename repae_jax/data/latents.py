"""Cached latents: the posterior of every image of a source, on disk, as `repae_jax.cache_latents` writes it.

A cache is a folder of shards, see `repae_jax.data.shards`, with one more file:

  latents-stats.safetensors    the latents' statistics, for config.init.latent_stats

Record i belongs to image i of the source, so images and latents are joined by their numbers. It holds float32 [h, w, 2C], mean
and then standard deviation of the posterior; in a cache with flips [2, h, w, 2C], the second being the mirrored image's
posterior. Its manifest has these fields besides those of all shards: `latent_shape`, [h, w, C]; `flips`; `precision`, the
VAE's compute dtype; `fingerprint` of its parameters; `vae`, the path or name of its weights; `latent_stats`, {'mean', 'var'},
[C] each.
"""

import math
import os

import numpy as np

from repae_jax.data import records_hash, shards
from repae_jax.ranges import Extent, as_extent, in_words

FORMAT = shards.ShardFormat("cache of latents", "python -m repae_jax.cache_latents", 1)
STATS = "latents-stats.safetensors"
_REMAKE = f"make one for this run: `{FORMAT.command}` with its config and another --out"


def record_shape(latent_shape: tuple[int, int, int], flips: bool) -> tuple[int, ...]:
    """Returns the shape of a cache's records: (h, w, 2C), or (2, h, w, 2C) with flips."""
    h, w, c = latent_shape
    return (2, h, w, 2 * c) if flips else (h, w, 2 * c)


class CachedLatents(shards.Shards):
    """Random access to the posteriors in a cache, by path or address; the fields of its manifest above are attributes."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.path.expanduser(path)
        super().__init__(self.path, FORMAT)
        self.flips, self.fingerprint, self.vae = (self.manifest[name] for name in ("flips", "fingerprint", "vae"))
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.latent_stats = {name: np.asarray(values, np.float32) for name, values in self.manifest["latent_stats"].items()}

    def __getitem__(self, i: int) -> dict:
        """Returns `{'moments': float32 [h, w, 2C], 'label': int32}` of record `i`; with flips, [2, h, w, 2C]."""
        content, shape = self.content(i), record_shape(self.latent_shape, self.flips)
        if len(content) != 4 * math.prod(shape):
            raise self.damaged(i, f"it is {len(content)} bytes, not {shape}")
        return {"moments": np.frombuffer(content, "<f4").reshape(shape), "label": self.labels[i]}


class WithMoments:
    """The images of a source, each with its posterior from a cache.

    The constructor raises ValueError unless the cache was made from these images, by their number, size, labels and names; it
    reads none of them. `contents_hash` has the hashes of the images' files, if they are prepared, and of the cache's.
    """

    def __init__(self, images, cache: CachedLatents):
        sides = (in_words(images.image_size), in_words(cache.image_size))
        for quantity, (here, there) in {"images": (len(images), len(cache)), "pixels on a side": sides}.items():
            if here != there:
                raise ValueError(f"cache {cache.path!r} was made from {there} {quantity}, config.data has {here}; {_REMAKE}")
        differing = np.flatnonzero(images.labels != cache.labels)
        if len(differing):
            first = ", ".join(f"{images.name(i)}: {cache.labels[i]} there, {images.labels[i]} here" for i in differing[:5])
            raise ValueError(f"cache {cache.path!r} has other labels in {len(differing)} places, first {first}; {_REMAKE}")
        here = records_hash(images)
        if here != cache.records_hash:
            names = f"other names (hash {cache.records_hash} there, {here} here)"
            such = "such as files that were renamed, exchanged or are of another folder"
            raise ValueError(f"cache {cache.path!r} was made from images with {names}, {such}; {_REMAKE}")
        self._images, self.cache, self.records_hash = images, cache, here
        self.contents_hash = [getattr(images, "contents_hash", None), cache.contents_hash]
        self.labels, self.num_classes, self.image_size = images.labels, images.num_classes, images.image_size

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i: int) -> dict:
        """Returns the fields of image `i`, and its `moments`; raises the errors of both sources."""
        return {**self._images[i], "moments": self.cache[i]["moments"]}

    def name(self, i: int) -> str:
        """Returns the image's name."""
        return self._images.name(i)


def check_cache(cache: CachedLatents, fingerprint: str, latent_shape: tuple[int, int, int], image_size: Extent) -> None:
    """Raises ValueError unless a cache holds what the run's VAE, of this fingerprint and latent shape, makes of its images."""
    differing = []
    if cache.fingerprint != fingerprint:
        differing.append(f"another VAE (fingerprint {cache.fingerprint}, from {cache.vae!r}; this run's has {fingerprint})")
    shapes, sizes = (cache.latent_shape, tuple(latent_shape)), (cache.image_size, as_extent(image_size))
    for quantity, (there, here) in {"latents of shape": shapes, "an image size of": sizes}.items():
        if there != here:
            differing.append(f"{quantity} {there} (this run's: {here})")
    if differing:
        raise ValueError(f"cache {cache.path!r} was made with {' and '.join(differing)}; {_REMAKE}")
