"""The launchers against stubs that record how gcloud, kubectl, srun, … are called."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jax_internals import private
from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as job_set

pytestmark = pytest.mark.integration

LAUNCH = Path(__file__).parents[2] / "launch"
CONSTRAINTS = ["constraints.txt", "constraints-newest.txt"]
SCRIPTS = ["tpu_pod.sh", "gke_jobset.sh", "slurm.sh", "multi_gpu.sh"]
HARD = [
    "--config",
    "configs/repae.py:sit=B/1,vae=f16d32",
    "--workdir=gs://bucket/a run",
    "--config.lpips.input_range=(0.,1.)",
    """--config.note=it's "a $HOME" `ls` \\ & ; * ~ # !""",
    "--config.lines=one\ntwo\tthree",
    "--config.empty=",
    "",
]
POD = {
    "NAME": "pod",
    "PROJECT": "project",
    "ZONE": "us-west4-a",
    "ACCELERATOR_TYPE": "v5litepod-64",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "POLL_SECONDS": "0",
}
WHERE = ["--project=project", "--zone=us-west4-a"]
JOBSET = {"NAME": "run", "IMAGE": "host/repae:1", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "8x8"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
STUB = """#!{python} -IS
import json, os, sys
if sys.argv[1:] == ["-m", "launch.gpu_flags"]:
    sys.exit(print("export XLA_FLAGS='--for --gpus'"))
with open({calls!r}, "a") as file:
    name, ids = os.path.basename(sys.argv[0]), os.environ.get("JAX_LOCAL_DEVICE_IDS")
    file.write(json.dumps({{"name": name, "argv": sys.argv[1:], "ids": ids, "flags": os.environ.get("XLA_FLAGS")}}) + "\\n")
behavior = os.path.join({folder!r}, name)
if os.path.exists(behavior):
    os.execv({bash!r}, ["bash", behavior, *sys.argv[1:]])
"""


class Place:
    """A checkout of the scripts, a worker's home folder, and stubs that record their arguments."""

    def __init__(self, root):
        self.root, self.home, self.calls_file = root / "checkout", root / "home", root / "calls"
        self.stubs, self.behaviors = root / "stubs", root / "behaviors"
        for folder in (self.root / "launch", self.home, self.stubs, self.behaviors):
            folder.mkdir(parents=True)
        for script in LAUNCH.glob("*.sh"):
            shutil.copy(script, self.root / "launch")
        for name in ("pyproject.toml", *CONSTRAINTS):
            (self.root / name).touch()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "uv"):
            self.stub(self.stubs / name)
        (self.root / ".gitignore").write_text(".venv/\nruns/\n")
        self.install(self.root, "cuda,data,torch")

    def stub(self, path):
        options = {"python": sys.executable, "calls": str(self.calls_file), "folder": str(self.behaviors)}
        path.write_text(STUB.format(bash=shutil.which("bash"), **options))
        path.chmod(0o755)

    def install(self, folder, extra):
        """Makes a virtual environment that launch/environment.sh considers complete."""
        (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
        self.stub(folder / ".venv/bin/python")
        (folder / f".venv/installed-{extra}").touch()

    def behave(self, name, code):
        """Sets what a stub does besides recording: bash code that sees its arguments."""
        (self.behaviors / name).write_text(code)

    def states(self, queue, node="READY"):
        """Sets the states that gcloud reports one after the other; the last one is repeated."""
        (self.behaviors / "queue").write_text("\n".join(queue) + "\n")
        (self.behaviors / "node").write_text(f"{node}\n")
        self.behave(
            "gcloud",
            f"cd {self.behaviors}\n"
            'case "$*" in\n'
            "*queued-resources\\ list*) file=queue ;;\n"
            "*tpu-vm\\ list*) file=node ;;\n"
            "*queued-resources\\ create*) echo ACTIVE >queue; echo READY >node; exit ;;\n"
            "*tpu_worker.sh\\ status*) cat answers && exit ;;\n"
            "*) exit 0 ;;\n"
            "esac\n"
            'head -n 1 $file\n[ "$(wc -l <$file)" -eq 1 ] || sed -i 1d $file\n',
        )

    def answer(self, *states):
        """Sets the states of the run that workers report."""
        (self.behaviors / "answers").write_text("".join(f"host-{i}: {state}\n" for i, state in enumerate(states)))

    def environment(self, settings):
        return {"PATH": f"{self.stubs}:{os.environ['PATH']}", "HOME": str(self.home), **settings}

    def bash(self, *arguments, cwd=None, **settings):
        options = {"capture_output": True, "text": True, "timeout": 100, "stdin": subprocess.DEVNULL}
        return subprocess.run(
            ["bash", *arguments], cwd=cwd or self.root, env=self.environment(settings), check=False, **options
        )

    def launch(self, script, *arguments, **settings):
        """Runs a script that must succeed; returns its output."""
        done = self.bash(f"launch/{script}", *arguments, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, script, *arguments, **settings):
        """Runs a script that must fail with one line before anything is called; returns that line."""
        done = self.bash(f"launch/{script}", *arguments, **settings)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert self.calls() == []
        return done.stderr

    def calls(self, *names):
        """Returns the argument lists recorded since the last call, of the named stubs or of all."""
        if not self.calls_file.exists():
            return []
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        self.calls_file.unlink()
        return [call["argv"] for call in calls if not names or call["name"] in names]

    def commit(self):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
            subprocess.run([*git, *arguments], cwd=self.root, env=self.environment({}), check=True)
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=self.root, capture_output=True, text=True, check=True)
        return shown.stdout.strip()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def on_worker(place, call, **settings):
    """Runs what gcloud was asked to run over ssh, as a worker's shell would."""
    command = call[-1].removeprefix("--command=")
    assert command != call[-1]
    return place.bash("-c", command, cwd=place.home, **settings)


def wait_for(path, seconds=100):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(place, script):
    shown = place.launch(script, "--help")
    assert "usage: " in shown and "--dry-run" in shown and "#" not in shown
    assert place.calls() == []


def test_scripts_are_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    options = ["--external-sources", "--shell=bash", "--exclude=SC1091"]  # `source "$(dirname "$0")/environment.sh"`
    subprocess.run(["shellcheck", *options, *LAUNCH.glob("*.sh")], cwd=LAUNCH.parent, check=True)


@pytest.mark.parametrize("installer", ["uv", "pip"])
@pytest.mark.parametrize(("python", "constraints"), list(zip(["python3.11", "python3.12"], CONSTRAINTS)))
def test_requirements_are_installed_once_per_change(place, installer, python, constraints):
    """It is done by uv where that is available; in the other case the PATH holds only the tools that environment.sh calls."""
    (place.root / ".venv/lib" / python).mkdir(parents=True)
    folder = place.root.parent / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "touch"):
        (folder / name).symlink_to(shutil.which(name))
    path = f"{place.stubs}:{folder}" if installer == "uv" else str(folder)

    def install():
        done = place.bash("-c", "source launch/environment.sh data,torch", PATH=path)
        assert done.returncode == 0, done.stderr
        return place.calls()

    options = ["--quiet", "--constraint", constraints, "--editable", ".[data,torch]"]
    if installer == "uv":
        expected = [["pip", "install", "--python", ".venv/bin/python", *options]]
    else:
        expected = [["-m", "pip", "install", *options]]
    assert install() == expected and install() == []
    stamp = place.root / ".venv/installed-data,torch"
    for name in ("pyproject.toml", constraints):
        os.utime(stamp, (1, 1))
        for other in ("pyproject.toml", constraints):
            os.utime(place.root / other, (0, 0))
        assert install() == []
        os.utime(place.root / name)
        assert install() == expected


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"PIP_INDEX_URL": "https://index"}, ["--default-index", "https://index"]),
        ({"PIP_INDEX_URL": "https://index", "UV_DEFAULT_INDEX": "https://own"}, []),
        ({"PIP_INDEX_URL": "https://index", "UV_INDEX_URL": "https://own"}, []),
        ({"PIP_FIND_LINKS": "/a  https://b/c"}, ["--find-links", "/a", "--find-links", "https://b/c"]),
        ({"PIP_FIND_LINKS": "/a", "UV_FIND_LINKS": "/b"}, []),
    ],
)
def test_settings_of_pip_are_passed_to_uv(place, settings, options):
    (place.root / ".venv/lib/python3.12").mkdir(parents=True)
    assert place.bash("-c", "source launch/environment.sh", **settings).returncode == 0
    assert place.calls()[0][-len(options) - 2 :] == ["--editable", ".", *options]


@pytest.mark.parametrize(("version", "is_taken"), [("3, 10", False), ("3, 11", True), ("3, 13", True), ("3, 14", False)])
def test_only_pythons_with_wheels_are_taken(place, version, is_taken):
    """In a folder of its own: VENV."""
    code = f"import sys; sys.version_info = ({version}); exec(sys.argv[1])"
    interpreter = place.root / "interpreter"
    asked = f'[ "$1" != -c ] || exec {sys.executable} -c "{code}" "$2"'
    interpreter.write_text(f'#!/bin/bash\n{asked}\nmkdir -p "$3/bin"\ncp {interpreter} "$3/bin/python"\n')
    interpreter.chmod(0o755)
    done = place.bash("-c", 'source launch/environment.sh data; echo "$PATH"', PYTHON=str(interpreter), VENV=".venv-other")
    if is_taken:
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(f"{place.root}/.venv-other/bin:"), done.stderr
        assert (place.root / ".venv-other/installed-data").exists()
    else:
        assert done.returncode == 1
        assert done.stderr == f"error: {interpreter} is not Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/one\n"


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("tpu_pod.sh", ["status"], {}, "NAME PROJECT ZONE not set; for example: export NAME=repae PROJECT=my-project ZONE="),
        ("tpu_pod.sh", ["create"], POD | {"ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE not set; for example: export ACCEL"),
        ("tpu_pod.sh", [], POD, "'' is none of the commands create, setup, run"),
        ("tpu_pod.sh", ["fly"], POD, "'fly' is none of the commands create, setup, run"),
        ("tpu_pod.sh", ["run"], POD, "run needs flags of training"),
        ("tpu_pod.sh", ["logs", "first"], POD, "logs takes the number of a worker or 'all', not 'first'"),
        ("tpu_pod.sh", ["setup"], POD | {"COMMIT": "nowhere"}, "COMMIT=nowhere is no commit of a git repository in "),
        ("tpu_pod.sh", ["resume"], POD, "resume needs what 'setup' noted in runs/tpu_pod/project/us-west4-a/pod/setup"),
        ("gke_jobset.sh", ["delete"], {}, "NAME not set"),
        ("gke_jobset.sh", ["submit", "--config", "c"], {"NAME": "a"}, "IMAGE ACCELERATOR TOPOLOGY not set; for example"),
        ("gke_jobset.sh", ["submit"], JOBSET, "submit needs flags of training"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"NAME": "My_Run"}, "NAME=My_Run: expected small letters"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"TOPOLOGY": "64"}, "TOPOLOGY=64: expected chips per side, e.g. 8x8"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"NAME": "a" * 47}, "too long by 1 letters: pods are named aaaaa"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"START_SECONDS": "1h"}, "START_SECONDS=1h: expected a whole number"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"SLICES": "two"}, "SLICES=two: expected a whole number"),
        ("gke_jobset.sh", ["submit", "-c"], JOBSET | {"TOPOLOGY": "3x3"}, "9 chips, which CHIPS_PER_HOST=4 does not divide"),
        ("slurm.sh", ["--config", "c"], {}, "this is no SLURM job; submit it: sbatch launch/slurm.sh FLAGS"),
        ("slurm.sh", [], JOB, "flags of training are missing"),
        ("slurm.sh", ["-c"], JOB | {"SLURM_GPUS_ON_NODE": ""}, "SLURM_GPUS_ON_NODE not set"),
        ("slurm.sh", ["-c"], JOB | {"MAX_STARTS": "0"}, "MAX_STARTS=0: expected a number of starts, 1 or more"),
        ("slurm.sh", ["-c"], JOB | {"SLURM_NTASKS_PER_NODE": "3"}, "--ntasks-per-node must be 1 or 4"),
        ("slurm.sh", ["-c"], JOB | {"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository's folder"),
        ("multi_gpu.sh", [], {}, "flags of training are missing"),
        ("multi_gpu.sh", ["--processes", "--config", "c"], {}, "--processes '--config': expected their number"),
    ],
)
def test_mistakes_end_in_one_line(place, script, arguments, settings, message):
    assert message in place.refused(script, *arguments, **settings)


@pytest.mark.parametrize(
    ("script", "arguments", "settings"),
    [
        ("tpu_pod.sh", ["create", "--spot"], POD),
        ("tpu_pod.sh", ["setup"], POD),
        ("tpu_pod.sh", ["run", *HARD], POD),
        ("tpu_pod.sh", ["logs"], POD),
        ("tpu_pod.sh", ["logs", "all"], POD),
        ("tpu_pod.sh", ["status"], POD),
        ("tpu_pod.sh", ["stop"], POD),
        ("tpu_pod.sh", ["delete", "--quiet"], POD),
        ("gke_jobset.sh", ["submit", *HARD], JOBSET),
        ("gke_jobset.sh", ["logs", "3"], JOBSET),
        ("gke_jobset.sh", ["status"], JOBSET),
        ("gke_jobset.sh", ["delete"], JOBSET | {"NAMESPACE": "mine"}),
        ("slurm.sh", HARD, JOB),
        ("multi_gpu.sh", HARD, {}),
        ("multi_gpu.sh", ["--processes", "2", *HARD], {"PORT": "4000"}),
    ],
)
def test_dry_run_prints_what_a_run_does(place, script, arguments, settings):
    place.commit()
    place.states(["ACTIVE"])
    place.answer("running: step 1")
    text = place.behaviors.parent / "stdin"
    place.behave("kubectl", f'case "$*" in *create*) cat >{text} ;; esac')
    before = sorted(path for path in place.root.rglob("*") if ".git" not in path.parts)
    at = 0 if script in ("slurm.sh", "multi_gpu.sh") else len(arguments) % 2  # before the command, or after it
    shown = place.launch(script, *arguments[:at], "--dry-run", *arguments[at:], **settings)
    assert place.calls() == []
    assert sorted(path for path in place.root.rglob("*") if ".git" not in path.parts) == before

    (place.root / "shown.sh").write_text(shown.partition("\n# if that ends")[0] + "\nwait\n")
    assert place.bash("shown.sh", **settings).returncode == 0
    printed = place.calls("gcloud", "kubectl", "srun", "python"), text.exists() and text.read_text()
    place.launch(script, *arguments, **settings)
    run = place.calls("gcloud", "kubectl", "srun", "python"), text.exists() and text.read_text()
    assert sorted(printed[0]) == sorted(run[0]) and printed[1] == run[1]


def test_slice_is_asked_for_and_waited_for(place):
    place.states(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    place.behave("gcloud", (place.behaviors / "gcloud").read_text().replace("echo ACTIVE >queue; ", ""))
    shown = place.launch("tpu_pod.sh", "create", "--spot", **POD)
    queue, *looks = place.calls()
    assert queue == ["compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", *WHERE,
                     "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]  # fmt: skip
    assert [look[2:4] for look in looks] == [["queued-resources", "list"]] * 3 + [["tpu-vm", "list"]]
    assert [line.split()[-1] for line in shown.splitlines()] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]


def test_refused_slice_ends_create(place):
    place.states(["FAILED"])
    place.behave("gcloud", (place.behaviors / "gcloud").read_text().replace("echo ACTIVE >queue; ", ""))
    done = place.bash("launch/tpu_pod.sh", "create", **POD)
    assert done.returncode == 1 and done.stderr.startswith("error: the slice is FAILED; ")


def test_setup_copies_the_commit_and_installs_it(place):
    commit = place.commit()
    (place.root / "pyproject.toml").write_text("not committed")
    done = place.bash("launch/tpu_pod.sh", "setup", **POD, BUCKET="my-bucket")
    assert done.returncode == 0 and commit in done.stderr and "not committed stay here" in done.stderr
    copy, install = place.calls("gcloud")
    archive = "runs/tpu_pod/project/us-west4-a/pod/code.tar.gz"
    assert copy == ["compute", "tpus", "tpu-vm", "scp", archive, "pod:repae.tar.gz", *WHERE, "--worker=all"]
    assert install[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "pod", *WHERE, "--worker=all"]

    shutil.copy(place.root / archive, place.home / "repae.tar.gz")
    place.install(place.home / "repae", "base")
    for name in ("curl", "sudo", "sleep"):
        place.stub(place.stubs / name)
    locked = place.behaviors / "locked"  # as in the first minutes of a machine
    locked.touch()
    place.behave(
        "sudo",
        f'case "$*" in\n*update) [ ! -e {locked} ] || {{ rm {locked}; exit 100; }} ;;\n'
        f"*gcsfuse.deb) cp {place.stubs}/curl {place.stubs}/gcsfuse ;;\nesac",
    )
    place.behave("uv", 'case "$*" in python\\ find*) echo /usr/bin/env ;; esac')
    done = on_worker(place, install)
    assert done.returncode == 0, done.stderr
    assert (place.home / "repae/pyproject.toml").read_text() == ""
    calls = [json.loads(line) for line in place.calls_file.read_text().splitlines()]
    assert [call["argv"][-1] for call in calls if call["argv"][:1] == ["pip"]] == [".[tpu,data,torch]"]
    apt = [call["argv"] for call in calls if call["argv"][:1] == ["apt-get"]]
    assert [call[-1] for call in apt] == ["update", "update", "./gcsfuse.deb"] and "DPkg::Lock::Timeout=600" in apt[-1]
    assert calls[-1]["name"] == "gcsfuse" and calls[-1]["argv"][-2:] == ["my-bucket", "/mnt/my-bucket"]
    assert (place.home / "repae/.venv/installed-tpu,data,torch").exists()


def test_setup_removes_what_setup_had_put_there_and_nothing_else(place):
    place.behave("uv", 'case "$*" in python\\ find*) echo /usr/bin/env ;; esac')
    place.install(place.home / "repae", "base")
    (place.root / "an old [file]").touch()
    for _ in range(2):
        place.commit()
        place.launch("tpu_pod.sh", "setup", **POD)
        shutil.copy(place.root / "runs/tpu_pod/project/us-west4-a/pod/code.tar.gz", place.home / "repae.tar.gz")
        done = on_worker(place, place.calls("gcloud")[-1])
        assert done.returncode == 0, done.stderr
        if (place.root / "an old [file]").exists():
            assert (place.home / "repae/an old [file]").exists()
            (place.root / "an old [file]").rename(place.root / "launch/new")
            for name in ("runs/a/checkpoints/7", "data/a.png", "launch/mine"):
                (place.home / "repae" / name).parent.mkdir(parents=True, exist_ok=True)
                (place.home / "repae" / name).touch()
    names = {str(path.relative_to(place.home / "repae")) for path in (place.home / "repae").rglob("*")}
    assert {"runs/a/checkpoints/7", "data/a.png", "launch/mine", "launch/new", "pyproject.toml"} <= names
    assert "an old [file]" not in names


def test_run_reaches_the_workers_as_typed(place):
    place.launch("tpu_pod.sh", "run", *HARD, **POD)
    (start,) = place.calls()
    place.launch("tpu_pod.sh", "stop", **POD)
    (stop,) = place.calls()
    assert start[:-1] == stop[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "pod", *WHERE, "--worker=all"]
    shutil.copytree(place.root, place.home / "repae")
    shutil.rmtree(place.home / "repae/.venv")
    assert "setup first" in on_worker(place, start).stderr
    place.install(place.home / "repae", "tpu,data,torch")
    place.behave("python", 'echo "step 1 ${MEGASCALE_NUM_SLICES-one} $JAX_COORDINATOR_PORT"; exit 3')
    assert on_worker(place, start, MEGASCALE_NUM_SLICES="2").returncode == 0
    wait_for(place.home / "train.exit")
    assert place.calls("python") == [["-m", "repae_jax.train", "--distributed", *HARD]]
    assert (place.home / "train.log").read_text() == "step 1 one 8476\n"
    place.launch("tpu_pod.sh", "status", **POD | {"NAME": "other"})  # not there: nobody is asked over ssh
    assert all("ssh" not in call for call in place.calls())
    done = place.bash("launch/tpu_worker.sh", "status", cwd=place.home / "repae")
    assert done.returncode == 0 and "ended with exit code 3: step 1" in done.stdout
    assert on_worker(place, stop).returncode == 0
    assert "stopped: step 1" in place.bash("launch/tpu_worker.sh", "status", cwd=place.home / "repae").stdout
    (place.home / "train.exit").write_text("0\n")  # the run had finished before
    assert "ended with exit code 0" in place.bash("launch/tpu_worker.sh", "status", cwd=place.home / "repae").stdout
    assert on_worker(place, start).returncode == 0 and not (place.home / "train.stopped").exists()


def test_a_run_that_is_refused_is_not_noted(place):
    place.launch("tpu_pod.sh", "run", "--config", "going on", **POD)
    place.behave("gcloud", "echo 'error: a run is going on' >&2; exit 1")
    assert place.bash("launch/tpu_pod.sh", "run", "--config", "another", **POD).returncode == 1
    assert (place.root / "runs/tpu_pod/project/us-west4-a/pod/run").read_text() == "--config 'going on'\n"


def test_run_on_a_worker_outlives_the_call_and_saves_itself(place):
    folder = place.home / "repae"
    shutil.copytree(place.root, folder)
    place.install(folder, "tpu,data,torch")
    place.behave("python", "trap 'echo saved; exit 75' TERM; echo begun; while sleep 0.05; do :; done")
    worker = ["launch/tpu_worker.sh"]
    assert place.bash(*worker, "status", cwd=folder).stdout.endswith(": not running\n")
    assert place.bash(*worker, "start", "python", "-m", "x", cwd=folder).returncode == 0
    wait_for(place.home / "train.log")
    while "begun" not in (place.home / "train.log").read_text():
        time.sleep(0.02)
    done = place.bash(*worker, "status", cwd=folder)
    assert done.returncode == 0 and "running: begun" in done.stdout
    for command in (["start", "python", "-m", "x"], ["idle"]):
        done = place.bash(*worker, *command, cwd=folder)
        assert done.returncode == 1 and "a run is going on" in done.stderr
    assert place.bash(*worker, "stop", cwd=folder).returncode == 0
    assert (place.home / "train.exit").read_text() == "75\n"
    assert place.bash(*worker, "log", cwd=folder).stdout.splitlines()[-1].endswith(": saved")
    assert place.bash(*worker, "status", cwd=folder).stdout.endswith(": ended with exit code 75: saved\n")


def verbs(calls):
    """Returns the verbs of the calls of gcloud that do not query the state; over ssh the worker's command."""
    words = [call[3] if call[3] != "ssh" else re.search(r"tpu_worker.sh (\w+)", call[-1])[1] for call in calls]
    return [word for word in words if word != "list"]


@pytest.fixture
def preempted(place):
    """A place where a run had begun and of which only files are left, and its commit."""
    commit = place.commit()
    place.states(["ACTIVE"])
    for command in (["create", "--spot", "--labels=a=b c"], ["setup"], ["run", *HARD]):
        place.launch("tpu_pod.sh", *command, **POD, EXTRAS="tpu", BUCKET="my-bucket")
    place.answer("not running", "not running")
    (place.root / "pyproject.toml").write_text("newer")
    assert place.commit() != commit
    created, *_, started = place.calls()
    return place, commit, created, started


@pytest.mark.parametrize(
    ("queue", "node", "first"),
    [
        (["SUSPENDING", "SUSPENDED"], "", ["delete", "create"]),
        (["ACTIVE"], "PREEMPTED", ["delete", "create"]),
        (["ACTIVE"], "", ["delete", "create"]),
        ([""], "", ["create"]),
        (["PROVISIONING", "ACTIVE"], "READY", ["status", "stop"]),
    ],
)
def test_resume_makes_the_slice_again_and_runs_what_ran(preempted, queue, node, first):
    place, commit, created, started = preempted
    place.states(queue, node)
    place.launch("tpu_pod.sh", "resume", **POD | {"COMMIT": "of another time", "BUCKET": "another"})
    calls = [call for call in place.calls() if call[3] != "list"]
    assert verbs(calls) == [*first, "scp", "idle", "start"]
    assert calls[-1] == started and calls[-2][-1].endswith("setup tpu my-bucket")
    if "create" in first:
        assert calls[-4] == created
    if "delete" in first:
        assert calls[0] == ["compute", "tpus", "queued-resources", "delete", "pod", *WHERE, "--force", "--quiet"]
    notes = place.root / "runs/tpu_pod/project/us-west4-a/pod"
    assert (notes / "setup").read_text().strip() == f"{commit} tpu my-bucket"
    packed = subprocess.run(["tar", "-xzOf", notes / "code.tar.gz", "pyproject.toml"], capture_output=True, check=True)
    assert packed.stdout == b""


def test_resume_leaves_a_healthy_run_alone(preempted):
    place = preempted[0]
    place.states(["ACTIVE"])
    place.answer("running: step 7", "running: error: ended with exit code 9: x")
    assert "nothing to resume" in place.launch("tpu_pod.sh", "resume", **POD)
    assert verbs(place.calls()) == ["status"]
    shown = place.launch("tpu_pod.sh", "resume", "--dry-run", **POD)
    assert place.calls() == []
    assert [line.split()[4] for line in shown.splitlines() if "delete" in line or "create" in line] == ["delete", "create"]


@pytest.mark.parametrize(
    ("answers", "again", "code", "message"),
    [
        (["running", "not running"], True, 0, ""),  # the host was made again
        (["ended with exit code 1: x", "ended with exit code 137: y"], True, 0, ""),  # the others end because of one
        (["ended with exit code 75: saved"] * 2, True, 0, ""),
        (["stopped: saved", "ended with exit code 1: the other has gone"], None, 0, ""),
        (["running: x", "ended with exit code 0: finished"], False, 0, "nothing to resume"),  # about to end
        (["ended with exit code 0: finished"] * 2, False, 3, "it has finished"),
        (["ended with exit code 1: error: no field"] * 2, False, 3, "it ended with an error, which would come again"),
        (["ended with exit code 2: x", "ended with exit code 1: y"], False, 3, "resume --failed"),
        (["bash: something else"], False, 1, "error: the workers' answers are not understood"),
        (None, False, 1, "error: not all workers could be asked, so nothing is done"),
    ],
)
def test_resume_starts_again_what_died_and_nothing_else(preempted, answers, again, code, message):
    place = preempted[0]
    place.states(["ACTIVE"])
    if answers is None:
        (place.behaviors / "answers").unlink()
    else:
        place.answer(*answers)
    done = place.bash("launch/tpu_pod.sh", "resume", **POD)
    assert done.returncode == code and message in done.stdout + done.stderr
    started = [] if again is False else ["scp", "idle", "start"]
    assert verbs(place.calls()) == ["status", *(["stop"] if again else []), *started]


def test_a_run_that_failed_is_started_again_if_asked(preempted):
    place = preempted[0]
    place.states(["ACTIVE"])
    place.answer("ended with exit code 1: x")
    place.launch("tpu_pod.sh", "resume", "--failed", **POD)
    assert verbs(place.calls()) == ["status", "stop", "scp", "idle", "start"]
    assert "takes --failed or nothing, not '--all'" in place.refused("tpu_pod.sh", "resume", "--all", **POD)


def test_watch_ends_when_there_is_nothing_left_to_do(preempted):
    """The states are: out of reach, dead, started, finished."""
    place = preempted[0]
    place.states(["ACTIVE"])
    (place.behaviors / "answers").unlink()
    after = {"not running": ": ended with exit code 0: finished", "": ": not running"}
    cases = "".join(f"'{before}') echo 'host-0{now}' >answers ;;\n" for before, now in after.items())
    answer = (
        f'said=$(sed "s/^[^ ]*: //" answers 2>/dev/null)\ncat answers; code=$?\ncase $said in\n{cases}esac\nexit $code ;;\n'
    )
    place.behave("gcloud", (place.behaviors / "gcloud").read_text().replace("cat answers && exit ;;\n", answer))
    place.launch("tpu_pod.sh", "watch", **POD, WATCH_SECONDS="0")
    assert verbs(place.calls()) == ["status", "status", "stop", "scp", "idle", "start", "status"]


@pytest.mark.parametrize(
    ("queue", "answer", "message"),
    [
        (["ACTIVE", "ACTIVE", "DELETING", ""], "running: step 7", "somebody has deleted the slice; 'resume' makes it again"),
        (["ACTIVE"], "stopped: saved", "somebody has stopped the run; 'resume' continues it"),
    ],
)
def test_watch_leaves_what_somebody_has_ended(preempted, queue, answer, message):
    place = preempted[0]
    place.states(queue)
    place.answer(answer)
    shown = place.launch("tpu_pod.sh", "watch", **POD, WATCH_SECONDS="0")
    assert shown.splitlines()[-1] == f"nothing to resume: {message}"
    assert verbs(place.calls()) == ["status"]


def test_watch_starts_what_always_dies_a_number_of_times(preempted):
    place = preempted[0]
    place.states(["ACTIVE"])
    place.answer("ended with exit code 137: x", "ended with exit code 134: y")
    for _ in range(2):  # the second begins to count anew
        shown = place.launch("tpu_pod.sh", "watch", **POD, WATCH_SECONDS="0", MAX_RESTARTS="2")
        assert "it has died 3 times on a slice that was well" in shown.splitlines()[-1]
        assert verbs(place.calls()) == ["status", "stop", "scp", "idle", "start"] * 2 + ["status"]


@pytest.mark.parametrize(("state", "first"), [("SUSPENDED", ["delete"]), ("", [])])
def test_watch_makes_a_slice_until_it_is_there(preempted, state, first):
    """The watcher prints nothing then; its next query finds that the slice was deleted."""
    place = preempted[0]
    place.states([state])
    tried = place.behaviors / "tried"
    place.behave(
        "gcloud",
        f'case "$*" in\n*resources\\ delete*) echo >{place.behaviors}/queue ;;\n'
        f"*resources\\ create*) [ -e {tried} ] || {{ touch {tried}; exit 1; }} ;;\n"
        f"*tpu_worker.sh\\ start*) echo >{place.behaviors}/queue ;;\nesac\n" + (place.behaviors / "gcloud").read_text(),
    )
    shown = place.launch("tpu_pod.sh", "watch", **POD, WATCH_SECONDS="0")
    assert verbs(place.calls()) == [*first, "create", "create", "scp", "idle", "start"]
    assert "somebody has deleted the slice" in shown


def manifest_of(place, **settings):
    return yaml.safe_load(place.launch("gke_jobset.sh", "manifest", *HARD, **JOBSET | settings))


def test_manifest(place):
    jobset = manifest_of(place)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "run"
    rule = {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 20, "rules": [rule]}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1 and job["parallelism"] == job["completions"] == 16 and job["backoffLimit"] == 0
    ends = {"containerName": "train", "operator": "In", "values": [1, 2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": ends}]}
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["restartPolicy"] == "Never"
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (False, "ClusterFirst")  # otherwise it would lack its own service account
    (container,) = pod["containers"]
    assert pod["volumes"] == [{"name": "shared", "emptyDir": {"medium": "Memory"}}]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/dev/shm"}]
    assert container["image"] == "host/repae:1" and container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {"containerPort": 8476} in container["ports"]
    port, seconds = container["env"]
    assert port == {"name": "JAX_COORDINATOR_PORT", "value": "8476"} and seconds == {"name": "START_SECONDS", "value": "1800"}
    command = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes does
    assert command == ["python", "-m", "repae_jax.train", "--distributed", *HARD]
    assert all("$" not in word.replace("$$", "") for word in container["command"])


def within(part, whole):
    """Returns the part of one manifest that another, which may have more, contains."""
    if isinstance(part, dict):
        return {key: within(value, whole[key]) for key, value in part.items() if key in whole}
    return [within(*pair) for pair in zip(part, whole)] if isinstance(part, list) else whole


@pytest.mark.parametrize("settings", [{}, {"SLICES": "2", "BUCKET": "my-bucket", "SERVICE_ACCOUNT": "me"}])
def test_manifest_has_the_fields_of_jobsets_jobs_and_pods(place, settings):
    """Fields and types agree with the controllers' schemas; a field that none of them knows would be dropped."""
    manifest = manifest_of(place, **settings)
    assert within(manifest, job_set.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()) == manifest


def test_coordinator_is_at_a_port_that_firewalls_leave_open(place, monkeypatch):
    """JAX finds the coordinator on GKE's TPUs by what the manifest sets."""
    find = private("clusters", "ClusterEnv").auto_detect_unset_distributed_params
    cloud = "jax._src.clusters.cloud_tpu_cluster"
    (replicated,) = manifest_of(place)["spec"]["replicatedJobs"]
    for entry in replicated["template"]["spec"]["template"]["spec"]["containers"][0]["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.setattr(f"{cloud}.get_metadata", lambda key: ("", 200))
    monkeypatch.setattr(f"{cloud}.running_in_cloud_tpu_vm", True)
    parameters = find(None, None, None, None, "gketpu", 1)
    assert parameters[:3] == ("localhost:8476", 2, 1)


def test_manifest_of_several_slices(place):
    jobset = manifest_of(
        place, TOPOLOGY="4x4x8", CHIPS_PER_HOST="8", SLICES="2", MAX_RESTARTS="5", GRACE_SECONDS="15", SERVICE_ACCOUNT="me"
    )
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] == 2 and job["parallelism"] == 16 and jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert pod["terminationGracePeriodSeconds"] == 15 and pod["serviceAccountName"] == "me"
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


@pytest.mark.parametrize(("slices", "network"), [("1", {}), ("2", {"hostNetworkPodKSA": "true"})])
def test_manifest_with_a_bucket(place, slices, network):
    (replicated,) = manifest_of(place, BUCKET="my-bucket", SLICES=slices)["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (_, volume), (container,) = template["spec"]["volumes"], template["spec"]["containers"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and volume["csi"]["readOnly"] is True
    attributes = {"bucketName": "my-bucket", "mountOptions": "implicit-dirs", **network}
    assert volume["csi"]["volumeAttributes"] == attributes
    shared, bucket = container["volumeMounts"]
    assert shared["mountPath"] == "/dev/shm"
    assert bucket == {"name": volume["name"], "mountPath": "/mnt/my-bucket", "readOnly": True}


def test_logs_of_a_host(place):
    place.launch("gke_jobset.sh", "logs", "3", **JOBSET)
    (call,) = place.calls()
    assert call[:3] == ["--namespace=default", "logs", "--follow"]
    assert call[-1].endswith("=run,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=3")


@pytest.mark.parametrize(("tasks", "ids"), [("4", None), ("1", "0,1,2,3")])
def test_slurm_starts_one_process_per_gpu_or_node(place, tasks, ids):
    copy = place.root.parent / "slurm_script"  # SLURM runs a copy of the script from its spool folder
    shutil.copy(place.root / "launch/slurm.sh", copy)
    settings = JOB | {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_SUBMIT_DIR": str(place.root)}
    assert place.bash(copy, *HARD, cwd="/", **settings).returncode == 0
    (line,) = place.calls_file.read_text().splitlines()
    call = json.loads(line)
    options = ["--export=ALL", "--gpu-bind=none", "--cpus-per-task=6", "--kill-on-bad-exit=0", "--wait=60"]
    assert call["name"] == "srun" and call["ids"] == ids and call["flags"] == "--for --gpus"
    assert call["argv"] == [*options, "python", "-m", "repae_jax.train", "--distributed", *HARD]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (127, False), (134, True), (137, True)])
def test_slurm_job_goes_back_into_the_queue_if_that_helps(place, code, requeued):
    place.behave("srun", f"exit {code}")
    done = place.bash("launch/slurm.sh", "--config", "c", **JOB)
    assert done.returncode == (0 if requeued else code)
    assert place.calls("scontrol") == ([["requeue", "7"]] if requeued else [])
    assert f"exit code {code})" in done.stderr or code == 0


def test_slurm_job_that_may_not_go_back(place):
    """SLURM refuses after sbatch --no-requeue, and where the cluster does not allow requeueing."""
    place.behave("srun", "exit 75")
    place.behave("scontrol", "echo Requested operation is presently disabled >&2; exit 1")
    done = place.bash("launch/slurm.sh", "--config", "c", **JOB)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: SLURM refuses that; submit the job again with the same flags")


@pytest.mark.parametrize("flag", [["--workdir=a run"], ["-workdir", "a run"]])
def test_slurm_job_without_a_new_checkpoint_ends_after_some_starts(place, flag):
    place.behave("srun", "exit 137")
    place.behave("python", f'[ "$1" != - ] || exec {sys.executable} "$@"')

    def start():
        done = place.bash("launch/slurm.sh", "--config", "c", *flag, **JOB, MAX_STARTS="3")
        return done.returncode, done.stderr.splitlines()[-1], len(place.calls("scontrol"))

    for step in (0, 70):
        for folder in ("500.orbax-checkpoint-tmp", str(step)):
            (place.root / "a run/checkpoints" / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            code, line, requeued = start()
            assert (code, requeued) == (0, 1) and line.endswith(f"the newest checkpoint is that of step {step}")
    assert start()[0] == 0  # the third at step 70, but the first of them has made that checkpoint
    code, line, requeued = start()
    assert (code, requeued) == (1, 0)
    assert line.startswith("error: starts in a row without a new checkpoint: 3, the newest is that of step 70, so the job is")
    assert start()[0] == 0  # somebody has put it back by hand


def test_slurm_job_takes_nothing_from_a_run_by_hand_or_another_job(place):
    place.behave("srun", f"env >{place.behaviors}/environment")
    foreign = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_LOCAL_DEVICE_IDS": "0", "SLURM_CPU_BIND_LIST": "1"}
    place.launch("slurm.sh", "--config", "c", **JOB, **foreign, SLURM_CPU_BIND="map_cpu:1")
    environment = (place.behaviors / "environment").read_text()
    assert "SLURM_JOB_ID=7" in environment and not [name for name in (*foreign, "SLURM_CPU_BIND") if name in environment]


def test_slurm_job_of_an_array_leaves_the_others_alone(place):
    """The array's ID is also the ID of one of its jobs."""
    place.behave("srun", "exit 75")
    place.launch("slurm.sh", "--config", "c", **JOB, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert place.calls("scontrol") == [["requeue", "7_1"]]


def test_sbatch_sees_all_its_options():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH ")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH ")]
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)
    assert not any("gpus-per-task" in line for line in options)  # hides GPUs that JAX counts on


def test_one_process_for_all_gpus(place):
    place.behave("python", "exit 75")
    assert place.bash("launch/multi_gpu.sh", *HARD).returncode == 75
    (call,) = map(json.loads, place.calls_file.read_text().splitlines())
    assert call["argv"] == ["-m", "repae_jax.train", *HARD] and call["flags"] == "--for --gpus"


def test_one_process_per_gpu(place):
    place.behave("python", "echo hello")
    assert place.launch("multi_gpu.sh", "--processes", "3", *HARD, PORT="4000") == "hello\n"
    calls = [json.loads(line) for line in place.calls_file.read_text().splitlines()]
    calls.sort(key=lambda call: call["ids"])
    by_hand = ["-m", "repae_jax.train", "--coordinator", "localhost:4000", "--num_processes", "3", "--process_id"]
    assert [call["ids"] for call in calls] == ["0", "1", "2"] and {call["flags"] for call in calls} == {"--for --gpus"}
    assert [call["argv"] for call in calls] == [[*by_hand, str(i), *HARD] for i in range(3)]
    (log,) = place.root.glob("runs/multi_gpu/*-4000/process-2.log")
    assert log.read_text() == "hello\n"


def test_two_runs_on_one_machine(place):
    """Each run finds a port and has its own logs; a port in use is refused."""
    for _ in range(2):
        place.launch("multi_gpu.sh", "--processes", "2", "--config", "c")
    ports = [call[call.index("--coordinator") + 1] for call in place.calls()]
    assert len(ports) == 4 and len(set(ports)) == 2
    assert len(list(place.root.glob("runs/multi_gpu/*/process-1.log"))) == 2
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        message = place.refused("multi_gpu.sh", "--processes", "2", "--config", "c", PORT=port)
    assert f"PORT={port} is in use" in message


def test_extras_that_are_installed(place):
    place.launch("multi_gpu.sh", "--config", "c", EXTRAS="cuda")
    place.launch("slurm.sh", "--config", "c", EXTRAS="cuda", **JOB)
    assert [call[-1] for call in place.calls("uv")] == [".[cuda]"]  # once


def test_dead_process_ends_the_others(place):
    place.behave("python", 'case "$*" in *process_id\\ 1*) exit 9 ;; *) exec sleep 60 ;; esac')
    done = place.bash("launch/multi_gpu.sh", "--processes", "3", "--config", "c", GRACE_SECONDS="0.2")
    assert done.returncode == 137
    lines = [line for line in done.stderr.splitlines() if line.startswith("process")]
    assert "was killed" not in done.stderr
    assert lines == [f"process {i} ended with exit code {code}" for i, code in ((0, 137), (1, 9), (2, 137))]


def test_killed_process_is_named(place):
    place.behave("python", 'case "$*" in *process_id\\ 1*) kill -KILL $$ ;; *) exec sleep 60 ;; esac')
    done = place.bash("launch/multi_gpu.sh", "--processes", "3", "--config", "c", GRACE_SECONDS="0.2")
    assert done.returncode == 137
    line = "process 1 was killed by signal 9, perhaps for want of memory; the others are ended after 0.2 s. The same command"
    assert line in done.stderr


def signalled(place, on_signal, signals):
    """Starts two processes that react to SIGTERM as given; returns the script's exit code and how many processes it left."""
    ready = place.behaviors / "ready"
    place.behave("python", f"trap '{on_signal}' TERM; echo >>{ready}; while sleep 0.05; do :; done")
    command = ["bash", "launch/multi_gpu.sh", "--processes", "2", "--config", "c"]
    options = {"env": place.environment({"GRACE_SECONDS": "0"}), "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, cwd=place.root, **options)
    wait_for(ready)
    while ready.read_text() != "\n\n":
        time.sleep(0.02)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
    process.communicate(timeout=100)
    left = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            left += os.getsid(int(folder.name)) == process.pid and "State:\tZ" not in (folder / "status").read_text()
    return process.returncode, left


def test_processes_save_themselves_on_request(place):
    assert signalled(place, "sleep 0.3; exit 75", 1) == (75, 0)


def test_a_second_signal_ends_processes_at_once(place):
    assert signalled(place, "", 2) == (137, 0)
