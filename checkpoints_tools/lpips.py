"""LPIPS: torchvision's VGG16 and the linear weights, or the whole module in one file <-> our parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import weights
from checkpoints_tools.mapping import CONV, Entry, Layout, Table, linear, to_flax
from repae_jax.models.lpips import LPIPS, VGG16_STAGES

# [1, C, 1, 1] <-> [C]
CHANNEL_WEIGHTS = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))


def _vgg_indices():
    """(stage, convolution, torchvision's index in `features`): a ReLU follows each convolution, a pooling each stage."""
    index = 0
    for stage, widths in enumerate(VGG16_STAGES):
        for i in range(len(widths)):
            yield stage, i, index
            index += 2
        index += 1


def lpips_table():
    """Conversion table of taming's LPIPS module: `net.slice1.0.weight` …, `lin0.model.1.weight` …"""
    entries = []
    for stage, i, index in _vgg_indices():
        entries += linear(f"net.slice{stage + 1}.{index}", f"conv_{stage}_{i}", CONV)
    for stage in range(len(VGG16_STAGES)):
        entries.append(Entry((f"lin{stage}.model.1.weight",), (f"linear_{stage}",), CHANNEL_WEIGHTS))
    constants = {
        "scaling_layer.shift": np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1),
        "scaling_layer.scale": np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1),
    }
    return Table(entries, constants, checked=tuple(constants))


def from_torchvision(vgg16, linear_weights):
    """State dict of taming's LPIPS module from the two that people have, either of which may also be a whole module's.

    Args:
      vgg16: torchvision's VGG16 (`features.0.weight` …; its `classifier.*` is not used), or a whole module.
      linear_weights: `lin0.model.1.weight` … (the lpips package's and taming's vgg.pth agree on these names), or a whole
        module, or empty. The lpips package's module has its linear layers twice, as `lin0` and as `lins.0`.

    Returns:
      dict for `lpips_table`. Names unknown here stay as they are, for the table to list.

    Raises:
      ValueError: listing every array that is given more than once with different values.
    """
    merged, conflicts = {}, []
    slices = {str(index): stage + 1 for stage, _, index in _vgg_indices()}
    for state_dict in (vgg16, linear_weights):
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
        raise ValueError(f"given twice, with different values: {names}; these weights do not belong together")
    return merged


def load_lpips(vgg16, linear_weights=""):
    """Parameters of `LPIPS` from the files people have.

    Args:
      vgg16: torchvision's VGG16 (vgg16-397923af.pth), or a state dict of the lpips package's or taming's whole module.
      linear_weights: the lpips package's weights/v0.1/vgg.pth or taming's vgg.pth; empty if `vgg16` holds the whole module. The
        two may also be given the other way round. Both may be any kind of file that `weights.read_state_dict` reads.

    Returns:
      Nested dict of float32 numpy arrays.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file is damaged, VGG16 or the linear weights are in none of the files, the files contradict each other,
        or listing everything in them that does not fit the network.
    """
    files = [str(path) for path in (vgg16, linear_weights) if path]
    if not files:
        raise ValueError("LPIPS needs torchvision's VGG16 weights and the linear weights of LPIPS v0.1, or both in one file")
    source = " with ".join(files)
    first, *second = (weights.read_state_dict(path) for path in files)
    state_dict = from_torchvision(first, *(second or [{}]))
    parts = {"net.slice": "VGG16's convolutions (features.0.weight …)", "lin": "the linear weights (lin0.model.1.weight …)"}
    for beginning, what in parts.items():
        if not any(name.startswith(beginning) for name in state_dict):
            held = ", ".join(sorted(state_dict)[:3])
            raise ValueError(f"{source} lacks {what}; give the file that holds them, too. What is there begins with: {held}")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    return to_flax(lpips_table(), state_dict, target, source=source)
