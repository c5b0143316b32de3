"""Sampling in bfloat16 beside float32; samplers and whole samples are tested in tests/diffusion and tests/test_sample.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.extend.core import jaxprs_in_params

from repae_jax.diffusion.samplers import Sampling
from repae_jax.job import build
from repae_jax.sampling import generate

EULER = Sampling("euler", 8, guidance_scale=2.0)


@pytest.fixture(scope="module")
def job():
    return build.build(build.plain_config(small.config()), jax.devices())


@pytest.fixture(scope="module")
def params(job):
    return generate.sampling_params(small.random_state(job), {})


def images(job, params, precision):
    sampling = dataclasses.replace(EULER, precision=precision)
    run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, sampling)
    return np.asarray(jax.jit(run)(params, np.arange(32) % 10, np.arange(32), jax.random.key(0))[0], np.float64)


def program(job, params, precision):
    """The traced program: what precedes the loop over the steps, the loop's body, what follows it."""
    run = generate.make_generate(
        job.nets, job.recipe.objective, job.latent_shape, dataclasses.replace(EULER, precision=precision)
    )
    equations = jax.make_jaxpr(run)(params, np.arange(8), np.arange(8), jax.random.key(0)).jaxpr.eqns
    (loop,) = (index for index, equation in enumerate(equations) if equation.primitive.name == "scan")
    return equations[:loop], equations[loop], equations[loop + 1 :]


def casts(equations, dtype):
    """The shapes that equations, with those in them, cast to a dtype."""
    for equation in equations:
        if equation.primitive.name == "convert_element_type" and equation.params["new_dtype"] == dtype:
            yield equation.invars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from casts(inner.eqns, dtype)


@pytest.mark.integration
def test_bfloat16_differs_by_less_than_a_gray_level(job, params, record_property):
    """0.25 gray levels on average and 2 at most, of pixels with a standard deviation of 60, with random weights."""
    differences = np.abs(images(job, params, "bfloat16") - images(job, params, "float32"))
    record_property("mean", differences.mean())
    record_property("largest", differences.max())
    assert 0 < differences.mean() < 0.5
    assert differences.max() <= 6


def test_matrices_are_cast_once_and_all_around_the_network_is_float32(job, params):
    leaves = jax.tree_util.tree_leaves_with_path(params["sit"])
    kernels = {leaf.shape for path, leaf in leaves if path[-1].key == "kernel"}
    before, loop, after = program(job, params, "bfloat16")
    assert set(casts(before, jnp.bfloat16)) == kernels
    in_a_step = set(casts([loop], jnp.bfloat16))
    of_one_block = {shape[1:] for shape in kernels}
    assert in_a_step and not in_a_step & (kernels | of_one_block), "activations alone"
    assert [var.aval.dtype for var in loop.outvars] == [jnp.float32], "the sampler's state"
    assert not set(casts(after, jnp.bfloat16)), "denormalizing, decoding"


def test_float32_has_no_bfloat16(job, params):
    before, loop, after = program(job, params, "float32")
    assert not set(casts([*before, loop, *after], jnp.bfloat16))


def test_casting_before_the_network_changes_no_value(job, params):
    sit = job.nets.sit.clone(dtype=jnp.bfloat16)
    apply = jax.jit(lambda tree, *args: sit.apply({"params": tree}, *args)[0])
    args = jnp.ones((2, *job.latent_shape)), jnp.full(2, 0.3), jnp.arange(2)
    cast = generate.cast_matrices(params["sit"], jnp.bfloat16)
    np.testing.assert_array_equal(apply(cast, *args), apply(params["sit"], *args))
