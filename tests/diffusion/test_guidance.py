"""Guidance by hand: schedules, and extrapolation away from weaker outputs, with functions of a line as networks."""

import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.diffusion import guidance

LABELS, NULL = np.asarray([1, 3]), 5
T = np.asarray([0.25, 0.75], np.float32)
Z = np.arange(12, dtype=np.float32).reshape(2, 2, 3) / 7 - 0.5
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}  # of float32


def strong_fn(z, t, labels):
    return z * (1 + 0.1 * labels)[:, None, None] + t[:, None, None]


def weak_fn(z, t, labels):
    return 0.5 * z - 0.2 * labels[:, None, None] + 0.3 * t[:, None, None]


def pair_fn(*arguments):
    return strong_fn(*arguments), weak_fn(*arguments)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [3, 3, 3, 3]),
        ("linear", [5, 4, 3, 1]),  # 1 + 2 x 2 (1 - t)
        ("cosine", [5, 1 + 2 * (1 + np.sqrt(0.5)), 3, 1]),
        ("power_cosine", [3, 1 + 2 * 0.227337, 1 + 2 * 0.009607, 1]),  # (1 - cos(pi (1 - t)^4)) / 2
    ],
)
def test_schedules_by_hand(schedule, expected):
    scale = guidance.scheduled_scale(schedule, 3.0, 4.0, 1.0)
    t = jnp.asarray([0.0, 0.25, 0.5, 1.0])
    values = np.full(4, scale) if schedule == "constant" else scale(t)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_guide_as_much_as_a_constant_scale(schedule):
    middles = (np.arange(1000) + 0.5) / 1000
    assert np.mean(guidance.scheduled_scale(schedule, 2.5, 4.0, 1.0)(jnp.asarray(middles))) == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("power", [4.0, 0.01])
def test_the_power_cosine_is_that_of_mdt(power):
    """Its `forward_with_cfg`, on numbers."""
    steps, scale = 1000, 3.8
    t = np.asarray([0, 400, 999])
    expected = (scale - 1) * (1 - np.cos((1 - t / steps) ** power * np.pi)) * 1 / 2 + 1
    found = guidance.scheduled_scale("power_cosine", scale, power, steps)(jnp.asarray(t))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_sample_is_guided_by_the_scale_of_its_time():
    scale = guidance.scheduled_scale("linear", 3.0, 4.0, 1.0)
    found = guidance.guide(strong_fn, jnp.asarray(LABELS), NULL, scale, 2)(Z, T)
    expected = strong_fn(Z, T, LABELS)
    null = strong_fn(Z, T, np.full(2, NULL))
    for i, by in enumerate((4.0, 2.0)):  # 1 + 2 x 2 (1 - t)
        expected[i, :, :2] = null[i, :, :2] + by * (expected[i] - null[i])[:, :2]
    np.testing.assert_allclose(found, expected, **ROUNDING)


def test_away_from_a_weaker_network_by_hand():
    """EDM2's `ref.lerp(net, scale)`; the last channel, which is not guided, is the stronger network's."""
    found = guidance.away_from(pair_fn, 2.1, 2)(Z, T, LABELS)
    strong, weak = pair_fn(Z, T, LABELS)
    np.testing.assert_allclose(found[..., :2], (weak + 2.1 * (strong - weak))[..., :2], **ROUNDING)
    np.testing.assert_allclose(found[..., 2], strong[..., 2], **ROUNDING)


def test_one_of_two_outputs_may_lack_the_channels_that_are_not_guided():
    """As a SiT without a variance beside a published one, whose files have it."""
    found = guidance.away_from(lambda *arguments: (strong_fn(*arguments), weak_fn(*arguments)[..., :2]), 2.1, 2)(Z, T, LABELS)
    expected = guidance.away_from(pair_fn, 2.1, 2)(Z, T, LABELS)
    np.testing.assert_array_equal(found, expected)
    found = guidance.away_from(lambda *arguments: (strong_fn(*arguments)[..., :2], weak_fn(*arguments)), 2.1, 2)(Z, T, LABELS)
    np.testing.assert_array_equal(found, expected[..., :2])


def test_of_the_null_label_it_is_classifier_free_guidance():
    guided = guidance.away_from(lambda z, t, y: (strong_fn(z, t, y), strong_fn(z, t, np.full_like(y, NULL))), 1.7, 3)
    expected = guidance.guide(strong_fn, jnp.asarray(LABELS), NULL, 1.7, 3)(Z, T)
    np.testing.assert_allclose(guided(Z, T, LABELS), expected, **ROUNDING)


def test_both_kinds_together_are_those_of_raev2():
    """Its `forward_with_ig_and_cfg`: each of the two outputs is guided away from its weaker one, then from one another."""
    internal, scale = 1.78, 1.5
    guided = guidance.away_from(pair_fn, internal, 3)
    found = guidance.guide(guided, jnp.asarray(LABELS), NULL, scale, 3)(Z, T)
    of = [pair_fn(Z, T, labels) for labels in (LABELS, np.full(2, NULL))]
    conditional, unconditional = (base + internal * (full - base) for full, base in of)
    np.testing.assert_allclose(found, unconditional + scale * (conditional - unconditional), **ROUNDING)
