"""Saving and restoring a run: the train state, the position in the data and the config, one folder per step.

A workdir has checkpoints/<step>, see `checkpoint_files`, and in checkpoints_damaged/<step>-<n> those that could not be read.

Storage, asynchrony, atomic commit and retention are Orbax's. Added here are the answers to questions that Orbax leaves
open: does this workdir hold the run that is being resumed (the stored config says), does the stored tree fit the state
(names, shapes and dtypes are compared before reading), are the bytes those that were saved (their checksums say), is what is
saved worth keeping (only states that are finite are saved), and can it be read (the first checkpoint is, at once).
"""

import contextlib
import errno
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.futures import future  # Orbax's waiting threads have no public name

from repae_jax import buckets, faults
from repae_jax.distributed import multihost
from repae_jax.training import checkpoint_files as stored
from repae_jax.training.phases import phases_of
from repae_jax.training.workdir import absolute

# Config fields (dotted, with everything below them) that may differ when a run is resumed: they change how long a run
# goes on, what it reports and where and how it reads and computes, not what. `init` matters at step 0 alone.
RESUMABLE = (
    "steps", "log", "hooks", "checkpoint", "sampling", "mesh", "init", "max_skipped_in_a_row", "compiler_options",
    "deterministic", "attention", "data.workers", "data.source", "data.options", "data.cache", "data.max_bad_fraction",
    "sit.remat", "sit.unroll", "vae.remat",
)  # fmt: skip


class StateNotFinite(multihost.CollectiveError):
    """A state is not worth saving: raised in all processes at once."""


class CheckpointLost(multihost.CollectiveError):
    """A saved checkpoint cannot be read: raised in all processes at once."""


def _single_process_handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Returns Orbax's handlers of a checkpoint's items; an array on several devices is saved whole, from one of them.

    By Orbax's default each device gives a slice. That divides the copying, but compiles a program for every shape and device,
    for which the first save would keep training waiting.
    """
    types = ocp.type_handlers
    handlers: dict[Any, Any] = {kind: types.ScalarHandler() for kind in (int, float, np.number)}
    handlers |= {np.ndarray: types.NumpyHandler(), jax.Array: types.ArrayHandler(use_replica_parallel=False)}
    arrays = types.create_type_handler_registry(*handlers.items())
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=arrays))
    for name in ("data", "config", "checksums"):
        registry.add(name, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, but only `stopping.stop_requests` asks whether to stop: JAX takes every question for a step."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer(contextlib.AbstractContextManager):
    """Checkpoints of one run, saved in the background while training goes on.

    With several processes all of them call every method with the same arguments. The newest `keep_last` checkpoints are kept,
    and, unless it is None, those whose step is divisible by `keep_every`; both are positive.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_last: int = 3, keep_every: int | None = None):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep_last={keep_last!r}, keep_every={keep_every!r}: both must be positive (keep_every may be None); "
                "use keep_last=1 to keep only the newest checkpoint"
            )
        logging.get_absl_logger().addFilter(_drop_orbax_progress)
        self._workdir = absolute(workdir)
        self._directory = self._workdir / "checkpoints"
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep_last), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        with buckets.reached(self._directory):
            self._manager = _Manager(
                self._directory,
                options=ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(kept)),
                handler_registry=None if multihost.is_multiprocess() else _single_process_handlers(),
            )

    def __exit__(self, kind: type | None, *exception) -> None:
        if kind is None or not multihost.is_multiprocess() or issubclass(kind, multihost.CollectiveError):
            self.close()  # otherwise a save in progress cannot be completed, and nobody should wait for it

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Starts saving a checkpoint; returns once `state` may be donated: False if this step was saved already.

        Args:
          step: number of finished training steps.
          state: pytree of arrays, any sharding; None leaves are allowed.
          data_state: state of the data iterator, JSON values, equal in all processes (process 0 writes it).
          config: JSON values, too.

        Raises:
          ValueError: if a checkpoint of a later step exists.
          StateNotFinite: if a number in the state is not finite: nothing is saved then.
        """
        steps = self.steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise ValueError(
                f"cannot save step {step}: {str(self._directory)!r} already holds step {steps[-1]}; restore it first, or use "
                "another workdir"
            )
        sums, not_finite = stored.checksums_and_not_finite(state)
        if not_finite:
            kept = f"the newest checkpoint, of step {steps[-1]}, is finite" if steps else "none was saved"
            raise StateNotFinite(
                f"after step {step} {len(not_finite)} of the state's {len(sums)} arrays hold numbers that are not finite: "
                f"{', '.join(not_finite[:5])}{', …' if len(not_finite) > 5 else ''}. That is not saved; {kept}. An update of "
                "finite losses and gradients did this (others are skipped): look at the optimizers' settings (config.optim)."
            )
        parts = {"data": data_state, "config": config}
        parts["checksums"] = stored.stored_checksums(step, sums, state, data_state, config)
        items = {name: ocp.args.JsonSave(part) for name, part in parts.items()}
        with self._saving():
            return self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), **items))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns errors of the disk or bucket, in this save or the one before it, into an OSError with advice."""
        try:
            with buckets.reached(self._directory):
                yield
        except Exception as error:  # TensorStore raises ValueError
            if not multihost.is_multiprocess():  # several end without waiting
                _end_waiting_threads()
            if multihost.is_device_error(error) or not faults.is_of_the_system(error):
                raise
            raise OSError(
                min(faults.errnos(error), default=errno.EIO),
                f"a checkpoint could not be saved ({stored.reason_of(error)}); those in {str(self._directory)!r} are complete: "
                "with room on the disk, or whatever it lacks, the same command continues from the newest",
            ) from error

    def read_back(self, step: int, state: Any) -> None:
        """Waits for a checkpoint and reads it, each process its share; CheckpointLost if that fails or it is not `state`."""
        self.wait()
        path = self._directory / str(step)
        multihost.is_seen(path)
        sums = stored.checksums(state)
        leaves, structure = jax.tree.flatten(state)
        count, own = jax.process_count(), jax.process_index()
        share = jax.tree.unflatten(structure, [leaf if i % count == own else None for i, leaf in enumerate(leaves)])

        def read():
            _, _, stored_kinds, _ = stored.StoredCheckpoint(path).header()
            if stored_kinds != stored.kinds(state):
                raise ValueError("its list of arrays is another one")
            arrays = stored.named_leaves(stored.read_to_host(path, share))
            return stored.changed_arrays({name: stored.host_checksum(array) for name, array in arrays}, sums)

        changed, damage = stored.attempt(read, path)
        if damage := damage or changed:
            raise CheckpointLost(
                f"checkpoint {str(path)!r} was saved, but cannot be read back ({damage}): not training on without a way to "
                "save; look at the disk, or take another workdir, or the versions of a constraints file of the repository"
            )

    def restore(self, abstract_state: Any, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int] | None:
        """Restores the newest checkpoint that can be read, bit for bit, onto the shardings asked for.

        A newer one that is damaged is logged as an error and moved to `<workdir>/checkpoints_damaged`, because the resumed run
        will save that step again; nothing is deleted. Damage is a file that is missing, truncated or garbled, and whatever has
        another checksum.

        Args:
          abstract_state: the state as a pytree of `jax.ShapeDtypeStruct` with shardings (None: on one local device).
          config: the config of the run that resumes. Fields outside `RESUMABLE` must equal the stored ones.

        Returns:
          (state, data_state, step), or None if no checkpoint was ever completed here.

        Raises:
          ValueError: if the workdir is a run's with another config; if the stored state differs from `abstract_state` in names,
            shapes or dtypes; or if there are checkpoints and none can be read.
          OSError: if a checkpoint is out of reach, which is no damage: nothing is moved, and no older one is used.
        """
        damaged: dict[int, str | None] = {}
        for step in reversed(self.steps()):
            path = self._directory / str(step)
            multihost.is_seen(path)
            header, damaged[step] = stored.attempt(stored.StoredCheckpoint(path).header, path)
            if damaged[step]:
                continue
            stored_config, data_state, stored_kinds, sums = header
            _check_same_run(stored_config, config, path)
            _check_same_arrays(stored_kinds, abstract_state, path, partial=False)
            state, damaged[step] = stored.read_arrays(path, abstract_state, sums)
            if damaged[step]:
                continue
            del damaged[step]
            self._move_aside(damaged)
            return state, data_state, step
        if damaged:
            reasons = "".join(f"\n  {str(self._directory / str(step))}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"none of the checkpoints in {str(self._directory)!r} can be read; not starting from scratch over "
                f"them: put back an intact copy, or use another workdir{reasons}"
            )
        return None

    def wait(self) -> None:
        """Waits until everything saved so far is complete on disk; raises errors of the background."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the background threads."""
        with self._saving():
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps with a checkpoint that process 0 sees, ascending, including one still being written."""
        return multihost.broadcast_from_process_0(sorted(self._manager.all_steps()))

    def _move_aside(self, damaged: Mapping[int, str | None]) -> None:
        for step, reason in damaged.items():
            source = self._directory / str(step)
            names = (self._workdir / "checkpoints_damaged" / f"{step}-{number}" for number in itertools.count())
            target = next(name for name in names if not name.exists())
            logging.error("checkpoint %s is damaged (%s): it is moved to %s, and an older one is used", source, reason, target)
            if jax.process_index() == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
        if damaged:
            if jax.process_count() > 1:  # nobody may list the directory before the renames are done
                multihost_utils.sync_global_devices("damaged checkpoints moved aside")
            self._manager.reload()


def _end_waiting_threads() -> None:
    """Ends Orbax's threads that wait five minutes for one that has failed: this process could not end before."""
    for thread in threading.enumerate():
        if isinstance(thread, future._SignalingThread):
            thread.cancel()
            future.set_signals(thread._receive_signals, operation_id=thread._operation_id)


def _drop_orbax_progress(record) -> bool:
    """Log filter that drops Orbax's progress messages, dozens per save, but not its warnings."""
    return record.levelno >= logging.converter.STANDARD_WARNING or "orbax" not in record.pathname


def _check_same_run(stored_config: Mapping[str, Any], given: Mapping[str, Any], path: epath.Path) -> None:
    """Raises ValueError naming every field, outside RESUMABLE, in which two configs differ."""
    lines = [
        f"\n  {name}: stored {before!r}, given {now!r}"
        for name, before, now in multihost.differences(stored_config, given)
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in RESUMABLE)
    ]
    if lines:
        raise ValueError(
            f"checkpoint {str(path)!r} belongs to a run with another config; use another workdir, or restore the values:"
            + "".join(lines)
        )


def _check_same_arrays(stored_kinds: Mapping[str, stored.Kind], abstract: Any, path: epath.Path, *, partial: bool) -> None:
    """Raises ValueError naming every array that is missing, unexpected (unless `partial`) or of another kind."""
    wanted = stored.kinds(abstract)
    problems = [f"\n  {name}: not in the checkpoint" for name in wanted if name not in stored_kinds]
    if not partial:
        problems += [f"\n  {name}: in the checkpoint, not in the state" for name in stored_kinds if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        before, dtype_before = stored_kinds.get(name, (shape, dtype))
        if (before, dtype_before) != (shape, dtype):
            problems.append(f"\n  {name}: stored {dtype_before.name}{list(before)}, expected {dtype.name}{list(shape)}")
    if problems:
        raise ValueError(
            f"the arrays in checkpoint {str(path)!r} are not those of this state; "
            "build the networks and optimizers as in the run that saved it, or use another workdir:" + "".join(problems)
        )


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Returns the steps with a complete checkpoint, ascending; none if there are no checkpoints."""
    directory = absolute(workdir) / "checkpoints"
    with buckets.reached(directory):
        steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
        return sorted(step for step in set(steps) if (directory / str(step)).is_dir())  # others have names such as 0000003


def read_config(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Returns a run's config, from a step's checkpoint, None for the newest; ValueError if there is none that can be read."""
    return _read(workdir, step, lambda checkpoint: checkpoint.part("config"))[0]


def check_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a workdir is a run's with another config, as `Checkpointer.restore` does, or as `read_config`."""
    stored_config, path = _read(workdir, None, lambda checkpoint: checkpoint.part("config"))
    _check_same_run(stored_config, config, path)


def read_data_state(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Returns the data position that `Checkpointer.save` was given; arguments and errors as `read_config`."""
    return _read(workdir, step, lambda checkpoint: checkpoint.part("data"))[0]


def stored_shapes(workdir: epath.PathLike, step: int | None = None) -> tuple[Any, int]:
    """Returns (the state as nested dicts and lists of `jax.ShapeDtypeStruct`, parts of which `restore_subset` takes, the step).

    Arguments and errors are those of `read_config`.
    """
    metadata, path = _read(workdir, step, lambda checkpoint: checkpoint.metadata())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata), int(path.name)


def restore_subset(workdir: epath.PathLike, abstract_subtree: Any, step: int | None = None) -> tuple[Any, int]:
    """Restores a part of a train state, for instance what sampling needs; returns it and the step that it comes from.

    `abstract_subtree` is a pytree of `jax.ShapeDtypeStruct` whose keys are those of the saved state, for instance
    `{"ema": ..., "vae": {"params": ...}}`. Leaves without a sharding go to one local device. ValueError as of `read_config`, or
    if the checkpoint lacks a name or has it in another shape or dtype.
    """
    (stored_kinds, sums), path = _read(workdir, step, lambda saved: (stored.kinds(saved.metadata()), saved.checksums["arrays"]))
    _check_same_arrays(stored_kinds, abstract_subtree, path, partial=True)
    with buckets.reached(workdir):
        subtree, damage = stored.read_arrays(path, abstract_subtree, sums)
    if damage:
        raise _damaged(path, damage)
    return subtree, int(path.name)


def _read(workdir, step, read: Callable[[stored.StoredCheckpoint], Any]) -> tuple[Any, epath.Path]:
    """Returns (what `read` returns of the checkpoint of `step`, or of the newest, its folder)."""
    with buckets.reached(workdir):
        directory, steps = absolute(workdir) / "checkpoints", saved_steps(workdir)
        if not steps:
            *_, phase = phases_of(workdir) or ["the workdir of a run that has saved at least one"]
            raise ValueError(f"no checkpoints in {str(directory)!r}; give {phase}")
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {str(directory)!r}; steps present: {steps}")
        path = directory / str(steps[-1] if step is None else step)
        result, damage = stored.attempt(lambda: read(stored.StoredCheckpoint(path)), path)
    if damage:
        raise _damaged(path, damage)
    return result, path


def _damaged(path: epath.Path, damage: str) -> ValueError:
    return ValueError(f"checkpoint {str(path)!r} is damaged ({damage}); ask for an older step, or put back an intact copy")


def fingerprint(tree: Any) -> str:
    """Returns a hash of the names, shapes, dtypes and checksums of all arrays of a tree, the same on any number of devices."""
    described = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in stored.named_leaves(tree)}
    content = json.dumps([described, stored.checksums(tree)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
