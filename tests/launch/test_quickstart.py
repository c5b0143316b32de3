"""The quickstart's four parts in one go, at toy size."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from configs import repae
from launch import small_networks
from launch.quickstart import quickstart as quickstart_command
from repae_jax.analyze_latents import encoding

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(monkeypatch):
    module = quickstart_command
    for recipes in (small_networks.ENCODER_RECIPES, small_networks.CLASSIFIER_RECIPES):
        monkeypatch.setitem(recipes, "digits", dataclasses.replace(recipes["digits"], steps=2))
    monkeypatch.setattr(module, "PER_CLASS", 16)
    monkeypatch.setattr(module, "SAMPLER", {"sampler": "euler", "steps": 2})
    real = repae.get_config

    def small(arg):
        config, tiny = real(arg), real("tiny")
        config.update(vae=tiny.vae, sit=tiny.sit, disc=tiny.disc, checkpoint=tiny.checkpoint, hooks=tiny.hooks, log=tiny.log)
        return config

    monkeypatch.setattr(repae, "get_config", small)
    few = {name: encoding.TRANSFORMS[name] for name in ("none", "scale 0.5", "turn 90°")}
    monkeypatch.setattr(encoding, "TRANSFORMS", few)  # each is a program to compile
    return module


def test_quickstart_writes_what_it_promises(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--workdir", str(tmp_path / "run"), "--steps", "3"])
    quickstart.main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3 and set(summary["fid"]) == {"3"} and summary["fid"]["3"] > 0
    assert 0 <= summary["label_accuracy"] <= 1 and 0 <= summary["classifier_accuracy"] <= 1
    for name in ("seconds", "images_per_second", "fid_of_held_out_digits", "encoder_accuracy"):
        assert summary[name] > 0, name
    for name in ("recon_l1", "alignment"):
        assert set(summary[name]) == {"first", "last"}
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 100, name
    analysis = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    assert analysis["models"][0]["step"] == 3 and analysis["models"][0]["cknna"]
    assert len(list((tmp_path / "run" / "evaluations").glob("tokenizer-0000003-*.json"))) == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "sit/velocity" in page and len(page) < 10e6
    file, _, anchor = capsys.readouterr().out.splitlines()[-1].rpartition(" ")[2].partition("#")
    headings = [line.strip("# ") for line in (ROOT / file).read_text().splitlines() if line.startswith("#")]
    assert anchor in [heading.lower().replace(" ", "-") for heading in headings]
    quickstart.main()  # a second run finds everything done
    assert capsys.readouterr().out.count("training skipped") == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["fid"] == summary["fid"]
