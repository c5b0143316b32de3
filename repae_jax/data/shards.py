"""Numbered records in shards of ArrayRecord, as `repae_jax.data.shard_writer` writes them.

A folder holds:

  manifest.json                what there is; written last: without it, the folder is unfinished
  shard-00000.array_record     the first records, shard-00001.array_record those that follow, ...
  labels.npy                   int32 [N]
  places.npy                   `places.PLACE` [N], where in its shard each record lies
  settings.json                what was to be made, and
  shard-00000.json             what each shard holds: from these an interrupted folder is continued, and a damaged one repaired

The record of an image that cannot be decoded is empty. ArrayRecord keeps a hash with each record, which finds changed bytes
as they are read.

A finished folder may be copied to a bucket and is read there, as gs://bucket/folder: with one request for each record, of just
its bytes, which have a checksum in places.npy. Folders of older versions have no places; they are read from disks only.
"""

import errno
import functools
import hashlib
import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from repae_jax.buckets import is_address
from repae_jax.data import bucket
from repae_jax.data.places import without_headers
from repae_jax.faults import is_of_the_system

MANIFEST, SETTINGS, LABELS, PLACES = "manifest.json", "settings.json", "labels.npy", "places.npy"
_OPEN_SHARDS = 256  # at a time and process, far from the usual limit of 1024 files
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
    if is_address(folder):
        return _damage_in_bucket(f"{folder}/{entry['file']}", entry["bytes"])
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if check_content and file_hash(path) != entry["sha256"]:
        return "another checksum than when it was written"
    return None


def _damage_in_bucket(address, size):
    """Returns what is wrong with a shard's size, by its last byte, or None; of one that is longer, the records tell."""
    try:
        return None if bucket.read(address, size - 1, size) else "missing"
    except bucket.BeyondTheEndError:
        return f"fewer than {size} bytes, or stored compressed (copy it without --gzip-local)"


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
      OSError: if the disk or bucket cannot be read.
    """
    _check_address(path)
    if not is_address(path) and not Path(path).is_dir():
        raise ValueError(f"no {kind.what} at {str(path)!r}: {_make(path, kind)}")
    file = f"{str(path).rstrip('/')}/{MANIFEST}"
    content = _read_file(file)
    if content is None:
        raise ValueError(
            f"{str(path)!r} has no {MANIFEST}: it is no {kind.what}, or an unfinished one; {_make(path, kind)}, again with "
            "the same settings if it is unfinished, which continues where it stopped"
        )
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
        self.labels = self._read_array(LABELS, manifest["labels_sha256"])
        self._places = self._read_places(manifest) if is_address(path) else None
        self.bad_names = dict(manifest["bad_records"])
        self.contents_hash = hashlib.sha256("".join(entry["sha256"] for entry in manifest["shards"]).encode()).hexdigest()[:16]
        self._shard_size = manifest["shard_size"]
        self._start()
        check = functools.partial(shard_damage, self._path, check_content=False)
        with ThreadPoolExecutor(_ASKING) as pool:
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
        return self._from_disk(i) if self._places is None else self._from_bucket(i)

    def _from_disk(self, i):
        shard, place = divmod(i, self._shard_size)
        file = f"{self._path}/{shard_file(shard)}"
        try:
            (content,) = self._open(file).read([place])
        except RuntimeError as error:
            if not is_of_the_system(error):
                raise self.damaged(i, error) from error
            self._open.cache_clear()  # a file that could not be read once gives the same error for ever
            raise OSError(errno.EIO, f"{file} cannot be read: {error}") from error
        return content

    def _from_bucket(self, i):
        address = f"{self._path}/{shard_file(i // self._shard_size)}"
        first, end, checksum = self._places[i].tolist()
        try:
            part = bucket.read(address, first, end)
        except bucket.BeyondTheEndError as error:
            raise self.damaged(i, error) from error
        if part is None:
            raise OSError(errno.EIO, f"{address} is not there any more; {_repair(self._path, self._kind)}")
        content = without_headers(part, first)
        if zlib.crc32(content) != checksum:
            raise self.damaged(i, "another checksum than when it was written")
        return content

    def damaged(self, i, reason):
        """ValueError that says what is wrong with record `i`."""
        shard, place = divmod(i, self._shard_size)
        file = f"{self._path}/{shard_file(shard)}"
        return ValueError(f"record {place} of {file} is damaged ({reason}); {_repair(self._path, self._kind)}")

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return f"{self._path} #{i}" + (f" ({self.bad_names[i]})" if i in self.bad_names else "")

    def _read_array(self, name, expected_hash):
        file = f"{self._path}/{name}"
        content = _read_file(file)
        if content is None:
            raise ValueError(f"{file} is missing; {_repair(self._path, self._kind)}")
        if hashlib.sha256(content).hexdigest() != expected_hash:
            raise ValueError(f"{file} has another checksum than when it was written; {_repair(self._path, self._kind)}")
        return np.load(io.BytesIO(content), allow_pickle=False)

    def _read_places(self, manifest):
        if "places_sha256" not in manifest:
            raise ValueError(
                f"{self._path!r} was written by an older version, which can be read from a disk only: mount the bucket or copy "
                f"the folder to each host and give that folder; or run `{self._kind.command} --out FOLDER` again on the "
                f"original, with the same settings, which adds {PLACES}, and copy that and {MANIFEST} there"
            )
        return self._read_array(PLACES, manifest["places_sha256"])


def _read_file(file):
    """Returns the content of a file or object; None if there is none."""
    if is_address(file):
        return bucket.read(file)
    return Path(file).read_bytes() if Path(file).is_file() else None


def _make(path, kind):
    if is_address(path):
        return f"make one on a disk with `{kind.command} --out FOLDER`, and copy it there"
    return f"make one with `{kind.command} --out {path}`"


def _repair(path, kind):
    again = "again with the same settings, which makes damaged parts anew"
    if is_address(path):
        return f"copy it there once more; if the original is damaged, too, run `{kind.command} --out FOLDER` {again}"
    return f"run `{kind.command} --out {path}` {again}"


def _check_address(path):
    if is_address(path) and not str(path).startswith("gs://"):
        raise ValueError(f"{str(path)!r} cannot be read: allowed are a folder, and gs://BUCKET/FOLDER; copy it to a disk")


def _open_shard(file):
    return ArrayRecordReader(file, "readahead_buffer_size:0,max_parallelism:0")  # for random access
