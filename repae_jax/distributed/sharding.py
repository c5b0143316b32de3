"""The device mesh and the one rule that shards arrays over it.

The mesh has two axes. The batch is split over both; parameters, optimizer state and averages are split over `fsdp` alone and
replicated over `data`. (1, 1) on a laptop and (8, 32) on a pod run the same code, in one process or in one per host.
"""

import collections
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, FSDP = "data", "fsdp"
MIN_SHARDED_SIZE = 2**16  # smaller arrays cost more to gather than to keep
STACKS = ("early_blocks", "late_blocks", "blocks")  # parameters under these have a leading layer axis, scanned over


def make_mesh(fsdp: int, devices=None, slices: int = 1) -> jax.sharding.Mesh:
    """Returns the mesh of the devices, by default all; ValueError if it cannot be made of them.

    Args:
      fsdp: devices that share one copy of the parameters; 1 replicates them. Divides the number of devices of a slice.
      slices: number of slices of devices, between which connections are slower than within one: TPU slices, or nodes of GPUs.
        No copy of the parameters is shared across them.
    """
    devices = jax.devices() if devices is None else devices
    if slices == 1 and not _has_slices(devices):
        _check_fsdp(fsdp, len(devices), f"the {len(devices)} devices")
        # jax.make_mesh lets an axis end within a side of the chips' torus on a v5e only, and so refuses many sizes elsewhere
        grid = mesh_utils.create_device_mesh((len(devices) // fsdp, fsdp), devices, allow_split_physical_axes=True)
    else:
        grid = slice_grid(fsdp, devices, slices)
    return jax.sharding.Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def _has_slices(devices):
    """Returns whether these are chips of several TPU slices; nodes of GPUs are one set of devices to JAX."""
    return devices[0].platform == "tpu" and len({getattr(device, "slice_index", 0) for device in devices}) > 1


def slice_grid(fsdp, devices, slices):
    """Returns the devices of several slices as [data, fsdp], the rows of a slice consecutive; arguments as `make_mesh`."""
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(sizes) != slices or len(set(sizes.values())) != 1:
        raise ValueError(
            f"mesh.slices={slices}, but the {len(devices)} devices are in {len(sizes)} slices of {sorted(sizes.values())}; "
            f"allowed: {len(sizes)}"
        )
    count = len(devices) // slices
    _check_fsdp(fsdp, count, f"the {count} devices of a slice")
    return mesh_utils.create_hybrid_device_mesh((count // fsdp, fsdp), (slices, 1), devices, allow_split_physical_axes=True)


def _check_fsdp(fsdp, count, what):
    if fsdp < 1 or count % fsdp:
        allowed = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(f"mesh.fsdp={fsdp} does not divide {what}; allowed: {allowed}")


def batch_sharding(mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over all devices."""
    return NamedSharding(mesh, P((DATA, FSDP)))


def replicated(mesh) -> NamedSharding:
    """Returns the sharding that keeps the same array on every device."""
    return NamedSharding(mesh, P())


_name = functools.partial(jax.tree_util.keystr, simple=True)


def _in_stack(path):
    return not set(STACKS).isdisjoint(_name(path, separator="/").split("/"))


def param_spec(path, shape: tuple[int, ...], fsdp: int) -> P:
    """Returns the spec of the parameter at a key path: its first axis that fsdp divides is split; small ones are replicated.

    The first, because parts of it are whole rows: a gathered array need not be laid out anew before a matrix product. A scanned
    layer axis is never split.
    """
    first = 1 if _in_stack(path) else 0
    split = next((axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0), None)
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_SIZE or split is None:
        return P()
    return P(*[FSDP if axis == split else None for axis in range(len(shape))])


def tree_sharding(mesh, tree):
    """Returns the sharding of every leaf of a tree of arrays or shapes: parameters, optimizer state, a whole TrainState."""
    fsdp = mesh.shape[FSDP]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, np.shape(leaf), fsdp)), tree
    )


def unsharded(params):
    """Returns parameters whole on every device, as networks are applied to them; so is their gradient before it is split.

    Without it the partitioner is free to keep a parameter split and to gather the activations of the whole batch instead.
    Scanned stacks stay split: their blocks are gathered one at a time, see `layers.scan_blocks`. Outside of `with_mesh_context`
    nothing is done.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params

    def gather(path, leaf):
        return leaf if _in_stack(path) else jax.lax.with_sharding_constraint(leaf, P())

    return jax.tree_util.tree_map_with_path(gather, params)


def of_each_device(fn, x):
    """Returns fn(x) of a batch, where fn keeps the shape, computed by each device of its own rows.

    Use it where the partitioner would gather the whole batch. Outside of `with_mesh_context`, and of a batch that the devices
    do not divide, such as a few pictures, it is fn(x) of the whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % mesh.size:
        return fn(x)
    rows = P((DATA, FSDP))
    return jax.shard_map(fn, in_specs=rows, out_specs=rows, check_vma=False)(x)


def of_each_layer(fn, stack):
    """Returns fn(stack) of a stack of layers, computed by each device of its share of whole layers; fn keeps the shape.

    Zeros fill up the shares, so the devices need not divide the layers. Outside of `with_mesh_context` it is fn of the whole.
    """
    missing = -len(stack) % max(jax.sharding.get_abstract_mesh().size, 1)
    padded = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1)) if missing else stack
    return of_each_device(fn, padded)[: len(stack)]


def with_mesh_context(mesh, fn):
    """Returns the function, traced so that `unsharded` and the functions above know the mesh."""

    @functools.wraps(fn)
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return run


def check_batch(batch_size: int, accumulation: int, mesh) -> None:
    """Raises ValueError unless every device gets the same number of images in every micro-batch."""
    devices = mesh.size
    if batch_size % (accumulation * devices):
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by {devices} devices x {accumulation} micro-batches: "
            f"use a multiple of {devices * accumulation}"
        )


def put_batch(mesh, batch):
    """Returns global arrays, sharded over the batch axis, of per-process numpy arrays.

    A process' share goes to its own devices, in order. Where a mesh interleaves processes, as on TPU pods, the images of a
    batch are in another order than in one process, and meet other noise.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put(tree, shardings):
    """Returns a tree of arrays placed by their shardings, or by one for all.

    They are of the host or of local devices, whole and the same in every process, or global ones.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(array, sharding):
    if sharding.is_fully_addressable or not _is_local(array):
        return jax.device_put(array, sharding)
    array = np.asarray(array)  # jax.device_put would send all of it to all processes, to compare
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _is_local(array):
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def local_checksums(tree) -> dict[str, int]:
    """Returns the CRC of every array that is not global, by dotted name: for processes that must have read the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path, separator="."): zlib.crc32(np.asarray(leaf).tobytes()) for path, leaf in leaves if _is_local(leaf)}
