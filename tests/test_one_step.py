"""MeanFlow in whole: its derivative through the SiT, its step, runs that continue, sampling, cost, and a toy that it learns.

Tolerances, relative to the largest entry: EXACT for two programs of the same float32 sums, DIFFERENCES for central differences
of a float32 network.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from command_line import call, error_of
from sgd_jobs import BATCH, KEY, sgd

import repae_jax
from configs import ldm, paper
from repae_jax import train
from repae_jax.cost import flops
from repae_jax.diffusion.mean_flow import MeanFlow, Span
from repae_jax.distributed import sharding
from repae_jax.job import build, frozen_weights, initial_state
from repae_jax.sampling.generate import make_generate
from repae_jax.sampling.load_model import load_model
from repae_jax.sampling.stepwise import Stepper
from repae_jax.training.recipe import Optimizers

pytestmark = pytest.mark.integration
EXACT, DIFFERENCES = 2e-5, 2e-2


def config(name="mean-flow", **changes):
    files = {"init.vae": "random", "init.latent_stats": ""}
    return small.config({**files, "optim.sit.warmup_steps": 0, **changes}, paper, f"{name},tiny")


def job_of(name="mean-flow", devices=1, **changes):
    job = build.build(config(name, **{"data.batch_size": BATCH, **changes}), jax.devices()[:devices])
    return dataclasses.replace(job, tx=Optimizers(None, sgd(), None))


def batch_of(job):
    size, rng = job.config["data"]["image_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    return sharding.put_batch(job.mesh, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10})


def one_step(job):
    """(state before, state after, metrics)."""
    state, frozen = small.random_state(job), frozen_weights.load_frozen(job)
    shardings = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(job.mesh)
    step = jax.jit(sharding.with_mesh_context(job.mesh, job.step), out_shardings=shardings)
    new, metrics = step(state, batch_of(job), frozen, KEY)
    assert new.skipped == 0 and all(np.isfinite(value) for value in metrics.values())
    return state, jax.device_get(new), {name: float(value) for name, value in metrics.items()}


# ---- the network ----------------------------------------------------------------------------------------------------


def velocity_and_rate(job, params, **options):
    """The tiny SiT's output and its derivative along (v, 1, 1), and the gradient of the loss of both."""
    sit, rng = job.nets.sit.clone(**options), np.random.default_rng(1)
    z, v = (rng.standard_normal((4, *job.latent_shape)).astype(np.float32) for _ in range(2))
    t, d, labels = jnp.array([0.9, 0.5, 0.7, 1.0]), jnp.array([0.4, 0.0, 0.7, 1.0]), jnp.arange(4)

    def network(z, t, d, params=params):
        return sit.apply({"params": params}, z, Span(t, d), labels)[0]

    def loss(params):
        times = Span(t, d)
        terms, _ = job.recipe.objective.terms(
            lambda *args: sit.apply({"params": params}, *args), z, v, times, labels, sit.null_label
        )
        return terms["mean_flow"]

    @jax.jit
    def run(params):
        ones = jnp.ones_like(t)
        u, rate = jax.jvp(functools.partial(network, params=params), (z, t, d), (v, ones, ones))
        return u, rate, jax.grad(loss)(params)

    step = 1e-2
    ahead, behind = (jax.jit(network)(z + s * v, t + s, d + s) for s in (step, -step))
    return run(params), (ahead - behind) / (2 * step)


def test_the_derivative_goes_through_scanned_and_recomputed_blocks():
    job = job_of()
    params = small.random_state(job).sit.params
    (u, rate, gradients), differences = velocity_and_rate(job, params, remat="none", unroll=2)
    assert np.abs(rate).max() > 0.1
    np.testing.assert_allclose(rate, differences, atol=DIFFERENCES * np.abs(rate).max())
    for remat in ("full", "dots"):
        (same_u, same_rate, same_gradients), _ = velocity_and_rate(job, params, remat=remat, unroll=1)
        assert small.largest_error((same_u, same_rate, same_gradients), (u, rate, gradients)) < EXACT, remat


def test_only_networks_that_are_asked_to_have_further_embedders():
    def embedders(job):
        shapes = jax.eval_shape(functools.partial(initial_state.initial_state, job), KEY).sit.params
        return [name for name in shapes if "embedder" in name]

    plain = build.build(small.config(small.SIT_ALONE, ldm), jax.devices()[:1])
    assert embedders(plain) == ["t_embedder", "x_embedder", "y_embedder"]
    assert embedders(job_of()) == ["condition_embedders_0", *embedders(plain)]
    assert embedders(job_of("improved-mean-flow")) == ["condition_embedders_0", "condition_embedders_1", *embedders(plain)]


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped():
    return one_step(job_of())


def test_a_step_moves_sit_and_its_average_alone(stepped):
    state, new, metrics = stepped
    assert {name.split(".")[0] for name in small.differing(new, state)} == {"sit", "ema", "step"}
    assert {name for name in metrics if name.startswith("sit/")} == {"sit/loss", "sit/mean_flow", "sit/velocity"}
    assert metrics["sit/loss"] == metrics["sit/mean_flow"] < 1 and metrics["sit/velocity"] > 0
    moved = {name.split(".")[2] for name in small.differing(new, state) if name.startswith("sit.params")}
    assert moved == set(state.sit.params) - {"pos_embed"}


@pytest.mark.slow
def test_eight_devices_equal_one(stepped, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    state, new, metrics = one_step(job_of(devices=8, **{"mesh.fsdp": 8}))
    assert small.differing(jax.device_get(state), stepped[0]) == []
    error = small.largest_error((new, metrics), stepped[1:])
    print(f"{error:.1e}")
    assert error < 1e-4


@pytest.mark.slow
def test_alignment_goes_with_it():
    changes = {
        "diffusion.mean_flow": dataclasses.asdict(MeanFlow(tangent="network", kappa=0.0)), "sampling.sampler": "meanflow",
        "diffusion.time_distribution": "lognormal", "sampling.steps": 1, "sampling.guidance_scale": 1.0,
        "loss.sit": {"mean_flow": 1.0, "align": 0.5}, "data.batch_size": BATCH,
    }  # fmt: skip
    job = build.build(small.config(changes, ldm), jax.devices()[:1])
    _, _, metrics = one_step(dataclasses.replace(job, tx=Optimizers(None, sgd(), None)))
    assert metrics["sit/align"] < 0.5
    np.testing.assert_allclose(metrics["sit/loss"], metrics["sit/mean_flow"] + 0.5 * metrics["sit/align"], rtol=1e-5)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of four steps whose network is told its guidance, with checkpoints of the second and the last."""
    workdir = tmp_path_factory.mktemp("mean-flow") / "run"
    changes = {"steps": 4, "checkpoint.every": 2, "checkpoint.keep_last": 2, "hooks.samples_every": 0}
    state, finished = train.train(config("improved-mean-flow", **changes), workdir)
    assert finished
    return workdir, state


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(run, tmp_path):
    changes = {"checkpoint.every": 2, "hooks.samples_every": 0}
    train.train(config("improved-mean-flow", steps=2, **changes), tmp_path / "run")
    state, _ = train.train(config("improved-mean-flow", steps=4, **changes), tmp_path / "run")
    assert small.differing(state, run[1]) == []


def test_a_run_is_sampled_in_a_step_or_more(run):
    model = repae_jax.load_model(run[0])
    labels = [0, 3, 9]
    one = model.sample(labels, seed=0)
    assert one.shape == (3, 8, 8, 3) and np.array_equal(one, model.sample(labels, seed=0, steps=1))
    assert not np.array_equal(one, model.sample(labels, seed=0, steps=2))
    assert model.features(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 16, 32)
    with pytest.raises(ValueError, match="sampler 'euler': the network predicts an average velocity; allowed: meanflow"):
        model.sample(labels, sampler="euler", steps=4)
    with pytest.raises(ValueError, match="guidance_scale=9 is above config.diffusion.mean_flow.largest_scale=8"):
        model.sample(labels, guidance_scale=9.0)


@pytest.mark.slow
def test_the_steps_of_the_page_are_those_of_samples(run):
    model, labels = load_model(run[0], devices=jax.devices()[:1]), np.array([1, 2], np.int32)
    sampling = dataclasses.replace(model.sampling, steps=2, guidance_scale=3.0)
    expected, _ = jax.jit(make_generate(model.nets, model.objective, model.latent_shape, sampling))(
        model.params, labels, np.arange(2), KEY
    )
    stepper = Stepper(model.nets, model.objective, model.latent_shape)
    *_, last = stepper.steps(model.params, labels, KEY, sampling)
    assert np.abs(stepper.decode(model.params, last.z).astype(int) - np.asarray(expected)).max() <= 1


def test_export_and_conversion_are_refused_in_a_line(tmp_path, monkeypatch, warnings, capsys):
    workdir = small.save_run(tmp_path / "run", config("improved-mean-flow"), jax.devices()[:1])
    for command in (("export", workdir, tmp_path / "hf"), ("convert", workdir, tmp_path / "published")):
        message = error_of(monkeypatch, *command)
        assert "a SiT of MeanFlow is given 3 numbers in the place of the time" in message and "\n" not in message
    assert not warnings and call("inspect", workdir) == 0
    assert "largest_scale: 8" in capsys.readouterr().out


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_derivative_costs_a_call_and_the_guidance_two(remat):
    """By hand: the derivative of a product with weights is a product, that of attention's two among activations is four."""
    job = job_of(**{"sit.remat": remat})
    sit, side, channels = job.nets.sit, job.latent_shape[0], job.latent_shape[-1]
    z, t = jnp.zeros((1, side, side, channels)), jnp.zeros((1,))
    args = z, Span(t, t), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(sit.init, KEY, *args)

    def total(function, *args):
        return sum(flops.count(function, *args).values())

    once = total(lambda *args: sit.apply(*args)[0], params, *args)
    trained = total(jax.grad(lambda *args: jnp.sum(jnp.square(sit.apply(*args)[0]))), params, *args)
    tokens = (side // sit.patch_size) ** 2
    attention = sit.depth * 2 * 2 * tokens**2 * sit.hidden_size  # q k and p v
    derivative = once + attention
    assert flops.of_step(job)["sit/SiT"] == pytest.approx(trained + derivative + 2 * once, rel=1e-6)
    plain = dataclasses.replace(job.recipe, objective=MeanFlow(kappa=0.0))
    assert flops.of_step(dataclasses.replace(job, recipe=plain))["sit/SiT"] == pytest.approx(trained + derivative, rel=1e-6)


# ---- a toy ----------------------------------------------------------------------------------------------------------

CORNERS = np.array([[1.5, 1.5], [1.5, -1.5], [-1.5, 1.5], [-1.5, -1.5]], np.float32)  # data: these, with deviation 0.05


def perceptron(params, z, times, labels):
    """Two hidden layers on two numbers and two times."""
    x = jnp.concatenate([z, times.t[:, None], times.duration[:, None]], axis=-1)
    for weights, bias in params[:-1]:
        x = jax.nn.silu(x @ weights + bias)
    return x @ params[-1][0] + params[-1][1], ()


def distances(points):
    """Mean distance of points to the nearest corner, and the share of the points at the corner that has the fewest."""
    away = np.linalg.norm(np.asarray(points)[:, None] - CORNERS, axis=-1)
    return away.min(axis=1).mean(), np.bincount(away.argmin(axis=1), minlength=4).min() / len(away)


@pytest.mark.parametrize("tangent", ["data", "network"])
def test_samples_in_one_step_get_better(tangent, optimized):
    """A step of Euler along the same network's velocity ends near the mean of the data, 2.1 from every corner.

    Squares are not weighed: so few numbers with the adaptive weight have their modes learned, in the place of their mean.
    """
    objective = MeanFlow(tangent=tangent, kappa=0.0, velocity_share=0.5, weight_power=0.0)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(4, 64), (64, 64), (64, 2)]
    params = [(jax.random.normal(key, size) / np.sqrt(size[0]), jnp.zeros(size[1])) for key, size in zip(keys, sizes)]
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, 2000))

    def loss(params, key):
        corner, noise, time, spread = jax.random.split(key, 4)
        z = jnp.asarray(CORNERS)[jax.random.randint(corner, (128,), 0, 4)] + 0.05 * jax.random.normal(spread, (128, 2))
        times, labels = objective.sample_time(time, 128), jnp.zeros(128, int)
        network = functools.partial(perceptron, params)
        return objective.terms(network, z, jax.random.normal(noise, z.shape), times, labels, 1)[0]["mean_flow"]

    @jax.jit
    def fit(params):
        def step(carry, key):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params, key), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), 2000))[0][0]

    def sample(params, duration):
        noise, ones = jax.random.normal(jax.random.key(2), (2000, 2)), jnp.ones(2000)
        return noise - perceptron(params, noise, objective.span(ones, duration * ones), None)[0]

    trained = fit(params)
    (before, _), (after, share), (euler, _) = (distances(sample(*at)) for at in ((params, 1.0), (trained, 1.0), (trained, 0.0)))
    print(f"{tangent}: {before:.2f} before, {after:.2f} after, {euler:.2f} along the velocity; fewest {share:.2f}")
    assert after < 0.5 * before and after < 0.4 * euler and share > 0.15
