import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden_networks import load_sit

from repae_jax.cost import flops
from repae_jax.diffusion import guidance, interpolant
from repae_jax.diffusion.samplers import SAMPLERS, Sampler, Sampling, check_sampler
from repae_jax.sampling.generate import make_generate


@pytest.mark.parametrize("name", reference.cases("samplers"))
def test_matches_the_published_samplers(name, record_property):
    case = reference.load(name)
    sit, _, params, _ = load_sit(case)
    labels = jnp.asarray(case.arrays["labels"], jnp.int32)
    z = reference.nhwc(case.arrays["initial"])

    def velocity_fn(z_t, t, y):
        return sit.apply(params, z_t, t, y)[0]

    for run, kwargs in case.meta["kwargs"].items():
        sampler = SAMPLERS["sde" if run.startswith("sde") else "heun" if kwargs.get("heun") else "euler"]
        times = sampler.times(kwargs["num_steps"])
        interval = kwargs.get("guidance_low", 0.0), kwargs.get("guidance_high", 1.0)
        guided = guidance.guide(velocity_fn, labels, sit.null_label, kwargs.get("cfg_scale", 1.0), sit.latent_channels)
        segments = [(times, lambda z_t, t: velocity_fn(z_t, t, labels))]
        if kwargs.get("cfg_scale", 1.0) > 1:
            segments = guidance.segments(times, interval, guided, segments[0][1])
        noises = case.arrays.get(f"{run}_noises")
        noises = None if noises is None else jnp.asarray(np.moveaxis(noises, 2, -1))
        objective = interpolant.VelocityObjective(kwargs.get("path_type", "linear"))
        result = sampler.integrate(segments, z, lambda i, n=noises: n[i], objective)
        reference.check(result, reference.nhwc(case.arrays[run]), reference.NETWORK_RTOL, run, record_property)


def test_heun_is_second_order():
    assert ode_error(SAMPLERS["heun"], 40) < ode_error(SAMPLERS["heun"], 20) / 2.5
    assert ode_error(SAMPLERS["heun"], 20) < ode_error(SAMPLERS["euler"], 20) / 10


def ode_error(sampler, steps):
    """Error of dz/dt = -t z from 1 to 0."""
    segments = [(sampler.times(steps), lambda z, t: -z * t[:, None])]
    return abs(float(sampler.integrate(segments, jnp.ones((1, 1)))[0, 0]) - np.exp(0.5))


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
    times = SAMPLERS["sde"].times(250)
    assert len(times) == 251 and times[0] == 1.0 and times[-2] == 0.04 and times[-1] == 0.0


def test_samplers_know_no_labels():
    for sampler in SAMPLERS.values():
        for method in (sampler.integrate, sampler.step, sampler.last_step or sampler.step):
            assert not any("label" in parameter for parameter in inspect.signature(method).parameters)


def test_a_sampler_fits_what_the_network_predicts():
    for name, sampler in SAMPLERS.items():
        check_sampler(Sampling(name, 5), sampler.objective())
    with pytest.raises(ValueError, match="sampler 'ancestral': the network predicts a velocity; allowed: euler, heun, sde$"):
        check_sampler(Sampling("ancestral"), interpolant.VelocityObjective())
    with pytest.raises(ValueError, match="sampler 'heun': the network predicts DiT's noise; allowed: ancestral$"):
        check_sampler(Sampling("heun"), SAMPLERS["ancestral"].objective())
    with pytest.raises(ValueError, match=r"num_steps=1001 .*allowed: 2\.\.1000"):
        check_sampler(Sampling("ancestral", 1001), SAMPLERS["ancestral"].objective())


# ---- a sampler of one's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Midpoint(Sampler):
    """The explicit midpoint method: the velocity halfway, two network calls a step."""

    def step(self, z, interval, output_fn, noise_fn, objective):
        dt, batch = interval.t_next - interval.t, (z.shape[0],)
        halfway = z + dt / 2 * output_fn(z, jnp.full(batch, interval.t))
        return z + dt * output_fn(halfway, jnp.full(batch, interval.t + dt / 2))


class Network:
    """A SiT whose velocity is 3 z, and a VAE that shows its first latents, scaled as pixels."""

    null_label = 10

    def clone(self, dtype, attention=""):
        return self

    def apply(self, variables, x, *rest, method=None):
        if method == "decode":
            return jnp.repeat(x[..., :1], 3, axis=-1)
        with jax.named_scope("SiT"):
            return x @ variables["params"]["kernel"], ()


@pytest.fixture
def with_midpoint(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", Midpoint())


def test_a_sampler_is_added_by_an_entry_of_the_table(with_midpoint):
    """It is allowed in a config, it samples, and its cost is known."""
    assert ode_error(Midpoint(), 40) < ode_error(Midpoint(), 20) / 2.5 and ode_error(Midpoint(), 20) < ode_error(
        SAMPLERS["euler"], 20
    )
    nets, stats = SimpleNamespace(sit=Network(), vae=Network()), SimpleNamespace(mean=jnp.zeros(2), var=jnp.ones(2))
    params = {"sit": {"kernel": jnp.eye(2) * 3}, "vae": {}, "latent_stats": stats}
    labels, ids, key, images = jnp.zeros(3, int), jnp.arange(3), jax.random.key(0), {}
    for name in ("midpoint", "heun"):
        sampling = Sampling(name, 40, guidance_scale=2.0, guidance_high=0.5)
        generate = make_generate(nets, interpolant.VelocityObjective(), (2, 2, 2), sampling)
        images[name], finite = jax.jit(lambda *args, g=generate: g(params, *args))(labels, ids, key)
        assert finite.all()
        # 20 of the 40 steps start at t <= 0.5 and are guided, two calls for one; Heun's last step is Euler's
        calls = 2 * (2 * 20 + 20) - (2 if name == "heun" else 0)
        assert flops.count(lambda *args, g=generate: g(params, *args), labels, ids, key)["SiT"] == calls * 3 * 2 * 4 * 2 * 2
    assert np.abs(images["midpoint"].astype(int) - images["heun"].astype(int)).max() <= 2
