"""The miniature paper: REPA-E's comparisons at sizes that a laptop or one GPU manages.

`--scale small`, the default, is color emoji of 32 pixels on two CPU cores; `digits` is the smallest, `medium` is for a GPU.

A table is a list of settings, a setting is one run per seed, and tables share runs. Two runs at a time use one core each.
Tables beyond the paper, of what other work has found since, run if they are named, and have a part of the page to themselves.
Finished runs are kept and interrupted ones continued, so the same command can be repeated; a run whose config has changed is
another run, in a folder of its own. At the end, or when interrupted, a page with pictures is written from the finished runs.
"""

import argparse
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from launch import emoji
from launch.miniature import beyond, experiments, tables
from launch.miniature.scales import SCALES, Scale
from repae_jax import cli, files
from repae_jax.training import ownership

CACHE = "compiled"  # JAX's compilation cache, shared by all runs
POLL_SECONDS = 0.5
LOG_LINES = 15  # lines shown of a failed task's log
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
CACHE_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    beyond_paper = [_listing("beyond the paper, only where named", beyond.TABLES)] if beyond.TABLES else []
    parser = cli.Parser(
        description=__doc__,
        epilog="\n".join([_listing("tables of the paper", tables.TABLES), *beyond_paper]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=list(SCALES), default="small", help="default: %(default)s")
    parser.add_argument("--workdir", type=cli.path, help="default: runs/miniature/SCALE")
    parser.add_argument("--pictures", type=cli.path, help="folder of emoji; prepared there if absent; default: in the workdir")
    parser.add_argument(
        "--table", nargs="+", choices=list(experiments.TABLES), metavar="NAME", help="only these; default: the paper's"
    )
    parser.add_argument(
        "--seeds", type=cli.whole(1), help="runs of each setting; default: three, and six of digits' SiT, REPA and REPA-E"
    )
    parser.add_argument("--jobs", type=cli.whole(1, 4096), help="runs at a time; default: two on CPU cores, one on a GPU")
    parser.add_argument(
        "--results", type=cli.path, help="page to write; default: report/README.md in the workdir; pictures beside it"
    )
    parser.add_argument("--front", type=cli.path, help="PNG to draw, too: the headline for a front page")
    parser.add_argument("--report", action="store_true", help="run nothing: write the results of what is finished")
    parser.add_argument("--perform", type=Path, help=argparse.SUPPRESS)  # a task's folder: how the program calls itself
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.scale = SCALES[args.scale]
    args.workdir = Path(args.workdir or experiments.default_workdir(args.scale)).absolute()
    args.pictures = Path(args.pictures or experiments.pictures_folder(args.scale, args.workdir)).absolute()
    args.results = Path(args.results or args.workdir / "report" / "README.md")
    args.front = Path(args.front) if args.front else None
    on_cores = args.scale.platform == "cpu"
    args.jobs = args.jobs or (min(2, number_of_cores()) if on_cores else 1)
    if on_cores and args.jobs > number_of_cores():
        parser.error(f"--jobs {args.jobs}: every run takes a core, and there are {number_of_cores()}")
    return args


def _listing(title: str, listed: Mapping[str, tables.Table]) -> str:
    return "\n".join([f"{title}:", *(f"  {name:12} {table.title}" for name, table in listed.items())])


def number_of_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


@dataclasses.dataclass(frozen=True)
class Task:
    """A run, or the training of an encoder or the classifier."""

    name: str
    kind: str  # 'encoder', 'classifier', or a run's job
    folder: Path  # holds result.json when the task is done
    content: Mapping  # content of task.json; its 'description' is all that the result depends on
    needs: tuple[str, ...] = ()  # names of tasks that must be done before

    def result(self) -> dict[str, Any] | None:
        """Returns the content of result.json, None if there is none; ValueError if it is another task's."""
        path = self.folder / "result.json"
        result = files.read_json(path) if path.exists() else None
        if result and result["description"] != self.content["description"]:
            raise ValueError(f"{path} is the result of another task than {self.name}: move {self.folder} away")
        return result


def make_tasks(scale: Scale, runs: Sequence[experiments.Run], workdir: Path, images: Path) -> dict[str, Task]:
    """Returns name -> Task, in order, of the runs and of the encoders and the classifier that they need."""
    tasks: dict[str, Task] = {}

    def add(name, kind, folder, described, needs=(), **content):
        content |= {"kind": kind, "pictures": str(images), "description": {"scale": scale.name, **described}}
        tasks[name] = Task(name, kind, workdir / folder, content, tuple(needs))

    def add_encoder(quality):
        name, described = f"{quality} encoder", experiments.encoder_description(scale, quality)
        add(name, "encoder", experiments.encoder_folder(scale, quality), described, quality=quality)
        return name

    evaluation = ["classifier", add_encoder("trained")]
    add("classifier", "classifier", "classifier", experiments.classifier_description(scale))
    for run in runs:
        setting = experiments.SETTINGS[run.setting]
        config = experiments.config_of(scale, run, workdir, images)
        needs = [other.name for other in run.needs]
        if config.get("encoders"):
            needs.append(add_encoder(setting.encoder))
        described = experiments.description(scale, run)
        add(
            run.name, setting.job, experiments.folder_name(scale, run), described, [*needs, *evaluation],
            config=experiments.plain(config), trained=str(workdir / experiments.folder_name(scale, run.trained)),
            export=experiments.is_source(run),
            classifier=str(workdir / "classifier" / "classifier.safetensors"),
            encoder=str(workdir / experiments.encoder_folder(scale, "trained")),
        )  # fmt: skip
    return tasks


def unused_results(workdir: Path, tasks: Mapping[str, Task]) -> list[Path]:
    """Returns folders of finished runs with the name and seed of one of the tasks, but another description."""
    used = {task.folder.name for task in tasks.values()}
    known = {task.folder.name.rpartition("-")[0] for task in tasks.values() if task.kind in experiments.PRESETS}
    finished = sorted(path.parent for path in workdir.glob("*/result.json"))
    return [folder for folder in finished if folder.name not in used and folder.name.rpartition("-")[0] in known]


def start_task(task: Task, core: int) -> subprocess.Popen:
    """Starts a process that does the task on one core; its output goes to log.txt in the task's folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(task.folder / "task.json", task.content, overwrite=True)
    platform = SCALES[task.content["description"]["scale"]].platform
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(task.folder.parent / CACHE), **CACHE_ALL}
    if platform == "cpu":
        environment |= {**ONE_THREAD, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "launch.miniature.miniature", "--perform", str(task.folder)]
    if platform == "cpu":
        command += ["--core", str(core)]
    with (task.folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def perform_all(
    tasks: Mapping[str, Task], jobs: int, start: Callable = start_task, report: Callable[[str], None] = print
) -> dict[str, str]:
    """Does all tasks (name -> Task) without a result, `jobs` at a time; a task that fails does not stop the others.

    Returns name -> why a task has no result: 'failed', or 'needs X'. KeyboardInterrupt comes after all processes, which
    `start(task, core)` returns, were asked to save and have ended. `report` is called with lines of progress.
    """
    results = {name: task.result() for name, task in tasks.items()}
    waiting = {name: task for name, task in tasks.items() if not results[name]}
    undone, running = {}, {}  # slot -> (Task, process)
    report(f"{len(tasks)} tasks, {len(tasks) - len(waiting)} of them done before")
    try:
        while waiting or running:
            for slot, (task, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                result = results[task.name] = task.result()
                if not result:
                    undone[task.name] = f"failed, see {task.folder / 'log.txt'}"
                minutes = remaining(tasks, results, waiting, [task.name for task, _ in running.values()]) / jobs / 60
                left = f", about {minutes:.0f} min left" if minutes else ""
                how = outcome(result) if result else undone[task.name]
                report(f"[{sum(map(bool, results.values()))}/{len(tasks)}] {task.name}: {how}{left}")
            diverged = {name for name, result in results.items() if result and result["status"] != "done"}
            for name, task in list(waiting.items()):
                missing = next((need for need in task.needs if need in {*undone, *diverged}), None)
                if missing:  # no other run can start from one that diverged
                    del waiting[name]
                    undone[name] = f"needs {missing}"
                    report(f"{name}: left out, {undone[name]}")
                elif len(running) < jobs and all(results[need] for need in task.needs):
                    del waiting[name]
                    slot = min(set(range(jobs)) - set(running))
                    running[slot] = task, start(task, slot)
            if running:
                time.sleep(POLL_SECONDS)
    except BaseException:
        for _, process in running.values():
            process.terminate()
        for task, process in running.values():
            process.wait()
            report(f"{task.name}: stopped; it will be continued")
        raise
    return undone


def outcome(result: Mapping[str, Any]) -> str:
    """Describes how a task has ended."""
    fid = result["numbers"].get("fid")
    number = "" if fid is None else f", Frechet distance {fid:.1f}"
    return f"{result['status']} in {result['seconds']:.0f} s{number}"


def remaining(tasks: Mapping[str, Task], results: Mapping[str, Any], waiting: Iterable[str], running: Iterable[str]) -> float:
    """Estimates seconds of work left: running tasks count half, and a kind of which none is finished as the longest kind."""
    seconds = {}  # kind -> of the tasks done
    for name in filter(results.get, results):
        seconds.setdefault(tasks[name].kind, []).append(results[name]["seconds"])
    means = {kind: statistics.mean(values) for kind, values in seconds.items()}
    expected = {name: means.get(tasks[name].kind, max(means.values(), default=0)) for name in (*waiting, *running)}
    return sum(expected[name] for name in waiting) + sum(expected[name] / 2 for name in running)


def perform(folder: Path, core: int | None) -> int:
    """Does a task in this process; returns the exit status."""
    if core is not None and hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    from launch.miniature import run  # imports JAX, whose threads inherit the core

    return 0 if run.perform(folder) else 1


def check_platform(scale: Scale) -> None:
    """Raises ValueError if the scale is for an accelerator and JAX finds none; another process asks, which frees it again."""
    if scale.platform == "cpu":
        return
    asked = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True)
    if asked.returncode or asked.stdout.split()[-1:] == ["cpu"]:
        said = asked.stderr.strip().splitlines()[-1:] if asked.returncode else ["JAX finds CPUs alone"]
        raise ValueError(
            f"scale {scale.name!r} is for a GPU or TPU: {''.join(said)}. Install jax with its plugin (pip install -e .[cuda]), "
            "or choose --scale small"
        )


@cli.command(parse_args)
def main(args: argparse.Namespace) -> int:
    """Runs what is not done yet, then writes the results; returns the exit status."""
    if args.perform:
        return perform(args.perform, args.core)
    from launch.miniature import report

    scale, workdir = args.scale, args.workdir
    runs = experiments.runs_of(scale, args.table or tables.TABLES, args.seeds)
    if not args.report:
        check_platform(scale)
    workdir.mkdir(parents=True, exist_ok=True)
    if scale.pictures == "emoji" and not args.report:
        emoji.prepare(args.pictures, scale.image_size)
    undone, interrupted = {}, False
    every_run = experiments.runs_of(scale, experiments.TABLES, args.seeds)
    tasks, every = (make_tasks(scale, some, workdir, args.pictures) for some in (runs, every_run))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for folder in unused_results(workdir, every):
            print(f"not used, because the config of its run has changed: {folder}")
        if not args.report:
            jax.config.update("jax_platforms", "cpu")  # here: a GPU is for the tasks
            with ownership.owned(epath.Path(workdir)):
                undone = perform_all(tasks, args.jobs, report=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        interrupted = True
    for name in undone:
        log = tasks[name].folder / "log.txt"
        if undone[name].startswith("failed") and log.exists():
            print(f"--- {name}, {log}:", *log.read_text().splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
    finished = any(task.result() for task in every.values() if task.kind in experiments.PRESETS)
    if finished:
        report.write(args.results, scale, every, args.front)
        print(args.results)
    else:
        print(f"no run is finished in {workdir}: no page is written", file=sys.stderr)
    if interrupted:
        print("interrupted; run the same command to continue", file=sys.stderr)
    return 130 if interrupted else int(bool(undone) or not finished)


if __name__ == "__main__":
    sys.exit(main())
