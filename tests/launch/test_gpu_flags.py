"""XLA's flags and CUDA's variables for several GPUs."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launch import gpu_flags
from repae_jax.distributed import xla_flags

ROOT = Path(__file__).parents[2]
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.mark.integration
def test_this_jaxlib_knows_all_flags():
    table = gpu_flags.FLAGS | gpu_flags.BLACKWELL_FLAGS
    assert xla_flags.complaint(" ".join(f"--{name}={value}" for name, value in table.items())) is None


def flags_of(settings):
    return dict(word.split("=", 1) for word in settings["XLA_FLAGS"].split())


@pytest.fixture
def all_known(monkeypatch):
    monkeypatch.setattr(xla_flags, "complaint", lambda flags: None)


def test_what_is_set_by_the_kind_of_card(all_known):
    table = {f"--{name}": value for name, value in gpu_flags.FLAGS.items()}
    for cards, flags, variables in [
        (set(), {}, {}),
        ({8}, {}, {}),
        ({9}, {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({10}, {"--xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}, {}),
        ({9, 10}, {}, {}),
    ]:
        found = gpu_flags.settings({}, cards)
        assert flags_of(found) == table | flags
        assert found == {"XLA_FLAGS": found["XLA_FLAGS"], "XLA_CLIENT_MEM_FRACTION": ".9"} | variables


def test_what_the_user_sets_stays(all_known):
    environment = {"XLA_CLIENT_MEM_FRACTION": ".5", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    found = gpu_flags.settings(environment | {"XLA_FLAGS": f"--xla_dump_to=here {SCHEDULER}=false"}, {9})
    assert flags_of(found) == {f"--{name}": value for name, value in gpu_flags.FLAGS.items()} | {
        SCHEDULER: "false",
        "--xla_dump_to": "here",
    }
    assert found["XLA_FLAGS"].count(SCHEDULER) == 1 and set(found) == {"XLA_FLAGS"}
    older = gpu_flags.settings({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".8"}, set())
    assert set(older) == {"XLA_FLAGS"}, "JAX refuses both names together"


def test_a_flag_that_jaxlib_does_not_know_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(xla_flags, "unknown", lambda flags: [flag for flag in flags if flag.startswith(SCHEDULER)])
    monkeypatch.setattr(xla_flags, "complaint", lambda flags: None)
    found = gpu_flags.settings({}, set())
    assert set(flags_of(found)) == {f"--{name}" for name in gpu_flags.FLAGS} - {SCHEDULER}
    assert f" does not know {SCHEDULER}=true: not set\n" in capsys.readouterr().err


def test_a_value_that_jaxlib_refuses_is_named(monkeypatch):
    refused = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    monkeypatch.setattr(xla_flags, "complaint", lambda flags: "Failed to parse it" if refused in flags.split() else None)
    message = rf"^jaxlib \S+ refuses {refused}: Failed to parse it; put it into XLA_FLAGS with a value that this version takes$"
    with pytest.raises(ValueError, match=message):
        gpu_flags.settings({}, {10})
    own = "--xla_gpu_enable_command_buffer="
    assert flags_of(gpu_flags.settings({"XLA_FLAGS": own}, {10}))[own[:-1]] == ""


@pytest.mark.integration
def test_a_value_that_jaxlib_really_refuses(monkeypatch):
    monkeypatch.setitem(gpu_flags.FLAGS, "xla_gpu_enable_pipelined_all_gather", "perhaps")
    message = "refuses --xla_gpu_enable_pipelined_all_gather=perhaps: .*perhaps.*; put it"
    with pytest.raises(ValueError, match=message) as caught:
        gpu_flags.settings({}, set())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("echo 9.0; echo 9.0", {9}), ("echo 8.9; echo 12.0", {8, 12}), ("echo no driver; exit 9", None), ("echo '[N/A]'", None)],
)
def test_the_kinds_of_cards_are_asked_of_the_driver(answer, found, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_flags.capabilities() == set()
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    if found:
        assert gpu_flags.capabilities() == found
    else:
        with pytest.raises(RuntimeError, match="the GPUs of this machine cannot be listed: nvidia-smi .*: (no driver|.N/A.)"):
            gpu_flags.capabilities()


@pytest.mark.parametrize("flags", ["--xla_dump_to=a --xla_dump_hlo_as_text", "--xla_gpu_typo=1"])
@pytest.mark.integration
def test_a_shell_takes_the_settings_or_a_line(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PATH", f"{Path(gpu_flags.sys.executable).parent}:/usr/bin:/bin")
    code = 'settings=$(python -m launch.gpu_flags) && eval "$settings" && printf %s "$XLA_FLAGS"'
    shell = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "typo" in flags:
        assert shell.stdout == "" and shell.returncode == 1
        assert shell.stderr.startswith("error: XLA_FLAGS=--xla_gpu_typo=1 is refused") and shell.stderr.count("\n") == 1
    else:
        assert shell.returncode == 0 and shlex.split(shell.stdout)[-2:] == flags.split()
        assert f"{SCHEDULER}=true" in shlex.split(shell.stdout)
