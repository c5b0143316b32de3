"""Cached latents: the posterior of every image of a source, on disk, as `repae_jax.cache_latents` writes it.

A cache is a folder of shards, see `repae_jax.data.shards`, with one file more:

  latents-stats.safetensors    the latents' statistics, for config.init.latent_stats

Record i is of image i of the source, so images and latents are joined by their numbers. It holds float32 [h, w, 2C], mean and
then standard deviation of the posterior; in a cache with flips [2, h, w, 2C], the second being the mirrored image's posterior.
"""

import hashlib
import math
import os

import numpy as np

from repae_jax.data import array_record, shards

KIND = shards.Kind("cache of latents", "python -m repae_jax.cache_latents", 1)
STATS = "latents-stats.safetensors"
_ANOTHER = f"make one for this run: `{KIND.command}` with its config and another --out"


def record_shape(latent_shape, flips):
    """Shape of a record of a cache: (h, w, 2C), or (2, h, w, 2C) with flips."""
    h, w, c = latent_shape
    return (2, h, w, 2 * c) if flips else (h, w, 2 * c)


def records_hash(source):
    """What tells a source from others: a hash of the names and labels of all its records, in order; decodes nothing.

    Of cached latents, with their images or without, and of PreparedImages it is that of the images they were made from.
    """
    if isinstance(source, WithMoments):
        source = source.cache  # which was compared with its images
    if isinstance(source, (CachedLatents, array_record.PreparedImages)):
        return source.records_hash
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(f"{source.name(i)}\0{label}\n".encode())
    return digest.hexdigest()[:16]


def read_manifest(path):
    """The manifest of a cache.

    Args:
      path: folder.

    Returns:
      dict: `format`; `records`, their number; `bad_records`, [[record, name], ...] of the undecodable images; `num_classes`;
      `image_size`; `latent_shape`, [h, w, C]; `flips`; `precision`, that the VAE computed in; `fingerprint` of its parameters;
      `vae`, where they came from; `images`, {'source', 'options'}; `records_hash` of that source; `shard_size`, records of
      all shards but the last; `shards`, [{'file', 'records', 'bytes', 'sha256'}, ...]; `labels_sha256`; `latent_stats`,
      {'mean', 'var'}, [C] each.

    Raises:
      ValueError: if there is no finished cache, or the manifest is damaged or of another version.
    """
    return shards.read_manifest(path, KIND)


class CachedLatents:
    """Random access to the posteriors in a cache. Worker processes open it for themselves.

    Attributes:
      path: the folder.
      labels: int32 `[N]`.
      num_classes: that of the images' source.
      image_size: side in pixels of the images that were encoded.
      latent_shape: (h, w, C).
      flips: whether records hold the mirrored image's posterior, too.
      fingerprint: of the VAE's parameters, `repae_jax.training.checkpoint.fingerprint`.
      vae: where those came from.
      records_hash: of the images' source, see `records_hash`.
      contents_hash: of the files.
      latent_stats: {'mean', 'var'}, float32 [C], of latents drawn from all posteriors.
    """

    def __init__(self, path):
        """Reads manifest and labels, and checks that the shards are there and whole.

        Args:
          path: folder.

        Raises:
          ValueError: if the cache is unfinished, damaged or of another version.
        """
        path = os.path.expanduser(path)
        manifest = read_manifest(path)
        self._shards = shards.Shards(path, KIND)
        self.path = str(path)
        self.num_classes = manifest["num_classes"]
        self.image_size = manifest["image_size"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.flips = manifest["flips"]
        self.fingerprint = manifest["fingerprint"]
        self.vae = manifest["vae"]
        self.records_hash = manifest["records_hash"]
        self.contents_hash = self._shards.contents_hash
        self.latent_stats = {name: np.asarray(values, np.float32) for name, values in manifest["latent_stats"].items()}
        self.labels = self._shards.labels
        self._shape = record_shape(self.latent_shape, self.flips)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'moments': float32 [h, w, 2C], 'label': int32}` of record `i`; with flips, [2, h, w, 2C].

        Raises:
          ValueError: if the image could not be decoded when the cache was made, or the record is damaged.
        """
        content = self._shards[i]
        if len(content) != 4 * math.prod(self._shape):
            raise self._shards.damaged(i, f"it is {len(content)} bytes, not {self._shape}")
        return {"moments": np.frombuffer(content, "<f4").reshape(self._shape), "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return self._shards.name(i)


class WithMoments:
    """The images of a source, each with its posterior from a cache.

    Attributes:
      cache: the CachedLatents.
      labels, num_classes, image_size: those of the images.
      contents_hash: of the cache's files, and of the images' if they are prepared.
    """

    def __init__(self, images, cache):
        """Checks that the cache was made from these images, by their names and labels; reads none of them.

        Args:
          images: a source.
          cache: CachedLatents.

        Raises:
          ValueError: if they differ in number, size, labels or names.
        """
        for what, here, there in (
            ("images", len(images), len(cache)),
            ("pixels on a side", images.image_size, cache.image_size),
        ):
            if here != there:
                raise ValueError(f"cache {cache.path!r} was made from {there} {what}, config.data has {here}; {_ANOTHER}")
        differing = np.flatnonzero(images.labels != cache.labels)
        if len(differing):
            first = ", ".join(f"{images.name(i)}: {cache.labels[i]} there, {images.labels[i]} here" for i in differing[:5])
            raise ValueError(f"cache {cache.path!r} has other labels in {len(differing)} places, first {first}; {_ANOTHER}")
        here = records_hash(images)
        if here != cache.records_hash:
            raise ValueError(
                f"cache {cache.path!r} was made from images with other names (hash {cache.records_hash} there, {here} here), "
                f"such as files that were renamed, exchanged or are of another folder; {_ANOTHER}"
            )
        self._images = images
        self.cache = cache
        self.contents_hash = [getattr(images, "contents_hash", None), cache.contents_hash]
        self.labels, self.num_classes, self.image_size = images.labels, images.num_classes, images.image_size

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        """Returns the fields of the image, and `moments` of the cache.

        Raises:
          Exception: if either cannot be read.
        """
        return {**self._images[i], "moments": self.cache[i]["moments"]}

    def name(self, i):
        """The image's name."""
        return self._images.name(i)


def check_cache(cache, fingerprint, latent_shape, image_size):
    """Checks that a cache holds what a run's VAE makes of its images.

    Args:
      cache: CachedLatents.
      fingerprint: of the run's VAE.
      latent_shape: (h, w, C) of the run.
      image_size: of the run, in pixels.

    Raises:
      ValueError: if not, naming what differs.
    """
    differing = []
    if cache.fingerprint != fingerprint:
        differing.append(f"another VAE (fingerprint {cache.fingerprint}, from {cache.vae!r}; this run's has {fingerprint})")
    for what, there, here in (
        ("latents of shape", cache.latent_shape, tuple(latent_shape)),
        ("an image size of", cache.image_size, image_size),
    ):
        if there != here:
            differing.append(f"{what} {there} (this run's: {here})")
    if differing:
        raise ValueError(f"cache {cache.path!r} was made with {' and '.join(differing)}; {_ANOTHER}")
