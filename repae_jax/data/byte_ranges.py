"""Reading objects of Cloud Storage, or byte ranges of them, through TensorStore.

TensorStore requests no more than the range, and keeps its connections. It finds credentials as Google's libraries do;
TENSORSTORE_GCS_HTTP_URL names another server.
"""

import errno
import functools
import os
import re

import tensorstore

_SECONDS = 10  # for the answer to a byte range, the client's retries included
_SECONDS_WHOLE = 30  # the same for a whole object
# TensorStore's default of 32 retries takes a quarter of an hour
_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}

# Connections on which nothing arrives for so long are dropped. By default, one whose other end has vanished is used again and
# again, for as long as the system keeps it.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


class BeyondTheEndError(ValueError):
    """Raised if an object is shorter than the byte range."""


def read(address: str, first: int | None = None, end: int | None = None) -> bytes | None:
    """Returns the bytes first..end-1 of the object gs://BUCKET/NAME, or all without both; None if there is no such object.

    Raises BeyondTheEndError if it ends before `end`, OSError if the bucket cannot be reached, or reading is not permitted.
    """
    bucket, _, name = address.removeprefix("gs://").partition("/")
    seconds = _SECONDS_WHOLE if first is None else _SECONDS
    future = _store(bucket).read(name, byte_range=slice(first, end))
    try:
        result = future.result(timeout=seconds)
    except TimeoutError as error:
        future.cancel()
        raise _unreadable(address, f"no answer within {seconds} s") from error
    except ValueError as error:  # TensorStore raises no other type
        if str(error).startswith("OUT_OF_RANGE"):
            raise BeyondTheEndError(f"it ends before byte {end}") from error
        status = re.search(r"http_response_code='(\d+)'", str(error))
        reason = str(error).partition(" [")[0]  # TensorStore quotes the whole answer behind it
        raise _unreadable(address, reason + (f", HTTP {status[1]}" if status else "")) from error
    return result.value if result.state == "value" else None


def _unreadable(address, reason):
    advice = "check the address, the network and your permission (`gcloud auth application-default login`)"
    return OSError(errno.EIO, f"{address} cannot be read ({reason}); {advice}")


@functools.cache
def _store(bucket):
    """Returns the bucket's KvStore; no request is made yet."""
    spec = {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": _RETRIES}}
    try:
        return tensorstore.KvStore.open(spec).result()
    except ValueError as error:
        raise ValueError(f"'gs://{bucket}' is no bucket ({error}); check the address") from error
