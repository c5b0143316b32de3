"""Writing folders of shards (`repae_jax.data.shards`): by several processes, the same files whatever interrupts it."""

import base64
import functools
import hashlib
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from grain import MapDataset
from tqdm import tqdm

from repae_jax import files
from repae_jax.data import loader, places, reading, shards
from repae_jax.distributed import multihost


class Blocks:
    """Blocks of a source's records, read in order.

    Item k is (contents, [(record, error), ...]) of the records `ranges[k]`, a (first, end): what `read` makes of the fields of
    each record, and `missing` for one that cannot be decoded.
    """

    def __init__(self, source, ranges, read, missing):
        self._source = source
        self._ranges = ranges
        self._read = read
        self._missing = missing

    def __len__(self):
        return len(self._ranges)

    def __getitem__(self, k):
        contents, failures = zip(*reading.at_once(self._one, range(*self._ranges[k])))
        return list(contents), [failure for failure in failures if failure]

    def _one(self, record):
        """Returns (content, None), or of a record that cannot be decoded (missing, (record, error))."""
        fields, wrong = reading.attempt(self._source, record)
        return (self._missing, (record, wrong)) if wrong else (self._read(fields), None)


class ShardWriter:
    """One process' part in making a folder of shards.

    Args:
      folder: which exists.
      source: of the images.
      records: what is made of them, an object with
        `kind`: shards.Kind;
        `block_size`: images at a time;
        `record_bytes`: of a record, about;
        `blocks(source, ranges)`: sequence, read ahead by workers, whose item k is (content, [(record, error), ...]) of the
          records `ranges[k]`, a (first, end);
        `encode(content)`: in this process, a sequence of what is made of each image of a block; may be longer than the block;
        `pack(name, made, good)`: of a shard's images, the records' bytes, and a dict for its entry; `name(j)` names image j of
          the shard, `good`, bool [n], are those that could be decoded;
        `finish(entries)`: of all shards' entries, a dict for the manifest, and the content of other files, name -> bytes.
      settings: dict, the manifest without its results, with `shard_size`.
      notes: names of settings that may differ when a folder is continued.
      workers: processes that read blocks; 0 reads in threads.
      max_bad_fraction: share of undecodable images above which the work ends.
      process_index, process_count: process p makes the shards p, p + process_count, ...
    """

    def __init__(
        self, folder, source, records, settings, *, notes=(), workers=0, max_bad_fraction=0.0, process_index=0, process_count=1
    ):
        self._folder = Path(folder)
        self._source = source
        self._records = records
        self._settings = settings
        self._notes = notes
        self._workers = workers
        self._max_bad = int(max_bad_fraction * len(source))
        self._process_index = process_index
        starts = range(0, len(source), settings["shard_size"])
        self._ranges = [(start, min(start + settings["shard_size"], len(source))) for start in starts]
        self._own_shards = range(process_index, len(starts), process_count)
        self._bad_records = []

    def run(self, stopped):
        """Makes the shards that are missing or damaged, and once those of all processes are there, the manifest.

        Args:
          stopped: Event; once it is set, the shard being made is given up.

        Returns:
          How many shards were made here; None if stopped before the folder was finished.

        Raises:
          ValueError: if the folder holds, or is to hold, what was made with other settings, or has not enough space.
          RuntimeError: if too many images cannot be decoded; whatever `records.pack` raises.
          OSError: if something cannot be written.
        """
        if not self._agree(stopped):
            return None
        todo = [shard for shard in self._own_shards if not self._is_whole(shard)]
        self._check_bad()
        self._check_space()
        if not self._make(todo, stopped):
            return None
        entries = [self._folder / _entry_file(shard) for shard in range(len(self._ranges))]
        if not multihost.wait_for_files(entries, stopped.is_set):
            return None
        entries = [files.read_json(entry) for entry in entries]
        self._bad_records = [record for entry in entries for record, _ in entry["bad_records"]]  # of all processes
        self._check_bad("in the log of the process that met it")
        if self._process_index == 0:
            self._finish(entries)
        return len(todo) if multihost.wait_for_files([self._folder / shards.MANIFEST], stopped.is_set) else None

    def _agree(self, stopped):
        """Process 0 writes the settings if it is the first to come; all compare theirs. Removes what a killed process left."""
        file = self._folder / shards.SETTINGS
        for shard in self._own_shards:
            self._remove(f".shard-{shard:05d}.*.tmp")
        if self._process_index == 0:
            self._remove(".[!s]*.tmp")
            self._remove(f".{shards.SETTINGS}.*.tmp")
            if not file.exists():
                files.write_json(file, self._settings)
        if not multihost.wait_for_files([file], stopped.is_set):
            return False
        stored = files.read_json(file)
        compared = sorted((stored.keys() | self._settings.keys()) - set(self._notes))
        differing = [
            f"\n  {name}: {stored.get(name)!r} there, {self._settings.get(name)!r} here"
            for name in compared
            if stored.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self._folder} holds a {self._records.kind.what} made with other settings; choose another --out, or use "
                "the old ones:" + "".join(differing)
            )
        self._settings = stored  # the notes of whoever began
        return True

    def _remove(self, pattern):
        for left in self._folder.glob(pattern):
            left.unlink(missing_ok=True)

    def _is_whole(self, shard):
        """Whether a shard is finished and undamaged; its undecodable records are noted."""
        file = self._folder / _entry_file(shard)
        if not file.exists():
            return False
        try:
            entry = files.read_json(file)
            damage = shards.shard_damage(self._folder, entry, check_content=True)
        except (ValueError, KeyError) as error:
            damage = f"{file.name}: {error}"
        if damage:
            logging.warning("%s is damaged (%s) and made again", self._folder / shards.shard_file(shard), damage)
            file.unlink()
            return False
        self._bad_records += [record for record, _ in entry["bad_records"]]
        return True

    def _check_space(self):
        """Refuses to begin what the disk cannot hold."""
        missing = [shard for shard in range(len(self._ranges)) if not (self._folder / _entry_file(shard)).exists()]
        needed = self._records.record_bytes * sum(map(self._count, missing))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"the {self._records.kind.what} needs {needed / 1e9:.1f} GB more, the disk of {self._folder} has "
                f"{free / 1e9:.1f} GB free: make space, or choose another --out"
            )

    def _count(self, shard):
        """Records of a shard."""
        first, end = self._ranges[shard]
        return end - first

    def _blocks(self, shard):
        """The records of a shard, cut into blocks: [(first, end), ...]."""
        first, end = self._ranges[shard]
        size = self._records.block_size
        return [(at, min(at + size, end)) for at in range(first, end, size)]

    def _make(self, todo, stopped):
        """Makes shards; False if stopped."""
        if not todo:
            return True
        ranges = [block for shard in todo for block in self._blocks(shard)]
        own, missing = (sum(self._count(shard) for shard in some) for some in (self._own_shards, todo))
        blocks = loader.read_ahead(MapDataset.source(self._records.blocks(self._source, ranges)), self._workers)
        bar = tqdm(total=own, initial=own - missing, unit="img", desc="encoding", disable=self._process_index != 0)
        pool, writing = ThreadPoolExecutor(1), None  # a shard is written while the next one is encoded
        try:
            for shard in todo:
                made, bad = [], []
                for first, end in self._blocks(shard):
                    if stopped.is_set():
                        if writing:
                            writing.result()  # raises what kept the shard before from being written
                        return False
                    content, failures = next(blocks)
                    bad += self._note_failures(failures)
                    made += list(self._records.encode(content)[: end - first])
                    bar.update(end - first)
                if writing:
                    writing.result()
                writing = pool.submit(self._write_shard, shard, made, bad)
            writing.result()
        finally:
            pool.shutdown()
            bar.close()
            blocks.close()
        return True

    def _note_failures(self, failures):
        """Logs undecodable records; returns them."""
        for record, error in failures:
            self._bad_records.append(record)
            logging.warning("Leaving out undecodable record %s: %s", self._source.name(record), error)
            self._check_bad(error)
        return [record for record, _ in failures]

    def _check_bad(self, last_error="found before this run"):
        if len(self._bad_records) > self._max_bad:
            raise RuntimeError(loader.too_many_bad(self._source, self._bad_records, self._max_bad, last_error))

    def _write_shard(self, shard, made, bad):
        """Writes a shard and its entry; the entry comes last."""
        first, end = self._ranges[shard]
        good = np.isin(np.arange(first, end), bad, invert=True)
        contents, fields = self._records.pack(lambda j: self._source.name(first + j), made, good)
        entry = {
            "file": shards.shard_file(shard),
            "records": end - first,
            "bad_records": [[i, self._source.name(i)] for i in bad],
            **fields,
        }

        def write_records(temporary):
            writer = ArrayRecordWriter(str(temporary), places.OPTIONS)
            for content, is_good in zip(contents, good):
                writer.write(content if is_good else b"")
            writer.close()
            found = base64.b64encode(places.find(temporary).tobytes()).decode()
            entry.update(bytes=temporary.stat().st_size, sha256=shards.file_hash(temporary), places=found)

        def write_entry(temporary):
            temporary.write_text(json.dumps(entry, indent=2) + "\n")

        files = {shards.shard_file(shard): write_records, _entry_file(shard): write_entry}
        files.write_all({self._folder / name: write for name, write in files.items()}, overwrite=True)

    def _finish(self, entries):
        """Writes labels, the other files and the manifest, in this order, unless they are there."""
        fields, files = self._records.finish(entries)
        labels = _npy(np.asarray(self._source.labels, np.int32))
        found = _npy(np.concatenate([self._places(entry) for entry in entries]))
        manifest = self._settings | {
            "bad_records": [bad for entry in entries for bad in entry["bad_records"]],
            "shards": [{name: entry[name] for name in ("file", "records", "bytes", "sha256")} for entry in entries],
            "labels_sha256": hashlib.sha256(labels).hexdigest(),
            "places_sha256": hashlib.sha256(found).hexdigest(),
            **fields,
        }
        files = {shards.LABELS: labels, shards.PLACES: found, **files}
        files[shards.MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
        paths = {self._folder / name: content for name, content in files.items()}
        if not all(path.is_file() and path.read_bytes() == content for path, content in paths.items()):
            writes = {path: functools.partial(Path.write_bytes, data=content) for path, content in paths.items()}
            files.write_all(writes, overwrite=True)


    def _places(self, entry):
        """Returns the places of a shard's records; an entry of an older version has none."""
        if "places" not in entry:
            return places.find(self._folder / entry["file"])
        return np.frombuffer(base64.b64decode(entry["places"]), places.PLACE)


def _npy(array):
    """Returns the content of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _entry_file(shard):
    """Name of the file that tells what a shard holds."""
    return shards.shard_file(shard).replace(".array_record", ".json")
