"""What a network predicts, and at which times it learns, beside the formulas of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.diffusion import interpolant
from repae_jax.diffusion.interpolant import DataObjective, VelocityObjective

RNG = np.random.default_rng(0)
X, NOISE, OUTPUT = (RNG.standard_normal((6, 2, 2, 3)) for _ in range(3))
T = np.array([0.001, 0.04, 0.0500001, 0.3, 0.9, 1.0])  # 1 is noise; two below JiT's limit


def published_jit(t):
    """Loss and velocity of JiT's `denoiser.py`, in float64, where 0 is noise and 1 is data."""
    t = (1 - t).reshape(-1, 1, 1, 1)
    z = t * X + (1 - t) * NOISE
    divisor = np.maximum(1 - t, 5e-2)
    v, v_pred = (X - z) / divisor, (OUTPUT - z) / divisor
    return np.mean((v - v_pred) ** 2), v_pred, z


def test_predicting_latents_is_as_published():
    """Loss within 1e-6, velocity within 1e-5 of its largest entry: of opposite sign, as time runs the other way."""
    loss, velocity, z = published_jit(T)
    objective, arrays = DataObjective(), [jnp.asarray(x, jnp.float32) for x in (OUTPUT, X, NOISE, T)]
    output, x, noise, t = arrays
    assert objective.losses(output, x, noise, t)["velocity"] == pytest.approx(loss, rel=1e-6)
    z_t = objective.add_noise(x, noise, t)
    np.testing.assert_allclose(z_t, z, atol=1e-6)
    ours = objective.velocity(output, z_t, t)
    assert np.abs(ours + velocity).max() < 1e-5 * np.abs(velocity).max()
    np.testing.assert_array_equal(objective.data(output, z_t, t), output)


@pytest.mark.parametrize("path", list(interpolant.PATHS))
def test_latents_of_a_velocity(path):
    """The velocity of a known way leads back to its latents, within 1e-5."""
    objective = VelocityObjective(path)
    x, noise, t = (jnp.asarray(array, jnp.float32) for array in (X, NOISE, T))
    velocity, z_t = interpolant.velocity_target(path, x, noise, t), objective.add_noise(x, noise, t)
    np.testing.assert_allclose(objective.data(velocity, z_t, t), x, atol=1e-5)
    assert objective.velocity(velocity, z_t, t) is velocity


def test_velocity_and_latents_train_to_the_same_loss_at_equal_velocities():
    x, noise, t = (jnp.asarray(array, jnp.float32) for array in (X[2:], NOISE[2:], T[2:]))
    output = jnp.asarray(OUTPUT[2:], jnp.float32)
    data = DataObjective()
    velocity = data.velocity(output, data.add_noise(x, noise, t), t)
    losses = [data.losses(output, x, noise, t), VelocityObjective().losses(velocity, x, noise, t)]
    assert losses[0]["velocity"] == pytest.approx(float(losses[1]["velocity"]), rel=1e-5)


# ---- times ----------------------------------------------------------------------------------------------------------

KEY = jax.random.key(3)


def test_training_times_without_a_shift_are_what_they_were():
    """Bit for bit."""
    np.testing.assert_array_equal(VelocityObjective().sample_time(KEY, 64), jax.random.uniform(KEY, (64,)))
    sigma = jnp.exp(jax.random.normal(KEY, (64,)))
    for path, expected in (("linear", sigma / (1 + sigma)), ("cosine", 2 / np.pi * jnp.arctan(sigma))):
        np.testing.assert_array_equal(VelocityObjective(path, "lognormal").sample_time(KEY, 64), expected)


def test_training_times_are_shifted_toward_noise():
    """As RAE's `transport.py` shifts its draws, where 1 is noise, too: rounding, 1e-6; the median of uniform times."""
    t, shift = np.asarray(VelocityObjective().sample_time(KEY, 4096), np.float64), 6.9282
    shifted = VelocityObjective(time_shift=shift).sample_time(KEY, 4096)
    np.testing.assert_allclose(shifted, shift * t / (1 + (shift - 1) * t), rtol=1e-6)
    assert np.median(shifted) == pytest.approx(shift / (1 + shift), abs=0.01)


def test_lognormal_times_have_a_mean_and_a_deviation():
    """JiT's -0.8 and 0.8, of log(alpha / sigma), are 0.8 and 0.8 here; 20,000 draws within 0.02."""
    t = np.asarray(VelocityObjective("linear", "lognormal", 0.8, 0.8).sample_time(KEY, 20_000), np.float64)
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(0.8, abs=0.02) and logit.std() == pytest.approx(0.8, abs=0.02)
