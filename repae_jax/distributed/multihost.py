"""Several processes of one run: how they start, what they must agree on, how they stop and how they fail, all together.

What is exchanged here goes through JAX's coordination service and not over the devices. So it works before these are used, and
while processes still differ. Every process calls the same functions in the same order; with one process, all are trivial.
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
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
from absl import logging
from jax._src import distributed  # neither has all of this under a public name
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 40  # without a sign of life, after which JAX ends all other processes
START_SECONDS = 600  # in which all processes must have come, unless the environment's START_SECONDS says otherwise
WAIT_SECONDS = 3600  # for processes that are alive: one may read a million file names meanwhile
SEEN_SECONDS = 60  # until a new file is seen by all: network file systems keep what they know for a while
PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "tensorstore",
    "grain", "array_record", "pyarrow", "pillow", "simplejpeg", "numba", "numpy", "ml_collections",
)  # fmt: skip
_POLL_SECONDS = 1.0
_ABSENT = "<absent>"
_FAILED, _TOLD = "repae_jax/failed", "repae_jax/told/"
_numbers = itertools.count()
_last_acts = []


class CollectiveError(RuntimeError):
    """Raised in all processes at once: no process needs to be told, and what is being saved can be completed."""


# ---------------------------------------------------------------------------------------------------------------------
# Start.
# ---------------------------------------------------------------------------------------------------------------------


def start(automatic=False, coordinator=None, num_processes=None, process_id=None):
    """Makes this process one of several, unless nothing is given; before anything else of JAX is used.

    Args:
      automatic: the processes find each other, on TPU pods, SLURM, GKE and whatever else jax.distributed knows.
      coordinator, num_processes, process_id: by hand instead: 'HOST:PORT' of process 0, and which one this is.

    Raises:
      ValueError: if what is given cannot work.

    If the processes do not find each other within START_SECONDS, each that has started ends with one line, and exit code 75.
    """
    by_hand = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    given = {name: value for name, value in by_hand.items() if value is not None}
    if not given and not automatic:
        return
    if given:
        _check_by_hand(by_hand, automatic)
    seconds = _start_seconds()
    alone = threading.Timer(seconds, _end_alone, [seconds])
    alone.daemon = True
    alone.start()
    try:
        if given:
            _call_roll(coordinator, num_processes, process_id)
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method="deactivate" if given else None,
            initialization_timeout=2 * seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except _WrongRoll:
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


def _check_by_hand(by_hand, automatic):
    missing = [name for name, value in by_hand.items() if value is None]
    coordinator, count, index = by_hand.values()
    if automatic or missing:
        wrong = "--distributed is for processes that find each other" if automatic else f"{' and '.join(missing)} missing"
        raise ValueError(f"{wrong}: give either --distributed, or all of {', '.join(by_hand)}")
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT of process 0")
    port = int(coordinator.rpartition(":")[2])
    if not 0 < port < 1 << 16:
        raise ValueError(f"--coordinator={coordinator}: ports are 1..65535")
    if not 0 <= index < count:
        raise ValueError(f"--process_id={index}: with --num_processes={count}, allowed are 0..{count - 1}")
    if index == 0:
        try:
            socket.create_server(("", port)).close()  # JAX would crash, perhaps with the other run
        except OSError as error:
            # if that is another process 0 of this run, it hears of this one, and need not wait for the others
            _say(("localhost", port), _called(index, count), timeout=5)
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot use this port ({error}); give another one, or where this is a "
                "process of the run that uses it, a --process_id of its own"
            ) from error


def _start_seconds():
    """Returns the seconds for which processes wait for each other, from the environment."""
    given = os.environ.get("START_SECONDS") or str(START_SECONDS)
    if not re.fullmatch(r"[1-9]\d{0,5}", given):
        raise ValueError(f"START_SECONDS={given}: expected whole seconds, 1..999999")
    return int(given)


class _WrongRoll(ValueError):
    """The processes that came are not those of one run."""


def _call_roll(coordinator, count, index):
    """Waits until each of `count` processes has come, on the coordinator's port before JAX takes it.

    JAX ends all of a run with a process that comes twice, in pages of its own state, or waits for the missing one.

    Raises:
      ValueError: in all that have come, if a number comes twice, or with another count; or if a run has begun there already.
    """
    host, _, port = coordinator.rpartition(":")
    who, calling = _called(index, count), None
    if index == 0:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
        calling = threading.Thread(target=_answer, args=(server, count), daemon=True)
        calling.start()
    while not (answer := _say((host.strip("[]"), int(port)), who)):  # process 0 may come later, or again
        time.sleep(_POLL_SECONDS / 4)
    if calling:
        calling.join()
    try:
        problem = json.loads(answer)["problem"]
    except (ValueError, TypeError, KeyError):
        problem = "a run has begun there already, or something else uses this port"
    if problem:
        raise _WrongRoll(
            f"--coordinator={coordinator}: {problem}. Give each process of a run a --process_id of its own and the same "
            "--num_processes, and each run a port of its own"
        )


def _called(index, count):
    """Returns who a process says it is."""
    return {"process": index, "of": count, "host": socket.gethostname(), "pid": os.getpid()}


def _say(address, what, timeout=None):
    """Returns the first line of the answer to what is said to an address; empty if nobody answers there in time (seconds)."""
    try:
        with socket.create_connection(address, timeout) as connection, connection.makefile("rw", errors="replace") as stream:
            stream.write(json.dumps(what) + "\n")
            stream.flush()
            return stream.readline()
    except OSError:
        return ""


def _answer(server, count):
    """Does process 0's part: gives one answer to all, when all have come or one has come that should not."""
    present, problem = {}, None
    with server, contextlib.ExitStack() as stack:
        while not problem:
            present = {index: each for index, each in present.items() if not _has_gone(each[0])}
            if len(present) == count:
                break
            connection, _ = server.accept()
            stream = stack.enter_context(stack.enter_context(connection).makefile("rw"))
            connection.settimeout(5)
            try:
                who = json.loads(stream.readline())
                index = who["process"]
                place = f"process {index} of {who['of']} on host {who['host']} (pid {who['pid']})"
            except (OSError, ValueError, TypeError, KeyError):
                continue  # nobody of ours
            before = present.get(index)
            if who["of"] != count:
                problem = f"{place} has come to a run of {count} processes"
            elif before and not _has_gone(before[0]):  # it may have ended since
                problem = f"{before[2]} and {place} have the same number"
            present[index if not problem else (index, place)] = (connection, stream, place)
        for _, stream, _ in present.values():
            with contextlib.suppress(OSError):
                stream.write(json.dumps({"problem": problem}) + "\n")
                stream.flush()


def _has_gone(connection):
    """Returns whether the process at the other end has closed a connection, or ended."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _end_alone(seconds):
    """Ends a process that waits for others in vain, as for a host that died; JAX would abort, with pages of its own state."""
    print(
        f"error: the processes did not find each other within {seconds} s: start all of them, with the same coordinator and "
        "number, each with a process_id of its own; where they take longer to come, set START_SECONDS",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(os.EX_TEMPFAIL)


def is_multiprocess():
    """Whether this process is one of several that `start` has connected."""
    return distributed.global_state.num_processes > 1


# ---------------------------------------------------------------------------------------------------------------------
# Agreeing.
# ---------------------------------------------------------------------------------------------------------------------


def gather(value):
    """List of the values of all processes, in their order, in all of them; a value is what JSON can hold."""
    state = distributed.global_state
    if not is_multiprocess():
        return [value]
    number = next(_numbers)
    folder = f"repae_jax/unsharded/{number}/"
    state.client.key_value_set(f"{folder}{state.process_id}", json.dumps(value))
    state.client.wait_at_barrier(folder, WAIT_SECONDS * 1000)
    found = {int(name.rpartition("/")[2]): text for name, text in state.client.key_value_dir_get(folder)}
    state.client.wait_at_barrier(f"{folder}read", WAIT_SECONDS * 1000)
    state.client.key_value_delete(f"{folder}{state.process_id}")
    return [json.loads(found[index]) for index in sorted(found)]


def from_first(value):
    """The value of process 0, in all processes."""
    state = distributed.global_state
    if not is_multiprocess():
        return value
    name = f"repae_jax/from_first/{next(_numbers)}"
    if state.process_id == 0:
        state.client.key_value_set(name, json.dumps(value))
    return json.loads(state.client.blocking_key_value_get(name, WAIT_SECONDS * 1000))


def set_flag(what):
    """Lets processes that ask know, now or later, that this one has done something."""
    distributed.global_state.client.key_value_set(f"{_TOLD}{what}", socket.gethostname(), allow_overwrite=True)


def get_flag(what):
    """Host of the process that has called `set_flag`; None if none has."""
    try:
        return distributed.global_state.client.key_value_try_get(f"{_TOLD}{what}")
    except jax.errors.JaxRuntimeError:
        return None


def assert_same(**description):
    """Checks that all processes were started alike.

    Args:
      **description: nested dicts of what JSON can hold.

    Raises:
      ValueError: in all processes, naming those that differ from process 0, in what, and both values.
    """
    if not is_multiprocess():
        return
    own = _flat(json.loads(json.dumps(description)))
    first, host = from_first([own, socket.gethostname()])
    differing = [
        f"\n  {name}: {first.get(name, _ABSENT)!r} in process 0, {own.get(name, _ABSENT)!r} in process "
        f"{distributed.global_state.process_id}"
        for name in sorted(first.keys() | own.keys())
        if first.get(name, _ABSENT) != own.get(name, _ABSENT)
    ]
    found = [(*who, lines) for *who, lines in gather([*_who(), differing]) if lines]
    if found:
        raise ValueError(
            "; ".join(f"process {index} on host {name}" for index, name, _ in found)
            + f" differs from process 0 on host {host}, but all must be started alike:"
            + "".join(line for *_, lines in found for line in lines)
        )


def assert_same_config(config):
    """Checks that all processes run the same code on the same packages with the same config and number of devices.

    Args:
      config: nested dict of what JSON can hold.

    Raises:
      ValueError: as `assert_same`; or if this is one of several processes, as on a TPU pod, started as if it were alone.
    """
    number = distributed.global_state.num_processes
    # before the devices are looked at: that fails with others
    assert_same(num_processes=number, packages=versions(), code=_sources(), config=config)
    if jax.process_count() > 1 and not is_multiprocess():
        raise ValueError(f"this is one of {jax.process_count()} processes: start all of them with --distributed")
    local = jax.local_devices()
    assert_same(devices=f"{len(local)} x {local[0].device_kind}")


def check_shared(folder):
    """Checks that all processes see one and the same folder.

    Args:
      folder: epath.Path of a folder that exists.

    Raises:
      ValueError: in all processes, naming those that do not see what process 0 wrote.
    """
    if not is_multiprocess():
        return
    name = folder / f".shared-{from_first(secrets.token_hex(8))}"
    if distributed.global_state.process_id == 0:
        name.write_text("seen")
    gather(None)
    found = gather([*_who(), str(folder), is_seen(name)])
    if distributed.global_state.process_id == 0:
        name.unlink()
    blind = [f"process {index} on host {host}, in {where}" for index, host, where, sees in found if not sees]
    if blind:
        raise ValueError(
            f"what process 0 wrote to {found[0][2]} is not seen by {'; '.join(blind)}: give a folder on a disk that all "
            "hosts share, or for a workdir an address such as gs://bucket/run"
        )


def is_seen(path):
    """Whether what another process has written is there, after the time that network file systems take to show it."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return seen


def wait_for_files(paths, is_done=lambda: False):
    """Waits until files of other processes are there: True; or until is_done(): False.

    Works between processes that are not connected, too, and unlike collective operations it may take hours.

    Args:
      paths: Path or epath.Path of each.
      is_done: function that says whether they are needed no more.
    """
    missing, told = [path for path in paths if not path.exists()], time.monotonic()
    while missing and not is_done():
        if time.monotonic() - told > SEEN_SECONDS:
            logging.warning(
                "waiting for %d files of the other processes, first %s; all must see one file system", len(missing), missing[0]
            )
            told = time.monotonic()
        time.sleep(_POLL_SECONDS)
        missing = [path for path in missing if not path.exists()]
    return not missing


def versions():
    """Versions of Python and the packages that computing, reading and saving depend on; None for what is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _sources():
    """Hash of every file of our own code, by name."""
    here = Path(__file__).parents[1]
    folders = (here, here.parent / "checkpoints_tools")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return {str(path.relative_to(here.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in files}


def _flat(description):
    """Nested dicts as one with dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(description, is_leaf=lambda node: not isinstance(node, dict) or not node)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _who():
    return [distributed.global_state.process_id, socket.gethostname()]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping.
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signal():
    """Yields an event that SIGTERM and the first Ctrl-C set, at once and with a line in the log, also while XLA compiles.

    The handlers before are restored afterwards.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _):
        event.set()
        signal.signal(number, before[number])  # a second one acts at once

    def set_flag():  # handlers run between two lines of Python, of which there may be none for an hour
        while received := caught.recv(1):
            if received[0] in before:
                event.set()
                logging.warning(
                    "asked to stop by %s; if no line says how this has ended, the kill came too soon after the signal",
                    signal.Signals(received[0]).name,
                )
                return

    caught, sent = socket.socketpair()
    sent.setblocking(False)
    telling = threading.Thread(target=set_flag, daemon=True)
    telling.start()
    for number in before:
        signal.signal(number, stop)
    wakeup_before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    try:
        yield event
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        sent.close()
        telling.join()
        caught.close()


@contextlib.contextmanager
def stop_requests():
    """Function that says whether to stop: from some call on, the same one in all processes, once any got SIGTERM or Ctrl-C.

    All processes call it equally often, at least once per step. With several, JAX's preemption service catches SIGTERM, from
    `start` on, and finds the next call that none has made.
    """
    if not is_multiprocess():
        with stop_signal() as event:
            yield event.is_set
        return
    numbers, stopped = itertools.count(1), []

    def ask():
        if not stopped and multihost_utils.reached_preemption_sync_point(next(numbers)):
            stopped.append(True)
        return bool(stopped)

    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# Failing.
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def abort_all_on_error():
    """A process of several that fails in here ends the others, too, which would wait for it; they tell why.

    One that is killed cannot: JAX ends the others when it has given no sign of life for HEARTBEAT_SECONDS.
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


def is_of_the_devices(error):
    """Returns whether computing failed, perhaps as another process has ended, of which calls of programs raise ValueError."""
    in_dispatch = isinstance(error, ValueError) and re.match(r"[A-Z_]+: .*\b(Gloo|NCCL)\b", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(in_dispatch)


def _end_all(reason):
    """Tells the other processes, and ends this one without waiting for them."""
    if is_of_the_devices(reason) and "RESOURCE_EXHAUSTED" not in str(reason):
        print("error: another process may be gone; JAX names it within a minute, if so", file=sys.stderr, flush=True)
        time.sleep(HEARTBEAT_SECONDS + 15)
    message = json.dumps([*_who(), f"{type(reason).__name__}: {_first_line(reason)}"])
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
def sudden_end(act):
    """Calls act(), too, if this process ends in here because another one has failed."""
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
        time.sleep(3 * _POLL_SECONDS)  # the others hear what happened from it
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def _first_line(error):
    return (str(error).splitlines() or [""])[0]
