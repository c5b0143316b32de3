"""Batch statistics against numpy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.distributed import sharding
from repae_jax.models.channel_stats import ChannelStats, batch_stats, update_running

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((6, 5, 4, 3)) * (1, 2, 0.1) + (0, 10, -3)).astype(np.float32)  # [B, h, w, C]
COUNT = X.size // 3
RUNNING = ChannelStats(mean=jnp.array([1.0, 2.0, 3.0]), var=jnp.array([0.5, 1.0, 2.0]))


def test_batch_statistics_equal_numpys():
    stats = batch_stats(X)
    np.testing.assert_allclose(stats.mean, X.astype(np.float64).mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, X.astype(np.float64).var((0, 1, 2)), rtol=1e-5)


def test_the_running_variance_is_unbiased():
    new = update_running(RUNNING, batch_stats(X), COUNT, 0.1)
    x = X.astype(np.float64)
    np.testing.assert_allclose(new.mean, 0.9 * np.float64(RUNNING.mean) + 0.1 * x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(new.var, 0.9 * np.float64(RUNNING.var) + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_three_updates_equal_torchs_batch_norm(momentum):
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm2d(3, momentum=momentum)
    norm.running_mean.copy_(torch.tensor(np.array(RUNNING.mean)))
    norm.running_var.copy_(torch.tensor(np.array(RUNNING.var)))
    running = RUNNING
    for scale in (1.0, 0.3, 2.0):
        stats = batch_stats(scale * X)
        running = update_running(running, stats, COUNT, momentum)
        out = norm(torch.tensor(np.moveaxis(scale * X, -1, 1))).detach().numpy()
        ours = (scale * X - stats.mean) / np.sqrt(stats.var + norm.eps)
        np.testing.assert_allclose(ours, np.moveaxis(out, 1, -1), atol=2e-4)  # channel 1 is far from 0: it cancels
        np.testing.assert_allclose(running.mean, norm.running_mean, rtol=1e-5)
        np.testing.assert_allclose(running.var, norm.running_var, rtol=1e-5)


def test_statistics_of_half_precision_are_reduced_in_float32():
    x = jnp.full((64, 64, 1), 300.0, jnp.float16).at[0].set(302.0)  # the sum overflows float16
    stats = batch_stats(x)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    np.testing.assert_allclose(stats.mean, np.asarray(x, np.float64).mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(stats.var, np.asarray(x, np.float64).var((0, 1)), rtol=1e-4)


def test_statistics_are_those_of_the_global_batch():
    mesh = sharding.make_mesh(1)
    x = np.concatenate([X, X + 5])[:8]
    sharded = jax.jit(batch_stats)(sharding.put_batch(mesh, x))
    for ours, expected in zip(jax.tree.leaves(sharded), jax.tree.leaves(batch_stats(x))):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_one_value_has_no_unbiased_variance():
    with pytest.raises(ValueError, match="at least 2 values per channel, got 1"):
        update_running(RUNNING, batch_stats(X), 1, 0.1)
