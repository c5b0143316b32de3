"""Another kind of encoder is one family in encoders.FAMILIES and one entry in vit_formats.FORMATS: all else follows."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from command_line import call

from checkpoints_tools import vit, vit_formats, weights
from checkpoints_tools.mapping import abstract_variables
from repae_jax.models import encoders

ARCHITECTURE = {
    "family": "new", "patch_size": 7, "hidden_size": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12, "norm_eps": 1e-3,
}  # fmt: skip


@pytest.fixture
def new_kind(monkeypatch):
    """A network without class token, with a norm before the blocks, q, k and v in one array, and names of its own."""
    similar = encoders.FAMILIES["dinov2"]
    fields = {**similar.fields, "num_class_tokens": 0, "pre_norm": True, "activation": "gelu_tanh"}
    monkeypatch.setitem(encoders.FAMILIES, "new", dataclasses.replace(similar, fields=fields))
    format = vit_formats.Format(
        family="new",
        model_class="NewModel",
        names={"pos_embed": "stem.positions", "patch_embed": "stem.patches", "pre_norm": "stem.norm", "norm": "head.norm"},
        blocks="trunk.{i}.",
        block={
            **{name: name for name in ("norm1", "norm2")},
            **{name: f"{name}.gamma" for name in ("layer_scale1", "layer_scale2")},
            "attn/query attn/key attn/value": "attn.qkv",
            "attn/out": "attn.proj",
            "mlp/fc1": "mlp.0",
            "mlp/fc2": "mlp.2",
        },
        config=vit_formats.FORMATS["siglip_vision_model"].config,
        activations={"gelu_pytorch_tanh": "gelu_tanh"},
    )
    monkeypatch.setitem(vit_formats.FORMATS, "new", format)


def test_a_new_kind_of_encoder_goes_out_and_comes_back(new_kind, tmp_path, capsys):
    module = encoders.make_encoder(ARCHITECTURE, 28, image_size=28).module
    rng = np.random.default_rng(0)
    shapes = abstract_variables(module, (1, 28, 28, 3))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    vit.save_encoder(tmp_path / "a", module, params)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "new"
    names = set(weights.read_state_dict(tmp_path / "a"))
    assert {"stem.positions", "trunk.1.attn.qkv.weight", "trunk.0.layer_scale1.gamma", "head.norm.bias"} <= names

    assert call("convert", tmp_path / "a", tmp_path / "b") == 0
    assert call("inspect", tmp_path / "b", "--json") == 0
    assert '"activation": "gelu_tanh"' in capsys.readouterr().out
    _, again, read = vit.read_file(tmp_path / "b")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, read, params)
    encoder, resampled = vit.load_encoder(tmp_path / "b", 32, image_size=42)
    assert encoder.grid == 6 and resampled["pos_embed"].shape == (1, 36, 8)
