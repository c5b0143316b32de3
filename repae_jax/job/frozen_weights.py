"""Weights that are not trained: encoders, LPIPS, and the VAE of a job that does not train it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from checkpoints_tools.lpips import load_lpips
from checkpoints_tools.vae import read_vae_params
from checkpoints_tools.vit import load_encoder
from repae_jax.distributed import multihost, sharding
from repae_jax.files import RANDOM
from repae_jax.models import encoders
from repae_jax.ranges import height_width


def describe_encoders(config: Mapping[str, Any]) -> tuple[encoders.Encoder, ...]:
    """Returns the encoders of a config in the order of their names, each from its architecture or its folder's config.json."""
    return tuple(_describe_encoder(name, config) for name in sorted(config["encoders"]))


def _describe_encoder(name, config):
    fields, where, resolution = config["encoders"][name], f"config.encoders.{name}", config["data"]["image_size"]
    path, dtype = fields["weights"], getattr(jnp, config["precision"]["compute"])
    if not path:
        raise ValueError(
            f"{where}.weights is empty: give a Hugging Face name or folder, or {RANDOM!r} for tests and benchmarks"
        )
    if fields["architecture"]:
        encoder = encoders.make_encoder(fields["architecture"], resolution, image_size=fields["image_size"], dtype=dtype)
    elif path == RANDOM:
        raise ValueError(
            f"{where}.architecture must be set when the weights are {RANDOM!r}; allowed: {list(encoders.ARCHITECTURES)}"
        )
    else:
        encoder = load_encoder(path, resolution, fields["image_size"], dtype)[0]
    module = encoder.module.clone(attention=config["attention"])
    return dataclasses.replace(encoder, module=module, spatial_gamma=fields["spatial_gamma"])


def load_frozen(job) -> dict[str, Any]:
    """Returns {'encoders': tuple of parameters, 'lpips': parameters or None, 'vae': likewise}, sharded on the mesh."""
    frozen = {
        "vae": load_frozen_vae(job) if job.frozen_vae else None,
        "encoders": load_encoders(job),
        "lpips": None if job.nets.lpips is None else _lpips_params(job),
    }
    return put_weights(job, frozen, sharding.tree_sharding(job.mesh, frozen))


def load_encoders(job) -> tuple[Any, ...]:
    """Returns the parameters of the encoders, in their order, where they were read to."""
    named = zip(sorted(job.config["encoders"]), job.encoders)
    return tuple(_encoder_params(name, encoder, job.config) for name, encoder in named)


def frozen_shapes(job) -> dict[str, Any]:
    """Returns what `load_frozen` returns, as shapes without shardings; reads and computes nothing."""

    def shapes(init, owner):
        return jax.eval_shape(functools.partial(init, owner), jax.random.key(0))

    return {
        "vae": shapes(initial_vae, job) if job.frozen_vae else None,
        "encoders": tuple(shapes(encoders.init_params, encoder) for encoder in job.encoders),
        "lpips": None if job.nets.lpips is None else shapes(_random_lpips, job),
    }


def put_weights(job, tree, shardings):
    """Returns the tree on the mesh; raises ValueError if processes that share the mesh have read different weights."""
    if job.mesh.is_multi_process:
        multihost.assert_same(weights=sharding.local_checksums(tree))
    return sharding.put(tree, shardings)


def _encoder_params(name, described, config):
    fields = config["encoders"][name]
    if fields["weights"] == RANDOM:
        logging.warning("encoder %s has RANDOM weights: for tests and benchmarks only", name)
        return jax.jit(functools.partial(encoders.init_params, described))(jax.random.key(0))
    loaded, params = load_encoder(fields["weights"], config["data"]["image_size"], fields["image_size"], described.module.dtype)
    if loaded.module != described.module.clone(attention=loaded.module.attention):
        raise ValueError(
            f"config.encoders.{name}: {fields['weights']} holds {loaded.module}, but architecture="
            f"{fields['architecture']!r} is {described.module}; correct one of the two"
        )
    return params


def _lpips_params(job):
    files = {name: job.config["lpips"][name] for name in ("vgg16", "linear")}
    if set(files.values()) == {RANDOM}:
        logging.warning("LPIPS has RANDOM weights: for tests and benchmarks only")
        return jax.jit(functools.partial(_random_lpips, job))(jax.random.key(0))
    for name, path in files.items():
        if path == RANDOM or (not path and name == "vgg16"):  # one file may hold the whole module
            raise ValueError(
                f"config.lpips.{name}={path!r}: config.loss.vae.lpips needs torchvision's VGG16 weights (vgg16) and the linear "
                f"weights of LPIPS v0.1 (linear); give both files, or {RANDOM!r} for both, or set config.loss.vae.lpips=0"
            )
    return load_lpips(files["vgg16"], files["linear"])


def _random_lpips(job, key):
    return job.nets.lpips.init(key, *[jnp.zeros((1, 32, 32, 3))] * 2)["params"]


def initial_vae(job, key):
    """Returns parameters of the VAE from scratch, a pure function of the key."""
    images = jnp.zeros((1, *height_width(job.config["data"]["image_size"]), 3))
    return job.nets.vae.init(key, images, jnp.zeros((1, *job.latent_shape)))["params"]


def load_frozen_vae(job):
    """Returns parameters of the frozen VAE, replicated on the mesh."""
    path, init, replicated = job.config["init"]["vae"], functools.partial(initial_vae, job), sharding.replicated(job.mesh)
    if path == RANDOM:
        logging.warning("the frozen VAE has RANDOM weights: for tests and benchmarks only")
        return jax.jit(init, out_shardings=replicated)(jax.random.key(0))
    if not path:
        raise ValueError(
            f"config.init.vae is empty, but the VAE is not trained (config.job={job.config['job']!r}): give its "
            f"file, such as REPA-E/e2e-vavae/e2e-vavae-400k.pt, or {RANDOM!r} for tests and benchmarks"
        )
    return put_weights(job, read_vae_params(path, job.nets.vae), replicated)
