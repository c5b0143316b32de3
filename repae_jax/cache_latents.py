"""Caching latents: `python -m repae_jax.cache_latents --config configs/ldm.py --out /data/latents`.

Encodes the images of a run on a frozen VAE, once and in their order, to a folder that `config.data.cache` takes: means and
standard deviations of the posteriors, and the statistics of the latents; `repae_jax/data/latents.py` describes it. The VAE
computes as in training, in config.precision.compute, on as many images at a time and device.

The same command continues where it stopped: a shard of the cache is there when it is whole and on disk, and then never made
again unless it was damaged since. Several processes on one file system, as jax.distributed counts them (--distributed), take
turns with the shards, each on its own devices. The files are the same, bit for bit, on as many devices of a kind altogether.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags

from checkpoints_tools import vae_stats
from repae_jax import buckets, cli, data, images
from repae_jax.data import latents, shard_writer
from repae_jax.distributed import multihost, sharding
from repae_jax.job import build
from repae_jax.training.checkpoint import fingerprint, prepare_workdir

SHARD_SIZE = 4096  # records; 134 MB of SD-VAE's at 256 pixels
NOTES = ("vae", "images")  # settings that may differ when a cache is continued: files may move


class Latents:
    """Latents as `shard_writer.ShardWriter` makes records of them.

    Args:
      image_size: side of the images in pixels.
      encode: uint8 [block_size, H, W, 3] -> float32 [block_size, *shape]; an image's posterior must not depend on the others.
      block_size: images at a time.
      shape: of a record, `latents.record_shape`.
    """

    kind = latents.KIND

    def __init__(self, image_size, encode, block_size, shape):
        self.block_size = block_size
        self.record_bytes = 4 * math.prod(shape)
        self._image_size = image_size
        self._encode = encode

    def blocks(self, source, ranges):
        """Blocks of images."""
        black = np.zeros((self._image_size, self._image_size, 3), np.uint8)
        return shard_writer.Blocks(source, ranges, _pixels, black)

    def encode(self, images_of_block):
        """Moments of each image; the last block is filled up with black ones."""
        pixels = np.zeros((self.block_size, self._image_size, self._image_size, 3), np.uint8)
        pixels[: len(images_of_block)] = images_of_block
        return self._encode(pixels)

    def pack(self, name, moments, good):
        """Records, and the sums that the statistics are made of; RuntimeError if latents are not finite."""
        finite = [bool(np.isfinite(record).all()) or not is_good for record, is_good in zip(moments, good)]
        if not all(finite):
            names = ", ".join(name(int(i)) for i in np.flatnonzero(np.logical_not(finite))[:5])
            raise RuntimeError(
                f"latents of {finite.count(False)} images are not finite, first {names}; check config.init.vae, or use "
                "config.precision.compute='float32'"
            )
        sums = _sums([record for record, is_good in zip(moments, good) if is_good], moments[0].shape[-1] // 2)
        return (record.astype("<f4").tobytes() for record in moments), {"sums": sums}

    def finish(self, entries):
        """Statistics of all latents, for the manifest and in a file of their own."""
        stats = _merge([entry["sums"] for entry in entries])
        return {"latent_stats": stats}, {latents.STATS: safetensors.numpy.save(vae_stats.to_arrays(stats))}


def _pixels(fields):
    return fields["image"]


def _sums(moments, channels):
    """Sums over all but the channels, [C] each, in float64: of means, their squares and the variances; and their number."""
    totals, count = np.zeros((3, channels)), 0
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
    """Function for Latents that encodes as training does.

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
    section = job.config["data"]
    return {
        "format": latents.KIND.format,
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
        "images": {"source": section["source"], "options": data.given(section["options"])},
    }


def _local(config):
    """The config with nothing in it but what encoding needs, for this process' devices."""
    config = build.plain_config(config)
    per_device = max(1, config["data"]["batch_size"] // jax.device_count())
    section = {**config["data"], "batch_size": per_device * jax.local_device_count(), "cache": ""}
    return {**config, "mesh": {"fsdp": 1, "slices": 1}, "accumulation": 1, "data": section}


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
      RuntimeError, OSError: as `ShardWriter.run`.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; allowed: 1 and above")
    if buckets.is_address(out):
        raise ValueError(f"the cache goes to a local or mounted disk, not to {out}: give such an --out")
    multihost.assert_same_config({"flips": flips, "shard_size": shard_size, **build.plain_config(config)})
    with multihost.stop_signal() as stopped:
        config = _local(config)
        job = build.build(config, jax.local_devices(), encoders=())
        if not job.frozen_vae:
            raise ValueError(
                f"config.job={config['job']!r} trains its VAE, whose latents change: only those of a frozen VAE can be cached"
            )
        source = build.make_images(config)
        folder = Path(prepare_workdir(out))
        multihost.check_shared(folder)
        params = build.load_frozen(job)["vae"]
        shape = latents.record_shape(job.latent_shape, flips)
        writer = shard_writer.ShardWriter(
            folder,
            source,
            Latents(source.image_size, make_encode(job, params, flips), config["data"]["batch_size"], shape),
            _settings(job, source, params, flips, shard_size),
            notes=NOTES,
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
    cli.define_config()
    cli.define_path("out", "Folder of the cache, on a disk that all processes share. Continued if it exists.")
    flags.DEFINE_bool("flips", False, "Encode the mirrored images, too, for training with random flips.")
    flags.DEFINE_integer("shard_size", SHARD_SIZE, "Images in a shard, which is made as a whole or not at all.", lower_bound=1)
    cli.define_processes()
    flags.mark_flag_as_required("out")


def main(_):
    """Entry point."""
    options = flags.FLAGS
    with multihost.abort_all_on_error(), cli.ending():
        cli.start_processes()
        made = cache_latents(options.config, options.out, options.flips, options.shard_size)
        if made is None:
            print("asked to stop: what is finished is kept; run the same command to continue")
        elif jax.process_index() == 0:
            print(("" if made else "finished already; every shard is as it was written\n") + summary(options.out))


if __name__ == "__main__":
    jax.config.config_with_absl()
    cli.run(main, _define_flags)
