"""XLA flags of the tests, and where programs compiled with them are kept."""

import hashlib
import os
import platform
import re
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from repae_jax.distributed import xla_flags

CACHE = Path(__file__).parents[1] / ".cache/xla"
MOST_BYTES = 2**31  # limit of compiled programs that are kept between sessions
WEEK = 7 * 86400  # seconds
# Most of the time goes into compiling. Without most optimizations and with the older code for fusions it takes a third; in one
# part, because the other core has tests of its own, another fifth less.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def folder_for(flags):
    """Returns the folder of programs that this machine compiles with this jaxlib and these flags; it need not exist."""
    info = Path("/proc/cpuinfo")
    features = re.findall(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE)[:1] if info.exists() else []
    machine = [platform.machine(), *features]
    content = "\n".join([*flags, os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", ""), *machine])
    return CACHE / f"jax{version('jax')}-jaxlib{version('jaxlib')}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def accepted(flags):
    """Returns the flags that jaxlib knows: one that it does not know ends the interpreter without an exception.

    Tried in another process, once: that the folder of compiled programs exists means that its flags are known.
    """
    if folder_for(flags).exists():
        return flags
    unknown = xla_flags.unknown(flags)
    if not unknown:
        if reason := xla_flags.complaint(" ".join(flags)):
            raise SystemExit(f"jaxlib {version('jaxlib')} does not start with XLA_FLAGS={' '.join(flags)}: {reason}")
        return flags
    print(f"jaxlib {version('jaxlib')} does not know {' '.join(unknown)}: the tests run without", file=sys.stderr)
    return accepted(tuple(flag for flag in flags if flag not in unknown))


def prune(keep, most_bytes=MOST_BYTES):
    """Removes folders unused for a week, and from `keep` what a killed process left torn and the oldest beyond `most_bytes`."""
    from repae_jax.distributed.private_jax import compilation_cache  # imports JAX, for which the flags are set before

    keep.touch()
    for folder in keep.parent.iterdir():
        if folder.stat().st_mtime < time.time() - WEEK:  # a younger one may be of another version that is tested, too
            shutil.rmtree(folder, ignore_errors=True)
    total = 0
    for path in sorted(keep.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True):
        total += path.stat().st_size
        try:
            compilation_cache.decompress_executable(path.read_bytes())
            torn = False
        except Exception:  # each compression has an error of its own
            torn = True
        if torn or total > most_bytes:
            path.unlink()
