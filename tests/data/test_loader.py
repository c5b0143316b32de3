"""The loader: its stream of batches, resuming, undecodable records, and worker processes."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from numbered import Numbers, Slow
from PIL import Image

from repae_jax import faults
from repae_jax.data.digits import DigitsSource
from repae_jax.data.folder import FolderSource
from repae_jax.data.loader import Loader

REPOSITORY = Path(__file__).parents[2]


class PlatformSource(Numbers):
    """Labels every record by whether jax is confined to the CPU where the record is read."""

    def __getitem__(self, i):
        return {"image": np.zeros((4, 4, 3), np.uint8), "label": np.int32(jax.config.jax_platforms == "cpu")}


def take(loader, count):
    return list(itertools.islice(loader, count))


def labels(loader, count):
    return np.concatenate([batch["label"] for batch in take(loader, count)])


def assert_batches_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.keys() == e.keys() == {"image", "label"}
        for field in a:
            assert a[field].dtype == e[field].dtype
            np.testing.assert_array_equal(a[field], e[field])


# ----- the stream -----


def test_batches_are_plain_arrays():
    batch = next(Loader(DigitsSource(16), batch_size=6, seed=0))
    assert type(batch["image"]) is type(batch["label"]) is np.ndarray
    assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32


def test_every_epoch_shows_every_record_once_in_a_new_order():
    stream = labels(Loader(Numbers(37), batch_size=5, seed=0), 37).reshape(5, 37)  # five epochs, cut into 37 batches
    for epoch in stream:
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in stream}) == 5
    assert not (stream == np.arange(37)).all(axis=1).any()


def test_images_stay_with_their_labels():
    for batch in take(Loader(Numbers(37), batch_size=5, seed=0), 10):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_a_batch_may_be_larger_than_the_source():
    assert np.bincount(next(Loader(Numbers(3), batch_size=9, seed=0))["label"]).tolist() == [3, 3, 3]


def test_smallest_stream():
    assert labels(Loader(Numbers(1), batch_size=1, seed=0), 3).tolist() == [0, 0, 0]


def test_seed_decides_the_order():
    first, same, other = (labels(Loader(Numbers(37), batch_size=37, seed=seed), 2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    assert (first[37:] != other[:37]).any()  # seed 1 is not seed 0 one epoch later


def test_the_order_is_that_of_earlier_versions():
    """Another order would change runs that are continued by this version."""
    order = labels(Loader(Numbers(10), batch_size=10, seed=3), 2).tolist()
    assert order == [4, 6, 9, 7, 5, 3, 1, 8, 2, 0, 8, 1, 3, 7, 9, 0, 5, 4, 2, 6]


@pytest.mark.parametrize(("processes", "records"), [(1, 37), (2, 37), (4, 37), (8, 3)])
def test_processes_share_the_same_global_batches(processes, records):
    """More processes than records work, too: every process may read every record."""
    whole = take(Loader(Numbers(records), batch_size=8, seed=3), 12)
    parts = [
        take(Loader(Numbers(records), batch_size=8, seed=3, process_index=p, process_count=processes), 12)
        for p in range(processes)
    ]
    joined = [{field: np.concatenate([part[field] for part in step]) for field in step[0]} for step in zip(*parts)]
    assert_batches_equal(joined, whole)


class Measured(Numbers):
    """Records with other fields than images."""

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"broken {i}")
        return {"moments": np.full((2, 2), i, np.float32), "weight": np.float16(i / 2), "failures": i, "label": int(i)}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_records_may_have_any_fields(warnings, workers):
    with (
        Loader(Numbers(10, bad=[4]), batch_size=4, seed=3, max_bad_fraction=0.1) as images,
        Loader(Measured(10, bad=[4]), batch_size=4, seed=3, max_bad_fraction=0.1, workers=workers) as measured,
    ):
        for image, batch in zip(take(images, 6), take(measured, 6)):
            dtypes = {name: (values.dtype, values.shape) for name, values in batch.items()}
            assert dtypes == {
                "moments": (np.float32, (4, 2, 2)),
                "weight": (np.float16, (4,)),
                "failures": (np.int64, (4,)),
                "label": (np.int32, (4,)),
            }
            for values in (batch["label"], batch["failures"], batch["moments"][:, 1, 0], 2 * batch["weight"]):
                np.testing.assert_array_equal(values, image["label"])
        assert images.state() == measured.state()


# ----- resuming -----


@pytest.mark.parametrize("start", [1, 7, 200])
def test_start_batch_equals_skipping(start):
    skipped = take(Loader(Numbers(37), batch_size=8, seed=3), start + 3)[start:]
    assert_batches_equal(take(Loader(Numbers(37), batch_size=8, seed=3, start_batch=start), 3), skipped)


def test_state_continues_exactly_counts_included(warnings):
    source = Numbers(50, bad=[10, 20, 30])
    options = dict(batch_size=8, seed=1, process_index=1, process_count=2, max_bad_fraction=0.1)
    whole = take(Loader(source, **options), 30)
    first = Loader(source, **options)
    begun = take(first, 11)
    state = json.loads(json.dumps(first.state()))
    assert state["next_batch"] == 11 and 0 < len(state["bad_records"]) == first.bad_records
    warnings.clear()
    second = Loader(source, **options)
    second.restore(state)
    assert second.state() == state
    assert_batches_equal(begun + take(second, 19), whole)
    assert second.bad_records == 3
    assert len(warnings) == 3 - len(state["bad_records"])  # records found before are not news


def test_restore_rewinds_a_running_loader():
    loader = Loader(Numbers(37), batch_size=8, seed=3)
    state = loader.state()
    before = take(loader, 4)
    loader.restore(state)
    assert_batches_equal(take(loader, 4), before)


def test_closing_pauses():
    whole = take(Loader(Numbers(37), batch_size=8, seed=3), 4)
    with Loader(Numbers(37), batch_size=8, seed=3) as loader:
        begun = take(loader, 2)
    assert_batches_equal(begun + take(loader, 2), whole)
    loader.close()
    loader.close()


@pytest.mark.parametrize(
    "state, message",
    [
        ({"next_batch": 3}, r"fields \['next_batch'\]; allowed: bad_records, next_batch and records"),
        ({"next_batch": -1, "bad_records": [], "records": 37}, "next_batch=-1 must be at least 0"),
        ({"next_batch": 1, "bad_records": [37], "records": 37}, r"loader state=37 must lie in \[0, 36\]"),
        ({"next_batch": 1, "bad_records": [], "records": 36}, "trained on 36 records, this source has 37"),
    ],
)
def test_restore_errors(state, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(37), batch_size=8, seed=3).restore(state)


@pytest.mark.parametrize("counts", [(1, 2, 4), (4, 1, 2), (2, 4, 1)])
def test_another_number_of_processes_continues_the_stream(warnings, counts):
    """Three epochs and a part, each third by another number of processes: no record is missing, none is there twice."""
    source, options = Numbers(37, bad=[5, 20]), dict(batch_size=8, seed=3, max_bad_fraction=0.1)
    whole = Loader(source, **options)
    expected = take(whole, 15)
    joined, state = [], {"next_batch": 0, "bad_records": [], "records": 37}
    for count in counts:
        loaders = [Loader(source, process_index=p, process_count=count, **options) for p in range(count)]
        for loader in loaders:
            loader.restore(state)
        parts = [take(loader, 5) for loader in loaders]
        joined += [{field: np.concatenate([part[field] for part in step]) for field in step[0]} for step in zip(*parts)]
        states = [loader.state() for loader in loaders]
        assert {each["next_batch"] for each in states} == {len(joined)}
        state = json.loads(json.dumps(states[0]))  # process 0 saves its state
    assert_batches_equal(joined, expected)
    stream = np.concatenate([batch["label"] for batch in joined])[: 3 * 37].reshape(3, 37)
    for epoch in stream:
        assert sorted(epoch) == sorted([*set(range(37)) - {5, 20}, 6, 21])  # neighbors stand in for the two
    assert len({tuple(epoch) for epoch in stream}) == 3


def test_no_batch_is_cut_short_at_the_end_of_an_epoch():
    """37 records, batches of 8: the fifth batch holds the last 5 of one epoch and the first 3 of the next."""
    batches = [batch["label"] for batch in take(Loader(Numbers(37), batch_size=8, seed=3), 10)]
    assert {len(batch) for batch in batches} == {8}
    assert sorted(np.concatenate([*batches[:4], batches[4][:5]])) == list(range(37))
    assert sorted(np.concatenate([batches[4][5:], *batches[5:9], batches[9][:2]])) == list(range(37))


def test_waiting_is_measured():
    with Loader(Slow(8), batch_size=8, seed=0) as loader:
        assert loader.wait_seconds == 0
        next(loader)
        first = loader.wait_seconds
        assert first >= 0.02  # the records of a batch are read at once
        time.sleep(1)  # meanwhile batches are read ahead
        next(loader)
        assert loader.wait_seconds - first < 0.1


# ----- undecodable records -----


def test_a_bad_record_is_replaced_by_its_next_good_neighbor(warnings):
    good = labels(Loader(Numbers(40), batch_size=8, seed=2), 10)
    loader = Loader(Numbers(40, bad=[6, 7, 39]), batch_size=8, seed=2, max_bad_fraction=0.1)
    expected = good.copy()
    expected[np.isin(good, [6, 7])] = 8
    expected[good == 39] = 0
    np.testing.assert_array_equal(labels(loader, 10), expected)
    assert loader.bad_records == 3
    assert sorted(warnings) == [
        f"Skipping undecodable record number-{i}: OSError: broken {i}" for i in (39, 6, 7)
    ]  # once each, though two epochs have passed


def test_bad_files_are_skipped(tmp_path, warnings):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    (tmp_path / "a").mkdir()
    for i in range(20):
        Image.fromarray(noise).save(tmp_path / "a" / f"{i:02}.png")
    whole_file = (tmp_path / "a" / "03.png").read_bytes()
    (tmp_path / "a" / "03.png").write_bytes(whole_file[: len(whole_file) // 2])
    (tmp_path / "a" / "04.png").write_text("this is no image")
    (tmp_path / "a" / "05.png").write_bytes(b"")
    (tmp_path / "a" / "06.png").write_bytes(whole_file[:40] + bytes(200) + whole_file[240:])
    with Loader(FolderSource(tmp_path, 8), batch_size=4, seed=0, max_bad_fraction=0.2) as loader:
        batches = take(loader, 10)
    assert all((batch["image"] == batches[0]["image"][0]).all() for batch in batches)
    assert loader.state()["bad_records"] == [3, 4, 5, 6]
    assert sorted(message.split()[3] for message in warnings) == [f"a/0{i}.png:" for i in (3, 4, 5, 6)]


@pytest.mark.parametrize("fraction, allowed", [(0, 0), (0.01, 0), (0.025, 1), (0.05, 2)])
def test_too_many_bad_records_end_the_run(warnings, fraction, allowed):
    def run(bad):
        with Loader(Numbers(40, bad), batch_size=8, seed=2, max_bad_fraction=fraction) as loader:
            take(loader, 10)

    run([5, 15, 25][:allowed])
    message = rf"{allowed + 1} of 40 records \([\d.]+%\) cannot be decoded, {allowed} are allowed: number-5.*: broken"
    with pytest.raises(RuntimeError, match=message):
        run([5, 15, 25][: allowed + 1])


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_nothing_but_bad_records_end_the_run(fraction, workers):
    with (
        Loader(Numbers(9, range(9)), batch_size=4, seed=2, max_bad_fraction=fraction, workers=workers) as loader,
        pytest.raises(RuntimeError, match="of 9 records .* cannot be decoded"),
    ):
        next(loader)


def test_the_limit_counts_records_of_earlier_runs(warnings):
    loader = Loader(Numbers(40, [5, 15]), batch_size=8, seed=2, max_bad_fraction=0.025)
    loader.restore({"next_batch": 0, "bad_records": [5], "records": 40})
    with pytest.raises(RuntimeError, match=r"2 of 40 records \(5.00%\) .*: number-5, number-15. Last error: OSError"):
        take(loader, 10)
    assert len(warnings) == 1


class Flaky(Numbers):
    """Record 7 cannot be read the first `fails` times, because the system fails."""

    def __init__(self, count, fails, error, bad=()):
        super().__init__(count, bad)
        self.fails, self.error = fails, error

    def __getitem__(self, i):
        if i == 7 and self.fails:
            self.fails -= 1
            raise self.error
        return super().__getitem__(i)


SYSTEM = [
    OSError(errno.ESTALE, "Stale file handle"),
    MemoryError("out of it"),
    RuntimeError("pread() failed: Stale file handle"),
]


@pytest.mark.parametrize("error", SYSTEM)
def test_an_image_is_not_bad_because_the_disk_is(error, warnings, monkeypatch):
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    options = dict(batch_size=8, seed=0, max_bad_fraction=0.1)
    loader = Loader(Flaky(40, 2, error, bad=[8]), **options)
    assert_batches_equal(take(loader, 5), take(Loader(Numbers(40, bad=[8]), **options), 5))
    assert loader.state()["bad_records"] == [8]
    with pytest.raises((OSError, MemoryError)) as caught:
        take(Loader(Flaky(40, 3, error), **options), 5)
    if not isinstance(error, MemoryError):
        assert re.search(r"number-7 cannot be read, tried 3 times \(.*Stale file handle", str(caught.value))


# ----- worker processes -----


@pytest.mark.integration
def test_workers_give_the_same_batches(warnings):
    options = dict(batch_size=8, seed=3, process_index=1, process_count=2, start_batch=5, max_bad_fraction=0.1)
    source = Numbers(40, bad=[6, 7])
    in_process = Loader(source, **options)
    expected = take(in_process, 20)
    with Loader(source, workers=2, **options) as loader:
        batches = take(loader, 9)
        state = loader.state()
    with Loader(source, workers=1, **options) as loader:
        loader.restore(state)
        batches += take(loader, 11)
    assert_batches_equal(batches, expected)
    assert loader.state() == in_process.state()
    assert type(batches[0]["image"]) is np.ndarray and len(warnings) == 4


@pytest.mark.integration
def test_workers_stay_off_accelerators(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # a worker inherits this
    with Loader(PlatformSource(8), batch_size=4, seed=0, workers=1) as loader:
        assert next(loader)["label"].tolist() == [1] * 4


@pytest.mark.integration
def test_workers_serve_a_script_without_an_absl_app(tmp_path):
    script = """
from repae_jax.data.digits import DigitsSource
from repae_jax.data.loader import Loader
if __name__ == "__main__":
    with Loader(DigitsSource(8), batch_size=4, seed=0, workers=1) as loader:
        kept = next(loader)
    print(*kept["label"])
"""
    (tmp_path / "script.py").write_text(script)
    expected = next(Loader(DigitsSource(8), batch_size=4, seed=0))["label"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-m", "script"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(label) for label in expected]
    assert "Exception ignored" not in run.stderr and "leaked" not in run.stderr


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for processes")
def test_workers_end_when_the_process_is_killed(tmp_path):
    script = """
import os
import time
from numbered import Numbers
from repae_jax.data.loader import Loader

class Workers(Numbers):
    def __getitem__(self, i):
        return {"label": os.getpid()}

if __name__ == "__main__":
    with Loader(Workers(8), batch_size=4, seed=0, workers=1) as loader:
        print(next(loader)["label"][0], os.getpid(), flush=True)
        time.sleep(600)
"""
    (tmp_path / "script.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    command = [sys.executable, "-m", "script"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        worker, parent = map(int, process.stdout.readline().split())
        process.kill()
    assert worker != parent == process.pid
    deadline = time.monotonic() + 60
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


ASKED = """
import os, signal, sys, time
from numbered import Slow
from repae_jax.distributed import stopping
from repae_jax.data.loader import Loader

if __name__ == "__main__":
    loader, early = Loader(Slow(40), batch_size=4, seed=0, workers=1), sys.argv[1] == "early"
    with stopping.stop_signal() as stopped:
        if early:
            print("go", flush=True)
        for step in range(400):
            next(loader)
            if step == 2 and not early:
                print("go", flush=True)
            if stopped.is_set() and step > 20:
                break
    print("saved" if stopped.is_set() else "not asked", flush=True)
    if sys.argv[2] == "close":
        loader.close()
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("when", "number", "end"),
    [
        ("late", signal.SIGTERM, "close"),
        pytest.param("late", signal.SIGINT, "exit", marks=pytest.mark.slow),
        pytest.param("early", signal.SIGTERM, "exit", marks=pytest.mark.slow),
    ],
)
def test_workers_go_on_when_all_processes_are_asked_to_stop(tmp_path, when, number, end):
    """They end with the process, even if it does not close the loader."""
    (tmp_path / "script.py").write_text(ASKED)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-m", "script", when, end], cwd=tmp_path, env=env, **options) as process:
        assert process.stdout.readline() == "go\n"
        if when == "early":
            time.sleep(1)  # the worker has begun, and imports
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "saved\n"), errors
    warning = "asked to stop by SIGTERM; if no line says how this has ended, the kill came too soon after the signal"
    assert end == "exit" or errors == f"WARNING:absl:{warning}\n"
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):  # nobody is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


KEPT = """
from numbered import Slow
from repae_jax.data.loader import Loader

if __name__ == "__main__":
    with Loader(Slow(8), batch_size=4, seed=0, workers=1) as loader:
        kept = next(loader)
"""


@pytest.mark.integration
def test_the_first_batch_leaves_no_shared_memory_behind(tmp_path):
    """Arrays own their shared memory: a reference that outlives the workers would leak it."""
    (tmp_path / "script.py").write_text(KEPT)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    ended = subprocess.run([sys.executable, "-m", "script"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "leaked" not in ended.stderr, ended.stderr


# ----- arguments -----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 8, "process_count": 3}, "batch_size 8 must be a multiple of the number of processes, 3"),
        ({"process_count": 2, "process_index": 2}, r"process_index=2 must lie in \[0, 1\]"),
        ({"process_count": 0}, "process_count=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 4294967295\]"),
        ({"seed": 2**32}, "seed=4294967296 must lie in"),
        ({"start_batch": -1}, "start_batch=-1 must be at least 0"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction=1.5 must lie in \[0, 1\]"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(5), **{"batch_size": 4, "seed": 0, **options})


def test_empty_source():
    with pytest.raises(ValueError, match=r"len\(source\)=0 must be at least 1"):
        Loader(Numbers(0), batch_size=4, seed=0)
