import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from repae_jax.diffusion import ddpm, guidance
from repae_jax.diffusion.samplers import SAMPLERS

SHAPE = (4, 4, 3)
BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)
ancestral = SAMPLERS["ancestral"].integrate


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(z, t):
    """Any smooth function of z and t: eps near z, v a little beyond [-1, 1]."""
    shift = (jnp.asarray(t, jnp.float32) / 1000).reshape(-1, 1, 1, 1)
    return jnp.concatenate([0.9 * jnp.tanh(z + shift), 1.2 * jnp.sin(3 * z - shift)], axis=-1)


def start_of(z_t, eps, t):
    """Returns the z that `q_sample` with noise eps takes to z_t. Rounding grows to 157 times at t = 999."""
    bar = ALPHA_BAR[np.asarray(t)].reshape(-1, 1, 1, 1)
    return ((np.asarray(z_t) - np.sqrt(1 - bar) * np.asarray(eps)) / np.sqrt(bar)).astype(np.float32)


# ---- parity with diffusers --------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    published = module.DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, variance_type="learned_range",
        clip_sample=False, timestep_spacing="linspace",
    )  # fmt: skip
    # a cumulative product in float32: agrees, but is too coarse to check steps with
    np.testing.assert_allclose(published.alphas_cumprod, ALPHA_BAR, rtol=2e-5)
    published.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    return published


def nchw(x):
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 1).copy())


def test_noising_is_diffusers(scheduler, record_property):
    import torch

    t = np.arange(1000)
    z, noise = normals(0, len(t), *SHAPE), normals(1, len(t), *SHAPE)
    expected = scheduler.add_noise(nchw(z), nchw(noise), torch.from_numpy(t))
    actual = jax.jit(ddpm.q_sample)(z, noise, jnp.asarray(t))
    reference.check(actual, reference.nhwc(expected.numpy()), reference.NETWORK_RTOL, "q_sample", record_property)


@pytest.mark.integration
@pytest.mark.parametrize("num_steps", [2, 10, 250, 1000])
def test_sampling_is_diffusers(scheduler, num_steps, monkeypatch, record_property):
    """Whole chains, and some steps alone from the same state, with learned variances and respaced timesteps."""
    scheduler.set_timesteps(num_steps)
    times = ddpm.timesteps(num_steps)
    np.testing.assert_array_equal(times[:-1], scheduler.timesteps.numpy())
    noises = jnp.asarray(normals(3, num_steps, 2, *SHAPE))
    drawn = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: nchw(next(drawn)))

    start = normals(2, 2, *SHAPE)
    state, worst = nchw(start), 0.0
    for i, t in enumerate(scheduler.timesteps.tolist()):
        z = jnp.asarray(reference.nhwc(state.numpy()), jnp.float32)
        output = nchw(network(z, jnp.full((2,), t)))
        state = scheduler.step(output, t, state).prev_sample  # in float64
        if i % (num_steps // 10 + 1) == 0 or i == num_steps - 1:
            step = ancestral([(times[i : i + 2], network)], z, lambda _, i=i: noises[i])
            worst = max(worst, reference.relative_error(step, reference.nhwc(state.numpy())))
    record_property(f"step{num_steps}", worst)
    assert worst <= reference.NETWORK_RTOL
    actual = jax.jit(lambda z: ancestral([(times, network)], z, lambda i: noises[i]))(start)
    reference.check(actual, reference.nhwc(state.numpy()), reference.NETWORK_RTOL, f"chain{num_steps}", record_property)


# ---- parity with the formulas, in float64 -----------------------------------------------------------------------------


def test_respacing_is_the_published_running_sum():
    for num_steps in range(2, 1001):
        position, kept = 0.0, []
        for _ in range(num_steps):
            kept.append(round(position))
            position += 999 / (num_steps - 1)
        assert ddpm.timesteps(num_steps).tolist() == [*kept[::-1], ddpm.DATA], num_steps


def test_respaced_betas_are_those_between_kept_steps():
    times = ddpm.timesteps(250)
    kept = ALPHA_BAR[times[-2::-1]]  # ascending
    betas = 1 - kept / np.append(1.0, kept[:-1])
    alpha_bar = np.cumprod(1 - betas)
    posterior = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    steps = ddpm.step_coefficients(times[:-1], times[1:])
    np.testing.assert_allclose(steps.z_scale[::-1], 1 / np.sqrt(1 - betas), rtol=1e-6)
    np.testing.assert_allclose(steps.eps_scale[::-1], betas / np.sqrt((1 - betas) * (1 - alpha_bar)), rtol=1e-6)
    np.testing.assert_allclose(steps.log_low[-2::-1], np.log(posterior), rtol=1e-6)
    np.testing.assert_allclose((steps.log_low + steps.log_range)[-2::-1], np.log(betas[1:]), rtol=1e-6)


def terms_float64(output, z, noise, t):
    """Both losses of one sample at one t, by the means and variances of DDPM's posterior (its equations 6 and 7)."""
    output, z, noise = (np.asarray(x, np.float64) for x in (output, z, noise))
    eps, v = np.split(output, 2, axis=-1)
    before = ALPHA_BAR[t - 1] if t else 1.0
    z_t = np.sqrt(ALPHA_BAR[t]) * z + np.sqrt(1 - ALPHA_BAR[t]) * noise

    def posterior_mean(start):
        on_start = np.sqrt(before) * BETAS[t] / (1 - ALPHA_BAR[t])
        return on_start * start + np.sqrt(1 - BETAS[t]) * (1 - before) / (1 - ALPHA_BAR[t]) * z_t

    mean = posterior_mean((z_t - np.sqrt(1 - ALPHA_BAR[t]) * eps) / np.sqrt(ALPHA_BAR[t]))
    s = max(t, 1)  # the variance at 0 is replaced by the one at 1
    low = np.log(BETAS[s] * (1 - ALPHA_BAR[s - 1]) / (1 - ALPHA_BAR[s]))
    log_variance = (v + 1) / 2 * np.log(BETAS[t]) + (1 - v) / 2 * low
    squared = np.mean((eps - noise) ** 2)
    if t:
        ratio = np.exp(low - log_variance)
        kl = 0.5 * (log_variance - low - 1 + ratio + (posterior_mean(z) - mean) ** 2 / np.exp(log_variance))
        return squared, np.mean(kl) / np.log(2)

    def cdf(x):
        return (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    std = np.exp(log_variance / 2)
    upper, lower = cdf((z - mean + 1 / 255) / std), cdf((z - mean - 1 / 255) / std)
    mass = np.select([z < -0.999, z > 0.999], [upper, 1 - lower], upper - lower)
    return squared, -np.mean(np.log(np.maximum(mass, 1e-12))) / np.log(2)


@pytest.mark.parametrize("error", [0.01, 0.3, 3.0])
def test_losses_are_the_published_ones(error, record_property):
    """Timesteps are 0 to 999, networks near to and far from the noise; z is beyond 1, within, and at the bins' edges."""
    t = np.array([0, 0, 0, 1, 2, 5, 20, 100, 500, 900, 998, 999])
    z, noise = normals(4, len(t), *SHAPE), normals(5, len(t), *SHAPE)
    z[1] *= 0.3
    z[2] = np.linspace(-1.01, 1.01, z[2].size).reshape(SHAPE)
    output = np.concatenate([noise + error * normals(6, *noise.shape), normals(7, *noise.shape)], axis=-1)
    expected = np.array([terms_float64(*sample) for sample in zip(output, z, noise, t)]).T
    squared = jax.jit(ddpm.mean_squared_noise_error)(output, noise)
    bound = jax.jit(ddpm.variational_bound)(output, z, noise, jnp.asarray(t))
    assert squared.shape == bound.shape == (len(t),) and squared.dtype == bound.dtype == jnp.float32
    for name, actual, values in (("squared", squared, expected[0]), ("bound", bound, expected[1])):
        # of each sample, as sizes differ by orders of magnitude; 1e-3: the bound is added to squared errors near 1
        worst = np.max(np.abs(actual - values) / (values + 1e-3))
        record_property(f"{name}{error}", float(worst))
        assert worst <= reference.LOSS_RTOL, (name, actual, values)


def test_variance_gradient_is_that_of_the_formula():
    t = np.array([0, 1, 50, 700])
    z, noise, v = normals(8, 4, *SHAPE), normals(9, 4, *SHAPE), normals(10, 4, *SHAPE)
    eps = noise + 0.3 * normals(11, *noise.shape)

    def bound(output):
        return jnp.sum(ddpm.variational_bound(output, z, noise, jnp.asarray(t)))

    gradient = jax.grad(bound)(jnp.concatenate([eps, v], axis=-1))[..., 3:]
    h = 1e-5
    for i in range(4):
        for index in [(0, 0, 0), (1, 2, 1), (3, 3, 2)]:
            sides = []
            for sign in (1, -1):
                moved = v[i].astype(np.float64)
                moved[index] += sign * h
                sides.append(terms_float64(np.concatenate([eps[i], moved], axis=-1), z[i], noise[i], t[i])[1])
            expected = (sides[0] - sides[1]) / (2 * h)
            np.testing.assert_allclose(gradient[i][index], expected, rtol=1e-4, atol=1e-7)


# ---- properties -------------------------------------------------------------------------------------------------------


def test_the_bound_trains_the_variance_alone():
    t = jnp.array([0, 1, 500, 999])
    z, noise, output = normals(12, 4, *SHAPE), normals(13, 4, *SHAPE), normals(14, 4, 4, 4, 6)
    bound = jax.grad(lambda x: jnp.sum(ddpm.variational_bound(x, z, noise, t)))(output)
    assert not np.any(bound[..., :3]) and np.all(np.isfinite(bound)) and np.all(np.any(bound[..., 3:], axis=(1, 2, 3)))
    squared = jax.grad(lambda x: jnp.sum(ddpm.mean_squared_noise_error(x, noise)))(output)
    assert np.all(np.any(squared[..., :3], axis=(1, 2, 3))) and not np.any(squared[..., 3:])


def test_the_posteriors_own_mean_and_variance_cost_nothing():
    t = jnp.array([1, 10, 999])
    z, noise = normals(15, 3, *SHAPE), normals(16, 3, *SHAPE)
    exact = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)
    np.testing.assert_array_equal(ddpm.variational_bound(exact, z, noise, t), 0)
    wider = jnp.concatenate([noise, jnp.ones_like(noise)], axis=-1)
    assert np.all(ddpm.variational_bound(wider, z, noise, t)[:2] > 1e-4)


def test_extreme_outputs_stay_finite():
    z, noise, t = normals(17, 4, *SHAPE), normals(18, 4, *SHAPE), jnp.array([0, 1, 500, 999])
    for size in (0.0, 1e3):
        signs = jnp.sign(normals(19, 4, 4, 4, 6))
        output = signs * jnp.array([size] * 3 + [5.0] * 3)  # v is an exponent: 5 is far out of its range already
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(ddpm.variational_bound(x, z, noise, t)))(output)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_right_noise_gives_the_start(record_property):
    t = jnp.array([0, 3, 400, 999])
    z, noise = normals(20, 4, *SHAPE), normals(21, 4, *SHAPE)
    start = start_of(ddpm.q_sample(z, noise, t), noise, t)
    reference.check(start, z, reference.NETWORK_RTOL, "start_of", record_property)


@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_a_perfect_network_ends_at_its_data(num_steps):
    z = jnp.asarray(normals(22, 2, *SHAPE))

    def perfect(z_t, t):
        bar = jnp.asarray(ALPHA_BAR, jnp.float32)[t].reshape(-1, 1, 1, 1)
        return jnp.concatenate([(z_t - jnp.sqrt(bar) * z) / jnp.sqrt(1 - bar), jnp.zeros_like(z)], axis=-1)

    key = jax.random.key(0)
    end = ancestral(
        [(ddpm.timesteps(num_steps), perfect)],
        jnp.asarray(normals(23, 2, *SHAPE)),
        lambda i: jax.random.normal(jax.random.fold_in(key, i), z.shape),
    )
    assert reference.relative_error(end, z) < 1e-4


@pytest.mark.integration
def test_samples_have_the_datas_variance():
    """Data N(0, 0.25): the best network is linear in z_t, and 250 steps reproduce the spread, posterior variances or betas."""
    shape = (512, 2, 2, 4)
    key = jax.random.key(1)
    for v in (-1.0, 1.0):

        def best(z_t, t, v=v):
            bar = jnp.asarray(ALPHA_BAR, jnp.float32)[t].reshape(-1, 1, 1, 1)
            eps = jnp.sqrt(1 - bar) / (0.25 * bar + 1 - bar) * z_t
            return jnp.concatenate([eps, jnp.full_like(z_t, v)], axis=-1)

        def noise_fn(i):
            return jax.random.normal(jax.random.fold_in(key, i), shape)

        end = ancestral([(ddpm.timesteps(250), best)], noise_fn(1000), noise_fn)
        assert abs(np.std(end) - 0.5) < 0.02 and abs(np.mean(end)) < 0.02


def test_only_the_last_step_is_deterministic():
    z = jnp.asarray(normals(24, 2, *SHAPE))
    for times, is_random in ((np.array([4, 0]), True), (np.array([0, ddpm.DATA]), False), (np.array([9, ddpm.DATA]), False)):
        ends = [ancestral([(times, network)], z, lambda i, s=scale: jnp.full_like(z, s)) for scale in (0.0, 100.0)]
        assert np.any(ends[0] != ends[1]) == is_random
    start = start_of(z, network(z, jnp.zeros(2, int))[..., :3], jnp.zeros(2, int))
    end = ancestral([(np.array([0, ddpm.DATA]), network)], z, jnp.zeros_like)
    assert reference.relative_error(end, start) < 1e-6


def test_one_program_for_all_steps_and_original_timesteps():
    traced, seen = [], []

    def counted(z, t):
        traced.append((t.shape, t.dtype))
        jax.debug.callback(lambda t: seen.append(np.asarray(t).tolist()), t, ordered=True)
        return network(z, t)

    z = jnp.asarray(normals(25, 2, *SHAPE))
    jax.block_until_ready(jax.jit(lambda z: ancestral([(ddpm.timesteps(7), counted)], z, lambda i: 0 * z))(z))
    jax.effects_barrier()
    assert traced == [((2,), jnp.int32)]
    assert seen == [[t, t] for t in ddpm.timesteps(7)[:-1]]


def test_segments_join_to_the_whole_chain():
    """Guidance in part of the chain splits it; steps keep their noise."""
    noises, z = jnp.asarray(normals(26, 20, 2, *SHAPE)), jnp.asarray(normals(27, 2, *SHAPE))
    times = ddpm.timesteps(20)
    parts = guidance.segments(times, (300, 700), network, network)
    assert len(parts) == 3
    whole = ancestral([(times, network)], z, lambda i: noises[i])
    np.testing.assert_allclose(ancestral(parts, z, lambda i: noises[i]), whole, rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(2), 3)

    def run(keys):
        def noise_fn(i):
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), SHAPE))(keys)

        return ancestral([(ddpm.timesteps(10), network)], noise_fn(10), noise_fn)

    np.testing.assert_allclose(run(keys)[1:2], run(keys[1:2]), rtol=1e-6, atol=1e-6)


def test_training_timesteps_are_uniform_integers():
    t = np.asarray(ddpm.sample_time(jax.random.key(3), 200_000))
    assert t.dtype == np.int32 and t.shape == (200_000,) and t.min() == 0 and t.max() == 999
    counts = np.bincount(t // 100)
    assert len(counts) == 10 and np.all(np.abs(counts - 20_000) < 700)
    np.testing.assert_array_equal(t[:5], np.asarray(ddpm.sample_time(jax.random.key(3), 200_000))[:5])


def test_timesteps_above_the_table_are_not_silently_clamped():
    z = jnp.ones((1, 2, 2, 1))
    assert np.all(np.isnan(ddpm.q_sample(z, z, jnp.array([1000]))))
    assert np.all(np.isnan(ddpm.variational_bound(jnp.ones((1, 2, 2, 2)), z, z, jnp.array([1000]))))


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 1001])
def test_refused_numbers_of_steps(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} .*allowed: 2\.\.1000"):
        ddpm.timesteps(num_steps)


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 4, 4, 7), (2, 4, 2, 6)])
def test_refused_outputs(shape):
    z, t, output = jnp.ones((2, 4, 4, 3)), jnp.zeros(2, int), jnp.ones(shape)
    for call in (
        lambda: ddpm.mean_squared_noise_error(output, z),
        lambda: ddpm.variational_bound(output, z, z, t),
        lambda: ancestral([(ddpm.timesteps(2), lambda z, t: output)], z, lambda i: z),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(shape) in str(caught.value) and "allowed: (2, 4, 4, 6)" in str(caught.value)
