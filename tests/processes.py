"""Several processes that share a folder: as threads, or as scripts of their own."""

import os
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
