"""What programs that time two sides in one run have in common."""

import sys

import numpy as np


def orders(sides, repeats):
    """The sides as each repeat takes them: in turns, the next repeat in reverse order."""
    return [sides if repeat % 2 == 0 else sides[::-1] for repeat in range(repeats)]


def spread(ratios):
    """{'median', 'low', 'high'} of a ratio that was taken within each repeat."""
    return {"median": float(np.median(ratios)), "low": float(np.min(ratios)), "high": float(np.max(ratios))}


def end_in_one_line(run, options):
    """run(options, function that prints a line); mistakes end in one line."""
    try:
        run(options, lambda line: print(line, flush=True))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
