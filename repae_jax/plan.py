"""A plan before you rent: `python -m repae_jax.plan --config configs/repae.py --topology v5e:4x4 --topology h100:2x8`.

Compiles the training step of any config for TPUs or GPUs that are not there, and reports for each topology whether it fits:
memory of a chip, FLOP, an estimate of the time and what bounds it, bytes of collectives, images per second, hours and
chip-hours of the run. With --sample, the same of sampling. It needs no accelerator, no weights and no data, but libtpu, which
the extra `tpu` brings, or JAX's CUDA plugin, which the extra `gpu-plan` brings.

Fields of the config can be overridden as in training: --config.mesh.fsdp=16 --config.accumulation=2.
"""

import contextlib
import functools
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from repae_jax import cli, files, waiting
from repae_jax.cost import flops, hlo_cost, roofline
from repae_jax.cost.chips import Chip
from repae_jax.cost.plan_advice import advice, check_state, chip_bytes, most_images, spend
from repae_jax.cost.plan_text import lines_of, plural
from repae_jax.cost.topologies import check_cudnn, check_topology, connected, topology_devices
from repae_jax.distributed import multihost, sharding
from repae_jax.distributed.child_process import Crashed, run_in_subprocess
from repae_jax.job import build, compilation, initial_state
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import for_sampling

SAMPLES = 50_000  # images of a published score
IMAGES_PER_CHIP = 16
LARGEST = 10  # kernels that are listed
Numbers = dict[str, Any]  # the plan of one topology, for JSON


class DoesNotFit(Exception):
    """The compiler found no way to fit a program into the memory: bytes needed, and bytes available, or None."""

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


def lower_step(job: build.Job) -> jax.stages.Lowered:
    """Lowers the jitted training step as `train` runs it, on shapes alone."""
    state = initial_state.abstract_state(job)
    return compilation.jit_step(job, state).lower(state, *compilation.abstract_inputs(job))


def lower_sampling(job: build.Job) -> jax.stages.Lowered:
    """Lowers sampling of config.data.batch_size images as `sample` runs it, on shapes alone."""
    run, arguments = flops.sampling_program(job)
    return jax.jit(sharding.with_mesh_context(job.mesh, run)).lower(*arguments)


def sampling_config(config: Any, count: int) -> dict[str, Any]:
    """Returns the config of `count` samples at a time, as `load_model` changes it: no sharding, no accumulation."""
    config = build.plain_config(config)
    if config["job"] == "vae":
        raise ValueError("--sample: config.job='vae' trains a tokenizer, which has no SiT to sample from; leave --sample out")
    config = for_sampling(config, count)
    return {**config, "data": {**config["data"], "cache": ""}}


def compile_program(lowered: jax.stages.Lowered, chip: Chip) -> jax.stages.Compiled:
    """Compiles, or raises DoesNotFit; running out of other memory than a chip's HBM is an error like any other."""
    try:
        return lowered.compile(dict(chip.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        raise DoesNotFit(str(error).splitlines()[0], *memory_of_message(str(error))) from error


def memory_of_message(message: str) -> tuple[float | None, float | None]:
    """Returns (bytes needed, bytes available) from the compiler's message; None for a number that is not in it."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"required[^(]*\({size}\) exceeds available HBM \({size}\)",
        rf"Allocation \(size={size}\) would exceed memory",  # the whole chip's, part of which is reserved
    ):
        match = re.search(pattern, message)
        if match:
            sizes = [float(number) * units[unit] for number, unit in zip(match.groups()[::2], match.groups()[1::2])]
            return sizes[0], sizes[1] if len(sizes) == 2 else None
    return None, None


@contextlib.contextmanager
def showing_time(text):
    """Prints a text, and how long the context lasts, to stderr."""
    start, show = time.monotonic(), functools.partial(print, file=sys.stderr, flush=True)
    show(text)
    try:
        with waiting.reporting(lambda seconds: show(f"  … {seconds:.0f} s"), every=30):
            yield
    finally:
        show(f"  done after {time.monotonic() - start:.0f} s")


def prepare(config: Any, topology: str, images_per_chip: int | None = None) -> tuple[build.Job, Numbers]:
    """Builds a config for a topology such as 'v5e:4x4', which finds every mistake in the two before anything takes long.

    With images_per_chip, it is for sampling so many images at a time and chip instead of a training step.

    Returns:
      (Job on the topology's chips, numbers of `setting`).
    """
    chip = check_topology(topology)
    if config.get("attention") == "cudnn" and chip.noun == "GPU" and not images_per_chip:
        check_cudnn()
    devices = topology_devices(topology, 1 if images_per_chip else config["mesh"]["slices"])
    if images_per_chip:
        config = sampling_config(config, images_per_chip * len(devices))
    job = build.build(config, devices, encoders=() if images_per_chip else None)
    compilation.check_compiler_options(job)
    numbers = setting(job, chip, topology, bool(images_per_chip))
    if not chip.refuses:
        check_state(chip, numbers)
    return job, numbers


def plan(job: build.Job, numbers: Numbers) -> Numbers:
    """Compiles a prepared job; adds 'flop_per_image', 'fits', and the numbers of `outcome`, or the reason and advice."""
    chip, sampling, start = check_topology(numbers["topology"]), numbers["job"] == "sample", time.monotonic()
    numbers = {**numbers, "flop_per_image": flops.of_sampling(job) if sampling else flops.of_step(job)}
    variants = ((job, 1.0),) if sampling else job.variants
    try:
        compiled, *others = [
            compile_program(lower_sampling(job) if sampling else lower_step(variant), chip) for variant, _ in variants
        ]
    except DoesNotFit as error:
        numbers["memory_of_chip_bytes"] = error.available or numbers["memory_of_chip_bytes"]
        return {**numbers, **_refused(job, numbers, str(error), error.needed)}
    runs = math.ceil(SAMPLES / numbers["images"]) if sampling else job.config["steps"]
    numbers = {**numbers, "fits": True, "compile_seconds": time.monotonic() - start, "runs": runs}
    further = [(other.as_text(), share) for other, (_, share) in zip(others, variants[1:])]
    numbers |= outcome(numbers, compiled.memory_analysis(), compiled.as_text(), further)
    needed = numbers["memory_bytes"]["total"]
    if not chip.refuses and needed > chip.usable * chip.memory:
        reason = f"a program may fill {chip.usable:.0%} of it, the rest is for the driver, libraries and fragmentation"
        return {**numbers, **_refused(job, numbers, reason, needed)}
    return {**numbers, "advice": spend(job, numbers)}


def _refused(job, numbers, message, needed):
    return {"fits": False, "message": message, "needed_bytes": needed, "advice": advice(job, numbers)}


def prepare_and_plan(config: Any, topology: str, images_per_chip: int | None) -> Numbers:
    """Prepares and plans in a child process."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for chips that are not there cannot be read back
    return plan(*prepare(config, topology, images_per_chip))


def plan_apart(config: Any, numbers: Numbers, images_per_chip: int | None = None) -> Numbers:
    """Runs `prepare_and_plan` in a child process: a failure of the compiler may take its process down.

    If compiling failed, 'fits' is None, with the message, and the exit code of the process if that died.
    """
    chips = plural(numbers["chips"], numbers["chip"])
    title = f"{numbers['topology']}: compiling for {chips}; full-size steps take minutes, tiny ones less"
    with showing_time(title):
        try:
            return run_in_subprocess(prepare_and_plan, build.plain_config(config), numbers["topology"], images_per_chip)
        except (Crashed, jax.errors.JaxRuntimeError) as error:
            return {**numbers, "fits": None, "exitcode": getattr(error, "exitcode", None), "message": str(error)}


def setting(job: build.Job, chip: Chip, topology: str, sampling: bool) -> Numbers:
    """Returns the numbers of a job on a topology, or of sampling its batch at a time, that are known without compiling."""
    chips, images = job.mesh.devices.size, job.config["data"]["batch_size"]
    state, frozen = initial_state.abstract_state(job), compilation.abstract_inputs(job)[1]
    trained = [] if sampling else [net.params for net in (state.vae, state.disc, state.sit) if net is not None]
    return {
        "topology": topology, "slices": job.config["mesh"]["slices"], "device_kind": chip.kind, "chips": chips,
        "chip": chip.noun, "link": chip.link_name, "memory_of_chip_bytes": chip.memory,
        "bytes_per_second": {"memory": chip.bandwidth, "link": chip.link, "network": chip.network},
        "start_seconds": chip.start, "peak_flop_per_second": chip.peak(), "clock_hz": getattr(chip, "clock", None),
        "matmul_share": getattr(chip, "matmul", None),
        "job": "sample" if sampling else job.config["job"], "mesh": dict(job.mesh.shape),
        "branch_shares": [] if sampling else flops.branch_shares(job.config),
        "images": images, "images_per_chip": images // chips,
        "state_bytes": chip_bytes(generate.sampling_params(state, frozen) if sampling else state),
        "gradient_bytes": chip_bytes(trained), "frozen_bytes": 0 if sampling else chip_bytes(frozen),
        "versions": multihost.versions(), "arguments": sys.argv[1:], "config": job.config,
    }  # fmt: skip


def outcome(numbers: Numbers, memory_stats: Any, text: str, further: Sequence[tuple[str, float]] = ()) -> Numbers:
    """Returns the numbers that follow from a program that will run numbers['runs'] times: its memory and scheduled HLO.

    `further` are (text, share of the runs) of smaller programs that run in its place: times are means, and all else is its own.
    """
    chip, shares = check_topology(numbers["topology"]), numbers["branch_shares"]
    groups = roofline.Groups.of_mesh(numbers["mesh"], connected(numbers["topology"]))

    def analyzed(text):
        cost, bounds = hlo_cost.analyze(text, shares), roofline.analyze(text, chip, groups, shares)
        is_tpu = bool(cost.cycles)  # compilers for TPUs count cycles
        return cost, bounds, cost.cycles / numbers["clock_hz"] if is_tpu else bounds.seconds

    cost, bounds, own = analyzed(text)
    kinds = [{"seconds": own, "share": 1 - sum(share for _, share in further)}]
    kinds += [{"seconds": analyzed(other)[2], "share": share} for other, share in further]
    seconds = sum(kind["seconds"] * kind["share"] for kind in kinds)
    flop = sum(numbers["flop_per_image"].values()) * numbers["images_per_chip"]
    hours = numbers["runs"] * seconds / 3600
    numbers = {
        **numbers,
        "memory_bytes": hlo_cost.memory(memory_stats),
        "estimated_cycles": cost.cycles, "unknown_loops": cost.unknown_loops, "collective_bytes": cost.collectives,
        "roofline": bounds.numbers(LARGEST),
        "kinds_of_steps": kinds, "seconds": seconds, "images_per_second": numbers["images"] / seconds,
        "share_of_peak": flop / seconds / numbers["peak_flop_per_second"],
        "hours": hours, "chip_hours": hours * numbers["chips"],
    }  # fmt: skip
    return {**numbers, "most_images": most_images(chip, numbers)}


def parse_args(argv=None):
    """Returns the arguments of the command line."""
    parser = cli.ConfigParser(description=__doc__.split("\n\n")[0])
    topology = "TPUs, CHIP:GRID such as v5e:4x4, or GPUs, CARD:HOSTSxGPUS such as h100:2x8; may be given several times"
    parser.add_argument("--topology", action="append", required=True, help=topology)
    parser.add_argument("--sample", action="store_true", help="plan sampling by config.sampling instead of training")
    images = f"with --sample: images at a time and chip, default {IMAGES_PER_CHIP}"
    parser.add_argument("--images_per_chip", type=cli.whole(1), help=images)
    parser.add_argument("--json", type=cli.path, help="file for the numbers of all topologies")
    return parser.parse_args(argv)


@cli.command(parse_args)
def main(args):
    """Prints the plans of all topologies; exit code 1 says that not everything fits."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine has nothing to do with the plan
    path = None if args.json is None else files.check_new("--json", args.json)
    if args.images_per_chip is not None and not args.sample:
        remedy = "add --sample, or change config.data.batch_size"
        raise ValueError(f"--images_per_chip={args.images_per_chip} is for sampling: {remedy}")
    images_per_chip = (args.images_per_chip or IMAGES_PER_CHIP) if args.sample else None
    settings = [prepare(args.config, name, images_per_chip)[1] for name in args.topology]  # mistakes first
    plans = []
    for numbers in settings:
        plans.append(plan_apart(args.config, numbers, images_per_chip))
        print("\n".join(lines_of(plans[-1])) + "\n", flush=True)
        if path is not None:
            files.write_json(path, plans, overwrite=bool(plans[:-1]))
    sys.exit(not all(numbers["fits"] for numbers in plans))


if __name__ == "__main__":
    main()
