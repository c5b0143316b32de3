"""Tests of launch/slurm.sh in a real SLURM cluster: a controller and two nodes on this machine, with two fake GPUs each.

Needs SLURM and MUNGE (apt-get install slurm-wlm munge), and may run as any user. Everything is in a folder of its own, on ports
of its own, and ends with the tests. What SLURM starts stands in for training, but in the last test.
"""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
import pytest
import small

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname().partition(".")[0]  # the first node's name, by which JAX finds process 0
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (apt-get install slurm-wlm munge)"),
]
CONFIG = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=low Nodes={nodes[0]},{nodes[1]} Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes={nodes[0]},{nodes[1]} PriorityTier=2 PreemptMode=OFF State=UP
"""
SAVES = "trap 'sleep 0.5; mkdir -p run/checkpoints/7; exit 75' TERM; touch begun-$SLURM_PROCID; while sleep 0.1; do :; done"
KILLED = "[ $SLURM_PROCID = 3 ] && kill -KILL $$; sleep 0.5; kill -ABRT $$"  # as JAX ends those that are left


def free_ports(count):
    servers = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


class Cluster:
    """SLURM in a folder, and a checkout of the scripts that it runs."""

    def __init__(self, folder):
        self.folder, self.nodes, self.daemons = folder, (HOST, f"{HOST}-z"), {}
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        for node in self.nodes:
            (folder / f"spool-{node}").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        values = {"folder": folder, "ports": free_ports(3), "nodes": self.nodes, "user": getpass.getuser(), "host": HOST}
        (folder / "slurm.conf").write_text(CONFIG.format(**values))
        (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null,/dev/zero\n")

    def __enter__(self):
        folder = self.folder
        files = [f"--{name}={folder}/munge.{name[:4]}" for name in ("pid-file", "log-file", "seed-file", "socket")]
        self.start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *files)
        self.wait(lambda: (folder / "munge.sock").exists())
        self.start("slurmctld", "-D")
        for node in self.nodes:
            self.start("slurmd", "-D", "-N", node)
        self.wait(lambda: self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split() == ["idle"] * 2)
        return self

    def start(self, *command):
        output = (self.folder / "daemons.log").open("a")
        self.daemons[command[-1]] = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        output.close()

    def call(self, *command):
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def wait(self, condition, seconds=60, job=None):
        end = time.monotonic() + seconds
        while not condition():
            logs = (f"{job.name}.log",) if job else ("daemons.log", "slurmctld.log")
            assert time.monotonic() < end, "\n".join((self.folder / name).read_text()[-3000:] for name in logs)
            time.sleep(0.1)

    def __exit__(self, *exception):
        self.call("scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full")
        self.call("scancel", f"--user={getpass.getuser()}")
        end = time.monotonic() + 20
        while self.call("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """Runs launch/slurm.sh with one or two processes on each of two nodes, whose behavior is set by the test."""

    def __init__(self, cluster, name, behavior, flags=("--config=c", "--workdir=run"), per_node=2):
        self.cluster, self.name = cluster, name
        self.behave(behavior)
        command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={name}.log", "--nodes=2", "--cpus-per-task=1"]
        command += [f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}", "launch/slurm.sh", *flags]
        self.number = cluster.call(*command).strip()
        assert self.number

    def behave(self, behavior):
        for begun in self.cluster.folder.glob("begun-*"):
            begun.unlink()
        (self.cluster.folder / "behavior").write_text(behavior)

    def shown(self, name):
        return re.search(rf"\b{name}=(\S+)", self.cluster.call("scontrol", "show", "job", self.number))[1]

    def log(self):
        return (self.cluster.folder / f"{self.name}.log").read_text()

    def wait_for(self, state, starts, seconds=120):
        """Waits until the job is in a state and has been requeued a number of times."""
        wanted = (state, str(starts))
        self.cluster.wait(lambda: (self.shown("JobState"), self.shown("Restarts")) == wanted, seconds, self)

    def wait_for_processes(self):
        begun = [self.cluster.folder / f"begun-{i}" for i in range(4)]
        self.cluster.wait(lambda: all(path.exists() for path in begun), job=self)

    def start_again(self, behavior):
        """Starts the job again, sooner than SLURM would, but not before its nodes have forgotten the last start."""
        self.behave(behavior)
        self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now+4")

    def signal(self, *options):
        self.cluster.call("scancel", *options, self.number)


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket must be short
    folder.chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints-newest.txt", ".venv/installed-cuda,data,torch"):
        (folder / name).touch()
    (folder / "launch").mkdir()
    for script in (ROOT / "launch").glob("*.sh"):
        shutil.copy(script, folder / "launch")
    python = folder / ".venv/bin/python"
    by_itself = f'[ "$1" != - ] || exec {sys.executable} "$@"\n[ "$2" != launch.gpu_flags ] || exit 0'
    python.write_text(f"#!/bin/bash\n{by_itself}\nsource {folder}/behavior\n")
    python.chmod(0o755)
    with Cluster(folder) as slurm:
        yield slurm


def test_job_goes_on_until_the_run_is_finished(cluster):
    """It continues after a killed process, the signal before the time limit, a preemption and a requeue by hand."""
    job = Job(cluster, "goes-on", KILLED)
    job.wait_for("PENDING", 1)
    assert "a process was killed, perhaps on a node that died, or for want of memory (exit code 137)" in job.log()
    assert "the newest checkpoint is that of step 0\n" in job.log()
    job.start_again(SAVES)
    job.wait_for_processes()
    job.signal("--batch", "--signal=USR1")
    job.wait_for("PENDING", 2)
    assert "the run is asked to stop, as the time limit is at 20" in job.log()
    assert "the newest checkpoint is that of step 7\n" in job.log()
    job.start_again(SAVES)
    job.wait_for_processes()
    cluster.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_for("PENDING", 3)
    job.start_again(SAVES)
    job.wait_for_processes()
    cluster.call("scontrol", "requeue", job.number)
    job.wait_for("PENDING", 4)
    job.start_again("exit 0")
    job.wait_for("COMPLETED", 4)
    assert not (cluster.folder / "runs/slurm" / job.number).exists()


def test_error_ends_the_job(cluster):
    job = Job(cluster, "error", "exit 1")
    job.wait_for("FAILED", 0)
    assert job.shown("ExitCode") == "1:0"
    assert "an error, which would come again (exit code 1): the job is not put back" in job.log()


def test_cancelled_job_saves_itself_and_stays_away(cluster):
    job = Job(cluster, "cancelled", SAVES)
    job.wait_for_processes()
    job.signal()
    job.wait_for("CANCELLED", 0)
    assert "Exited with exit code 75" in job.log()


@pytest.mark.slow
def test_grace_that_is_too_short(cluster):
    """SLURM looks at time limits every half minute."""
    job = Job(cluster, "late", SAVES.replace("sleep 0.5", "sleep 300"))
    job.wait_for_processes()
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    job.wait_for("PENDING", 1, 200)
    assert "the run has not ended half a minute before the time limit: ask it earlier, with sbatch --signal=B:" in job.log()
    job.start_again("exit 0")
    job.wait_for("COMPLETED", 1)


TRAINS = """
echo $$ >process-$SLURM_PROCID
ps -o ppid= $$ >stepd-$SLURM_PROCID
export JAX_COMPILATION_CACHE_DIR={compiled} PYTHONPATH={root}:{root}/tests:{root}/tests/distributed JAX_PLATFORMS=cpu
export XLA_FLAGS="$XLA_FLAGS --xla_force_host_platform_device_count=1"
exec {python} -c "import peers; peers.train_as_command({seconds})" --distributed "${{@:4}}"
"""


@pytest.mark.slow
def test_training_survives_what_ends_jobs_bit_for_bit(cluster, compiled, tmp_path):
    """The run survives the out-of-memory killer, a dying node and the signal before the time limit."""
    flags = ("--config.steps=8", "--config.checkpoint.every=2")
    peers.finish(tmp_path / "whole", compiled, flags=flags)
    trains = TRAINS.format(compiled=compiled, root=ROOT, python=sys.executable, seconds=2)
    workdir = tmp_path / "run"
    all_flags = (f"--config={tmp_path / 'whole-config.py'}", f"--workdir={workdir}", *flags)
    job = Job(cluster, "trains", trains, all_flags, per_node=1)

    def wait_for_checkpoint(step):
        cluster.wait(lambda: (workdir / f"checkpoints/{step}").exists(), 200, job)

    def kill(name):
        os.kill(int((cluster.folder / name).read_text()), signal.SIGKILL)

    wait_for_checkpoint(2)
    kill("process-1")
    job.wait_for("PENDING", 1, 200)
    assert "(exit code 137)" in job.log()
    job.start_again(trains)
    wait_for_checkpoint(4)
    cluster.daemons[cluster.nodes[1]].kill()
    for name in ("stepd-1", "process-1"):
        kill(name)
    cluster.wait(lambda: "(exit code 134)" in job.log(), 300, job)
    cluster.start("slurmd", "-D", "-N", cluster.nodes[1])  # otherwise SLURM waits until it takes the node for dead
    job.wait_for("PENDING", 2, 100)
    job.start_again(trains)
    wait_for_checkpoint(6)
    starts = int(job.shown("Restarts"))  # the node may have been told once more to end what it had forgotten
    job.signal("--batch", "--signal=USR1")
    job.wait_for("PENDING", starts + 1, 100)
    job.start_again(trains)
    job.wait_for("COMPLETED", starts + 1, 200)
    assert small.differing(*(peers.state_of(tmp_path / name)[0] for name in ("run", "whole"))) == []
    assert peers.metrics_of(workdir) == peers.metrics_of(tmp_path / "whole")
