"""Several processes that share a folder: as threads, or as scripts of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def in_threads(work, processes=(2, 1, 0)):
    """Does work(process index) of several processes, which begin in this order."""
    threads = [threading.Thread(target=work, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)


def script_env(**env):
    """Returns the environment of a script that imports this repository and its test helpers."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **env}


def run_script(script):
    """Runs Python code that imports tests; returns the finished process."""
    return subprocess.run([sys.executable, "-c", script], env=script_env(), capture_output=True, text=True, timeout=120)


def contents(folder):
    """Returns name -> bytes of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def end_with_kills(start, most_kills, seconds):
    """Starts processes until one ends well, killing the first `most_kills` of them; returns the number that were killed.

    Args:
      start: function that forks a process and returns its id.
      seconds: function that returns the time after which the next one is killed.
    """
    kills = 0
    while True:
        pid = start()
        if kills < most_kills:
            time.sleep(seconds())
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            return kills
        assert os.WIFSIGNALED(status), status
        kills += 1
