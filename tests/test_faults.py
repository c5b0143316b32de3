"""Tells apart whose fault an error is: the errors that libraries raise here, made for real where that is cheap."""

import errno
import http.server
import os
import resource
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import tensorflow as tf
import tensorstore
from array_record.python.array_record_module import ArrayRecordReader
from huggingface_hub.errors import HfHubHTTPError

from repae_jax import faults

ARRAY_RECORD = "{}; reading /data/shard-00000.array_record at byte 65536"


def chained(error, cause):
    error.__cause__ = cause
    return error


def named(name, *bases, **attributes):
    return type(name, bases or (Exception,), attributes)(name)


SYSTEM = [
    *(
        OSError(number, "")
        for number in (
            errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.ENOTCONN
        )
    ),
    MemoryError(),
    TimeoutError("no answer"),
    ConnectionResetError("by peer"),
    RuntimeError(ARRAY_RECORD.format("pread() failed: Stale file handle")),
    RuntimeError(ARRAY_RECORD.format("open() failed: Too many open files")),
    tf.errors.UnavailableError(None, None, "the bucket"),
    tf.errors.DeadlineExceededError(None, None, ""),
    tf.errors.ResourceExhaustedError(None, None, ""),
    tf.errors.UnknownError(None, None, "/data/events; Input/output error"),
    ValueError('UNAVAILABLE: Error opening "zarr" driver'),
    ValueError('UNKNOWN: Error opening "zarr" driver: Failed to open: "/data/d/1": Stale file handle [tensorstore_spec='),
    named("ServiceUnavailable", code=503),
    named("TooManyRequests", code=429),
    named("HttpError", code="502"),
    named("HTTPError", OSError, response=SimpleNamespace(status_code=500)),
    named("RefreshError", named("GoogleAuthError").__class__),
    named("Unauthorized", code=401),
    ValueError("UNAUTHENTICATED: Error reading metadata"),
    tf.errors.UnauthenticatedError(None, None, ""),
    OSError("out of memory error when reading image file"),
    named("JaxRuntimeError", RuntimeError),
    chained(Exception("Encountered error while reading array index"), ValueError("RESOURCE_EXHAUSTED: memory")),
    chained(ValueError("cannot be read"), OSError(errno.EIO, "Input/output error")),
    ExceptionGroup("reading", [ValueError("no"), OSError(errno.EIO, "")]),
]
FILES = [
    *(OSError(number, "") for number in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)),
    FileNotFoundError("gs://bucket/a.png"),
    OSError("image file is truncated (3 bytes not processed)"),
    SyntaxError("broken PNG file"),
    ValueError("DATA_LOSS: Error decoding manifest: CRC-32C checksum verification failed"),
    ValueError('UNKNOWN: Failed to open: "/data/manifest.ocdbt": Too many levels of symbolic links'),
    ValueError("/data/UNAVAILABLE: no image"),
    RuntimeError(ARRAY_RECORD.format("open() failed: No such file or directory")),
    RuntimeError("Corrupted Riegeli/records file"),
    tf.errors.NotFoundError(None, None, "/data/a; No such file or directory"),
    tf.errors.DataLossError(None, None, "truncated record"),
    named("NotFound", code=404),
    named("HttpError", code="403"),
    chained(ValueError("cannot be read"), FileNotFoundError(errno.ENOENT, "")),
]


@pytest.mark.parametrize("error", SYSTEM, ids=repr)
def test_of_the_system(error):
    assert faults.is_of_the_system(error)


def test_the_network_of_the_hubs_client_is_known():
    kind = HfHubHTTPError.__bases__[0]  # of the library that this version of the client reaches the network by
    assert not kind.__module__.startswith("huggingface_hub") and faults.is_of_a_client(kind("Connection refused"))


@pytest.mark.parametrize("error", FILES, ids=repr)
def test_of_the_file(error):
    assert not faults.is_of_the_system(error)


REFUSALS = [
    PermissionError(errno.EACCES, ""),
    OSError(errno.EPERM, ""),
    tf.errors.PermissionDeniedError(None, None, "HTTP response code 401"),
    named("Forbidden", code=403),
    ValueError("PERMISSION_DENIED: Error reading gs://bucket/a"),
    chained(Exception("Encountered error while reading array index"), ValueError("PERMISSION_DENIED: a")),
]


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_refusals(error):
    assert faults.is_refusal(error)


@pytest.mark.parametrize("error", [FILES[0], SYSTEM[0], named("NotFound", code=404), ValueError("no image")], ids=repr)
def test_no_refusals(error):
    assert not faults.is_refusal(error)


@pytest.fixture
def no_files_left():
    """A process that may open no file more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    descriptors = []
    try:
        with pytest.raises(OSError):
            while True:
                descriptors.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in descriptors:
            os.close(descriptor)


READERS = {
    "Python": lambda path: Path(path).read_bytes(),
    "ArrayRecord": lambda path: ArrayRecordReader(path).read([0]),
    "TensorFlow": lambda path: tf.io.gfile.GFile(path, "rb").read(),
    "tensorstore": lambda path: tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": os.path.dirname(path)}}
    ).result(),
}


@pytest.fixture
def caught(tmp_path, request):
    """Returns what a reader raises for a file that may be opened no more, and for one that is not there."""
    (tmp_path / "file").write_text("content")
    (tmp_path / ".zarray").write_text("{}")

    def raised(reader, name):
        with pytest.raises(Exception) as caught:
            READERS[reader](f"{tmp_path}/{name}")
        return caught.value

    return raised


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks Linux which files are open")
@pytest.mark.parametrize("reader", READERS)
def test_what_libraries_raise_without_open_files(caught, no_files_left, reader):
    assert errno.EMFILE in faults.errnos(error := caught(reader, "file")) and faults.is_of_the_system(error), error


@pytest.mark.parametrize("reader", READERS)
def test_what_libraries_raise_for_a_missing_file(caught, reader):
    assert not faults.is_of_the_system(error := caught(reader, "missing/file")), error


def test_what_libraries_raise_for_a_server():
    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(int(self.path[1:]))

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for status, expected in {503: True, 429: True, 404: False, 403: False}.items():
            with pytest.raises(requests.HTTPError) as caught:
                requests.get(f"{address}/{status}").raise_for_status()
            assert faults.is_of_the_system(caught.value) == expected
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{address}/{status}")
            assert faults.is_of_the_system(caught.value) == expected
        server.shutdown()
    for read in (requests.get, urllib.request.urlopen):
        with pytest.raises(OSError) as caught:
            read(address)
        assert faults.is_of_the_system(caught.value)


def test_reading_is_tried_again(monkeypatch):
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    errors = [OSError(errno.ESTALE, "Stale file handle"), RuntimeError("pread() failed: Input/output error"), None]

    def read(value):
        error = errors.pop(0)
        if error:
            raise error
        return value

    assert faults.read(read, 7, name="a record".upper) == 7
    errors += [OSError(errno.ESTALE, "Stale file handle")] * 3
    with pytest.raises(OSError, match=r"A RECORD cannot be read, tried 3 times \(.*Stale file handle") as caught:
        faults.read(read, 7, name="a record".upper)
    assert caught.value.errno == errno.ESTALE and faults.is_of_the_system(caught.value)
    errors += [OSError(errno.ESTALE, "Stale file handle")]
    with pytest.raises(OSError, match=r"A RECORD cannot be read \(.*Stale file handle"):
        faults.read(read, 7, name="a record".upper, tries=1)
    assert not errors
    errors += [ValueError("no image")]
    with pytest.raises(ValueError, match="^no image$"):
        faults.read(read, 7, name="a record".upper)
    errors += [MemoryError()] * 3
    with pytest.raises(OSError, match=r"tried 3 times \(MemoryError\)"):
        faults.read(read, 7, name="a record".upper)
