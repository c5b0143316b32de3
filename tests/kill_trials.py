"""Runs that are killed at random moments and continued: `python tests/kill_trials.py --trials 50`.

In every trial a small run of REPA-E is killed with SIGKILL, at a moment that is uniform over the time that such a run takes,
and started again in the same workdir, to be killed at another such moment, until it finishes. Its last checkpoint must then
equal that of a run without a break bit by bit, with the position in the data, and so must its metrics line by line but for what
tells time. Every start is a process of its own, forked from one that has imported everything and used nothing.
"""

import argparse
import collections
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS = 120
EVERY = 4  # steps between checkpoints


def config(steps):
    """The smallest run with every part of the real one."""
    import small

    changes = {"steps": steps, "checkpoint.every": EVERY, "checkpoint.keep_last": 2, "optim.sit.learning_rate": 2e-4}
    return small.config({**changes, "hooks.samples_every": 0, "hooks.reconstructions_every": 0})


def train_in(workdir, steps, compiled, log):
    """What each process does."""
    import jax
    import small

    from repae_jax import train

    os.environ["XLA_FLAGS"] = ""  # of one device
    jax.config.update("jax_platforms", "cpu")
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with small.quick_compilation(compiled):
        train.train(config(steps), workdir)


def processes():
    """Where processes come from: imports done, no device used."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "clu.metric_writers", "repae_jax.train", "small", "configs.repae"])
    return context


def kill_after(context, seconds, *arguments):
    """Trains in a process; kills it after so many seconds, None never. Returns whether it was killed, and the time it took."""
    process, began = context.Process(target=train_in, args=tuple(map(str, arguments[:1])) + arguments[1:]), time.monotonic()
    process.start()
    process.join(seconds)
    killed = process.exitcode is None
    process.kill()
    process.join()
    if not killed and process.exitcode:
        raise RuntimeError(f"the run ended with code {process.exitcode}:\n{Path(arguments[-1]).read_text()[-3000:]}")
    return killed and process.exitcode != 0, time.monotonic() - began


def moment(workdir):
    """Where a killed run was."""
    checkpoints = workdir / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    if any(not name.isdigit() for name in names):
        return "while a checkpoint was saved"
    if not (workdir / "metrics.jsonl").exists():
        return "before training"
    return "between checkpoints" if names else "before the first checkpoint"


def left_by(workdir, steps):
    """(state, position in the data, steps of all checkpoints, metrics) of a finished run."""
    from repae_jax import build, checkpoint, run_log

    job = build.build(config(steps))
    with checkpoint.Checkpointer(workdir, keep_last=2) as checkpointer:
        state, position, step = checkpointer.restore(build.abstract_state(job), job.config)
        kept = checkpointer.steps()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"time", *run_log.SPEED_NAMES}
    return state, (position, step, kept), [{k: v for k, v in line.items() if k not in clock} for line in lines]


def check(found, expected, which):
    """AssertionError unless two runs left the same."""
    import small

    differing = small.differing(found[0], expected[0])
    assert not differing, f"{which}: differs in {differing[:5]}"
    assert found[1] == expected[1], f"{which}: checkpoints {found[1]}, expected {expected[1]}"
    steps = [[line["step"] for line in lines] for lines in (found[2], expected[2])]
    assert steps[0] == steps[1], f"{which}: metrics have a gap or a duplicate: {steps[0]}"
    for line, other in zip(found[2], expected[2]):
        assert line == other, f"{which}: metrics of step {line['step']} differ: {line} and {other}"


def run(trials, steps, seed, folder, compiled, say=print):
    """All trials.

    Args:
      trials: number.
      steps: of each run.
      seed: of the moments.
      folder: for workdirs; those that are as they should be are removed.
      compiled: folder of compiled programs.
      say: called with a line for each trial.

    Returns:
      Counter of the moments at which runs were killed.

    Raises:
      AssertionError: if a run that was killed left anything else than one that was not.
    """
    context, rng, moments = processes(), np.random.default_rng(seed), collections.Counter()
    folder, compiled = Path(folder), str(compiled)
    _, longest = kill_after(context, None, folder / "whole", steps, compiled, str(folder / "whole.log"))
    expected = left_by(folder / "whole", steps)
    assert [line["step"] for line in expected[2]] == list(range(1, steps + 1))
    done = 0
    while done < trials:
        workdir, killed, kills = folder / f"trial-{done}", True, []
        while killed:
            delay = rng.uniform(0, longest)
            killed, seconds = kill_after(context, delay, workdir, steps, compiled, str(folder / f"trial-{done}.log"))
            if killed:
                kills.append(f"{moment(workdir)} ({seconds:.1f} s)")
                moments[moment(workdir)] += 1
            elif not kills:
                longest = seconds  # a whole run takes no longer, now that its programs are compiled
        if kills:
            check(left_by(workdir, steps), expected, f"trial {done}, killed {', '.join(kills)}")
            done += 1
            say(f"trial {done} of {trials}: killed {', '.join(kills)}; equal")
        shutil.rmtree(workdir)
    return moments


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=50, help="runs that are killed")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run, a checkpoint every {EVERY}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="for the runs; default a temporary one, removed if all is well")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kill-trials-"))
    folder.mkdir(parents=True, exist_ok=True)
    moments = run(args.trials, args.steps, args.seed, folder, folder / "compiled")
    print(f"{args.trials} runs killed {moments.total()} times and continued, all equal to the one that was not:")
    for name, count in moments.most_common():
        print(f"  {count:4} {name}")
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    main()
