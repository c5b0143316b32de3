import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_sit import load_sit

from repae_jax.diffusion import guidance, samplers

SAMPLERS = {"ode_euler": "euler", "ode_heun": "heun", "sde": "sde"}


@pytest.mark.parametrize("name", reference.cases("samplers"))
def test_matches_the_published_samplers(name, record_property):
    case = reference.load(name)
    sit, _, params, _ = load_sit(case)
    labels = jnp.asarray(case.arrays["labels"], jnp.int32)
    z = reference.nhwc(case.arrays["initial"])

    def velocity_fn(z_t, t, y):
        return sit.apply(params, z_t, t, y)[0]

    for run, kwargs in case.meta["kwargs"].items():
        is_sde = run.startswith("sde")
        times = (samplers.sde_times if is_sde else samplers.ode_times)(kwargs["num_steps"])
        interval = kwargs.get("guidance_low", 0.0), kwargs.get("guidance_high", 1.0)
        guided = guidance.guide(velocity_fn, labels, sit.null_label, kwargs.get("cfg_scale", 1.0), sit.latent_channels)
        segments = [(times, lambda z_t, t: velocity_fn(z_t, t, labels))]
        if kwargs.get("cfg_scale", 1.0) > 1:
            segments = guidance.segments(times, interval, guided, segments[0][1])
        if is_sde:
            noises = jnp.asarray(np.moveaxis(case.arrays[f"{run}_noises"], 2, -1))
            result = samplers.euler_maruyama(segments, z, kwargs.get("path_type", "linear"), lambda i, n=noises: n[i])
        else:
            result = (samplers.heun if kwargs.get("heun") else samplers.euler)(segments, z)
        reference.check(result, reference.nhwc(case.arrays[run]), reference.NETWORK_RTOL, run, record_property)


def test_heun_is_second_order():
    def error(method, steps):
        times = samplers.ode_times(steps)
        return abs(float(method([(times, lambda z, t: -z * t[:, None])], jnp.ones((1, 1)))[0, 0]) - np.exp(0.5))

    assert error(samplers.heun, 40) < error(samplers.heun, 20) / 2.5
    assert error(samplers.heun, 20) < error(samplers.euler, 20) / 10


def test_guidance_scale_one_is_the_conditional_velocity():
    def velocity_fn(z, t, y):
        return z * y[:, None] + t[:, None]

    labels = jnp.array([1, 2])
    z, t = jnp.ones((2, 3)), jnp.array([0.1, 0.2])
    guided = guidance.guide(velocity_fn, labels, 10, 1.0, 3)(z, t)
    np.testing.assert_allclose(guided, velocity_fn(z, t, labels), rtol=1e-6)


def test_segments_follow_each_steps_start():
    times = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    parts = guidance.segments(times, (0.4, 0.8), "guided", "plain")
    assert [(list(t), fn) for t, fn in parts] == [
        ([1.0, 0.8], "plain"),
        ([0.8, 0.6, 0.4, 0.2], "guided"),
        ([0.2, 0.0], "plain"),
    ]
    assert len(guidance.segments(times, (0.0, 1.0), "guided", "plain")) == 1


def test_sde_schedule_is_the_published_one():
    times = samplers.sde_times(250)
    assert len(times) == 251 and times[0] == 1.0 and times[-2] == 0.04 and times[-1] == 0.0


def test_samplers_know_no_labels():
    for function in (samplers.euler, samplers.heun, samplers.euler_maruyama):
        assert not any("label" in parameter for parameter in inspect.signature(function).parameters)
