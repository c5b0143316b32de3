"""Measures one GPU in a limited time: `python measurements/on_gpu.py --out results --seconds 540`.

Runs the stages of `STAGES` one after the other, in the order given, each in a process of its own that is killed at its limit,
and none after the time is over: the step, sampling and the kernels of the main sizes beside the roofline, the speed beside the
published code, the tests of the pure pieces, 1,000 steps of the quickstart. What is known is appended at once to
OUT/results.jsonl, a JSON object a line: {"stage": "step-f8d4-32", "sampling": …}; the last line of a stage has "ended", its
exit code or what ended it, and the end of its output if that is not 0. `--tiny` tries the script itself, on any device.

It needs no TensorFlow and no TensorBoard; packages that the machine lacks may be in a folder of PYTHONPATH.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from repae_jax import cli  # noqa: E402

SIZES = {"f8d4": "sit=XL/2,vae=f8d4", "f16d32": "sit=XL/1,vae=f16d32"}
GOAL = 1.5  # times the published step's images/s
LARGEST = 10  # kernels that are shown
STEPS = 30  # timed steps
SAMPLED, SAMPLING_STEPS = 64, 25  # images at a time; SDE steps, of the 250 that a published sample takes
PATIENCE = 5  # times the limits that `--tiny` has, as CPUs compile slowly
LEAST = 10  # seconds for which no stage is begun
TESTS = ("models", "losses", "diffusion", "metrics", "analysis", "test_train_step.py")
QUICKSTART_STEPS = 1000
Keep = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The time limit of a stage in seconds, and the function that runs it with options, a scratch folder and `keep`."""

    limit: float
    run: Callable[[argparse.Namespace, Path, Keep], None]


# ---- the step, sampling, kernels -------------------------------------------------------------------------------------


def step_stage(size: str, images: int, is_fast: bool = False) -> Callable[[argparse.Namespace, Path, Keep], None]:
    """Returns the stage that measures configs/repae.py in a size with so many images, with random weights.

    If is_fast, with the values for cards that have the memory, `compare_published.set_fast`.
    """

    def run(options, scratch, keep):
        import compare_published
        import jax

        from configs import repae
        from repae_jax.benchmark import measure
        from repae_jax.job import build, frozen_weights

        config = repae.get_config("tiny" if options.tiny else SIZES[size])
        config.data.batch_size = 8 if options.tiny else images
        if is_fast and not options.tiny:
            compare_published.set_fast(config)
        config, _ = measure.without_files(build.plain_config(config))
        job = build.build(config, jax.devices()[:1])
        frozen, key = frozen_weights.load_frozen(job), jax.random.key(config["seed"])
        state, batch = measure.random_state(job), measure.random_batch(job)
        compiled, seconds = measure.compile_step(job, state, batch, frozen, key)
        step = measure.Step(compiled, state, frozen, key)
        del state  # donated
        speed = measure.measure_step(job, step, batch, 3 if options.tiny else STEPS, None)
        about = {"images": config["data"]["batch_size"], "compile_seconds": seconds, "memory": measure.memory_of(compiled)}
        keep({"step": {**about, **speed}})
        sample_job(job, step.state, frozen, options, keep)
        measure.write_profile(step, batch, scratch)
        measured = kernel_seconds(read_trace(scratch), measure.PROFILED)
        keep({"kernels": beside_the_roofline(measured, compiled.as_text(), jax.devices()[0].device_kind)})

    return run


def sample_job(job: Any, state: Any, frozen: Mapping[str, Any], options: argparse.Namespace, keep: Keep) -> None:
    """Measures sampling in both precisions."""
    from repae_jax.benchmark import measure
    from repae_jax.diffusion.samplers import PRECISIONS

    for precision in PRECISIONS:
        steps = 2 if options.tiny else SAMPLING_STEPS
        sampling = dataclasses.replace(job.sampling, steps=steps, precision=precision)
        changed = dataclasses.replace(job, sampling=sampling)
        keep({"sampling": measure.measure_sampling(changed, state, frozen, 8 if options.tiny else SAMPLED)})


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Returns the events of the one trace that jax.profiler has written to a folder."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def kernel_seconds(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """Returns instructions of the compiled program -> seconds per step on the device, the longest first.

    GPUs have a line for each of their streams, whose events are kernels; on CPUs the events that name an instruction are its
    parts on all threads. A kernel that names none is listed under its own name.
    """
    lines = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    streams = {line for line, name in lines.items() if name.startswith("Stream")}
    seconds: dict[str, float] = collections.Counter()
    for event in events:
        on_stream = (event.get("pid"), event.get("tid")) in streams
        name = event.get("args", {}).get("hlo_op") or (event.get("name") if on_stream else None)
        if event.get("ph") == "X" and name and (on_stream or not streams):
            seconds[name] += event["dur"] / 1e6 / steps
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def beside_the_roofline(measured: Mapping[str, float], text: str, device_kind: str) -> dict[str, Any]:
    """Returns seconds of the whole step and of its largest kernels, measured and by the roofline, None where that knows none.

    Args:
      measured: result of `kernel_seconds`.
      text: the compiled program's.
      device_kind: JAX's name of the device.
    """
    from repae_jax.cost import chips, roofline

    chip = next((chip for chip in chips.CHIPS.values() if chip.kind == device_kind), None)
    prediction = roofline.analyze(text, chip) if chip else roofline.Roofline((), {}, 0)
    expected = {_plain(kernel.name): kernel for kernel in prediction.kernels}
    largest = []
    for name, seconds in list(measured.items())[:LARGEST]:
        kernel = expected.get(_plain(name))
        known = {} if kernel is None else {key: getattr(kernel, key) for key in ("kind", "part", "op_name", "bound", "times")}
        predicted = None if kernel is None else kernel.times * kernel.seconds
        largest.append({"name": name, "seconds": seconds, "roofline_seconds": predicted, **known})
    named = sum(seconds for name, seconds in measured.items() if _plain(name) in expected)
    return {
        "seconds": sum(measured.values()), "of_known_kernels": named, "roofline_seconds": prediction.seconds if chip else None,
        "by_bound": prediction.by_bound(), "largest": largest, "largest_of_roofline": prediction.numbers(LARGEST)["largest"],
    }  # fmt: skip


def _plain(name):
    """Returns an instruction's name as the kernel that is generated for it has it."""
    return re.sub(r"\W", "_", name)


# ---- beside the published code ---------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, scratch: Path, keep: Keep) -> None:
    """Times the published step and ours in turns; the goal is GOAL times its images/s."""
    import compare_published

    if options.published is None:
        raise SystemExit("--published is not given: nothing to compare with")
    command = ["--published", options.published, "--device", options.device, "--json", str(scratch / "compare.json")]
    sizes = ["conv"] if options.tiny else [SIZES["f8d4"], "--fast"]
    turns = ["--repeats", "1", "--steps", "1", "--batch", "2"] if options.tiny else ["--repeats", "3", "--steps", "10"]
    arguments = compare_published.parse_args([*command, "--sizes", *sizes, *turns])
    comparison = compare_published.run(arguments, say=lambda line: (print(line, flush=True), keep({"progress": line})))
    ratios = {size: result["ratio"]["median"] for size, result in comparison["sizes"].items()}
    keep({"compare": comparison, "goal": GOAL, "reached": {size: ratio >= GOAL for size, ratio in ratios.items()}})


# ---- tests -----------------------------------------------------------------------------------------------------------


def tests(options: argparse.Namespace, scratch: Path, keep: Keep) -> None:
    """Runs the unit tier of the pure pieces on the device; their tolerances hold, because products are computed exactly.

    REPAE_TEST_PLATFORM has JAX compute float32 products as float32, not TF32 (see tests/conftest.py).
    """
    report = scratch / "tests.xml"
    paths = ["losses"] if options.tiny else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not integration and not slow", "-p", "no:cacheprovider"]
    command += ["-n", str(min(8, os.cpu_count() or 1)), f"--junitxml={report}", *(f"tests/{path}" for path in paths)]
    environment = {"REPAE_TEST_PLATFORM": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    keep({"tests": numbers_of_tests(report)})
    if code:
        raise SystemExit(code)


def numbers_of_tests(report: Path) -> dict[str, Any]:
    """Returns how many tests passed, the names of the others, and the errors that they recorded, the largest first."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    errors = {
        f"{case.get('name')} {prop.get('name')}": float(prop.get("value", "nan"))
        for case in cases
        for prop in case.iter("property")
    }
    return {
        "passed": len(cases) - len(failed) - len(skipped), "failed": failed, "skipped": skipped,
        "largest_errors": dict(sorted(errors.items(), key=lambda item: -item[1])[:LARGEST]),
    }  # fmt: skip


# ---- the quickstart --------------------------------------------------------------------------------------------------


def quickstart(options: argparse.Namespace, scratch: Path, keep: Keep) -> None:
    """Trains the quickstart's encoder, then REPA-E on digits; the numbers are those of its summary."""
    from configs import repae
    from launch import pictures, small_networks
    from launch.quickstart import quickstart as digits
    from repae_jax.train import train

    encoder = small_networks.train_encoder(scratch / "encoder", pictures.digits())
    config = repae.get_config("digits")
    config.encoders.target.weights = str(scratch / "encoder")
    config.steps = 4 if options.tiny else QUICKSTART_STEPS
    config.log.trackers = ()
    if options.tiny:
        config.log.every = 1
    workdir = scratch / "run"
    train(config, workdir)
    keep({"quickstart": {**digits.training_numbers(workdir), "encoder_accuracy": encoder["accuracy"]}})


# ---- stages ----------------------------------------------------------------------------------------------------------

# limits, in seconds, of an H200 with 16 cores: compiling the step takes about a minute there
STAGES = {
    "step-f8d4-32": Stage(180, step_stage("f8d4", 32)),
    "compare": Stage(240, compare),
    "fast-f8d4-32": Stage(180, step_stage("f8d4", 32, is_fast=True)),
    "fast-f16d32-32": Stage(180, step_stage("f16d32", 32, is_fast=True)),
    "tests": Stage(150, tests),
    "quickstart": Stage(180, quickstart),
    "fast-f8d4-128": Stage(240, step_stage("f8d4", 128, is_fast=True)),
    "fast-f16d32-128": Stage(240, step_stage("f16d32", 128, is_fast=True)),
}


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Appends a JSON object to a file, whole, on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_apart(command: Sequence[str], limit: float, log: Path) -> tuple[int | str, float]:
    """Runs a command, and kills it and all that it started at the limit; returns (exit code or a text on that, seconds)."""
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"killed after {limit:.0f} s"
        finally:  # what the process has started, too; also after Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.monotonic() - began


def run(options: argparse.Namespace) -> bool:
    """Runs the stages in their order; returns whether all of them ended well."""
    options.out.mkdir(parents=True, exist_ok=True)
    results, deadline = options.out / "results.jsonl", time.monotonic() + options.seconds
    codes = []
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as scratch:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        for name in options.stages:
            left, folder = deadline - time.monotonic(), Path(scratch, name)
            if left < LEAST:
                append(results, {"stage": name, "ended": "not begun: the time is over"})
                codes.append("not begun")
                continue
            folder.mkdir()
            limit = min(left, STAGES[name].limit * (PATIENCE if options.tiny else 1))
            print(f"{name}, at most {limit:.0f} s …", flush=True)
            command = [sys.executable, __file__, *options.words, "--only", name, "--scratch", str(folder)]
            code, seconds = run_apart(command, limit, folder / "log")
            end = (folder / "log").read_text(errors="replace")[-3000:]
            append(results, {"stage": name, "ended": code, "took": seconds} | ({"output": end} if code else {}))
            print(f"  ended: {code}, {seconds:.0f} s" + (f"\n{end}" if code else ""), flush=True)
            codes.append(code)
    print(f"all numbers: {results}")
    return not any(codes)


def run_one(options: argparse.Namespace) -> None:
    """Runs one stage in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu" if options.device == "cpu" else "cuda,cpu"
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX takes one of them only
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", ".92")
    sys.path[:0] = [str(ROOT / "measurements")]

    def keep(values):
        append(options.out / "results.jsonl", {"stage": options.only, **values})

    STAGES[options.only].run(options, options.scratch, keep)


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line, and its words."""
    words = list(sys.argv[1:] if words is None else words)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="for results.jsonl, which is appended to")
    add("--seconds", type=cli.whole(1), default=540, help="for all stages; default %(default)s")
    add("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}")
    add("--published", metavar="FOLDER", help="checkout of End2End-Diffusion/REPA-E, for the stage compare")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    add("--tiny", action="store_true", help="toy sizes and few steps")
    add("--only", choices=tuple(STAGES), help=argparse.SUPPRESS)
    add("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.words = words
    return options


@cli.command(parse_args)
def main(options):
    """Entry point; exit code 1 says that a stage did not end well."""
    if options.only:
        run_one(options)
    elif not run(options):
        sys.exit(1)


if __name__ == "__main__":
    main()
