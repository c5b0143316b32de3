"""The tests' use of XLA's flags, and of compiled programs of earlier sessions."""

import os
import subprocess

import compiler_flags
import pytest

from repae_jax.distributed.private_jax import compilation_cache


def test_a_folder_for_each_version_and_set_of_flags(monkeypatch):
    folder = compiler_flags.folder_for(("--a=1",))
    assert folder == compiler_flags.folder_for(("--a=1",)) != compiler_flags.folder_for(("--a=2",))
    monkeypatch.setattr(compiler_flags, "version", lambda name: "0.0.1")
    assert compiler_flags.folder_for(("--a=1",)) != folder


@pytest.mark.integration
def test_flags_that_jaxlib_does_not_know_are_left_out(capsys):
    known = "--xla_force_host_platform_device_count=2"
    assert compiler_flags.accepted(("--xla_of_another_version=1", known)) == (known,)
    assert "does not know --xla_of_another_version=1: the tests run without" in capsys.readouterr().err


@pytest.mark.integration
def test_other_mistakes_end_the_tests_with_what_jaxlib_says():
    with pytest.raises(SystemExit, match="does not start with XLA_FLAGS=--xla_cpu_enable_fast_math=perhaps"):
        compiler_flags.accepted(("--xla_cpu_enable_fast_math=perhaps",))


def test_flags_of_this_session_are_known_without_another_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    flags = tuple(os.environ["XLA_FLAGS"].split())
    assert compiler_flags.accepted(flags) == flags


def test_old_and_torn_programs_are_removed(tmp_path):
    keep, other, old = folders = [tmp_path / name for name in ("keep", "other", "old")]
    for folder in folders:
        folder.mkdir()
    os.utime(keep, (0, 0))
    os.utime(old, (0, 0))
    content = compilation_cache.compress_executable(bytes(1000))
    for age, name in enumerate("abc"):
        (keep / f"{name}-cache").write_bytes(content)
        os.utime(keep / f"{name}-cache", (100 - age, 100 - age))
    (keep / "torn-cache").write_bytes(content[: len(content) // 2])
    compiler_flags.prune(keep, most_bytes=3 * len(content))
    assert sorted(path.name for path in keep.iterdir()) == ["a-cache", "b-cache"]
    assert other.exists() and not old.exists()
