"""Reading records of a source: a disk or network that fails for a moment does not make an image bad."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from repae_jax import faults

_THREADS = 8  # enough for 200 records a second that each take 40 ms to arrive


def cut(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """Returns the range first..end-1 in parts of `size`: [(first, end), ...]."""
    return [(at, min(at + size, end)) for at in range(first, end, size)]


def read(source, i: int) -> dict:
    """Returns source[i], retried by `faults.read`; OSError, naming the record, if the system goes on failing."""
    return faults.read(source.__getitem__, i, name=lambda: source.name(i))


def attempt(source, i: int) -> tuple[dict | None, str | None]:
    """Returns (source[i], None), or (None, description of the error) for a record that cannot be decoded; OSError as `read`."""
    try:
        return read(source, i), None
    except Exception as error:  # Pillow raises nearly anything: OSError, SyntaxError, ValueError, struct.error
        if faults.is_of_the_system(error):
            raise
        return None, describe_error(error)


def at_once(read_one: Callable, records: Iterable[int]) -> list:
    """Returns [read_one(record), ...]; reads several at a time, as each takes its time to arrive from a bucket or network.

    After an error of `read_one`, which is raised, no other record is begun.
    """
    failed = threading.Event()

    def unless_failed(record):
        if not failed.is_set():
            try:
                return read_one(record)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(unless_failed, records))


def describe_error(error: Exception) -> str:
    """Returns the text that is logged for an undecodable record."""
    return f"{type(error).__name__}: {error}"
