"""Weight files <-> name -> numpy array, without executing anything that a file contains."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from checkpoints_tools.locate import PICKLED, SAFETENSORS, resolve
from checkpoints_tools.mapping import StateDict
from checkpoints_tools.torch_files import checked_array, read_torch, torch_writer
from repae_jax import files

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # the last for NAME.pth.tar
AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema")  # entries of averaged weights
_ENTRIES = ("state_dict", "model", "model_state_dict", "module", "net", "params", "weights", *AVERAGED)  # used if alone
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and AveragedModel, and of torch.compile
# `torch_files.DTYPES` by the names of a .safetensors header
_HEADER_DTYPES = ("BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "F32", "F64", "C64", "BF16")

Entries = str | Sequence[str] | None


def read_state_dict(path: str | Path, entry: Entries = None) -> dict[str, np.ndarray]:
    """Returns all arrays of a weight file by name, in the file's dtypes (ml_dtypes.bfloat16 among them).

    Args:
      path: path or name to `resolve`, of a file of weights, or of a folder as transformers or diffusers write it.
      entry: the state dict to take from a PyTorch file that holds several ('ema'), not for other files; or several names, of
        which the first that is there counts where a file is no single state dict.

    Raises ValueError if the file is damaged, of an unknown kind, a Git LFS pointer, holds more than arrays, arrays of a kind
    that numpy lacks (float8, sparse), or none, or if it is unclear which of its state dicts is meant; OSError if the disk
    fails, which says nothing about the file.
    """
    return read_file(resolve(path), entry)


def read_file(path: Path, entry: Entries = None) -> dict[str, np.ndarray]:
    """Reads the state dict of a local file or folder, see `read_state_dict`."""
    path = weight_file(path)
    if path.suffix in TORCH_SUFFIXES:
        return unwrap(read_torch(path), entry, path)
    if isinstance(entry, str):
        raise ValueError(f"{path}: entry={entry!r} is for {', '.join(TORCH_SUFFIXES)} files only; leave it out")
    readers = {".index.json": _read_shards, ".safetensors": _read_safetensors, ".npz": _read_npz}
    read = next((reader for ending, reader in readers.items() if path.name.endswith(ending)), None)
    if read is None:
        allowed = f".safetensors, .npz, {', '.join(TORCH_SUFFIXES)}, or a folder with model.safetensors"
        raise ValueError(f"{path}: unknown kind of weight file {path.suffix!r}; allowed: {allowed}")
    if not (state_dict := read(path)):
        raise ValueError(f"{path} holds no arrays; write it again from the original, or download it again")
    return without_wrappers(state_dict, path)


def weight_file(path: Path) -> Path:
    """Returns the file that holds the weights of a local path: itself, or the one in a Hugging Face folder."""
    if path.is_dir():
        names = (*SAFETENSORS, *PICKLED)
        if not (present := [path / name for name in names if (path / name).exists()]):
            listing = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
            advice = "name the weight file itself, or download the folder again"
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}, but {listing}; {advice}")
        path = present[0]
    files.check_file(path)
    return path


def _read_safetensors(path):
    import safetensors.numpy
    try:
        with safetensors.safe_open(path, "np") as file:
            names = file.keys()
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            metadata = file.metadata() or {}
        if unknown := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _HEADER_DTYPES]:
            allowed = ", ".join(_HEADER_DTYPES)
            raise ValueError(f"{path}: numpy has no such type: {', '.join(unknown)}; allowed: {allowed}. Save as F32")
        state_dict = safetensors.numpy.load_file(path)
        # safetensors.torch.save_model keeps one of the tensors that share memory, and the other names in the header
        return {alias: state_dict[name] for alias, name in metadata.items() if name in state_dict} | state_dict
    except safetensors.SafetensorError as error:
        raise files.unreadable(path, error) from error


def _read_shards(index):
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = weight_map.values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.unreadable(index, error) from error
    if nameless := [f"{shard!r} for {name}" for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise ValueError(f"{index} is damaged: weight_map has {', '.join(nameless)}, no file name; download it again")
    shards = sorted(set(shards))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}; do not trust it")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, named by {index.name}; download them")
    if unknown := [shard for shard in shards if not shard.endswith((".safetensors", *TORCH_SUFFIXES))]:
        raise ValueError(f"{index} names {', '.join(unknown)}; allowed endings: .safetensors, {', '.join(TORCH_SUFFIXES)}")
    state_dict = {}
    for shard in shards:
        file = index.parent / shard
        files.check_file(file)
        is_torch = file.suffix != ".safetensors"
        state_dict |= _single_state_dict(read_torch(file), None, file) if is_torch else _read_safetensors(file)
    if absent := sorted(set(weight_map) - set(state_dict)):
        raise ValueError(f"the shards of {index} lack {', '.join(absent)}; download all of them again")
    return state_dict


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state_dict = dict(arrays)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path} holds Python objects, whose reading could run code; save arrays only") from error
        raise files.unreadable(path, error) from error
    raw = [name for name, array in state_dict.items() if array.dtype.kind == "V"]
    if raw:  # numpy keeps the bytes of bfloat16, but forgets the type
        raise ValueError(f"{path}: dtype of {', '.join(raw)} is none of numpy's; save as float32 or .safetensors")
    return state_dict


def is_state_dict(value: Any) -> bool:
    """Returns True for a dict of names -> arrays that is not empty."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items())


def without_wrappers(state_dict: StateDict, source: str | Path) -> StateDict:
    """Returns a state dict without the prefixes of DistributedDataParallel, AveragedModel and torch.compile in its names.

    Raises ValueError, naming the source, if only some of the names have such a prefix, or two become the same.
    """
    names, prefix = [name for name in state_dict if name.rpartition(".")[2] != "n_averaged"], ""  # AveragedModel's counter
    while wrapper := next((w for w in _WRAPPERS if any(name.startswith(prefix + w) for name in names)), None):
        prefix += wrapper
        if bare := [name for name in names if not name.startswith(prefix)]:
            raise ValueError(
                f"{source}: {len(names) - len(bare)} names begin with {prefix}, {len(bare)} do not ({', '.join(bare[:3])}): it "
                "mixes a network in DistributedDataParallel or torch.compile with others; save the state dict of one of them"
            )
    renamed = {name: name.removeprefix(prefix).replace("._orig_mod.", ".") for name in (names if prefix else state_dict)}
    if all(new == name for name, new in renamed.items()):
        return state_dict
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"{source} holds arrays with and without torch.compile's _orig_mod in their names; save one of them")
    inserted = prefix or "_orig_mod."
    logging.warning("%s: %s in its names is DistributedDataParallel's or torch.compile's: read without", source, inserted)
    return {new: state_dict[name] for name, new in renamed.items()}


def unwrap(content: Any, entry: Entries, path: Path) -> StateDict:
    """Returns the state dict in the content of a PyTorch file, see `read_state_dict`."""
    return without_wrappers(_single_state_dict(content, entry, path), path)


def _single_state_dict(content, entry, path):
    inner = {name: value for name, value in content.items() if is_state_dict(value)} if isinstance(content, dict) else {}
    if isinstance(entry, str):
        if entry in inner:
            return inner[entry]
    elif is_state_dict(content):
        return content
    elif len(inner) == 1 and set(inner) <= set(_ENTRIES):
        ((name, state_dict),) = inner.items()
        if name in AVERAGED:
            logging.warning("%s: taking its entry %r, averaged weights", path, name)
        return state_dict
    elif preferred := [name for name in entry or () if name in inner]:
        logging.info("%s holds several state dicts: taking the averaged weights", path)
        return inner[preferred[0]]
    advice = "; torch.save(torch.load(FILE)[ENTRY], OTHER) saves it by itself" if inner else " (none: it holds no state dict)"
    found = f"no state dict {entry!r}" if isinstance(entry, str) else "no single state dict"
    raise ValueError(f"{path}: {found} in it; choose an entry of {sorted(inner)}{advice}")


def write_safetensors(
    path: str | Path, state_dict: StateDict, metadata: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Writes a file by `files.write_all` and `safetensors_writer`."""
    files.write_all({path: safetensors_writer(state_dict, path, metadata)}, overwrite=overwrite)


def write_files(writes: Mapping[Any, Callable[[Path], None]], *, overwrite: bool) -> list[Any]:
    """Writes files as `files.write_all`, their folders made where they do not exist; returns their paths."""
    for path in writes:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_all(writes, overwrite=overwrite)
    return list(writes)


def writer(state_dict: StateDict, path: str | Path) -> Callable[[Path], None]:
    """Returns a function for `files.write_all` that writes a state dict; the ending, .pt or .safetensors, says how."""
    return torch_writer(state_dict, path) if str(path).endswith(".pt") else safetensors_writer(state_dict, path)


def safetensors_writer(
    state_dict: StateDict, source: str | Path, metadata: Mapping[str, str] | None = None
) -> Callable[[Path], None]:
    """Returns a function for `files.write_all` that writes a .safetensors file, `metadata` as text in its header.

    Raises ValueError, naming the source, if something is no array of numbers, or the metadata is no text.
    """
    import safetensors.numpy
    if bad := [name for name, value in (metadata or {}).items() if not isinstance(name, str) or not isinstance(value, str)]:
        raise ValueError(f"{source}: the header keeps text only; {', '.join(map(str, bad))} is none: make it a string")
    # safetensors copies the memory as it lies, so transposed views must be laid out first
    arrays = {name: checked_array(value, name, source) for name, value in state_dict.items()}
    return lambda file: safetensors.numpy.save_file(arrays, file, metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the header's text of a .safetensors file."""
    import safetensors
    files.check_file(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise files.unreadable(path, error) from error
