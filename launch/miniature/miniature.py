"""The miniature paper: REPA-E's comparisons on scikit-learn's digits, small enough for two CPU cores.

A table is a list of settings, a setting is one run per seed, and tables share runs. Two runs at a time use one core each.
Finished runs are kept and interrupted ones continued, so the same command can be repeated; a run whose config has changed is
another run, in a folder of its own. At the end, or when interrupted, RESULTS.md is written from the finished runs.
"""

import argparse
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch.miniature import tables
from launch.quickstart import digits_models
from repae_jax import cli, files

CACHE = "compiled"  # JAX's compilation cache, shared by all runs
POLL_SECONDS = 0.5
LOG_LINES = 15  # lines shown of a failed task's log
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def parse_args(argv=None):
    """Parses the command line."""
    parser = cli.Parser(
        description=__doc__,
        epilog="tables:\n" + "\n".join(f"  {name:12} {table.title}" for name, table in tables.TABLES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=cli.path, default="runs/miniature", help="default: %(default)s")
    parser.add_argument("--table", nargs="+", choices=list(tables.TABLES), metavar="NAME", help="only these; default: all")
    parser.add_argument("--seeds", type=cli.whole(1), help="runs of each setting; default: three, of the collapse two")
    parser.add_argument(
        "--jobs", type=cli.whole(1, 4096), default=min(2, os.cpu_count()), help="runs at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=cli.path, default="docs/miniature/RESULTS.md", help="default: %(default)s; pictures beside it"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: write the results of what is finished")
    parser.add_argument("--perform", type=Path, help=argparse.SUPPRESS)  # a task's folder: how the program calls itself
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.workdir, args.results = Path(args.workdir), Path(args.results)
    return args


@dataclasses.dataclass(frozen=True)
class Task:
    """A run, or the training of an encoder or the classifier."""

    name: str
    kind: str  # 'encoder', 'classifier', or a run's job
    folder: Path  # holds result.json when the task is done
    content: Mapping  # content of task.json; its 'description' is all that the result depends on
    needs: tuple[str, ...] = ()  # names of tasks that must be done before

    def result(self):
        """Returns the content of result.json, None if there is none; ValueError if it is another task's."""
        path = self.folder / "result.json"
        result = files.read_json(path) if path.exists() else None
        if result and result["description"] != self.content["description"]:
            raise ValueError(f"{path} is the result of another task than {self.name}: move {self.folder} away")
        return result


def make_tasks(runs, workdir):
    """Returns name -> Task, in order, of the runs and of the encoders and the classifier that they need."""
    tasks, needs_classifier = {}, any(tables.SETTINGS[run.setting].network for run in runs)

    def add(name, kind, folder, **described):
        tasks[name] = Task(name, kind, workdir / folder, {"kind": kind, **described, "description": described})

    for run in runs:
        setting = tables.SETTINGS[run.setting]
        config = tables.config_of(run, workdir)
        needs = [run.source.name] if run.source else []
        image_size = config.data.image_size
        if needs_classifier and "classifier" not in tasks:
            add("classifier", "classifier", "classifier", steps=digits_models.CLASSIFIER_STEPS, image_size=image_size)
        if setting.network:
            needs.append("classifier")
        steps = tables.ENCODERS[setting.encoder]
        if steps and config.encoders:
            needs.append(f"{setting.encoder} encoder")
            add(needs[-1], "encoder", tables.encoder_folder(setting.encoder), steps=steps, image_size=image_size)
        content = {
            "kind": setting.job,
            "description": tables.description(run),
            "config": tables.plain(config),
            "export": tables.is_source(run),
            "classifier": str(workdir / "classifier" / "classifier.safetensors"),
        }
        tasks[run.name] = Task(run.name, setting.job, workdir / tables.folder_name(run), content, tuple(needs))
    return tasks


def unused_results(workdir, tasks):
    """Returns folders of finished runs with the name and seed of one of the tasks, but another description."""
    used = {task.folder.name for task in tasks.values()}
    known = {task.folder.name.rpartition("-")[0] for task in tasks.values() if task.kind in tables.PRESETS}
    finished = sorted(path.parent for path in workdir.glob("*/result.json"))
    return [folder for folder in finished if folder.name not in used and folder.name.rpartition("-")[0] in known]


def start_task(task, core):
    """Starts a process that does the task on one core; its output goes to log.txt in the task's folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(task.folder / "task.json", task.content, overwrite=True)
    environment = {**os.environ, **ONE_THREAD, "JAX_COMPILATION_CACHE_DIR": str(task.folder.parent / CACHE)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "launch.miniature.miniature", "--perform", str(task.folder), "--core", str(core)]
    with (task.folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def perform_all(tasks, jobs, start=start_task, report=print):
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


def outcome(result):
    """Describes how a task has ended."""
    fid = result["numbers"].get("fid")
    number = "" if fid is None else f", Frechet distance {fid:.1f}"
    return f"{result['status']} in {result['seconds']:.0f} s{number}"


def remaining(tasks, results, waiting, running):
    """Estimates seconds of work left: running tasks count half, and a kind of which none is finished as the longest kind."""
    seconds = {}  # kind -> of the tasks done
    for name in filter(results.get, results):
        seconds.setdefault(tasks[name].kind, []).append(results[name]["seconds"])
    means = {kind: statistics.mean(values) for kind, values in seconds.items()}
    expected = {name: means.get(tasks[name].kind, max(means.values(), default=0)) for name in (*waiting, *running)}
    return sum(expected[name] for name in waiting) + sum(expected[name] / 2 for name in running)


def perform(folder, core):
    """Does a task in this process; returns the exit status."""
    if core is not None and hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    from launch.miniature import run  # imports JAX, whose threads inherit the core

    return 0 if run.perform(folder) else 1


@cli.command(parse_args)
def main(args):
    """Runs what is not done yet, then writes the results; returns the exit status."""
    if args.perform:
        return perform(args.perform, args.core)
    from launch.miniature import report

    runs = tables.runs_of(args.table or tables.TABLES, args.seeds)
    workdir = args.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    undone, interrupted = {}, False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        tasks, every = (make_tasks(some, workdir) for some in (runs, tables.runs_of(tables.TABLES, args.seeds)))
        for folder in unused_results(workdir, every):
            print(f"not used, because the config of its run has changed: {folder}")
        if not args.report:
            undone = perform_all(tasks, args.jobs, report=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        interrupted = True
    for name in undone:
        log = tasks[name].folder / "log.txt"
        if undone[name].startswith("failed") and log.exists():
            print(f"--- {name}, {log}:", *log.read_text().splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
    if any(workdir.glob("*/result.json")) or not args.results.exists():
        report.write(args.results, every, args.seeds)
        print(args.results)
    else:
        print(f"no run is finished: {args.results} is left as it is", file=sys.stderr)
    if interrupted:
        print("interrupted; run the same command to continue", file=sys.stderr)
    return 130 if interrupted else bool(undone)


if __name__ == "__main__":
    sys.exit(main())
