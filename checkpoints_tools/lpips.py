"""LPIPS: torchvision's VGG16 and the linear weights, or the whole module in one file <-> our parameters."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools import weights
from checkpoints_tools.mapping import CONV, Entry, Layout, StateDict, Table, abstract_variables, linear, to_flax
from repae_jax.models.lpips import LPIPS, VGG16_STAGES

# [1, C, 1, 1] <-> [C]
CHANNEL_WEIGHTS = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))
_LINEARS = [Entry((f"lin{i}.model.1.weight",), (f"linear_{i}",), CHANNEL_WEIGHTS) for i in range(len(VGG16_STAGES))]
_SCALING = {
    "scaling_layer.shift": np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1),
    "scaling_layer.scale": np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1),
}


def _vgg_indices():
    """Yields (stage, convolution, torchvision's index in `features`): a ReLU follows each convolution, a pooling each stage."""
    index = 0
    for stage, widths in enumerate(VGG16_STAGES):
        for i in range(len(widths)):
            yield stage, i, index
            index += 2
        index += 1


def _convolutions(name):
    """Entries of VGG16's convolutions, called `name(stage, torchvision's index)`."""
    return [entry for stage, i, index in _vgg_indices() for entry in linear(name(stage, index), f"conv_{stage}_{i}", CONV)]


def lpips_table() -> Table:
    """Table of taming's LPIPS module: `net.slice1.0.weight` …, `lin0.model.1.weight` …"""
    convolutions = _convolutions(lambda stage, index: f"net.slice{stage + 1}.{index}")
    return Table([*convolutions, *_LINEARS], _SCALING, checked=tuple(_SCALING))


def _target():
    return abstract_variables(LPIPS(), (1, 32, 32, 3), (1, 32, 32, 3))["params"]


def check_files(arrays: StateDict, kind: str, source: str) -> None:
    """Checks one of the files that LPIPS is made of, by itself; ValueError lists all that does not fit.

    Files of the kind 'lpips' are the linear weights, or a whole module of the lpips package or taming.
    """
    if kind == "vgg16":
        table = Table(_convolutions(lambda stage, index: f"features.{index}"), ignored=("classifier.",))
    else:
        arrays = merge_state_dicts(arrays, source=source)
        whole = any(name.startswith("net.") for name in arrays)
        table = lpips_table() if whole else Table(_LINEARS, _SCALING, checked=tuple(_SCALING))
    filled = {path.partition("/")[0] for path in table.leaves}
    to_flax(table, arrays, {name: leaves for name, leaves in _target().items() if name in filled}, source=source)


def merge_state_dicts(*state_dicts: StateDict, source: str) -> dict[str, np.ndarray]:
    """Returns taming's LPIPS module's state dict, for `lpips_table`, from those that people have.

    They have torchvision's VGG16 (`features.0.weight` …; its `classifier.*` is not used), `lin0.model.1.weight` … (the lpips
    package's and taming's vgg.pth agree on these names), or a whole module: the lpips package's has its linear layers twice, as
    `lin0` and as `lins.0`. Names unknown here stay as they are, for the table to list. ValueError, naming the source, for
    arrays given twice with different values.
    """
    merged, conflicts = {}, []
    slices = {str(index): stage + 1 for stage, _, index in _vgg_indices()}
    for state_dict in state_dicts:
        for name, array in state_dict.items():
            if name.startswith("classifier."):
                continue
            feature = re.fullmatch(r"features\.(\d+)\.(weight|bias)", name)
            if feature and feature[1] in slices:
                name = f"net.slice{slices[feature[1]]}.{feature[1]}.{feature[2]}"
            name = re.sub(r"^lins\.(\d+)\.", r"lin\1.", name)
            if name in merged and not np.array_equal(merged[name], array):
                conflicts.append(name)
            merged[name] = array
    if conflicts:
        names = ", ".join(sorted(conflicts))
        raise ValueError(f"{source}: given twice, with different values: {names}; these weights do not belong together")
    return merged


def load_lpips(vgg16: str | Path, linear_weights: str | Path = "") -> dict[str, Any]:
    """Returns the float32 parameters of `LPIPS` from files that `weights.read_state_dict` reads, in either order.

    They are torchvision's VGG16 (vgg16-397923af.pth), and the lpips package's weights/v0.1/vgg.pth or taming's vgg.pth; or one
    with the whole module, and the other empty.
    """
    if not (paths := [str(path) for path in (vgg16, linear_weights) if path]):
        raise ValueError("LPIPS needs torchvision's VGG16 weights and the linear weights of LPIPS v0.1, or both in one file")
    source = " with ".join(paths)
    state_dict = merge_state_dicts(*map(weights.read_state_dict, paths), source=source)
    parts = {"net.slice": "VGG16's convolutions (features.0.weight …)", "lin": "the linear weights (lin0.model.1.weight …)"}
    for prefix, part in parts.items():
        if not any(name.startswith(prefix) for name in state_dict):
            names = ", ".join(sorted(state_dict)[:3])
            raise ValueError(f"{source} lacks {part}; give the file that holds them, too. What is there begins with: {names}")
    return to_flax(lpips_table(), state_dict, _target(), source=source)
