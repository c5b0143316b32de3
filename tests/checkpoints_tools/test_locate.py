"""Weights in remote storage and elsewhere: what is fetched, what is written there, and what a user is told."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import command_line
import jax
import numpy as np
import pytest
from command_line import call
from google.api_core.exceptions import Forbidden
from small_files import save_encoder, save_vae
from weight_files import write_torch

from checkpoints_tools import __main__ as commands
from checkpoints_tools import identify, inception, locate, vae, vit, weights
from repae_jax import files
from repae_jax.training import checkpoint

pytest.importorskip("torch")


def error_of(monkeypatch, *arguments):
    """The one line that a user sees when a command fails."""
    message = command_line.error_of(monkeypatch, *arguments)
    assert len(message.splitlines()) == 1, message
    return message


def cached(tmp_path):
    """Files copied from the bucket."""
    return sorted(str(Path(*path.relative_to(tmp_path / "cache").parts[2:])) for path in (tmp_path / "cache").rglob("*.*"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Remote folders.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pipeline_with_a_vae(bucket, tmp_path):
    (bucket / "pipeline" / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (bucket / "pipeline" / name).write_text("{}")
    module, params = save_vae(bucket / "pipeline" / "vae")
    (bucket / "pipeline" / "vae" / "diffusion_pytorch_model.fp16.safetensors").touch()
    loaded = vae.load_vae("gs://bucket/pipeline")
    assert loaded.module == module
    same(loaded.params, params)
    assert identify.identify("gs://bucket/pipeline").kind == "vae"
    assert cached(tmp_path) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_a_pickled_model_is_copied_only_where_there_is_no_other(bucket, tmp_path):
    (bucket / "model").mkdir()
    pickled = ["config.json", "pytorch_model-1-of-1.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in (*pickled, "training_args.bin"):
        (bucket / "model" / name).write_text("{}")
    assert sorted(path.name for path in locate.resolve("gs://bucket/model").iterdir()) == pickled
    weights.write_safetensors(bucket / "model" / "model.safetensors", {"a": np.zeros(1)})
    assert sorted(path.name for path in locate.resolve("gs://bucket/model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_published_run(bucket, tmp_path):
    folder = bucket / "published"
    (folder / "checkpoints").mkdir(parents=True)
    files.write_json(folder / "args.json", {"model": "SiT-XL/2"})
    for steps in (9, 10):
        networks = {name: {"x_embedder.proj.weight": np.full(2, steps, np.float32)} for name in ("model", "ema")}
        content = {**networks, "args": argparse.Namespace(seed=0), "steps": steps}
        write_torch(folder / "checkpoints" / f"{steps:07d}.pt", content)
    artefact = identify.identify("gs://bucket/published")
    assert artefact.kind == "training" and artefact.checkpoint.steps == 10
    assert cached(tmp_path) == ["args.json", "checkpoints/0000010.pt"]


def test_a_run_of_ours_is_read_where_it_is(bucket, tmp_path, capsys):
    config = {"job": "repae", "sit": {"depth": 1}, "vae": {}, "disc": {}}
    state = {"sit": {"params": {"kernel": np.ones((2, 3), np.float32)}}}
    with checkpoint.Checkpointer(bucket / "run") as checkpointer:
        checkpointer.save(7, state, {"next_batch": 7}, config)
    artefact = identify.identify("gs://bucket/run")
    assert artefact.kind == "run" and not (tmp_path / "cache").exists()
    assert call("inspect", "gs://bucket/run", "--json") == 0
    (about,) = json.loads(capsys.readouterr().out)
    assert about["step"] == 7 and about["sit"] == {"depth": 1, "parameters": 6} and about["vae"] is None


@pytest.mark.integration
def test_an_encoder_goes_there_and_comes_back(bucket, tmp_path):
    save_encoder(tmp_path / "encoder")
    assert call("convert", tmp_path / "encoder", "gs://bucket/encoder") == 0
    assert sorted(path.name for path in (bucket / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    same(vit.read_file(locate.resolve("gs://bucket/encoder")).params, vit.read_file(tmp_path / "encoder").params)
    with pytest.raises(FileExistsError, match="--overwrite"):
        call("convert", tmp_path / "encoder", "gs://bucket/encoder")
    assert call("convert", "gs://bucket/encoder", "gs://bucket/encoder", "--overwrite") == 0


def test_a_graph_is_fetched_too(bucket, tmp_path):
    (bucket / "graph.pb").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="graph.pb is no TensorFlow graph"):
        inception.load_inception("gs://bucket/graph.pb")
    assert cached(tmp_path) == ["graph.pb"]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be had: one line that says what to do.
# ---------------------------------------------------------------------------------------------------------------------


class Denied(Exception):
    """An error of the libraries behind epath: no OSError, and of several lines."""


@pytest.mark.parametrize(
    "error", [Denied("403\nForbidden"), ImportError("no module gcsfs"), PermissionError("no"), KeyError("gs")]
)
def test_storage_that_cannot_be_reached(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(locate, "epath", SimpleNamespace(Path=fail))
    message = error_of(monkeypatch, "inspect", "gs://bucket/model")
    assert f"gs://bucket/model cannot be read ({type(error).__name__}: " in message
    assert "permission" in message and "installed" in message and "give the local path" in message


def test_storage_that_cannot_be_written(bucket, tmp_path, monkeypatch):
    save_encoder(tmp_path / "encoder")

    def fail(*_, **__):
        raise errors.pop()

    errors = [Denied("403"), Forbidden("POST gs://bucket/encoder")]
    monkeypatch.setattr(vit, "save_encoder", fail)
    message = error_of(monkeypatch, "convert", tmp_path / "encoder", "gs://bucket/encoder")
    assert message == "error: Forbidden: 403 POST gs://bucket/encoder"
    with pytest.raises(Denied):  # nothing that is known to come from outside: a mistake of ours, whose traceback is wanted
        error_of(monkeypatch, "convert", tmp_path / "encoder", tmp_path / "out")


@pytest.mark.parametrize("address", ["https://host/sdvae-f8d4.pt", "http://host/graph.pb", "ftp://host/folder"])
def test_other_addresses(monkeypatch, address):
    message = error_of(monkeypatch, "inspect", address)
    scheme = address.partition(":")[0]
    assert f"{address} cannot be read from {scheme}://; allowed: gs://" in message and "Download it" in message
    with pytest.raises(ValueError, match="Download it"):
        inception.load_inception(address)


def test_a_remote_folder_without_weights(bucket, monkeypatch):
    (bucket / "folder").mkdir()
    (bucket / "folder" / "sdvae.pt").touch()
    message = error_of(monkeypatch, "inspect", "gs://bucket/folder")
    assert "gs://bucket/folder holds no weights" in message and "address of the file itself" in message


# ---------------------------------------------------------------------------------------------------------------------
# Damaged content, and an impatient user.
# ---------------------------------------------------------------------------------------------------------------------

PROJ = {"x_embedder.proj.weight": np.zeros((8, 4, 2, 2), np.float32)}
DAMAGED = {
    "sit.safetensors": PROJ,
    "empty_sit.pt": {"x_embedder.proj.weight": np.zeros(0, np.float32)},
    "vae.pt": {"decoder.conv_in.weight": np.zeros((0, 0), np.float32)},
    "training.pt": {"model": PROJ, "ema": PROJ, "opt": {"state": {}}, "args": argparse.Namespace(), "steps": 1},
    "steps.pt": {"model": PROJ, "ema": PROJ, "args": argparse.Namespace(), "steps": [1, 2]},
    "numbers.pt": {"model": PROJ, "ema": 7, "args": argparse.Namespace(), "steps": 1},
    "list.pt": [1, 2],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_inspect_of_damaged_files(tmp_path, monkeypatch, name):
    write = weights.write_safetensors if name.endswith(".safetensors") else write_torch
    write(tmp_path / name, DAMAGED[name])
    monkeypatch.setattr(sys, "argv", ["checkpoints_tools", "inspect", str(tmp_path / name)])
    with pytest.raises(SystemExit, match=f"error: .*{name}"):
        commands.main()


@pytest.mark.parametrize(
    "config",
    [{"model_type": ["dinov2"]}, {"model_type": "dinov2", "patch_size": "7"}, {"model_type": "clip", "vision_config": 3}],
)
def test_inspect_of_damaged_folders(tmp_path, monkeypatch, config):
    save_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert str(tmp_path) in error_of(monkeypatch, "inspect", tmp_path)


def test_inspect_of_a_run_with_another_config(tmp_path, monkeypatch):
    with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(7, {"a": np.ones(2, np.float32)}, {}, {"other": 1})
    assert f"{tmp_path / 'run'} " in error_of(monkeypatch, "inspect", tmp_path / "run")


def test_interrupted(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["checkpoints_tools", "artefacts"])
    with pytest.raises(SystemExit) as caught:
        commands.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"
