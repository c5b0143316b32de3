"""Caching latents: `python -m repae_jax.cache_latents --config configs/ldm.py --out /data/latents`.

Encodes the images of a run on a frozen VAE, once and in their order, to a folder that `config.data.cache` takes: means and
standard deviations of the posteriors, and the statistics of the latents; `repae_jax/data/latents.py` describes it. The VAE
computes as in training: in config.precision.compute, with the same number of images per device.

The same command continues where it stopped: a shard appears when it is whole and on disk, and is made again only if it is
damaged. Several processes of jax.distributed (--distributed) on one file system share the shards, each with its own devices.
The files are the same, bit for bit, for the same number and kind of devices in total.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from checkpoints_tools import vae_stats
from repae_jax import buckets, cli, data, images
from repae_jax.data import latents, shard_writer, shards
from repae_jax.distributed import multihost, sharding, stopping
from repae_jax.job import build, frozen_weights, training_data
from repae_jax.ranges import Extent, height_width
from repae_jax.training.checkpoint import fingerprint
from repae_jax.training.workdir import prepare_workdir

SHARD_SIZE = 4096  # records: 134 MB for SD-VAE at 256 pixels
NOTES = ("vae", "images")  # settings that may differ when a cache is continued: files may move


class Latents(shard_writer.RecordMaker):
    """Encodes images by a VAE; records hold the posteriors, of shape `latents.record_shape`.

    `encode` is uint8 `[block_size, H, W, 3]` -> float32 `[block_size, *shape]`; an image's posterior must not depend on others.
    """

    format = latents.FORMAT

    def __init__(self, image_size: Extent, encode: Callable, block_size: int, shape: tuple[int, ...]):
        self.block_size = block_size
        self.record_bytes = 4 * math.prod(shape)
        self.missing = np.zeros((*height_width(image_size), 3), np.uint8)
        self._encode = encode

    @staticmethod
    def read(fields: dict) -> np.ndarray:
        """Returns the pixels."""
        return fields["image"]

    def encode(self, contents: list) -> np.ndarray:
        """Returns the posteriors of a block."""
        pixels = np.zeros((self.block_size, *self.missing.shape), np.uint8)  # the last block is filled up with black images
        pixels[: len(contents)] = contents
        return self._encode(pixels)

    def pack(self, name: Callable, encoded: list, good: np.ndarray) -> tuple:
        """Returns records, and the sums for the statistics; raises RuntimeError if latents are not finite."""
        bad = [j for j in np.flatnonzero(good).tolist() if not np.isfinite(encoded[j]).all()]
        if bad:
            advice = "check config.init.vae, or use config.precision.compute='float32'"
            raise RuntimeError(f"latents of {len(bad)} images are not finite, first {', '.join(map(name, bad[:5]))}; {advice}")
        sums = _sums([record for record, is_good in zip(encoded, good) if is_good], encoded[0].shape[-1] // 2)
        return (record.astype("<f4").tobytes() for record in encoded), {"sums": sums}

    def finish(self, entries: list[dict]) -> tuple:
        """Returns the statistics of all latents, for the manifest and as a file."""
        stats = _merge([entry["sums"] for entry in entries])
        return {"latent_stats": stats}, {latents.STATS: safetensors.numpy.save(vae_stats.to_arrays(stats))}


def _sums(moments, channels):
    """Returns float64 sums over all axes but channels, `[C]` each: of means, squared means and variances; and their count."""
    totals, count = np.zeros((3, channels)), 0
    for record in moments:  # one at a time, to save memory
        mean, std = np.split(record.reshape(-1, record.shape[-1]).astype(np.float64), 2, axis=-1)
        totals += [mean.sum(axis=0), np.square(mean).sum(axis=0), np.square(std).sum(axis=0)]
        count += len(mean)
    return {"count": count} | dict(zip(("mean", "mean_squared", "variance"), totals.tolist()))


def _merge(sums):
    """Returns {'mean', 'var'}, `[C]` each, of latents drawn from all posteriors: the variance is E[std^2] + Var[mean]."""
    count = sum(part["count"] for part in sums)
    if not count:
        raise RuntimeError("no image could be decoded: there are no latents")
    names = ("mean", "mean_squared", "variance")
    mean, square, variance = (np.sum([part[name] for part in sums], axis=0) / count for name in names)
    return {"mean": mean.tolist(), "var": (variance + square - mean**2).tolist()}


def make_encode(job: build.Job, params: dict, flips: bool) -> Callable:
    """Returns the function that encodes as training does: uint8 `[b, H, W, 3]` -> `[b, h, w, 2C]`, with flips `[b, 2, …]`."""

    @jax.jit
    def moments(params, pixels):
        posterior = job.nets.vae.apply({"params": params}, images.to_float(pixels), method="encode")
        return jnp.concatenate([posterior.mean, posterior.std], axis=-1)

    def encode(pixels):
        sides = [pixels, pixels[:, :, ::-1]] if flips else [pixels]
        encoded = [np.asarray(moments(params, jax.device_put(side, sharding.batch_sharding(job.mesh)))) for side in sides]
        return np.stack(encoded, axis=1) if flips else encoded[0]

    return encode


def _settings(job, params, flips):
    """Returns the settings that identify a cache, besides its images and shards, and NOTES."""
    config, section = job.config, job.config["data"]
    return {
        "latent_shape": list(job.latent_shape), "flips": flips, "precision": config["precision"]["compute"],
        "fingerprint": fingerprint(params), "vae": config["init"]["vae"],
        "images": {"source": section["source"], "options": data.given(section["options"])},
    }  # fmt: skip


def _local(config):
    """Returns the config for this process' devices, with only what encoding needs."""
    config = build.plain_config(config)
    per_device = max(1, config["data"]["batch_size"] // jax.device_count())
    section = {**config["data"], "batch_size": per_device * jax.local_device_count(), "cache": ""}
    return {**config, "attention": "xla", "mesh": {"fsdp": 1, "slices": 1}, "accumulation": 1, "data": section}


def cache_latents(config, out: str, flips: bool = False, shard_size: int = SHARD_SIZE) -> int | None:
    """Caches the latents of a run's images; one of several processes does its part, and waits for the others.

    Args:
      config: ConfigDict of a run on a frozen VAE, see configs/.
      out: folder; continued if it exists.
      flips: whether to encode the mirrored images, too.

    Returns:
      Number of shards that this process made; None if SIGTERM or Ctrl-C ended the work early.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; allowed: 1 and above")
    if buckets.is_address(out):
        raise ValueError(f"the cache goes to a local or mounted disk, not to {out}: give such an --out")
    multihost.assert_same_config({"flips": flips, "shard_size": shard_size, **build.plain_config(config)})
    with stopping.stop_signal() as stopped:
        config = _local(config)
        section = config["data"]
        job = build.build(config, jax.local_devices(), encoders=())
        if not job.frozen_vae:
            trains = f"config.job={config['job']!r} trains its VAE, whose latents change"
            raise ValueError(f"{trains}: only those of a frozen VAE can be cached")
        source = training_data.make_images(config)
        folder = Path(prepare_workdir(out))
        multihost.check_shared(folder)
        params = frozen_weights.load_frozen(job)["vae"]
        shape = latents.record_shape(job.latent_shape, flips)
        maker = Latents(source.image_size, make_encode(job, params, flips), section["batch_size"], shape)
        writer = shard_writer.ShardWriter(
            folder, source, maker, _settings(job, params, flips), shard_size=shard_size, notes=NOTES,
            workers=section["workers"], max_bad_fraction=section["max_bad_fraction"],
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        return writer.run(stopped)


def summary(folder: str | Path) -> str:
    """Returns a paragraph on a finished cache, with the flags for training."""
    manifest = shards.read_manifest(folder, latents.FORMAT)
    folder, size = Path(folder), sum(shard["bytes"] for shard in manifest["shards"])
    rounded = {name: np.round(values, 4).tolist() for name, values in manifest["latent_stats"].items()}
    return (
        f"{folder}: {manifest['records']} records ({len(manifest['bad_records'])} undecodable) of "
        f"{latents.record_shape(manifest['latent_shape'], manifest['flips'])} in {len(manifest['shards'])} shards, "
        f"{size / 1e9:.2f} GB\nlatent statistics: mean {rounded['mean']}, var {rounded['var']}\n"
        f"train with --config.data.cache={folder} --config.init.latent_stats={folder / latents.STATS}"
    )


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.ConfigParser(description=__doc__.split("\n\n")[0], formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    place = "folder of the cache, on a disk that all processes share; continued if it exists"
    add("--out", type=cli.path, required=True, help=place)
    add("--flips", action="store_true", help="encode the mirrored images, too, for training with random flips")
    add("--shard_size", type=cli.whole(1), default=SHARD_SIZE, help="images in a shard, made as a whole or not at all")
    cli.add_processes(parser)
    return parser.parse_args(argv)


@cli.command(parse_args)
def main(args):
    """Entry point."""
    made = cache_latents(args.config, args.out, args.flips, args.shard_size)
    shard_writer.print_outcome(made, jax.process_index(), lambda: summary(args.out))


if __name__ == "__main__":
    main()
