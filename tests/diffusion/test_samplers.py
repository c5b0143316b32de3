import dataclasses
import inspect
import math
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


class Gaussian:
    """Data N(mean, std^2) with its exact velocity and its exact way from noise to data."""

    def __init__(self, mean=0.7, std=0.4, path="linear"):
        self.mean, self.std, self.path = mean, std, path

    def at(self, t):
        c = interpolant.coefficients(self.path, t)
        return c, (c.alpha * self.std) ** 2 + c.sigma**2

    def velocity(self, z, t):
        (alpha, sigma, d_alpha, d_sigma), variance = self.at(t[:, None])
        slope = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / variance
        return d_alpha * self.mean + slope * (z - alpha * self.mean)

    def data(self, z, t):
        (alpha, *_), variance = self.at(t[:, None])
        return self.mean + alpha * self.std**2 / variance * (z - alpha * self.mean)

    def move(self, z, start, end):
        """z at `end` on the way through z at `start`."""
        (here, before), (there, after) = (self.at(np.asarray(t, np.float64)) for t in (start, end))
        return there.alpha * self.mean + np.sqrt(after / before) * (z - here.alpha * self.mean)


NOISE = np.linspace(-2, 2, 9)[:, None]


def largest_error(sampler, times, path="linear", switch=None, objective=interpolant.VelocityObjective):
    """Of the end of the way to a Gaussian; from the time `switch` on to another one, as guidance in an interval does."""
    first, second, (start, *_, end) = Gaussian(path=path), Gaussian(-0.5, 0.8, path), times
    name = "data" if objective is interpolant.DataObjective else "velocity"
    segments, exact = [(times, getattr(first, name))], first.move(NOISE, start, end)
    if switch is not None:
        segments = guidance.segments(times, (switch, 1.0), segments[0][1], getattr(second, name))
        border = segments[0][0][-1]
        exact = second.move(first.move(NOISE, start, border), border, end)
    return np.abs(sampler.integrate(segments, jnp.asarray(NOISE, jnp.float32), objective=objective(path)) - exact).max()


WAYS = [{}, {"path": "cosine"}, {"switch": 0.5001}, {"objective": interpolant.DataObjective}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_dpm_solver_is_of_second_order_also_where_guidance_begins_and_ends(way):
    """Between 0.9 and 0.1: the log-SNR is infinite at both ends, where steps are of first order."""
    errors = [largest_error(SAMPLERS["dpmpp"], np.linspace(0.9, 0.1, steps + 1), **way) for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > 3.6 and errors[1] / errors[2] > 3.6, errors


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_dpm_solver_errs_less_than_euler_with_as_many_calls(way):
    errors = [largest_error(SAMPLERS[name], SAMPLERS[name].times(20), **way) for name in ("dpmpp", "euler")]
    assert errors[0] < errors[1] / 5, errors


@pytest.mark.integration
@pytest.mark.parametrize("start", [0.999, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [3, 20])
def test_dpm_solver_equals_that_of_diffusers(start, shift, steps):
    """Largest difference below 2e-6 of values up to 3."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    if start == 1.0:
        ours = Sampling("dpmpp", time_shift=shift).method.times(steps)
        scheduler.sigmas = torch.tensor(ours.astype(np.float32))
    times, way = scheduler.sigmas.numpy().astype(np.float64), Gaussian()
    z = torch.tensor(NOISE.astype(np.float32))
    for number, timestep in enumerate(scheduler.timesteps):
        velocity = np.asarray(way.velocity(jnp.asarray(z.numpy()), jnp.full(len(z), times[number])))
        z = scheduler.step(torch.tensor(velocity), timestep, z).prev_sample
    ours = SAMPLERS["dpmpp"].integrate([(times, way.velocity)], jnp.asarray(NOISE, jnp.float32))
    assert np.abs(np.asarray(ours) - z.numpy()).max() < 2e-6


WEIGHTS = np.random.default_rng(0).standard_normal((2, 3, 3))


def small_network(numpy):
    return lambda z, t: numpy.tanh(z @ WEIGHTS[0].astype(np.float32) + t[:, None]) @ WEIGHTS[1].astype(np.float32)


@pytest.mark.parametrize(("tolerance", "error"), [(1e-3, 3e-3), (1e-5, 5e-5)])
def test_dopri5_is_as_exact_as_its_tolerance_says(tolerance, error):
    """Beside scipy's integration at 1e-10: as exact as its own Dormand-Prince method, with as many network calls."""
    scipy, calls = pytest.importorskip("scipy.integrate"), []
    z = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)

    def slope(backward, flat):
        return -small_network(np)(flat.reshape(4, 3), np.full(4, -backward)).ravel()

    exact = scipy.solve_ivp(slope, (-1, 0), z.ravel(), method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1].reshape(4, 3)
    theirs = scipy.solve_ivp(slope, (-1, 0), z.ravel(), method="RK45", rtol=tolerance, atol=tolerance / 1000)

    def output_fn(z, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return small_network(jnp)(z, t)

    sampler = Sampling("dopri5", 50, tolerance=tolerance).method
    ours = sampler.integrate([(sampler.times(50), output_fn)], jnp.asarray(z))
    jax.effects_barrier()
    assert np.abs(ours - exact).max() < error
    assert np.abs(theirs.y[:, -1].reshape(4, 3) - exact).max() < error
    assert theirs.nfev / 2 < len(calls) < 2 * theirs.nfev


def test_dopri5_takes_its_own_steps_between_the_ends_of_guidance():
    """Errors of ways to latents of up to 3, at two tolerances; at the first, four steps lead from noise to data."""
    sampler, times = Sampling("dopri5").method, {steps: SAMPLERS["dopri5"].times(steps) for steps in (4, 50)}
    assert largest_error(sampler, times[4]) < 1e-2 and largest_error(sampler, times[50], switch=0.5) < 1e-2
    sampler = Sampling("dopri5", tolerance=1e-5).method
    assert largest_error(sampler, times[4], switch=0.5) < 2e-4 and largest_error(sampler, times[4], path="cosine") < 2e-4


def test_dopri5_ends_where_there_is_no_solution():
    """Neither an endless loop nor latents that look like samples: NaN, where the network is, or the way leads to infinity."""
    for output_fn in (lambda z, t: z * jnp.nan, lambda z, t: -jnp.square(10 * z)):
        assert np.isnan(SAMPLERS["dopri5"].integrate([(np.array([1.0, 0.0]), output_fn)], jnp.ones((2, 3)))).all()


# ---- what the network predicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp", "sde"])
def test_samplers_take_a_network_that_predicts_latents(name):
    """As one that predicts the velocity, at times that are not limited: 1e-5 of values up to 2."""
    sampler, way, key = SAMPLERS[name], Gaussian(), jax.random.key(0)
    if name == "sde":
        sampler = dataclasses.replace(sampler, last_time=0.06)
    objectives = {"velocity": interpolant.VelocityObjective(), "data": interpolant.DataObjective()}

    def end(predicts):
        segments = [(sampler.times(19), getattr(way, predicts))]
        noise_fn = lambda i: jax.random.normal(jax.random.fold_in(key, i), NOISE.shape)  # noqa: E731
        return sampler.integrate(segments, jnp.asarray(NOISE, jnp.float32), noise_fn, objectives[predicts])

    np.testing.assert_allclose(end("data"), end("velocity"), atol=1e-5)


def test_guidance_of_latents_is_guidance_of_the_velocity():
    """The same within rounding, 1e-5."""
    objective, labels, way = interpolant.DataObjective(), jnp.array([1, 4, 2]), Gaussian()
    z, t = jnp.asarray(NOISE[:3], jnp.float32), jnp.array([0.02, 0.5, 1.0])

    def data(z, t, y):
        return way.data(z, t) + 0.1 * y[:, None]

    def velocity(z, t, y):
        return objective.velocity(data(z, t, y), z, t)

    guided = guidance.guide(data, labels, 10, 2.5, 1)(z, t)
    np.testing.assert_allclose(
        objective.velocity(guided, z, t), guidance.guide(velocity, labels, 10, 2.5, 1)(z, t), rtol=1e-5, atol=1e-5
    )


# ---- shifted times --------------------------------------------------------------------------------------------------


def test_times_are_shifted_as_published():
    """RAE's grid for DINOv2-B's 768 x 16 x 16 latents, of 5 points (1 is noise, as here); Stable Diffusion 3's shift of 3."""
    shift = math.sqrt(768 * 16 * 16 / 4096)
    expected = [1.0, 0.954096, 0.873868, 0.697831, 0.0]  # 6.9282 t / (1 + 5.9282 t)
    np.testing.assert_allclose(Sampling("euler", 4, time_shift=shift).method.times(4), expected, atol=1e-6)
    np.testing.assert_allclose(Sampling("dpmpp", 4, time_shift=3.0).method.times(4), [1, 0.9, 0.75, 0.5, 0])


def test_the_last_step_of_the_sde_starts_where_it_does_without_a_shift():
    times = Sampling("sde", 50, time_shift=2.0).method.times(50)
    unshifted = times / (2 - times)  # of which 2 t / (1 + t) is the shifted time
    np.testing.assert_allclose(unshifted[:-1], np.linspace(1, 0.04 / 1.96, 50), rtol=1e-12)
    assert times[0] == 1 and times[-2] == pytest.approx(0.04, abs=1e-12) and times[-1] == 0 and len(times) == 51


@pytest.mark.parametrize(
    ("settings", "sampler", "message"),
    [
        ({"time_shift": 2.0}, "ancestral", "time_shift=2.0 does not go with sampler 'ancestral'.*set it to 1"),
        ({"guidance_power": 2.0}, "sde", "guidance_power=2.0 and guidance_schedule='constant': only 'power_cosine' has"),
        ({"tolerance": 1e-4}, "heun", "tolerance=0.0001 does not go with sampler 'heun': it is of dopri5; set it to 0.001"),
    ],
)
def test_settings_of_other_samplers_are_refused(settings, sampler, message):
    with pytest.raises(ValueError, match=message):
        check_sampler(Sampling(sampler, **settings), SAMPLERS[sampler].objective())


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
    for objective, predicts in ((interpolant.VelocityObjective(), "a velocity"), (interpolant.DataObjective(), "latents")):
        allowed = "euler, heun, sde, dpmpp, dopri5"
        with pytest.raises(ValueError, match=f"sampler 'ancestral': the network predicts {predicts}; allowed: {allowed}$"):
            check_sampler(Sampling("ancestral"), objective)
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
