"""Endless batches from a source: shuffled, split over processes, resumable, and tolerant of a few bad files."""

import contextlib
import functools
import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker

import grain
import jax
import numpy as np
from absl import flags, logging

from repae_jax import ranges
from repae_jax.data.reading import at_once, attempt
from repae_jax.distributed import child_process

_READ_THREADS = 4  # in process; each decodes a batch, so this many batches are in memory besides the one in use
_WORKER_THREADS = 1  # in each worker process: one batch is decoded while
_WORKER_BUFFER = 1  # another one waits


class Loader(contextlib.AbstractContextManager, Iterator):
    """Infinite iterator over batches: the stacked fields of the source's records.

    A batch is such as `{'image': uint8 [b, H, W, 3], 'label': int32 [b]}`, b = batch_size / process_count.

    All batches are consecutive cuts of one stream: the source's records shuffled, each exactly once per epoch, with a new order
    every epoch. Batch k holds records `k * batch_size` to `(k + 1) * batch_size - 1` of that stream. So every batch is full, a
    batch may span two epochs, and batch k depends on nothing but the source, the seed, the batch size and k: neither on the
    number of processes or workers, nor on where a run was interrupted. Each process gets a contiguous block of the batch, in
    process order.

    A record that cannot be decoded is replaced by the next decodable one in source order, which keeps all of the above true. It
    is logged once by name and counted; too many of them end the run.
    """

    next_batch: int  # number of the batch that `next` returns next
    wait_seconds: float  # total time for which `next` has waited for batches, because reading ahead could not hide it

    def __init__(
        self, source, *, batch_size: int, seed: int, start_batch: int = 0, workers: int = 0,
        process_index: int = 0, process_count: int = 1, max_bad_fraction: float = 0.01,
    ):  # fmt: skip
        """Prepares the stream; nothing is read before the first `next`.

        Args:
          source: a source as described in `repae_jax.data`; its records may have any fields, the same in all records, each
            an array or a number of one shape and type.
          batch_size: images over all processes, a multiple of `process_count`.
          seed: of the shuffling, 0..2**32-1.
          workers: processes that decode; 0 decodes in threads of this process. Workers are spawned, so the main script needs
            its `if __name__ == '__main__'`, and they hand batches over in shared memory, a few batches each.
          process_index: number of this process' block in every batch.
          max_bad_fraction: largest share of the records that may be undecodable, 0..1; with 0 the first one ends the run.
        """
        ranges.check("len(source)", ranges.whole(1), len(source))
        ranges.check("batch_size", ranges.whole(1), batch_size)
        ranges.check("seed", ranges.SEED, seed)
        ranges.check("start_batch", ranges.whole(0), start_batch)
        ranges.check("workers", ranges.whole(0), workers)
        ranges.check("process_count", ranges.whole(1), process_count)
        ranges.check("process_index", ranges.whole(0, process_count - 1), process_index)
        ranges.check("max_bad_fraction", ranges.real(0, 1), max_bad_fraction)
        if batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the number of processes, {process_count}")
        self.next_batch, self.wait_seconds = int(start_batch), 0.0
        self._source, self._workers, self._iterator = source, workers, None
        self._bad_records, self._max_bad = set(), int(max_bad_fraction * len(source))
        records = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        # The stream has no remainder, but with drop_remainder grain knows its exact length (and a block of 1 is possible).
        blocks = records.batch(batch_size // process_count, drop_remainder=True)
        self._batches = blocks[process_index::process_count].map(functools.partial(_read_batch, source, self._max_bad))

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch; RuntimeError if too many records are undecodable, OSError if they cannot be reached."""
        began = time.perf_counter()
        if self._iterator is None:
            self._iterator = read_ahead(self._batches[self.next_batch :], self._workers)
        try:
            fields, failures = next(self._iterator)
        except BaseException:
            self.close()  # the iterator cannot be continued after an error or an interruption
            raise
        finally:
            self.wait_seconds += time.perf_counter() - began
        self._note_failures(failures)
        self.next_batch += 1
        # Workers hand over shared memory that dies with the array; a copy may outlive the loader.
        copy = np.array if self._workers else np.asarray
        return {name: copy(values) for name, values in fields.items()}

    def __exit__(self, *exception):
        self.close()

    @property
    def bad_records(self) -> int:
        """Number of distinct records that this process has found undecodable."""
        return len(self._bad_records)

    def state(self) -> dict:
        """Returns the argument of `restore`, ready for JSON. The bad records are those that this process has met."""
        return {"next_batch": self.next_batch, "bad_records": sorted(self._bad_records), "records": len(self._source)}

    def restore(self, state: dict) -> None:
        """Continues exactly where the loader of the same source, seed and batch size stopped whose `state()` this is."""
        if set(state) != {"next_batch", "bad_records", "records"}:
            raise ValueError(f"loader state has the fields {sorted(state)}; allowed: bad_records, next_batch and records")
        if state["records"] != len(self._source):
            counts = f"the run was trained on {state['records']} records, this source has {len(self._source)}"
            raise ValueError(f"{counts}: the order would be another one; point it at the same data")
        ranges.check("next_batch", ranges.whole(0), state["next_batch"])
        for record in state["bad_records"]:
            ranges.check("a bad record of the loader state", ranges.whole(0, len(self._source) - 1), record)
        self.close()
        self.next_batch = state["next_batch"]
        self._bad_records = set(state["bad_records"])

    def close(self) -> None:
        """Stops threads and workers. A later `next` starts them again and continues with the same batch."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _note_failures(self, failures):
        for record, error in failures:
            if record not in self._bad_records:
                self._bad_records.add(record)
                logging.warning("Skipping undecodable record %s: %s", self._source.name(record), error)
        if len(self._bad_records) > self._max_bad:
            self.close()
            last_error = failures[-1][1] if failures else "found before this run was resumed"
            raise RuntimeError(too_many_bad(self._source, sorted(self._bad_records), self._max_bad, last_error))


def read_ahead(batches: grain.MapDataset, workers: int) -> Iterator:
    """Returns an iterator that decodes ahead of its caller, in the batches' order; its `close()` stops threads and workers.

    Decoding takes place in `workers` processes, with 0 in threads. Workers' arrays lie in shared memory, freed with them.
    """
    threads = _WORKER_THREADS if workers else _READ_THREADS
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if not workers:
        return iter(batches)
    if not flags.FLAGS.is_parsed():  # grain reads its own flags, which only an absl app parses
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_WORKER_BUFFER)
    return _from_workers(batches.mp_prefetch(options, worker_init_fn=_begin_worker))


def _from_workers(batches):
    """Yields batches of workers that block SIGTERM and Ctrl-C.

    Such a signal goes to all processes of a job, and the one that trains needs batches until it has saved. The workers end when
    that process closes this generator, or ends itself.
    """
    resource_tracker.ensure_running()  # before signals are blocked: it unblocks them when it starts
    iterator = iter(batches)
    try:
        # Workers inherit the blocked signals of the thread that starts them.
        blocked = (signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        with ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=blocked) as starting:
            first = starting.submit(list, itertools.islice(iterator, 1)).result()
        while first:
            yield first.pop()  # a reference here would keep its shared memory beyond the workers' end
        yield from iterator
    finally:
        iterator.close()


def _read_batch(source, max_bad, records):
    """Returns the fields of records of a source, stacked, and `[(record, error), ...]` of the undecodable ones.

    Those are replaced by their next decodable neighbors. The replacement depends on the source alone, never on earlier reads:
    random access, and with it resuming, stays exact.
    """
    examples, failures = zip(*at_once(functools.partial(_read_decodable, source, max_bad), records.tolist()))
    fields = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    if "label" in fields:  # a source may return a Python int
        fields["label"] = fields["label"].astype(np.int32)
    return fields, list(itertools.chain.from_iterable(failures))


def _read_decodable(source, max_bad, i):
    failures = []
    # an unbroken run of too many bad records, or of all records, ends the search
    while len(failures) <= max_bad and len(failures) < len(source):
        record = (i + len(failures)) % len(source)
        fields, error = attempt(source, record)
        if error is None:
            return fields, failures
        failures.append((record, error))
    raise RuntimeError(too_many_bad(source, [record for record, _ in failures], max_bad, failures[-1][1]))


def too_many_bad(source, bad: list[int], max_bad: int, last_error: str) -> str:
    """Returns the message that ends a run because of too many undecodable records."""
    names = ", ".join(source.name(record) for record in bad[:5]) + (", ..." if len(bad) > 5 else "")
    return (
        f"{len(bad)} of {len(source)} records ({len(bad) / len(source):.2%}) cannot be decoded, {max_bad} are allowed: "
        f"{names}. Last error: {last_error}. Repair or remove these files, or raise max_bad_fraction."
    )


def _begin_worker(_index, _count):
    """Confines a new worker to the CPU, as accelerators are the training process', and ends it with its parent."""
    child_process.exit_with_parent()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # grain has imported jax already, too early for the variable
