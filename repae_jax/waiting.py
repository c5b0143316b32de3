"""Signs of life while something takes long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def reporting(report: Callable[[float], None], every: float) -> Iterator[None]:
    """Context in which a thread calls report(seconds so far), every so many seconds."""
    done, began = threading.Event(), time.monotonic()

    def repeat():
        while not done.wait(every):
            report(time.monotonic() - began)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
