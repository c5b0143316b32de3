"""LPIPS from the files people have."""

import jax
import numpy as np
import pytest
import reference

from checkpoints_tools import mapping
from checkpoints_tools.lpips import check_files, load_lpips, lpips_table

SCALING = {
    "scaling_layer.shift": np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1),
    "scaling_layer.scale": np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1),
}


@pytest.fixture(scope="module")
def taming():
    """State dict of taming's module."""
    prefix = "perceptual_loss.lpips."
    weights = reference.load("vae_loss").weights
    return SCALING | {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def parts(taming):
    """The state dicts that files hold."""
    linear = {name: array for name, array in taming.items() if name.startswith("lin")}
    vgg16 = {f"features.{'.'.join(name.split('.')[2:])}": array for name, array in taming.items() if name.startswith("net.")}
    return {
        "vgg16": vgg16 | {"classifier.6.bias": np.zeros(1000, np.float32)},
        "linear": linear,
        "taming": taming,
        "package": taming | {f"lins.{name[len('lin') :]}": array for name, array in linear.items()},
        "nothing": None,
    }


@pytest.mark.parametrize(
    "vgg16, linear, suffix",
    [
        ("vgg16", "linear", ".pth"),
        ("vgg16", "linear", ".safetensors"),
        ("linear", "vgg16", ".safetensors"),
        ("taming", "nothing", ".pth"),
        ("nothing", "taming", ".safetensors"),
        ("package", "nothing", ".safetensors"),
        ("package", "linear", ".safetensors"),
        ("vgg16", "package", ".safetensors"),
    ],
)
def test_files_give_the_same_bits(vgg16, linear, suffix, parts, write):
    params = load_lpips(*(write(name + suffix, parts[name]) for name in (vgg16, linear)))
    back = mapping.to_torch(lpips_table(), params)
    assert set(back) == set(parts["taming"])
    for name, array in parts["taming"].items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_duplicates_must_agree(parts, write):
    name = "lins.2.model.1.weight"
    contradiction = parts["package"] | {name: parts["package"][name] + 1}
    with pytest.raises(ValueError, match="given twice, with different values: lin2.model.1.weight;"):
        load_lpips(write("contradiction.safetensors", contradiction))
    other = {name: 2 * array for name, array in parts["linear"].items()}
    with pytest.raises(ValueError, match="given twice, with different values: lin0.*, lin4.model.1.weight;"):
        load_lpips(write("taming.safetensors", parts["taming"]), write("other.safetensors", other))


@pytest.mark.parametrize(
    "only, message",
    [
        ("vgg16", r"vgg16.safetensors lacks the linear weights \(lin0.model.1.weight …\); give the file .*net.slice1.0.bias"),
        ("linear", r"linear.safetensors lacks VGG16's convolutions \(features.0.weight …\); give the file .*lin0.model.1"),
        ("nothing", "LPIPS needs torchvision's VGG16 weights and the linear weights"),
    ],
)
def test_half_of_it_is_refused(only, message, parts, write):
    with pytest.raises(ValueError, match=message):
        load_lpips(write(f"{only}.safetensors", parts[only]))


def test_other_networks_list_everything(parts, write):
    alex = parts["linear"] | {"lin1.model.1.weight": np.zeros((1, 192, 1, 1), np.float32)}
    batch_norm = parts["vgg16"] | {"features.1.running_mean": np.zeros(64, np.float32)}
    with pytest.raises(ValueError, match="2 mismatches") as error:
        load_lpips(write("bn.safetensors", batch_norm), write("alex.safetensors", alex))
    for part in ("lin1.model.1.weight (1, 192, 1, 1)", "features.1.running_mean", "bn.safetensors with ", "alex.safetensors"):
        assert part in str(error.value)


def test_another_scaling_is_refused(parts, write):
    scaled = parts["taming"] | {"scaling_layer.scale": SCALING["scaling_layer.scale"] * 2}
    with pytest.raises(ValueError, match="differs from the value this network fixes: scaling_layer.scale"):
        load_lpips(write("scaled.safetensors", scaled))


def test_an_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
        load_lpips(tmp_path / "absent.pth")


@pytest.mark.parametrize("kind, name", [("vgg16", "vgg16"), ("lpips", "linear"), ("lpips", "taming"), ("lpips", "package")])
def test_one_file_by_itself(kind, name, parts):
    check_files(parts[name], kind, "file.pt")


@pytest.mark.parametrize(
    "kind, name, absent, wrong",
    [
        ("vgg16", "vgg16", "features.28.bias", "features.0.weight"),
        ("lpips", "linear", "lin0.model.1.weight", "lin4.model.1.weight"),
        ("lpips", "taming", "net.slice5.28.bias", "net.slice1.0.weight"),
    ],
)
def test_one_damaged_file_lists_everything(kind, name, absent, wrong, parts):
    arrays = {key: array for key, array in parts[name].items() if key != absent}
    arrays |= {wrong: arrays[wrong][..., :1, :0], "surprise": np.ones(3, np.float32), "features.1.running_mean": np.ones(1)}
    with pytest.raises(ValueError, match="file.pt does not fit the network: 4 mismatches") as error:
        check_files(arrays, kind, "file.pt")
    for part in (f"missing in file: {absent}", f"wrong shape: {wrong}", "file: surprise (3,)", "file: features.1.running_mean"):
        assert part in str(error.value)


def test_what_is_no_file_of_lpips(parts):
    array = parts["linear"]["lin2.model.1.weight"]
    with pytest.raises(ValueError, match="file.pt: given twice, with different values: lin2.model.1.weight"):
        check_files(parts["package"] | {"lins.2.model.1.weight": array + 1}, "lpips", "file.pt")
    with pytest.raises(ValueError, match="not finite: lin2.model.1.weight"):
        check_files(parts["linear"] | {"lin2.model.1.weight": array * np.nan}, "lpips", "file.pt")
