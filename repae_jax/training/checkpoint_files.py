"""The files of one checkpoint: how they are read and checked, and what counts as damage.

A checkpoint is a folder with `state` (arrays), `data`, `config` and `checksums` (JSON). Orbax notices truncated and missing
files, but not changed bytes, so checksums of all arrays and of the JSON parts are stored beside them.
"""

import contextlib
import errno
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from repae_jax import buckets, faults
from repae_jax.distributed import multihost

Kind = tuple[tuple[int, ...], np.dtype]  # shape and dtype of an array
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # types by the bytes of an element


class OlderCheckpointError(ValueError):
    """A checkpoint is not damaged, but cannot be checked."""


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns leaves with dotted names, the same for structs, named tuples and the dicts that Orbax stores them as."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def kinds(tree: Any) -> dict[str, Kind]:
    """Returns shape and dtype of every array, by name."""
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in named_leaves(tree)}


def _kinds_as_json(tree):
    return {name: [list(shape), dtype.name] for name, (shape, dtype) in kinds(tree).items()}


def checksums(tree: Any) -> dict[str, int]:
    """Returns the checksum of every array, by name; the same however the arrays are sharded."""
    return checksums_and_not_finite(tree)[0]


def checksums_and_not_finite(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Returns (checksum of every array by name, names of those with a number that is not finite)."""
    sums, finite = jax.device_get(_sums_and_finite(dict(named_leaves(tree))))
    return {name: int(value) for name, value in sums.items()}, [name for name, value in finite.items() if not value]


@jax.jit  # one program for the whole tree, not one per shape; both read every array once
def _sums_and_finite(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    def is_finite(array):
        return jnp.all(jnp.isfinite(array)) if jnp.issubdtype(array.dtype, jnp.inexact) else True

    return jax.tree.map(_checksum, leaves), jax.tree.map(is_finite, leaves)


def _checksum(array: jax.Array) -> UInt32[Array, ""]:
    """Returns the sum of an array's bit patterns modulo 2^32: integers, so the order of summation does not matter."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    return jnp.sum(jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]), dtype=jnp.uint32)


def host_checksum(array: np.ndarray) -> int:
    """Returns the checksum of a NumPy array."""
    return int(np.sum(np.ravel(array).view(_UNSIGNED[array.dtype.itemsize]), dtype=np.uint32))


def changed_arrays(current: Mapping[str, int], saved: Mapping[str, int]) -> str | None:
    """Returns a text on the arrays whose checksums differ; None if none does."""
    names = [name for name, value in current.items() if saved.get(name) != value]
    return f"arrays with another checksum than when they were saved: {', '.join(names)}" if names else None


def stored_checksums(step: int, sums: Mapping[str, int], state: Any, data_state: Any, config: Any) -> dict[str, Any]:
    """Returns the content of `checksums` of a checkpoint; `sums` are the arrays'."""
    parts = {"data": data_state, "config": config, "state": _kinds_as_json(state), "step": step}
    return {"arrays": dict(sums), "parts": {name: digest(part) for name, part in parts.items()}}


def digest(content: Any) -> str:
    """Returns a hash of JSON values, the same when read back: tuples are lists, the order of names does not count."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class StoredCheckpoint:
    """A checkpoint in storage; whatever is read is compared with its checksum, and ValueError if it is not what was saved."""

    def __init__(self, path: epath.Path):
        self._path = path

    @functools.cached_property
    def checksums(self) -> dict[str, Any]:
        """{'arrays': checksum of every array, 'parts': digests of the other parts}."""
        content = _read_json(self._path, "checksums")
        if content and all(isinstance(value, int) for value in content.values()):  # older files hold arrays alone
            raise OlderCheckpointError(
                f"checkpoint {str(self._path)!r} was saved by an older version of this code, without checksums of its JSON "
                "parts; use that version, or another workdir"
            )
        if content["parts"]["step"] != digest(int(self._path.name)):
            raise ValueError("it is of another step than its name says")
        return content

    def part(self, name: str) -> dict[str, Any]:
        """Returns the JSON part 'config' or 'data'."""
        return self._checked(name, _read_json(self._path, name))

    def metadata(self) -> Any:
        """Returns Orbax's metadata of the arrays, a tree."""
        tree = ocp.PyTreeCheckpointHandler().metadata(self._path / "state").tree
        self._checked("state", _kinds_as_json(tree))
        return tree

    def header(self) -> tuple[dict, dict, dict[str, Kind], dict[str, int]]:
        """Returns everything but the arrays: (config, data state, shapes and dtypes, checksums of the arrays)."""
        return self.part("config"), self.part("data"), kinds(self.metadata()), self.checksums["arrays"]

    def _checked(self, name, content):
        if self.checksums["parts"][name] != digest(content):
            raise ValueError(f"{name} has another checksum than when it was saved")
        return content


def _read_json(path: epath.Path, name: str) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(path / name, args=ocp.args.JsonRestore())


def read_arrays(path: epath.Path, abstract: Any, sums: Mapping[str, int]) -> tuple[Any, str | None]:
    """Returns (the arrays that `abstract` names, None), or (None, their damage); `sums` are the stored checksums."""
    # Without a sharding Orbax would fall back on the devices the checkpoint was saved from, which may not exist here.
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    arrays, damage = attempt(lambda: _restore(path, abstract, restore_args), path)
    damage = damage or changed_arrays(checksums(arrays), sums)
    return (None, damage) if damage else (arrays, None)


def read_to_host(path: epath.Path, abstract: Any) -> Any:
    """Returns the arrays that `abstract` names, as NumPy's."""
    return _restore(path, abstract, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract))


def _restore(path: epath.Path, abstract: Any, restore_args: Any) -> Any:
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    # The bare handler: `ocp.Checkpointer` waits for all processes afterwards, in vain if one of them has failed.
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)


def attempt(read: Callable[[], Any], path: epath.Path) -> tuple[Any, str | None]:
    """Returns (read(), None), or (None, the damage) if that fails in any process; `path` is the checkpoint that it reads.

    OSError if the disk, the bucket or the memory is to blame, after some more attempts, or if this user may not read it.
    """

    def result_or_damage():
        try:
            return read(), None
        except OlderCheckpointError:
            raise
        except Exception as error:  # Orbax raises a bare Exception for an unreadable chunk
            if multihost.is_device_error(error):  # raised below, as trying again does not help
                return None, error
            if faults.is_of_the_system(error):
                raise
            if faults.is_refusal(error):
                raise PermissionError(errno.EACCES, f"checkpoint {str(path)!r} cannot be read ({reason_of(error)})") from error
            _open_all(path)  # libraries report files out of reach as missing
            return None, reason_of(error)

    tries = 1 if buckets.is_address(path) else None  # the clients of buckets have tried again for a quarter of an hour
    result, damage = faults.read(result_or_damage, name=lambda: f"checkpoint {str(path)!r}", tries=tries)
    if isinstance(damage, Exception):
        raise damage
    if jax.process_count() > 1:  # all processes must take the same checkpoint
        succeeded = multihost_utils.process_allgather(np.asarray(damage is None))
        if not damage and not np.all(succeeded):
            damage = "unreadable in another process"
    return (None, damage) if damage else (result, None)


def _open_all(folder: epath.Path) -> None:
    """Raises OSError if a file in a folder is there, but cannot be opened."""
    with contextlib.suppress(FileNotFoundError):  # damage
        for path in folder.iterdir():
            if path.is_dir():
                _open_all(path)
            else:
                with path.open("rb") as file:
                    file.read(1)


def reason_of(error: BaseException) -> str:
    """Returns the first line of the innermost cause: Orbax and TensorStore wrap it in pages of their own state."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {faults.first_line(error).split(' [tensorstore_spec=')[0]}"
