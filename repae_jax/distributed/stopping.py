"""Requests to stop, by SIGTERM or Ctrl-C."""

import contextlib
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from absl import logging
from jax.experimental import multihost_utils

from repae_jax.distributed import multihost


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM and the first Ctrl-C set, at once and with a line in the log, also while XLA compiles."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _):
        event.set()
        signal.signal(number, before[number])  # a second one acts at once

    def watch():  # handlers run between two lines of Python, of which there may be none for an hour
        while received := receiver.recv(1):
            if received[0] in before:
                event.set()
                logging.warning(
                    "asked to stop by %s; if no line says how this has ended, the kill came too soon after the signal",
                    signal.Signals(received[0]).name,
                )
                return

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for number in before:
        signal.signal(number, stop)
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield event
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()
        watcher.join()
        receiver.close()


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether to stop: True from one call on, the same in all processes, after a signal to any.

    All processes call it equally often, at least once per step. With several, JAX's preemption service catches SIGTERM, from
    `start` on, and finds the next call that none has made.
    """
    if not multihost.is_multiprocess():
        with stop_signal() as event:
            yield event.is_set
        return
    numbers, stopped = itertools.count(1), []

    def ask():
        if not stopped and multihost_utils.reached_preemption_sync_point(next(numbers)):
            stopped.append(True)
        return bool(stopped)

    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before)
