"""SiT and DiT files of every kind: what is inferred, what comes back, what is refused."""

import jax
import numpy as np
import pytest
import reference
from absl import logging
from golden_networks import TINY, abstract_tree, draw, golden_sit
from small_files import load_sit, published_shapes

from checkpoints_tools import weights
from checkpoints_tools.mapping import to_flax
from checkpoints_tools.plain_sit import reverse_time
from checkpoints_tools.sit import describe_sit, grid_of, layout_of, rename_legacy, sit_table
from checkpoints_tools.torch_param_order import to_ordered_torch
from repae_jax.models.sit import SiT

SIZES = {
    "XL/2": {"hidden_size": 1152, "depth": 28, "patch_size": 2},
    "B/1": {"hidden_size": 768, "depth": 12, "patch_size": 1},
}
GRID = 2
LAYOUTS = ("repae", "repa", "sit-or-dit")


def zeros(shapes):
    """Arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "size, file, layout, expected",
    [
        ("XL/2", {"norm": True, "features": (768,)}, "repae", {"num_heads": 16, "encoder_depth": 8, "feature_dims": (768,)}),
        ("XL/2", {"features": (768, 1024)}, "repa", {"feature_dims": (768, 1024), "projector_dim": 2048}),
        ("XL/2", {"features": (768, 1024), "conv": True}, "repa", {"feature_dims": (768, 1024), "projector": "conv"}),
        ("XL/2", {"outputs": 2}, "sit-or-dit", {"learned_sigma": True, "encoder_depth": 28, "feature_dims": ()}),
        ("B/1", {"channels": 32, "norm": True, "features": (768,)}, "repae", {"latent_channels": 32, "encoder_depth": 4}),
        ("B/1", {"head": 64, "rows": 11}, "sit-or-dit", {"qk_norm": True, "num_heads": 12, "num_classes": 10}),
    ],
)
def test_sizes_are_inferred(size, file, layout, expected):
    state_dict = zeros(published_shapes(**SIZES[size], **file))
    fields = describe_sit(state_dict)
    defaults = {"num_classes": 1000, "latent_channels": 4, "mlp_ratio": 4.0, "qk_norm": False, "learned_sigma": False}
    assert fields == {**fields, **SIZES[size], **defaults, **expected}
    assert ("projector_dim" in fields) == bool(fields["feature_dims"] and "conv" not in file)
    assert layout_of(state_dict) == layout and grid_of(state_dict) == 16
    # with these fields, the table has exactly the file's names
    table = sit_table(SiT(**fields), latent_norm=layout == "repae")
    assert {name for entry in table.entries for name in entry.torch} | set(table.constants) == set(state_dict)


def sample(layout, seed=0, **change):
    """A small SiT of one layout: (module, variables)."""
    fields = {**TINY, "feature_dims": (16, 24), **change}
    if layout == "sit-or-dit":
        fields |= {"feature_dims": (), "encoder_depth": fields["depth"], "learned_sigma": True}
        fields.pop("projector_dim")
    sit = SiT(**fields)
    variables = draw(abstract_tree(sit, GRID * sit.patch_size), seed)
    if layout != "repae":
        del variables["latent_stats"]
    return sit, variables


def state_dict_of(layout, **change):
    sit, variables = sample(layout, **change)
    return to_ordered_torch(sit_table(sit, latent_norm=layout == "repae"), variables)


@pytest.mark.parametrize(
    "layout, change",
    [
        *((layout, {"qk_norm": qk_norm}) for layout in LAYOUTS for qk_norm in (False, True)),
        ("repa", {"projector": "conv", "projector_dim": SiT.projector_dim}),
    ],
)
def test_a_file_comes_back_bit_for_bit(layout, change, tmp_path):
    sit, variables = sample(layout, **change)
    state_dict = state_dict_of(layout, **change)
    assert {name: array.shape for name, array in state_dict.items()} == published_shapes(
        hidden_size=32, depth=4, patch_size=2, rows=11, tokens=GRID**2, outputs=1 + sit.learned_sigma,
        features=sit.feature_dims, head=16 if sit.qk_norm else None, norm=layout == "repae", projector=32,
        conv=sit.projector == "conv",
    )  # fmt: skip
    weights.write_safetensors(tmp_path / "sit.safetensors", state_dict)
    known = {"encoder_depth": 2} if sit.feature_dims else {}
    loaded = load_sit(tmp_path / "sit.safetensors", **known, num_heads=2)
    assert (loaded.module, loaded.layout, loaded.grid) == (sit, layout, GRID)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    returned = to_ordered_torch(sit_table(loaded.module, latent_norm=layout == "repae"), loaded.variables)
    assert list(returned) == list(state_dict)
    for name, array in state_dict.items():
        assert returned[name].dtype == array.dtype
        np.testing.assert_array_equal(returned[name], array, err_msg=name)


@pytest.mark.parametrize("name", reference.cases("sit_"))
def test_the_published_sit_is_recognised(name, tmp_path):
    case = reference.load(name)
    config = case.meta["config"]
    state_dict = {**case.weights, "pos_embed": case.arrays["pos_embed"]}
    weights.write_safetensors(tmp_path / "sit.safetensors", state_dict)
    loaded = load_sit(
        tmp_path / "sit.safetensors", encoder_depth=config["encoder_depth"], num_heads=config["num_heads"], dtype="bfloat16"
    )
    assert loaded.module == golden_sit(config).clone(dtype="bfloat16") and loaded.layout == "repae"
    np.testing.assert_array_equal(loaded.variables["latent_stats"]["var"], case.weights["bn.running_var"])


def test_the_averaged_weights_are_preferred(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    entries = {name: state_dict_of("sit-or-dit", seed=seed) for seed, name in enumerate(("model", "ema"))}
    checkpoint = {name: {key: torch.tensor(array) for key, array in state_dict.items()} for name, state_dict in entries.items()}
    torch.save({**checkpoint, "opt": {"state": {}, "param_groups": []}}, tmp_path / "last.pt")
    messages = []
    monkeypatch.setattr(logging, "info", lambda message, *args: messages.append(message % args))
    for entry, expected in ((None, "ema"), ("ema", "ema"), ("model", "model")):
        loaded = load_sit(tmp_path / "last.pt", entry=entry, num_heads=2)
        np.testing.assert_array_equal(
            loaded.variables["params"]["final_layer"]["linear"]["bias"], entries[expected]["final_layer.linear.bias"]
        )
    assert messages == [f"{tmp_path / 'last.pt'} holds several state dicts: taking the averaged weights"]
    with pytest.raises(ValueError, match="no state dict 'vae' in it"):
        load_sit(tmp_path / "last.pt", entry="vae")
    torch.save({"model": checkpoint["model"], "steps": 3, "vae": checkpoint["ema"]}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no single state dict in it; choose an entry of"):
        load_sit(tmp_path / "other.pt")


def legacy(state_dict, encoder_depth):
    """Names as REPA's first files have them."""
    old = {}
    for name, array in state_dict.items():
        kind, _, rest = name.partition(".")
        i, _, rest = rest.partition(".")
        is_late = kind == "blocks" and int(i) >= encoder_depth
        old[f"decoder_blocks.{int(i) - encoder_depth}.{rest}" if is_late else name] = array
    return old


def test_legacy_names(tmp_path):
    state_dict = state_dict_of("repa", encoder_depth=3)
    old = legacy(state_dict, 3)
    assert "decoder_blocks.0.attn.qkv.weight" in old and "blocks.3.attn.qkv.weight" not in old
    renamed = rename_legacy(old, 3)
    assert list(renamed) == list(state_dict) and all(renamed[name] is state_dict[name] for name in state_dict)
    assert rename_legacy(state_dict, 3) == state_dict
    weights.write_safetensors(tmp_path / "old.safetensors", old)
    loaded = load_sit(tmp_path / "old.safetensors", num_heads=2)  # the names tell where the tap is
    assert loaded.module.encoder_depth == 3
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, sample("repa", encoder_depth=3)[1])
    with pytest.raises(ValueError, match="encoder_depth=2, but the file has 3 blocks before its decoder_blocks"):
        load_sit(tmp_path / "old.safetensors", num_heads=2, encoder_depth=2)


@pytest.mark.integration
def test_reversed_time_is_the_same_function():
    sit, variables = sample("sit-or-dit")
    params = variables["params"]
    rng = np.random.default_rng(2)
    z, labels = rng.standard_normal((5, 4, 4, 4), np.float32), np.array([0, 3, 9, 10, 10])
    t = np.array([0.0, 0.125, 0.5, 0.875, 1.0], np.float32)
    theirs, _ = sit.apply({"params": params}, z, 1 - t, labels)
    ours, _ = sit.apply({"params": reverse_time(params)}, z, t, labels)
    assert reference.relative_error(theirs, sit.apply({"params": params}, z, t, labels)[0]) > 1e-2, "time matters"
    reference.check(ours, -np.asarray(theirs), reference.NETWORK_RTOL, "velocity in reversed time")

    twice = reverse_time(reverse_time(params))
    assert jax.tree.structure(twice) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(twice))


def spoil(change, layout="repae"):
    state_dict = state_dict_of(layout)
    change(state_dict)
    return state_dict


def set_nan(state_dict):
    state_dict["blocks.2.mlp.fc1.bias"] = np.full_like(state_dict["blocks.2.mlp.fc1.bias"], np.nan)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_nan, "not finite: blocks.2.mlp.fc1.bias"),
        (lambda d: d.update({"bn.running_var": -d["bn.running_var"]}), "bn.running_var must be positive"),
        (lambda d: d.pop("blocks.1.attn.proj.bias"), r"missing in file: blocks.1.attn.proj.bias \(fills"),
        (lambda d: d.pop("pos_embed"), "pos_embed has shape None; needed: "),
        (lambda d: d.update(pos_embed=d["pos_embed"][:, :3]), r"pos_embed has shape \(1, 3, 32\); needed: "),
        (lambda d: d.pop("final_layer.linear.weight"), "no state dict of a SiT or DiT: missing: final_layer.linear.weight"),
        (lambda d: d.update({"x_embedder.proj.weight": np.zeros((32, 4))}), r"weight \(32, 4\): expected 4 axes"),
        (lambda d: d.update({"final_layer.linear.weight": np.zeros((24, 32))}), "one or two times as many outputs"),
        (lambda d: d.update({"blocks.5.attn.proj.bias": np.zeros(32, np.float32)}), "missing in file: blocks.4.attn.proj.bias"),
        (lambda d: d.update(cls_token=np.zeros(32, np.float32)), "unexpected in file: cls_token"),
    ],
)
def test_bad_files_are_refused(change, message, tmp_path):
    weights.write_safetensors(tmp_path / "bad.safetensors", spoil(change))
    with pytest.raises(ValueError, match=f"(?s)bad.safetensors.*{message}"):
        load_sit(tmp_path / "bad.safetensors", encoder_depth=2, num_heads=2)


def test_what_a_file_does_not_tell_must_be_given(tmp_path):
    path = tmp_path / "small.safetensors"
    weights.write_safetensors(path, state_dict_of("repae"))
    with pytest.raises(ValueError, match="small.safetensors: hidden size 32 and depth 4 .* give num_heads"):
        load_sit(path)
    with pytest.raises(ValueError, match="small.safetensors: hidden size 32 and depth 4 .* give encoder_depth"):
        load_sit(path, num_heads=2)
    with pytest.raises(ValueError, match="small.safetensors: encoder_depth=5 must lie in 1..depth=4"):
        load_sit(path, num_heads=2, encoder_depth=5)
    with pytest.raises(ValueError, match="small.safetensors: hidden_size=32 is not divisible by num_heads=3"):
        load_sit(path, num_heads=3, encoder_depth=2)
    with pytest.raises(ValueError, match=r"num_heads=4, but blocks.0.attn.q_norm.weight \(16,\) in width 32 makes 2 heads"):
        describe_sit(state_dict_of("repae", qk_norm=True), num_heads=4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 3, "encoder_depth": 3}, "unexpected in file: blocks.3.attn.qkv.weight"),
        ({"depth": 5, "encoder_depth": 5}, "missing in file: blocks.4.attn.qkv.weight"),
        ({"learned_sigma": False}, r"wrong shape: final_layer.linear.weight \(32, 32\) gives \(32, 32\); needed: .*\(32, 16\)"),
    ],
)
def test_a_file_of_another_network_is_refused(change, message):
    other = SiT(**{**TINY, "feature_dims": (), "encoder_depth": 4, "learned_sigma": True, **change})
    target = {"params": abstract_tree(other, 4)["params"]}
    with pytest.raises(ValueError, match=message):
        to_flax(sit_table(other, latent_norm=False), state_dict_of("sit-or-dit"), target)
