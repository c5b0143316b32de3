"""A run's state <-> a published training checkpoint: every network, its statistics and its AdamW moments."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.mapping import Table, Tree, to_flax, to_torch
from checkpoints_tools.published import MOMENTS, NETWORKS, OPTIMIZERS, POSITIONS, Adam, TrainingCheckpoint
from checkpoints_tools.sit import check_time, layout_of, sit_table
from checkpoints_tools.vae_layouts import vae_table
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.sit import SiT
from repae_jax.models.vae_families import VaeModule

# name of a published network -> branch of its table's tree -> path in our state
STATE_PATHS = {
    "model": {"params": "sit.params", "latent_stats": "latent_stats"},
    "ema": {"params": "ema.params", "latent_stats": "ema.latent_stats"},
    "vae": {"params": "vae.params"},
    "discriminator": {"params": "disc.params", "batch_stats": "disc.batch_stats"},
}
OPT_STATES = {"opt": "sit.opt_state", "opt_vae": "vae.opt_state", "opt_disc": "disc.opt_state"}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Modules that the tables describe; a run without a SiT has no published layout."""

    sit: SiT | None
    vae: VaeModule | None = None
    disc: PatchDiscriminator | None = None


def _moved(entries, change):
    return [dataclasses.replace(entry, flax=tuple(map(change, entry.flax))) for entry in entries]


def _moments(table):
    """The part of a table that AdamW's moments have: its parameters, without the prefix 'params/', and no constants."""
    entries = [entry for entry in table.entries if entry.flax[0].startswith("params/")]
    return Table(_moved(entries, lambda path: path.removeprefix("params/")))


def tables(networks: Networks, updates: int = 0, latent_norm: bool = True) -> dict[str, Table]:
    """Tables by the published names of the networks, of trees {'params': …, and statistics}; arguments as `sit_table`."""
    sit = sit_table(networks.sit, updates, latent_norm)
    by_name = {"model": sit, "ema": sit}
    if networks.vae is not None:
        vae = vae_table(networks.vae)
        by_name["vae"] = dataclasses.replace(vae, entries=_moved(vae.entries, lambda path: f"params/{path}"))
    if networks.disc is not None:
        by_name["discriminator"] = discriminator_table(networks.disc, updates)
    return by_name


def to_trees(
    checkpoint: TrainingCheckpoint, networks: Networks, targets: Mapping[str, Tree]
) -> tuple[dict[str, Tree], dict[str, tuple[int, Tree, Tree]]]:
    """Converts a published training checkpoint to our trees, where both have the network; ValueError lists what does not fit.

    `targets` is name of a published network -> tree of shapes and dtypes, as in `STATE_PATHS`; 'ema' as 'model'. The result is
    (name -> tree, name of an optimizer -> (updates, first moments, second moments)).
    """
    layout = layout_of(checkpoint.networks["model"])
    if not networks.sit.learned_sigma:  # one that is trained with sigma is a DiT
        check_time(layout, checkpoint.source)
    latent_norm = layout == "repae"
    by_name = tables(networks, latent_norm=latent_norm)
    trees, moments = {}, {}
    for name, table in by_name.items():
        if name in checkpoint.networks:
            target = {branch: tree for branch, tree in targets[name].items() if latent_norm or branch != "latent_stats"}
            trees[name] = to_flax(table, checkpoint.networks[name], target, f"{checkpoint.source}: {name}")
    for optimizer, name in OPTIMIZERS.items():
        if optimizer in checkpoint.optimizers and name in by_name:
            adam, target, table = checkpoint.optimizers[optimizer], targets[name]["params"], _moments(by_name[name])
            untrained = {POSITIONS: np.zeros_like(checkpoint.networks[name][POSITIONS])} if name == "model" else {}
            moments[optimizer] = adam.steps, *(
                to_flax(table, untrained | dict(getattr(adam, kind)), target, f"{checkpoint.source}: {optimizer} {kind}")
                for kind in MOMENTS
            )
    return trees, moments


def from_run(
    read: Callable[[str], Any], networks: Networks, steps: int, args: Mapping[str, Any], source: str,
    groups: Mapping[str, Mapping[str, Any]],
) -> TrainingCheckpoint:
    """Converts the state of a run to a published training checkpoint.

    `read` maps a path in the state, such as 'ema.params', to that subtree; it is called once for each, so that it may read from
    disk and no more than one of them is held beside the result. `groups` has settings by name of an optimizer, see `Adam`;
    without any, AdamW's moments, two thirds of the file, stay out.
    """
    by_name = tables(networks, updates=steps)
    converted, shapes = {}, {}
    for name in NETWORKS:
        if name in by_name:
            trees = {branch: read(path) for branch, path in STATE_PATHS[name].items()}
            converted[name], shapes[name] = to_torch(by_name[name], trees), jax.tree.map(np.shape, trees["params"])
    optimizers = {}
    for optimizer, name in OPTIMIZERS.items():
        if name in by_name and optimizer in groups:
            adam, table = find_adam(read(OPT_STATES[optimizer])), _moments(by_name[name])
            moments = [to_torch(table, _with_fixed(adam.pop(kind), shapes[name])) for kind in ("mu", "nu")]
            if name == "model" and not networks.sit.learned_positions:
                for arrays in moments:
                    del arrays[POSITIONS]
            optimizers[optimizer] = Adam(int(adam["count"]), *moments, groups[optimizer])
    return TrainingCheckpoint(source, args, steps, converted, optimizers)


def _with_fixed(moments, shapes):
    """Adds zeros for the parts that are not trained, which have no moments."""
    fixed = {name: tree for name, tree in shapes.items() if not moments.get(name)}
    zeros = jax.tree.map(lambda shape: np.zeros(shape, np.float32), fixed, is_leaf=lambda node: isinstance(node, tuple))
    return {**moments, **zeros}


def find_adam(tree: Any) -> dict[str, Any]:
    """Returns optax's {'count', 'mu', 'nu'} somewhere in a stored optimizer state; ValueError if there is none."""

    def is_adam(node):
        return isinstance(node, dict) and {"count", "mu", "nu"} <= set(node)

    if adam := next(filter(is_adam, jax.tree.leaves(tree, is_leaf=is_adam)), None):
        return adam
    raise ValueError("the optimizer state holds no moments of Adam; only AdamW states can be converted")
