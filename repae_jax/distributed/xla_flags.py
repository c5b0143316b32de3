"""XLA_FLAGS that the installed jaxlib refuses: it would end the interpreter, without an exception."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version

# Makes jaxlib read the flags, which takes a third of a second; without a core file if it aborts.
_READ = (
    "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); from jaxlib import xla_client; "
    "xla_client.CompileOptions().executable_build_options.debug_options"
)


@functools.cache
def complaint(flags: str) -> str | None:
    """Returns the line in which jaxlib refuses a value of XLA_FLAGS, as read by another process; None if it takes the value."""
    environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "0"}  # the latter hides why a value is refused
    process = subprocess.run([sys.executable, "-c", _READ], env=environment, capture_output=True, text=True)
    if process.returncode == 0:
        return None
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    logged = [line.partition("] ")[2] for line in lines if re.match(r"[EF]\d{4} ", line)]
    return (logged or lines[-1:])[0]


def unknown(flags: Sequence[str]) -> list[str]:
    """Returns those of the flags, such as `--xla_a=1`, that jaxlib does not know."""
    _, _, listed = (complaint(" ".join(flags)) or "").partition(" in XLA_FLAGS: ")
    return [flag for flag in flags if flag in listed.split()]


def check() -> None:
    """Raises ValueError if jaxlib would refuse XLA_FLAGS as the environment has it."""
    flags = os.environ.get("XLA_FLAGS")
    if flags and (reason := complaint(flags)):
        raise ValueError(f"XLA_FLAGS={flags} is refused by jaxlib {version('jaxlib')}: {reason}; correct it, or leave it out")
