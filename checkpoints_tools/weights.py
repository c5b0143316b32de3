"""Weight files <-> name -> numpy array, without executing anything that a file contains."""

import argparse
import json
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from checkpoints_tools.locate import resolve

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# what a Hugging Face folder may call its weights; the first that exists counts
_FOLDER_FILES = (
    "model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin", "diffusion_pytorch_model.bin",
)  # fmt: skip
_LFS = b"version https://git-lfs.github.com/spec/"


def read_state_dict(path, entry=None):
    """All arrays of a weight file.

    Args:
      path: `.safetensors`, `.npz`, `.pt`, `.pth`, `.ckpt` or `.bin` file, or a Hugging Face folder with `model.safetensors`,
        `model.safetensors.index.json` and its shards, or the same of diffusers; local, or what `locate.resolve` takes.
      entry: which state dict to take from a PyTorch file that holds several ('ema'); not for other files.

    Returns:
      dict name -> numpy array in the file's dtype (ml_dtypes.bfloat16 where the file says so).

    Raises:
      FileNotFoundError: if the file, or a shard, does not exist.
      ValueError: if the file is damaged, of an unknown kind, a Git LFS pointer, holds more than arrays, or if it is
        unclear which of its state dicts is meant.
      ImportError: for a PyTorch file when PyTorch is not installed.
    """
    path = weight_file(path)
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(read_torch(path), entry, path)
    if entry is not None:
        raise ValueError(f"{path}: entry={entry!r} is for {', '.join(TORCH_SUFFIXES)} files only; leave it out")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise ValueError(
        f"{path}: unknown kind of weight file {path.suffix!r}; allowed: .safetensors, .npz, {', '.join(TORCH_SUFFIXES)}, "
        "or a folder with model.safetensors"
    )


def weight_file(path):
    """The file that holds the weights of `path`: itself, or the one in a Hugging Face folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is a Git LFS pointer.
    """
    path = resolve(path)
    if path.is_dir():
        found = [path / name for name in _FOLDER_FILES if (path / name).exists()]
        if not found:
            listing = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{path} has none of {', '.join(_FOLDER_FILES)}, but {listing}; name the weight file itself, or download the "
                "folder again"
            )
        path = found[0]
    _check_file(path)
    return path


def _check_file(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path, or download the file first")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")


def _damaged(path, error):
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged or incomplete: download it again"
    )


def _read_safetensors(path):
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error


def _read_shards(index):
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}; do not trust it")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, named by {index.name}; download them")
    state_dict = {}
    for shard in shards:
        _check_file(index.parent / shard)
        state_dict |= _read_safetensors(index.parent / shard)
    absent = sorted(set(weight_map) - set(state_dict))
    if absent:
        raise ValueError(f"the shards of {index} lack {', '.join(absent)}; download all of them again")
    return state_dict


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state_dict = dict(arrays)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path} holds Python objects, whose reading could run code; save arrays only") from error
        raise _damaged(path, error) from error
    raw = [name for name, array in state_dict.items() if array.dtype.kind == "V"]
    if raw:  # numpy keeps the bytes of bfloat16, but forgets the type
        raise ValueError(f"{path}: dtype of {', '.join(raw)} is none of numpy's; save as float32 or .safetensors")
    return state_dict


def read_torch(path):
    """Everything in a PyTorch file.

    Args:
      path: local file.

    Returns:
      What was saved, with numpy arrays (views of the mapped file) for tensors and a dict for an argparse.Namespace.

    Raises:
      ValueError: if the file is damaged or holds more than arrays and plain values; nothing of it is run.
      ImportError: if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: `pip install repae_jax[torch]`, or convert it to .safetensors elsewhere"
        ) from error
    try:
        # published training checkpoints keep their command line, an argparse.Namespace, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than arrays, which could run code when read; nothing was run. "
            f"Get the weights as .safetensors, or save only the state dict ({error})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise _damaged(path, error) from error

    def to_numpy(value):
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if value.dtype == torch.bfloat16:  # unknown to numpy: pass the bits
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()
        if isinstance(value, argparse.Namespace):
            return vars(value)
        if isinstance(value, dict):
            return {name: to_numpy(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(to_numpy, value))
        return value

    return to_numpy(loaded)


def is_state_dict(value):
    """Whether it is a dict of names -> arrays, and not empty."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items())
    )


def _unwrap(loaded, entry, path):
    inner = {name: value for name, value in loaded.items() if is_state_dict(value)} if isinstance(loaded, dict) else {}
    if entry in inner:
        return inner[entry]
    if entry is None and is_state_dict(loaded):
        return loaded
    if entry is None and len(inner) == 1 and set(inner) <= {"state_dict", "model"}:
        return next(iter(inner.values()))
    raise ValueError(
        f"{path}: {'no single state dict' if entry is None else f'no state dict {entry!r}'} in it; "
        f"choose an entry of {sorted(inner)}" + ("" if inner else " (none: the file holds no state dict)")
    )


def write_safetensors(path, state_dict, metadata=None, *, overwrite=False):
    """Writes a file that is either complete or absent.

    Args:
      path: the file; its folder must exist.
      state_dict: name -> array.
      metadata: str -> str, kept in the file's header.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
    """
    import safetensors.numpy

    # safetensors copies the memory as it lies, so transposed views must be laid out first
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    write_atomically(path, lambda file: safetensors.numpy.save_file(arrays, file, metadata), overwrite)


def write_torch(path, content, *, overwrite=False):
    """Writes a PyTorch file that is either complete or absent, as `torch.save` does.

    Args:
      path: the file; its folder must exist.
      content: nested dicts and lists of numpy arrays, which become tensors, and plain values; an argparse.Namespace is kept.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
      ImportError: if PyTorch is not installed.
    """
    import torch

    def to_tensors(value):
        if isinstance(value, np.ndarray):
            value = np.asarray(value, order="C")  # keeps zero dimensions, which ascontiguousarray does not
            if value.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(value)
        if isinstance(value, dict):
            return {name: to_tensors(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(to_tensors, value))
        return value

    with warnings.catch_warnings():  # arrays that jax owns are read-only; nobody writes to these tensors
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = to_tensors(content)

    def save(file):
        with file.open("wb") as opened:  # torch would write the temporary file's name into it
            torch.save(tensors, opened)

    write_atomically(path, save, overwrite)


def write_json(path, content, *, overwrite=False):
    """Writes a JSON file that is either complete or absent.

    Args:
      path: the file; its folder must exist.
      content: what to write.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
    """
    write_atomically(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"), overwrite)


def check_absent(*paths):
    """FileExistsError if one of the paths exists: before work whose result could then not be written."""
    taken = [str(path) for path in map(epath.Path, paths) if path.exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)} exists; choose another name, remove it, or ask to overwrite (--overwrite)")


def write_atomically(path, write, overwrite=False):
    """Lets `write(temporary path)` write a file, which then appears under `path` complete and on disk, or not at all.

    Args:
      path: local file, or an address such as gs://bucket/file, to which a local temporary file is then copied.
      write: function of a local Path.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
      OSError: if it cannot be written, such as for lack of space; `path` is then as before.
    """
    if not overwrite:
        check_absent(path)
    if "://" in str(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / epath.Path(path).name
            write(local)
            epath.Path(local).copy(path, overwrite=True)  # an object store shows an object when it is whole
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers make private files: keep what the user's umask says
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # the libraries that write raise RuntimeError and their own types besides OSError
        free = shutil.disk_usage(path.parent).free / 1e9 if path.parent.is_dir() else 0.0
        raise OSError(
            f"{path} could not be written ({error}); nothing was changed there. Its disk has {free:.1f} GB free: make space, "
            "or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, has to reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_metadata(path):
    """The str -> str header of a .safetensors file."""
    import safetensors

    _check_file(Path(path))
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error


def read_config(folder):
    """The config.json of a Hugging Face folder, see `read_json`."""
    return read_json(Path(folder) / "config.json")


def read_json(path):
    """A JSON object.

    Args:
      path: local file.

    Returns:
      dict.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, a Git LFS pointer, or no JSON object.
    """
    path = Path(path)
    _check_file(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object but {type(content).__name__}; download it again")
    return content
