"""Cached latents: the posterior of every image of a source, on disk, as `repae_jax.cache_latents` writes it.

A cache is a folder:

  manifest.json                what the cache holds, see `read_manifest`; written last: without it, the cache is unfinished
  shard-00000.array_record     the first records, shard-00001.array_record those that follow, ...
  labels.npy                   int32 [N]
  latents-stats.safetensors    the latents' statistics, for config.init.latent_stats
  settings.json                what was to be made, and
  shard-00000.json             what each shard holds: from these an interrupted cache is continued, and a damaged one repaired

Record i is of image i of the source, so images and latents are joined by their numbers. It holds float32 [h, w, 2C], mean and
then standard deviation of the posterior; in a cache with flips [2, h, w, 2C], the second being the mirrored image's posterior.
The record of an undecodable image is empty. ArrayRecord keeps a hash with each record, which finds changed bytes as they are
read.
"""

import functools
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

FORMAT = 1
MANIFEST, SETTINGS, LABELS, STATS = "manifest.json", "settings.json", "labels.npy", "latents-stats.safetensors"
_OPEN_SHARDS = 256  # at a time and process, far from the usual limit of 1024 files
_COMMAND = "python -m repae_jax.cache_latents"
_ANOTHER = f"make one for this run: `{_COMMAND}` with its config and another --out"


def shard_file(shard):
    """Name of a shard's file."""
    return f"shard-{shard:05d}.array_record"


def record_shape(latent_shape, flips):
    """Shape of a record of a cache: (h, w, 2C), or (2, h, w, 2C) with flips."""
    h, w, c = latent_shape
    return (2, h, w, 2 * c) if flips else (h, w, 2 * c)


def records_hash(source):
    """What tells a source from others: a hash of the names and labels of all its records, in order; decodes nothing.

    Of cached latents, with their images or without, it is that of the images they were made from.
    """
    if isinstance(source, WithMoments):
        source = source.cache  # which was compared with its images
    if isinstance(source, CachedLatents):
        return source.records_hash
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(f"{source.name(i)}\0{label}\n".encode())
    return digest.hexdigest()[:16]


def file_hash(path):
    """Hash of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_damage(folder, entry, check_content):
    """What is wrong with a shard.

    Args:
      folder: the cache.
      entry: {'file', 'bytes', 'sha256', ...}, its entry in the manifest.
      check_content: read it all and compare the checksum, too.

    Returns:
      A few words, or None if nothing is wrong.
    """
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if check_content and file_hash(path) != entry["sha256"]:
        return "another checksum than when it was written"
    return None


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
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no cache of latents at {str(path)!r}: make one with `{_COMMAND} --out {path}`")
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{str(path)!r} has no {MANIFEST}: it is no cache of latents, or an unfinished one; run `{_COMMAND} --out {path}`, "
            "again with the same config, which continues where it stopped"
        )
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {_repair(path)}") from error
    if version != FORMAT:
        raise ValueError(f"{file} is of format {version}, this code reads {FORMAT}: make the cache again in another folder")
    return manifest


class CachedLatents:
    """Random access to the posteriors in a cache. Worker processes open it for themselves.

    Attributes:
      path: the folder.
      labels: int32 `[N]`.
      num_classes: that of the images' source.
      image_size: side in pixels of the images that were encoded.
      latent_shape: (h, w, C).
      flips: whether records hold the mirrored image's posterior, too.
      fingerprint: of the VAE's parameters, `repae_jax.checkpoint.fingerprint`.
      vae: where those came from.
      records_hash: of the images' source, see `records_hash`.
      latent_stats: {'mean', 'var'}, float32 [C], of latents drawn from all posteriors.
    """

    def __init__(self, path):
        """Reads manifest and labels, and checks that the shards are there and whole.

        Args:
          path: folder.

        Raises:
          ValueError: if the cache is unfinished, damaged or of another version.
        """
        manifest = read_manifest(path)
        self.path = str(path)
        self.num_classes = manifest["num_classes"]
        self.image_size = manifest["image_size"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.flips = manifest["flips"]
        self.fingerprint = manifest["fingerprint"]
        self.vae = manifest["vae"]
        self.records_hash = manifest["records_hash"]
        self.latent_stats = {name: np.asarray(values, np.float32) for name, values in manifest["latent_stats"].items()}
        self.labels = _read_labels(Path(path) / LABELS, manifest["labels_sha256"])
        self._bad_names = dict(manifest["bad_records"])
        self._shard_size = manifest["shard_size"]
        self._shape = record_shape(self.latent_shape, self.flips)
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open_shard)
        damages = {entry["file"]: shard_damage(path, entry, check_content=False) for entry in manifest["shards"]}
        found = [f"{file}: {damage}" for file, damage in damages.items() if damage]
        if found:
            raise ValueError(
                f"cache {self.path!r} is damaged, {len(found)} of {len(damages)} shards, first {', '.join(found[:5])}; "
                f"{_repair(path)}"
            )

    def __reduce__(self):
        return CachedLatents, (self.path,)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'moments': float32 [h, w, 2C], 'label': int32}` of record `i`; with flips, [2, h, w, 2C].

        Raises:
          ValueError: if the image could not be decoded when the cache was made, or the record is damaged.
        """
        i = range(len(self))[i]  # IndexError beyond the end
        if i in self._bad_names:
            raise ValueError(f"the image could not be decoded when the cache {self.path!r} was made")
        shard, place = divmod(i, self._shard_size)
        file = Path(self.path) / shard_file(shard)
        try:
            (content,) = self._open(file).read([place])
        except RuntimeError as error:
            raise ValueError(f"record {place} of {file} is damaged ({error}); {_repair(self.path)}") from error
        if len(content) != 4 * math.prod(self._shape):
            raise ValueError(f"record {place} of {file} is {len(content)} bytes, not {self._shape}; {_repair(self.path)}")
        return {"moments": np.frombuffer(content, "<f4").reshape(self._shape), "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return f"{self.path} #{i}" + (f" ({self._bad_names[i]})" if i in self._bad_names else "")


class WithMoments:
    """The images of a source, each with its posterior from a cache.

    Attributes:
      cache: the CachedLatents.
      labels, num_classes, image_size: those of the images.
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


def _repair(path):
    return f"run `{_COMMAND} --out {path}` again with the same config, which makes damaged parts anew"


def _open_shard(file):
    return ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")  # for random access


def _read_labels(file, expected_hash):
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); {_repair(file.parent)}") from error
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise ValueError(f"{file} has another checksum than when it was written; {_repair(file.parent)}")
    return np.load(io.BytesIO(content), allow_pickle=False)
