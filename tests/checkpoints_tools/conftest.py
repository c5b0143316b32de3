"""Shared by the tests of weight files: files that are removed at the end, and a bucket of remote storage."""

import os
import shutil
import sys
from pathlib import PosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from checkpoints_tools import convert, locate, vae, vit, weights
from repae_jax import files


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """write(name, content) -> path: bytes, or a state dict as a file of PyTorch's or .safetensors; None is no file, ''.

    The files are large, so they go at the end.
    """
    folder, paths = tmp_path_factory.mktemp("files"), set()

    def write(name, content):
        if content is None:
            return ""
        path = folder / name
        paths.add(path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".pth":
            torch = pytest.importorskip("torch")
            torch.save({name: torch.from_numpy(array) for name, array in content.items()}, path)
        else:
            safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in content.items()}, path)
        return path

    yield write
    for path in paths:
        path.unlink()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is reached as gs://bucket, in place of the layer that reaches real ones; nothing else may be written."""
    folder = tmp_path / "bucket"
    folder.mkdir()

    def local(part):
        return str(part).replace("gs://bucket", str(folder))

    class Remote(PosixPath):
        """A local folder that looks like what etils.epath gives for an address."""

        def __new__(cls, *parts):
            return super().__new__(cls, *map(local, parts))

        def __init__(self, *parts):  # where Python from 3.12 on reads the parts
            if sys.version_info >= (3, 12):
                super().__init__(*map(local, parts))

        def stat(self, **_):
            status = os.stat(self)
            return SimpleNamespace(length=status.st_size, mtime=status.st_mtime_ns, st_mode=status.st_mode)

        def copy(self, target, overwrite):
            shutil.copy(self, Remote(target))

    for module in (locate, files, weights, vit, vae, convert):
        monkeypatch.setattr(module, "epath", SimpleNamespace(Path=Remote))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield folder
    assert list((tmp_path / "here").iterdir()) == []
