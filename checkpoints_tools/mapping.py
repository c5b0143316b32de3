"""The conversion engine: one declarative table per network, read in both directions. numpy only.

A table is a list of `Entry`. Every PyTorch name is consumed exactly once and every Flax leaf filled exactly once; whatever does
not fit is listed in a single error. Round trips are the identity, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from absl import logging
from einops import EinopsError, rearrange
from flax import traverse_util

# read as float32, which holds all but the last exactly
WEIGHT_DTYPES = tuple(map(np.dtype, ("float32", "float16", ml_dtypes.bfloat16, "float64")))


@dataclass(frozen=True)
class Layout:
    """How one array's axes are ordered on either side.

    Attributes:
      to_flax: PyTorch array -> Flax array.
      to_torch: its inverse.
    """

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


COPY = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def patch_embedding(patch):
    """Patch convolution [D, C, p, p] <-> dense kernel [p*p*C, D] over `layers.patchify`'s pixel order."""
    return Layout(
        lambda x: rearrange(x, "d c p q -> (p q c) d", p=patch),
        lambda x: rearrange(x, "(p q c) d -> d c p q", p=patch, q=patch),
    )


@dataclass(frozen=True)
class Entry:
    """One or several PyTorch arrays and the Flax leaves they fill.

    Attributes:
      torch: PyTorch names; several only if `stacked`, one per layer of a scanned stack.
      flax: '/'-joined leaf paths; several share one PyTorch array, split evenly along its first axis.
      layout: axis order.
      stacked: the Flax leaf carries a leading layer axis.
    """

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    layout: Layout = COPY
    stacked: bool = False


@dataclass(frozen=True)
class Table:
    """All entries of one network.

    Attributes:
      entries: what is converted.
      constants: PyTorch name -> value that the network itself fixes (position tables, counters). Written on the way out;
        checked on the way in where `checked` names it.
      ignored: beginnings of PyTorch names that a file may hold and that fill nothing ('text_model.', 'head.').
      checked: constants whose value must agree (float32 tolerance 1e-5).
    """

    entries: Sequence[Entry]
    constants: Mapping[str, np.ndarray] | None = None
    ignored: Sequence[str] = ()
    checked: Sequence[str] = ()


def linear(torch, flax, layout=LINEAR):
    """Entries of a layer with weight and bias: kernel and bias on our side."""
    return [Entry((f"{torch}.weight",), (f"{flax}/kernel",), layout), Entry((f"{torch}.bias",), (f"{flax}/bias",))]


def norm(torch, flax):
    """Entries of an affine normalisation layer."""
    return [Entry((f"{torch}.weight",), (f"{flax}/scale",)), Entry((f"{torch}.bias",), (f"{flax}/bias",))]


def stack(entries, stacks):
    """Repeat a block's entries over scanned stacks.

    Args:
      entries: entries of one block; PyTorch names contain '{i}', the layer's index, Flax paths '{stack}'.
      stacks: stack name -> range of PyTorch layer indices; empty ranges are left out.

    Returns:
      list of stacked Entry.
    """
    return [
        Entry(
            tuple(entry.torch[0].format(i=i) for i in layers),
            tuple(path.format(stack=name) for path in entry.flax),
            entry.layout,
            stacked=True,
        )
        for name, layers in stacks.items()
        if len(layers)
        for entry in entries
    ]


def flatten(tree):
    """Nested dict -> dict of '/'-joined path -> leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def _report(problems, what):
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise ValueError(f"{what}: {len(problems)} mismatches\n  {listing}")


def to_flax(table, state_dict, target, source="state dict"):
    """PyTorch state dict -> Flax tree.

    Args:
      table: the network's Table.
      state_dict: name -> array (numpy).
      target: tree of anything with .shape and .dtype (arrays or jax.eval_shape's result): what must be filled.
      source: the file's name, for the error.

    Returns:
      Nested dict of numpy arrays with target's structure, shapes and dtypes.

    Raises:
      ValueError: listing every missing, unexpected, mis-shaped or non-finite entry, also what is beyond float32's range, and
        every dtype not in WEIGHT_DTYPES.
    """
    wanted = flatten(target)
    constants = table.constants or {}
    known = {name for entry in table.entries for name in entry.torch} | set(constants)
    strangers = [name for name in set(state_dict) - known if not name.startswith(tuple(table.ignored))]
    problems = [f"unexpected in file: {name} {tuple(np.shape(state_dict[name]))}" for name in strangers]
    for name in table.checked:
        if name in state_dict and not np.allclose(np.asarray(state_dict[name], np.float32), constants[name], atol=1e-5):
            problems.append(f"differs from the value this network fixes: {name}")
    filled = {}
    for entry in table.entries:
        missing = [name for name in entry.torch if name not in state_dict]
        problems += [f"missing in file: {name} (fills {', '.join(entry.flax)})" for name in missing]
        unknown = [path for path in entry.flax if path not in wanted]
        problems += [f"no such parameter here: {path} (from {entry.torch[0]})" for path in unknown]
        if missing or unknown:
            continue
        layers = [_split(entry, name, np.asarray(state_dict[name]), wanted, problems) for name in entry.torch]
        if None in layers or (entry.stacked and len(layers) != wanted[entry.flax[0]].shape[0]):
            if None not in layers:
                count = wanted[entry.flax[0]].shape[0]
                problems.append(f"wrong depth: {entry.flax[0]} has {count} layers, the table {len(layers)}")
            continue
        for path, *parts in zip(entry.flax, *layers):
            if path in filled:
                problems.append(f"filled twice: {path}")
            # one copy, at once of the right dtype and order, so that nothing keeps a file mapped
            leaf = filled[path] = np.empty(wanted[path].shape, wanted[path].dtype)
            with np.errstate(over="ignore"):  # of float64; `_split` has noted it
                for layer, part in zip(leaf if entry.stacked else [leaf], parts):
                    layer[...] = part
    covered = {path for entry in table.entries for path in entry.flax}
    problems += [f"filled by no table entry: {path} {wanted[path].shape}" for path in set(wanted) - covered]
    _report(problems, f"{source} does not fit the network")
    _warn_of_precision([np.asarray(state_dict[name]).dtype for entry in table.entries for name in entry.torch], source)
    return traverse_util.unflatten_dict(filled, sep="/")


def _warn_of_precision(dtypes, source):
    here = ml_dtypes.finfo(np.float32)
    for dtype in sorted(set(dtypes) - {here.dtype}, key=str):
        kept = ml_dtypes.finfo(dtype)
        logging.warning(
            "%s: %d of %d arrays are %s, of relative precision %.0e and up to %.0e; %s float32, of %.0e and up to %.0e", source,
            dtypes.count(dtype), len(dtypes), dtype, kept.eps, kept.max, "rounded to" if kept.bits > 32 else "widened to",
            here.eps, here.max,
        )  # fmt: skip


def _split(entry, name, array, wanted, problems):
    """Parts of one PyTorch array in our layout, one per Flax path; None, and a problem noted, if they do not fit."""
    shapes = [wanted[path].shape[1 if entry.stacked else 0 :] for path in entry.flax]
    try:
        parts = np.split(array, len(shapes)) if len(shapes) > 1 else [array]
        parts = [entry.layout.to_flax(part) for part in parts]
    except (ValueError, EinopsError) as error:  # another rank, or sizes that do not divide
        problems.append(f"wrong shape: {name} {array.shape} (fills {', '.join(entry.flax)}): {error}".split("\n")[0])
        return None
    if [part.shape for part in parts] != shapes:
        got = ", ".join(str(part.shape) for part in parts)
        needed = ", ".join(f"{path} {shape}" for path, shape in zip(entry.flax, shapes))
        problems.append(f"wrong shape: {name} {array.shape} gives {got}; needed: {needed}")
        return None
    if array.dtype not in WEIGHT_DTYPES:
        problems.append(f"wrong dtype: {name} is {array.dtype}; allowed: {', '.join(map(str, WEIGHT_DTYPES))}")
        return None
    if not np.isfinite(array).all():
        problems.append(f"not finite: {name}")
    elif array.dtype == np.float64 and array.size and np.abs(array).max() > np.finfo(np.float32).max:
        problems.append(f"beyond the range of float32: {name}, up to {np.abs(array).max():.0e}")
    return parts


def to_torch(table, tree):
    """Flax tree -> PyTorch state dict, constants included. Inverse of `to_flax`.

    Args:
      table: the network's Table.
      tree: nested dict of arrays.

    Returns:
      dict name -> numpy array, contiguous.

    Raises:
      ValueError: listing every leaf that the tree lacks or that the table does not know.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    covered = {path for entry in table.entries for path in entry.flax}
    problems = [f"not in the tree: {path}" for path in covered - set(leaves)]
    problems += [f"not in the table: {path}" for path in set(leaves) - covered]
    _report(problems, "the tree does not fit the conversion table")
    state_dict = dict(table.constants or {})
    for entry in table.entries:
        for i, name in enumerate(entry.torch):
            parts = [entry.layout.to_torch(leaves[path][i] if entry.stacked else leaves[path]) for path in entry.flax]
            state_dict[name] = np.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], order="C")
    return state_dict
