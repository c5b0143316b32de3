"""Tiny jobs that are trained by SGD, so that rounding errors stay small."""

import dataclasses

import jax
import optax
import small

from repae_jax.job import build
from repae_jax.training.recipe import Optimizers

BATCH = 16
KEY = jax.random.key(3)


def sgd():
    """Returns SGD, whose updates, unlike Adam's, are proportional to gradients: rounding errors stay small."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def make_job(devices=1, changes=None, **more):
    """Returns the tiny REPA-E job with SGD for each network; `changes` and `more` as in `small.config`."""
    job = build.build(small.config(changes, data__batch_size=BATCH, **more), jax.devices()[:devices])
    return dataclasses.replace(job, tx=Optimizers(sgd(), sgd(), sgd()))
