"""Folders of runs: their names, and whether they can be written to."""

import glob
import re
from pathlib import Path

import jax
from etils import epath

from repae_jax import buckets, faults

_LONGEST = 3800  # bytes of a path: names below it need the rest of the 4095 that Linux allows


def prepare_workdir(workdir: epath.PathLike) -> epath.Path:
    """Creates a workdir, a local path or `gs://bucket/path`, proves that it can be written to, and returns its absolute path.

    ValueError, for a bucket OSError, if it cannot be written to, or has a name that checkpoints would be lost under.
    """
    check_name(workdir)
    path = absolute(workdir)
    probe = path / f".write_test-{jax.process_index()}"
    buckets.check(path)
    try:
        with buckets.reached(path):
            path.mkdir(parents=True, exist_ok=True)
            probe.write_text("writable")
            probe.unlink(missing_ok=True)
    except OSError as error:
        if buckets.is_address(path):
            raise
        raise ValueError(
            f"workdir {str(path)!r} cannot be written to ({type(error).__name__}: {faults.first_line(error)}): give a folder "
            "that exists or can be created, where this user may create files"
        ) from error
    return path


def check_name(workdir: epath.PathLike) -> None:
    """Raises ValueError for names of workdirs that Orbax and TensorStore do not take as they are.

    Orbax lists its files with a pattern that begins with the path: with `[…]` in it, it finds nothing and completes checkpoints
    without arrays, with `*` and `?` it may find those of another run. TensorStore takes a backslash for the end of a name.
    """
    name, changed = str(absolute(workdir)), str.maketrans(dict.fromkeys("[]*?\\", "_"))
    if glob.escape(name) != name or "\\" in name:
        raise ValueError(
            f"workdir {name!r}: the libraries that save checkpoints take [ * ? and backslashes in it for a pattern; "
            f"give a path without them, for instance {name.translate(changed)!r}"
        )
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"workdir {name!r} is not UTF-8; give a path that is") from error
    if size > _LONGEST:
        raise ValueError(f"workdir {name[:100]!r}… is {size} bytes long, of {_LONGEST} allowed; give a shorter path")


def absolute(workdir: epath.PathLike) -> epath.Path:
    """Returns the workdir as an absolute path, which Orbax requires; addresses such as gs:// already are."""
    if not str(workdir):
        raise ValueError("workdir '' is empty; give a folder, for instance runs/repae, or gs://bucket/path")
    path = epath.Path(workdir)
    if buckets.is_address(workdir):
        return path
    path = path.expanduser()
    if re.match(r"\w+:/", str(path)):  # etils takes it for an address with two
        raise ValueError(f"workdir {str(path)!r}: an address has two slashes, and no path begins so")
    return epath.Path(Path(path).resolve()) if ".." in path.parts else path.absolute()  # .. of a link is not where the link is
