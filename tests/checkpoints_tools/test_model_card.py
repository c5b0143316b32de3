"""Model cards, and uploads to a stand-in for the Hugging Face hub."""

import dataclasses
import json

import hub_server
import huggingface_hub
import jax
import numpy as np
import pytest
from command_line import call, error_of
from huggingface_hub import ModelCard
from PIL import Image
from small_files import STATS

import repae_jax
from checkpoints_tools import hub, model_card, pipeline_folder, vae, vae_layouts
from checkpoints_tools.mapping import abstract_variables
from checkpoints_tools.pipeline_folder import Trained
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.sit import SiT

TOKEN = "hf_secretOfTheTests"
SAMPLING = {
    "sampler": "sde", "steps": 50, "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "guidance_channels": None,
}  # fmt: skip
CONFIG = {
    "job": "repae", "steps": 1000, "ema_decay": 0.99, "sampling": SAMPLING,
    "data": {"source": "imagenet", "options": {"path": "/home/me/imagenet/train"}, "batch_size": 64},
    "encoders": {"target": {"weights": "/home/me/encoder"}},
}  # fmt: skip


def zeros(module, *shapes):
    shapes = abstract_variables(module, *shapes)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def trained():
    sit = SiT(num_classes=10, latent_channels=4, patch_size=2, hidden_size=8, depth=2, num_heads=2, encoder_depth=1)
    autoencoder = AutoencoderKL(
        latent_channels=4, channels=8, channel_multipliers=(1, 1), num_res_blocks=1, attention_levels=(), norm_groups=4,
        quant_convs=True,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), vae_layouts.abstract_params(autoencoder))
    shapes = (1, 4, 4, 4), (1,), jax.ShapeDtypeStruct((1,), np.int32)
    loaded = vae.LoadedVAE(autoencoder, params, STATS)
    return Trained(sit, zeros(sit, *shapes), 2, loaded, "linear", SAMPLING, 1000, model_card.without_folders(CONFIG))


@pytest.fixture
def evaluated(tmp_path):
    """A run's folder with results of two steps."""
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "samples").mkdir()
    for step, fid in (500, 16.2), (1000, 7.7):
        protocol = {"sampler": "heun", "num_samples": 500, "reference": "/home/me/reference.npz"}
        result = {"kind": "generation", "step": step, "metrics": {"fid": fid}, "protocol": protocol}
        result["warnings"] = ["few samples: /home/me/set/a.npz has 500/s, gs://mine/b.npz more (https://arxiv.org/abs/1)"]
        (folder / "evaluations" / f"{step:07d}.json").write_text(json.dumps(result))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "samples" / "0001000.png")
    return folder


def test_scores_of_other_averages_are_left_out(evaluated):
    """Those of a file without an average, as a tokenizer's, are kept."""
    for decay, fid in (0.9, 5.5), ("sigma=0.1", 4.4):
        result = {"step": 1000, "metrics": {"fid": fid}, "protocol": {"ema_decay": decay}}
        (evaluated / "evaluations" / f"{decay}.json").write_text(json.dumps(result))
    for decay, scores in (0.9, [7.7, 5.5]), ("sigma=0.1", [7.7, 4.4]), (0.99, [7.7]):
        found = [result["metrics"]["fid"] for result in model_card.read_evaluations(evaluated, 1000, decay)]
        assert sorted(found) == sorted(scores)


def test_a_card_says_what_the_run_was(trained, evaluated, tmp_path):
    results = model_card.read_evaluations(evaluated, 1000, 0.99)
    assert model_card.picture_of(evaluated, 1000).name == "0001000.png" and model_card.picture_of(evaluated, 500) is None
    text = model_card.write(trained, "me/small-sit", results, "mit", picture=True)
    data = ModelCard(text).data  # as the hub reads it
    assert (data.license, data.library_name, data.datasets) == ("mit", "diffusers", ["imagenet-1k"])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 7.7, "imagenet-1k")
    for line in (
        "# small-sit", "![Samples](samples.png)", 'from_pretrained("me/small-sit", trust_remote_code=True)',
        'repae_jax.load("me/small-sit")',
        "| fid (generation) | 7.7 | sampler: heun, num_samples: 500, reference: reference.npz |",
        "* few samples: a.npz has 500/s, b.npz more (https://arxiv.org/abs/1)",
        "Training steps: 1,000.", "Aligned with: encoder.", "Labels are 0 to 9; 10 stands for no class.",
        "images of 8 x 8 pixels of 10 classes", "Euler's method",
    ):  # fmt: skip
        assert line in text, line
    assert "/home/me" not in text and "16.2" not in text and "class-conditional" in data.tags
    for block in text.split("```python\n")[1:]:
        compile(block.partition("```")[0], "card", "exec")


def test_a_card_of_an_odd_name(trained):
    text = model_card.write(trained, 'a "b": {c}\n# d', license="other: mine # 'x'")
    assert ModelCard(text).data.license == "other: mine # 'x'" and '# a "b": {c} # d\n' in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert 'load("a \\"b\\": {c}\\n# d")' in code
    compile(code, "card", "exec")


def test_a_card_of_little(trained):
    text = model_card.write(dataclasses.replace(trained, config=None, step=None, path="ddpm"), "folder/dit")
    assert ModelCard(text).data.license is None
    expected = "None is stated", "None have been measured.", "from a published checkpoint", "A DiT of 2 blocks", "'ancestral'"
    for line in expected:
        assert line in text, line
    assert "samples.png" not in text


@pytest.fixture
def server(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with hub_server.serve() as served:
        for name, value in {"ENDPOINT": served.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.mark.integration
def test_an_upload_is_loaded_by_its_name(server, trained, tmp_path):
    folder = tmp_path / "model"
    written = pipeline_folder.save(folder, trained)
    (folder / "README.md").write_text(model_card.write(trained, "me/small-sit"))
    (folder / "private.txt").write_text("not part of the model")
    hub.check("me/small-sit", overwrite=False)
    assert hub.push(folder, [*written, folder / "README.md"], "me/small-sit", private=True) == f"{server.url}/me/small-sit"
    files = server.repositories["me/small-sit"]
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stem != "private"]
    assert files == {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    assert server.private["me/small-sit"] and server.tokens == {TOKEN}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    model = repae_jax.load("me/small-sit")
    assert (model.step, model.num_classes, model.loaded.latent_shape) == (1000, 10, (4, 4, 4))
    with pytest.raises(FileExistsError, match=r"me/small-sit exists on http://127.*choose another name"):
        hub.check("me/small-sit", overwrite=False)
    hub.check("me/small-sit", overwrite=True)


def test_uploads_that_cannot_be(server, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="allowed: ORGANIZATION/NAME"):
        hub.check("small-sit", overwrite=False)
    server.forbidden = True
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=r"me/x cannot be written on .*rights.*: check the name.* same command again with --o"):
        hub.push(tmp_path, [tmp_path / "a"], "me/x")
    with pytest.raises(SystemExit):
        call("export", tmp_path, tmp_path / "new", "--private")
    assert "give --push ORGANIZATION/NAME, too" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(OSError, match=r"me/x cannot be reached on http://127.0.0.1:9 \(.*\): check the name"):
        hub.check("me/x", overwrite=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    message = error_of(monkeypatch, "export", tmp_path, tmp_path / "new", "--push", "me/x")
    assert "there is no token for the hub; run `hf auth login`, or set HF_TOKEN" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(monkeypatch, "export", tmp_path, tmp_path / "new", "--push", "me/x")
