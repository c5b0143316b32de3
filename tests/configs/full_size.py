"""A full-size job traced without computing anything, for tests of configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax import build, features


def millions(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


def abstract_inputs(job):
    """Shapes of a step's batch and frozen weights."""
    config, key = job.config["data"], jax.random.key(0)
    size, batch = config["image_size"], config["batch_size"]
    frozen = {
        "encoders": tuple(jax.eval_shape(functools.partial(features.init_params, e), key) for e in job.encoders),
        "lpips": None,
        "vae": None,
    }
    if job.nets.lpips is not None:
        pair = [jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)] * 2
        frozen["lpips"] = jax.eval_shape(job.nets.lpips.init, key, *pair)["params"]
    if job.frozen_vae:
        image, noise = jnp.zeros((1, size, size, 3)), jnp.zeros((1, *job.latent_shape))
        frozen["vae"] = jax.eval_shape(job.nets.vae.init, key, image, noise)["params"]
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    return {"image": images, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}, frozen


def check_step(job):
    """Traces a step: what comes out has the shapes and dtypes of what went in. Returns the shapes of its metrics."""
    state = build.abstract_state(job)
    new, metrics = jax.eval_shape(job.step, state, *abstract_inputs(job), jax.random.key(0))
    kinds = [jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree) for tree in (state, new)]
    assert kinds[0] == kinds[1]
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype("float32"), np.dtype("int32")}
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), np.dtype("float32"))}
    return metrics
