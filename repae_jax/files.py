"""Files that are either complete or absent, on disks and in buckets."""

import contextlib
import errno
import functools
import json
import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from repae_jax import faults

RANDOM = "random"  # in place of a weight file: for tests, and to measure speed
_LFS = b"version https://git-lfs.github.com/spec/"


def write_json(path, content, *, overwrite: bool = False) -> None:
    """Writes a JSON file that is either complete or absent; errors as `write_all` and `json_writer`."""
    write_all({path: json_writer(content, path)}, overwrite=overwrite)


def json_writer(content, source) -> Callable[[Path], object]:
    """Returns the function for `write_all` that writes a JSON file; ValueError, with its name, if JSON cannot express it."""
    try:
        text = json.dumps(content, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: JSON cannot express the content ({error}); give plain values only") from error
    return lambda file: file.write_text(text)


def check_absent(*paths) -> None:
    """Raises FileExistsError if one of the paths exists: before work whose result could then not be written."""
    if present := [str(path) for path in map(epath.Path, paths) if path.exists()]:
        raise FileExistsError(f"{', '.join(present)} exists; choose another name, remove it, or ask to overwrite (--overwrite)")


def check_new(flag: str, given: str) -> Path:
    """Returns the path that a flag names; ValueError if it exists or has no folder: before work whose result goes there."""
    path = Path(given).expanduser()
    if path.exists():
        raise ValueError(f"{flag}={given} exists: choose another name, or move it away")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}={given}: there is no folder {path.parent}; make it first")
    return path


def write_all(writes: Mapping[Any, Callable[[Path], object]], *, overwrite: bool = False) -> None:
    """Writes files that belong together: all are complete and on disk before the first appears under its name.

    Args:
      writes: path -> function of a local Path, which writes the file there. A path is a local file, whose folder must exist, or
        an address such as gs://bucket/file, to which a local temporary file is then copied. The files appear in this order:
        put last the file that makes the others count, such as config.json.
      overwrite: replace files that exist.

    Raises:
      FileExistsError: if one of the files exists and `overwrite` is False.
      OSError: if they cannot be written, such as for lack of space; all of them are then as before. Only an object store that
        fails amid several files can leave some of them missing; the message says so.
    """
    if not overwrite:
        check_absent(*writes)
    paths, temporaries = list(writes), []
    with contextlib.ExitStack() as stack:
        for path, write in writes.items():
            if "://" in str(path):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                temporaries.append(folder / epath.Path(path).name)
            else:
                temporaries.append(Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.tmp"))
                stack.callback(temporaries[-1].unlink, missing_ok=True)
            _write_to_disk(temporaries[-1], write, path)
        # Files that stay while others are replaced could be taken for the new ones' (old statistics beside a new VAE), so all
        # but the first go before it is replaced. If the process is killed from here on, some files are missing and have to be
        # written again, but no mixture of old and new is ever there.
        try:
            for path in reversed(paths[1:]):
                epath.Path(path).unlink(missing_ok=True)
            for path, temporary in zip(paths, temporaries):
                if "://" in str(path):
                    epath.Path(temporary).copy(path, overwrite=True)  # an object store shows an object when it is whole
                else:
                    os.replace(temporary, path)
        except Exception as error:  # object stores have their own types besides OSError
            names = ", ".join(map(str, paths))
            state = "some of them may be missing now: write them again" if len(paths) > 1 else "nothing was changed there"
            raise OSError(f"{names} could not be put in place ({error}); {state}") from error
    for folder in {Path(path).parent for path in paths if "://" not in str(path)}:
        opened = os.open(folder, os.O_RDONLY)  # the new names, too, have to reach the disk
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _write_to_disk(temporary, write, path):
    """Calls `write` for the temporary file of `path`."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError("it is a folder")
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers make private files: keep the user's umask
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except Exception as error:  # the libraries that write raise RuntimeError and their own types besides OSError
        folder = temporary.parent
        advice = f"There is no folder {folder}: make it first"
        if folder.is_dir():
            free = shutil.disk_usage(folder).free / 1e9
            advice = f"The disk of {folder} has {free:.1f} GB free: make space, or choose another place"
        raise OSError(f"{path} could not be written ({error}); nothing was changed there. {advice}") from error


def read_json(path) -> dict[str, Any]:
    """Reads a JSON object from a path or an address; FileNotFoundError or ValueError if there is none."""
    path = epath.Path(path)
    check_file(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object but {type(content).__name__}; download it again")
    return content


def npz_writer(arrays, streamed=None) -> Callable[[Path], None]:
    """Returns the function for `write_all` that writes an npz, uncompressed.

    Args:
      arrays: name -> array.
      streamed: name -> (shape, iterable of uint8 arrays, its parts along the first axis), written before the others.
    """

    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (shape, parts) in (streamed or {}).items():
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in parts:
                        file.write(np.ascontiguousarray(part).tobytes())
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)

    return write


def save_png(path, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG that is either complete or absent, so that a reader never meets half an image; errors as `write_all`."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}; allowed: uint8 [H, W, 3]")
    write_all({path: functools.partial(Image.fromarray(image).save, format="PNG")}, overwrite=True)


def check_file(path) -> None:
    """Raises FileNotFoundError if there is no file `path`, ValueError if it is a Git LFS pointer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path, or download the file first")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")


def unreadable(path, error: Exception) -> OSError | ValueError:
    """Returns the error for a file that cannot be read: an OSError if the disk fails, else a ValueError, as it is damaged."""
    if faults.is_of_the_system(error):
        number = min(faults.errnos(error), default=errno.EIO)
        return OSError(number, f"{path} cannot be read ({error}); once its disk can be read, run the same command again")
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged or incomplete: copy or download it again"
    )
