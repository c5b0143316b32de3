"""Numbered records in shards of ArrayRecord, as `repae_jax.data.shard_writer` writes them.

A folder holds:

  manifest.json                description of the whole; written last: without it, the folder is unfinished
  shard-00000.array_record     the first records; shard-00001.array_record those that follow, ...
  labels.npy                   int32 [N]
  places.npy                   `places.PLACE` [N], byte range and checksum of each record in its shard
  settings.json                settings of the command that makes the folder, and
  shard-00000.json             content of each shard: with these an interrupted folder is continued, and a damaged one repaired

The record of an image that cannot be decoded is empty. ArrayRecord keeps a hash with each record, by which changed bytes are
found as they are read.

A finished folder may be copied to a bucket and is read there, as gs://bucket/folder: with one request for each record, for just
its byte range, which has a checksum in places.npy. Folders of older versions have no places; they are read from disks only.
"""

import errno
import functools
import hashlib
import io
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repae_jax.buckets import is_address
from repae_jax.data import byte_ranges, places
from repae_jax.data.source import ReopenedByWorkers
from repae_jax.faults import is_of_the_system
from repae_jax.ranges import as_extent

MANIFEST, SETTINGS, LABELS, PLACES = "manifest.json", "settings.json", "labels.npy", "places.npy"
_OPEN_SHARDS = 256  # open files of a process, far from the usual limit of 1024
_CHECKING_THREADS = 16  # requests for the sizes of shards at a time: a bucket takes its time
_CHANGED = "another checksum than when it was written"
_REPAIR = "again with the same settings, which makes damaged parts anew"


class ShardFormat(NamedTuple):
    """Purpose of a folder of shards."""

    title: str  # its name in messages
    command: str  # command that makes it
    version: int  # format number in its manifest

    def making(self, path: str | os.PathLike) -> str:
        """Returns the advice to make a folder at `path`."""
        if is_address(path):
            return f"make one on a disk with `{self.command} --out FOLDER`, and copy it there"
        return f"make one with `{self.command} --out {path}`"

    def repair(self, path: str | os.PathLike) -> str:
        """Returns the advice to repair the folder at `path`."""
        if is_address(path):
            return f"copy it there once more; if the original is damaged, too, run `{self.command} --out FOLDER` {_REPAIR}"
        return f"run `{self.command} --out {path}` {_REPAIR}"


def shard_file(shard: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{shard:05d}.array_record"


def file_hash(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_damage(folder: str | os.PathLike, entry: dict, check_content: bool) -> str | None:
    """Returns a description of a shard's damage, None if it is whole; `entry` is its entry in the manifest.

    With `check_content`, which is for folders on disks, the whole file is read and its checksum compared, too.
    """
    expected = entry["bytes"]
    if is_address(folder):  # the last byte is there; damage of a longer object shows when its records are read
        try:
            return None if byte_ranges.read(f"{folder}/{entry['file']}", expected - 1, expected) else "missing"
        except byte_ranges.BeyondTheEndError:
            return f"fewer than {expected} bytes, or stored compressed (copy it without --gzip-local)"
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != expected:
        return f"{size} bytes instead of {expected}"
    return _CHANGED if check_content and file_hash(path) != entry["sha256"] else None


def read_manifest(path: str | os.PathLike, shard_format: ShardFormat) -> dict:
    """Returns the manifest of the finished folder at a path or address.

    It has `records`, their number; `shard_size`, records of all shards but the last; `shards`, [{'file', 'records', 'bytes',
    'sha256'}, ...]; `labels_sha256`; `bad_records`, [[record, name], ...] of undecodable images; `num_classes`; `image_size`,
    of a square its side, otherwise [height, width]; `records_hash` and `images`, {'source', 'options'}, of the original source;
    and others. ValueError if there is no finished folder, or the manifest is damaged or of another version.
    """
    if is_address(path) and not str(path).startswith("gs://"):
        raise ValueError(f"{str(path)!r} cannot be read: allowed are a folder, and gs://BUCKET/FOLDER; copy it to a disk")
    if not is_address(path) and not Path(path).is_dir():
        raise ValueError(f"no {shard_format.title} at {str(path)!r}: {shard_format.making(path)}")
    file = f"{str(path).rstrip('/')}/{MANIFEST}"
    content = _read_file(file)
    if content is None:
        raise ValueError(
            f"{str(path)!r} has no {MANIFEST}: it is no {shard_format.title}, or an unfinished one; "
            f"{shard_format.making(path)}, again with the same settings if it is unfinished, which continues where it stopped"
        )
    try:
        manifest = json.loads(content)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {shard_format.repair(path)}") from error
    if version != shard_format.version:
        formats = f"{file} is of format {version!r}, this code reads {shard_format.version!r}"
        raise ValueError(f"{formats}: make the {shard_format.title} again in another folder")
    return manifest


class Shards(ReopenedByWorkers):
    """Random access to the records of a finished folder. Worker processes open its files for themselves.

    Its attributes are those of a source; `manifest`, see `read_manifest`; `records_hash`, that of the original source;
    `contents_hash`, of all shards; and `bad_names`, record -> name of each image that could not be decoded.
    """

    def __init__(self, path: str | os.PathLike, shard_format: ShardFormat):
        """Reads manifest and labels; ValueError if the folder is unfinished, of another format, or shards are not whole."""
        self._path, self._format = str(path).rstrip("/"), shard_format
        self._repair = shard_format.repair(self._path)
        self.manifest = read_manifest(path, shard_format)
        self.num_classes, self.image_size = self.manifest["num_classes"], as_extent(self.manifest["image_size"])
        self.records_hash = self.manifest["records_hash"]
        self.labels = self._read_array(LABELS, self.manifest["labels_sha256"])
        self._places = self._read_places() if is_address(path) else None
        self.bad_names = dict(self.manifest["bad_records"])
        entries = self.manifest["shards"]
        self.contents_hash = hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()[:16]
        self._shard_size = self.manifest["shard_size"]
        with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
            damages = list(pool.map(functools.partial(shard_damage, self._path, check_content=False), entries))
        if damaged := [f"{entry['file']}: {damage}" for entry, damage in zip(entries, damages) if damage]:
            count = f"{len(damaged)} of {len(entries)} shards, first {', '.join(damaged[:5])}"
            raise ValueError(f"{shard_format.title} {self._path!r} is damaged, {count}; {self._repair}")

    @functools.cached_property
    def _open(self):
        return functools.lru_cache(_OPEN_SHARDS)(places.open_shard)

    def __len__(self):
        return len(self.labels)

    def content(self, i: int) -> bytes:
        """Returns the content of record `i`; ValueError if it is damaged, or its image could not be decoded at its making."""
        i = range(len(self))[i]  # IndexError beyond the end
        if i in self.bad_names:
            raise ValueError(f"the image could not be decoded when the {self._format.title} {self._path!r} was made")
        return self._from_disk(i) if self._places is None else self._from_bucket(i)

    def _from_disk(self, i):
        file, row = self._locate(i)
        try:
            (content,) = self._open(file).read([row])
        except RuntimeError as error:
            if not is_of_the_system(error):
                raise self.damaged(i, error) from error
            self._open.cache_clear()  # a file that could not be read once gives the same error for ever
            raise OSError(errno.EIO, f"{file} cannot be read: {error}") from error
        return content

    def _from_bucket(self, i):
        address, _ = self._locate(i)
        first, end, checksum = self._places[i].tolist()
        try:
            part = byte_ranges.read(address, first, end)
        except byte_ranges.BeyondTheEndError as error:
            raise self.damaged(i, error) from error
        if part is None:
            raise OSError(errno.EIO, f"{address} is not there any more; {self._repair}")
        content = places.without_headers(part, first)
        if zlib.crc32(content) != checksum:
            raise self.damaged(i, _CHANGED)
        return content

    def _locate(self, i):
        """Returns (path or address of the shard, number of the record in it)."""
        shard, row = divmod(i, self._shard_size)
        return f"{self._path}/{shard_file(shard)}", row

    def damaged(self, i: int, reason: Exception | str) -> ValueError:
        """Returns the error for the damaged record `i`."""
        file, row = self._locate(i)
        return ValueError(f"record {row} of {file} is damaged ({reason}); {self._repair}")

    def name(self, i: int) -> str:
        """Returns the number of record `i`, and the original image's name if that was undecodable."""
        return f"{self._path} #{i}" + (f" ({self.bad_names[i]})" if i in self.bad_names else "")

    def _read_array(self, name, expected_hash):
        file = f"{self._path}/{name}"
        content = _read_file(file)
        if content is None:
            raise ValueError(f"{file} is missing; {self._repair}")
        if hashlib.sha256(content).hexdigest() != expected_hash:
            raise ValueError(f"{file} has {_CHANGED}; {self._repair}")
        return np.load(io.BytesIO(content), allow_pickle=False)

    def _read_places(self):
        if "places_sha256" not in self.manifest:
            raise ValueError(
                f"{self._path!r} was written by an older version, which can be read from a disk only: mount the bucket or copy "
                f"the folder to each host and give that folder; or run `{self._format.command} --out FOLDER` again on the "
                f"original, with the same settings, which adds {PLACES}, and copy that and {MANIFEST} there"
            )
        return self._read_array(PLACES, self.manifest["places_sha256"])


def _read_file(file):
    """Returns the content of a file or object; None if there is none."""
    if is_address(file):
        return byte_ranges.read(file)
    return Path(file).read_bytes() if Path(file).is_file() else None
