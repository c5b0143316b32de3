"""A run's state <-> a published training checkpoint: every network, its statistics and its AdamW moments."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.mapping import Table, to_flax, to_torch
from checkpoints_tools.published import NETWORKS, OPTIMIZERS, POSITIONS, Adam, TrainingCheckpoint
from checkpoints_tools.sit import check_time, layout_of, sit_table
from checkpoints_tools.vae_layouts import vae_table

# name of a published network -> where our state keeps what it holds: leaf of its table's tree -> path in the state
PLACES = {
    "model": {"params": "sit.params", "latent_stats": "latent_stats"},
    "ema": {"params": "ema.params", "latent_stats": "ema.latent_stats"},
    "vae": {"params": "vae.params"},
    "discriminator": {"params": "disc.params", "batch_stats": "disc.batch_stats"},
}
OPT_STATES = {"opt": "sit.opt_state", "opt_vae": "vae.opt_state", "opt_disc": "disc.opt_state"}


@dataclasses.dataclass(frozen=True)
class Networks:
    """What the tables describe.

    Attributes:
      sit: SiT module; None in a run that trains no SiT, whose state has no published layout.
      vae: AutoencoderKL module, or None.
      disc: PatchDiscriminator module, or None.
    """

    sit: Any
    vae: Any = None
    disc: Any = None


def _below(prefix, table):
    """`table` for a network that sits in a tree under `prefix`."""
    entries = [dataclasses.replace(entry, flax=tuple(f"{prefix}/{path}" for path in entry.flax)) for entry in table.entries]
    return dataclasses.replace(table, entries=entries)


def _moments(table):
    """The part of a table that AdamW's moments have: its parameters, without the prefix 'params/', and no constants."""
    entries = [entry for entry in table.entries if entry.flax[0].startswith("params/")]
    bare = [dataclasses.replace(entry, flax=tuple(path.removeprefix("params/") for path in entry.flax)) for entry in entries]
    return Table(bare)


def tables(networks, updates=0, latent_norm=True):
    """Conversion tables by the published names of the networks; trees are {'params': …, and statistics}.

    Args:
      networks: Networks.
      updates: written as every batch norm's `num_batches_tracked`.
      latent_norm: False for files of REPA, SiT and DiT, which have no latent batch norm.

    Returns:
      dict name -> Table.
    """
    sit = sit_table(networks.sit, updates, latent_norm)
    made = {"model": sit, "ema": sit}
    if networks.vae is not None:
        made["vae"] = _below("params", vae_table(networks.vae))
    if networks.disc is not None:
        made["discriminator"] = discriminator_table(networks.disc, updates)
    return made


def to_trees(checkpoint, networks, targets):
    """Published training checkpoint -> our trees.

    Args:
      checkpoint: TrainingCheckpoint.
      networks: Networks; what they lack is not converted.
      targets: name of a published network -> tree of shapes and dtypes, as in `PLACES`; 'ema' as 'model'.

    Returns:
      (name -> tree, name of an optimizer -> (updates, first moments, second moments)), of what the checkpoint holds.

    Raises:
      ValueError: listing all that does not fit.
    """
    layout = layout_of(checkpoint.networks["model"])
    if not networks.sit.learned_sigma:  # what is trained with sigma is a DiT
        check_time(layout, checkpoint.source)
    latent_norm = layout == "repae"
    made = tables(networks, latent_norm=latent_norm)
    trees, moments = {}, {}
    for name, table in made.items():
        if name in checkpoint.networks:
            target = dict(targets[name])
            if not latent_norm:
                target.pop("latent_stats", None)
            trees[name] = to_flax(table, checkpoint.networks[name], target, f"{checkpoint.source}: {name}")
    for optimizer, name in OPTIMIZERS.items():
        if optimizer in checkpoint.optimizers and name in made:
            adam, target, table = checkpoint.optimizers[optimizer], targets[name]["params"], _moments(made[name])
            unmoved = {POSITIONS: np.zeros_like(checkpoint.networks[name][POSITIONS])} if name == "model" else {}
            filled = [
                to_flax(table, unmoved | dict(arrays), target, f"{checkpoint.source}: {optimizer} {kind}")
                for kind, arrays in (("exp_avg", adam.exp_avg), ("exp_avg_sq", adam.exp_avg_sq))
            ]
            moments[optimizer] = (adam.steps, *filled)
    return trees, moments


def from_run(
    read: Callable[[str], Any],
    networks: Networks,
    steps: int,
    args: Mapping[str, Any],
    source: str,
    groups: Mapping[str, Mapping[str, Any]],
) -> TrainingCheckpoint:
    """State of a run -> published training checkpoint.

    Args:
      read: path in the state, such as 'ema.params' -> that subtree; called once for each, so that it may read from disk and
        no more than one of them is held beside the result.
      networks: Networks.
      steps: training steps of the state.
      args: the published command line.
      source: where the state is from, for messages.
      groups: name of an optimizer -> its settings, see `Adam`; without any, AdamW's moments, two thirds of the file, stay out.

    Returns:
      TrainingCheckpoint.
    """
    made = tables(networks, updates=steps)
    converted, shapes = {}, {}
    for name in NETWORKS:
        if name in made:
            trees = {leaf: read(path) for leaf, path in PLACES[name].items()}
            converted[name], shapes[name] = to_torch(made[name], trees), jax.tree.map(np.shape, trees["params"])
    adams = {}
    for optimizer, name in OPTIMIZERS.items():
        if name in made and optimizer in groups:
            adam, table = find_adam(read(OPT_STATES[optimizer])), _moments(made[name])
            moments = [to_torch(table, _with_fixed(adam.pop(which), shapes[name])) for which in ("mu", "nu")]
            if name == "model" and not networks.sit.learned_positions:
                for arrays in moments:
                    del arrays[POSITIONS]
            adams[optimizer] = Adam(int(adam["count"]), *moments, groups[optimizer])
    return TrainingCheckpoint(source, args, steps, converted, adams)


def _with_fixed(moments, shapes):
    """Returns moments with zeros for the parts that are not trained, which have none."""
    fixed = {name: tree for name, tree in shapes.items() if not moments.get(name)}
    zeros = jax.tree.map(lambda shape: np.zeros(shape, np.float32), fixed, is_leaf=lambda node: isinstance(node, tuple))
    return {**moments, **zeros}


def find_adam(tree):
    """The dict {'count', 'mu', 'nu'} of optax's scale_by_adam somewhere in a stored optimizer state.

    Raises:
      ValueError: if there is none.
    """
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if {"count", "mu", "nu"} <= set(node):
                return node
            stack += node.values()
        elif isinstance(node, list | tuple):
            stack += node
    raise ValueError("the optimizer state holds no moments of Adam; only AdamW states can be converted")
