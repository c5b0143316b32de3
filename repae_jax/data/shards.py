"""Numbered records in shards of ArrayRecord, as `repae_jax.shard_writer` writes them.

A folder holds:

  manifest.json                what there is; written last: without it, the folder is unfinished
  shard-00000.array_record     the first records, shard-00001.array_record those that follow, ...
  labels.npy                   int32 [N]
  settings.json                what was to be made, and
  shard-00000.json             what each shard holds: from these an interrupted folder is continued, and a damaged one repaired

The record of an image that cannot be decoded is empty. ArrayRecord keeps a hash with each record, which finds changed bytes as
they are read.
"""

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

MANIFEST, SETTINGS, LABELS = "manifest.json", "settings.json", "labels.npy"
_OPEN_SHARDS = 256  # at a time and process, far from the usual limit of 1024 files


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
      folder: of the shards.
      entry: {'file', 'bytes', 'sha256', ...}, its entry in the manifest.
      check_content: read it all and compare the checksum, too.

    Returns:
      A few words, or None if nothing is wrong.
    """
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if check_content and file_hash(path) != entry["sha256"]:
        return "another checksum than when it was written"
    return None


def read_manifest(path, kind):
    """The manifest of a finished folder.

    Args:
      path: folder.
      kind: Kind it has to be.

    Returns:
      dict, among others: `records`, their number; `shard_size`, records of all shards but the last; `shards`, [{'file',
      'records', 'bytes', 'sha256'}, ...]; `labels_sha256`; `bad_records`, [[record, name], ...] of undecodable images.

    Raises:
      ValueError: if there is no finished folder, or the manifest is damaged or of another version.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no {kind.what} at {str(path)!r}: make one with `{kind.command} --out {path}`")
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{str(path)!r} has no {MANIFEST}: it is no {kind.what}, or an unfinished one; run `{kind.command} --out {path}`, "
            "again with the same settings, which continues where it stopped"
        )
    try:
        manifest = json.loads(file.read_text())
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
    """

    def __init__(self, path, kind):
        """Reads manifest and labels, and checks that the shards are there and whole.

        Args:
          path: folder.
          kind: Kind it has to be.

        Raises:
          ValueError: if the folder is unfinished, damaged or of another kind.
        """
        self._path, self._kind = str(path), kind
        manifest = read_manifest(path, kind)
        self.labels = self._read_labels(manifest["labels_sha256"])
        self.bad_names = dict(manifest["bad_records"])
        self._shard_size = manifest["shard_size"]
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open_shard)
        damages = {entry["file"]: shard_damage(path, entry, check_content=False) for entry in manifest["shards"]}
        found = [f"{file}: {damage}" for file, damage in damages.items() if damage]
        if found:
            raise ValueError(
                f"{kind.what} {self._path!r} is damaged, {len(found)} of {len(damages)} shards, first {', '.join(found[:5])}; "
                f"{_repair(path, kind)}"
            )

    def __reduce__(self):
        return Shards, (self._path, self._kind)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Bytes of record `i`.

        Raises:
          ValueError: if the image could not be decoded when the record was made, or the record is damaged.
        """
        i = range(len(self))[i]  # IndexError beyond the end
        if i in self.bad_names:
            raise ValueError(f"the image could not be decoded when the {self._kind.what} {self._path!r} was made")
        shard, place = divmod(i, self._shard_size)
        file = Path(self._path) / shard_file(shard)
        try:
            (content,) = self._open(file).read([place])
        except RuntimeError as error:
            raise self.damaged(i, error) from error
        return content

    def damaged(self, i, reason):
        """ValueError that says what is wrong with record `i`."""
        shard, place = divmod(i, self._shard_size)
        file = Path(self._path) / shard_file(shard)
        return ValueError(f"record {place} of {file} is damaged ({reason}); {_repair(self._path, self._kind)}")

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return f"{self._path} #{i}" + (f" ({self.bad_names[i]})" if i in self.bad_names else "")

    def _read_labels(self, expected_hash):
        file = Path(self._path) / LABELS
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error}); {_repair(self._path, self._kind)}") from error
        if hashlib.sha256(content).hexdigest() != expected_hash:
            raise ValueError(f"{file} has another checksum than when it was written; {_repair(self._path, self._kind)}")
        return np.load(io.BytesIO(content), allow_pickle=False)


def _repair(path, kind):
    return f"run `{kind.command} --out {path}` again with the same settings, which makes damaged parts anew"


def _open_shard(file):
    return ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")  # for random access
