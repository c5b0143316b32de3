"""Seconds per call of a compiled program, while the device always has work."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

WINDOWS = 10  # timed windows, if there are so many calls


def time_calls(
    call: Callable[[], Any], count: int, *, ahead: int, warm_up: int = 3, title: str | None = None, period: int = 1
) -> Float[np.ndarray, " N"]:
    """Returns the seconds per call of a program in N windows of count // WINDOWS calls, at least one, or some periods.

    Each call is dispatched while up to `ahead` earlier ones are unfinished, so that the device need not wait for the host; the
    results of these are in memory together. The clock is read when the last call of a window is finished; one window follows
    the other.

    Args:
      call: dispatches the program once; returns arrays that are ready when it is done.
      count: calls that are timed, after `warm_up` others.
      title: name of a progress bar, if there shall be one.
      period: number of calls after which what they do repeats; windows are of whole periods.
    """
    size = -(-max(count // WINDOWS, 1) // period) * period
    count, warm_up = max(count, size), max(warm_up, period)
    pending, finished, ends = collections.deque(), 0, []
    with tqdm(total=warm_up + count, desc=title, unit="call", leave=False, disable=title is None) as bar:
        for index in range(warm_up + count + ahead):
            if index < warm_up + count:
                pending.append(call())
            if index < ahead:
                continue
            jax.block_until_ready(pending.popleft())
            finished += 1
            bar.update()
            if finished >= warm_up and (finished - warm_up) % size == 0:
                ends.append(time.perf_counter())
    return np.diff(ends) / size


def spread(seconds: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Returns median and spread of windows, as JSON holds them."""
    low, median, high = np.percentile(seconds, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high, "windows": len(seconds)}
