"""One owner per workdir: found at once on one machine, by signs of life on others, whatever starts at the same time."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from repae_jax import faults
from repae_jax.distributed import multihost
from repae_jax.training import ownership

ROOT = Path(__file__).parents[2]
OWN = """
import sys, time
from etils import epath
from repae_jax.training import ownership
with ownership.owned(epath.Path(sys.argv[1])) as check:
    print("owner", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 50 ms."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(ownership, "_SETTLE_SECONDS", dict.fromkeys((True, False), 0.2))


@pytest.fixture
def another(workdir):
    """A process that owns the workdir."""
    process = subprocess.Popen([sys.executable, "-c", OWN, str(workdir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owner\n"
    yield process
    process.kill()
    process.wait()


def file_of(workdir):
    return Path(workdir) / ownership.FILE


def seconds_of(call):
    began = time.monotonic()
    call()
    return time.monotonic() - began


def own(workdir):
    with ownership.owned(workdir) as check:
        check()


def elsewhere(workdir):
    """Makes the file look as if it were from another machine."""
    file = file_of(workdir)
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": ["other", "boot", "pids"], "host": "other"}))


def test_the_owner_is_named_while_it_is_there(workdir):
    with ownership.owned(workdir) as check:
        about = json.loads(file_of(workdir).read_text())
        assert about["pid"] == os.getpid()
        check()
        message = rf"{workdir}' is in use by the run of process {os.getpid()} on host {about['host']}, since .*another workdir"
        with pytest.raises(ValueError, match=message), ownership.owned(workdir):
            pass
        assert file_of(workdir).exists()
    assert list(workdir.iterdir()) == []
    with pytest.raises(KeyError), ownership.owned(workdir):
        raise KeyError
    assert list(workdir.iterdir()) == []


def test_jobs_are_named(workdir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with ownership.owned(workdir), pytest.raises(ValueError, match="on host .*, SLURM_JOB_ID=4711, since"):
        own(workdir)


@pytest.mark.integration
def test_on_one_machine_a_dead_owner_is_noticed_at_once(workdir, another):
    with pytest.raises(ValueError, match=f"in use by the run of process {another.pid} "):
        own(workdir)
    another.send_signal(signal.SIGSTOP)  # not dead yet
    with pytest.raises(ValueError, match=f"in use by the run of process {another.pid} "):
        own(workdir)
    another.kill()
    time.sleep(0.1)  # and not waited for: a zombie
    assert seconds_of(lambda: own(workdir)) < 2


def test_a_process_with_the_number_of_a_dead_one_is_no_owner(workdir):
    with ownership.owned(workdir):
        left = json.loads(file_of(workdir).read_text())
    file_of(workdir).write_text(json.dumps({**left, "process_start": left["process_start"] - 1}))
    own(workdir)


def test_on_another_machine_by_signs_of_life(workdir, quick, monkeypatch):
    with ownership.owned(workdir) as check:
        elsewhere(workdir)
        with pytest.raises(ValueError, match="in use by the run of process .* on host other"):
            own(workdir)
        check()
        left = file_of(workdir).read_text()
    file_of(workdir).write_text(left)
    assert 0.5 < seconds_of(lambda: own(workdir)) < 1.5


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"{}", b'{"pid": 1}', b"\xff\xfe\0\0"])
def test_a_file_without_content_is_of_no_owner(left, workdir, quick):
    """Being written, or emptied or garbled by a crash of the machine."""
    file_of(workdir).write_bytes(left)
    assert 0.5 < seconds_of(lambda: own(workdir)) < 1.5


def test_an_owner_that_is_writing_its_name_is_named(workdir, quick):
    with ownership.owned(workdir):
        text = file_of(workdir).read_text()
    file_of(workdir).touch()
    writing = threading.Timer(0.2, file_of(workdir).write_text, [text])
    writing.start()
    with pytest.raises(ValueError, match=f"in use by the run of process {os.getpid()} "):
        own(workdir)
    writing.join()


def test_a_disk_that_fails_for_a_moment_takes_no_workdir(workdir, monkeypatch):
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    with ownership.owned(workdir) as check:
        failures, opened = [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "disk")], type(workdir).open
        with monkeypatch.context() as disk:

            def fail(self, *args, **kwargs):
                if failures:
                    raise failures.pop()
                return opened(self, *args, **kwargs)

            disk.setattr(type(workdir), "open", fail)
            check()
        assert not failures


def test_a_run_that_was_taken_for_dead_notices(workdir, quick, monkeypatch):
    """It leaves the other's file alone."""
    with pytest.raises(ownership.WorkdirLost, match="now belongs to the run of process 7 on host other"):  # noqa: SIM117
        with ownership.owned(workdir) as check:
            check()
            about = json.loads(file_of(workdir).read_text())
            file_of(workdir).write_text(json.dumps({**about, "token": "other", "pid": 7, "host": "other"}))
            time.sleep(0.2)
            check()
    assert json.loads(file_of(workdir).read_text())["token"] == "other"


def test_a_file_that_was_removed_is_written_again(workdir, quick):
    with ownership.owned(workdir) as check:
        file_of(workdir).unlink()
        check()
        with pytest.raises(ValueError, match="in use"):
            own(workdir)


@pytest.mark.parametrize("left", [False, True])
def test_of_many_that_start_at_once_one_owns(left, workdir, quick):
    """The workdir is empty, or one of a dead owner."""
    if left:
        with ownership.owned(workdir):
            content = json.loads(file_of(workdir).read_text())
        file_of(workdir).write_text(json.dumps({**content, "process_start": 1}))
    start, end, owners, refused = threading.Barrier(8), threading.Event(), [], []

    def try_it():
        start.wait()
        try:
            with ownership.owned(workdir) as check:
                owners.append(check)
                end.wait(10)
                check()
        except ValueError as error:
            refused.append(str(error))
            if len(refused) == 7:
                end.set()

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(refused) == 7


@pytest.mark.integration
def test_a_process_that_ends_suddenly_is_no_owner(workdir):
    """It ends as if another process of the run had failed."""
    code = OWN.replace("time.sleep(600)", "from repae_jax.distributed import multihost; multihost._exit()")
    done = subprocess.run([sys.executable, "-c", code, str(workdir)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "owner\n" and list(workdir.iterdir()) == []
    assert multihost._last_acts == []


@pytest.mark.integration
def test_in_a_bucket(request, monkeypatch):
    """Nothing can be created exclusively there, and signs of life are new objects."""
    pytest.importorskip("bucket")
    request.getfixturevalue("gs")
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 1)
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 4)
    monkeypatch.setattr(ownership, "_SETTLE_SECONDS", dict.fromkeys((True, False), 0.5))
    workdir = epath.Path("gs://bucket/owned/run")
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / ownership.FILE
    with ownership.owned(workdir) as check:
        left = json.loads(file.read_text())
        with pytest.raises(ValueError, match="in use by the run of process"):
            own(workdir)
        with monkeypatch.context() as there:
            there.setattr(ownership, "_machine", lambda: ["other", "boot", "pids"])
            with pytest.raises(ValueError, match="in use by the run of process"):
                own(workdir)
        file.unlink()
        check()
        assert json.loads(file.read_text())["token"] == left["token"]
    assert not file.exists()
    file.write_text(json.dumps({**left, "machine": ["other", "boot", "pids"]}))
    assert 4 < seconds_of(lambda: own(workdir)) < 20
    with pytest.raises(ownership.WorkdirLost), ownership.owned(workdir) as check:
        file.write_text(json.dumps({**left, "token": "other"}))
        check()
    assert file.exists()
