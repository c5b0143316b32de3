"""Reading from Cloud Storage: objects or parts of them, through TensorStore, which asks for no more than that and keeps its
connections. It finds credentials as Google's libraries do; TENSORSTORE_GCS_HTTP_URL leads to another server."""

import errno
import functools
import os
import re

import tensorstore

_SECONDS = 10  # for an answer, tries of the client and all; a file as a whole takes longer
_SECONDS_WHOLE = 30
# TensorStore's own 32 tries take a quarter of an hour
_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}

# A connection on which nothing arrives for so long is given up. Without this, one whose other end has vanished is asked again
# and again, for as long as the system keeps it.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


class BeyondTheEndError(ValueError):
    """An object is shorter than what was asked for."""


def read(address, first=None, end=None):
    """Returns the bytes of an object, all or first..end-1; None if there is no such object.

    Args:
      address: gs://BUCKET/NAME.
      first, end: with neither, all of it is read.

    Raises:
      BeyondTheEndError: if the object ends before `end`.
      ValueError: if Cloud Storage allows no bucket of that name.
      OSError: if the bucket cannot be reached, or nothing may be read there.
    """
    bucket, _, name = address.removeprefix("gs://").partition("/")
    seconds = _SECONDS_WHOLE if first is None else _SECONDS
    future = _store(bucket).read(name, byte_range=slice(first, end))
    try:
        found = future.result(timeout=seconds)
    except TimeoutError as error:
        future.cancel()
        raise _unreadable(address, f"no answer within {seconds} s") from error
    except ValueError as error:  # TensorStore's for everything
        if str(error).startswith("OUT_OF_RANGE"):
            raise BeyondTheEndError(f"it ends before byte {end}") from error
        raise _unreadable(address, _reason(error)) from error
    return found.value if found.state == "value" else None


def _reason(error):
    """Returns TensorStore's message, without what it quotes of the answer but its status."""
    status = re.search(r"http_response_code='(\d+)'", str(error))
    return str(error).partition(" [")[0] + (f", HTTP {status[1]}" if status else "")


def _unreadable(address, reason):
    return OSError(
        errno.EIO,
        f"{address} cannot be read ({reason}); check the address, the network and your permission (`gcloud auth "
        "application-default login`)",
    )


@functools.cache
def _store(bucket):
    """Returns the bucket; nothing is asked yet."""
    spec = {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": _RETRIES}}
    try:
        return tensorstore.KvStore.open(spec).result()
    except ValueError as error:
        raise ValueError(f"'gs://{bucket}' is no bucket ({error}); check the address") from error
