"""`verify` beside the libraries' own reading of original folders."""

import json

import numpy as np
import pytest
from golden_networks import TINY, abstract_tree, draw
from small_files import TINY_DINOV2, moco_weights, save_vae, torch_model

from checkpoints_tools import __main__ as commands
from checkpoints_tools import vae, verify, vit, weights
from checkpoints_tools.sit import sit_table
from checkpoints_tools.torch_param_order import to_ordered_torch
from repae_jax.models.sit import SiT

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.integration
TOLERANCE = commands.parse_args(["verify", "x"]).tolerance


@pytest.fixture
def vae_folder(tmp_path):
    pytest.importorskip("diffusers")
    save_vae(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def encoder_folder(tmp_path):
    pytest.importorskip("transformers")
    torch_model("Dinov2Model", TINY_DINOV2).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_tolerance_is_said_once():
    assert TOLERANCE == 2e-5 and not hasattr(verify, "TOLERANCE")


def test_a_vae_beside_diffusers(vae_folder, tmp_path):
    (tmp_path / "pipeline").mkdir()
    vae_folder.rename(tmp_path / "pipeline" / "vae")
    results = verify.verify(tmp_path / "pipeline", 16)
    assert len(results) == 2 and verify.report(results, TOLERANCE)[1]


def test_norm_groups_read_wrongly_show(vae_folder, monkeypatch):
    right = vae.read_file

    def wrong(path, arrays):
        loaded = right(path, arrays)
        assert loaded.module.norm_groups == 8
        return loaded._replace(module=loaded.module.clone(norm_groups=32))

    monkeypatch.setattr(vae, "read_file", wrong)
    assert all(difference.float32 > 1e-3 for difference in verify.verify(vae_folder, 16))


def test_a_file_that_diffusers_cannot_load(tmp_path):
    pytest.importorskip("diffusers")
    module = save_vae(tmp_path / "vae")[0]
    # the layout does not tell the groups, so that they are taken to be 32
    arrays = vae.load_vae(tmp_path / "vae")
    vae.save_published(tmp_path / "vae.pt", module.clone(norm_groups=32), arrays.params, arrays.latent_stats)
    results = verify.verify(tmp_path / "vae.pt", 16)
    assert len(results) == 2 and verify.report(results, TOLERANCE)[1]


def test_an_encoder_beside_transformers(encoder_folder):
    found = verify.verify(encoder_folder, 64)  # 56 pixels, of 64 as 224 are of 256
    assert [difference.output for difference in found] == ["encoder tokens at 56 px", "encoder tokens at 28 px"]
    assert verify.report(found, TOLERANCE)[1]
    assert len(verify.verify(encoder_folder, 32)) == 1  # the stored size


def test_an_encoder_config_read_wrongly_shows(encoder_folder, monkeypatch):
    config = json.loads((encoder_folder / "config.json").read_text()) | {"layer_norm_eps": 0.1}
    (encoder_folder / "config.json").write_text(json.dumps(config))
    right = vit._from_config

    def wrong(format, given, source):
        fields, side = right(format, given, source)
        return fields | {"norm_eps": 1e-6}, side

    assert verify.report(verify.verify(encoder_folder, 32), TOLERANCE)[1]
    monkeypatch.setattr(vit, "_from_config", wrong)
    assert not verify.report(verify.verify(encoder_folder, 32), TOLERANCE)[1]


def test_mocov3(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "moco.safetensors"
    arrays = {f"module.base_encoder.{name}": np.asarray(array) for name, array in moco_weights(384, 1, 48, 2).items()}
    weights.write_safetensors(path, arrays)
    assert verify.report(verify.verify(path, 32), TOLERANCE)[1]


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_projections(tmp_path, projector):
    pytest.importorskip("diffusers")
    sit = SiT(**{**TINY, "hidden_size": 384, "num_heads": 6, "depth": 12, "encoder_depth": 4, "projector": projector})
    variables = draw(abstract_tree(sit, 8))
    weights.write_safetensors(tmp_path / "sit.safetensors", to_ordered_torch(sit_table(sit), variables))
    results = verify.verify(tmp_path / "sit.safetensors")
    assert [difference.output for difference in results] == ["SiT velocity", "SiT projections"]
    assert verify.report(results, TOLERANCE)[1]


@pytest.mark.parametrize("size", [0, -5])
def test_no_size(tmp_path, size):
    save_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match=f"image_size is {size}; allowed: a positive number"):
        verify.verify(tmp_path / "vae", size)
