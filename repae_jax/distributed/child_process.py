"""Calls functions in a child process, which they may take down: compilers abort on bugs of their own."""

import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Crashed(RuntimeError):
    """Raised when the process ended before the function did; the message is the reason that it printed."""

    def __init__(self, message: str, exitcode: int | None):
        super().__init__(message)
        self.exitcode = exitcode  # exit code of the process, or the negative number of the signal that ended it


def run_in_subprocess(function: Callable, *arguments: Any) -> Any:
    """Returns function(*arguments), called in a child process, whose standard error is shown once it has ended.

    Whatever interrupts the wait, such as Ctrl-C, ends the process, too. The function is at module level; its arguments and its
    result can be pickled. Its exceptions are raised here, as RuntimeError if they cannot be pickled; Crashed if it died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        process = context.Process(target=_work, args=(sender, stderr, function, arguments), daemon=True)
        process.start()
        try:
            sender.close()  # so that its end is seen here
            result, error = receiver.recv()
        except EOFError:
            process.join()
            raise Crashed(_crash_reason(stderr, process.exitcode), process.exitcode) from None
        except BaseException:
            process.kill()  # a compiler notices no interrupt before it is done
            raise
        finally:
            process.join()
            sys.stderr.write(stderr.read_text(errors="replace") if stderr.exists() else "")
            receiver.close()
    if error is not None:
        raise error
    return result


def _work(sender, stderr, function, arguments):
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)  # redirects output that is not Python's, too
    exit_with_parent()
    try:
        answer = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        answer = None, _picklable(error)
    sender.send(answer)


def _picklable(error):
    """Returns the error, or a RuntimeError that describes it if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def exit_with_parent() -> None:
    """Ends this child process when its parent is killed: nobody waits for its results then."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _crash_reason(stderr, exitcode):
    """Returns the message of an abort, which precedes its stack; that of a kill, which leaves none; else the last line."""
    lines = [line for line in stderr.read_text(errors="replace").splitlines() if line.strip()] if stderr.exists() else []
    fatal = [match[1] for line in lines if (match := re.match(r"F\d{4} .*?\] (.*)", line))]
    if exitcode == -signal.SIGKILL and not fatal:
        return "killed by SIGKILL, most likely because the memory of this machine ran out"
    return (fatal[:1] or lines[-1:] or [f"exit code {exitcode}, without a word"])[0]
