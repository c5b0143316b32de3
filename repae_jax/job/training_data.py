"""The images, cached latents and batches of a job, as `config.data` describes them."""

import jax

from repae_jax import data
from repae_jax.data.latents import CachedLatents, WithMoments, check_cache
from repae_jax.data.loader import Loader
from repae_jax.job.config import read_config


def make_images(config):
    """Returns the source of images of `config.data`, its labels checked against num_classes."""
    section = read_config(config).data
    source = data.make_source(section.source, section.image_size, **section.options)
    data.check_labels(source, section.num_classes)
    return source


def make_cached_source(job, frozen_vae: str):
    """Returns the latents of `config.data.cache`, with images for encoders; the VAE's fingerprint must be the cache's."""
    section = job.config["data"]
    cache = CachedLatents(section["cache"])
    check_cache(cache, frozen_vae, job.latent_shape, section["image_size"])
    if bool(section["flip_probability"]) != cache.flips:
        made, other = ("with", "without") if cache.flips else ("without", "with")
        raise ValueError(
            f"config.data.flip_probability={section['flip_probability']}, but {section['cache']} was made {made} mirrored "
            f"images: change the probability, or make a cache {other} --flips"
        )
    data.check_labels(cache, section["num_classes"])
    return WithMoments(make_images(job.config), cache) if job.encoders else cache


def make_loader(job, source, workers: int | None = None) -> Loader:
    """Returns the loader of this process's share of every batch, with config.data.workers processes by default."""
    section = job.config["data"]
    return Loader(
        source, batch_size=section["batch_size"], seed=job.config["seed"], max_bad_fraction=section["max_bad_fraction"],
        workers=section["workers"] if workers is None else workers,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
