"""XLA_FLAGS that jaxlib does not take: one line in the place of an abort."""

import subprocess
import sys

import pytest

from repae_jax.distributed import xla_flags

KNOWN = "--xla_force_host_platform_device_count=2"


@pytest.mark.integration
def test_jaxlib_is_asked(monkeypatch):
    assert xla_flags.complaint(KNOWN) is None and xla_flags.unknown([KNOWN]) == []
    given = ["--xla_gpu_a=1", KNOWN, "--xla_b"]
    assert xla_flags.unknown(given) == ["--xla_gpu_a=1", "--xla_b"]
    for flags, said in [
        (" ".join(given), "Unknown flags in XLA_FLAGS: --xla_gpu_a=1 --xla_b"),
        ("--xla_gpu_typo=1", "Unknown flag in XLA_FLAGS: --xla_gpu_typo=1"),
        ("--xla_cpu_enable_fast_math=no2", "Couldn't interpret value no2 for flag xla_cpu_enable_fast_math."),
        ("--xla_gpu_enable_command_buffer=NONE", "Illegal value for --xla_gpu_enable_command_buffer 'NONE'"),
    ]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(ValueError) as caught:
            xla_flags.check()
        message = str(caught.value)
        assert message.startswith(f"XLA_FLAGS={flags} is refused by jaxlib ") and said in message and "\n" not in message


@pytest.mark.integration
def test_a_command_refuses_a_flag_in_one_line(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_typo=1")
    command = [sys.executable, "-m", "repae_jax.benchmark", "--config", "configs/repae.py:tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: XLA_FLAGS=--xla_gpu_typo=1 is refused by jaxlib ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [None, ""])
def test_without_flags_no_process_is_started(flags, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    if flags is None:
        monkeypatch.delenv("XLA_FLAGS")
    else:
        monkeypatch.setenv("XLA_FLAGS", flags)
    xla_flags.check()
