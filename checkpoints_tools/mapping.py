"""The conversion engine: one declarative table per network, read in both directions.

A table is a list of `Entry`. Every PyTorch name is consumed exactly once and every Flax leaf filled exactly once; whatever does
not fit is listed in a single error. Round trips are the identity, bit for bit.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from einops import EinopsError, rearrange
from flax import traverse_util

StateDict = Mapping[str, np.ndarray]  # PyTorch name -> array
Tree = Mapping[str, Any]  # nested dict of arrays

# read as float32, which represents all values of these types but float64's
WEIGHT_DTYPES = tuple(map(np.dtype, ("float32", "float16", ml_dtypes.bfloat16, "float64")))


@dataclass(frozen=True)
class Layout:
    """Axis order of one array on either side, as a function and its inverse."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


COPY = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def patch_embedding(patch: int) -> Layout:
    """Patch convolution [D, C, p, p] <-> dense kernel [p*p*C, D] over `layers.patchify`'s pixel order."""
    return Layout(
        lambda x: rearrange(x, "d c p q -> (p q c) d", p=patch),
        lambda x: rearrange(x, "(p q c) d -> d c p q", p=patch, q=patch),
    )


@dataclass(frozen=True)
class Entry:
    """One or several PyTorch arrays and the Flax leaves they fill."""

    torch: tuple[str, ...]  # names; several only if `stacked`, one per layer of a scanned stack
    flax: tuple[str, ...]  # '/'-joined leaf paths; several share one PyTorch array, split evenly along its first axis
    layout: Layout = COPY
    stacked: bool = False  # the Flax leaf carries a leading layer axis


@dataclass(frozen=True)
class Table:
    """All entries of one network."""

    entries: Sequence[Entry]
    constants: StateDict = field(default_factory=dict)  # values that the network itself fixes (counters); written, not read
    ignored: Sequence[str] = ()  # prefixes of PyTorch names that a file may hold and that fill nothing ('text_model.')
    checked: Sequence[str] = ()  # constants whose value in a file must agree (float32 tolerance 1e-5)

    @property
    def leaves(self) -> set[str]:
        """Paths of all Flax leaves that the table fills."""
        return {path for entry in self.entries for path in entry.flax}


def linear(torch: str, flax: str, layout: Layout = LINEAR) -> list[Entry]:
    """Entries of a layer with weight and bias: kernel and bias on our side."""
    return [Entry((f"{torch}.weight",), (f"{flax}/kernel",), layout), Entry((f"{torch}.bias",), (f"{flax}/bias",))]


def norm(torch: str, flax: str) -> list[Entry]:
    """Entries of an affine normalization layer."""
    return [Entry((f"{torch}.weight",), (f"{flax}/scale",)), Entry((f"{torch}.bias",), (f"{flax}/bias",))]


def running_stats(torch: str, flax: str) -> list[Entry]:
    """Entries of a batch norm's running statistics; its counter is a constant, see `counter`."""
    return [Entry((f"{torch}.running_{name}",), (f"{flax}/{name}",)) for name in ("mean", "var")]


def counter(torch: str, updates: int = 0) -> dict[str, np.ndarray]:
    """The constant of a batch norm's counter of updates."""
    return {f"{torch}.num_batches_tracked": np.asarray(updates, np.int64)}


def stack(entries: Iterable[Entry], stacks: Mapping[str, range]) -> list[Entry]:
    """Repeats a block's entries over scanned stacks, by name the ranges of PyTorch's layer indices; empty ones are left out.

    In the entries, PyTorch names contain '{i}', the layer's index, and Flax paths '{stack}'.
    """
    stacked = []
    for name, layers in stacks.items():
        for entry in entries if layers else ():
            torch = tuple(entry.torch[0].format(i=i) for i in layers)
            flax = tuple(path.format(stack=name) for path in entry.flax)
            stacked.append(Entry(torch, flax, entry.layout, stacked=True))
    return stacked


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> dict of '/'-joined path -> leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def count_layers(names: Iterable[str], stem: str) -> int:
    """1 + the largest i of the names 'STEM.i.…'; 0 if there is none."""
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, names) if match), default=-1)


def abstract_variables(module: Any, *inputs: tuple[int, ...] | jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Shapes and dtypes of a Flax module's variables for inputs of these shapes, float32 by default; nothing is computed."""
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) if isinstance(shape, tuple) else shape for shape in inputs]
    return jax.eval_shape(module.init, jax.random.key(0), *arguments)


def to_flax(table: Table, state_dict: StateDict, target: Tree, source: str = "state dict") -> dict[str, Any]:
    """Converts a PyTorch state dict to a nested dict of numpy arrays with target's structure, shapes and dtypes.

    The leaves of `target` are anything with .shape and .dtype (arrays or jax.eval_shape's result). Raises ValueError, naming
    the source and listing every missing, unexpected, mis-shaped or non-finite entry, also values beyond float32's range, and
    every dtype not in WEIGHT_DTYPES.
    """
    leaves = flatten(target)
    filled: dict[str, np.ndarray] = {}
    known = {name for entry in table.entries for name in entry.torch} | set(table.constants)
    unexpected = [name for name in set(state_dict) - known if not name.startswith(tuple(table.ignored))]
    problems = [f"unexpected in file: {name} {tuple(np.shape(state_dict[name]))}" for name in unexpected]
    for name in table.checked:
        if name in state_dict and not np.allclose(np.asarray(state_dict[name], np.float32), table.constants[name], atol=1e-5):
            problems.append(f"differs from the value this network fixes: {name}")
    for entry in table.entries:
        _fill(entry, state_dict, leaves, filled, problems)
    problems += [f"filled by no table entry: {path} {leaves[path].shape}" for path in set(leaves) - table.leaves]
    _raise_all(problems, f"{source} does not fit the network")
    _warn_of_precision([np.asarray(state_dict[name]).dtype for entry in table.entries for name in entry.torch], source)
    return traverse_util.unflatten_dict(filled, sep="/")


def _fill(entry, state_dict, leaves, filled, problems):
    """Adds an entry's leaves to `filled`, or the reasons why it cannot to `problems`."""
    missing = [f"missing in file: {name} (fills {', '.join(entry.flax)})" for name in entry.torch if name not in state_dict]
    missing += [f"no such parameter here: {path} (from {entry.torch[0]})" for path in entry.flax if path not in leaves]
    if missing:
        problems += missing
        return
    layers = [_split(entry, name, np.asarray(state_dict[name]), leaves, problems) for name in entry.torch]
    if None in layers:
        return
    if entry.stacked and len(layers) != (depth := leaves[entry.flax[0]].shape[0]):
        problems.append(f"wrong depth: {entry.flax[0]} has {depth} layers, the table {len(layers)}")
        return
    for path, *parts in zip(entry.flax, *layers):
        if path in filled:
            problems.append(f"filled twice: {path}")
        # one copy, at once of the right dtype and order, so that nothing keeps a file mapped
        leaf = filled[path] = np.empty(leaves[path].shape, leaves[path].dtype)
        with np.errstate(over="ignore"):  # `_split` has reported the overflow of float64
            for layer, part in zip(leaf if entry.stacked else [leaf], parts):
                layer[...] = part


def _split(entry, name, array, leaves, problems):
    """Parts of one PyTorch array in our layout, one per Flax path; None, and a problem reported, if they do not fit."""
    shapes = [leaves[path].shape[1 if entry.stacked else 0 :] for path in entry.flax]
    try:
        parts = [entry.layout.to_flax(part) for part in (np.split(array, len(shapes)) if len(shapes) > 1 else [array])]
    except (ValueError, EinopsError) as error:  # another rank, or sizes that do not divide
        problems.append(f"wrong shape: {name} {array.shape} (fills {', '.join(entry.flax)}): {error}".split("\n")[0])
        return None
    if [part.shape for part in parts] != shapes:
        actual = ", ".join(str(part.shape) for part in parts)
        needed = ", ".join(f"{path} {shape}" for path, shape in zip(entry.flax, shapes))
        problems.append(f"wrong shape: {name} {array.shape} gives {actual}; needed: {needed}")
        return None
    if array.dtype not in WEIGHT_DTYPES:
        problems.append(f"wrong dtype: {name} is {array.dtype}; allowed: {', '.join(map(str, WEIGHT_DTYPES))}")
        return None
    if not np.isfinite(array).all():
        problems.append(f"not finite: {name}")
    elif array.dtype == np.float64 and array.size and np.abs(array).max() > np.finfo(np.float32).max:
        problems.append(f"beyond the range of float32: {name}, up to {np.abs(array).max():.0e}")
    return parts


def _raise_all(problems, summary):
    if problems:
        raise ValueError("\n  ".join([f"{summary}: {len(problems)} mismatches", *sorted(problems)]))


def _warn_of_precision(dtypes, source):
    float32 = ml_dtypes.finfo(np.float32)
    for dtype in sorted(set(dtypes) - {float32.dtype}, key=str):
        info = ml_dtypes.finfo(dtype)
        logging.warning(
            "%s: %d of %d arrays are %s, of relative precision %.0e and up to %.0e; %s float32, of %.0e and up to %.0e", source,
            dtypes.count(dtype), len(dtypes), dtype, info.eps, info.max, "rounded to" if info.bits > 32 else "widened to",
            float32.eps, float32.max,
        )


def to_torch(table: Table, tree: Tree) -> dict[str, np.ndarray]:
    """Converts a Flax tree to a PyTorch state dict, contiguous and with constants; ValueError lists what does not fit."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    problems = [f"not in the tree: {path}" for path in table.leaves - set(leaves)]
    problems += [f"not in the table: {path}" for path in set(leaves) - table.leaves]
    _raise_all(problems, "the tree does not fit the conversion table")
    state_dict = dict(table.constants)
    for entry in table.entries:
        for i, name in enumerate(entry.torch):
            parts = [entry.layout.to_torch(leaves[path][i] if entry.stacked else leaves[path]) for path in entry.flax]
            state_dict[name] = np.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], order="C")
    return state_dict
