"""Several processes that share a folder: as threads, or as scripts of their own."""

import os
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def in_threads(work):
    """Does work(process index) of three processes, the first process coming last."""
    threads = [threading.Thread(target=work, args=(process,)) for process in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(30)


def script_env(**env):
    """Returns the environment of a script that imports this repository and its test helpers."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **env}
