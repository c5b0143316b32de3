"""Learning rates, and parts of a network that are not trained."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repae_jax.training.optimizer import AdamW, make_optimizer, without_fixed

FIELDS = {
    "learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant", "decay_steps": None, "final_learning_rate": 0.0,
    "b1": 0.9, "b2": 0.999, "eps": 1e-12, "weight_decay": 0.0, "clip_norm": 1e9, "fixed": (),
}  # fmt: skip


def optimizer(**changes):
    return make_optimizer(AdamW(**{**FIELDS, **changes}))


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
