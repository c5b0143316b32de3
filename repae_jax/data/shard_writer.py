"""Writing folders of shards (`repae_jax.data.shards`): by several processes, with the same files after any interruption."""

import abc
import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from grain import MapDataset
from jaxtyping import Bool
from tqdm import tqdm

from repae_jax import data, files
from repae_jax.data import loader, places, reading, shards
from repae_jax.distributed import multihost


class RecordMaker(abc.ABC):
    """Makes records of images in three stages: `read` in worker processes, then `encode` and `pack` in this process."""

    format: shards.ShardFormat
    block_size: int  # images in a block, the unit of `encode`
    record_bytes: int  # approximate size of a record
    missing: object  # replaces the result of `read` for an image that cannot be decoded

    @abc.abstractmethod
    def read(self, fields: dict):
        """Returns the part of a source's record that `encode` needs. It is sent to workers, so it must survive pickling."""

    def encode(self, contents: list) -> Sequence:
        """Returns the encoded images of a block, in order; what exceeds the block's length is ignored."""
        return contents

    def pack(self, name: Callable, encoded: list, good: Bool[np.ndarray, " n"]) -> tuple[Iterable[bytes], dict]:
        """Returns the records of a shard, and additional fields of its entry.

        `name` is a function of an image's number in the shard, `good` tells whether each could be decoded.
        """
        return encoded, {}

    def finish(self, entries: list[dict]) -> tuple[dict, dict[str, bytes]]:
        """Returns additional fields of the manifest, and the content of additional files, from the entries of all shards."""
        return {}, {}


def read_block(source, read: Callable, missing, block: tuple[int, int]) -> tuple[list, list[tuple[int, str]]]:
    """Returns (contents, [(record, error), ...]) of the records first..end-1 of a source, `block` being (first, end).

    The contents are `read` of each record's fields, or `missing` for a record that cannot be decoded.
    """

    def read_one(record):
        fields, error = reading.attempt(source, record)
        return (missing, (record, error)) if error else (read(fields), None)

    contents, failures = zip(*reading.at_once(read_one, range(*block)))
    return list(contents), list(filter(None, failures))


class ShardWriter:
    """Makes the shards of one process in an existing folder: process p makes the shards p, p + process_count, ...

    Args:
      settings: identify the folder's content, besides format, source and shard size.
      shard_size: images in a shard.
      notes: names of settings that may differ when a folder is continued.
      workers: processes that read blocks; 0 reads in threads.
      max_bad_fraction: share of undecodable images above which the work ends.
    """

    def __init__(
        self, folder: Path, source, maker: RecordMaker, settings: dict, *,
        shard_size: int, notes=(), workers=0, max_bad_fraction=0.0, process_index=0, process_count=1,
    ):  # fmt: skip
        self._folder, self._source, self._maker, self._notes = Path(folder), source, maker, notes
        given = {
            "format": maker.format.version, "records": len(source), "records_hash": data.records_hash(source),
            "num_classes": source.num_classes, "image_size": source.image_size, "shard_size": shard_size, **settings,
        }  # fmt: skip
        self._settings = json.loads(json.dumps(given))  # as they are read from the folder: tuples are lists
        self._workers, self._process_index = workers, process_index
        self._max_bad = int(max_bad_fraction * len(source))
        self._ranges = reading.cut(0, len(source), shard_size)
        self._shards = [self._folder / shards.shard_file(shard) for shard, _ in enumerate(self._ranges)]
        self._entries = [file.with_suffix(".json") for file in self._shards]
        self._own_shards = range(process_index, len(self._ranges), process_count)
        self._bad_records = []

    def run(self, stopped: threading.Event) -> int | None:
        """Makes the shards that are missing or damaged, and once those of all processes exist, the manifest.

        Returns the number of shards made here, or None if it was `stopped` before, which gives up the shard in progress.
        ValueError if the folder was made with other settings, or its disk has too little space; RuntimeError if too many images
        cannot be decoded, or from the maker.
        """
        if not self._agree_on_settings(stopped):
            return None
        todo = [shard for shard in self._own_shards if not self._is_whole(shard)]
        self._check_bad()
        self._check_space()
        if not self._make(todo, stopped) or not multihost.wait_for_files(self._entries, stopped.is_set):
            return None
        entries = [files.read_json(file) for file in self._entries]
        self._bad_records = [record for entry in entries for record, _ in entry["bad_records"]]  # from all processes
        self._check_bad("in the log of the process that met it")
        if self._process_index == 0:
            self._finish(entries)
        return len(todo) if multihost.wait_for_files([self._folder / shards.MANIFEST], stopped.is_set) else None

    def _agree_on_settings(self, stopped):
        """Compares the settings with those of the folder, which process 0 writes first; returns False if stopped.

        Also removes temporary files of a killed process.
        """
        file = self._folder / shards.SETTINGS
        leftover = [f".shard-{shard:05d}.*.tmp" for shard in self._own_shards]
        if self._process_index == 0:
            leftover += [".[!s]*.tmp", f".{shards.SETTINGS}.*.tmp"]
        for path in itertools.chain.from_iterable(map(self._folder.glob, leftover)):
            path.unlink(missing_ok=True)
        if self._process_index == 0 and not file.exists():
            files.write_json(file, self._settings)
        if not multihost.wait_for_files([file], stopped.is_set):
            return False
        stored = files.read_json(file)
        if differing := [
            f"\n  {name}: {stored.get(name)!r} there, {self._settings.get(name)!r} here"
            for name in sorted((stored.keys() | self._settings.keys()) - set(self._notes))
            if stored.get(name) != self._settings.get(name)
        ]:
            found = f"{self._folder} holds a {self._maker.format.title} made with other settings"
            raise ValueError(f"{found}; choose another --out, or use the old ones:{''.join(differing)}")
        self._settings = stored  # with the notes of the process that began
        return True

    def _is_whole(self, shard):
        """Returns whether a shard is finished and undamaged, and counts its undecodable records."""
        file = self._entries[shard]
        if not file.exists():
            return False
        try:
            entry = files.read_json(file)
            damage = shards.shard_damage(self._folder, entry, check_content=True)
        except (ValueError, KeyError) as error:
            damage = f"{file.name}: {error}"
        if damage:
            logging.warning("%s is damaged (%s) and made again", self._shards[shard], damage)
            file.unlink()
            return False
        self._bad_records += [record for record, _ in entry["bad_records"]]
        return True

    def _check_space(self):
        missing = [shard for shard, file in enumerate(self._entries) if not file.exists()]  # shards of all processes
        needed = self._maker.record_bytes * self._count(missing)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            more = f"the {self._maker.format.title} needs {needed / 1e9:.1f} GB more"
            disk = f"the disk of {self._folder} has {free / 1e9:.1f} GB free"
            raise ValueError(f"{more}, {disk}: make space, or choose another --out")

    def _count(self, some_shards):
        return sum(end - first for first, end in map(self._ranges.__getitem__, some_shards))

    def _make(self, todo, stopped):
        """Makes shards; returns False if stopped."""
        cuts = {shard: reading.cut(*self._ranges[shard], self._maker.block_size) for shard in todo}
        if not (ranges := [block for cut in cuts.values() for block in cut]):
            return True
        read = functools.partial(read_block, self._source, self._maker.read, self._maker.missing)
        blocks = loader.read_ahead(MapDataset.source(ranges).map(read), self._workers)
        own = self._count(self._own_shards)
        bar = tqdm(total=own, initial=own - self._count(todo), unit="img", desc="encoding", disable=self._process_index != 0)
        with ThreadPoolExecutor(1) as pool, bar, contextlib.closing(blocks):
            writing = pool.submit(lambda: None)  # a shard is written while the next one is encoded
            for shard, cut in cuts.items():
                encoded, bad = [], []
                for first, end in cut:
                    if stopped.is_set():
                        writing.result()  # raises the error of the previous shard
                        return False
                    contents, failures = next(blocks)
                    for record, error in failures:
                        logging.warning("Leaving out undecodable record %s: %s", self._source.name(record), error)
                        self._bad_records.append(record)
                        self._check_bad(error)
                    bad += [record for record, _ in failures]
                    encoded += list(self._maker.encode(contents)[: end - first])
                    bar.update(end - first)
                writing.result()
                writing = pool.submit(self._write_shard, shard, encoded, bad)
            writing.result()
        return True

    def _check_bad(self, last_error="found before this run"):
        if len(self._bad_records) > self._max_bad:
            raise RuntimeError(loader.too_many_bad(self._source, self._bad_records, self._max_bad, last_error))

    def _write_shard(self, shard, encoded, bad):
        first, end = self._ranges[shard]
        good = np.isin(np.arange(first, end), bad, invert=True)
        contents, fields = self._maker.pack(lambda j: self._source.name(first + j), encoded, good)
        bad_names = [[i, self._source.name(i)] for i in bad]
        entry = {"file": self._shards[shard].name, "records": end - first, "bad_records": bad_names, **fields}

        def write_records(temporary):
            writer = ArrayRecordWriter(str(temporary), places.OPTIONS)
            for content, is_good in zip(contents, good):
                writer.write(content if is_good else b"")
            writer.close()
            encoded_places = base64.b64encode(places.find(temporary).tobytes()).decode()
            entry.update(bytes=temporary.stat().st_size, sha256=shards.file_hash(temporary), places=encoded_places)

        writes = {self._shards[shard]: write_records}
        writes[self._entries[shard]] = lambda temporary: temporary.write_text(json.dumps(entry, indent=2) + "\n")
        files.write_all(writes, overwrite=True)

    def _finish(self, entries):
        """Writes labels, places, the maker's files and the manifest, in this order, unless they exist."""
        fields, contents = self._maker.finish(entries)
        labels = _npy(np.asarray(self._source.labels, np.int32))
        all_places = _npy(np.concatenate([self._places(entry) for entry in entries]))
        manifest = self._settings | {
            "bad_records": [bad for entry in entries for bad in entry["bad_records"]],
            "shards": [{name: entry[name] for name in ("file", "records", "bytes", "sha256")} for entry in entries],
            "labels_sha256": hashlib.sha256(labels).hexdigest(),
            "places_sha256": hashlib.sha256(all_places).hexdigest(),
            **fields,
        }
        contents = {shards.LABELS: labels, shards.PLACES: all_places, **contents}
        contents[shards.MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
        contents = {self._folder / name: content for name, content in contents.items()}
        if not all(path.is_file() and path.read_bytes() == content for path, content in contents.items()):
            writes = {path: functools.partial(Path.write_bytes, data=content) for path, content in contents.items()}
            files.write_all(writes, overwrite=True)

    def _places(self, entry):
        """Returns the places of a shard's records; entries of older versions lack them."""
        if "places" not in entry:
            return places.find(self._folder / entry["file"])
        return np.frombuffer(base64.b64decode(entry["places"]), places.PLACE)


def print_outcome(made: int | None, index: int, summary: Callable[[], str]) -> None:
    """Prints the outcome of `ShardWriter.run` in process `index`; the first one adds the summary."""
    if made is None:
        print("asked to stop: what is finished is kept; run the same command to continue")
    elif index == 0:
        print(("" if made else "finished already; every shard is as it was written\n") + summary())


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
