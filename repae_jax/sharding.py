"""The device mesh and the one rule that shards arrays over it.

The mesh has two axes. The batch is split over both; parameters, optimizer state and averages are split over `fsdp` alone and
replicated over `data`. (1, 1) on a laptop and (8, 32) on a pod run the same code.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, FSDP = "data", "fsdp"
MIN_SHARDED_SIZE = 2**16  # smaller arrays cost more to gather than to keep
STACKS = ("early_blocks", "late_blocks", "blocks")  # parameters under these have a leading layer axis, scanned over


def make_mesh(fsdp, devices=None):
    """Mesh of all devices with `fsdp` of them along the parameter axis.

    Args:
      fsdp: devices that share one copy of the parameters; 1 replicates them. Divides the number of devices.
      devices: default all.

    Returns:
      jax.sharding.Mesh with axes ('data', 'fsdp').

    Raises:
      ValueError: if fsdp does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        allowed = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(f"mesh.fsdp={fsdp} does not divide the {count} devices; allowed: {allowed}")
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // fsdp, fsdp), (DATA, FSDP), axis_types=types, devices=devices)


def batch_sharding(mesh):
    """Leading axis over all devices."""
    return NamedSharding(mesh, P((DATA, FSDP)))


def replicated(mesh):
    """The same array on every device."""
    return NamedSharding(mesh, P())


def _names(path):
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]


def param_spec(path, shape, fsdp):
    """Largest axis divisible by fsdp, never a scanned layer axis; replicated if small or if none divides.

    Args:
      path: key path of the leaf (jax.tree_util).
      shape: its shape.
      fsdp: size of the axis.

    Returns:
      PartitionSpec.
    """
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    first = 1 if any(name in STACKS for name in _names(path)) else 0
    candidates = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
    if not candidates:
        return P()
    axis = max(candidates, key=lambda a: shape[a])
    return P(*[FSDP if a == axis else None for a in range(len(shape))])


def tree_sharding(mesh, tree):
    """NamedSharding of every leaf of a tree of arrays or shapes (parameters, optimizer state, a whole TrainState)."""
    fsdp = mesh.shape[FSDP]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, np.shape(leaf), fsdp)), tree
    )


def check_batch(batch_size, accumulation, mesh):
    """ValueError unless every device gets the same number of images in every micro-batch."""
    devices = mesh.size
    if batch_size % (accumulation * devices):
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by {devices} devices x {accumulation} micro-batches: "
            f"use a multiple of {devices * accumulation}"
        )


def put_batch(mesh, batch):
    """Per-process numpy arrays -> global arrays sharded over the batch axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
