"""FID's InceptionV3: PyTorch ports or TensorFlow's frozen graph -> our parameters."""

from pathlib import Path
from typing import Any

from checkpoints_tools import locate, mapping, weights
from checkpoints_tools.mapping import CONV, Entry, StateDict, Table, counter, linear, norm, running_stats
from repae_jax.models.inception import InceptionV3

# our block -> its scope in TensorFlow's graph, and there: our convolution -> its inner scope
_A = {
    "branch1x1": "conv", "branch5x5_1": "tower/conv", "branch5x5_2": "tower/conv_1", "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1", "branch3x3dbl_3": "tower_1/conv_2", "branch_pool": "tower_2/conv",
}
_B = {"branch3x3": "conv", "branch3x3dbl_1": "tower/conv", "branch3x3dbl_2": "tower/conv_1", "branch3x3dbl_3": "tower/conv_2"}
_C = {
    "branch1x1": "conv", "branch7x7_1": "tower/conv", "branch7x7_2": "tower/conv_1", "branch7x7_3": "tower/conv_2",
    "branch7x7dbl_1": "tower_1/conv", "branch7x7dbl_2": "tower_1/conv_1", "branch7x7dbl_3": "tower_1/conv_2",
    "branch7x7dbl_4": "tower_1/conv_3", "branch7x7dbl_5": "tower_1/conv_4", "branch_pool": "tower_2/conv",
}
_D = {
    "branch3x3_1": "tower/conv", "branch3x3_2": "tower/conv_1", "branch7x7x3_1": "tower_1/conv",
    "branch7x7x3_2": "tower_1/conv_1", "branch7x7x3_3": "tower_1/conv_2", "branch7x7x3_4": "tower_1/conv_3",
}
_E = {
    "branch1x1": "conv", "branch3x3_1": "tower/conv", "branch3x3_2a": "tower/mixed/conv", "branch3x3_2b": "tower/mixed/conv_1",
    "branch3x3dbl_1": "tower_1/conv", "branch3x3dbl_2": "tower_1/conv_1", "branch3x3dbl_3a": "tower_1/mixed/conv",
    "branch3x3dbl_3b": "tower_1/mixed/conv_1", "branch_pool": "tower_2/conv",
}
_BLOCKS = {
    "Mixed_5b": ("mixed", _A), "Mixed_5c": ("mixed_1", _A), "Mixed_5d": ("mixed_2", _A), "Mixed_6a": ("mixed_3", _B),
    "Mixed_6b": ("mixed_4", _C), "Mixed_6c": ("mixed_5", _C), "Mixed_6d": ("mixed_6", _C), "Mixed_6e": ("mixed_7", _C),
    "Mixed_7a": ("mixed_8", _D), "Mixed_7b": ("mixed_9", _E), "Mixed_7c": ("mixed_10", _E),
}
# our name of a convolution with its batch norm -> its scope in the graph; names as torch-fidelity's converter pairs them
GRAPH_SCOPES = {
    "Conv2d_1a_3x3": "conv", "Conv2d_2a_3x3": "conv_1", "Conv2d_2b_3x3": "conv_2", "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
    **{f"{block}/{unit}": f"{scope}/{inner}" for block, (scope, units) in _BLOCKS.items() for unit, inner in units.items()},
}
# last part of the names of the graph's weights; its other constants are sizes and axes
_GRAPH_WEIGHTS = ("conv2d_params", "gamma", "beta", "moving_mean", "moving_variance", "weights", "biases")


def inception_table() -> Table:
    """Table of the PyTorch ports: `Conv2d_1a_3x3.conv.weight`, `Mixed_5b.branch1x1.bn.running_var` …, `fc.bias`.

    pytorch-fid and torch-fidelity agree on these names; only the former has torchvision's `num_batches_tracked`.
    """
    entries, constants = linear("fc", "fc"), {}
    for flax in GRAPH_SCOPES:
        torch = flax.replace("/", ".")
        entries.append(Entry((f"{torch}.conv.weight",), (f"{flax}/conv/kernel",), CONV))
        entries += [*norm(f"{torch}.bn", f"{flax}/bn"), *running_stats(f"{torch}.bn", f"{flax}/bn")]
        constants |= counter(f"{torch}.bn")
    return Table(entries, constants)


def graph_table() -> Table:
    """Table of the constants of TensorFlow's graph: `conv/conv2d_params`, `mixed/conv/batchnorm/beta` …, laid out as ours."""
    pairs = {"softmax/weights": "fc/kernel", "softmax/biases": "fc/bias"}
    leaves = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    for flax, scope in GRAPH_SCOPES.items():
        pairs[f"{scope}/conv2d_params"] = f"{flax}/conv/kernel"
        pairs |= {f"{scope}/batchnorm/{theirs}": f"{flax}/bn/{ours}" for theirs, ours in leaves.items()}
    return Table([Entry((theirs,), (ours,)) for theirs, ours in pairs.items()])


def _read_graph(path):
    """Weights of a frozen graph by name; nothing of the graph is run."""
    # TensorBoard has these messages without TensorFlow
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto import graph_pb2
    from tensorboard.util import tensor_util
    try:
        graph = graph_pb2.GraphDef.FromString(path.read_bytes())
        nodes = [node for node in graph.node if node.op == "Const" and node.name.rpartition("/")[2] in _GRAPH_WEIGHTS]
        return {node.name: tensor_util.make_ndarray(node.attr["value"].tensor) for node in nodes}
    except (DecodeError, ValueError, TypeError) as error:
        found = f"no TensorFlow graph, or it is damaged or incomplete ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is {found}; needed: classify_image_graph_def.pb") from error


def load_inception(path: str | Path) -> dict[str, Any]:
    """Returns the float32 parameters of `InceptionV3`.

    The file is TensorFlow's classify_image_graph_def.pb (from inception-2015-12-05.tgz), or its PyTorch port, also as
    .safetensors: pt_inception-2015-12-05-6726825d.pth (pytorch-fid) or weights-inception-2015-12-05-6726825d.pth
    (torch-fidelity).
    """
    return read_file(locate.resolve(path))


def read_file(path: Path, state_dict: StateDict | None = None) -> dict[str, Any]:
    """Loads Inception from a local file, whose arrays may have been read already; see `load_inception`."""
    if path.suffix == ".pb":
        table, arrays = graph_table(), _read_graph(path)
    else:
        table, arrays = inception_table(), state_dict or weights.read_file(path)
    target = mapping.abstract_variables(InceptionV3(), (1, 32, 32, 3))["params"]
    return mapping.to_flax(table, arrays, target, source=str(path))
