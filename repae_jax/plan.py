"""A plan before you rent: `python -m repae_jax.plan --config configs/repae.py --topology v5e:4x4 --topology v6e:4x4`.

Compiles the training step of any config for TPUs that are not there, and tells of each topology whether it fits: memory of a
chip, FLOP, the compiler's estimate of the time, bytes of collectives, images per second, hours and chip-hours of the run. With
--sample, the same of sampling. It needs no accelerator, no weights and no data, but libtpu, which the extra `tpu` brings.

Fields of the config can be overridden as in training: --config.mesh.fsdp=16 --config.accumulation=2.
"""

import contextlib
import math
import re
import sys
import threading
import time

import jax
from absl import flags

from repae_jax import cli, files
from repae_jax.cost import flops, hlo_cost
from repae_jax.cost.plan_text import GIB, lines_of
from repae_jax.cost.topologies import check_topology, topology_devices
from repae_jax.distributed import multihost, sharding
from repae_jax.distributed.child_process import Crashed, run_in_subprocess
from repae_jax.job import build, recipe
from repae_jax.sampling import generate

SAMPLES = 50_000  # images that the published scores are of
IMAGES_PER_CHIP = 16
SAME_SIZE = 1.05  # states that differ by less are as large


class DoesNotFit(Exception):
    """The compiler found no way to fit a program into the memory: bytes that it needs, and that there are, or None."""

    def __init__(self, message, needed, available):
        super().__init__(message)
        self.needed, self.available = needed, available


# ---------------------------------------------------------------------------------------------------------------------
# Programs.
# ---------------------------------------------------------------------------------------------------------------------


def lower_step(job):
    """The jitted training step as `train` runs it, lowered on shapes alone."""
    state = build.abstract_state(job)
    return build.jit_step(job, state).lower(state, *build.abstract_inputs(job))


def lower_sampling(job):
    """Sampling of config.data.batch_size images as `sample` runs it, lowered on shapes alone."""
    batch, frozen, key = build.abstract_inputs(job)
    params = generate.sampling_params(build.abstract_state(job), frozen)
    run = jax.jit(generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling))
    return run.lower(params, batch["label"], batch["label"], key)


def sampling_config(config, count):
    """The config of `count` samples at a time, as `trained.load_model` changes it: no sharding, no accumulation."""
    config = build.plain_config(config)
    if config["job"] == "vae":
        raise ValueError("--sample: config.job='vae' trains a tokenizer, which has no SiT to sample from; leave --sample out")
    data = {**config["data"], "batch_size": count, "cache": ""}
    return {**config, "mesh": {"fsdp": 1, "slices": 1}, "compiler_options": "", "accumulation": 1, "data": data}


def compile_program(lowered):
    """lowered.compile(), or DoesNotFit; other memory than a chip's HBM that runs out is an error like any other."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        raise DoesNotFit(str(error).splitlines()[0], *memory_of_message(str(error))) from error


def memory_of_message(message):
    """Returns (bytes needed, bytes available) by the compiler's message; None for what it does not tell."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"required[^(]*\({size}\) exceeds available HBM \({size}\)",
        rf"Allocation \(size={size}\) would exceed memory",  # of the whole chip, part of which is not to be had
    ):
        found = re.search(pattern, message)
        if found:
            sizes = [float(number) * units[unit] for number, unit in zip(found.groups()[::2], found.groups()[1::2])]
            return sizes[0], sizes[1] if len(sizes) == 2 else None
    return None, None


@contextlib.contextmanager
def showing_time(what, every=30.0):
    """Prints `what`, and how long it has been going on, to stderr."""
    start, done = time.monotonic(), threading.Event()

    def tell():
        while not done.wait(every):
            print(f"  … {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"  done after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.
# ---------------------------------------------------------------------------------------------------------------------


def prepare(config, topology, images_per_chip=None):
    """Everything about a config on a topology that can be wrong, and nothing that takes long.

    Args:
      config: ConfigDict or nested dict, see configs/.
      topology: such as 'v5e:4x4'.
      images_per_chip: sampling, of so many images at a time and chip, instead of a training step.

    Returns:
      (Job on the topology's chips, numbers of `setting`).

    Raises:
      ValueError: for a topology or a config that cannot work.
    """
    chip = check_topology(topology)
    devices = topology_devices(topology, 1 if images_per_chip else config["mesh"]["slices"])
    if images_per_chip:
        config = sampling_config(config, images_per_chip * len(devices))
    job = build.build(config, devices, encoders=() if images_per_chip else None)
    build.check_compiler_options(job)
    return job, setting(job, chip, topology, bool(images_per_chip))


def plan(job, numbers):
    """What a job costs, as the compiler sees it.

    Args:
      job: Job.
      numbers: of `setting`, as `prepare` returns them with the job.

    Returns:
      numbers, with 'fits', and those of `outcome` or, if it does not fit, the reason and advice.
    """
    sampling, start = numbers["job"] == "sample", time.monotonic()
    try:
        compiled = compile_program(lower_sampling(job) if sampling else lower_step(job))
    except DoesNotFit as error:
        reason = {"message": str(error), "needed_bytes": error.needed, "hbm_bytes": error.available or numbers["hbm_bytes"]}
        return {**numbers, "fits": False, **reason, "advice": advice(job, numbers)}
    runs = math.ceil(SAMPLES / numbers["images"]) if sampling else job.config["steps"]
    numbers = {**numbers, "fits": True, "compile_seconds": time.monotonic() - start, "runs": runs}
    return numbers | outcome(numbers, compiled.memory_analysis(), compiled.as_text())


def prepare_and_plan(config, topology, images_per_chip):
    """`plan` of what `prepare` makes, as a process of its own does it."""
    _use_no_accelerator()
    return plan(*prepare(config, topology, images_per_chip))


def plan_apart(config, numbers, images_per_chip=None):
    """`prepare_and_plan` in a process of its own: where the compiler fails, it may take that down.

    Args:
      config, images_per_chip: as in `prepare`.
      numbers: of `setting`, as that returns them.

    Returns:
      What `plan` returns; or, if it is not known because compiling failed, numbers with 'fits', None, the exit code of the
      process if that died, and the message.
    """
    what = f"{numbers['topology']}: compiling for {numbers['chips']} chips; full-size steps take minutes, tiny ones less"
    with showing_time(what):
        try:
            return run_in_subprocess(prepare_and_plan, build.plain_config(config), numbers["topology"], images_per_chip)
        except Crashed as error:
            return {**numbers, "fits": None, "exitcode": error.exitcode, "message": str(error)}
        except jax.errors.JaxRuntimeError as error:
            return {**numbers, "fits": None, "exitcode": None, "message": str(error)}


def _use_no_accelerator():
    """One of this machine has nothing to do with the plan."""
    jax.config.update("jax_platforms", "cpu")


def setting(job, chip, topology, sampling):
    """What is known before anything is compiled.

    Args:
      job: Job on the devices of a topology.
      chip: topologies.Chip of them.
      topology: its name.
      sampling: whether it is about sampling, with all of the batch at a time, or about training.
    """
    chips, images = job.mesh.devices.size, job.config["data"]["batch_size"]
    parts = flops.sampling_parts(job.config, job.sampling) if sampling else flops.parts(job.config, job.encoders)
    state = build.abstract_state(job)
    kept = generate.sampling_params(state, build.abstract_inputs(job)[1]) if sampling else state
    return {
        "topology": topology,
        "slices": job.config["mesh"]["slices"],
        "device_kind": chip.kind,
        "chips": chips,
        "hbm_bytes": chip.hbm,
        "peak_flop_per_second": flops.peak(chip.kind),
        "clock_hz": chip.clock,
        "matmul_share": chip.matmul,
        "job": "sample" if sampling else job.config["job"],
        "mesh": dict(job.mesh.shape),
        "branch_shares": [] if sampling else flops.scale_shares(job.config),
        "images": images,
        "images_per_chip": images // chips,
        "flop_per_image": parts,
        "state_bytes": chip_bytes(kept),
        "versions": multihost.versions(),
        "arguments": sys.argv[1:],
        "config": job.config,
    }


def outcome(numbers, memory_stats, text):
    """What the compiled program tells.

    Args:
      numbers: of `setting`, with 'runs', how often the program will run.
      memory_stats: the program's CompiledMemoryStats.
      text: its HLO, scheduled.
    """
    cost = hlo_cost.analyze(text, numbers["branch_shares"])
    seconds = cost.cycles / numbers["clock_hz"]
    flop = sum(numbers["flop_per_image"].values()) * numbers["images_per_chip"]
    hours = numbers["runs"] * seconds / 3600
    return {
        "memory_bytes": hlo_cost.memory(memory_stats),
        "estimated_cycles": cost.cycles,
        "unknown_loops": cost.unknown_loops,
        "seconds": seconds,
        "share_of_peak": flop / seconds / numbers["peak_flop_per_second"],
        "images_per_second": numbers["images"] / seconds,
        "collective_bytes": cost.collectives,
        "hours": hours,
        "chip_hours": hours * numbers["chips"],
    }


def chip_bytes(tree):
    """Bytes on each chip of a tree of shapes with shardings."""
    return sum(_shard_bytes(x, x.sharding) for x in jax.tree.leaves(tree))


def _shard_bytes(x, placed):
    return math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Advice.
# ---------------------------------------------------------------------------------------------------------------------


def advice(job, numbers):
    """Lines on what would make a training step, or a batch of samples, smaller.

    Args:
      job: Job that does not fit.
      numbers: of `setting`.
    """
    config, per_chip, lines = job.config, numbers["images_per_chip"], []
    if numbers["job"] == "sample":
        fewer = [f"--images_per_chip={per_chip // 2}: the same samples in more batches"] if per_chip > 1 else []
        return [*fewer, "chips with more memory"]
    accumulation, fsdp, sharded = config["accumulation"], *better_fsdp(job, numbers["state_bytes"])
    if fsdp is not None:
        saved = (numbers["state_bytes"] - sharded) / GIB
        lines.append(f"--config.mesh.fsdp={fsdp}: {fsdp} chips share a state, {saved:.2f} GiB less on each, more traffic")
    if per_chip > accumulation and may_accumulate(config):
        parts = next(n for n in range(accumulation + 1, per_chip + 1) if per_chip % n == 0)
        norm = "; the discriminator's batch norm sees fewer images" if job.tx.disc is not None else ""
        fewer = f"{per_chip // parts} instead of {per_chip // accumulation} images of a chip at a time"
        lines.append(f"--config.accumulation={parts}: {fewer} where gradients are taken{norm}")
    if job.tx.sit is not None and config["sit"]["remat"] != "full":
        lines.append("--config.sit.remat=full: the SiT's blocks are computed again for gradients, a third more of its FLOP")
    if job.tx.vae is not None and not config["vae"]["remat"]:
        lines.append("--config.vae.remat=True: the VAE's blocks are computed again, a third more of its FLOP; it saves less")
    return [*lines, "more chips for the same batch, chips with more memory, or a smaller config.data.batch_size"]


def may_accumulate(config):
    """Whether the rules allow a config more micro-batches: not all losses can be had of a part of the batch."""
    try:
        recipe.make_recipe({**config, "accumulation": config["accumulation"] + 1})
    except ValueError:
        return False
    return True


def better_fsdp(job, state_bytes):
    """The least config.mesh.fsdp other than the job's with about the smallest state: at more, fewer arrays may divide.

    Args:
      job: Job.
      state_bytes: of a chip, as the job is.

    Returns:
      (fsdp, bytes of the state of a chip with it); (None, None) if none makes it smaller.
    """
    devices, slices = list(job.mesh.devices.flat), job.config["mesh"]["slices"]
    state, in_slice, sizes = build.abstract_state(job), len(devices) // slices, {}
    for fsdp in range(1, in_slice + 1):
        if in_slice % fsdp == 0 and fsdp != job.mesh.shape[sharding.FSDP]:
            sizes[fsdp] = _sharded_bytes(state, sharding.make_mesh(fsdp, devices, slices))
    near = SAME_SIZE * min(sizes.values(), default=math.inf)
    return next(((fsdp, size) for fsdp, size in sizes.items() if size <= near and SAME_SIZE * size < state_bytes), (None, None))


def _sharded_bytes(state, mesh):
    shardings = sharding.tree_sharding(mesh, state)
    return sum(jax.tree.leaves(jax.tree.map(_shard_bytes, state, shardings)))


# ---------------------------------------------------------------------------------------------------------------------
# Entry point.
# ---------------------------------------------------------------------------------------------------------------------


def _define_flags():
    cli.define_config()
    flags.DEFINE_multi_string("topology", None, "TPUs to compile for, CHIP:GRID such as v5e:4x4; may be given several times.")
    flags.DEFINE_bool("sample", False, "Plan sampling by config.sampling instead of training.")
    flags.DEFINE_integer(
        "images_per_chip", None, f"With --sample: images at a time and chip, default {IMAGES_PER_CHIP}.", lower_bound=1
    )
    cli.define_path("json", "File for the numbers of all topologies.")
    flags.mark_flag_as_required("topology")


def main(_):
    """Entry point; exit code 1 says that not everything fits."""
    options = flags.FLAGS
    _use_no_accelerator()
    with cli.ending():
        path = None if options.json is None else files.check_new("--json", options.json)
        if options.images_per_chip is not None and not options.sample:
            raise ValueError(
                f"--images_per_chip={options.images_per_chip} is for sampling: add --sample, or change config.data.batch_size"
            )
        images_per_chip = (options.images_per_chip or IMAGES_PER_CHIP) if options.sample else None
        settings = [prepare(options.config, name, images_per_chip)[1] for name in options.topology]  # mistakes first
        found = []
        for numbers in settings:
            found.append(plan_apart(options.config, numbers, images_per_chip))
            print("\n".join(lines_of(found[-1])) + "\n", flush=True)
            if path is not None:
                files.write_json(path, found, overwrite=bool(found[:-1]))
    sys.exit(not all(numbers["fits"] for numbers in found))


if __name__ == "__main__":
    cli.run(main, _define_flags)
