"""Saving and restoring a run: the train state, the position in the data and the config, one directory per step.

Layout of a run's workdir:

  checkpoints/<step>/          one complete checkpoint: `state` (arrays), `data`, `config`, `checksums` (JSON)
  checkpoints_damaged/<step>-<n>/   checkpoints that could not be read when the run was resumed, moved out of the way

Storage, asynchrony, atomic commit and retention are Orbax's. Added here are the answers to questions that Orbax leaves
open: does this workdir hold the run that is being resumed (the stored config says), does the stored tree fit the state
(names, shapes and dtypes are compared before reading), are the bytes those that were saved (Orbax notices truncated and
missing files, but not changed bytes: checksums of all arrays and of the JSON parts are stored beside them), is what is
saved worth keeping (only states that are finite are saved), and can it be read (the first checkpoint is, at once).
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.futures import future  # its waiting threads have no public name

from repae_jax import buckets, faults
from repae_jax.distributed import multihost

# Config fields (dotted, with everything below them) that may differ when a run is resumed: they change how long a run
# goes on, what it reports and where and how it reads and computes, not what. `init` matters at step 0 alone.
RESUMABLE = (
    "steps", "log", "hooks", "checkpoint", "sampling", "mesh", "init", "max_skipped_in_a_row", "compiler_options",
    "data.workers", "data.source", "data.options", "data.cache", "data.max_bad_fraction", "sit.remat", "sit.unroll",
    "vae.remat",
)  # fmt: skip

_ABSENT = "<absent>"
_LONGEST = 3800  # bytes of a path: the names below it are shorter than what is left of the 4095 that Linux takes


def prepare_workdir(workdir: epath.PathLike) -> epath.Path:
    """Creates `workdir` and proves that it can be written to.

    Args:
      workdir: a local path (`~` and relative paths allowed) or a bucket, `gs://bucket/path`.

    Returns:
      The absolute path.

    Raises:
      ValueError: the workdir has a name that checkpoints would be lost under, or it cannot be created or written to.
      OSError: the latter of one in a bucket.
    """
    check_name(workdir)
    path = _absolute(workdir)
    probe = path / f".write_test-{jax.process_index()}"
    buckets.check(path)
    try:
        with buckets.reached(path):
            path.mkdir(parents=True, exist_ok=True)
            probe.write_text("writable")
            probe.unlink(missing_ok=True)
    except OSError as error:
        if buckets.is_address(path):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"Workdir {str(path)!r} cannot be written to ({type(error).__name__}: {reason}). "
            "Give a directory that exists or can be created, where this user may create files."
        ) from error
    return path


def check_name(workdir: epath.PathLike) -> None:
    """Raises ValueError for names of workdirs that Orbax and TensorStore take for something else than a name.

    Orbax lists its files with a pattern that begins with the path: of `[…]` it finds nothing and completes checkpoints without
    arrays, of `*` and `?` it may find those of another run. TensorStore takes a backslash for the end of a name.
    """
    name, changed = str(_absolute(workdir)), str.maketrans(dict.fromkeys("[]*?\\", "_"))
    if glob.escape(name) != name or "\\" in name:
        raise ValueError(
            f"Workdir {name!r}: the libraries that save checkpoints take [ * ? and backslashes in it for a pattern. "
            f"Give a path without them, for instance {name.translate(changed)!r}."
        )
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"Workdir {name!r} is not UTF-8. Give a path that is.") from error
    if size > _LONGEST:
        raise ValueError(f"Workdir {name[:100]!r}… is {size} bytes long, of {_LONGEST} allowed. Give a shorter path.")


def _handlers_of_one_process() -> dict[str, ocp.CheckpointHandler]:
    """How one process saves the items of a checkpoint: what is the same on several devices, whole and from one of them.

    By Orbax's default each device gives a slice. That divides the copying, but compiles a program for every shape and device,
    for which the first save would keep training waiting.
    """
    handlers = {kind: ocp.type_handlers.ScalarHandler() for kind in (int, float, np.number)}
    handlers |= {np.ndarray: ocp.type_handlers.NumpyHandler()}
    handlers |= {jax.Array: ocp.type_handlers.ArrayHandler(use_replica_parallel=False)}
    registry = ocp.type_handlers.create_type_handler_registry(*handlers.items())
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return {"state": state} | {name: ocp.JsonCheckpointHandler() for name in ("data", "config", "checksums")}


class StateNotFinite(multihost.CollectiveError):
    """A state is not worth saving: raised in all processes at once."""


class CheckpointLost(multihost.CollectiveError):
    """What was saved cannot be read: raised in all processes at once."""


class _OlderCheckpoint(ValueError):
    """A checkpoint is not damaged, but cannot be checked."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, but when to stop is asked in `multihost.stop_requests` alone: JAX takes every question for a step taken."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Checkpoints of one run, saved in the background while training goes on.

    With several processes every method is called by all of them with the same arguments.

    Args:
      workdir: the run's directory; checkpoints go to `<workdir>/checkpoints/<step>`.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints whose step is divisible by this are kept besides; None keeps no others.

    Raises:
      ValueError: `keep_last` or `keep_every` is not positive.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_last: int = 3, keep_every: int | None = None):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep_last={keep_last!r}, keep_every={keep_every!r}: both must be positive (keep_every may be None). "
                "Use keep_last=1 to keep only the newest checkpoint."
            )
        logging.get_absl_logger().addFilter(_not_orbax_chatter)
        self._workdir = _absolute(workdir)
        self._directory = self._workdir / "checkpoints"
        with buckets.reached(self._directory):
            self._manager = _Manager(
                self._directory,
                options=ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every),
                item_handlers=None if multihost.is_multiprocess() else _handlers_of_one_process(),
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        if kind is None or not multihost.is_multiprocess() or issubclass(kind, multihost.CollectiveError):
            self.close()  # else what is being saved cannot be completed, and nobody should wait for it

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Starts saving a checkpoint; returns once `state` may be donated.

        Args:
          step: number of finished training steps.
          state: pytree of arrays, any sharding; None leaves are allowed.
          data_state: state of the data iterator, plain JSON values, equal in all processes (process 0 writes it).
          config: the run's config as nested dicts of plain JSON values.

        Returns:
          False if this step is saved already (nothing is written then), else True.

        Raises:
          ValueError: a checkpoint of a later step exists.
          StateNotFinite: a number in the state is not finite: nothing is saved, so that what is kept is worth keeping.
        """
        if step in self.steps():
            return False
        if self.latest_step is not None and step < self.latest_step:
            raise ValueError(
                f"Cannot save step {step}: {str(self._directory)!r} already holds step {self.latest_step}. "
                "Restore it first, or use another workdir."
            )
        sums, bad = _sums_and_bad(state)
        if bad:
            newest = self.latest_step
            kept = "none was saved" if newest is None else f"the newest checkpoint, of step {newest}, is finite"
            raise StateNotFinite(
                f"after step {step} {len(bad)} of the state's {len(sums)} arrays hold numbers that are not finite: "
                f"{', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}. That is not saved; {kept}. An update of finite losses "
                "and gradients did this (others are skipped): look at the optimizers' settings (config.optim)."
            )
        parts = {"data": data_state, "config": config, "state": _described(state), "step": step}
        checksums = {"arrays": sums, "parts": {name: _digest(part) for name, part in parts.items()}}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data_state),
            config=ocp.args.JsonSave(config),
            checksums=ocp.args.JsonSave(checksums),
        )
        with self._saving():
            return self._manager.save(step, args=items)

    @contextlib.contextmanager
    def _saving(self):
        """Turns what the disk or bucket is to blame for, in this save or the one before it, into an OSError that says so."""
        try:
            with buckets.reached(self._directory):
                yield
        except Exception as error:  # TensorStore raises ValueError
            if not multihost.is_multiprocess():  # which end without waiting
                _end_waiting_threads()
            if multihost.is_of_the_devices(error) or not faults.is_of_the_system(error):
                raise
            raise OSError(
                min(faults.errnos(error), default=errno.EIO),
                f"A checkpoint could not be saved ({_reason(error)}). Those in {str(self._directory)!r} are complete: with "
                "room on the disk, or whatever it lacks, the same command continues from the newest",
            ) from error

    def read_back(self, step: int, state: Any) -> None:
        """Waits for a checkpoint, reads it and compares it with `state`, so that nothing can lose a run in silence.

        The arrays are read into host memory, each process its share.

        Raises:
          CheckpointLost: in all processes, if it cannot be read or is not `state`.
        """
        self.wait()
        path = self._directory / str(step)
        multihost.is_seen(path)
        sums, _ = _sums_and_bad(state)
        leaves, structure = jax.tree.flatten(state)
        count, own = jax.process_count(), jax.process_index()
        share = jax.tree.unflatten(structure, [leaf if i % count == own else None for i, leaf in enumerate(leaves)])

        def read(path):
            *_, stored_arrays = _read_header(path)
            if stored_arrays != _kinds(state):
                raise ValueError("its list of arrays is another one")
            found = {name: _host_checksum(array) for name, array in _named_leaves(_read_to_host(path, share))}
            return _differing(found, sums)

        differing, damage = _attempt(read, path)
        if damage := damage or differing:
            raise CheckpointLost(
                f"Checkpoint {str(path)!r} was saved, but cannot be read back ({damage}): not training on without a way to "
                "save. Look at the disk, or take another workdir, or the versions of constraints.txt."
            )

    def restore(self, abstract_state: Any, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int] | None:
        """Restores the newest checkpoint that can be read, bit for bit, onto the shardings asked for.

        A newer one that is damaged is logged as an error and moved to `<workdir>/checkpoints_damaged`, because the
        resumed run will save that step again; nothing is deleted. Damage is a missing, truncated or garbled file among
        those that hold the state, the data position, the config or the checksums, and whatever has another checksum.

        Args:
          abstract_state: the state as a pytree of `jax.ShapeDtypeStruct` with shardings (None: on one local device).
          config: the config of the run that resumes. Fields outside `RESUMABLE` must equal the stored ones.

        Returns:
          (state, data_state, step), or None if no checkpoint was ever completed here.

        Raises:
          ValueError: the workdir belongs to a run with another config; the stored state differs from `abstract_state`
            in names, shapes or dtypes; or there are checkpoints and none can be read.
          OSError: a checkpoint is out of reach, which is no damage: nothing is moved, and no older one is used.
        """
        damaged = {}
        for step in reversed(self.steps()):
            path = self._directory / str(step)
            multihost.is_seen(path)
            stored, damage = _attempt(_read_header, path)
            if damage:
                damaged[step] = damage
                continue
            stored_config, data_state, stored_arrays = stored
            _check_same_run(stored_config, config, path)
            _check_same_arrays(stored_arrays, abstract_state, path, partial=False)
            state, damage = _read_arrays(path, abstract_state)
            if damage:
                damaged[step] = damage
                continue
            self._move_aside(damaged)
            return state, data_state, step
        if damaged:
            reasons = "".join(f"\n  {str(self._directory / str(step))}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"None of the checkpoints in {str(self._directory)!r} can be read; not starting from scratch over "
                f"them. Put back an intact copy, or use another workdir.{reasons}"
            )
        return None

    def wait(self) -> None:
        """Waits until everything saved so far is complete on disk; raises what went wrong in the background."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the background threads."""
        with self._saving():
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, including one that is still being written: those that process 0 sees."""
        return multihost.from_first(sorted(self._manager.all_steps()))

    @property
    def latest_step(self) -> int | None:
        """The newest step of `steps()`; None if there is none."""
        return max(self.steps(), default=None)

    def _move_aside(self, damaged: Mapping[int, str]) -> None:
        """Renames the damaged checkpoints and says so in the log."""
        for step, reason in damaged.items():
            source = self._directory / str(step)
            target = _free_name(self._workdir / "checkpoints_damaged", step)
            logging.error("Checkpoint %s is damaged (%s). It is moved to %s; an older one is used.", source, reason, target)
            if jax.process_index() == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
        if damaged:
            if jax.process_count() > 1:  # nobody may list the directory before the renames are done
                multihost_utils.sync_global_devices("damaged checkpoints moved aside")
            self._manager.reload()


def _end_waiting_threads() -> None:
    """Ends Orbax's threads that wait, for five minutes, for another one that has failed: this process could not end before."""
    for thread in threading.enumerate():
        if isinstance(thread, future._SignalingThread):
            thread.cancel()
            future.set_signals(thread._receive_signals, operation_id=thread._operation_id)


def _reaching(function: Callable) -> Callable:
    """Decorates functions of a workdir, which may be in a bucket."""

    @functools.wraps(function)
    def within(workdir: epath.PathLike, *args: Any, **kwargs: Any) -> Any:
        with buckets.reached(workdir):
            return function(workdir, *args, **kwargs)

    return within


@_reaching
def read_config(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Reads the config that a run was trained with.

    Args:
      workdir: the run's directory.
      step: which checkpoint to read it from; None for the newest.

    Raises:
      ValueError: no checkpoints, no such step, or the stored config cannot be read.
    """
    path = _find_step(workdir, step)
    config, damage = _attempt(_read_json, path, "config")
    if damage:
        raise _unreadable(path, damage)
    return config


@_reaching
def read_data_state(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Reads the data position that `Checkpointer.save` was given; arguments and errors as `read_config`."""
    path = _find_step(workdir, step)
    data_state, damage = _attempt(_read_json, path, "data")
    if damage:
        raise _unreadable(path, damage)
    return data_state


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Steps with a complete checkpoint, ascending; none if there are no checkpoints."""
    directory = _absolute(workdir) / "checkpoints"
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return sorted(step for step in set(steps) if (directory / str(step)).is_dir())  # others have names such as 0000003


@_reaching
def stored_shapes(workdir: epath.PathLike, step: int | None = None) -> tuple[Any, int]:
    """Reads what a checkpoint holds, without the arrays.

    Args:
      workdir: the run's directory.
      step: which checkpoint; None for the newest.

    Returns:
      (the state as nested dicts and lists of `jax.ShapeDtypeStruct`, parts of which `restore_subset` takes, the step).

    Raises:
      ValueError: no checkpoints, no such step, or it cannot be read.
    """
    path = _find_step(workdir, step)
    metadata, damage = _attempt(_stored_metadata, path)
    if damage:
        raise _unreadable(path, damage)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata), int(path.name)


@_reaching
def restore_subset(workdir: epath.PathLike, abstract_subtree: Any, step: int | None = None) -> tuple[Any, int]:
    """Restores a part of a train state, for instance only what sampling needs; the rest is not read.

    Args:
      workdir: the run's directory.
      abstract_subtree: pytree of `jax.ShapeDtypeStruct` whose keys are those of the saved state, for instance
        `{"ema": ..., "vae": {"params": ...}}`. Leaves without a sharding go to one local device.
      step: which checkpoint to read; None for the newest.

    Returns:
      (the subtree filled with arrays, the step it comes from).

    Raises:
      ValueError: no checkpoints, no such step, the checkpoint lacks a name or has it in another shape or dtype, or it
        cannot be read.
    """
    path = _find_step(workdir, step)
    stored_arrays, damage = _attempt(_stored_arrays, path)
    if damage:
        raise _unreadable(path, damage)
    _check_same_arrays(stored_arrays, abstract_subtree, path, partial=True)
    subtree, damage = _read_arrays(path, abstract_subtree)
    if damage:
        raise _unreadable(path, damage)
    return subtree, int(path.name)


def fingerprint(tree: Any) -> str:
    """What tells weights from others: a hash of the names, shapes, dtypes and checksums of all arrays.

    Args:
      tree: pytree of arrays, any sharding.

    Returns:
      16 hexadecimal digits, the same on any number of devices and processes.
    """
    described = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named_leaves(tree)}
    content = json.dumps([described, _checksums(tree)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _absolute(workdir: epath.PathLike) -> epath.Path:
    """The workdir as an absolute path, which Orbax requires; addresses such as gs:// already are."""
    if not str(workdir):
        raise ValueError("Workdir '' is empty. Give a directory, for instance runs/repae, or gs://bucket/path.")
    path = epath.Path(workdir)
    if buckets.is_address(workdir):
        return path
    path = path.expanduser()
    if re.match(r"\w+:/", str(path)):  # for etils the same as with two
        raise ValueError(f"Workdir {str(path)!r}: an address has two slashes, a path does not begin so.")
    return epath.Path(Path(path).resolve()) if ".." in path.parts else path.absolute()  # .. of a link is not where the link is


def _find_step(workdir: epath.PathLike, step: int | None) -> epath.Path:
    """Directory of the checkpoint of `step`, or of the newest one."""
    directory = _absolute(workdir) / "checkpoints"
    steps = saved_steps(workdir)
    if not steps:
        raise ValueError(f"No checkpoints in {str(directory)!r}. Give the workdir of a run that has saved at least one.")
    if step is not None and step not in steps:
        raise ValueError(f"No checkpoint of step {step} in {str(directory)!r}. Steps present: {steps}.")
    return directory / str(steps[-1] if step is None else step)


def _attempt(read: Callable, path: epath.Path, *args: Any) -> tuple[Any, str | None]:
    """Calls `read(path, *args)` in all processes; returns (result, None) if all succeeded, else (None, what is wrong).

    Raises:
      OSError: if not the checkpoint is to blame, but the disk, the bucket or the memory, after some more attempts; or if this
        user may not read it.
    """

    def result_or_damage():
        try:
            return read(path, *args), None
        except _OlderCheckpoint:
            raise
        except Exception as error:  # Orbax raises a bare Exception for an unreadable chunk
            if multihost.is_of_the_devices(error):  # raised below, as trying again does not help
                return None, error
            if faults.is_of_the_system(error):
                raise
            if faults.is_refusal(error):
                raise PermissionError(errno.EACCES, f"Checkpoint {str(path)!r} cannot be read ({_reason(error)})") from error
            _open_all(path)  # libraries say of what is out of reach that it does not exist
            return None, _reason(error)

    # the clients of buckets have tried again for a quarter of an hour
    tries = 1 if buckets.is_address(path) else None
    result, damage = faults.read(result_or_damage, name=lambda: f"Checkpoint {str(path)!r}", tries=tries)
    if isinstance(damage, Exception):
        raise damage
    if jax.process_count() > 1:  # all processes must take the same checkpoint
        succeeded = multihost_utils.process_allgather(np.asarray(damage is None))
        if not damage and not np.all(succeeded):
            damage = "unreadable in another process"
    return (None, damage) if damage else (result, None)


def _open_all(folder: epath.Path) -> None:
    """Raises OSError if anything in a folder that is there cannot be opened."""
    try:
        for path in folder.iterdir():
            if path.is_dir():
                _open_all(path)
            else:
                with path.open("rb") as file:
                    file.read(1)
    except FileNotFoundError:
        pass  # a damage


def _read_unchecked(path: epath.Path, item: str) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(path / item, args=ocp.args.JsonRestore())


def _read_json(path: epath.Path, item: str) -> dict[str, Any]:
    """Returns the JSON part `item` of a checkpoint; ValueError if it is not what was saved."""
    content = _read_unchecked(path, item)
    _check_digest(path, item, content)
    return content


def _read_header(path: epath.Path) -> tuple[dict, dict, dict]:
    """All that is needed besides the arrays: (config, data state, shape and dtype of every array)."""
    return _read_json(path, "config"), _read_json(path, "data"), _stored_arrays(path)


def _stored_metadata(path: epath.Path) -> Any:
    """Returns Orbax's metadata of the stored state, a tree; ValueError if the arrays are not those that were saved."""
    tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    _check_digest(path, "state", _described(tree))
    return tree


def _stored_arrays(path: epath.Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of the stored state, by name."""
    return _kinds(_stored_metadata(path))


def _kinds(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and dtype of every array, by name."""
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named_leaves(tree)}


def _described(tree: Any) -> dict[str, list]:
    """Returns the same as `_kinds`, as JSON can hold it."""
    return {name: [list(shape), dtype.name] for name, (shape, dtype) in _kinds(tree).items()}


def _digest(content: Any) -> str:
    """Returns a hash of what JSON can hold, the same when read back: tuples are lists, the order of names does not count."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_digest(path: epath.Path, part: str, content: Any) -> None:
    """Raises ValueError if a part of a checkpoint is not what was saved."""
    checksums = _read_unchecked(path, "checksums")
    if checksums and all(isinstance(value, int) for value in checksums.values()):  # of arrays alone
        raise _OlderCheckpoint(
            f"Checkpoint {str(path)!r} was saved by an older version of this code, without checksums of its JSON parts. "
            "Use that version, or another workdir."
        )
    if checksums["parts"]["step"] != _digest(int(path.name)):
        raise ValueError("it is of another step than its name says")
    if checksums["parts"][part] != _digest(content):
        raise ValueError(f"{part} has another checksum than when it was saved")


def _read_arrays(path: epath.Path, abstract: Any) -> tuple[Any, str | None]:
    """Reads the arrays named in `abstract`; returns (arrays, None), or (None, what is wrong with them)."""
    abstract = jax.tree.map(_with_sharding, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)

    def read(path):
        return _restore(path, abstract, restore_args), _read_unchecked(path, "checksums")["arrays"]

    stored, damage = _attempt(read, path)
    if damage:
        return None, damage
    arrays, checksums = stored
    damage = _differing(_checksums(arrays), checksums)
    return (None, damage) if damage else (arrays, None)


def _read_to_host(path: epath.Path, abstract: Any) -> Any:
    """Returns the arrays named in `abstract`, as NumPy's."""
    return _restore(path, abstract, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract))


def _restore(path: epath.Path, abstract: Any, restore_args: Any) -> Any:
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    # The bare handler: `ocp.Checkpointer` waits for all processes afterwards, in vain if one of them has failed.
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)


def _differing(found: Mapping[str, int], saved: Mapping[str, int]) -> str | None:
    """Tells the arrays whose checksums differ; None if there are none."""
    names = [name for name, value in found.items() if saved.get(name) != value]
    return f"arrays with another checksum than when they were saved: {', '.join(names)}" if names else None


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without one Orbax would fall back on the devices the checkpoint was saved from, which may not exist here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with dotted names, the same for structs, named tuples and the dicts that Orbax stores them as."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # of the size of an element, in bytes


def _checksum(array: jax.Array) -> jax.Array:
    """Sum of the array's bit patterns modulo 2^32: an integer sum, so the same however the array is sharded."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    return jnp.sum(jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]), dtype=jnp.uint32)


def _host_checksum(array: np.ndarray) -> int:
    """Returns the checksum of a NumPy array."""
    return int(np.sum(np.ravel(array).view(_UNSIGNED[array.dtype.itemsize]), dtype=np.uint32))


def _is_finite(array: jax.Array) -> jax.Array | bool:
    return jnp.all(jnp.isfinite(array)) if jnp.issubdtype(array.dtype, jnp.inexact) else True


def _checksums(tree: Any) -> dict[str, int]:
    return _sums_and_bad(tree)[0]


def _sums_and_bad(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Returns (checksum of every array by name, names of those with a number that is not finite)."""
    sums, finite = jax.device_get(_look_at_all(dict(_named_leaves(tree))))
    return {name: int(value) for name, value in sums.items()}, [name for name, value in finite.items() if not value]


@jax.jit  # one program for the whole tree, not one per shape; both read every array once
def _look_at_all(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    return jax.tree.map(_checksum, leaves), jax.tree.map(_is_finite, leaves)


def _check_same_run(stored: Mapping[str, Any], given: Mapping[str, Any], path: epath.Path) -> None:
    """Raises ValueError naming every field, outside RESUMABLE, in which two configs differ."""
    stored, given = _dotted(stored), _dotted(given)
    fields = sorted(name for name in stored.keys() | given.keys() if not _is_resumable(name))
    differing = [
        f"\n  {name}: stored {stored.get(name, _ABSENT)!r}, given {given.get(name, _ABSENT)!r}"
        for name in fields
        if stored.get(name, _ABSENT) != given.get(name, _ABSENT)
    ]
    if differing:
        raise ValueError(
            f"Checkpoint {str(path)!r} belongs to a run with another config. "
            "Use another workdir, or restore the values:" + "".join(differing)
        )


def _is_resumable(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in RESUMABLE)


def _dotted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict with dotted names; through JSON, so that tuples equal the lists they are stored as."""

    def flatten(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: value}
        flat = [flatten(f"{prefix}.{key}" if prefix else key, child) for key, child in value.items()]
        return {name: leaf for part in flat for name, leaf in part.items()}

    plain = json.loads(json.dumps(config))
    return flatten("", plain) if plain else {}


def _check_same_arrays(stored: Mapping[str, tuple], abstract: Any, path: epath.Path, *, partial: bool) -> None:
    """Raises ValueError naming every array that is missing, unexpected (unless `partial`) or of another kind."""
    wanted = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named_leaves(abstract)}
    problems = [f"\n  {name}: not in the checkpoint" for name in wanted if name not in stored]
    if not partial:
        problems += [f"\n  {name}: in the checkpoint, not in the state" for name in stored if name not in wanted]
    problems += [
        f"\n  {name}: stored {_describe(stored[name])}, expected {_describe(wanted[name])}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if problems:
        raise ValueError(
            f"The arrays in checkpoint {str(path)!r} are not those of this state. "
            "Build the networks and optimizers as in the run that saved it, or use another workdir:" + "".join(problems)
        )


def _describe(shape_and_dtype: tuple[tuple[int, ...], np.dtype]) -> str:
    shape, dtype = shape_and_dtype
    return f"{dtype.name}{list(shape)}"


def _unreadable(path: epath.Path, damage: str) -> ValueError:
    return ValueError(f"Checkpoint {str(path)!r} is damaged ({damage}). Ask for an older step, or put back an intact copy.")


def _reason(error: BaseException) -> str:
    """First line of the innermost cause: Orbax and TensorStore wrap it in pages of their own state."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).splitlines() or [""])[0].split(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {line}"


def _free_name(directory: epath.Path, step: int) -> epath.Path:
    number = 0
    while (directory / f"{step}-{number}").exists():
        number += 1
    return directory / f"{step}-{number}"


def _not_orbax_chatter(record) -> bool:
    """Log filter: drops Orbax's progress messages (dozens per save), keeps its warnings and everybody else's lines."""
    return record.levelno >= logging.converter.STANDARD_WARNING or "orbax" not in record.pathname
