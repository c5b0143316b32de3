"""A full-size job traced without computing anything, for tests of configs."""

import jax
import numpy as np

from repae_jax.job import compilation, initial_state


def millions(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


def check_step(job):
    """Traces a step: what comes out has the shapes and dtypes of what went in. Returns the shapes of its metrics."""
    state = initial_state.abstract_state(job)
    new, metrics = jax.eval_shape(job.step, state, *compilation.abstract_inputs(job))
    kinds = [jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree) for tree in (state, new)]
    assert kinds[0] == kinds[1]
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype("float32"), np.dtype("int32")}
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), np.dtype("float32"))}
    return metrics
