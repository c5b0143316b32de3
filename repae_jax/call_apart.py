"""A function called in a process of its own, which it may take down: compilers abort where they meet a mistake of their own."""

import multiprocessing
import os
import re
import sys
import tempfile
import threading
from pathlib import Path


class Crashed(RuntimeError):
    """Raised when the process ended before the function returned; the message is what it said of the reason."""


def call_apart(function, *arguments):
    """function(*arguments) in a process of its own, whose standard error is shown once that has ended.

    Args:
      function: of a module; it, what it takes and what it returns can be pickled.
      *arguments: of it.

    Returns:
      What it returns.

    Raises:
      Crashed: if it raised, or if its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        process = context.Process(target=_work, args=(sender, said, function, arguments), daemon=True)
        process.start()
        sender.close()  # so that its end is seen here
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            raise Crashed(_last_words(said, process.exitcode)) from None
        finally:
            process.join()
            sys.stderr.write(said.read_text(errors="replace") if said.exists() else "")
            receiver.close()


def _work(sender, said, function, arguments):
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)  # what is not Python writes there, too
    end_with_parent()
    sender.send(function(*arguments))


def end_with_parent():
    """From now on this process, one of multiprocessing's, ends when its parent was killed: nobody waits for its results."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _last_words(said, exitcode):
    """The message of an abort, which stands before its stack; else the last line, as of Python's tracebacks."""
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()] if said.exists() else []
    fatal = [found[1] for line in lines if (found := re.match(r"F\d{4} .*?\] (.*)", line))]
    return (fatal[:1] or lines[-1:] or [f"exit code {exitcode}, without a word; the machine may be out of memory"])[0]
