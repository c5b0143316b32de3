"""A function called in a process of its own, which it may take down: compilers abort where they meet a mistake of their own."""

import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path


class Crashed(RuntimeError):
    """Raised when the process ended before the function did; the message is what it said of the reason.

    Attributes:
      exitcode: of the process; of one that a signal ended, the negative number of that.
    """

    def __init__(self, message, exitcode):
        super().__init__(message)
        self.exitcode = exitcode


def run_in_subprocess(function, *arguments):
    """function(*arguments) in a process of its own, whose standard error is shown once that has ended.

    Whatever interrupts the wait for it, such as Ctrl-C, ends the process, too.

    Args:
      function: of a module; it, what it takes and what it returns can be pickled.
      *arguments: of it.

    Returns:
      What it returns.

    Raises:
      Exception: what it raised, its traceback on standard error; a RuntimeError in place of one that cannot be pickled.
      Crashed: if its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        process = context.Process(target=_work, args=(sender, said, function, arguments), daemon=True)
        process.start()
        try:
            sender.close()  # so that its end is seen here
            result, error = receiver.recv()
        except EOFError:
            process.join()
            raise Crashed(_last_words(said, process.exitcode), process.exitcode) from None
        except BaseException:
            process.kill()  # a compiler hears of no interrupt before it is done
            raise
        finally:
            process.join()
            sys.stderr.write(said.read_text(errors="replace") if said.exists() else "")
            receiver.close()
    if error is not None:
        raise error
    return result


def _work(sender, said, function, arguments):
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)  # what is not Python writes there, too
    end_with_parent()
    try:
        answer = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        answer = None, _portable(error)
    sender.send(answer)


def _portable(error):
    """The error, or a RuntimeError that tells of it if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def end_with_parent():
    """From now on this process, one of multiprocessing's, ends when its parent was killed: nobody waits for its results."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _last_words(said, exitcode):
    """The message of an abort, which stands before its stack; that of a kill, which leaves none; else the last line."""
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()] if said.exists() else []
    fatal = [found[1] for line in lines if (found := re.match(r"F\d{4} .*?\] (.*)", line))]
    if exitcode == -signal.SIGKILL and not fatal:
        return "killed by SIGKILL, most likely because the memory of this machine ran out"
    return (fatal[:1] or lines[-1:] or [f"exit code {exitcode}, without a word"])[0]
