import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.diffusion import interpolant, token_times
from repae_jax.diffusion.interpolant import VelocityObjective

KEY = jax.random.key(0)


@pytest.mark.parametrize(("grid", "patch_size"), [((8, 8), 2), ((6, 4), 1), ((8, 16), 4)])
def test_a_token_has_one_of_both_times(grid, patch_size):
    first, second = jnp.asarray([0.1, 0.9, 0.5]), jnp.asarray([0.7, 0.2, 0.6])
    times = np.asarray(token_times.mix(KEY, first, second, 0.5, grid, patch_size))
    tokens = times[:, ::patch_size, ::patch_size]
    np.testing.assert_array_equal(np.repeat(np.repeat(tokens, patch_size, 1), patch_size, 2), times)  # alike in a token
    assert times.shape == (3, *grid) and len(np.unique(tokens[0])) == 2
    for sample, one, other in zip(tokens, first, second):
        assert set(np.unique(sample)) <= {np.float32(one), np.float32(other)}
    np.testing.assert_array_equal(token_times.least(times), [sample.min() for sample in tokens])


def test_tokens_draw_by_themselves():
    """A quarter of the draws of each of 16 tokens, and the variance of a binomial number: five standard deviations of 4000."""
    times = np.asarray(token_times.mix(KEY, jnp.zeros(4000), jnp.ones(4000), 0.25, (4, 4), 1))
    variance = 0.25 * 0.75
    np.testing.assert_allclose(np.mean(times, axis=0), 0.25, atol=5 * np.sqrt(variance / 4000))
    assert np.var(np.sum(times, axis=(1, 2))) == pytest.approx(16 * variance, rel=5 * np.sqrt(2 / 4000))


def test_one_time_is_its_own_least():
    t = jnp.asarray([0.3, 0.8])
    np.testing.assert_array_equal(token_times.least(t), t)


def test_an_objective_draws_one_time_or_two():
    """Without a share, bit for bit as before; with one, both times have the distribution of one, by their means."""
    shape = (512, 8, 8, 3)
    plain = VelocityObjective(time_shift=2.0)
    np.testing.assert_array_equal(plain.draw_times(KEY, shape), plain.sample_time(KEY, 512))
    times = np.asarray(VelocityObjective(second_time_share=0.5, patch_size=2).draw_times(KEY, shape))
    assert times.shape == (512, 8, 8) and all(len(np.unique(sample)) == 2 for sample in times)
    assert np.mean(times) == pytest.approx(0.5, abs=0.05)
    assert np.mean(token_times.least(times)) == pytest.approx(1 / 3, abs=0.05)  # of the lesser of two uniform draws


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_position_has_the_noise_of_its_time(path):
    """Against a batch whose images have that time everywhere; the same program, 1e-6."""
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32) for _ in range(2))
    times = jnp.where(jnp.arange(16).reshape(1, 4, 4) % 3 == 0, 0.2, 0.7)
    objective, is_early, of_images = VelocityObjective(path), times[..., None] < 0.5, [jnp.full(1, t) for t in (0.2, 0.7)]
    alone = [objective.add_noise(z, noise, t) for t in of_images]
    np.testing.assert_allclose(objective.add_noise(z, noise, times), jnp.where(is_early, *alone), rtol=1e-6, atol=1e-6)
    target = jnp.where(is_early, *[interpolant.velocity_target(path, z, noise, t) for t in of_images])
    np.testing.assert_allclose(objective.losses(jnp.zeros_like(z), z, noise, times)["velocity"], np.mean(target**2), rtol=1e-6)
