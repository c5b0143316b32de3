"""Runs that are killed at random moments and continued: `python measurements/kill_trials.py --trials 50`.

In every trial a small run of REPA-E is killed with SIGKILL, at a moment that is uniform over the time that such a run takes,
and started again in the same workdir, to be killed at another such moment, until it finishes. Its last checkpoint must then
equal that of a run without a break bit by bit, with the position in the data, and so must its metrics line by line, except
times and speeds. Every start is a process of its own, forked from one that has imported everything and used no device.
"""

import collections
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from repae_jax import cli

ROOT = Path(__file__).parents[1]
STEPS = 120
EVERY = 4  # steps between checkpoints
KEPT = 2  # checkpoints that are kept


def config(job, steps, **more):
    """Returns the smallest config with every part of a real one, changed by `more`; 'ldm' is a SiT alone on a frozen VAE."""
    import small

    from configs import ldm, repae

    changes = {"steps": steps, "checkpoint.every": EVERY, "checkpoint.keep_last": KEPT, "hooks.samples_every": 0}
    if job == "ldm":
        return small.config({**changes, **small.SIT_ALONE}, ldm, **more)
    return small.config({**changes, "hooks.reconstructions_every": 0, "optim.sit.learning_rate": 2e-4}, repae, **more)


def train_in(job, steps, workdir, compiled, log, **changes):
    """Trains in this process, until the end or a kill; for `changes` see `config`."""
    import jax

    from repae_jax import train

    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)  # one device
    settings = {"platforms": "cpu", "disable_most_optimizations": True, "compilation_cache_dir": str(compiled)}
    for name, value in {**settings, "persistent_cache_min_compile_time_secs": 0.2}.items():
        jax.config.update(f"jax_{name}", value)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    train.train(config(job, steps, **changes), workdir)


def processes():
    """Returns the multiprocessing context of a server that has imported everything, and used no device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorboard.summary.writer.record_writer", "repae_jax.train", "small", "configs.ldm"])
    return context


def kill_after(context, seconds, *arguments):
    """Calls `train_in` in a process, kills it after so many seconds (None: never), and returns (was it killed, seconds)."""
    process, began = context.Process(target=train_in, args=arguments), time.monotonic()
    process.start()
    process.join(seconds)
    process.kill()  # nothing to one that has ended
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with code {process.exitcode}:\n{Path(arguments[-1]).read_text()[-3000:]}")
    return process.exitcode != 0, time.monotonic() - began


def checkpoints_of(workdir):
    """Returns {(name, inode)} of the folder of checkpoints, finished or not."""
    folder = workdir / "checkpoints"
    return {(path.name, path.stat().st_ino) for path in folder.iterdir()} if folder.is_dir() else set()


def moment(workdir, before):
    """Returns what a run did when it was killed; `before` is `checkpoints_of` before its start."""
    now = checkpoints_of(workdir)
    if any(not name.isdigit() for name, _ in now - before):
        return "while a checkpoint was saved"
    if any(name.isdigit() for name, _ in now - before):
        return "between checkpoints"
    return "before the first checkpoint" if not now else "while it was resumed, or before its next checkpoint"


def left_by(job, steps, workdir):
    """Returns (state, (position in the data, step, steps of the checkpoints to be kept), metrics) of a finished run.

    An older checkpoint is left where a kill met its removal after the last save: no save comes after it that would remove it.
    """
    from repae_jax.job import build, initial_state
    from repae_jax.training import checkpoint, metric_log

    built = build.build(config(job, steps))
    with checkpoint.Checkpointer(workdir, keep_last=KEPT) as checkpointer:
        state, position, step = checkpointer.restore(initial_state.abstract_state(built), built.config)
        kept = checkpointer.steps()[-KEPT:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"time", *metric_log.SPEED_NAMES}
    return state, (position, step, kept), [{k: v for k, v in line.items() if k not in clock} for line in lines]


def check(found, expected, which):
    """Raises AssertionError unless two runs left the same results."""
    import small

    differing = small.differing(found[0], expected[0])
    assert not differing, f"{which}: differs in {differing[:5]}"
    assert found[1] == expected[1], f"{which}: checkpoints {found[1]}, expected {expected[1]}"
    steps = [[line["step"] for line in lines] for lines in (found[2], expected[2])]
    assert steps[0] == steps[1], f"{which}: metrics have a gap or a duplicate: {steps[0]}"
    for line, other in zip(found[2], expected[2]):
        assert line == other, f"{which}: metrics of step {line['step']} differ: {line} and {other}"


def run(job, steps, trials, seed, folder, compiled, say=print, most=math.inf):
    """Runs all trials, and returns a Counter of the moments at which runs were killed, which the seed draws.

    AssertionError if a killed run left other results than the run without a break. Workdirs of trials that succeed are removed
    from the folder; `compiled` is that of compiled programs. A run that was killed as often as `most` is left to finish, as
    soon as there is a checkpoint to continue from. `say` is called with a line for each trial.
    """
    context, rng, moments = processes(), np.random.default_rng(seed), collections.Counter()
    whole = Path(folder) / "whole"

    def attempt(seconds, workdir):
        return kill_after(context, seconds, job, steps, str(workdir), str(compiled), f"{workdir}.log")

    attempt(None, whole)
    _, longest = attempt(None, Path(folder) / "again")  # a whole run takes no longer, now that its programs are compiled
    expected = left_by(job, steps, whole)
    assert [line["step"] for line in expected[2]] == list(range(1, steps + 1))
    done = 0
    while done < trials:
        workdir, killed, kills = Path(folder) / f"trial-{done}", True, []
        while killed:
            before = checkpoints_of(workdir)
            enough = len(kills) >= most and any(name.isdigit() for name, _ in before)
            killed, _ = attempt(None if enough else rng.uniform(0, longest), workdir)
            if killed:
                kills.append(moment(workdir, before))
        if kills:
            check(left_by(job, steps, workdir), expected, f"trial {done}, killed {', '.join(kills)}")
            moments.update(kills)
            done += 1
            say(f"trial {done} of {trials}: killed {', '.join(kills)}; equal")
        shutil.rmtree(workdir)
    return moments


def parse_args(words=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--job", choices=("repae", "ldm"), default="repae", help="REPA-E, or the quicker SiT alone")
    parser.add_argument("--trials", type=cli.whole(1), default=50, help="runs that are killed")
    parser.add_argument("--steps", type=cli.whole(1), default=STEPS, help=f"steps of each run, a checkpoint every {EVERY}")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the moments")
    parser.add_argument("--folder", help="folder of the runs; default a temporary one, removed if all is well")
    return parser.parse_args(words)


@cli.command(parse_args)
def main(args):
    """Kills runs, and prints at which moments."""
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kill-trials-"))
    folder.mkdir(parents=True, exist_ok=True)
    moments = run(args.job, args.steps, args.trials, args.seed, folder, folder / "compiled")
    print(f"{args.trials} runs of {args.steps} steps killed {moments.total()} times, all equal to the one that was not:")
    for name, count in moments.most_common():
        print(f"  {count:4} {name}")
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    main()
