"""One of a joint run's averages, chosen by every command that has --ema: what it writes is of that average."""

import json

import jax
import numpy as np
import pytest
import small
from feature_stub import Noise, StubNetwork, write_adm

from checkpoints_tools.convert import convert, extract_vae
from checkpoints_tools.export import export
from checkpoints_tools.runs import open_run
from repae_jax.evaluate import __main__ as evaluate
from repae_jax.evaluate import measuring, sweeping
from repae_jax.sampling.load_model import load_model

pytestmark = pytest.mark.integration
MODEL = ("--num_samples", "8", "--batch_size", "8", "--sampler", "euler", "--ema", "0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, as it is on disk; its weights and averages are drawn, each for itself."""
    # group norms of 32 groups, as all published files have
    changes = {"vae.channels": 32, "vae.norm_groups": 32, "ema_decays": (0.9,), "ema_sigmas": (0.05, 0.1)}
    return small.save_run(tmp_path_factory.mktemp("chosen") / "run", small.config(changes), jax.devices()[:1])


@pytest.fixture(scope="module")
def chosen(run):
    """Parameters of the averages by their names."""
    return {ema: load_model(run, devices=jax.devices()[:1], ema=ema).params["sit"] for ema in (None, "0.9", "sigma=0.1")}


@pytest.mark.parametrize(
    "ema", [pytest.param(None, marks=pytest.mark.slow), pytest.param("0.9", marks=pytest.mark.slow), "sigma=0.1"]
)
def test_published_layouts_and_pipelines(run, chosen, tmp_path, ema):
    convert(run, tmp_path / "published", optimizers=False, ema=ema)
    export(run, tmp_path / "pipeline", license="mit", ema=ema)
    for folder in ("published", "pipeline"):
        written = load_model(tmp_path / folder, devices=jax.devices()[:1]).params["sit"]
        written = {name: part for name, part in written.items() if not name.startswith("projectors_")}
        assert [other for other, params in chosen.items() if small.differing(written, params) == []] == [ema], folder
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert {None: "decay | 0.99", "0.9": "decay | 0.9 ", "sigma=0.1": "decay | sigma=0.1"}[ema] in card


def test_the_statistics_of_an_extracted_vae(run, tmp_path):
    extract_vae(run, tmp_path / "vae", ema="0.9")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    mean = open_run(run, ema="0.9").read("ema.latent_stats")["mean"]
    np.testing.assert_allclose(config["latents_mean"], mean, rtol=1e-6)


@pytest.mark.slow
def test_evaluations_and_sweeps(run, tmp_path, monkeypatch):
    """Results say which average was measured, and those of another one are not taken for them."""
    monkeypatch.setattr(measuring, "load_network", lambda _, batch_size: StubNetwork(batch_size))
    write_adm(tmp_path / "adm.npz", Noise(90, 8, seed=1).pixels)
    words = [str(run), "--reference", str(tmp_path / "adm.npz"), "--inception", "weights.pth", *MODEL]
    path, result = measuring.run(evaluate.parse_args([*words, "--steps", "2"]))
    assert path.name.startswith("0000002-ema-0.9-euler2") and result["protocol"]["ema_decay"] == 0.9
    out, done = sweeping.run_sweep(evaluate.parse_args([*words, "--sweep", "steps=2:3:1"]))
    assert out.name.startswith("0000002-ema-0.9-") and [point for point, _ in done.results] == [{"steps": 2}, {"steps": 3}]
    default = evaluate.parse_args([word for word in words if word not in ("--ema", "0.9")] + ["--steps", "2"])
    other, _ = measuring.run(default)
    assert other.name.startswith("0000002-euler2")
    path.write_bytes(other.read_bytes())  # under the name of the other average
    with pytest.raises(ValueError, match="is of other settings .*ema_decay"):
        sweeping.run_sweep(evaluate.parse_args([*words, "--sweep", "steps=2:2:1"]))
