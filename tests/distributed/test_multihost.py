"""Training in several processes, real ones: equal to one process, stopped together, failing together, resumed.

The processes are started as the launch scripts do by hand. Whole runs share one config and one folder of compiled programs.
"""

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import peers
import pytest
import small

from repae_jax import train
from repae_jax.distributed import multihost
from repae_jax.training import checkpoint

HOST = socket.gethostname()


def copy_of(workdir, tmp_path):
    return Path(shutil.copytree(workdir, tmp_path / "copy"))


def assert_close(workdir, other):
    """The same steps with the same values, but for the order in which numbers are added up."""
    lines, expected = peers.metrics_of(workdir), peers.metrics_of(other)
    assert [sorted(line) for line in lines] == [sorted(line) for line in expected]
    for line, wanted in zip(lines, expected):
        for name in line:
            np.testing.assert_allclose(line[name], wanted[name], rtol=2e-3, atol=2e-5, err_msg=f"{name}, step {line['step']}")


@pytest.fixture(scope="module")
def two(tmp_path_factory, compiled):
    """Workdir of a whole run in two processes, and how these ended."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    ended = peers.finish(workdir, compiled, flags=("--config.hooks.samples_every=4",))
    return SimpleNamespace(workdir=workdir, ended=ended)


def assert_same_run(workdir, two):
    """Bit for bit that of the uninterrupted run."""
    assert small.differing(peers.state_of(workdir)[0], peers.state_of(two.workdir)[0]) == []
    assert peers.metrics_of(workdir) == peers.metrics_of(two.workdir)


# ---- what they agree on ---------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_what_processes_agree_on(tmp_path, compiled):
    with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": np.full(2, step, np.float32)}, {"next_batch": step}, {"seed": 0})
    address = peers.free_address()
    scripts = [f"import peers; peers.agree({address!r}, {i}, {str(tmp_path)!r})" for i in range(2)]
    started = [peers.launch(["-c", script], compiled) for script in scripts]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    (first, second) = [json.loads(output.splitlines()[-1]) for output, _ in ended]
    assert first == second
    assert first["unsharded"] == [{"process": 0}, {"process": 1}] and first["gathered_again"] == [0, 1]
    assert first["first"] == 0
    assert first["same"] is None and first["shared"] is None
    who = f"process 1 on host {HOST} differs from process 0 on host {HOST}, but all must be started alike:"
    assert first["config"].splitlines() == [
        who,
        "  config.extra: '<absent>' in process 0, 1 in process 1",
        "  config.sit.depth: 2 in process 0, 3 in process 1",
    ]
    assert re.fullmatch(rf"{who}\n  packages.flax: '[\d.]+' in process 0, '0.0.1' in process 1", first["version"])
    assert re.fullmatch(rf"{who}\n  code.repae_jax/train.py: '\w+' in process 0, '0' in process 1", first["code"])
    assert first["data"] == f"{who}\n  data.records: 'cd' in process 0, 'ab' in process 1"
    unseen = f"what process 0 wrote to {tmp_path / '0'} is not seen by process 1 on host {HOST}, in {tmp_path / '1'}:"
    assert first["own"].startswith(unseen)
    assert first["number"] == f"{who}\n  num_processes: 2 in process 0, 3 in process 1"
    assert first["restored"] == [[2, 2], {"next_batch": 2}, 2, [1, 2]]
    assert [list((tmp_path / str(i)).iterdir()) for i in range(2)] == [[], []]


def test_one_process_agrees_with_itself(tmp_path):
    multihost.assert_same_config({"seed": 0})
    multihost.check_shared(tmp_path)
    assert multihost.all_gather({"a": 1}) == [{"a": 1}] and multihost.broadcast_from_process_0(2) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((True, "localhost:1", 2, 0), "--distributed is for processes that find each other: give either --distributed, or all"),
        ((False, "localhost:1", None, 0), "--num_processes missing: give either"),
        ((False, None, 2, None), "--coordinator and --process_id missing"),
        ((False, "localhost", 2, 0), "--coordinator=localhost: expected HOST:PORT"),
        ((False, "localhost:65536", 2, 0), "--coordinator=localhost:65536: ports are 1..65535"),
        ((False, "localhost:1", 2, 2), "--process_id=2: with --num_processes=2, allowed are 0..1"),
    ],
)
def test_processes_that_cannot_be_started(given, message):
    with pytest.raises(ValueError, match=message):
        multihost.start(*given)


@pytest.mark.integration
def test_processes_that_wait_for_others_in_vain(compiled):
    """Process 0 and those that look for it end alike."""
    code = "import os; os.environ['START_SECONDS'] = '3'; from repae_jax.distributed import multihost; "
    code += "multihost.start(False, {!r}, 2, {})"
    started = [peers.launch(["-c", code.format(peers.free_address(), index)], compiled) for index in range(2)]
    for process in started:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 75
        assert "error: the processes did not find each other within 3 s: start all of them" in error
        assert "Traceback" not in error


def test_seconds_to_wait_for_others(monkeypatch):
    assert multihost._start_seconds() == 600
    monkeypatch.setenv("START_SECONDS", "10 min")
    with pytest.raises(ValueError, match="START_SECONDS=10 min: expected whole seconds, 1..999999"):
        multihost.start(True)


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(multihost, "PACKAGES", ("jax", "no-such-package"))
    versions = multihost.versions()
    assert versions["jax"] == jax.__version__ and versions["no-such-package"] is None


def test_too_many_bad_records_of_all_together(monkeypatch):
    class Source(list):
        def name(self, record):
            return f"image-{record}"

    loader = SimpleNamespace(state=lambda: {"next_batch": 7, "bad_records": [4], "records": 100}, wait_seconds=0.5)
    monkeypatch.setattr(multihost, "all_gather", lambda value: [value, [[8, 4], 2.0]])
    source = Source(range(100))
    position, waited = train.input_so_far(loader, source, 0.02)
    assert position == {"next_batch": 7, "bad_records": [4, 8], "records": 100} and waited == [0.5, 2.0]
    with pytest.raises(multihost.CollectiveError, match=r"2 of 100 records .*, 1 are allowed: image-4, image-8"):
        train.input_so_far(loader, source, 0.01)


# ---- stopping and failing, without training ---------------------------------------------------------------------------


def end_of_waiting(compiled, event, killed=None):
    """[(exit code, standard error)] of two processes that wait for each other, and the seconds until then."""
    address = peers.free_address()
    scripts = [f"import peers; peers.wait_for_each_other({address!r}, {i}, {event!r})" for i in range(2)]
    started = [peers.launch(["-c", script], compiled) for script in scripts]
    try:
        for process in started:
            assert process.stdout.readline() == "started\n"
        if killed is not None:
            started[killed].kill()
        began = time.monotonic()
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, error) for process, error in zip(started, errors)], time.monotonic() - began


@pytest.mark.integration
def test_an_error_in_one_process_ends_all(compiled):
    ((code, first), (other, second)), _ = end_of_waiting(compiled, "error")
    assert code == 1 and other != 0
    assert first == f"error: process 1 on host {HOST} failed: RuntimeError: the disk has gone\n"
    assert "Traceback" in second and "RuntimeError: the disk has gone\nand more" in second


@pytest.mark.slow
def test_a_request_before_the_first_step_is_not_lost(compiled):
    ended, _ = end_of_waiting(compiled, "stop")
    assert [code for code, _ in ended] == [75, 75], ended


@pytest.mark.integration
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_within_a_minute(killed, compiled):
    ended, seconds = end_of_waiting(compiled, "killed", killed)
    code, error = ended[1 - killed]
    print(f"{seconds:.0f} s; exit code {code}\n{error[:3000]}")
    assert seconds < 40 and code not in (0, 75)
    assert "another process may be gone" in error or "detected fatal errors" in error


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Connection reset"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("data.batch_size=3: not divisible"), False),
    ],
)
def test_a_collective_that_fails_waits_for_jax_to_name_who_has_gone(error, waits, monkeypatch, capfd):
    """JAX aborts then, and schedulers start killed runs again; an error of the program (exit code 1) they do not."""
    slept = []
    monkeypatch.setattr(multihost, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(multihost, "_exit", lambda: None)
    client = SimpleNamespace(key_value_set=lambda *_: None)
    monkeypatch.setattr(multihost.distributed, "global_state", SimpleNamespace(client=client, process_id=0))
    multihost._end_all(error)
    assert bool(slept) == waits == ("another process may be gone" in capfd.readouterr().err)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_two_processes_equal_one(tiny_run, two):
    """Written by two, read by one."""
    assert_close(two.workdir, tiny_run)
    (state, data_state, step), (expected, position, _) = peers.state_of(two.workdir), peers.state_of(tiny_run)
    assert step == peers.STEPS and data_state == position
    assert small.largest_error(state, expected) < 5e-3  # Adam's first steps are signs of gradients


@pytest.mark.integration
def test_process_0_alone_writes_metrics_and_pictures(two):
    (_, first, _), (_, second, _) = two.ended
    assert "step 4/4 (100 %)" in first and "finished; everything is in" in first
    assert "step" not in second and "finished" not in second
    assert [line["step"] for line in peers.metrics_of(two.workdir)] == [1, 2, 3, 4]
    pictures = sorted(str(path.relative_to(two.workdir)) for path in two.workdir.rglob("*.png"))
    assert pictures == ["samples/0000004.png"]
    assert len(list((two.workdir / "tensorboard").iterdir())) == 1


@pytest.mark.integration
def test_another_config_is_refused_and_ends_all(tmp_path, compiled):
    with peers.Run(tmp_path / "run", compiled, flags=[(), ("--config.seed=7",)]) as run:
        ended = run.end(timeout=120)
    for code, _, error in ended:
        assert code == 1 and "Traceback" not in error, error
        assert f"error: process 1 on host {HOST} differs from process 0" in error
        assert "config.seed: 0 in process 0, 7 in process 1" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_asked_to_stop_all_stop_after_the_same_step(two, tmp_path, compiled):
    workdir = tmp_path / "run"
    with peers.Run(workdir, compiled, scripts="seconds_per_step=2.5") as run:
        run.wait_for("step 1/4")
        run.processes[1].send_signal(signal.SIGTERM)
        ended = run.end()
    assert [code for code, *_ in ended] == [75, 75], [error[-3000:] for *_, error in ended]
    stopped_at = peers.metrics_of(workdir)[-1]["step"]
    assert 1 < stopped_at < peers.STEPS
    for *_, error in ended:
        assert f"asked to stop: saved step {stopped_at}; run the same command to continue" in error
    assert peers.state_of(workdir)[2] == stopped_at
    peers.finish(workdir, compiled)
    assert_same_run(workdir, two)


@pytest.mark.slow
def test_asked_to_stop_before_the_first_step(two, tmp_path, compiled):
    """A run that is resumed trains no step then, and says so."""
    shutil.copytree(two.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with peers.Run(tmp_path / "run", compiled, scripts=["", "stop_early=True"]) as run:
        ended = run.end()
    assert [code for code, *_ in ended] == [75, 75], [error[-3000:] for *_, error in ended]
    assert peers.state_of(tmp_path / "run")[2] == 2
    assert all("asked to stop while" in error and "nothing was trained" in error for *_, error in ended)
    peers.finish(tmp_path / "run", compiled)
    assert_same_run(tmp_path / "run", two)


@pytest.mark.slow
def test_an_error_while_training_ends_all(tmp_path, compiled):
    with peers.Run(tmp_path / "run", compiled, scripts=["", "fail_at=4"]) as run:
        ended = run.end()
    assert 0 not in [code for code, *_ in ended], ended
    assert f"error: process 1 on host {HOST} failed: RuntimeError: the disk has gone\n" in ended[0][2]
    assert "the disk has gone" in ended[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(killed, two, tmp_path, compiled):
    workdir = tmp_path / "run"
    with peers.Run(workdir, compiled, scripts="seconds_per_step=3") as run:
        run.wait_for("step 3/4")
        began = time.monotonic()
        run.processes[killed].kill()
        code, _, error = run.end(timeout=120)[1 - killed]
        seconds = time.monotonic() - began
    print(f"{seconds:.0f} s; exit code {code}; {error[-3000:]}")
    assert seconds < 60 and code != 0
    assert "error: another process may be gone" in error or "detected fatal errors" in error
    if killed:  # without process 0 there is nobody to say who is gone
        assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", error)
    peers.finish(workdir, compiled)
    assert_same_run(workdir, two)


@pytest.mark.slow
def test_four_processes(tiny_run, two, tmp_path, compiled):
    """They train as one does, and continue what two have saved, as one continues what four have."""
    peers.finish(tmp_path / "whole", compiled, count=4)
    assert_close(tmp_path / "whole", tiny_run)
    for source, count in ((two.workdir, 4), (tmp_path / "whole", 1)):
        workdir = copy_of(source, tmp_path / str(count))
        shutil.rmtree(workdir / "checkpoints" / "4")
        peers.finish(workdir, compiled, count=count, devices=4 // count)
        assert_close(workdir, tiny_run)


@pytest.mark.slow
def test_repa_e_with_parameters_split_over_processes(tmp_path, compiled):
    """Two processes with two devices each, parameters over all four; and pictures."""
    flags = ("--config.mesh.fsdp=4", "--config.hooks.samples_every=4", "--config.hooks.reconstructions_every=4")
    workdir, alone = tmp_path / "run", tmp_path / "alone"
    peers.finish(workdir, compiled, flags=flags, scripts="min_sharded_size=64", devices=2, file="repae")
    assert train.train(peers.config("repae"), alone)[1]
    assert_close(workdir, alone)
    assert peers.state_of(workdir, "repae")[2] == peers.STEPS
    pictures = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*.png"))
    assert pictures == ["reconstructions/0000004.png", "samples/0000004.png"]
