"""Reading records of a source: a disk or network that fails for a moment says nothing of the image."""

import threading
from concurrent.futures import ThreadPoolExecutor

from repae_jax import faults

_AT_ONCE = 8  # by a thread of a loader; enough for 200 records a second that each take 40 ms to come


def read(source, i):
    """Returns source[i]; errors as of `faults.read`: an OSError that names the record, or the source's, undecodable then."""
    return faults.read(source.__getitem__, i, name=lambda: source.name(i))


def attempt(source, i):
    """Returns (source[i], None), or (None, what is wrong) for a record that is at fault itself.

    Raises:
      OSError: if the system fails, naming the record.
    """
    try:
        return read(source, i), None
    except Exception as error:  # Pillow raises nearly anything: OSError, SyntaxError, ValueError, struct.error
        if faults.is_of_the_system(error):
            raise
        return None, describe_error(error)


def at_once(read_one, records):
    """Returns [read_one(record), ...]; several are read at a time, as each takes its time to come from a bucket or network.

    Raises:
      Exception: one of `read_one`; after it, no other record is begun.
    """
    failed = threading.Event()

    def unless_failed(record):
        if not failed.is_set():
            try:
                return read_one(record)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(unless_failed, records))


def describe_error(error):
    """Returns what is told of an undecodable record."""
    return f"{type(error).__name__}: {error}"
