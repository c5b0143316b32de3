import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools.mapping import CONV, Entry, Table, linear, norm, patch_embedding, stack, to_flax, to_torch

RNG = np.random.default_rng(0)
WIDTH, DEPTH = 4, 3

# every feature of the engine: a patch embedding, a convolution, fused q, k, v split into leaves and stacked over layers
QKV = tuple(f"{{stack}}/{part}/kernel" for part in ("query", "key", "value"))
TABLE = Table(
    [
        *linear("embed.proj", "embed", patch_embedding(2)),
        *linear("conv", "conv", CONV),
        *stack(
            [
                Entry(("blocks.{i}.qkv.weight",), QKV, linear("", "")[0].layout),
                *norm("blocks.{i}.norm", "{stack}/norm"),
            ],
            {"early": range(2), "late": range(2, DEPTH), "none": range(0)},
        ),
    ],
    constants={"pos_embed": np.ones((1, 2), np.float32), "counter": np.asarray(7, np.int64)},
    ignored=("extras.",),
    checked=("pos_embed",),
)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def state_dict():
    result = {
        "embed.proj.weight": normal(WIDTH, 3, 2, 2),
        "embed.proj.bias": normal(WIDTH),
        "conv.weight": normal(5, 6, 3, 2),
        "conv.bias": normal(5),
        "pos_embed": np.ones((1, 2), np.float32),
        "counter": np.asarray(7, np.int64),
    }
    for i in range(DEPTH):
        result[f"blocks.{i}.qkv.weight"] = normal(3 * WIDTH, WIDTH)
        result[f"blocks.{i}.norm.weight"], result[f"blocks.{i}.norm.bias"] = normal(WIDTH), normal(WIDTH)
    return result


def leaf(*shape):
    return np.zeros(shape, np.float32)


@pytest.fixture
def target():
    def block(layers):
        parts = {part: {"kernel": leaf(layers, WIDTH, WIDTH)} for part in ("query", "key", "value")}
        return {**parts, "norm": {"scale": leaf(layers, WIDTH), "bias": leaf(layers, WIDTH)}}

    return {
        "embed": {"kernel": leaf(12, WIDTH), "bias": leaf(WIDTH)},
        "conv": {"kernel": leaf(3, 2, 6, 5), "bias": leaf(5)},
        "early": block(2),
        "late": block(1),
    }


def test_round_trip_is_the_identity(state_dict, target):
    tree = to_flax(TABLE, state_dict, target)
    returned = to_torch(TABLE, tree)
    assert set(returned) == set(state_dict)
    for name, array in state_dict.items():
        assert returned[name].dtype == array.dtype
        np.testing.assert_array_equal(returned[name], array, err_msg=name)


def test_stacked_and_split_entries_land_where_they_belong(state_dict, target):
    tree = to_flax(TABLE, state_dict, target)
    key = state_dict["blocks.1.qkv.weight"][WIDTH : 2 * WIDTH]
    np.testing.assert_array_equal(tree["early"]["key"]["kernel"][1], key.T)
    np.testing.assert_array_equal(tree["late"]["value"]["kernel"][0], state_dict["blocks.2.qkv.weight"][2 * WIDTH :].T)
    np.testing.assert_array_equal(tree["late"]["norm"]["bias"][0], state_dict["blocks.2.norm.bias"])
    # patches flatten in (row, column, channel) order
    np.testing.assert_array_equal(
        tree["embed"]["kernel"].reshape(2, 2, 3, WIDTH)[1, 0, 2], state_dict["embed.proj.weight"][:, 2, 1, 0]
    )
    np.testing.assert_array_equal(tree["conv"]["kernel"][2, 1, 3], state_dict["conv.weight"][:, 3, 2, 1])


def test_dtype_is_the_networks(state_dict, target):
    state_dict["conv.bias"] = state_dict["conv.bias"].astype(np.float16)
    tree = to_flax(TABLE, state_dict, target)
    assert tree["conv"]["bias"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, bool])
def test_other_dtypes_than_floats_are_refused(state_dict, target, dtype):
    state_dict["conv.bias"] = state_dict["conv.bias"].astype(dtype)
    with pytest.raises(ValueError, match=f"wrong dtype: conv.bias is {np.dtype(dtype)}; allowed: float32, float16, bfloat16"):
        to_flax(TABLE, state_dict, target)


@pytest.mark.parametrize(
    ("dtype", "conversion"),
    [
        (np.float64, "float64, of relative precision 2e-16 and up to 2e+308; rounded to float32, of 1e-07 and up to 3e+38"),
        (np.float16, "float16, of relative precision 1e-03 and up to 7e+04; widened to float32"),
        (ml_dtypes.bfloat16, "bfloat16, of relative precision 8e-03 and up to 3e+38; widened to float32"),
    ],
)
def test_other_floats_are_read_with_a_warning(state_dict, target, warnings, dtype, conversion):
    to_flax(TABLE, state_dict, target)
    assert not warnings
    state_dict["conv.bias"] = state_dict["conv.bias"].astype(dtype) / 3
    tree = to_flax(TABLE, state_dict, target, source="w.pt")
    np.testing.assert_array_equal(tree["conv"]["bias"], state_dict["conv.bias"].astype(np.float32))
    (message,) = warnings
    assert message.startswith("w.pt: 1 of ") and conversion in message


def test_what_float32_cannot_hold_is_refused(state_dict, target):
    state_dict["conv.bias"] = np.full_like(state_dict["conv.bias"], -1e300, np.float64)
    with pytest.raises(ValueError, match=r"beyond the range of float32: conv.bias, up to 1e\+300"):
        to_flax(TABLE, state_dict, target)


def test_every_mismatch_is_in_one_error(state_dict, target):
    del state_dict["conv.bias"]
    state_dict["surprise"] = leaf(2, 3)
    state_dict["embed.proj.bias"] = leaf(WIDTH + 1)
    state_dict["blocks.0.qkv.weight"] = leaf(3 * WIDTH + 1, WIDTH)
    state_dict["blocks.2.norm.weight"][1] = np.nan
    state_dict["pos_embed"] = 2 * state_dict["pos_embed"]
    target["extra"] = {"scale": leaf(9)}
    del target["embed"]["kernel"]
    with pytest.raises(ValueError, match="weights.pt does not fit the network: 8 mismatches") as error:
        to_flax(TABLE, state_dict, target, source="weights.pt")
    for line in (
        "missing in file: conv.bias (fills conv/bias)",
        "unexpected in file: surprise (2, 3)",
        "wrong shape: embed.proj.bias (5,) gives (5,); needed: embed/bias (4,)",
        "wrong shape: blocks.0.qkv.weight (13, 4) (fills",
        "array split does not result in an equal division",
        "not finite: blocks.2.norm.weight",
        "differs from the value this network fixes: pos_embed",
        "filled by no table entry: extra/scale (9,)",
        "no such parameter here: embed/kernel (from embed.proj.weight)",
    ):
        assert line in str(error.value)


def test_a_leaf_is_filled_once(state_dict, target):
    table = Table([*TABLE.entries, Entry(("conv.bias",), ("conv/bias",))], TABLE.constants)
    with pytest.raises(ValueError, match="1 mismatches\n  filled twice: conv/bias"):
        to_flax(table, state_dict, target)


def test_layers_of_different_shapes_do_not_stack(state_dict, target):
    state_dict["blocks.1.norm.bias"] = leaf(WIDTH + 1)
    with pytest.raises(ValueError, match="1 mismatches\n  wrong shape: blocks.1.norm.bias"):
        to_flax(TABLE, state_dict, target)


def test_constants_and_ignored_names_may_be_absent_or_present(state_dict, target):
    state_dict["extras.mask_token"] = leaf(1, 2)
    state_dict["counter"] = np.asarray(8, np.int64)  # known, but not checked
    to_flax(TABLE, state_dict, target)
    for name in ("extras.mask_token", "counter", "pos_embed"):
        del state_dict[name]
    returned = to_torch(TABLE, to_flax(TABLE, state_dict, target))
    assert returned["counter"] == 7 and returned["counter"].shape == ()
    np.testing.assert_array_equal(returned["pos_embed"], np.ones((1, 2), np.float32))


def test_to_torch_lists_every_mismatch(state_dict, target):
    tree = to_flax(TABLE, state_dict, target)
    del tree["late"]["norm"]
    tree["extra"] = leaf(1)
    with pytest.raises(ValueError, match="3 mismatches") as error:
        to_torch(TABLE, tree)
    for line in ("not in the tree: late/norm/bias", "not in the tree: late/norm/scale", "not in the table: extra"):
        assert line in str(error.value)
