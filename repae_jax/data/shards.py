"""Numbered records in shards of ArrayRecord, as `repae_jax.shard_writer` writes them.

A folder holds:

  manifest.json                what there is; written last: without it, the folder is unfinished
  shard-00000.array_record     the first records, shard-00001.array_record those that follow, ...
  labels.npy                   int32 [N]
  settings.json                what was to be made, and
  shard-00000.json             what each shard holds: from these an interrupted folder is continued, and a damaged one repaired

The record of an image that cannot be decoded is empty. ArrayRecord keeps a hash with each record, which finds changed bytes
as they are read. A finished folder may be copied to a bucket and is read there, as gs://bucket/folder, with a request for each
record.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from repae_jax.faults import is_of_the_system

MANIFEST, SETTINGS, LABELS = "manifest.json", "settings.json", "labels.npy"
_OPEN_SHARDS = 256  # at a time and process, far from the usual limit of 1024 files
_DAMAGED = "Corrupted Riegeli/records file"  # ArrayRecord's words
_ASKING = 16  # threads that ask for the size of a shard: a bucket takes its time


class Kind(NamedTuple):
    """What a folder of shards is for."""

    what: str  # it is called in messages
    command: str  # that makes it
    format: int  # of its manifest


def shard_file(shard):
    """Name of a shard's file."""
    return f"shard-{shard:05d}.array_record"


def file_hash(path):
    """Hash of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_damage(folder, entry, check_content):
    """What is wrong with a shard.

    Args:
      folder: of the shards; an address only without `check_content`.
      entry: {'file', 'bytes', 'sha256', ...}, its entry in the manifest.
      check_content: read it all and compare the checksum, too.

    Returns:
      A few words, or None if nothing is wrong.
    """
    path = epath.Path(folder) / entry["file"]
    if not path.is_file():
        return "missing"
    size = path.stat().length
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if check_content and file_hash(path) != entry["sha256"]:
        return "another checksum than when it was written"
    return None


def read_manifest(path, kind):
    """The manifest of a finished folder.

    Args:
      path: folder, or its address.
      kind: Kind it has to be.

    Returns:
      dict, among others: `records`, their number; `shard_size`, records of all shards but the last; `shards`, [{'file',
      'records', 'bytes', 'sha256'}, ...]; `labels_sha256`; `bad_records`, [[record, name], ...] of undecodable images.

    Raises:
      ValueError: if there is no finished folder, or the manifest is damaged or of another version.
    """
    _check_address(path)
    file = epath.Path(path) / MANIFEST
    with _reaching(path):
        if not epath.Path(path).is_dir():
            raise ValueError(f"no {kind.what} at {str(path)!r}: {_make(path, kind)}")
        if not file.is_file():
            raise ValueError(
                f"{str(path)!r} has no {MANIFEST}: it is no {kind.what}, or an unfinished one; {_make(path, kind)}, again with "
                "the same settings if it is unfinished, which continues where it stopped"
            )
        content = file.read_bytes()
    try:
        manifest = json.loads(content)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {_repair(path, kind)}") from error
    if version != kind.format:
        raise ValueError(
            f"{file} is of format {version!r}, this code reads {kind.format!r}: make the {kind.what} again in another folder"
        )
    return manifest


class Shards:
    """Random access to the records of a finished folder. Worker processes open its files for themselves.

    Attributes:
      labels: int32 `[N]`.
      bad_names: record -> name of each image that could not be decoded.
      contents_hash: of all shards.
    """

    def __init__(self, path, kind):
        """Reads manifest and labels, and checks that the shards are there and whole.

        Args:
          path: folder, or its address.
          kind: Kind it has to be.

        Raises:
          ValueError: if the folder is unfinished, damaged or of another kind.
        """
        self._path, self._kind = str(path).rstrip("/"), kind
        manifest = read_manifest(path, kind)
        self.labels = self._read_labels(manifest["labels_sha256"])
        self.bad_names = dict(manifest["bad_records"])
        self.contents_hash = hashlib.sha256("".join(entry["sha256"] for entry in manifest["shards"]).encode()).hexdigest()[:16]
        self._shard_size = manifest["shard_size"]
        self._start()
        check = functools.partial(shard_damage, path, check_content=False)
        with _reaching(path), ThreadPoolExecutor(_ASKING) as pool:
            damages = {entry["file"]: damage for entry, damage in zip(manifest["shards"], pool.map(check, manifest["shards"]))}
        found = [f"{file}: {damage}" for file, damage in damages.items() if damage]
        if found:
            raise ValueError(
                f"{kind.what} {self._path!r} is damaged, {len(found)} of {len(damages)} shards, first {', '.join(found[:5])}; "
                f"{_repair(path, kind)}"
            )

    def _start(self):
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open_shard)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Bytes of record `i`.

        Raises:
          ValueError: if the image could not be decoded when the record was made, or the record is damaged.
          OSError: if the disk or bucket cannot be read.
        """
        i = range(len(self))[i]  # IndexError beyond the end
        if i in self.bad_names:
            raise ValueError(f"the image could not be decoded when the {self._kind.what} {self._path!r} was made")
        shard, place = divmod(i, self._shard_size)
        file = f"{self._path}/{shard_file(shard)}"
        try:
            (content,) = self._open(file).read([place])
        except RuntimeError as error:
            if not is_of_the_system(error) and (not _is_address(file) or _DAMAGED in str(error)):
                raise self.damaged(i, error) from error
            self._open.cache_clear()  # a file that could not be read once gives the same error for ever
            raise OSError(errno.EIO, f"{file} cannot be read: {error}") from error
        return content

    def damaged(self, i, reason):
        """ValueError that says what is wrong with record `i`."""
        shard, place = divmod(i, self._shard_size)
        file = f"{self._path}/{shard_file(shard)}"
        return ValueError(f"record {place} of {file} is damaged ({reason}); {_repair(self._path, self._kind)}")

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return f"{self._path} #{i}" + (f" ({self.bad_names[i]})" if i in self.bad_names else "")

    def _read_labels(self, expected_hash):
        file = epath.Path(self._path) / LABELS
        try:
            with _reaching(self._path):
                content = file.read_bytes()
        except OSError as error:
            if is_of_the_system(error):
                raise
            raise ValueError(f"{file} cannot be read ({error}); {_repair(self._path, self._kind)}") from error
        if hashlib.sha256(content).hexdigest() != expected_hash:
            raise ValueError(f"{file} has another checksum than when it was written; {_repair(self._path, self._kind)}")
        return np.load(io.BytesIO(content), allow_pickle=False)


def _make(path, kind):
    if _is_address(path):
        return f"make one on a disk with `{kind.command} --out FOLDER`, and copy it there"
    return f"make one with `{kind.command} --out {path}`"


def _repair(path, kind):
    again = "again with the same settings, which makes damaged parts anew"
    if _is_address(path):
        return f"copy it there once more; if the original is damaged, too, run `{kind.command} --out FOLDER` {again}"
    return f"run `{kind.command} --out {path}` {again}"


def _is_address(path):
    return "://" in str(path)


def _check_address(path):
    if _is_address(path) and not str(path).startswith("gs://"):
        raise ValueError(f"{str(path)!r} cannot be read: allowed are a folder, and gs://BUCKET/FOLDER; copy it to a disk")


@contextlib.contextmanager
def _reaching(path):
    """What the library that reaches buckets raises, with types of its own, becomes an OSError."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        if not _is_address(path):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"{path} cannot be reached ({type(error).__name__}: {reason}); check the address and your permission (`gcloud auth "
            "application-default login`)"
        ) from error


def _open_shard(file):
    return ArrayRecordReader(file, "readahead_buffer_size:0,max_parallelism:0")  # for random access
