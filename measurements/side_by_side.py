"""Helpers of programs that time two sides in one run."""

import sys

import numpy as np


def orders(sides, repeats):
    """Returns the order of the sides in each repeat; every other repeat is reversed."""
    return [sides if repeat % 2 == 0 else sides[::-1] for repeat in range(repeats)]


def spread(ratios):
    """Returns {'median', 'low', 'high'} of a ratio's values, one for each repeat."""
    return {"median": float(np.median(ratios)), "low": float(np.min(ratios)), "high": float(np.max(ratios))}


def end_in_one_line(run, options):
    """Calls run(options, say), where say prints a line; expected errors end the program with one line."""
    try:
        run(options, lambda line: print(line, flush=True))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
