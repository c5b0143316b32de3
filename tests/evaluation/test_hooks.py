"""Pictures and scores during training, of networks that only paint: what is written, when it is due, and what is missing."""

import functools
from types import SimpleNamespace

import feature_stub
import jax.numpy as jnp
import numpy as np
import pytest
import small
from etils import epath
from PIL import Image

from repae_jax.data.digits import DigitsSource
from repae_jax.evaluation import hooks
from repae_jax.job import build
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.metrics.kernel_distances import kernel_inception_distance
from repae_jax.metrics.monge import monge_inception_distance

SECTION = {"samples_every": 2, "reconstructions_every": 4, "images": 4, "fid_every": 3, "fid_samples": 20}


class Writer:
    def __init__(self):
        self.images, self.scalars = [], []

    def write_images(self, step, images):
        self.images += [(step, name, array.shape) for name, array in images.items()]

    def write_scalars(self, step, scalars):
        self.scalars.append((step, scalars))


def paint(labels):
    """Images of one gray value per label."""
    return jnp.broadcast_to((20 * labels).astype(jnp.uint8)[:, None, None, None], (len(labels), 8, 8, 3))


@pytest.fixture
def job(monkeypatch):
    generate = lambda *_: lambda params, labels, ids, key: (paint(labels), jnp.ones(len(ids), bool) & (params >= 0))  # noqa: E731
    monkeypatch.setattr(hooks.generate, "make_generate", generate)
    monkeypatch.setattr(hooks.generate, "make_reconstruct", lambda nets: lambda params, images: paint(jnp.arange(len(images))))
    monkeypatch.setattr(hooks.generate, "sampling_params", lambda state, frozen: state.params)
    return build.build(small.config({f"hooks.{name}": value for name, value in SECTION.items()} | {
        "hooks.fid_inception": "inception.pth", "hooks.fid_reference": "reference.npz",
    }))  # fmt: skip


def make(job, workdir, writer, stopped=lambda: False):
    network = feature_stub.StubNetwork(64)
    reference = SimpleNamespace(pool=gaussian_stats(np.random.default_rng(0).normal(size=(50, 6))), features=None)
    source = DigitsSource(8)
    return hooks.make_hooks(job, {}, source, epath.Path(workdir), writer, (network, reference), stopped), network, reference


def state_of(params=0.0):
    return SimpleNamespace(params=params, vae=SimpleNamespace(params=0.0))


@pytest.mark.integration
def test_pictures_and_scores(job, tmp_path):
    writer = Writer()
    all_hooks, network, reference = make(job, tmp_path, writer)
    assert [hook.every for hook in all_hooks] == [3, 2, 4]
    assert [hook.is_due(6, 9) for hook in all_hooks] == [True, True, False] and all(hook.is_due(9, 9) for hook in all_hooks)
    assert hooks.pending_hooks(all_hooks, 6, 9) == all_hooks[:2]
    for hook in all_hooks:
        hook.run(6, state_of())
    pictures = {kind: np.asarray(Image.open(tmp_path / kind / "0000006.png")) for kind in ("samples", "reconstructions")}
    assert writer.images == [(6, kind, picture.shape) for kind, picture in pictures.items()]
    assert {0, 40, 100, 140} <= set(np.unique(pictures["samples"]).tolist()), "labels 0, 2, 5 and 7 of 10"
    pool = network(np.asarray(paint(np.arange(20, dtype=np.int32) % 10))).pool
    assert writer.scalars == [(6, {"fid/20_samples": pytest.approx(frechet_distance(*gaussian_stats(pool), *reference.pool))})]
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "fid/20_samples": 1}\n')
    assert hooks.pending_hooks(all_hooks, 6, 9) == []


def test_mind_of_a_reference_with_features():
    real, samples = (np.random.default_rng(seed).normal(size=(count, 6)) for seed, count in enumerate((50, 20)))
    stats = gaussian_stats(real)
    scores = hooks._scores(samples, SimpleNamespace(pool=stats, features=real))
    assert scores == {
        "fid/20_samples": frechet_distance(*gaussian_stats(samples), *stats),
        "mind/20_samples": monge_inception_distance(real, samples)[0],
    }
    assert set(hooks._scores(samples[:19], SimpleNamespace(pool=stats, features=real))) == {"fid/19_samples"}


def test_kid_of_enough_images(monkeypatch):
    """Of the same features as FID: near 0 where both are of one distribution, and well above it where the means differ."""
    monkeypatch.setattr(hooks, "kernel_inception_distance", functools.partial(kernel_inception_distance, subsets=3))
    real, same, other = (np.random.default_rng(seed).normal(size=(1000, 6)) for seed in range(3))
    reference = SimpleNamespace(pool=gaussian_stats(real), features=real)
    scores = hooks._scores(other + 1, reference)
    assert set(scores) == {"fid/1000_samples", "mind/1000_samples", "kid/1000_samples"}
    assert scores["kid/1000_samples"] == kernel_inception_distance(real, other + 1, subsets=3)[0] > 0.1
    assert abs(hooks._scores(same, reference)["kid/1000_samples"]) < 0.01
    assert set(hooks._scores(other[:999], reference)) == {"fid/999_samples", "mind/999_samples"}


def test_no_score_of_broken_samples_or_when_asked_to_stop(job, tmp_path, warnings):
    writer = Writer()
    (fid, *_), _, _ = make(job, tmp_path, writer)
    fid.run(3, state_of(-1.0))
    assert "step 3: no FID: 64 of 64 samples are not finite" in warnings[0]
    (fid, *_), network, _ = make(job, tmp_path, writer, stopped=lambda: True)
    fid.run(3, state_of())
    assert writer.scalars == [] and network.images == 0
