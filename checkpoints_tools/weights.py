"""Weight files <-> name -> numpy array, without executing anything that a file contains."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from checkpoints_tools.locate import PICKLED, SAFETENSORS, resolve
from repae_jax import files

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # the last of NAME.pth.tar
AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema")  # entries of averaged weights
_ENTRIES = ("state_dict", "model", "model_state_dict", "module", "net", "params", "weights", *AVERAGED)  # taken if alone
_WRAPPERS = ("module.", "_orig_mod.")  # before names: DistributedDataParallel's and AveragedModel's, torch.compile's
_AVERAGED_MODEL_COUNTER = "n_averaged"
_FOLDER_FILES = (*SAFETENSORS, *PICKLED)
_TORCH_BEGINNINGS = (b"PK", b"\x80")  # a zip archive, or a pickle as torch.save made them before 1.6
# what both .safetensors and PyTorch files keep, by numpy's names and by those of a .safetensors header
_DTYPES = tuple(
    map(np.dtype, ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", ml_dtypes.bfloat16))
)
_HEADER_DTYPES = ("BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "F32", "F64", "C64", "BF16")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)  # what `read_torch` takes back, besides arrays and containers


def read_state_dict(path, entry=None):
    """All arrays of a weight file.

    Args:
      path: `.safetensors`, `.npz`, `.pt`, `.pth`, `.pth.tar`, `.ckpt` or `.bin` file, or a Hugging Face folder with
        `model.safetensors`, `model.safetensors.index.json` and its shards, the same of diffusers, or in `.bin` files; local, or
        what `locate.resolve` takes.
      entry: which state dict to take from a PyTorch file that holds several ('ema'), or several names, of which the first that
        is there counts; not for other files.

    Returns:
      dict name -> numpy array in the file's dtype (ml_dtypes.bfloat16 where the file says so); names as in the network itself,
      see `without_wrappers`.

    Raises:
      FileNotFoundError: if the file, or a shard, does not exist.
      ValueError: if the file is damaged, of an unknown kind, a Git LFS pointer, holds more than arrays, arrays of a kind
        that numpy lacks (float8, sparse), or none, or if it is unclear which of its state dicts is meant; also as
        `without_wrappers`.
      OSError: if the disk fails, which says nothing of the file.
      ImportError: for a PyTorch file when PyTorch is not installed.
    """
    path = weight_file(path)
    if path.suffix in TORCH_SUFFIXES:
        return unwrap(read_torch(path), entry, path)
    if entry is not None:
        raise ValueError(f"{path}: entry={entry!r} is for {', '.join(TORCH_SUFFIXES)} files only; leave it out")
    if path.name.endswith(".index.json"):
        state_dict = _read_shards(path)
    elif path.suffix == ".safetensors":
        state_dict = _read_safetensors(path)
    elif path.suffix == ".npz":
        state_dict = _read_npz(path)
    else:
        raise ValueError(
            f"{path}: unknown kind of weight file {path.suffix!r}; allowed: .safetensors, .npz, {', '.join(TORCH_SUFFIXES)}, "
            "or a folder with model.safetensors"
        )
    if not state_dict:
        raise ValueError(f"{path} holds no arrays; write it again from the original, or download it again")
    return without_wrappers(state_dict, path)


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
    files.check_file(path)
    return path


def _read_safetensors(path):
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, "np") as file:
            names = file.keys()
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            metadata = file.metadata() or {}
        strange = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _HEADER_DTYPES]
        if strange:
            raise ValueError(
                f"{path}: numpy has no such type: {', '.join(strange)}; allowed: {', '.join(_HEADER_DTYPES)}. Save as F32"
            )
        state_dict = safetensors.numpy.load_file(path)
        # of tensors that share memory, safetensors.torch.save_model keeps one, and the other names in the header
        return {alias: state_dict[name] for alias, name in metadata.items() if name in state_dict} | state_dict
    except safetensors.SafetensorError as error:
        raise files.unreadable(path, error) from error


def _read_shards(index):
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = weight_map.values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.unreadable(index, error) from error
    nameless = [f"{shard!r} for {name}" for name, shard in weight_map.items() if not isinstance(shard, str)]
    if nameless:
        raise ValueError(f"{index} is damaged: weight_map has {', '.join(nameless)}, no file name; download it again")
    shards = sorted(set(shards))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}; do not trust it")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, named by {index.name}; download them")
    strange = [shard for shard in shards if not shard.endswith((".safetensors", *TORCH_SUFFIXES))]
    if strange:
        raise ValueError(f"{index} names {', '.join(strange)}; allowed endings: .safetensors, {', '.join(TORCH_SUFFIXES)}")
    state_dict = {}
    for shard in shards:
        file = index.parent / shard
        files.check_file(file)
        state_dict |= _read_safetensors(file) if file.suffix == ".safetensors" else _unwrapped(read_torch(file), None, file)
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
        raise files.unreadable(path, error) from error
    raw = [name for name, array in state_dict.items() if array.dtype.kind == "V"]
    if raw:  # numpy keeps the bytes of bfloat16, but forgets the type
        raise ValueError(f"{path}: dtype of {', '.join(raw)} is none of numpy's; save as float32 or .safetensors")
    return state_dict


def read_torch(path):
    """Everything in a PyTorch file.

    Args:
      path: local file.

    Returns:
      What was saved, with numpy arrays (views of the mapped file) for tensors, a dict for an argparse.Namespace and plain
      numbers for numpy's.

    Raises:
      ValueError: if the file is damaged (zip archives, which all but the oldest are, hold checksums) or holds more than arrays
        and plain values; nothing of it is run.
      ImportError: if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: `pip install repae_jax[torch]`, or convert it to .safetensors elsewhere"
        ) from error
    with Path(path).open("rb") as file:
        start = file.read(12)
    if not start.startswith(_TORCH_BEGINNINGS):
        raise ValueError(f"{path} is no PyTorch file, or damaged (it begins with {start!r}): check it, or download it again")
    try:
        records = _checked_records(path) if zipfile.is_zipfile(path) else []
        script = _is_torchscript(records)
        if not script:
            # the bytes of compressed records are no arrays; torch maps them all the same
            stored = bool(records) and all(record.compress_type == zipfile.ZIP_STORED for record in records)
            # published training checkpoints keep their command line beside the weights, an argparse.Namespace, others a score
            with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY_SCALARS]):
                loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=stored)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} {_refusal(error)}, which could run code when read; nothing was run. "
            "Get the weights as .safetensors, or save only the state dict"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # on bytes that are no pickle, the reader raises whatever it happens to stumble over
        raise files.unreadable(path, error) from error
    if script:
        raise ValueError(
            f"{path} is a TorchScript archive, a network with its code, which is not run here; get the state dict, or a "
            ".safetensors file (torch.save(torch.jit.load(file).state_dict(), other) makes one of a file that you trust)"
        )

    def to_numpy(value, name):
        if isinstance(value, torch.Tensor):
            try:
                if value.dtype == torch.bfloat16:  # unknown to numpy: pass the bits
                    return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                return value.numpy(force=True)
            except (TypeError, RuntimeError) as error:  # float8, quantized, sparse, or on no device
                raise ValueError(
                    f"{path}: {name} is a tensor that numpy lacks ({value.dtype}, {value.layout}, device {value.device}); "
                    "save it as a dense float32 tensor"
                ) from error
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        return _rebuilt(value, name, to_numpy)

    return to_numpy(loaded, "")


class _Dtype:
    """Stands for numpy.dtype in a pickle: a name such as 'f8' and its byte order, for numpy's own would take any structure."""

    def __init__(self, name, align, copy):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, content):
    """Returns the plain number of a numpy scalar in a pickle."""
    kind = np.dtype(dtype.order.replace("|", "") + dtype.name)
    if kind not in _DTYPES or not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of {kind}, which is no number")
    (value,) = np.frombuffer(content, kind)
    return value.item()


# under the names that numpy 1 and 2 have for them
_NUMPY_SCALARS = [
    _Dtype, (_Dtype, "numpy.dtype"), (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar")
]  # fmt: skip


def _rebuilt(value, name, change):
    """`value` with `change(item, name)` of what it contains, if it is a container; names are joined with dots."""
    if isinstance(value, dict):
        return {key: change(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [change(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _checked_records(path):
    """Returns the ZipInfo of all records of a PyTorch file, whose checksums fit: torch itself does not look at them."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            logging.warning("%s was written without checksums: whether it is damaged cannot be told", path)
            return records
        for record in records:
            try:
                with archive.open(record) as file:
                    while file.read(2**20):
                        pass
            except (zipfile.BadZipFile, zlib.error) as error:
                raise zipfile.BadZipFile(f"record {record.filename} is not what was written: {error}") from error
    return records


def _is_torchscript(records):
    inside = [record.filename.partition("/")[2] for record in records]
    return any(name == "constants.pkl" or name.startswith("code/") for name in inside)


def _refusal(error):
    """What torch.load refused, without its advice to read the file as code."""
    text = str(error)
    blocked = re.search(r"GLOBAL ([\w.]+)", text)
    if blocked:
        return f"holds more than arrays: it asks for {blocked[1]}"
    detail = (text.partition("WeightsUnpickler error:")[2].strip() or "not readable").splitlines()[0]
    return f"is damaged, or holds more than arrays ({detail})"


def is_state_dict(value):
    """Whether it is a dict of names -> arrays, and not empty."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items())
    )


def without_wrappers(state_dict, source):
    """Returns a state dict without what DistributedDataParallel, AveragedModel and torch.compile put into its names.

    Args:
      state_dict: name -> array.
      source: the file's name, for messages.

    Returns:
      dict, in the same order.

    Raises:
      ValueError: if only some of the names have such a prefix, or two become the same.
    """
    names, prefix = [name for name in state_dict if name.rpartition(".")[2] != _AVERAGED_MODEL_COUNTER], ""
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


def unwrap(loaded, entry, path):
    """The state dict in what `read_torch` returned, see `read_state_dict`; `path` is the file it is from."""
    return without_wrappers(_unwrapped(loaded, entry, path), path)


def _unwrapped(loaded, entry, path):
    inner = {name: value for name, value in loaded.items() if is_state_dict(value)} if isinstance(loaded, dict) else {}
    for name in (entry,) if isinstance(entry, str) else entry or ():
        if name in inner:
            return inner[name]
    if entry is None and is_state_dict(loaded):
        return loaded
    if entry is None and len(inner) == 1 and set(inner) <= set(_ENTRIES):
        ((name, state_dict),) = inner.items()
        if name in AVERAGED:
            logging.warning("%s: taking its entry %r, averaged weights", path, name)
        return state_dict
    advice = "; torch.save(torch.load(FILE)[ENTRY], OTHER) saves it by itself" if inner else " (none: it holds no state dict)"
    raise ValueError(
        f"{path}: {'no single state dict' if entry is None else f'no state dict {entry!r}'} in it; "
        f"choose an entry of {sorted(inner)}{advice}"
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
      ValueError: as `safetensors_writer`.
      OSError: as `files.write_all`.
    """
    files.write_all({path: safetensors_writer(state_dict, path, metadata)}, overwrite=overwrite)


def safetensors_writer(state_dict, source, metadata=None):
    """Function for `files.write_all` that writes a .safetensors file.

    Args:
      state_dict: name -> array.
      source: the file's name, for errors.
      metadata: str -> str, kept in the file's header.

    Raises:
      ValueError: if something is no array of numbers, or the metadata is no text.
    """
    import safetensors.numpy

    bad = [name for name, value in (metadata or {}).items() if not isinstance(name, str) or not isinstance(value, str)]
    if bad:
        raise ValueError(f"{source}: the header keeps text only; {', '.join(map(str, bad))} is none: make it a string")
    # safetensors copies the memory as it lies, so transposed views must be laid out first
    arrays = {name: _array(value, name, source) for name, value in state_dict.items()}
    return lambda file: safetensors.numpy.save_file(arrays, file, metadata)


def _array(value, name, source):
    """numpy array in C order, of a type that files keep."""
    try:
        array = np.asarray(value, order="C")  # keeps zero dimensions, which ascontiguousarray does not
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {name} is {type(value).__name__}, no numpy array ({error}); give one") from error
    if array.dtype not in _DTYPES:
        raise ValueError(
            f"{source}: {name} is {type(value).__name__} of {array.dtype}; allowed: arrays of {', '.join(map(str, _DTYPES))}"
        )
    return array


def write_torch(path, content, *, overwrite=False):
    """Writes a PyTorch file that is either complete or absent, as `torch.save` does.

    Args:
      path: the file; its folder must exist.
      content: as `torch_writer`.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
      ValueError: as `torch_writer`.
      OSError: as `files.write_all`.
      ImportError: if PyTorch is not installed.
    """
    files.write_all({path: torch_writer(content, path)}, overwrite=overwrite)


def torch_writer(content, source):
    """Function for `files.write_all` that writes a PyTorch file, as `torch.save` does.

    Args:
      content: nested dicts and lists of numpy arrays, which become tensors, and plain values; an argparse.Namespace is kept,
        and treated as a dict.
      source: the file's name, for errors.

    Raises:
      ValueError: if something in it is of another type, which `read_torch` would refuse.
      ImportError: if PyTorch is not installed.
    """
    import torch

    def to_tensors(value, name):
        if isinstance(value, argparse.Namespace):
            return argparse.Namespace(**_rebuilt(vars(value), name, to_tensors))
        if isinstance(value, dict | list | tuple):
            return _rebuilt(value, name, to_tensors)
        if type(value) in _PLAIN or isinstance(value, torch.Tensor):
            return value
        if isinstance(value, np.generic) and value.dtype in _DTYPES:
            return value.item()
        if hasattr(value, "__array__"):
            array = _array(value, name, source)
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        raise ValueError(
            f"{source}: {name or 'the content'} is {type(value).__name__}, which could not be read back without running code; "
            f"allowed: arrays, dict, list, tuple, {', '.join(kind.__name__ for kind in _PLAIN)}"
        )

    with warnings.catch_warnings():  # arrays that jax owns are read-only; nobody writes to these tensors
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = to_tensors(content, "")

    def save(file):
        with file.open("wb") as opened:  # torch would write the temporary file's name into it
            torch.save(tensors, opened)

    return save








def read_metadata(path):
    """The str -> str header of a .safetensors file."""
    import safetensors

    files.check_file(Path(path))
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise files.unreadable(path, error) from error


def read_config(folder):
    """The config.json of a Hugging Face folder, see `files.read_json`."""
    return files.read_json(Path(folder) / "config.json")
