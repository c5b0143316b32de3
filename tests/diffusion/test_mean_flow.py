"""MeanFlow's objective: derivatives in closed form, both papers' losses written anew in float64, times, and sampling.

The second implementation follows the public code's order of operations (Gsunshine/meanflow, Lyy-iiis/imeanflow), in numpy, with
differences in the place of derivatives. Tolerances are those of float32: 1e-5, relative, for what both compute alike; 1e-3 for
gradients, whose differences of float64 losses are exact to 1e-6.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.diffusion.guidance import scheduled_scale
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.diffusion.mean_flow import MeanFlow, Span
from repae_jax.diffusion.samplers import SAMPLERS, Sampling, check_sampler

NULL, CLASSES = 3, 3
IMPROVED = {"tangent": "network", "kappa": 0.0, "largest_scale": 8.0, "velocity_share": 0.5}
SHAPE = (6, 2, 2, 3)


def numbers(seed=0):
    """Latents, noise, times, strengths of guidance, labels of which one is dropped, and the toy network's parameters."""
    rng = np.random.default_rng(seed)
    t = np.array([0.9, 0.3, 0.8, 0.5, 0.95, 0.6])
    return SimpleNamespace(
        z=rng.standard_normal(SHAPE), noise=rng.standard_normal(SHAPE), t=t, duration=t * [0, 0.2, 0.9, 0.5, 1.0, 0],
        kappa=np.array([0.0, 0.5, 0.875, 0.3, 0.6, 0.1]), labels=np.array([0, 1, 2, NULL, 1, 0]),
        params={"w": rng.standard_normal((3, 3)), "times": rng.standard_normal((3, 3)), "y": rng.standard_normal((4, 3))},
    )  # fmt: skip


def toy(params, z_t, times, labels, tanh=np.tanh):
    """A network of all its inputs: tanh of a linear map."""
    kinds = zip(params["times"], times)
    bias = params["y"][labels][:, None, None] + sum(weights * value[:, None, None, None] for weights, value in kinds)
    return tanh(z_t @ params["w"] + bias)


def arrays(x, is_told=False):
    """Arguments of `terms` but for the network and the null label, in float32."""
    times = Span(jnp.float32(x.t), jnp.float32(x.duration), jnp.float32(x.kappa) if is_told else None)
    return jnp.float32(x.z), jnp.float32(x.noise), times, jnp.asarray(x.labels)


def ours(objective, x):
    """Returns (terms, gradients of the loss)."""

    def loss(params):
        def network(z_t, times, labels):
            kappa = jnp.zeros_like(times.t) if times.kappa is None else times.kappa
            return toy(params, z_t, times._replace(kappa=kappa), labels, jnp.tanh), ()

        terms, _ = objective.terms(network, *arrays(x, objective.is_told_guidance), NULL)
        return terms["mean_flow"], terms

    gradients, terms = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.float32, x.params))
    return terms, gradients


# ---- the same losses, in float64 ------------------------------------------------------------------------------------


def theirs_target(objective, x, u):
    """Returns (guided velocity g, tangent of z_t), as the public code of each paper has them."""
    t = x.t[:, None, None, None]
    z_t, v = (1 - t) * x.z + t * x.noise, x.noise - x.z
    zero, null = np.zeros_like(x.t), np.full_like(x.labels, NULL)
    dropped = (x.labels == NULL)[:, None, None, None]
    if objective.is_told_guidance:  # improved: v_g = v + (1 - 1 / w) (v_c - v_u); z_t moves by v_c
        w = (1 / (1 - x.kappa))[:, None, None, None]
        v_c, v_u = u(z_t, Span(x.t, zero, x.kappa), x.labels), u(z_t, Span(x.t, zero, zero), null)
        return z_t, np.where(dropped, v, v + (1 - 1 / w) * (v_c - v_u)), v_c
    inside = (t >= objective.guidance_low) & (t <= objective.guidance_high)
    omega, kappa = np.where(inside, objective.omega, 1.0), np.where(inside, objective.kappa, 0.0)
    v_uncond, v_cond = u(z_t, Span(x.t, zero, zero), null), u(z_t, Span(x.t, zero, zero), x.labels)
    v_g = np.where(dropped, v, omega * v + (1 - omega - kappa) * v_uncond + kappa * v_cond)
    return z_t, v_g, v_g


def theirs(objective, x):
    """Returns (loss, mean squared error, function of parameters -> loss with target and weights held fixed)."""

    def u(z_t, times, labels, params=x.params):
        return toy(params, z_t, times, labels)

    z_t, v_g, tangent = theirs_target(objective, x, u)
    kappa = x.kappa if objective.is_told_guidance else np.zeros_like(x.t)
    step = 1e-5
    # r stays, so that t - r grows with t
    later, earlier = (u(z_t + s * tangent, Span(x.t + s, x.duration + s, kappa), x.labels) for s in (step, -step))
    target = v_g - x.duration[:, None, None, None] * (later - earlier) / (2 * step)

    def squares(params):
        return ((u(z_t, Span(x.t, x.duration, kappa), x.labels, params) - target) ** 2).sum((1, 2, 3))

    weights = 1 / (squares(x.params) + objective.weight_constant) ** objective.weight_power

    def fixed(params):
        return (weights * squares(params)).mean()

    return fixed(x.params), squares(x.params).mean() / np.prod(SHAPE[1:]), fixed


CASES = {
    "no guidance": MeanFlow(kappa=0.0),
    "the code's default": MeanFlow(),
    "XL/2": MeanFlow(omega=0.2, kappa=0.92, guidance_high=0.75),
    "omega alone": MeanFlow(omega=2.0, kappa=0.0, guidance_low=0.4),
    "other weights": MeanFlow(weight_power=0.5, weight_constant=1.0),
    "improved": MeanFlow(**IMPROVED),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_published_one(name):
    objective, x = CASES[name], numbers()
    terms, gradients = ours(objective, x)
    expected, error, fixed = theirs(objective, x)
    np.testing.assert_allclose([terms["mean_flow"], terms["velocity"]], [expected, error], rtol=1e-5)
    for key, gradient in gradients.items():
        for index in ((0, 1), (2, 2), (1, 0)):
            step = np.zeros_like(x.params[key])
            step[index] = 1e-5
            up, down = (fixed({**x.params, key: x.params[key] + sign * step}) for sign in (1, -1))
            assert gradient[index] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5), (key, index)


def test_with_equal_times_it_is_the_velocitys_loss():
    x = numbers()
    x.duration = np.zeros_like(x.t)
    terms, _ = ours(MeanFlow(kappa=0.0, weight_power=0.0), x)
    t = x.t[:, None, None, None]
    output = toy(x.params, (1 - t) * x.z + t * x.noise, Span(x.t, 0 * x.t, 0 * x.t), x.labels)
    plain = VelocityObjective().losses(*(jnp.float32(a) for a in (output, x.z, x.noise, x.t)))["velocity"]
    np.testing.assert_allclose([terms["velocity"], terms["mean_flow"] / np.prod(SHAPE[1:])], [plain, plain], rtol=1e-5)


def test_a_dropped_label_is_not_guided():
    x = numbers()
    x.labels = np.full_like(x.labels, NULL)
    guided, plain = (ours(MeanFlow(omega=omega, kappa=kappa), x)[0] for omega, kappa in ((2.0, 0.5), (1.0, 0.0)))
    np.testing.assert_allclose(guided["mean_flow"], plain["mean_flow"], rtol=1e-6)


def test_the_projections_pass_through_with_their_gradient():
    x = numbers()
    z, noise, times, labels = arrays(x)

    def through(weight):
        _, (projected,) = MeanFlow(kappa=0.0).terms(lambda z_t, *_: (z_t, (weight * z_t,)), z, noise, times, labels, NULL)
        return jnp.sum(jnp.square(projected))

    value, gradient = jax.value_and_grad(through)(jnp.float32(1.0))
    t = x.t[:, None, None, None]
    expected = np.sum(((1 - t) * x.z + t * x.noise) ** 2)
    np.testing.assert_allclose([value, gradient], [expected, 2 * expected], rtol=1e-5)


# ---- closed forms ---------------------------------------------------------------------------------------------------


def test_the_derivative_along_the_way_in_closed_form():
    """u = z (1 + 2 t + 3 d) + 5 t d has du/dt = v (1 + 2 t + 3 d) + 5 z + 5 (d + t): t and d = t - r grow alike."""
    x = numbers()

    def network(z_t, times, labels):
        t, d = (value[:, None, None, None] for value in times[:2])
        return z_t * (1 + 2 * t + 3 * d) + 5 * t * d, ()

    terms, _ = MeanFlow(kappa=0.0, weight_power=0.0).terms(network, *arrays(x), NULL)
    t, d = x.t[:, None, None, None], x.duration[:, None, None, None]
    z_t, v = (1 - t) * x.z + t * x.noise, x.noise - x.z
    error = z_t * (1 + 2 * t + 3 * d) + 5 * t * d + d * (v * (1 + 2 * t + 3 * d) + 5 * z_t + 5 * (d + t)) - v
    np.testing.assert_allclose(terms["velocity"], np.mean(error**2), rtol=1e-5)


STD = 0.5  # of Gaussian data, for which everything is known: the flow scales z by the ratio of deviations


def deviation(t):
    return jnp.sqrt(t**2 + (1 - t) ** 2 * STD**2)


def rate(t):
    """d log(deviation) / dt."""
    return (t - (1 - t) * STD**2) / deviation(t) ** 2


def exact(z_t, times, labels=None):
    """The average velocity of the flow of Gaussian data, and at r = t the velocity."""
    t, d = (value.reshape(-1, *[1] * (z_t.ndim - 1)) for value in times[:2])
    safe = jnp.where(d > 0, d, 1.0)
    return z_t * jnp.where(d > 0, (1 - deviation(t - d) / deviation(t)) / safe, rate(t)), ()


def test_the_exact_average_velocity_meets_the_identity():
    """With it, u + (t - r) du/dt is the velocity, for r < t and r = t: what is left is the spread of the data around it."""
    x = numbers()
    objective = MeanFlow(kappa=0.0, weight_power=0.0, tangent="network")
    terms, _ = objective.terms(exact, *arrays(x), NULL)
    t = x.t[:, None, None, None]
    error = ((1 - t) * x.z + t * x.noise) * np.asarray(rate(t)) - (x.noise - x.z)
    np.testing.assert_allclose(terms["velocity"], np.mean(error**2), rtol=2e-5)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 1.0), (5, 1.0), (5, 0.4)])
def test_any_number_of_steps_ends_at_the_same_place(steps, shift):
    sampler, objective = Sampling("meanflow", steps, time_shift=shift).method, MeanFlow(kappa=0.0)
    z = jnp.float32(numbers().noise)
    segments = [(sampler.times(steps), lambda z_t, times: exact(z_t, times)[0])]
    np.testing.assert_allclose(sampler.integrate(segments, z, None, objective), z * STD, rtol=1e-5, atol=1e-6)
    velocity = [(SAMPLERS["euler"].times(steps), lambda z_t, t: exact(z_t, Span(t, jnp.zeros_like(t)))[0])]
    off = np.abs(SAMPLERS["euler"].integrate(velocity, z) - z * STD).max()
    assert off > 0.1 if steps == 1 else off > 0.01  # Euler's steps along the velocity do not


# ---- times ----------------------------------------------------------------------------------------------------------


def test_times_are_drawn_as_published():
    objective = MeanFlow(time_mean=-0.4, time_std=1.0, velocity_share=0.75)
    times = jax.jit(objective.sample_time, static_argnums=1)(jax.random.key(0), 40_000)
    t, d = np.asarray(times.t, np.float64), np.asarray(times.duration, np.float64)
    assert times.kappa is None and (d[:30_000] == 0).all() and (d[30_000:] > 0).all() and (t - d > 0).all() and (t < 1).all()
    logits = [np.log(x / (1 - x)) for x in (t[30_000:], (t - d)[30_000:])]
    both = np.concatenate(logits)
    assert both.mean() == pytest.approx(-0.4, abs=0.03) and both.std() == pytest.approx(1, abs=0.03)
    # the later of two normal draws is 1 / sqrt(pi) deviations above their mean
    assert logits[0].mean() == pytest.approx(-0.4 + 1 / np.sqrt(np.pi), abs=0.03)


def test_scales_are_drawn_with_a_density_of_one_over_the_scale():
    kappa = np.asarray(MeanFlow(**IMPROVED).sample_time(jax.random.key(1), 40_000).kappa, np.float64)
    shares = np.log(1 / (1 - kappa)) / np.log(8)
    assert kappa.min() >= 0 and kappa.max() <= 7 / 8
    np.testing.assert_allclose(np.histogram(shares, 10, (0, 1))[0] / 4000, 1, atol=0.06)


def test_times_of_the_network():
    t = jnp.array([0.2, 0.7])
    assert MeanFlow().to_times(t)._asdict().keys() == {"t", "duration", "kappa"} and MeanFlow().to_times(t).kappa is None
    told = MeanFlow(**IMPROVED).to_times(t)
    assert (told.duration == 0).all() and (told.kappa == 0).all()
    assert (MeanFlow().conditions, MeanFlow(**IMPROVED).conditions, VelocityObjective().conditions) == (1, 2, 0)


# ---- guidance in sampling -------------------------------------------------------------------------------------------


def test_a_network_that_is_told_the_scale_is_told_it_in_one_call():
    calls = []

    def output_fn(z_t, times, labels):
        calls.append((times, labels))
        return z_t

    labels = jnp.array([0, 1])
    objective = MeanFlow(**IMPROVED)
    objective.guide(output_fn, labels, NULL, 4.0, 3)(jnp.ones((2, 3)), objective.to_times(jnp.array([0.5, 0.5])))
    ((times, given),) = calls
    np.testing.assert_allclose(times.kappa, 0.75)
    assert given is labels


def test_a_network_without_guidance_is_guided_as_any_other():
    def output_fn(z_t, times, labels):
        return z_t * labels[:, None] + times.duration[:, None]

    z, labels, times = jnp.ones((2, 3)), jnp.array([1, 2]), Span(jnp.array([0.9, 0.9]), jnp.array([0.5, 0.3]))
    guided = MeanFlow(kappa=0.0).guide(output_fn, labels, NULL, 2.0, 3)(z, times)
    np.testing.assert_allclose(guided, 2 * output_fn(z, times, labels) - output_fn(z, times, jnp.full(2, NULL)), rtol=1e-6)
    growing = scheduled_scale("linear", 2.0, 4.0, 1.0)  # 1 + 2 (1 - t) at the time, 1.2 and 1.8
    guided = MeanFlow(kappa=0.0).guide(output_fn, labels, NULL, growing, 3)(z, times._replace(t=jnp.array([0.9, 0.6])))
    scale, null = jnp.array([[1.2], [1.8]]), output_fn(z, times, jnp.full(2, NULL))
    np.testing.assert_allclose(guided, null + scale * (output_fn(z, times, labels) - null), rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "objective", "message"),
    [
        (Sampling("sde"), MeanFlow(), "sampler 'sde': the network predicts an average velocity; allowed: meanflow$"),
        (Sampling("euler"), MeanFlow(), "sampler 'euler': the network predicts an average velocity; allowed: meanflow$"),
        (Sampling("meanflow", 1), VelocityObjective(), "sampler 'meanflow': the network predicts a velocity; allowed: euler,"),
        (Sampling("euler", 1), VelocityObjective(), "sampler 'euler': steps=1 must be at least 2"),
        (Sampling("meanflow", 1, 2.0), MeanFlow(), "guidance_scale=2: .*mean_flow.omega=1 and kappa=0.5.*use 1, or train with"),
        (Sampling("meanflow", 1, 9.0), MeanFlow(**IMPROVED), "guidance_scale=9 is above .*mean_flow.largest_scale=8"),
        (
            Sampling("meanflow", 1, 2.0, guidance_channels=3), MeanFlow(**IMPROVED),
            "guidance_channels=3: the network guides all of its channels",
        ),
        (
            Sampling("meanflow", 2, 2.0, guidance_schedule="linear"), MeanFlow(**IMPROVED),
            "guidance_schedule='linear' does not go with .*mean_flow.largest_scale=8, .*set it to 'constant'",
        ),
        (
            Sampling("meanflow", 2, autoguidance_scale=2.0), MeanFlow(kappa=0.0),
            "autoguidance_scale=2.0 does not go with sampler 'meanflow': .*set it to 1",
        ),
        (
            Sampling("meanflow", 2, internal_scale=2.0), MeanFlow(kappa=0.0),
            "internal_scale=2.0 does not go with sampler 'meanflow': .*set it to 1",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sampling, objective, message):
    with pytest.raises(ValueError, match=message):
        check_sampler(sampling, objective)


def test_what_fits_is_taken():
    check_sampler(Sampling("meanflow", 1), MeanFlow())
    check_sampler(Sampling("meanflow", 2, 8.0), MeanFlow(**IMPROVED))
    check_sampler(Sampling("meanflow", 1, 2.0, guidance_channels=3), MeanFlow(kappa=0.0))
    check_sampler(Sampling("meanflow", 4, 2.0, guidance_schedule="linear", time_shift=0.5), MeanFlow(kappa=0.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kappa": 1.0}, r"kappa=1.0 must lie in \[0, 1\)"),
        ({"tangent": "both"}, "tangent='both' is unknown; allowed"),
        ({"guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low=0.8 is above guidance_high=0.2"),
        ({"largest_scale": 8.0}, "largest_scale=8.0 draws the guidance, which kappa=0.5 fixes: .* or kappa to 0.0"),
        ({"largest_scale": 0.5}, "largest_scale=0.5 must be at least 1"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**fields)
