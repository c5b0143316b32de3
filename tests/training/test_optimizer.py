"""Learning rates, and parts of a network that are not trained."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_sections import section

from repae_jax.training.optimizer import learning_rate, make_optimizer, without_fixed


def optimizer(**changes):
    return make_optimizer(section(**changes))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule):
    """Rates read off the size of Adam's first steps with a constant gradient."""
    decay_steps = None if schedule == "constant" else 8
    tx = optimizer(warmup_steps=4, schedule=schedule, decay_steps=decay_steps, final_learning_rate=0.02)
    params, state, rates = {"w": jnp.zeros(1)}, tx.init({"w": jnp.zeros(1)}), []
    for _ in range(10):
        updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        rates.append(-float(updates["w"][0]))
    expected = {
        "constant": [0.1] * 6,
        "linear": [0.1, 0.08, 0.06, 0.04, 0.02, 0.02],
        "cosine": [0.02 + 0.08 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in (0, 1, 2, 3, 4, 4)],
    }[schedule]
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0.075, *expected], atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("linear", [0.1, 0.08, 0.06, 0.04, 0.02, 0.02]),
        ("cosine", [0.1, 0.0882843, 0.06, 0.0317157, 0.02, 0.02]),
        ("1-sqrt", [0.1, 0.06, 0.0434315, 0.0307180, 0.02, 0.02]),  # 0.02 + 0.08 * (1 - sqrt(k / 4))
    ],
)
def test_warmup_stable_decay(schedule, decay):
    """Four steps of warm-up, three at the full rate, a decay over four, and the last rate from then on; by hand."""
    rate = learning_rate(section(warmup_steps=4, schedule=schedule, decay_start=7, decay_steps=11, final_learning_rate=0.02))
    np.testing.assert_allclose([rate(step) for step in range(13)], [0, 0.025, 0.05, 0.075, *[0.1] * 3, *decay], atol=1e-6)


def test_a_decay_that_starts_after_the_warmup_is_the_one_without_a_start():
    fields = {"warmup_steps": 4, "schedule": "linear", "decay_steps": 8}
    first, second = learning_rate(section(**fields)), learning_rate(section(**fields, decay_start=4))
    assert [float(first(step)) for step in range(10)] == [float(second(step)) for step in range(10)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay_start": 3}, r"schedule='constant' does not decay, but decay_start=3: choose another of .*'1-sqrt'"),
        ({"schedule": "1-sqrt"}, r"schedule='1-sqrt' needs decay_steps above warmup_steps=0; it is None"),
        ({"schedule": "linear", "decay_steps": 9, "decay_start": 9}, "decay_start=9 must .* decay_steps=9"),
        (
            {"schedule": "linear", "warmup_steps": 4, "decay_steps": 9, "decay_start": 3},
            "decay_start=3 must lie between warmup_steps=4 and decay_steps=9",
        ),
        ({"method": "sgd"}, r"method='sgd' is unknown; allowed: \['adamw', 'muon'\]"),
    ],
)
def test_settings_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        section(**fields)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_without_a_warmup_and_of_zero(schedule):
    fields = {"schedule": schedule, "decay_steps": 4, "eps": 1e-8}
    params = {"w": jnp.zeros(1)}
    for rate in (0.1, 0.0):
        tx = optimizer(learning_rate=rate, **fields)
        updates, _ = tx.update({"w": jnp.ones(1)}, tx.init(params), params)
        assert float(updates["w"][0]) == pytest.approx(-rate, abs=1e-6)


def test_fixed_parts_neither_move_nor_decay_nor_count_in_the_norm():
    trained, fixed = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0])}
    grads = {"w": jnp.array([3.0, 4.0])}
    fields = {"weight_decay": 0.1, "clip_norm": 1.0, "eps": 1.0}  # so that the size of the clipped gradient matters
    alone, both = optimizer(**fields), optimizer(**fields, fixed=("encoder",))
    params = {"decoder": trained, "encoder": fixed}
    state = both.init(params)
    updates, state = both.update({"decoder": grads, "encoder": {"w": jnp.array([1e6])}}, state, params)
    expected, _ = alone.update({"decoder": grads}, alone.init({"decoder": trained}), {"decoder": trained})
    np.testing.assert_array_equal(updates["decoder"]["w"], expected["decoder"]["w"])
    assert not updates["encoder"]["w"].any()
    moments = optax.tree.get(state, "mu")
    assert isinstance(moments["encoder"], optax.MaskedNode) and moments["decoder"]["w"].any()
    filled = without_fixed(state, params)
    assert isinstance(filled["encoder"], optax.MaskedNode) and filled["decoder"] is trained
