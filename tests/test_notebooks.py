"""The notebooks of docs/: executed on a tiny run; what is stored in them is small and without errors."""

import os
import re
from pathlib import Path

import jax
import nbformat
import pytest
import small
from nbclient import NotebookClient

from checkpoints_tools.vit import save_encoder
from repae_jax.models import encoders

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
MOST_BYTES = 200_000
LONG = {"own_pictures"}  # it trains VAE and SiT
# name -> the variables that are set to the run of the tests, and those that are set to something small
RUNS = {"digits": "workdir", "own_pictures": "run"}
SMALL = {"own_pictures": {"workdir": '"mine"', "pictures": '"pictures"', "steps": "2"}}
# what a notebook trains, smaller
TINY = {
    "data.batch_size": 8, "sit.hidden_size": 32, "sit.depth": 2, "sit.num_heads": 2, "sit.projector_dim": 32,
    "vae.channels": 8, "vae.channel_multipliers": (1, 1, 1), "disc.channels": 8, "disc.num_layers": 1,
    "hooks.samples_every": 0, "hooks.reconstructions_every": 0, "init.stats_images": 16,
}  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    """A folder like the quickstart's: a run on digits and its encoder, with random weights."""
    config = small.config({"data.image_size": 16})
    for encoder in config.encoders.values():
        encoder.image_size = 16
    small.save_run(tmp_path, config, jax.devices()[:1])
    architecture = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    encoder = encoders.make_encoder(architecture, 16, image_size=16)
    params = encoder.module.init(jax.random.key(0), jax.numpy.zeros((1, 16, 16, 3)))["params"]
    save_encoder(tmp_path / "encoder", encoder.module, jax.device_get(params))
    return tmp_path


@pytest.mark.integration
@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS]
)
def test_a_notebook_runs(path, workdir, compiled, monkeypatch, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for name, value in {RUNS[path.stem]: f'"{workdir}"', **SMALL.get(path.stem, {})}.items():
        replaced = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", cell.source, flags=re.MULTILINE)
            replaced += count
        assert replaced == 1, name
    for cell in notebook.cells:
        cell.source = cell.source.replace("train.train(", f"config.update_from_flattened_dict({TINY})\ntrain.train(")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    monkeypatch.setenv("IPYTHONDIR", str(workdir / "ipython"))
    # the tests' flags but for the devices: a notebook has one
    monkeypatch.setenv("XLA_FLAGS", re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_and_small(path):
    assert path.stat().st_size < MOST_BYTES
    outputs = [(cell, output) for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    assert outputs, f"{path.name} has no outputs: CONTRIBUTING.md says how to make them"
    assert not [cell.source for cell, output in outputs if output.output_type == "error"]
    assert not [cell.source for cell, output in outputs if output.get("name") == "stderr"]
