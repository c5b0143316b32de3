"""FID's Inception from the files people have: PyTorch's two ports and TensorFlow's graph."""

import jax
import numpy as np
import pytest
import reference
from tensorboard.compat.proto import graph_pb2
from tensorboard.util import tensor_util

from checkpoints_tools import mapping
from checkpoints_tools.inception import GRAPH_SCOPES, inception_table, load_inception

# from the converters of torch-fidelity and others: the graph's names in full
PAIRS = {
    "conv/conv2d_params": "Conv2d_1a_3x3.conv.weight",
    "conv_3/batchnorm/gamma": "Conv2d_3b_1x1.bn.weight",
    "mixed/tower/conv_1/conv2d_params": "Mixed_5b.branch5x5_2.conv.weight",
    "mixed_1/tower_1/conv_2/batchnorm/beta": "Mixed_5c.branch3x3dbl_3.bn.bias",
    "mixed_2/tower_2/conv/batchnorm/moving_variance": "Mixed_5d.branch_pool.bn.running_var",
    "mixed_3/tower/conv_2/batchnorm/moving_mean": "Mixed_6a.branch3x3dbl_3.bn.running_mean",
    "mixed_4/tower/conv_2/conv2d_params": "Mixed_6b.branch7x7_3.conv.weight",
    "mixed_6/conv/conv2d_params": "Mixed_6d.branch1x1.conv.weight",
    "mixed_7/tower_1/conv_4/conv2d_params": "Mixed_6e.branch7x7dbl_5.conv.weight",
    "mixed_8/tower_1/conv_3/conv2d_params": "Mixed_7a.branch7x7x3_4.conv.weight",
    "mixed_9/tower/mixed/conv_1/conv2d_params": "Mixed_7b.branch3x3_2b.conv.weight",
    "mixed_10/tower_1/mixed/conv/conv2d_params": "Mixed_7c.branch3x3dbl_3a.conv.weight",
    "softmax/weights": "fc.weight",
    "softmax/biases": "fc.bias",
}
STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


@pytest.fixture(scope="module")
def state_dict():
    return reference.load("inception").weights


def graph_arrays(state_dict):
    arrays = {"softmax/weights": state_dict["fc.weight"].T, "softmax/biases": state_dict["fc.bias"]}
    for unit, scope in GRAPH_SCOPES.items():
        unit = unit.replace("/", ".")
        arrays[f"{scope}/conv2d_params"] = state_dict[f"{unit}.conv.weight"].transpose(2, 3, 1, 0)
        for graph, torch_name in STATISTICS.items():
            arrays[f"{scope}/batchnorm/{graph}"] = state_dict[f"{unit}.bn.{torch_name}"]
    return arrays


def graph_bytes(arrays):
    """A GraphDef of constants and of nodes that are none."""
    graph = graph_pb2.GraphDef()
    others = {
        "Mul/y": np.float32(0.0078125),
        "mixed/join/concat_dim": np.int32(3),
        "pool_3/_reshape/shape": np.array([-1, 2048]),
    }
    for name, array in {**arrays, **others}.items():
        node = graph.node.add(name=name, op="Const")
        node.attr["value"].tensor.CopyFrom(tensor_util.make_tensor_proto(np.ascontiguousarray(array)))
    graph.node.add(name="conv/Conv2D", op="Conv2D", input=["Mul", "conv/conv2d_params"])
    graph.node.add(name="conv/batchnorm", op="BatchNormWithGlobalNormalization")
    return graph.SerializeToString()


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_graph_scopes_are_as_published(state_dict):
    assert len(GRAPH_SCOPES) == len(set(GRAPH_SCOPES.values())) == 94
    graph = graph_arrays(state_dict)
    for name, torch_name in PAIRS.items():
        array = state_dict[torch_name]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        np.testing.assert_array_equal(graph[name], array, err_msg=name)


@pytest.mark.integration
def test_all_kinds_of_files_give_the_same_bits(state_dict, write):
    without_counters = {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}
    fid = load_inception(write("pytorch_fid.pth", state_dict))
    fidelity = load_inception(write("torch_fidelity.safetensors", without_counters))
    graph = load_inception(write("classify_image_graph_def.pb", graph_bytes(graph_arrays(state_dict))))
    assert_same(fid, fidelity)
    assert_same(fid, graph)
    back = mapping.to_torch(inception_table(), fid)
    assert set(back) == set(state_dict)
    for name, array in state_dict.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_a_port_that_does_not_fit_lists_everything(state_dict, write):
    changed = {name: array for name, array in state_dict.items() if name != "Mixed_7c.branch_pool.bn.running_mean"}
    changed["fc.weight"], changed["fc.bias"] = np.zeros((1000, 2048), np.float32), np.zeros(1000, np.float32)
    changed["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    with pytest.raises(ValueError, match="4 mismatches") as error:
        load_inception(write("torchvision.safetensors", changed))
    for name in (
        "Mixed_7c.branch_pool.bn.running_mean",
        "fc.weight",
        "fc.bias",
        "AuxLogits.fc.bias",
        "torchvision.safetensors",
    ):
        assert name in str(error.value)


def test_a_graph_that_does_not_fit_lists_everything(state_dict, write):
    arrays = graph_arrays(state_dict)
    del arrays["mixed/conv/batchnorm/gamma"]
    arrays["softmax/biases"] = arrays["softmax/biases"][:1001]
    arrays["auxiliary/conv/conv2d_params"] = np.zeros((1, 1, 2, 2), np.float32)
    with pytest.raises(ValueError, match="3 mismatches") as error:
        load_inception(write("other.pb", graph_bytes(arrays)))
    for name in ("mixed/conv/batchnorm/gamma", "softmax/biases", "auxiliary/conv/conv2d_params"):
        assert name in str(error.value)


def test_damaged_graphs_are_refused(write):
    content = graph_bytes({"conv/conv2d_params": np.ones((3, 3, 3, 32), np.float32)})
    for name, damaged in {"truncated": content[: len(content) // 2], "page": b"<html>404</html>"}.items():
        with pytest.raises(ValueError, match=f"{name}.pb is no TensorFlow graph, or it is damaged"):
            load_inception(write(f"{name}.pb", damaged))
    graph = graph_pb2.GraphDef.FromString(content)
    tensor = graph.node[0].attr["value"].tensor
    tensor.tensor_content = tensor.tensor_content[:-4]
    with pytest.raises(ValueError, match="short.pb is no TensorFlow graph, or it is damaged"):
        load_inception(write("short.pb", graph.SerializeToString()))
    with pytest.raises(ValueError, match="472 mismatches"):
        load_inception(write("empty.pb", b""))


@pytest.mark.parametrize("name", ["absent.pb", "absent.pth"])
def test_absent_files(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_inception(tmp_path / name)
