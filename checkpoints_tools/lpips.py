"""LPIPS: torchvision's VGG16 and the linear weights, or taming's single module <-> our parameters."""

import numpy as np

from checkpoints_tools.mapping import CONV, Entry, Layout, Table, linear
from repae_jax.models.lpips import VGG16_STAGES

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
    """State dict of taming's LPIPS module from the two files people have.

    Args:
      vgg16: torchvision's VGG16 state dict (`features.0.weight` …; its `classifier.*` is not used).
      linear_weights: `lin0.model.1.weight` … (the lpips package's and taming's vgg.pth agree on these names).

    Returns:
      dict for `lpips_table`.
    """
    renamed = {}
    slices = {index: stage + 1 for stage, _, index in _vgg_indices()}
    for name, array in vgg16.items():
        part, index, kind = (name.split(".") + ["", ""])[:3]
        if part == "features" and index.isdigit() and int(index) in slices:
            renamed[f"net.slice{slices[int(index)]}.{index}.{kind}"] = array
        elif part != "classifier":
            renamed[name] = array  # unknown: the table names it in its error
    return {**renamed, **linear_weights}
