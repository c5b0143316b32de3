"""What a scale of the miniature paper would take on accelerators that are not there: writes docs/miniature/SCALE/README.md.

    python -m launch.miniature.plan --scale medium --topology h200:1 --topology rtx4090:1

Compiles REPA-E's training step, as `repae_jax.plan` does, which needs JAX's CUDA plugin, but no GPU. All settings are made of
its parts, each of which takes as much longer as it has FLOP. Compiled plans are kept: the same command continues.
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from launch.miniature import experiments, miniature, plan_summary, sizes, tables
from launch.miniature.scales import SCALES, Scale
from repae_jax import cli, files, plan
from repae_jax.cost import flops
from repae_jax.cost.plan_advice import chip_bytes
from repae_jax.cost.topologies import check_topology
from repae_jax.job import build, initial_state

WHOLE = "repa-e"  # the setting that has all parts
Numbers = Mapping[str, Any]  # of `repae_jax.plan`


def costs_as(setting: str) -> str:
    """Returns the first setting whose step has the same parts of the same sizes."""
    return next(name for name in experiments.SETTINGS if _parts(name) == _parts(setting))


def _parts(setting):
    chosen = experiments.SETTINGS[setting]
    return chosen.job, chosen.network, "encoders" in chosen.changes, {"smaller", "larger"} & set(chosen.scaled)


def step_config(scale: Scale, setting: str) -> ConfigDict:
    """Returns a setting's config with SiT's blocks as a loop: unrolled ones take several times as long to trace and compile."""
    config = experiments.config_of(scale, experiments.Run(setting)).unlock()
    if "sit" in config:
        config.sit.unroll = 1
    return config.lock()


def compiled_plan(scale: Scale, topology: str, folder: Path) -> Numbers:
    """Returns the plan of REPA-E's training step, of the folder if it is there, otherwise compiled and written into it."""
    config = step_config(scale, WHOLE)
    content = json.dumps([experiments.plain(config), topology, jax.__version__], sort_keys=True)
    path = folder / f"{topology.replace(':', '-')}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    if path.exists():
        return files.read_json(path)
    numbers = plan.plan_apart(config, plan.prepare(build.plain_config(config), topology)[1])
    if "seconds" not in numbers:
        raise ValueError(f"--topology={topology}: the step of scale {scale.name} has no plan: {numbers['message']}")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, numbers)
    return numbers


@dataclasses.dataclass(frozen=True)
class Cost:
    """A training step, as traced."""

    flop: Mapping[str, float]  # by part
    arrays: int  # of the state
    state_bytes: int

    @property
    def total(self) -> float:
        """FLOP of the step."""
        return sum(self.flop.values())

    def seconds(self, whole: "Cost", parts: Mapping[str, Mapping[str, float]]) -> float:
        """Returns how long it takes: FLOP of each part for FLOP as long as in `whole`, of which `parts` are the rooflines.

        Parts without FLOP, such as the optimizers' updates, go by the number of arrays.
        """
        if unknown := set(self.flop) - set(whole.flop):
            raise ValueError(f"parts {sorted(unknown)} are not in the compiled step, whose parts are {sorted(whole.flop)}")
        shares = {part: self.flop.get(part, 0.0) / flop for part, flop in whole.flop.items()}
        return sum(sums["seconds"] * shares.get(part, self.arrays / whole.arrays) for part, sums in parts.items())


@functools.cache
def step_cost(scale: Scale, setting: str) -> Cost:
    """Traces the training step of a setting."""
    job = build.build(step_config(scale, setting), jax.devices()[:1])
    flop = {part: value * scale.batch_size for part, value in flops.of_step(job).items()}
    state = initial_state.abstract_state(job)
    return Cost(flop, len(jax.tree.leaves(state)), chip_bytes(state))


@functools.cache
def sampling_flop(scale: Scale, setting: str) -> float:
    """Returns the FLOP of the samples that a checkpoint of a setting is evaluated by."""
    config = step_config(scale, setting).unlock()
    config.sampling.update(experiments.sampler_of(experiments.SETTINGS[setting]))
    job = build.build(plan.sampling_config(config, 1), jax.devices()[:1], encoders=())
    return sum(flops.of_sampling(job).values()) * scale.samples


def planned(scale: Scale, setting: str, runs: int, plans: Mapping[str, Numbers]) -> sizes.Planned:
    """Returns the row of a setting; `plans` has REPA-E's by device."""
    chosen, same = experiments.SETTINGS[setting], costs_as(setting)
    config = experiments.config_of(scale, experiments.Run(setting))
    cost, whole = step_cost(scale, same), step_cost(scale, WHOLE)
    evaluated = experiments.evaluated_steps(scale, chosen) if chosen.network else []
    sampled = len(evaluated) * sampling_flop(scale, same) if evaluated else 0.0
    step, sampling = {}, {}
    for device, numbers in plans.items():
        chip = check_topology(numbers["topology"])
        step[device] = cost.seconds(whole, numbers["roofline"]["by_part"])
        sampling[device] = sampled / (chip.peak("high") * chip.reached["product"])
    disk = cost.state_bytes * (config.steps // config.checkpoint.every)
    return sizes.Planned(setting, cost.total, config.steps, runs, step, sampling, len(evaluated), disk)


def parse_args(argv=None):
    """Parses the command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scale", choices=list(SCALES), default="medium", help="default: %(default)s")
    parser.add_argument("--topology", action="append", required=True, help="one accelerator, such as h200:1; several times")
    parser.add_argument("--plans", type=cli.path, help="folder of compiled plans; default: runs/miniature/SCALE/plans")
    parser.add_argument("--results", type=cli.path, help="default: docs/miniature/SCALE/README.md")
    args = parser.parse_args(argv)
    args.scale = SCALES[args.scale]
    args.plans = Path(args.plans or experiments.default_workdir(args.scale) / "plans")
    args.results = Path(args.results or f"docs/miniature/{args.scale.name}/README.md")
    return args


@cli.command(parse_args)
def main(args):
    """Plans every setting of a scale, and writes its page."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine has nothing to do with the plan
    scale = args.scale
    for topology in args.topology:  # mistakes first
        if plan.prepare(build.plain_config(step_config(scale, WHOLE)), topology)[1]["chips"] > 1:
            raise ValueError(f"--topology={topology}: the miniature runs on one accelerator; allowed: one, such as h200:1")
    plans = {check_topology(topology).kind: compiled_plan(scale, topology, args.plans) for topology in args.topology}
    every, headline = (experiments.runs_of(scale, names) for names in (tables.TABLES, ["main"]))
    counts = collections.Counter(run.setting for run in every)
    rows = {setting: planned(scale, setting, runs, plans) for setting, runs in counts.items()}
    summary = plan_summary.lines_of(scale, plans, rows, {run.setting for run in headline})
    tasks = miniature.make_tasks(scale, every, Path(), Path()).values()
    page = sizes.plan_page(scale, [task for task in tasks if task.kind in experiments.PRESETS], list(rows.values()), summary)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(page)
    print(args.results)


if __name__ == "__main__":
    main()
