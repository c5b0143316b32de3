"""Whole runs on a frozen VAE and of a tokenizer: from images and from a cache, continued, and refused with another VAE."""

import json
import shutil

import jax
import numpy as np
import pytest
import small

from checkpoints_tools import vae as vae_files
from configs import ldm, vae
from repae_jax import cache_latents, train
from repae_jax.job import build, frozen_weights
from repae_jax.training import metric_log

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two VAEs on disk, and a cache of the first one's latents."""
    folder, job = tmp_path_factory.mktemp("files"), build.build(small.config(file=ldm), jax.devices()[:1])
    shapes = jax.eval_shape(lambda key: frozen_weights.initial_vae(job, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
        stats = {"mean": np.zeros(job.latent_shape[-1], np.float32), "var": np.ones(job.latent_shape[-1], np.float32)}
        vae_files.save_diffusers(folder / name, job.nets.vae, params, stats)
    cache_latents.cache_latents(config(folder), folder / "cache", shard_size=500)
    return folder


def config(files, steps=2, **more):
    changes = {"steps": steps, "checkpoint.every": 2, "hooks.samples_every": 0, "init.vae": str(files / "a")}
    return small.config({**changes, **more}, ldm)


def metrics_of(workdir):
    """Returns the losses of every step, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", *metric_log.SPEED_NAMES)
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


@pytest.mark.slow
def test_training_from_a_cache_is_training_from_images(files, tmp_path):
    stats = {"init.latent_stats": str(files / "cache" / "latents-stats.safetensors")}
    fresh, _ = train.train(config(files, **stats), tmp_path / "fresh")
    cached, finished = train.train(config(files, **{"data.cache": str(files / "cache")}), tmp_path / "cached")
    assert finished and int(cached.step) == 2
    error = small.largest_error(cached, fresh)
    print(f"cached against fresh latents after two steps: {error:.1e}")
    assert error < 1e-3  # Adam's first steps are signs of gradients
    for a, b in zip(metrics_of(tmp_path / "cached"), metrics_of(tmp_path / "fresh")):
        for name in ("sit/velocity", "sit/align", "grad_norm/sit"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)


def test_without_encoders_the_images_are_not_even_there(files, tmp_path):
    changes = {
        "data.cache": str(files / "cache"), "encoders": {}, "loss.sit.align": 0.0, "data.source": "folder",
        "data.options": {"path": "/nowhere"},
    }  # fmt: skip
    state, finished = train.train(config(files, **changes), tmp_path)
    assert finished and int(state.step) == 2


def test_a_run_on_a_frozen_vae_continues_bit_for_bit(files, tmp_path):
    whole, _ = train.train(config(files, steps=4), tmp_path / "whole")
    train.train(config(files, steps=2), tmp_path / "halves")
    halves, finished = train.train(config(files, steps=4), tmp_path / "halves")
    assert finished and small.differing(halves, whole) == []
    assert metrics_of(tmp_path / "halves") == metrics_of(tmp_path / "whole")


def test_another_vae_is_refused(files, tmp_path):
    other = {"init.vae": str(files / "b")}
    with pytest.raises(ValueError, match="fingerprint") as caught:
        train.train(config(files, **{**other, "data.cache": str(files / "cache")}), tmp_path / "cache")
    assert "cache_latents" in str(caught.value)
    train.train(config(files), tmp_path / "run")
    with pytest.raises(ValueError, match="was trained on another frozen VAE than config.init.vae"):
        train.train(config(files, steps=4, **other), tmp_path / "run")


def test_a_cache_of_other_images_does_not_continue_a_run(files, tmp_path):
    without_images = {"encoders": {}, "loss.sit.align": 0.0}
    train.train(config(files, **without_images, **{"data.cache": str(files / "cache")}), tmp_path / "run")
    other = shutil.copytree(files / "cache", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "records_hash": "0"}))
    with pytest.raises(ValueError, match="another set of images than config.data gives now .*now 0"):
        train.train(config(files, steps=4, **without_images, **{"data.cache": str(other)}), tmp_path / "run")


def test_flips_need_a_cache_with_flips(files, tmp_path):
    changes = {"data.flip_probability": 0.5, "data.cache": str(files / "cache")}
    with pytest.raises(ValueError, match="without mirrored images") as caught:
        train.train(config(files, **changes), tmp_path)
    assert "config.data.flip_probability=0.5" in str(caught.value) and "--flips" in str(caught.value)


@pytest.mark.slow
def test_a_tokenizer_run_continues_bit_for_bit(tmp_path):
    changes = {"checkpoint.every": 2, "hooks.reconstructions_every": 2, "loss.adaptive.gan": 1e4}
    whole, _ = train.train(small.config({**changes, "steps": 4}, vae), tmp_path / "whole")
    train.train(small.config({**changes, "steps": 2}, vae), tmp_path / "halves")
    halves, _ = train.train(small.config({**changes, "steps": 4}, vae), tmp_path / "halves")
    assert small.differing(halves, whole) == []
    assert metrics_of(tmp_path / "halves") == metrics_of(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole" / "reconstructions").iterdir()) == ["0000002.png", "0000004.png"]
    assert not (tmp_path / "whole" / "samples").exists()
