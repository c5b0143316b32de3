"""Speed of any config: `python -m repae_jax.benchmark --config configs/repae.py`.

Times the training step on random images that are on the devices already, its parts one by one, and sampling; with --input also
the config's data. Weights that are trained are random; frozen ones, too, unless their files are on this machine, which changes
no speed. In several processes it is the same command with --distributed, as for training; process 0 prints and writes.
"""

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from repae_jax import cli, faults, files
from repae_jax.benchmark import measure
from repae_jax.distributed import multihost
from repae_jax.evaluation.hooks import fid_batch
from repae_jax.job import build, compilation, frozen_weights

STEPS = 50
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "NCCL_")  # prefixes of variables that change speed
Result = dict[str, Any]  # for JSON


def benchmark(
    config: Any, steps: int = STEPS, sample_batch: int | None = None, with_input: bool = False,
    profile: Path | str | None = None, say: Callable[[str], None] = print,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:  # fmt: skip
    """Measures a ConfigDict or nested dict; returns the numbers as JSON can hold them.

    Args:
      steps: timed steps, calls of each part, and batches of the input.
      sample_batch: images sampled at a time, over all devices; 0 is no sampling, None as many as a FID takes.
      with_input: measure the config's data, too.
      profile: folder for a trace of a few steps.
      say: called with lines of progress.
      keep: called with all results so far after each measurement: later ones may fail.
    """
    config = build.plain_config(config)
    multihost.assert_same_config(config)
    config, random = measure.without_files(config)
    job = build.build(config)
    compilation.check_compiler_options(job)
    sample_batch = _check_sample_batch(job, sample_batch)
    say(f"random weights: {', '.join(random) or 'none but of what is trained'}")
    result = {**_circumstances(job), "random_weights": random}

    say("compiling the step …")
    with _room(job):
        frozen, key = frozen_weights.load_frozen(job), jax.random.key(config["seed"])
        step, batch, result["step"] = _measure_step(job, frozen, key, steps, say)
    say(step_line(result))
    keep(result)
    if profile is not None:
        measure.write_profile(step, batch, profile)
        say(f"trace of {measure.PROFILED} steps: {profile}; to see it: pip install xprof && xprof --logdir {profile}")
    if with_input:
        result["input"] = measure.measure_input(job, step, frozen, steps)
        say(input_line(result["input"]))
        keep(result)
    state = step.state
    if job.sampling is not None and sample_batch:
        say(f"sampling {sample_batch} images …")
        result["sampling"] = measure.measure_sampling(job, state, frozen, sample_batch)
        say(sampling_line(result["sampling"]))
        keep(result)
    del step
    of_joint = " of those that train the VAE, each as often as steps have it" * (len(job.variants) > 1)
    say(f"parts of the step{of_joint}, each alone; they need not add up to it:")
    seconds = result["step"]["seconds_per_step"]["median"]
    result["parts"] = {}
    for name, part in measure.measure_parts(job, state, frozen, steps, seconds):
        result["parts"][name] = part
        say(part_line(name, part))
        keep(result)
    return result


def _measure_step(job, frozen, key, steps, say):
    """Compiles and times the step; returns it with the state it carries on, its batch, and the numbers."""
    state, batch = measure.random_state(job), measure.random_batch(job)
    compiled = [measure.compile_step(variant, state, batch, frozen, key) for variant, _ in job.variants]
    programs, compile_seconds = [program for program, _ in compiled], sum(seconds for _, seconds in compiled)
    step = measure.Step(measure.in_turn(job, programs), state, frozen, key)
    del state  # donated
    say(f"compiled in {compile_seconds:.0f} s")
    speed = measure.measure_step(job, step, batch, steps, "steps" if jax.process_index() == 0 else None)
    return step, batch, {**speed, "compile_seconds": compile_seconds, "memory": measure.memory_of(programs[0])}


def _check_sample_batch(job, sample_batch):
    if sample_batch != 0 and job.sampling is not None and job.sampling.method.adaptive:
        takes = "takes as many steps as weights need, and these may be random"
        raise ValueError(f"config.sampling.sampler={job.sampling.sampler!r} {takes}: choose another, or --sample_batch=0")
    if sample_batch is None:
        return fid_batch(job)
    if sample_batch and job.sampling is None:
        raise ValueError(f"--sample_batch={sample_batch}: config.job={job.config['job']!r} has no SiT to sample with")
    if sample_batch % job.mesh.size:
        raise ValueError(f"--sample_batch={sample_batch} is not a multiple of the {job.mesh.size} devices")
    return sample_batch


@contextlib.contextmanager
def _room(job):
    """Context in which running out of memory becomes a ValueError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not faults.is_out_of_memory(str(error)):
            raise
        raise ValueError(
            f"the step does not fit into memory with config.data.batch_size={job.config['data']['batch_size']} on "
            f"{job.mesh.size} devices ({str(error).splitlines()[0]}): lower it, raise config.accumulation or config.mesh.fsdp, "
            "or recompute more, config.sit.remat='full' and config.vae.remat=True"
        ) from error


def _circumstances(job):
    """Returns the circumstances that the numbers depend on."""
    device, batch_size = job.mesh.devices.flat[0], job.config["data"]["batch_size"]
    peak = measure.peak_of(job)
    return {
        "job": job.config["job"], "batch_size": batch_size, "batch_size_per_device": batch_size // job.mesh.size,
        "precision": job.config["precision"],
        "devices": {
            "kind": device.device_kind, "platform": device.platform, "count": job.mesh.size, "processes": jax.process_count(),
            "mesh": dict(job.mesh.shape), "peak_tflops": None if peak is None else peak / 1e12,
        },
        "versions": {**multihost.versions(), "platform": device.client.platform_version},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)},
        "compilation_cache": jax.config.jax_compilation_cache_dir,
        "compiler_options": compilation.compiler_options(job), "arguments": sys.argv[1:], "config": job.config,
    }  # fmt: skip


def _milliseconds(seconds):
    return f"{1e3 * seconds['median']:.4g} ms ({1e3 * seconds['p10']:.4g} to {1e3 * seconds['p90']:.4g})"


def _arithmetic(speed):
    mfu = f", {100 * speed['mfu']:.1f} % of the peak" if speed.get("mfu") else ""
    return f"{speed['tflops_per_device']:.3g} TFLOP/s per device{mfu}"


def step_line(result: Result) -> str:
    """Returns a line on the step's speed and memory."""
    step, devices = result["step"], result["devices"]
    peak = "" if devices["peak_tflops"] else f" (the peak of {devices['kind']!r} is not known: no MFU)"
    measured, compiled = step["memory"]["peak_bytes_in_use"], step["memory"]["compiled"] or {}
    used = measured or compiled.get("total")
    memory = "" if used is None else f"; memory {used / 2**30:.2f} GiB per device{'' if measured else ' as compiled'}"
    return (
        f"step {_milliseconds(step['seconds_per_step'])}: {step['images_per_second']:.4g} img/s on {devices['count']} "
        f"devices, {step['images_per_second_per_device']:.4g} on each; {_arithmetic(step)}{peak}{memory}"
    )


def part_line(name: str, part: Mapping[str, Any]) -> str:
    """Returns a line on the speed of a part."""
    if "failed" in part:
        return f"  {name:20} {part['failed']}"
    speed = f"  {_arithmetic(part)}" if "tflops_per_device" in part else ""
    return f"  {name:20} {_milliseconds(part['seconds_per_step'])}  {100 * part['share_of_step']:.0f} % of the step{speed}"


def sampling_line(sampling: Mapping[str, Any]) -> str:
    """Returns a line on the speed of sampling."""
    if "failed" in sampling:
        return f"sampling {sampling['failed']}: lower --sample_batch={sampling['batch_size']}"
    return (
        f"sampling {sampling['images_per_second']:.4g} img/s with {sampling['sampler']}, {sampling['steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}, {sampling['batch_size']} at a time, in {sampling['precision']}"
    )


def input_line(speed: Mapping[str, Any]) -> str:
    """Returns a line on the speed of the input."""
    if "skipped" in speed:
        return f"input skipped: {speed['skipped']}"
    fed = speed["with_step"]
    return (
        f"input {speed['images_per_second']:.4g} img/s alone, with {speed['workers']} workers in each of {speed['processes']} "
        f"processes; the step fed by it {fed['images_per_second']:.4g} img/s, waiting {100 * fed['input_wait']:.0f} % of the "
        "time"
    )


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.ConfigParser(description=__doc__.split("\n\n")[0])
    timed = "steps that are timed, after a few that are not (default: %(default)s)"
    parser.add_argument("--steps", type=cli.whole(1), default=STEPS, help=timed)
    parser.add_argument("--out", type=cli.path, help="JSON file for all numbers and what they depend on; must not exist")
    parser.add_argument("--profile", type=cli.path, help="folder for a trace of a few steps")
    sampled = "images to sample at a time, over all devices; 0 is none, default 64 or a little more"
    parser.add_argument("--sample_batch", type=cli.whole(0), help=sampled)
    data = "measure the config's data, too: the loader alone, and the step fed by it"
    parser.add_argument("--input", action="store_true", help=data)
    cli.add_processes(parser)
    return parser.parse_args(argv)


def check_places(out: str | None, profile: Path | str | None) -> Any:
    """Returns the path of the result, or None, and makes the folder of the trace; ValueError for a wrong path."""
    if profile is not None:
        Path(profile).mkdir(parents=True, exist_ok=True)
    return None if out is None else files.check_new("--out", out)


def keeper(path: Any) -> Callable[[Result], None]:
    """Returns a function that writes the latest results to a file, new at the first call; for None, one that does nothing."""
    count = itertools.count()

    def keep(result):
        if path is not None:
            files.write_json(path, result, overwrite=next(count) > 0)

    return keep


@cli.command(parse_args)
def main(args):
    """Entry point."""
    first = jax.process_index() == 0
    path = check_places(args.out, args.profile) if first else None
    say = functools.partial(print, flush=True) if first else (lambda line: None)
    benchmark(args.config, args.steps, args.sample_batch, args.input, args.profile, say, keeper(path))
    if path is not None:
        print(f"all numbers: {args.out}")


if __name__ == "__main__":
    main()
