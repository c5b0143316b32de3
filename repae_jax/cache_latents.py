"""Caching latents: `python -m repae_jax.cache_latents --config configs/ldm.py --out /data/latents`.

Encodes the images of a run on a frozen VAE, once and in their order, to a folder that `config.data.cache` takes: means and
standard deviations of the posteriors, and the statistics of the latents; `repae_jax/data/latents.py` describes it. The VAE
computes as in training, in config.precision.compute, on as many images at a time and device.

The same command continues where it stopped: a shard of the cache is there when it is whole and on disk, and then never made
again unless it was damaged since. Several processes on one file system, as jax.distributed counts them (--distributed), take
turns with the shards, each on its own devices. The files are the same, bit for bit, on as many devices of a kind altogether.
"""

import functools
import hashlib
import io
import json
import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import app, flags, logging
from array_record.python.array_record_module import ArrayRecordWriter
from grain import MapDataset
from tqdm import tqdm

from checkpoints_tools import vae as vae_files
from checkpoints_tools import weights
from repae_jax import build, images, sharding, train
from repae_jax.checkpoint import fingerprint, prepare_workdir
from repae_jax.data import latents, loader

SHARD_SIZE = 4096  # records; 134 MB of SD-VAE's at 256 pixels
NOTES = ("vae", "images")  # settings that may differ when a cache is continued: files may move
_POLL_SECONDS = 1.0


class _Blocks:
    """Blocks of a source's images, decoded in order; what is no image stays black.

    Item k is (uint8 [block_size, H, W, 3], [(record, error), ...]), of the records `ranges[k]`, a (first, end), and filled up
    with black images.
    """

    def __init__(self, source, ranges, block_size):
        self._source = source
        self._ranges = ranges
        self._block_size = block_size

    def __len__(self):
        return len(self._ranges)

    def __getitem__(self, k):
        decoded = np.zeros((self._block_size, self._source.image_size, self._source.image_size, 3), np.uint8)
        failures = []
        for place, record in enumerate(range(*self._ranges[k])):
            try:
                decoded[place] = self._source[record]["image"]
            except Exception as error:  # as in the training's loader
                failures.append((record, loader.describe_error(error)))
        return decoded, failures


class CacheWriter:
    """One process' part in making a cache.

    Args:
      folder: of the cache, which exists.
      source: of the images.
      encode: uint8 [block_size, H, W, 3] -> float32 [block_size, *`latents.record_shape`]; an image's posterior must not depend
        on the others.
      block_size: images at a time.
      settings: dict, what `_settings` returns: the manifest without its results.
      workers: processes that decode images; 0 decodes in threads.
      max_bad_fraction: share of undecodable images above which the work ends.
      process_index, process_count: process p makes the shards p, p + process_count, ...
    """

    def __init__(
        self, folder, source, encode, block_size, settings, *, workers=0, max_bad_fraction=0.0, process_index=0, process_count=1
    ):
        self._folder = Path(folder)
        self._source = source
        self._encode = encode
        self._block_size = block_size
        self._settings = settings
        self._workers = workers
        self._max_bad = int(max_bad_fraction * len(source))
        self._process_index = process_index
        starts = range(0, len(source), settings["shard_size"])
        self._ranges = [(start, min(start + settings["shard_size"], len(source))) for start in starts]
        self._own_shards = range(process_index, len(starts), process_count)
        self._bad_records = []

    def run(self, stopped):
        """Makes the shards that are missing or damaged, and once those of all processes are there, the manifest.

        Args:
          stopped: Event; once it is set, the shard being made is given up.

        Returns:
          How many shards were made here; None if stopped before the cache was finished.

        Raises:
          ValueError: if the folder holds, or is to hold, a cache made with other settings, or has not enough space.
          RuntimeError: if too many images cannot be decoded, or latents are not finite.
          OSError: if something cannot be written.
        """
        if not self._agree(stopped):
            return None
        todo = [shard for shard in self._own_shards if not self._is_whole(shard)]
        self._check_space()
        if not self._make(todo, stopped):
            return None
        if not self._wait_for([_entry_file(shard) for shard in range(len(self._ranges))], stopped):
            return None
        if self._process_index == 0:
            self._finish()
        return len(todo) if self._wait_for([latents.MANIFEST], stopped) else None

    def _agree(self, stopped):
        """Process 0 writes the settings if it is the first to come; all compare theirs. Removes what a killed process left."""
        file = self._folder / latents.SETTINGS
        for shard in self._own_shards:
            self._remove(f".shard-{shard:05d}.*.tmp")
        if self._process_index == 0:
            for name in (latents.SETTINGS, latents.LABELS, latents.STATS, latents.MANIFEST):
                self._remove(f".{name}.*.tmp")
            if not file.exists():
                weights.write_json(file, self._settings)
        if not self._wait_for([latents.SETTINGS], stopped):
            return False
        stored = weights.read_json(file)
        compared = sorted((stored.keys() | self._settings.keys()) - set(NOTES))
        differing = [
            f"\n  {name}: {stored.get(name)!r} there, {self._settings.get(name)!r} here"
            for name in compared
            if stored.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self._folder} holds a cache made with other settings; choose another --out, or use the old ones:"
                + "".join(differing)
            )
        self._settings = stored  # the notes of whoever began
        return True

    def _remove(self, pattern):
        for left in self._folder.glob(pattern):
            left.unlink(missing_ok=True)

    def _wait_for(self, names, stopped):
        """Waits until other processes have written files; False if stopped before.

        Looking at the files needs no collective operation, which some backends let wait for minutes only.
        """
        missing = [name for name in names if not (self._folder / name).exists()]
        if missing:
            logging.info("waiting for the other processes: %d files, first %s", len(missing), missing[0])
        while missing and not stopped.is_set():
            time.sleep(_POLL_SECONDS)
            missing = [name for name in missing if not (self._folder / name).exists()]
        return not missing

    def _is_whole(self, shard):
        """Whether a shard is finished and undamaged; its undecodable records are noted."""
        file = self._folder / _entry_file(shard)
        if not file.exists():
            return False
        try:
            entry = weights.read_json(file)
            damage = latents.shard_damage(self._folder, entry, check_content=True)
        except (ValueError, KeyError) as error:
            damage = f"{file.name}: {error}"
        if damage:
            logging.warning("%s is damaged (%s) and made again", self._folder / latents.shard_file(shard), damage)
            file.unlink()
            return False
        self._bad_records += [record for record, _ in entry["bad_records"]]
        return True

    def _check_space(self):
        """Refuses to begin what the disk cannot hold."""
        missing = [shard for shard in range(len(self._ranges)) if not (self._folder / _entry_file(shard)).exists()]
        shape = latents.record_shape(self._settings["latent_shape"], self._settings["flips"])
        needed, free = 4 * math.prod(shape) * sum(map(self._count, missing)), shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"the cache needs {needed / 1e9:.1f} GB more, the disk of {self._folder} has {free / 1e9:.1f} GB free: make "
                "space, or choose another --out"
            )

    def _count(self, shard):
        """Records of a shard."""
        first, end = self._ranges[shard]
        return end - first

    def _blocks(self, shard):
        """The records of a shard, cut into blocks: [(first, end), ...]."""
        first, end = self._ranges[shard]
        return [(at, min(at + self._block_size, end)) for at in range(first, end, self._block_size)]

    def _make(self, todo, stopped):
        """Makes shards; False if stopped."""
        if not todo:
            return True
        ranges = [block for shard in todo for block in self._blocks(shard)]
        own, missing = (sum(self._count(shard) for shard in shards) for shards in (self._own_shards, todo))
        decoded = loader.read_ahead(MapDataset.source(_Blocks(self._source, ranges, self._block_size)), self._workers)
        bar = tqdm(total=own, initial=own - missing, unit="img", desc="encoding", disable=self._process_index != 0)
        pool, writing = ThreadPoolExecutor(1), None  # a shard is written while the next one is encoded
        try:
            for shard in todo:
                made, failures = [], []
                for first, end in self._blocks(shard):
                    if stopped.is_set():
                        return False
                    pixels, failed = next(decoded)
                    self._note_failures(failed)
                    failures += failed
                    made.append(self._encode(pixels)[: end - first])
                    bar.update(end - first)
                if writing:
                    writing.result()
                writing = pool.submit(self._write_shard, shard, np.concatenate(made), [record for record, _ in failures])
            writing.result()
        finally:
            pool.shutdown()
            bar.close()
            decoded.close()
        return True

    def _note_failures(self, failures):
        for record, error in failures:
            self._bad_records.append(record)
            logging.warning("Leaving out undecodable record %s: %s", self._source.name(record), error)
            if len(self._bad_records) > self._max_bad:
                raise RuntimeError(loader.too_many_bad(self._source, self._bad_records, self._max_bad, error))

    def _write_shard(self, shard, moments, bad):
        """Writes a shard and its entry, with the sums that the statistics are made of; the entry comes last."""
        first, end = self._ranges[shard]
        good = np.isin(np.arange(first, end), bad, invert=True)
        finite = np.isfinite(moments).all(axis=tuple(range(1, moments.ndim))) | ~good
        if not finite.all():
            names = ", ".join(self._source.name(first + int(i)) for i in np.flatnonzero(~finite)[:5])
            raise RuntimeError(
                f"latents of {(~finite).sum()} images are not finite, first {names}; check config.init.vae, or use "
                "config.precision.compute='float32'"
            )
        entry = {
            "file": latents.shard_file(shard),
            "records": end - first,
            "bad_records": [[i, self._source.name(i)] for i in bad],
            "sums": _sums(moments[good]),
        }

        def write_records(temporary):
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # one record a chunk: for random access
            for record, is_good in zip(moments, good):
                writer.write(record.astype("<f4").tobytes() if is_good else b"")
            writer.close()
            entry.update(bytes=temporary.stat().st_size, sha256=latents.file_hash(temporary))

        def write_entry(temporary):
            temporary.write_text(json.dumps(entry, indent=2) + "\n")

        files = {latents.shard_file(shard): write_records, _entry_file(shard): write_entry}
        weights.write_all({self._folder / name: write for name, write in files.items()}, overwrite=True)

    def _finish(self):
        """Writes labels, statistics and manifest, in this order, unless they are there."""
        entries = [weights.read_json(self._folder / _entry_file(shard)) for shard in range(len(self._ranges))]
        stats = _merge([entry["sums"] for entry in entries])
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self._source.labels, np.int32))
        labels = buffer.getvalue()
        manifest = self._settings | {
            "bad_records": [bad for entry in entries for bad in entry["bad_records"]],
            "shards": [{name: entry[name] for name in ("file", "records", "bytes", "sha256")} for entry in entries],
            "labels_sha256": hashlib.sha256(labels).hexdigest(),
            "latent_stats": stats,
        }
        files = {
            latents.LABELS: labels,
            latents.STATS: safetensors.numpy.save(vae_files.published_stats(stats)),
            latents.MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode(),
        }
        paths = {self._folder / name: content for name, content in files.items()}
        if not all(path.is_file() and path.read_bytes() == content for path, content in paths.items()):
            writes = {path: functools.partial(Path.write_bytes, data=content) for path, content in paths.items()}
            weights.write_all(writes, overwrite=True)


def _entry_file(shard):
    """Name of the file that tells what a shard holds."""
    return latents.shard_file(shard).replace(".array_record", ".json")


def _sums(moments):
    """Sums over all but the channels, [C] each, in float64: of means, their squares and the variances; and their number."""
    totals, count = np.zeros((3, moments.shape[-1] // 2)), 0
    for record in moments:  # one at a time: float64 takes space
        mean, std = np.split(record.reshape(-1, record.shape[-1]).astype(np.float64), 2, axis=-1)
        totals += [mean.sum(axis=0), np.square(mean).sum(axis=0), np.square(std).sum(axis=0)]
        count += len(mean)
    return {"count": count} | dict(zip(("mean", "mean_squared", "variance"), totals.tolist()))


def _merge(sums):
    """{'mean', 'var'}, [C] each, of latents drawn from all posteriors: the variance is E[std^2] + Var[mean]."""
    count = sum(part["count"] for part in sums)
    if not count:
        raise RuntimeError("no image could be decoded: there are no latents")
    mean, square, variance = (
        np.sum([part[name] for part in sums], axis=0) / count for name in ("mean", "mean_squared", "variance")
    )
    return {"mean": mean.tolist(), "var": (variance + square - mean**2).tolist()}


def make_encode(job, params, flips):
    """Function for CacheWriter that encodes as training does.

    Args:
      job: Job.
      params: of its VAE, on its mesh.
      flips: encode the mirrored images, too.

    Returns:
      uint8 [b, H, W, 3] -> float32 numpy [b, h, w, 2C], or [b, 2, h, w, 2C] with flips.
    """

    @jax.jit
    def moments(params, pixels):
        posterior = job.nets.vae.apply({"params": params}, images.to_float(pixels), method="encode")
        return jnp.concatenate([posterior.mean, posterior.std], axis=-1)

    def encode(pixels):
        sides = [pixels, pixels[:, :, ::-1]] if flips else [pixels]
        made = [np.asarray(moments(params, jax.device_put(side, sharding.batch_sharding(job.mesh)))) for side in sides]
        return np.stack(made, axis=1) if flips else made[0]

    return encode


def _settings(job, source, params, flips, shard_size):
    """What makes a cache this one and no other, and NOTES."""
    data = job.config["data"]
    return {
        "format": latents.FORMAT,
        "records": len(source),
        "records_hash": latents.records_hash(source),
        "num_classes": source.num_classes,
        "image_size": source.image_size,
        "latent_shape": list(job.latent_shape),
        "flips": flips,
        "precision": job.config["precision"]["compute"],
        "fingerprint": fingerprint(params),
        "shard_size": shard_size,
        "vae": job.config["init"]["vae"],
        "images": {"source": data["source"], "options": data["options"]},
    }


def _local(config):
    """The config with nothing in it but what encoding needs, for this process' devices."""
    config = build.plain_config(config)
    per_device = max(1, config["data"]["batch_size"] // jax.device_count())
    data = {**config["data"], "batch_size": per_device * jax.local_device_count(), "cache": ""}
    return {**config, "mesh": {"fsdp": 1}, "accumulation": 1, "data": data}


def cache_latents(config, out, flips=False, shard_size=SHARD_SIZE):
    """Caches the latents of a run's images; a process of several does its part, and waits for the others.

    Args:
      config: ConfigDict of a run on a frozen VAE, see configs/.
      out: folder; continued if it exists.
      flips: encode the mirrored images, too.
      shard_size: records of a shard.

    Returns:
      How many shards this process made; None if SIGTERM or Ctrl-C ended the work early.

    Raises:
      ValueError, FileNotFoundError: for anything wrong with config, weights or folder.
      RuntimeError, OSError: as `CacheWriter.run`.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; allowed: 1 and above")
    if "://" in str(out):
        raise ValueError(f"the cache goes to a local or mounted disk, not to {out}: give such an --out")
    with train.stop_signal() as stopped:
        config = _local(config)
        job = build.build(config, jax.local_devices(), encoders=())
        if not job.frozen_vae:
            raise ValueError(
                f"config.job={config['job']!r} trains its VAE, whose latents change: only those of a frozen VAE can be cached"
            )
        source = build.make_images(config)
        folder = Path(prepare_workdir(out))
        params = build.load_frozen(job)["vae"]
        writer = CacheWriter(
            folder,
            source,
            make_encode(job, params, flips),
            config["data"]["batch_size"],
            _settings(job, source, params, flips, shard_size),
            workers=config["data"]["workers"],
            max_bad_fraction=config["data"]["max_bad_fraction"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return writer.run(stopped)


def summary(folder):
    """A paragraph on a finished cache, and what to give to training."""
    manifest = latents.read_manifest(folder)
    folder, size = Path(folder), sum(shard["bytes"] for shard in manifest["shards"])
    rounded = {name: np.round(values, 4).tolist() for name, values in manifest["latent_stats"].items()}
    return (
        f"{folder}: {manifest['records']} records ({len(manifest['bad_records'])} undecodable) of "
        f"{latents.record_shape(manifest['latent_shape'], manifest['flips'])} in {len(manifest['shards'])} shards, "
        f"{size / 1e9:.2f} GB\nlatent statistics: mean {rounded['mean']}, var {rounded['var']}\n"
        f"train with --config.data.cache={folder} --config.init.latent_stats={folder / latents.STATS}"
    )


def _define_flags():
    """Only of this program: other programs' modules have flags of the same names."""
    flags.declare_key_flag("config")
    flags.DEFINE_string("out", None, "Folder of the cache, on a disk that all processes share. Continued if it exists.")
    flags.DEFINE_bool("flips", False, "Encode the mirrored images, too, for training with random flips.")
    flags.DEFINE_integer("shard_size", SHARD_SIZE, "Images in a shard, which is made as a whole or not at all.", lower_bound=1)
    flags.DEFINE_bool("distributed", False, "Work in several processes: calls jax.distributed.initialize().")
    flags.mark_flags_as_required(["config", "out"])


def main(_):
    """Entry point: mistakes end in one line, not in a traceback."""
    options = flags.FLAGS
    try:
        if options.distributed:
            jax.distributed.initialize()
        made = cache_latents(options.config, options.out, options.flips, options.shard_size)
        if made is None:
            print("asked to stop: what is finished is kept; run the same command to continue")
        elif jax.process_index() == 0:
            print(("" if made else "finished already; every shard is as it was written\n") + summary(options.out))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if train.is_internal(error):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    jax.config.config_with_absl()
    app.run(main, flags_parser=train.parse_flags)
