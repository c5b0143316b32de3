"""Roll call of processes started by hand, before JAX connects them.

JAX ends all of a run when one number comes twice, with pages of its own state, or waits for the missing process. So process 0
first listens on the coordinator's port, each process says who it is, and all get one answer.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from typing import Any

_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 5


class RollCallError(ValueError):
    """The processes that came are not those of one run."""


def check_options(options: dict[str, Any], automatic: bool) -> None:
    """Raises ValueError if a process cannot be started with --coordinator, --num_processes and --process_id, in this order.

    Options that are not given are None; `automatic` says that --distributed is given, too.
    """
    missing = [name for name, value in options.items() if value is None]
    coordinator, count, index = options.values()
    if automatic or missing:
        wrong = "--distributed is for processes that find each other" if automatic else f"{' and '.join(missing)} missing"
        raise ValueError(f"{wrong}: give either --distributed, or all of {', '.join(options)}")
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
            # if another process 0 of this run has the port, it learns of this one, and need not wait for the others
            _ask(("localhost", port), _introduction(index, count), timeout=_ANSWER_SECONDS)
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot use this port ({error}); give another one, or where this is a "
                "process of the run that uses it, a --process_id of its own"
            ) from error


def call_roll(coordinator: str, count: int, index: int) -> None:
    """Waits until each of `count` processes has come to HOST:PORT of process 0.

    Raises RollCallError in all that have come if a number comes twice, or with another count, or if a run has begun there.
    """
    host, _, port = coordinator.rpartition(":")
    introduction, server_thread = _introduction(index, count), None
    if index == 0:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
        server_thread = threading.Thread(target=_serve, args=(server, count), daemon=True)
        server_thread.start()
    while not (answer := _ask((host.strip("[]"), int(port)), introduction)):  # process 0 may come later, or again
        time.sleep(_POLL_SECONDS)
    if server_thread:
        server_thread.join()
    try:
        problem = json.loads(answer)["problem"]
    except (ValueError, TypeError, KeyError):
        problem = "a run has begun there already, or something else uses this port"
    if problem:
        raise RollCallError(
            f"--coordinator={coordinator}: {problem}. Give each process of a run a --process_id of its own and the same "
            "--num_processes, and each run a port of its own"
        )


def _introduction(index, count):
    return {"process": index, "of": count, "host": socket.gethostname(), "pid": os.getpid()}


def _ask(address, introduction, timeout=None):
    """Returns the line that an address answers; empty if nobody answers there in time (seconds)."""
    try:
        with socket.create_connection(address, timeout) as connection, connection.makefile("rw", errors="replace") as stream:
            stream.write(json.dumps(introduction) + "\n")
            stream.flush()
            return stream.readline()
    except OSError:
        return ""


def _serve(server, count):
    """Gives one answer to all processes, once all have come, or one that should not have."""
    present, problem = {}, None
    with server, contextlib.ExitStack() as stack:
        while not problem:
            present = {index: caller for index, caller in present.items() if not _has_gone(caller[0])}
            if len(present) == count:
                break
            connection, _ = server.accept()
            stream = stack.enter_context(stack.enter_context(connection).makefile("rw"))
            connection.settimeout(_ANSWER_SECONDS)
            try:
                caller = json.loads(stream.readline())
                index = caller["process"]
                name = f"process {index} of {caller['of']} on host {caller['host']} (pid {caller['pid']})"
            except (OSError, ValueError, TypeError, KeyError):
                continue  # no process of ours
            before = present.get(index)
            if caller["of"] != count:
                problem = f"{name} has come to a run of {count} processes"
            elif before and not _has_gone(before[0]):  # the process may have ended since
                problem = f"{before[2]} and {name} have the same number"
            present[index if not problem else (index, name)] = (connection, stream, name)
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
        connection.settimeout(_ANSWER_SECONDS)
