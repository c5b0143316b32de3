"""Compiled programs of a run, kept in its workdir, from where later starts take them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

from repae_jax import buckets
from repae_jax.distributed.private_jax import compilation_cache, distributed


def use_compilation_cache(workdir) -> None:
    """Keeps compiled programs in WORKDIR/compiled, unless the user has named a place; OSError if its bucket may not be used."""
    if jax.config.jax_compilation_cache_dir:
        return
    if buckets.is_address(workdir):  # XLA's own caches know paths only
        buckets.check(workdir)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        folder = f"{workdir}/compiled"
    else:
        folder = str(Path(workdir).expanduser().absolute() / "compiled")
        if distributed.global_state.process_id == 0:
            _remove_torn(Path(folder))
    jax.config.update("jax_compilation_cache_dir", folder)


@contextlib.contextmanager
def reading_programs() -> Iterator[list[str]]:
    """Context that gives a list, which has an entry for every compiled program that was read in the place of compiling it."""
    read: list[str] = []

    def note(event: str, **_):
        if event == "/jax/compilation_cache/cache_hits":
            read.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield read
    finally:
        jax.monitoring.unregister_event_listener(note)


def _remove_torn(folder):
    """Removes programs that a killed process has not written whole: JAX would neither read nor replace them."""
    for path in folder.glob("*-cache"):
        try:
            compilation_cache.decompress_executable(path.read_bytes())
        except (OSError, MemoryError):
            raise
        except Exception as error:  # each compression has an error of its own
            logging.warning("%s is incomplete (%s) and removed", path, error)
            path.unlink()
