"""Runs in several processes for tests, started as the launch scripts do by hand."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import small

from configs import repae
from repae_jax import train
from repae_jax.distributed import multihost, stopping
from repae_jax.job import build, initial_state
from repae_jax.training import checkpoint, metric_log

ROOT = Path(__file__).parents[2]
CLOCK = {"time", *metric_log.SPEED_NAMES}
STEPS = 4


def config(file="ldm"):
    """Returns the config of the runs here: the quickest to compile, SiT alone on a frozen VAE; or REPA-E."""
    if file == "ldm":
        return small.tiny_run()
    changes = {"steps": STEPS, "checkpoint.every": 2, "checkpoint.keep_last": 2, "hooks.samples_every": 0}
    return small.config({**changes, "hooks.reconstructions_every": 0, "optim.sit.learning_rate": 2e-4}, repae)


# ---- what the processes run -----------------------------------------------------------------------------------------


def train_as_command(seconds_per_step=0, fail_at=None, min_sharded_size=None, stop_early=False):
    """`python -m repae_jax.train`, but slower, failing at a batch, sharding small parameters, or terminated from the start."""
    put, load, batches = train.sharding.put_batch, train.load_fid, []

    def slow_put(mesh, batch):
        batches.append(batch)
        if fail_at == len(batches):
            raise RuntimeError("the disk has gone\nand more")
        time.sleep(seconds_per_step if len(batches) > 2 else 0)  # the first two are for the latent statistics
        return put(mesh, batch)

    train.sharding.put_batch = slow_put

    def terminated_load(job):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)  # JAX looks every second
        return load(job)

    train.load_fid = terminated_load if stop_early else load
    train.sharding.MIN_SHARDED_SIZE = min_sharded_size or train.sharding.MIN_SHARDED_SIZE
    train.main()


def agree(coordinator, process, folder):
    """Calls `multihost` in all ways that need no training; prints the results as JSON."""
    multihost.start(False, coordinator, 2, process)
    multihost.SEEN_SECONDS = 1

    def error_of(call):
        try:
            call()
        except ValueError as error:
            return str(error)

    def alike(config=(), **replaced):
        before = {name: getattr(multihost, name) for name in replaced}
        for name, changes in replaced.items() if process else ():
            setattr(multihost, name, lambda name=name, changes=changes: {**before[name](), **changes})
        changed = {"seed": 0, "sit": {"depth": 2}, **(dict(config) if process else {})}
        error = error_of(lambda: multihost.assert_same_config(changed))
        for name, function in before.items():
            setattr(multihost, name, function)
        return error

    def restored():
        """Restores as if process 1 did not see the newest checkpoint in the list, as with a network file system."""
        every = checkpoint._Manager.all_steps
        if process:
            checkpoint._Manager.all_steps = lambda self, read=False: every(self, read)[:-1]
        with checkpoint.Checkpointer(Path(folder) / "run") as checkpointer:
            state, data_state, step = checkpointer.restore({"a": jax.ShapeDtypeStruct((2,), np.float32)}, {"seed": 0})
            return [np.asarray(state["a"]).tolist(), data_state, step, checkpointer.steps()]

    def number(count):
        multihost.distributed.global_state.num_processes = count if process else 2
        error = error_of(lambda: multihost.assert_same_config({}))
        multihost.distributed.global_state.num_processes = 2
        return error

    own = Path(folder) / str(process)
    own.mkdir()
    result = {
        "unsharded": multihost.all_gather({"process": process}),
        "first": multihost.broadcast_from_process_0(process),
        "same": alike(),
        "config": alike({"sit": {"depth": 3}, "extra": 1}),
        "version": alike(versions={"flax": "0.0.1"}),
        "code": alike(_sources={"repae_jax/train.py": "0"}),
        "data": error_of(lambda: multihost.assert_same(data={"records": "ab" if process else "cd", "frozen_vae": None})),
        "shared": error_of(lambda: multihost.check_shared(Path(folder))),
        "own": error_of(lambda: multihost.check_shared(own)),
        "number": number(3),
        "restored": restored(),
        "gathered_again": multihost.all_gather(process),
    }
    print(json.dumps(result))


def wait_for_each_other(coordinator, process, event):
    """A run without training, of ten minutes at most: in process 1, an error or a request to stop comes before it begins.

    JAX notices a killed process after five seconds, not HEARTBEAT_SECONDS.
    """
    multihost.HEARTBEAT_SECONDS = 5
    with multihost.abort_all_on_error():
        multihost.start(False, coordinator, 2, process)
        print("started", flush=True)
        if process and event == "error":
            raise RuntimeError("the disk has gone\nand more")
        if process and event == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # JAX looks every second
        multihost.all_gather(None)
        with stopping.stop_requests() as stopped:
            for step in range(600):
                if stopped():
                    sys.exit(75 + step)
                multihost.all_gather(step)
                time.sleep(1)


# ---- starting them --------------------------------------------------------------------------------------------------


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def launch(arguments, compiled, devices=1):
    """Popen of a Python process with its own devices."""
    env = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/distributed'}", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }  # fmt: skip
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Run:
    """The processes of one run; `scripts` are arguments for `train_as_command`, of all or of each."""

    def __init__(self, workdir, compiled, count=2, flags=(), scripts="", devices=1, file="ldm"):
        config_file = workdir.parent / f"{workdir.name}-config.py"
        config_file.write_text(f"import peers\ndef get_config():\n    return peers.config({file!r})\n")
        scripts = [scripts] * count if isinstance(scripts, str) else scripts
        flags = [flags] * count if isinstance(flags, tuple) else flags
        address = free_address()
        self.processes = []
        for index, (script, own) in enumerate(zip(scripts, flags)):
            by_hand = ["--coordinator", address, "--num_processes", count, "--process_id", index]
            arguments = ["-c", f"import peers; peers.train_as_command({script})", "--config", config_file]
            arguments += ["--workdir", workdir, *by_hand, *own]
            self.processes.append(launch(arguments, compiled, devices))

    def wait_for(self, start, process=0):
        """Until a line of the standard output starts so."""
        for line in self.processes[process].stdout:
            if line.startswith(start):
                return
        raise AssertionError(self.processes[process].communicate()[1][-3000:])

    def end(self, timeout=240):
        """[(exit code, standard output, standard error)]."""
        outputs = [process.communicate(timeout=timeout) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()


def finish(*args, **kwargs):
    """A run that ends well."""
    with Run(*args, **kwargs) as run:
        ended = run.end()
    assert [code for code, *_ in ended] == [0] * len(ended), [error[-3000:] for *_, error in ended]
    return ended


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def state_of(workdir, file="ldm"):
    job = build.build(config(file))
    with checkpoint.Checkpointer(workdir) as checkpointer:
        state, data_state, step = checkpointer.restore(initial_state.abstract_state(job), job.config)
    return jax.device_get(state), data_state, step
