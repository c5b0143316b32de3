"""Several processes of one run: they start, agree and fail together.

Values are exchanged through JAX's coordination service, not over the devices: it works before devices are used, while processes
still differ, and for any JSON. All processes call the same functions in the same order; with one process, all are trivial.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from repae_jax import faults
from repae_jax.distributed import roll_call
from repae_jax.distributed.private_jax import distributed

HEARTBEAT_SECONDS = 40  # JAX ends all other processes after so long without a sign of life from one
START_SECONDS = 600  # in which all processes must have come, unless the environment's START_SECONDS says otherwise
WAIT_SECONDS = 3600  # for processes that are alive: one may read a million file names meanwhile
SEEN_SECONDS = 60  # until all see a new file: network file systems cache
PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "flax",
    "optax", "orbax-checkpoint", "tensorstore", "grain", "array_record", "pyarrow", "pillow", "numpy", "ml_collections",
)  # fmt: skip
_POLL_SECONDS = 1.0
_ABSENT = "<absent>"
_FAILED, _FLAGS = "repae_jax/failed", "repae_jax/flags/"
_numbers = itertools.count()
_last_acts: list[Callable[[], None]] = []


class CollectiveError(RuntimeError):
    """Error that all processes raise at once: none needs to be told, and what is being saved can be completed."""


def start(
    automatic: bool = False, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process with the others, unless nothing is given; before anything else of JAX is used.

    With `automatic` they find each other, on TPU pods, SLURM, GKE and whatever else jax.distributed knows; by hand each is
    given 'HOST:PORT' of process 0, their number, and its own, from 0. Arguments that cannot work raise ValueError. Processes
    that do not find each other within START_SECONDS end with one line, and exit code 75.
    """
    by_hand = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    is_by_hand = any(value is not None for value in by_hand.values())
    if not is_by_hand and not automatic:
        return
    if is_by_hand:
        roll_call.check_options(by_hand, automatic)
    seconds = _start_seconds()
    alone = threading.Timer(seconds, _end_alone, [seconds])
    alone.daemon = True
    alone.start()
    try:
        if is_by_hand:
            roll_call.call_roll(coordinator, num_processes, process_id)
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method="deactivate" if is_by_hand else None,
            initialization_timeout=2 * seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except roll_call.RollCallError:
        raise
    except ValueError as error:
        raise ValueError(
            f"--distributed: no TPU pod, SLURM job or other cluster was found ({error}); give --coordinator=HOST:PORT, "
            "--num_processes and --process_id, or leave it out to train in one process"
        ) from error
    finally:
        alone.cancel()
    if is_multiprocess():
        stop = threading.Event()
        watching = threading.Thread(target=_watch, args=(distributed.global_state.client, stop), daemon=True)
        watching.start()
        # a thread that comes back from C++ when the interpreter has begun to end aborts the process
        atexit.register(lambda: (stop.set(), watching.join()))


def _start_seconds():
    given = os.environ.get("START_SECONDS") or str(START_SECONDS)
    if not re.fullmatch(r"[1-9]\d{0,5}", given):
        raise ValueError(f"START_SECONDS={given}: expected whole seconds, 1..999999")
    return int(given)


def _end_alone(seconds):
    """Ends a process that waits for others in vain, such as a host that died; JAX would abort, with pages of its own state."""
    print(
        f"error: the processes did not find each other within {seconds} s: start all of them, with the same coordinator and "
        "number, each with a process_id of its own; where they take longer to come, set START_SECONDS",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(os.EX_TEMPFAIL)


def is_multiprocess() -> bool:
    """Returns whether `start` has connected this process with others."""
    return distributed.global_state.num_processes > 1


# ---- agreement -------------------------------------------------------------------------------------------------------


def all_gather(value: Any) -> list[Any]:
    """Returns the values of all processes, JSON each, in the order of the processes."""
    if not is_multiprocess():
        return [value]
    client, own = distributed.global_state.client, distributed.global_state.process_id
    folder = f"repae_jax/gathered/{next(_numbers)}/"
    client.key_value_set(f"{folder}{own}", json.dumps(value))
    client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
    values = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(folder)}
    client.wait_at_barrier(f"{folder}read", WAIT_SECONDS * 1000)
    client.key_value_delete(f"{folder}{own}")
    return [values[index] for index in sorted(values)]


def broadcast_from_process_0(value: Any) -> Any:
    """Returns the value of process 0, JSON, in all processes."""
    return all_gather(value if distributed.global_state.process_id == 0 else None)[0]


def set_flag(name: str) -> None:
    """Publishes a flag to the other processes."""
    distributed.global_state.client.key_value_set(f"{_FLAGS}{name}", socket.gethostname(), allow_overwrite=True)


def get_flag(name: str) -> str | None:
    """Returns the host of a process that has set a flag; None if none has."""
    try:
        return distributed.global_state.client.key_value_try_get(f"{_FLAGS}{name}")
    except jax.errors.JaxRuntimeError:
        return None


def assert_same(**description: Any) -> None:
    """Raises ValueError in all processes unless all call it with the same description, nested dicts of JSON values.

    It names the processes that differ from process 0, the names in which they do, and both values.
    """
    if not is_multiprocess():
        return
    first, host = broadcast_from_process_0([description, socket.gethostname()])
    own = distributed.global_state.process_id
    changes = differences(first, description)
    lines = [f"\n  {name}: {value!r} in process 0, {here!r} in process {own}" for name, value, here in changes]
    differing = [process for process in all_gather([*_this_process(), lines]) if process[-1]]
    if differing:
        names = "; ".join(f"process {index} on host {name}" for index, name, _ in differing)
        text = "".join(line for *_, lines in differing for line in lines)
        raise ValueError(f"{names} differs from process 0 on host {host}, but all must be started alike:{text}")


def assert_same_config(config: dict[str, Any]) -> None:
    """Raises ValueError unless all processes run the same code on the same packages, config and number of devices.

    A host with an older copy of the code or of a package would compile another program, and all would wait for each other. So
    would one of several processes, as on a TPU pod, that is started as if it were alone.
    """
    number = distributed.global_state.num_processes
    # before devices are used: that fails with others
    assert_same(num_processes=number, packages=versions(), code=_sources(), config=config)
    if jax.process_count() > 1 and not is_multiprocess():
        raise ValueError(f"this is one of {jax.process_count()} processes: start all of them with --distributed")
    local = jax.local_devices()
    assert_same(devices=f"{len(local)} x {local[0].device_kind}")


def check_shared(folder) -> None:
    """Raises ValueError in all processes, naming those that do not see what process 0 writes to a folder that exists."""
    if not is_multiprocess():
        return
    probe = folder / f".shared-{broadcast_from_process_0(secrets.token_hex(8))}"
    if distributed.global_state.process_id == 0:
        probe.write_text("seen")
    all_gather(None)
    answers = all_gather([*_this_process(), str(folder), is_seen(probe)])
    if distributed.global_state.process_id == 0:
        probe.unlink()
    blind = [f"process {index} on host {host}, in {place}" for index, host, place, sees in answers if not sees]
    if blind:
        raise ValueError(
            f"what process 0 wrote to {answers[0][2]} is not seen by {'; '.join(blind)}: give a folder on a disk that all "
            "hosts share, or for a workdir an address such as gs://bucket/run"
        )


def is_seen(path) -> bool:
    """Returns whether a file of another process is there, after the time that network file systems take to show it."""
    deadline = time.monotonic() + SEEN_SECONDS
    return wait_for_files([path], lambda: time.monotonic() >= deadline)


def wait_for_files(paths: Sequence, is_done: Callable[[], bool] = lambda: False) -> bool:
    """Waits until files of other processes are there, and returns True; or until is_done(), and returns False.

    Works between processes that are not connected, too, and unlike collective operations it may take hours. When `is_done`
    returns true, the files are needed no more.
    """
    text = "waiting for %d files of the other processes, first %s; all must see one file system"
    missing, logged = [path for path in paths if not path.exists()], time.monotonic()
    while missing and not is_done():
        if time.monotonic() - logged > SEEN_SECONDS:
            logging.warning(text, len(missing), missing[0])
            logged = time.monotonic()
        time.sleep(_POLL_SECONDS)
        missing = [path for path in missing if not path.exists()]
    return not missing


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that results depend on; None for a package that is not installed."""
    result = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    return result


def _sources():
    """Returns a hash of each file of our own code, by name."""
    here = Path(__file__).parents[1]
    files = [path for folder in (here, here.parent / "checkpoints_tools") for path in sorted(folder.rglob("*.py"))]
    return {str(path.relative_to(here.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in files}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted name, its value in the first, in the second) of where two nested dicts of JSON values differ."""
    first, second = _flat(first), _flat(second)
    values = [(name, first.get(name, _ABSENT), second.get(name, _ABSENT)) for name in sorted(first.keys() | second.keys())]
    return [(name, a, b) for name, a, b in values if a != b]


def _flat(description):
    """Returns nested dicts as one with dotted names; through JSON, so that tuples equal lists."""
    plain = json.loads(json.dumps(description))
    leaves = jax.tree_util.tree_flatten_with_path(plain, is_leaf=lambda node: not isinstance(node, dict) or not node)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _this_process():
    return [distributed.global_state.process_id, socket.gethostname()]


# ---- failing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Context in which an error in one process ends the others, too, which would wait for it; they print its reason.

    A process that is killed cannot tell them: JAX ends the others after HEARTBEAT_SECONDS without a sign of life.
    """
    try:
        yield
    except BaseException as error:
        exits = isinstance(error, SystemExit)
        reason = error.__context__ or error if exits else error
        if not is_multiprocess() or isinstance(reason, CollectiveError) or (exits and not isinstance(error.code, str)):
            raise
        if exits:
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exception(error)
        _end_all(reason)


def is_device_error(error: BaseException) -> bool:
    """Returns whether computing failed, perhaps because another process ended; calls of programs raise ValueError then."""
    in_dispatch = isinstance(error, ValueError) and re.match(r"[A-Z_]+: .*\b(Gloo|NCCL)\b", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(in_dispatch)


def _end_all(reason):
    """Tells the other processes, and ends this one without waiting for them."""
    if is_device_error(reason) and "RESOURCE_EXHAUSTED" not in str(reason):
        print("error: another process may be gone; JAX names it within a minute, if so", file=sys.stderr, flush=True)
        time.sleep(HEARTBEAT_SECONDS + 15)
    message = json.dumps([*_this_process(), f"{type(reason).__name__}: {faults.first_line(reason)}"])
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed, too
        distributed.global_state.client.key_value_set(_FAILED, message)
    _exit()


def _watch(client, stop):
    """Ends this process when another one has failed."""
    while not stop.wait(_POLL_SECONDS):
        if distributed.global_state.client is not client:
            return
        try:
            index, host, message = json.loads(client.key_value_try_get(_FAILED))
        except jax.errors.JaxRuntimeError:
            continue  # none has failed
        if index != distributed.global_state.process_id:
            print(f"error: process {index} on host {host} failed: {message}", file=sys.stderr)
            _exit()
        return


@contextlib.contextmanager
def sudden_end(act: Callable[[], None]) -> Iterator[None]:
    """Context in which act() is called if this process ends because another one has failed."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


def _exit():
    for act in list(_last_acts):
        with contextlib.suppress(Exception):
            act()
    if distributed.global_state.process_id == 0:
        time.sleep(3 * _POLL_SECONDS)  # this process serves the message to the others
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
