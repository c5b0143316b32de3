"""Compiled programs in the workdir."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from repae_jax.distributed import compilation_cache


@pytest.mark.parametrize("given", ["runs/a", "gs://bucket/a"])
def test_compiled_programs_are_kept_in_the_workdir(given, monkeypatch):
    updates = {}
    monkeypatch.setattr(compilation_cache.buckets, "check", lambda address: None)
    config = SimpleNamespace(jax_compilation_cache_dir="elsewhere", update=updates.__setitem__)
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    compilation_cache.use_compilation_cache(given)
    assert updates == {}
    config.jax_compilation_cache_dir = None
    compilation_cache.use_compilation_cache(given)
    local = str(Path.cwd() / "runs/a/compiled")
    assert updates["jax_compilation_cache_dir"] == (local if given == "runs/a" else "gs://bucket/a/compiled")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A folder that keeps every program that is compiled; the session's folder is used again afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0)):
        jax.config.update(name, value)
    jax_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_programs_that_are_read_are_noted(empty_cache):
    def compile_again():
        with compilation_cache.reading_programs() as read:
            jax.jit(lambda x: 3 * x).lower(np.zeros(5)).compile()
        return len(read)

    assert compile_again() == 0
    assert list(empty_cache.glob("*-cache"))
    assert compile_again() == 1
    for path in empty_cache.glob("*-cache"):
        path.unlink()
    assert compile_again() == 0


def test_compiled_programs_that_were_not_written_whole_are_removed(monkeypatch, tmp_path, warnings):
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=lambda *_: None)
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    folder, whole = tmp_path / "compiled", compilation_cache.compilation_cache.compress_executable(bytes(range(256)) * 99)
    folder.mkdir()
    for name, content in {"whole": whole, "torn": whole[:-1], "empty": b""}.items():
        (folder / f"jit_{name}-cache").write_bytes(content)
    (folder / "other").touch()
    compilation_cache.use_compilation_cache(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["jit_whole-cache", "other"]
    assert len(warnings) == 2
