"""PyTorch files <-> plain values and numpy arrays, without executing anything that a file contains."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from repae_jax import files

_NAMES = ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "bfloat16")
DTYPES = tuple(map(np.dtype, _NAMES))  # kept by .safetensors and PyTorch files alike; ml_dtypes adds the last
_MAGIC = (b"PK", b"\x80")  # a zip archive, or a pickle as torch.save made them before 1.6
_PLAIN = (type(None), bool, int, float, complex, str, bytes)  # `read_torch` returns these, besides arrays and containers


class _Dtype:
    """Replaces numpy.dtype in a pickle: a name such as 'f8' and its byte order, for numpy's own would take any structure."""

    def __init__(self, name, align, copy):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, content):
    """Replaces numpy's scalar in a pickle by a plain number."""
    kind = np.dtype(dtype.order.replace("|", "") + dtype.name)
    if kind not in DTYPES or not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of {kind}, which is no number")
    (value,) = np.frombuffer(content, kind)
    return value.item()


# under the names that numpy 1 and 2 have for them
_NUMPY_SCALARS = [
    _Dtype, (_Dtype, "numpy.dtype"), (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar")
]


def read_torch(path: Path) -> Any:
    """Returns the content of a local PyTorch file.

    Numpy arrays (views of the mapped file) replace tensors, a dict an argparse.Namespace and plain numbers numpy's. Raises
    ValueError if the file is damaged (zip archives, which all but the oldest are, hold checksums) or holds more than arrays and
    plain values; nothing of it is run.
    """
    try:
        import torch
    except ImportError as error:
        advice = "`pip install repae_jax[torch]`, or convert it to .safetensors elsewhere"
        raise ImportError(f"{path} is a PyTorch file: {advice}") from error
    with Path(path).open("rb") as file:
        start = file.read(12)
    if not start.startswith(_MAGIC):
        raise ValueError(f"{path} is no PyTorch file, or damaged (it begins with {start!r}): check it, or download it again")
    try:
        records = _checked_records(path) if zipfile.is_zipfile(path) else []
        inside = [record.filename.partition("/")[2] for record in records]
        is_script = any(name == "constants.pkl" or name.startswith("code/") for name in inside)
        if not is_script:
            # the bytes of compressed records are no arrays; torch maps them all the same
            stored = bool(records) and all(record.compress_type == zipfile.ZIP_STORED for record in records)
            # published training checkpoints keep their command line beside the weights, an argparse.Namespace, others a score
            with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY_SCALARS]):
                content = torch.load(path, weights_only=True, map_location="cpu", mmap=stored)
    except pickle.UnpicklingError as error:
        advice = "Get the weights as .safetensors, or save only the state dict"
        raise ValueError(f"{path} {_refusal(error)}, which could run code when read; nothing was run. {advice}") from error
    except MemoryError:
        raise
    except Exception as error:  # on bytes that are no pickle, the reader raises whatever it happens to stumble over
        raise files.unreadable(path, error) from error
    if is_script:
        raise ValueError(
            f"{path} is a TorchScript archive, a network with its code, which is not run here; get the state dict, or a "
            ".safetensors file (torch.save(torch.jit.load(file).state_dict(), other) makes one of a file that you trust)"
        )
    return _to_numpy(content, "", path)


def _checked_records(path):
    """ZipInfo of all records of a PyTorch file, after comparing their checksums: torch itself does not look at them."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            logging.warning("%s was written without checksums: whether it is damaged cannot be told", path)
            return records
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"record {damaged} is not what was written")
    return records


def _refusal(error):
    """The object that torch.load refused, without its advice to read the file as code."""
    text = str(error)
    if blocked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"holds more than arrays: it asks for {blocked[1]}"
    detail = (text.partition("WeightsUnpickler error:")[2].strip() or "not readable").splitlines()[0]
    return f"is damaged, or holds more than arrays ({detail})"


def _to_numpy(value, name, path):
    import torch
    if isinstance(value, torch.Tensor):
        try:
            if value.dtype == torch.bfloat16:  # unknown to numpy: pass the bits
                return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy(force=True)
        except (TypeError, RuntimeError) as error:  # float8, quantized, sparse, or on no device
            kind = f"{value.dtype}, {value.layout}, device {value.device}"
            advice = "save it as a dense float32 tensor"
            raise ValueError(f"{path}: {name} is a tensor that numpy lacks ({kind}); {advice}") from error
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return _map_container(value, name, lambda item, inner: _to_numpy(item, inner, path))


def _map_container(value, name, change):
    """`value` with `change(item, name)` of its items, if it is a container; names are joined with dots."""
    if isinstance(value, dict):
        return {key: change(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [change(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def torch_writer(content: Any, source: str | Path) -> Callable[[Path], None]:
    """Returns a function for `files.write_all` that writes a PyTorch file, as `torch.save` does.

    Its content is nested dicts and lists of numpy arrays, which become tensors, and plain values; an argparse.Namespace is
    kept, and treated as a dict. ValueError, naming the source, for all else, which `read_torch` would refuse.
    """
    import torch
    with warnings.catch_warnings():  # arrays that jax owns are read-only; nobody writes to these tensors
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = _to_tensors(content, "", source)

    def save(file):
        with file.open("wb") as opened:  # torch would write the temporary file's name into it
            torch.save(tensors, opened)

    return save


def _to_tensors(value, name, source):
    import torch
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_to_tensors(vars(value), name, source))
    if isinstance(value, dict | list | tuple):
        return _map_container(value, name, lambda item, inner: _to_tensors(item, inner, source))
    if type(value) in _PLAIN or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.generic) and value.dtype in DTYPES:
        return value.item()
    if hasattr(value, "__array__"):
        array = checked_array(value, name, source)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    raise ValueError(
        f"{source}: {name or 'the content'} is {type(value).__name__}, which could not be read back without running code; "
        f"allowed: arrays, dict, list, tuple, {', '.join(kind.__name__ for kind in _PLAIN)}"
    )


def checked_array(value: Any, name: str, source: str | Path) -> np.ndarray:
    """Returns a numpy array in C order, of one of DTYPES; ValueError if `value` cannot be one."""
    try:
        array = np.asarray(value, order="C")  # keeps zero dimensions, which ascontiguousarray does not
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {name} is {type(value).__name__}, no numpy array ({error}); give one") from error
    if array.dtype not in DTYPES:
        allowed = f"arrays of {', '.join(map(str, DTYPES))}"
        raise ValueError(f"{source}: {name} is {type(value).__name__} of {array.dtype}; allowed: {allowed}")
    return array
