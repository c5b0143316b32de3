"""Every draw has a name, and depends on nothing but the key, the step and that name."""

import jax
import numpy as np

from repae_jax.training.rng import named_keys

KEY = jax.random.key(0)
NAMES = ("posterior", "time", "noise", "label_drop")


def data(keys):
    return {name: tuple(np.asarray(jax.random.key_data(key)).tolist()) for name, key in keys.items()}


def test_another_name_changes_no_other_draw():
    before = data(named_keys(KEY, 3, *NAMES))
    after = data(named_keys(KEY, 3, "first", *reversed(NAMES), "last"))
    assert {name: after[name] for name in NAMES} == before


def test_names_steps_and_runs_differ():
    keys = [data(named_keys(key, step, *NAMES)) for key in (KEY, jax.random.key(1)) for step in range(50)]
    every = [key for named in keys for key in named.values()]
    assert len(set(every)) == len(every) == 400


def test_the_step_may_be_traced():
    traced = jax.jit(lambda step: named_keys(KEY, step, "time")["time"])(np.int32(7))
    assert data({"time": traced}) == data(named_keys(KEY, 7, "time"))


def test_keys_do_not_change_between_versions():
    """Resumed runs and published numbers rest on them."""
    assert data(named_keys(KEY, 0, "time")) == {"time": (4044567557, 2411234704)}
