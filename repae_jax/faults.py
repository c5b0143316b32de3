"""Causes of errors in reading: one file, or the system that should have given it.

A file that is missing, forbidden or undecodable is bad, and stays so. A failing disk, network or bucket says nothing about its
files: reading is tried again after a while, and at last ends the work, with nothing moved or left out.

Libraries express such faults in four ways: by errno, by a type, by a status code, and in words alone. All are recognized here,
without importing the libraries.
"""

import errno
import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

T = TypeVar("T")
_PAUSES = (1, 5, 20)  # seconds before something is read again

# These concern one file, and stay when it is read again. All others concern the system.
_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL,
    errno.EILSEQ, errno.EFBIG, errno.EOVERFLOW, errno.ESPIPE,
}  # fmt: skip
_FILE_TYPES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # libraries raise them without errno
_SYSTEM_TYPES = (MemoryError, ConnectionError, TimeoutError, BlockingIOError, InterruptedError)
_SYSTEM_NAMES = {
    "AbortedError", "DeadlineExceededError", "ResourceExhaustedError", "UnavailableError", "UnauthenticatedError",  # TensorFlow
    "GoogleAuthError", "RetryError",  # google.auth, credentials that expire included; google.api_core has codes
    "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError", "ProtocolError", "MaxRetryError",  # requests, urllib3
    "ClientConnectionError", "ClientPayloadError", "HTTPException",  # aiohttp, httpx, http.client
    "JaxRuntimeError", "XlaRuntimeError",  # devices
}  # fmt: skip
_CLIENTS = (  # modules of clients of object stores, their credentials and their networks; httpx and httpx2 hide theirs
    "tensorflow.", "google.", "gcsfs.", "fsspec.", "s3fs.", "botocore.", "aiobotocore.", "aiohttp.", "azure.", "httpx",
    "requests.", "urllib3.", "huggingface_hub.",
)  # fmt: skip
_STATUS_TO_RETRY = {401, 408, 425, 429}  # HTTP statuses, besides 500 and above; 401 concerns credentials, not the file
# first words of tensorstore's messages, and of Pillow's
_CODES_IN_WORDS = re.compile(r"(UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|out of memory)\b")


def is_of_the_system(error: BaseException) -> bool:
    """Returns whether an error says nothing about a file's content, such as too many open files, or a disk out of reach."""
    return any(map(_is_of_the_system, _causes(error)))


def is_refusal(error: BaseException) -> bool:
    """Returns whether an error says that this user may not read something."""
    return any(map(_is_refusal, _causes(error)))


def is_of_a_client(error: BaseException) -> bool:
    """Returns whether an error has a type of a library that reaches buckets or the network, or is TensorStore's."""
    if any(kind.__module__.startswith(_CLIENTS) for kind in type(error).__mro__):
        return True
    return isinstance(error, ValueError) and ("[http_response_code=" in str(error) or "[tensorstore_spec=" in str(error))


def is_out_of_memory(message: str) -> bool:
    """Returns whether a message of JAX says that a program does not fit into the memory of a device."""
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, empty if it has none."""
    return next(iter(str(error).splitlines()), "")


def errnos(error: BaseException) -> set[int]:
    """Returns the errnos of an error and of the errors that caused it, given as numbers or in words."""
    return set().union(*map(_errnos, _causes(error)))


def read(function: Callable[..., T], *arguments: Any, name: Callable[[], str], tries: int | None = None) -> T:
    """Returns function(*arguments), tried again after some pauses while the system fails, at most `tries` times.

    `name` returns the name of what is read, for messages. OSError if the system goes on failing: `is_of_the_system` tells so.
    """
    pauses = _PAUSES[: tries and tries - 1]
    for pause in (*pauses, None):
        try:
            return function(*arguments)
        except Exception as error:  # libraries raise nearly anything
            if not is_of_the_system(error):
                raise
            reason = first_line(error) or type(error).__name__
            if pause is None:
                tried = f", tried {len(pauses) + 1} times" if pauses else ""
                raise OSError(
                    min(errnos(error) - _OF_THE_FILE, default=errno.EIO),
                    f"{name()} cannot be read{tried} ({reason}); once the disk, or whatever holds it, can be read, run the "
                    "same command again; if it is this alone, put back a copy of it",
                ) from error
            logging.warning("%s cannot be read (%s); trying again in %s s", name(), reason, pause)
        time.sleep(pause)


def _causes(error):
    """Yields an error, those it was raised from, and the members of groups of errors."""
    while error is not None:
        yield error
        for part in getattr(error, "exceptions", ()):
            if isinstance(part, BaseException):
                yield from _causes(part)
        error = error.__cause__


def _is_of_the_system(error):
    if isinstance(error, _SYSTEM_TYPES) or _errnos(error) - _OF_THE_FILE:
        return True
    if isinstance(error, _FILE_TYPES) or _errnos(error):
        return False
    if any(kind.__name__ in _SYSTEM_NAMES for kind in type(error).__mro__):
        return True
    status = _status(error)
    return status >= 500 or status in _STATUS_TO_RETRY or bool(_CODES_IN_WORDS.match(_first_words(error)))


def _is_refusal(error):
    return (
        isinstance(error, PermissionError)
        or bool(_errnos(error) & {errno.EACCES, errno.EPERM})
        or type(error).__name__ == "PermissionDeniedError"  # TensorFlow's
        or _status(error) in (401, 403)
        or _first_words(error).startswith("PERMISSION_DENIED")  # tensorstore's
    )


def _errnos(error):
    """Returns the errnos of one error."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number:
        return {number}
    # ArrayRecord: 'pread() failed: Stale file handle; ...', tensorstore and TensorFlow: 'UNKNOWN: ...: Input/output error'
    pattern, numbers = _words()
    return {numbers[words] for words in pattern.findall(_first_words(error))}


def _first_words(error):
    return str(error)[:2000]  # after them tensorstore lists its state


@functools.cache
def _words():
    """Returns (pattern of the texts of errnos in the C library, errno by its text)."""
    numbers = {os.strerror(number): number for number in errno.errorcode}
    longest_first = sorted(numbers, key=len, reverse=True)
    return re.compile("|".join(rf"\b{re.escape(words)}\b" for words in longest_first)), numbers


def _status(error):
    """Returns the HTTP status of an error, 0 if none."""
    response = getattr(error, "response", None)
    for holder, names in ((error, ("code", "status", "status_code")), (response, ("status_code", "status"))):
        for name in names:
            number = getattr(holder, name, None)
            if isinstance(number, int) or (isinstance(number, str) and number.isdecimal()):
                return int(number)
    return 0
