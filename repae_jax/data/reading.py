"""Reading records: a disk or network that fails for a moment says nothing of the image."""

import errno
import re
import time
from concurrent.futures import ThreadPoolExecutor

from absl import logging

_PAUSES = (1, 5, 20)  # seconds before a record is read again
_AT_ONCE = 8  # by a thread of a loader; enough for 200 records a second that each take 40 ms to come


def read(source, i):
    """source[i], tried again after some pauses if it is the system that fails.

    Raises:
      OSError: if the system goes on failing, naming the record; MemoryError likewise.
      Exception: any other of the source, at once: the record cannot be decoded.
    """
    for pause in (*_PAUSES, None):
        try:
            return source[i]
        except Exception as error:  # Pillow raises nearly anything: OSError, SyntaxError, ValueError, struct.error
            if not is_of_the_system(error) or (pause is None and isinstance(error, MemoryError)):
                raise
            if pause is None:
                raise OSError(
                    getattr(error, "errno", None) or errno.EIO,
                    f"{source.name(i)} cannot be read, tried {len(_PAUSES) + 1} times ({error}); the image is not at fault: "
                    "once the disk, or whatever holds it, can be read, run the same command again",
                ) from error
            logging.warning("%s cannot be read (%s); trying again in %s s", source.name(i), error, pause)
        time.sleep(pause)


def at_once(read_one, records):
    """[read_one(record), ...], in order; several are read at a time, as each takes its time to come from a bucket or network.

    Raises:
      Exception: the first of `read_one`.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(read_one, records))


def is_of_the_system(error):
    """Whether an error says nothing of a file's content, such as too many open files, or a disk out of reach."""
    if isinstance(error, RuntimeError):  # ArrayRecord's have the call in words: 'pread() failed: Stale file handle'
        return bool(re.match(r"\w+\(\) failed: ", str(error)))
    return isinstance(error, MemoryError) or bool(getattr(error, "errno", None))
