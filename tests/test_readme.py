"""The commands of README that train: what they give is a config that can be built, of data and weights that can be read."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from repae_jax import data
from repae_jax.job import build

README = (Path(__file__).parents[1] / "README.md").read_text()
LAUNCHERS = r"repae_jax\.(train|plan|cache_latents|benchmark)|tpu_pod\.sh run|gke_jobset\.sh submit|(multi_gpu|slurm)\.sh"


def commands():
    """Words of every command that takes a config, those with … for flags that are left out, too."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.search(rf"^[^#]*({LAUNCHERS}).* --config \w", line)]
    return [pytest.param(words, id=f"{number}-{words[2]}") for number, words in enumerate(found)]


def config_of(words, monkeypatch):
    """What the command line makes of the config file."""
    words = words[words.index("--config") :]
    given = words[:2] + [word for word in words if word.startswith("--config.")]
    monkeypatch.setattr(sys, "argv", ["train", *given])  # where config_flags looks for fields
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    return values.config


def test_all_kinds_are_found():
    text = " ".join(words for parameter in commands() for words in parameter.values[0])
    assert all(
        name in text for name in ("repae_jax.train", "tpu_pod.sh run", "gke_jobset.sh submit", "multi_gpu.sh", "slurm.sh")
    )


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_readme(words, monkeypatch):
    config = config_of(words, monkeypatch)
    if {"…", "repae_jax.plan", "repae_jax.benchmark"} & set(words):  # these need no files
        return
    config.mesh = {"fsdp": 1, "slices": 1}  # of the devices here
    config.data.workers = 0
    job = build.build(config)
    assert config.init.vae or not job.frozen_vae, "config.init.vae"
    if job.recipe.vae_weights.get("lpips") and "repae_jax.cache_latents" not in words:
        assert config.lpips.vgg16 and config.lpips.linear, "config.lpips"
    options = {name: value for name, value in build.plain_config(config)["data"]["options"].items() if value}
    if not config.data.cache:
        assert "://" not in options["path"]
        with pytest.raises((OSError, ValueError), match=re.escape(options["path"])):  # it does not exist here
            data.make_source(config.data.source, config.data.image_size, **options)
