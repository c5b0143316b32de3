"""Runs in buckets, gs://bucket/run: messages while one does not answer or refuses, and files that grow."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from etils import epath

from repae_jax import faults, waiting

WARN_SECONDS = 30  # between two warnings while waiting
UPLOAD_SECONDS = 60  # least time between two uploads of files that grow
_UPLOAD_SHARE = 0.05  # largest share of the time that goes into uploading them


def is_address(path) -> bool:
    """Returns whether a path is an address such as gs://bucket/run, not a local one."""
    return "://" in str(path)


def check_client(path) -> None:
    """Raises ImportError for a path in a bucket without TensorFlow, by whose client etils reads and writes buckets."""
    if str(path).startswith("gs://") and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(f"{path}: buckets are reached by TensorFlow's client, which is not installed: pip install -e .[gcs]")


def check(path) -> None:
    """Raises OSError if the bucket of a path is not there or may not be listed: TensorFlow's client would ask for ever."""
    if not str(path).startswith("gs://"):
        return
    check_client(path)
    from google.cloud import storage  # takes a second

    with reached(path):
        storage.Client().get_bucket(str(path).removeprefix("gs://").partition("/")[0])


@contextlib.contextmanager
def reached(path) -> Iterator[None]:
    """Context in which something in a bucket is read or written; for local paths it does nothing.

    Clients of buckets try again for up to a quarter of an hour, mostly in silence: the wait is logged. Errors of their own
    types become OSErrors, with advice.
    """
    if not is_address(path):
        yield
        return
    check_client(path)
    _silence_given_up_reads()
    text = "waiting for %s, for %.0f s so far; what does not answer is tried again for some minutes"
    with waiting.reporting(functools.partial(logging.warning, text, path), WARN_SECONDS):
        try:
            yield
        except Exception as error:
            if not faults.is_of_a_client(error):
                raise
            raise OSError(
                f"{path} cannot be reached ({type(error).__name__}: {faults.first_line(error)}): does the bucket exist, has "
                "this machine credentials (a service account, or `gcloud auth application-default login`), and may its account "
                "use the bucket (roles storage.objectUser and storage.legacyBucketReader)?"
            ) from error


@functools.cache
def _silence_given_up_reads():
    """Silences tensorstore's threads, from now on, about reads that nobody waits for since another one has failed."""
    shown = sys.excepthook

    def show(kind, error, trace):
        if kind is not RuntimeError or str(error) != "Event loop is closed":
            shown(kind, error, trace)

    sys.excepthook = show


def scratch(path) -> Path:
    """Returns a local folder for unfinished parts of a result, for an address one in the cache; creates its parent."""
    if is_address(path):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repae_jax" / "unfinished"
        path = cache / str(path).replace("://", "/")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Mirror:
    """Copies in a bucket of local files that grow.

    Objects cannot be appended to, and one takes about one write a second: so all files of the local folder, later ones too, are
    uploaded whole, in the background, at most every UPLOAD_SECONDS and for no more than a twentieth of the time.
    """

    def __init__(self, folder, remote):
        self._folder, self._remote = Path(folder), epath.Path(remote)
        self._uploaded, self._next = {}, time.monotonic() + UPLOAD_SECONDS
        self._pool, self._running = concurrent.futures.ThreadPoolExecutor(1), None

    def fetch(self, pattern):
        """Copies the files in the bucket whose names match to the local folder; OSError if that fails."""
        with reached(self._remote):
            for file in self._remote.glob(pattern):
                file.copy(self._folder / file.name)
                self._uploaded[self._folder / file.name] = _state(self._folder / file.name)

    def update(self):
        """Begins to upload new content, unless it is too early; a failure is logged, and tried again the next time."""
        if self._running and self._running.done():
            if error := self._running.exception():
                logging.warning("not uploaded, tried again later: %s", error)
            self._running = None
        if not self._running and time.monotonic() >= self._next:
            self._running = self._pool.submit(self._upload)

    def flush(self):
        """Uploads new content and waits for it; OSError if that fails."""
        if self._running:
            concurrent.futures.wait([self._running])
            self._running = None
        self._upload()

    def close(self):
        """Uploads new content for the last time."""
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _upload(self):
        began = time.monotonic()
        try:
            with reached(self._remote):
                # in this order what was renamed to NAME.1 is there before the new NAME
                for file in sorted(filter(Path.is_file, self._folder.rglob("*")), reverse=True):
                    if self._uploaded.get(file) != (state := _state(file)):
                        epath.Path(file).copy(self._remote / file.relative_to(self._folder), overwrite=True)
                        self._uploaded[file] = state
        finally:
            took = time.monotonic() - began
            self._next = time.monotonic() + max(UPLOAD_SECONDS, took / _UPLOAD_SHARE)


def _state(file):
    return file.stat().st_size, file.stat().st_mtime_ns
