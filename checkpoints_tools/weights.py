"""Weight files <-> name -> numpy array, without executing anything that a file contains."""

import argparse
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

_TORCH = (".pt", ".pth", ".bin")
_LFS = b"version https://git-lfs.github.com/spec/"


def read_state_dict(path, entry=None):
    """All arrays of a weight file.

    Args:
      path: `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin` file, or a Hugging Face folder with `model.safetensors` or
        `model.safetensors.index.json` and its shards.
      entry: which state dict to take from a PyTorch file that holds several ('ema'); not for other files.

    Returns:
      dict name -> numpy array in the file's dtype (ml_dtypes.bfloat16 where the file says so).

    Raises:
      FileNotFoundError: if the file, or a shard, does not exist.
      ValueError: if the file is damaged, of an unknown kind, a Git LFS pointer, holds more than arrays, or if it is
        unclear which of its state dicts is meant.
      ImportError: for a PyTorch file when PyTorch is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of(path)
    _check_file(path)
    if path.suffix in _TORCH:
        return _read_torch(path, entry)
    if entry is not None:
        raise ValueError(f"{path}: entry={entry!r} is for {', '.join(_TORCH)} files only; leave it out")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise ValueError(
        f"{path}: unknown kind of weight file {path.suffix!r}; allowed: .safetensors, .npz, {', '.join(_TORCH)}, "
        "or a folder with model.safetensors"
    )


def _file_of(folder):
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).exists():
            return folder / name
    listing = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json, but {listing}; "
        "name the weight file itself, or download the folder again"
    )


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


def _read_torch(path, entry):
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
    tensors = _unwrap(loaded, entry, path, torch.Tensor)
    return {name: _to_numpy(tensor, torch) for name, tensor in tensors.items()}


def _unwrap(loaded, entry, path, tensor_type):
    def is_state_dict(value):
        return isinstance(value, dict) and bool(value) and all(isinstance(x, tensor_type) for x in value.values())

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


def _to_numpy(tensor, torch):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # unknown to numpy: pass the bits
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


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
    write_atomically(Path(path), lambda file: safetensors.numpy.save_file(arrays, file, metadata), overwrite)


def write_json(path, content, *, overwrite=False):
    """Writes a JSON file that is either complete or absent.

    Args:
      path: the file; its folder must exist.
      content: what to write.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
    """
    write_atomically(Path(path), lambda file: file.write_text(json.dumps(content, indent=2) + "\n"), overwrite)


def write_atomically(path, write, overwrite=False):
    """Lets `write(temporary path)` write a file, which then appears under `path` complete and on disk, or not at all.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, remove it, or pass overwrite=True")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resolve(name_or_path):
    """Local path of weights: a file or folder that exists, or a model of the Hugging Face hub, downloaded if need be.

    Args:
      name_or_path: a path, or 'organisation/name'. The hub's cache and HF_HUB_OFFLINE are respected.

    Returns:
      Path.

    Raises:
      FileNotFoundError: if there is neither such a path nor such a model, or it cannot be downloaded.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path} does not exist, and is no hub name of the form 'organisation/name'")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(name_or_path), allow_patterns=["config.json", "*.safetensors", "*.index.json"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is no local path and cannot be had from the Hugging Face hub ({error}). Check the name "
            f"and the network (is HF_HUB_OFFLINE set?), or run `hf download {name_or_path}` on a machine that has one "
            "and give the path of a copy of that folder"
        ) from error
    return Path(folder)


def read_config(folder):
    """The config.json of a Hugging Face folder.

    Args:
      folder: the folder.

    Returns:
      dict.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    _check_file(path)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object but {type(config).__name__}; download it again")
    return config
