"""The state that training starts from: random, or from the files of `config.init`."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from checkpoints_tools import mapping, published, published_args, vae, weights
from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.sit import layout_of
from checkpoints_tools.training_state import OPT_STATES, STATE_PATHS, Networks, to_trees
from repae_jax.data.latents import CachedLatents
from repae_jax.distributed import sharding
from repae_jax.images import to_float
from repae_jax.job.frozen_weights import initial_vae, put_weights
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.ranges import height_width
from repae_jax.training.optimizer import without_fixed
from repae_jax.training.state import TrainState, create_net, create_state


def initial_state(job, key: jax.Array) -> TrainState:
    """Returns a TrainState from scratch, with latent statistics 0 and 1; a pure function of the key."""
    nets, tx, channels = job.nets, job.tx, job.latent_shape[-1]
    keys = dict(zip(("vae", "disc", "sit"), jax.random.split(key, 3)))
    vae = sit = disc = None
    if tx.vae is not None:
        vae = create_net(initial_vae(job, keys["vae"]), tx.vae)
    if tx.sit is not None:
        times = job.recipe.objective.to_times(jnp.zeros((1,)))
        inputs = jnp.zeros((1, *job.latent_shape)), times, jnp.zeros((1,), jnp.int32)
        sit = create_net(nets.sit.init(keys["sit"], *inputs)["params"], tx.sit)
    if nets.disc is not None:
        variables = nets.disc.init(keys["disc"], jnp.zeros((1, *height_width(job.config["data"]["image_size"]), 3)))
        disc = create_net(variables["params"], tx.disc, variables["batch_stats"])
    stats = ChannelStats(mean=jnp.zeros((channels,)), var=jnp.ones((channels,)))
    return create_state(vae=vae, disc=disc, sit=sit, latent_stats=stats, averages=job.recipe.averages)


def abstract_state(job) -> TrainState:
    """Returns shapes, dtypes and shardings of the TrainState; computes nothing."""
    return abstract_arrays(job, jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0)))


def abstract_arrays(job, shapes):
    """Returns the tree of shapes with the shardings of the job's mesh."""
    struct, shardings = jax.ShapeDtypeStruct, sharding.tree_sharding(job.mesh, shapes)
    return jax.tree.map(lambda leaf, placed: struct(leaf.shape, leaf.dtype, sharding=placed), shapes, shardings)


def create_initial_state(job, frozen: dict[str, Any], make_batches: Callable[[], Iterator]) -> TrainState:
    """Creates the TrainState on the mesh, random or from the files of `config.init`; for `frozen` see `load_frozen`.

    `make_batches` is () -> iterator of global batches, whose first images give the latent statistics if no file does.
    """
    abstract = abstract_state(job)
    trees, opt_states, steps = _read_init(job, abstract)  # before anything is compiled: a file may be wrong
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(functools.partial(initial_state, job), out_shardings=shardings)(jax.random.key(job.config["seed"]))

    def fill(path, tree):
        nonlocal state
        state = _fill(state, path, put_weights(job, tree, operator.attrgetter(path)(shardings)))

    if "vae.params" in trees:  # a file may lack VA-VAE's map from latents to tokens, which stays random
        trees["vae.params"] = {**state.vae.params, **trees["vae.params"]}
        fill("vae.params", trees["vae.params"])
    if "latent_stats" not in trees and state.sit is not None:
        vae_params = frozen["vae"] if job.frozen_vae else state.vae.params
        trees["latent_stats"] = _measure_latent_stats(job, vae_params, make_batches)
    averaged = "vae.params" if state.sit is None else "sit.params"
    for path, average in ((averaged, "ema.params"), ("latent_stats", "ema.latent_stats")):
        if path in trees and average not in trees and state.ema is not None:
            # donation refuses two leaves that share one buffer
            trees[average] = jax.tree.map(operator.methodcaller("copy"), trees[path])
    for path, tree in trees.items():
        if path != "vae.params":
            fill(path, tree)
    if state.averages:
        state = state.replace(averages={name: jax.tree.map(jnp.copy, state.ema) for name in state.averages})
    for path, (updates, *moments) in opt_states.items():
        opt_state = operator.attrgetter(path)(state)
        mu, nu = (without_fixed(opt_state, tree) for tree in moments)
        fill(path, optax.tree.set(opt_state, count=np.int32(updates), mu=mu, nu=nu))
    stats = state.latent_stats
    logging.info("latent statistics: mean %s, var %s", np.asarray(stats.mean), np.asarray(stats.var))
    return state.replace(step=sharding.put(np.int32(steps), shardings.step))


def _fill(state, path, tree):
    """Returns the state with `tree` at a dotted path, such as 'sit.params'."""
    first, _, rest = path.partition(".")
    return state.replace(**{first: _fill(getattr(state, first), rest, tree) if rest else tree})


def _read_init(job, abstract):
    """Returns the content of the files: (path in the state -> tree, path -> (updates, mu, nu) of Adam, steps taken)."""
    init, trees, opt_states, steps = job.config["init"], {}, {}, 0
    if init.get("checkpoint"):
        trees, opt_states, steps = _read_checkpoint(job, abstract)
        for name, path in (("vae", "vae.params"), ("disc", "disc.params"), ("latent_stats", "latent_stats")):
            if init.get(name) and path in trees:
                raise ValueError(f"config.init.{name}={init[name]!r}, but {init['checkpoint']} holds it too: empty one of them")
    if init["vae"] and not job.frozen_vae:
        trees["vae.params"] = vae.read_vae_params(init["vae"], job.nets.vae)
    if init.get("disc"):
        target = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
        state_dict = weights.read_state_dict(init["disc"])
        variables = mapping.to_flax(discriminator_table(job.nets.disc), state_dict, target, source=init["disc"])
        trees |= {f"disc.{name}": tree for name, tree in variables.items()}
    if init.get("latent_stats"):
        trees["latent_stats"] = _read_latent_stats(job, init["latent_stats"])
    elif job.config["data"]["cache"] and "latent_stats" not in trees:
        trees["latent_stats"] = ChannelStats(**CachedLatents(job.config["data"]["cache"]).latent_stats)
    return trees, opt_states, steps


def _read_latent_stats(job, path):
    stats, channels = vae.read_latent_stats(path), job.latent_shape[-1]
    if len(stats["mean"]) != channels:
        raise ValueError(f"{path} has statistics of {len(stats['mean'])} channels; the VAE has {channels}")
    return ChannelStats(**stats)


def _read_checkpoint(job, abstract):
    """Reads a published training checkpoint; returns as `_read_init`."""
    checkpoint = published.read(job.config["init"]["checkpoint"])
    _check_checkpoint(job, checkpoint)
    stats = {"mean": abstract.latent_stats.mean, "var": abstract.latent_stats.var}
    targets = {"model": {"params": abstract.sit.params, "latent_stats": stats}}
    targets["ema"] = targets["model"]
    if abstract.vae is not None:
        targets["vae"] = {"params": abstract.vae.params}
    if abstract.disc is not None:
        targets["discriminator"] = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
    networks = Networks(sit=job.nets.sit, vae=None if job.frozen_vae else job.nets.vae, disc=job.nets.disc)
    converted, moments = to_trees(checkpoint, networks, targets)
    if layout_of(checkpoint.networks["model"]) != "repae" and not job.config["init"]["latent_stats"]:
        raise ValueError(
            f"{checkpoint.source} has no latent batch norm, as REPA and DiT have none: set config.init.latent_stats to the "
            "statistics its latents were normalized with, such as diffusers' folder of its VAE (for 0.18215, "
            "stabilityai/sd-vae-ft-ema)"
        )
    trees = {STATE_PATHS[name][leaf]: tree for name, network in converted.items() for leaf, tree in network.items()}
    trees |= {path: ChannelStats(**tree) for path, tree in trees.items() if path.endswith("latent_stats")}
    opt_states = {OPT_STATES[name]: adam for name, adam in moments.items()}
    for name, optim in job.config["optim"].items():
        if f"{name}.opt_state" in opt_states and optim.get("method") == "muon":
            raise ValueError(
                f"config.init.checkpoint: {checkpoint.source} has AdamW's moments, which config.optim.{name}.method='muon' "
                "cannot continue: set it to 'adamw', or convert the checkpoint with --weights_only"
            )
    logging.info("%s: %s after %s steps", checkpoint.source, sorted([*trees, *opt_states]), checkpoint.steps)
    return trees, opt_states, checkpoint.steps or 0


def _check_checkpoint(job, checkpoint):
    """Raises ValueError for a checkpoint that the config cannot continue; warns of other hyperparameters."""
    own = f"projectors.{len(job.encoders)}."
    if job.recipe.self_depth and not any(name.startswith(own) for name in checkpoint.networks["model"]):
        raise ValueError(
            f"config.init.checkpoint: {checkpoint.source} has no projector to the SiT's own tokens ({own}*), for "
            f"config.loss.sit.self={job.config['loss']['sit']['self']}: set it to 0, loss.self_depth to None, or start without "
            "a checkpoint"
        )
    init, steps = job.config["init"], job.config["steps"]
    for difference in published_args.check_args(checkpoint.args, job.config, checkpoint.source):
        logging.warning("differs from the run that made %s: %s", checkpoint.source, difference)
    if "vae" not in checkpoint.networks and not init["vae"]:
        hint = f" ({recorded})" if (recorded := checkpoint.args.get("vae_ckpt")) else ""
        raise ValueError(f"{checkpoint.source} holds no VAE: set config.init.vae to the one it was trained on{hint}")
    if steps <= (checkpoint.steps or 0):
        raise ValueError(f"{checkpoint.source} has taken {checkpoint.steps} steps already, config.steps is {steps}: raise it")


def _measure_latent_stats(job, vae_params, make_batches):
    """Returns statistics of the VAE's sampled latents over the first config.init.stats_images images."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(job.mesh))
    def moments(params, images, key):
        posterior = job.nets.vae.apply({"params": params}, to_float(images), method="encode")
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return latents.mean((0, 1, 2)), jnp.square(latents).mean((0, 1, 2))

    count = -(-job.config["init"]["stats_images"] // job.config["data"]["batch_size"])
    keys = jax.random.split(jax.random.key(job.config["seed"]), count)
    sums = [jax.device_get(moments(vae_params, batch["image"], key)) for batch, key in zip(make_batches(), keys)]
    mean, square = (np.mean(np.asarray(column, np.float64), axis=0) for column in zip(*sums))
    return ChannelStats(mean=mean.astype(np.float32), var=(square - mean**2).astype(np.float32))
