"""The smallest run with every part of the real one, for tests of whole steps and runs."""

import math
from pathlib import Path

import jax
import numpy as np

from configs import ldm, repae
from repae_jax import cli
from repae_jax.distributed import sharding
from repae_jax.job import build, initial_state
from repae_jax.training.checkpoint import Checkpointer

ROOT = Path(__file__).parents[1]
# changes of configs/ldm.py that make the run that is the quickest to compile: a SiT alone on a frozen VAE
SIT_ALONE = {"encoders": {}, "loss.sit.align": 0.0, "init.vae": "random"}
SELF_FLOW = {"loss.sit.self": 0.25, "loss.self_depth": 2, "diffusion.second_time_share": 0.25}  # of the preset's two blocks


def config(changes=None, file=repae, arg="tiny", **more):
    """The tiny preset at 8 x 8 pixels; changes are dotted names -> values, those of `more` with __ for the dot."""
    result = file.get_config(arg)
    result.unlock()
    result.data.image_size = 8
    result.vae.channel_multipliers = (1, 1)
    result.vae.norm_groups = 4
    if "disc" in result:
        result.disc.num_layers = 1
    for encoder in result.encoders.values():
        encoder.architecture = {"family": "dinov2", "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
        encoder.image_size = 8
    for name, value in {**(changes or {}), **{name.replace("__", "."): value for name, value in more.items()}}.items():
        *sections, field = name.split(".")
        section = result
        for part in sections:
            section = section[part]
        section[field] = value
    return result


def tiny_run():
    """The config of the fixture `tiny_run`: the quickest to compile, four steps with checkpoints of the second and the last."""
    changes = {"steps": 4, "checkpoint.every": 2, "checkpoint.keep_last": 2, "hooks.samples_every": 0}
    return config({**changes, **SIT_ALONE}, ldm)


def from_flags(*arguments, file="configs/repae.py"):
    """The config of a command line such as '--config.data.source=digits'."""
    return cli.ConfigParser().parse_args([f"--config={ROOT / file}", *map(str, arguments)]).config


def _random_leaf(path, leaf, rng):
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if "opt_state" in names or "lecam" in names or leaf.dtype != np.float32:
        return np.zeros(leaf.shape, leaf.dtype)
    x = rng.standard_normal(leaf.shape).astype(np.float32)
    if names[-1] == "var":
        return 1 + 0.1 * np.abs(x)
    if names[-1] == "scale":
        return 1 + 0.1 * x
    first = 1 if set(names) & set(sharding.STACKS) else 0
    fan_in = math.prod(leaf.shape[first:-1])
    return (x / np.sqrt(fan_in) if fan_in > 1 else 0.1 * x).astype(np.float32)


def random_state(job, seed=0):
    """A TrainState on the job's mesh without a zero initialisation anywhere, made without compiling; the EMA is a copy."""
    abstract = initial_state.abstract_state(job)
    rng = np.random.default_rng(seed)
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: _random_leaf(path, leaf, rng), abstract)
    if state.ema is not None:
        averaged = state.vae if state.sit is None else state.sit
        state = state.replace(ema=state.ema.replace(params=averaged.params, latent_stats=state.latent_stats))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract), may_alias=False)


def save_run(workdir, of=None, devices=None):
    """Writes a run of two steps, as it is on disk, with drawn weights, and returns its folder; `of` is a config."""
    job = build.build(build.plain_config(of or config()), devices or jax.devices())
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(2, random_state(job), {"loader": {}, "inputs": {"frozen_vae": None}}, job.config)
    return workdir


def leaves(tree):
    """Dotted name -> numpy array."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def differing(a, b):
    """Names of the leaves whose bits differ."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]


def largest_error(actual, expected):
    """Largest difference of any leaf, relative to the largest entry of that leaf (at least 1e-3)."""
    a, b = leaves(actual), leaves(expected)
    assert a.keys() == b.keys()
    return max(float(np.max(np.abs(np.float64(a[n]) - b[n])) / max(np.max(np.abs(b[n])), 1e-3)) for n in a if a[n].size)
