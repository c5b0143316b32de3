"""A workdir has one owner: the run that writes there, with all of its processes.

Process 0 names its run in `WORKDIR/owner.json` before anything else is written, gives signs of life there, and removes the
file at the end. Two runs would mix their checkpoints, or two copies of one run remove each other's.

A run that was killed leaves its file. Whoever finds it tells a dead owner from a live one: on the same machine at once, by the
process' number and the time of its start; on another one by watching the signs of life for a while, since clocks may differ.
A run that was taken for dead, and was not, notices before it saves. So whatever happens, one run at most goes on saving.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import jax
from absl import logging

from repae_jax import buckets, faults
from repae_jax.distributed import multihost

FILE = "owner.json"
BEAT_SECONDS = 10  # between signs of life
WATCH_SECONDS = 45  # without one, after which an owner on another machine is dead
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = {True: 0.25, False: 2.0}  # on disks or not: until whoever writes at the same time has written
_SAID = {"host", "machine", "pid", "process_start", "job", "since", "token"}
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOBSET_NAME", "TPU_NAME")


class WorkdirLost(multihost.CollectiveError):
    """Another run has taken the workdir: raised in all processes at once."""


@contextlib.contextmanager
def owned(workdir):
    """Makes this run the owner of a workdir while the context lasts; all processes of the run call it.

    Args:
      workdir: epath.Path of a folder that exists, on a disk or in a bucket.

    Yields:
      Function, called by all processes before anything is saved: WorkdirLost if another run has become the owner.

    Raises:
      ValueError: in all processes, if another run is the owner and gives signs of life; it names the owner.
    """
    owner, refusal = None, None
    if jax.process_index() == 0:
        owner = _Owner(workdir / FILE)
        refusal = owner.acquire()
    if refusal := multihost.broadcast_from_process_0(refusal):
        raise ValueError(f"workdir {str(workdir)!r} is in use by {refusal}. Let it end, stop it, or use another workdir")

    def check():
        if other := multihost.broadcast_from_process_0(owner and owner.other()):
            raise WorkdirLost(f"workdir {str(workdir)!r} now belongs to {other}: this run ends, and saves nothing more")

    with contextlib.ExitStack() as stack:
        if owner:
            stack.callback(owner.release)
            stack.enter_context(multihost.sudden_end(owner.release))
        yield check


class _Owner:
    """Claims a workdir for this run, and shows signs of life.

    Args:
      path: epath.Path of the file.
    """

    def __init__(self, path):
        self._path = path
        self._is_on_disk = not buckets.is_address(path)
        self._token = secrets.token_hex(8)
        self._about = {
            "host": socket.gethostname(), "machine": _machine(),
            "pid": os.getpid(), "process_start": _process_start(os.getpid()),
            "job": {name: os.environ[name] for name in _JOBS if name in os.environ},
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "token": self._token,
        }  # fmt: skip
        self._beats = 0
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="owner of the workdir", daemon=True)

    def acquire(self):
        """Becomes the owner and returns None, or describes who is."""
        if not self._create():
            found = self._sign()
            if found and self._is_alive(found):
                return _described(self._sign() or found)  # it may have said who it is meanwhile
            logging.warning("%s: %s is not there any more; this run takes its place", self._path, _described(found))
            self._write()
        elif self._is_on_disk:  # there only one can create it
            self._beating.start()
            return None
        time.sleep(_SETTLE_SECONDS[self._is_on_disk])
        if other := self.other():
            return other
        self._beating.start()
        return None

    def other(self):
        """Describes the owner if it is another run; a file that somebody has removed is written again."""
        found = self._sign()
        if found is None:
            self._write()
        elif _parsed(found).get("token") != self._token:
            return _described(found)
        return None

    def release(self):
        """Removes the file, unless it is another run's."""
        self._ended.set()
        self._beating.join(BEAT_SECONDS)
        with _logged("cannot be removed", self._path):
            if _parsed(self._sign()).get("token") == self._token:
                self._path.unlink()

    def _create(self):
        """Writes the file unless there is one; returns whether it did."""
        if self._is_on_disk:
            try:
                with open(self._path, "x") as file:  # noqa: PTH123 (etils has no such mode)
                    file.write(self._text())
            except FileExistsError:
                return False
            return True
        if self._path.exists():
            return False
        self._write()
        return True

    def _write(self):
        self._path.write_text(self._text())

    def _text(self):
        return json.dumps({**self._about, "beats": self._beats}, indent=1)

    def _sign(self):
        """Returns (content of the file, time of its last change by the clock of the disk), None without one.

        It is opened each time: so network file systems show what others did.
        """
        return faults.read(self._read, name=lambda: str(self._path))

    def _read(self):
        try:
            with self._path.open("rb") as file:
                content = file.read().decode(errors="replace")  # a crash of the machine may have left anything
                return content, os.fstat(file.fileno()).st_mtime_ns if self._is_on_disk else 0
        except Exception:
            if self._path.exists():
                raise
            return None

    def _is_alive(self, found):
        """Returns whether the owner that `_sign` has found lives."""
        alive = _is_alive_here(_parsed(found))
        if alive is not None:
            return alive
        logging.warning("%s: %s; looking for signs of life for %d s", self._path, _described(found), WATCH_SECONDS)
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, WATCH_SECONDS / 10))
            now = self._sign()
            if now != found:
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
def _logged(what, path):
    """Turns an error into a warning."""
    try:
        yield
    except Exception as error:  # of disks, and whatever reaches buckets
        logging.warning("%s %s: %s", path, what, error)


def _parsed(found):
    """Returns what a file says of its owner; empty if it does not."""
    try:
        about = json.loads(found[0]) if found else {}
    except ValueError:  # being written, or a crash of the machine has emptied it
        about = {}
    return about if isinstance(about, dict) and about.keys() >= _SAID else {}


def _described(found):
    about = _parsed(found)
    if not about:
        return "a run that has not said yet who it is"
    job = "".join(f", {name}={value}" for name, value in about["job"].items())
    return f"the run of process {about['pid']} on host {about['host']}{job}, since {about['since']}"


def _machine():
    """Returns where a process number holds: host, its boot, the container's processes; None for what is not known."""
    found = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            found.append(read())
        except OSError:
            found.append(None)
    return found


def _process_start(pid):
    """Returns when a process started, in ticks since boot; 0 if it has ended and None if that is not told."""
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
