"""The examples of CONTRIBUTING.md work as they are written: an entry of a table is all that it takes."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import repae
from repae_jax import data, train_step
from repae_jax.data.source import EncodedImages
from repae_jax.diffusion import samplers
from repae_jax.losses import reconstruction
from repae_jax.models import encoders

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def add(monkeypatch):
    """Function that runs the example under a heading, with the names of a module, and returns its names.

    The entry that it makes stays in the table until the test ends.
    """

    def run(heading, module, table, **further):
        section = TEXT.split(f"### … {heading}\n")[1].split("\n### ")[0]
        (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        names = {**vars(module), **further, table: {}}
        exec(code, names)
        for name, entry in names[table].items():
            monkeypatch.setitem(getattr(module, table), name, entry)
        return names

    return run


def test_a_loss(add, monkeypatch):
    names = add("a loss of the VAE", train_step, "VAE_TERMS", **vars(reconstruction), reconstruction=reconstruction)
    monkeypatch.setattr(reconstruction, "total_variation", names["total_variation"], raising=False)
    recon = jnp.array([0.0, 1.0, 0.0, 1.0]).reshape(1, 2, 2, 1).repeat(3, axis=3)
    assert train_step.VAE_TERMS["tv"](SimpleNamespace(recon=recon)) == 1
    assert repae.get_config().loss.vae.tv == 0  # a field that a command can set


def test_an_encoder(add):
    add("an encoder", encoders, "FAMILIES")
    assert encoders.make_encoder("new-base", 256).grid == 16


def test_a_sampler(add):
    add("a sampler", samplers, "SAMPLERS")
    sampler = samplers.SAMPLERS[samplers.Sampling("midpoint", 20).sampler]
    z = sampler.integrate([(sampler.times(20), lambda z, t: z)], jnp.ones((1, 2)))
    np.testing.assert_allclose(z, np.exp(-1), rtol=1e-3)


def test_a_data_source(add, tmp_path):
    add("a data source", data, "SOURCES", dataclasses=dataclasses, np=np, Path=Path, EncodedImages=EncodedImages)
    Image.new("RGB", (9, 7), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "list.txt").write_text(f"3 {tmp_path}/red.png\n")
    source = data.make_source("listed", 4, path=f"{tmp_path}/list.txt")
    assert (source[0]["image"] == (255, 0, 0)).all() and source[0]["label"] == 3 and source.num_classes == 4


def test_the_preset_tiny_keeps_the_encoders_families():
    chosen = repae.get_config("tiny,encoder=siglip2-base-patch16-256+dino-vitb16").encoders
    assert [chosen[name].architecture["family"] for name in ("target", "target_2")] == ["siglip2", "dino"]
