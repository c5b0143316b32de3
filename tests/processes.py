"""Threads and processes that tests start, and the files that they leave."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parent


def in_threads(work, numbers):
    """Runs work(number) for each process number in a thread of its own; they start in this order."""
    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)


def script_env(**env):
    """Environment of a process that may import the package and the tests."""
    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **env}


def run_script(script):
    """Runs Python code that may import the tests; returns the finished process."""
    return subprocess.run([sys.executable, "-c", script], env=script_env(), capture_output=True, text=True, timeout=120)


def contents(folder):
    """Name -> bytes of all files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
