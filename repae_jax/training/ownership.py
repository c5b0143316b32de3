"""A workdir has one owner: the run that writes there, with all of its processes.

Process 0 names its run in `WORKDIR/owner.json` before anything else is written, renews the file as a sign of life, and removes
it at the end. Otherwise two runs would mix their checkpoints, or two copies of one run remove each other's.

A run that was killed leaves its file. The next run tells a dead owner from a live one: on the same machine at once, by the
process' number and the time of its start; on another one by watching for signs of life, since clocks may differ. A run that
was wrongly taken for dead notices before it saves. So at most one run goes on saving.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging
from etils import epath

from repae_jax import buckets, faults
from repae_jax.distributed import multihost

FILE = "owner.json"
BEAT_SECONDS = 10  # between signs of life
WATCH_SECONDS = 45  # an owner on another machine is dead after so long without a sign of life
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = {True: 0.25, False: 2.0}  # by whether it is on a disk: until others that write at the same time are done
_FIELDS = {"host", "machine", "pid", "process_start", "job", "since", "token"}
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOBSET_NAME", "TPU_NAME")


class WorkdirLost(multihost.CollectiveError):
    """Another run has taken the workdir: raised in all processes at once."""


@contextlib.contextmanager
def owned(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """Makes this run the owner of a workdir, a folder that exists, while the context lasts; all processes of the run call it.

    Yields a function that all call before they save; it raises WorkdirLost if another run has become the owner. ValueError in
    all processes, which names the owner, if another run is it and gives signs of life.
    """
    owner, refusal = None, None
    if jax.process_index() == 0:
        owner = _Owner(workdir / FILE)
        refusal = owner.acquire()
    if refusal := multihost.broadcast_from_process_0(refusal):
        raise ValueError(f"workdir {str(workdir)!r} is in use by {refusal}; let it end, stop it, or use another workdir")

    def check():
        if other := multihost.broadcast_from_process_0(owner and owner.other()):
            raise WorkdirLost(f"workdir {str(workdir)!r} now belongs to {other}: this run ends, and saves nothing more")

    with contextlib.ExitStack() as stack:
        if owner:
            stack.callback(owner.release)
            stack.enter_context(multihost.sudden_end(owner.release))
        yield check


class _Owner:
    """Claims a workdir for this run by a file, and renews it."""

    def __init__(self, path: epath.Path):
        self._path, self._is_on_disk, self._token = path, not buckets.is_address(path), secrets.token_hex(8)
        self._about = {
            "host": socket.gethostname(), "machine": _machine(),
            "pid": os.getpid(), "process_start": _process_start(os.getpid()),
            "job": {name: os.environ[name] for name in _JOBS if name in os.environ},
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "token": self._token,
        }  # fmt: skip
        self._beats, self._ended = 0, threading.Event()
        self._beating = threading.Thread(target=self._beat, name="owner of the workdir", daemon=True)

    def acquire(self) -> str | None:
        """Becomes the owner and returns None, or describes who is."""
        is_new = self._create()
        if not is_new:
            sign = self._sign()
            if sign and self._is_alive(sign):
                return _describe(self._sign() or sign)  # by now the name may be written
            logging.warning("%s: %s is not there any more; this run takes its place", self._path, _describe(sign))
            self._write()
        if not (is_new and self._is_on_disk):  # on a disk only one can create it
            time.sleep(_SETTLE_SECONDS[self._is_on_disk])
            if other := self.other():
                return other
        self._beating.start()
        return None

    def other(self) -> str | None:
        """Describes the owner if it is another run; a file that was removed is written again."""
        sign = self._sign()
        if sign is None:
            self._write()
        elif _parse(sign).get("token") != self._token:
            return _describe(sign)
        return None

    def release(self) -> None:
        """Removes the file, unless it is another run's."""
        self._ended.set()
        self._beating.join(BEAT_SECONDS)
        with _logged("cannot be removed", self._path):
            if _parse(self._sign()).get("token") == self._token:
                self._path.unlink()

    def _create(self):
        """Writes the file unless there is one; returns whether it did."""
        if self._is_on_disk:
            try:
                Path(self._path).touch(exist_ok=False)
            except FileExistsError:
                return False
        elif self._path.exists():
            return False
        self._write()
        return True

    def _write(self):
        self._path.write_text(json.dumps({**self._about, "beats": self._beats}, indent=1))

    def _sign(self):
        """Returns (content of the file, time of its last change by the clock of the disk); None if there is no file."""

        def read():
            try:
                with self._path.open("rb") as file:  # opened each time: so network file systems show the changes of others
                    content = file.read().decode(errors="replace")  # a crash of the machine may have left anything
                    return content, os.fstat(file.fileno()).st_mtime_ns if self._is_on_disk else 0
            except Exception:
                if self._path.exists():
                    raise
                return None

        return faults.read(read, name=lambda: str(self._path))

    def _is_alive(self, sign):
        """Returns whether the owner that gave a sign lives."""
        if (alive := _is_alive_here(_parse(sign))) is not None:
            return alive
        logging.warning("%s: %s; looking for signs of life for %d s", self._path, _describe(sign), WATCH_SECONDS)
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, WATCH_SECONDS / 10))
            if (now := self._sign()) != sign:
                return now is not None
        return False

    def _beat(self):
        while not self._ended.wait(BEAT_SECONDS):
            with _logged("cannot be renewed", self._path):
                if self.other():
                    return
                if self._is_on_disk:  # works on full disks, too
                    os.utime(self._path)
                else:
                    self._beats += 1
                    self._write()


@contextlib.contextmanager
def _logged(problem, path):
    try:
        yield
    except Exception as error:  # clients of buckets have types of their own
        logging.warning("%s %s: %s", path, problem, error)


def _parse(sign):
    """Returns the description of the owner in a file; empty if there is none."""
    try:
        about = json.loads(sign[0]) if sign else {}
    except ValueError:  # being written, or a crash of the machine has emptied it
        about = {}
    return about if isinstance(about, dict) and about.keys() >= _FIELDS else {}


def _describe(sign):
    if not (about := _parse(sign)):
        return "a run that has not said yet who it is"
    job = "".join(f", {name}={value}" for name, value in about["job"].items())
    return f"the run of process {about['pid']} on host {about['host']}{job}, since {about['since']}"


def _machine():
    """Returns the scope of a process number: host, its boot, the container's processes; None for each unknown one."""
    scope = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            scope.append(read())
        except OSError:
            scope.append(None)
    return scope


def _process_start(pid):
    """Returns when a process started, in ticks since boot; 0 if it has ended and None if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if state in "ZX" else int(fields[18])


def _is_alive_here(about):
    """Returns whether an owner on this machine lives; None if it is on another one."""
    machine = _machine()
    if None in machine or about.get("machine") != machine:
        return None
    try:
        os.kill(about["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _process_start(about["pid"]) in (None, about["process_start"])
