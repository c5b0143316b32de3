"""Averages of the weights: what training keeps, and what is made of it afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from checkpoints_tools import runs
from configs import ldm
from repae_jax.job import build, frozen_weights, initial_state
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling.load_model import load_model
from repae_jax.training import averages, checkpoint
from repae_jax.training.averages import Profile
from repae_jax.training.checkpoint import Checkpointer
from repae_jax.training.recipe import Optimizers, Recipe
from repae_jax.training.state import Ema, create_net, create_state, finish_step

DECAYS, SIGMAS = (0.5, 0.9), (0.05, 0.1)
NAMES = ("decay_0_5", "decay_0_9", "sigma_0_05", "sigma_0_1")


# ---- while training -------------------------------------------------------------------------------------------------


class Walk:
    """An optimizer whose update is the gradient itself, so that a test chooses where the parameters go."""

    def init(self, params):
        return ()

    def update(self, grads, state, params):
        return grads, state


def walked(start):
    """(parameters after each of 60 steps, float64 [61, 5], the states after each), where `start` steps were taken before."""
    moves = np.float32(np.random.default_rng(0).standard_normal((60, 5)))
    tx = Optimizers(vae=None, sit=Walk(), disc=None)
    stats = ChannelStats(mean=jnp.zeros(2), var=jnp.ones(2))
    recipe = Recipe({}, {}, ema_decay=0.7, averages=averages.weights_of_new((0.7, *DECAYS), SIGMAS))
    state = create_state(
        vae=None, disc=None, sit=create_net({"w": jnp.ones(5)}, Walk()), latent_stats=stats, averages=recipe.averages
    )
    state = state.replace(step=jnp.int32(start))
    step = jax.jit(lambda state, move: finish_step(state, {"sit": {"w": move}}, {}, tx=tx, recipe=recipe)[0])
    states = [state, *(state := step(state, move) for move in moves)]
    return np.stack([np.float64(state.sit.params["w"]) for state in states]), states


@pytest.fixture(scope="module")
def trajectory():
    """What `walked` returns for a run from the first step on."""
    return walked(0)


@pytest.fixture(scope="module")
def continued():
    """The same for a run that continues a checkpoint of 40 steps, which are in both with its weights and without a state."""
    after, states = walked(40)
    return np.concatenate([np.repeat(after[:1], 40, axis=0), after]), [None] * 40 + states


def profile(sigma, steps):
    """Weights of the parameters after steps 1..steps in a power function's average, by its recursion in float64."""
    weights, power = np.zeros(steps), averages.exponent(sigma)
    for step in range(1, steps + 1):
        beta = (1 - 1 / step) ** (power + 1)
        weights *= beta
        weights[step - 1] = 1 - beta
    return weights


def test_averages_of_several_decays_and_widths(trajectory):
    """Against the sums that define them, in float64."""
    after, states = trajectory
    assert set(states[-1].averages) == {"decay_0_7", *NAMES}
    for decay in DECAYS:
        weights = (1 - decay) * decay ** np.arange(60)[::-1]
        expected = decay**60 * after[0] + weights @ after[1:]
        kept = states[-1].averages[averages.name_of("decay", decay)].params["w"]
        np.testing.assert_allclose(kept, expected, atol=5e-6)
    for sigma in SIGMAS:
        for step in (1, 7, 60):
            kept = states[step].averages[averages.name_of("sigma", sigma)].params["w"]
            np.testing.assert_allclose(kept, profile(sigma, step) @ after[1 : step + 1], atol=5e-6)


def test_averages_of_a_checkpoint_that_is_continued(continued):
    """As if its average had been the weights after each of its steps; these weigh (40 / step)^(exponent + 1) in the end."""
    after, states = continued
    for sigma in SIGMAS:
        for step in (41, 60, 100):
            weights = profile(sigma, step)
            kept = states[step].averages[averages.name_of("sigma", sigma)].params["w"]
            np.testing.assert_allclose(kept, weights @ after[1 : step + 1], atol=5e-6)
            assert weights[:40].sum() == pytest.approx((40 / step) ** (averages.exponent(sigma) + 1), rel=1e-6)


def test_an_average_of_the_same_decay_is_the_one_that_sampling_uses(trajectory):
    last = trajectory[1][-1]
    np.testing.assert_allclose(last.averages["decay_0_7"].params["w"], last.ema.params["w"], atol=2e-6)
    assert small.differing(last.averages["decay_0_7"].latent_stats, last.ema.latent_stats) == []


def test_weights_late_in_a_training():
    """At the four-millionth step float32 would leave two digits of 1 - (1 - 1 / step)^(exponent + 1)."""
    step, power = 4_000_000, averages.exponent(0.05)
    weight = averages.weights_of_new((), (0.05,))["sigma_0_05"](jnp.int32(step))
    np.testing.assert_allclose(weight, -np.expm1((power + 1) * np.log1p(-1 / step)), rtol=1e-5)


# ---- afterwards -----------------------------------------------------------------------------------------------------


def test_exponents_of_widths():
    """Values of the published code, whose widths 0.05 and 0.1 have exponents 16.97 and 6.94; and the width of an exponent."""
    published = {0.05: 16.9721986, 0.1: 6.93720394, 0.2: 1.82621378}
    np.testing.assert_allclose([averages.exponent(sigma) for sigma in published], list(published.values()), rtol=1e-8)
    weights, steps = profile(0.1, 4000), np.arange(1, 4001)
    mean = weights @ steps
    assert np.sqrt(weights @ (steps - mean) ** 2) / 4000 == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("sigma", "published"),
    [
        (0.075, [1.412980877e-06, -2.525834788e-05, 0.003334672113, -0.02007419694, 0.3437542971, 0.6730090731]),
        (0.15, [-0.002154208542, 0.007451368503, -0.05039408389, 0.1457256597, -0.3045562842, 1.203927548]),
    ],
)
def test_published_coefficients(sigma, published):
    """solve_posthoc_coefficients of NVlabs/edm2 for averages of 0.05 and 0.1 at 100, 200 and 300 steps."""
    kept = [Profile(step, one) for step in (100, 200, 300) for one in SIGMAS]
    found, misfit = averages.coefficients(kept, Profile(300, sigma))
    np.testing.assert_allclose(found, published, rtol=1e-6, atol=1e-12)
    assert 0 < misfit < 0.2


def test_a_width_that_was_not_kept(trajectory):
    """From every tenth step's averages: as the average that training would have kept, to 2 % of the way that it has gone."""
    after, states = trajectory
    kept = [Profile(step, sigma) for step in range(10, 61, 10) for sigma in SIGMAS]
    arrays = [np.float64(states[step].averages[averages.name_of("sigma", sigma)].params["w"]) for step, sigma in kept]
    for sigma in (0.06, 0.08, 0.12):
        factors, misfit = averages.coefficients(kept, Profile(60, sigma))
        direct = profile(sigma, 60) @ after[1:]
        error = np.abs(factors @ np.stack(arrays) - direct).max()
        assert error < 0.02 * np.abs(after - direct).max() and misfit < 0.15
    factors, misfit = averages.coefficients(kept, Profile(60, 0.1))  # a kept one is itself
    np.testing.assert_allclose(factors, [0] * 11 + [1], atol=1e-6)


def test_a_width_that_was_not_kept_of_a_checkpoint_that_is_continued(continued):
    """From checkpoints of the run itself alone, to 2 % of the way that it has gone."""
    after, states = continued
    kept = [Profile(step, sigma) for step in range(50, 101, 10) for sigma in SIGMAS]
    arrays = [np.float64(states[step].averages[averages.name_of("sigma", sigma)].params["w"]) for step, sigma in kept]
    for sigma in (0.06, 0.08, 0.12):
        factors, _ = averages.coefficients(kept, Profile(100, sigma))
        direct = profile(sigma, 100) @ after[1:]
        assert np.abs(factors @ np.stack(arrays) - direct).max() < 0.02 * np.abs(after - direct).max()


@pytest.mark.parametrize("choice", ["", "one", "1.0", "-0.1", "sigma=0", "sigma=0.3", "sigma=", "0.5,0.9", "nan"])
def test_choices_that_are_none(choice):
    with pytest.raises(ValueError, match=r"expected a decay in \[0, 1\), such as 0.999, or sigma=S with S .* below 0.289"):
        averages.parse(choice)


# ---- runs -----------------------------------------------------------------------------------------------------------

CHANGES = {**small.SIT_ALONE, "ema_decays": DECAYS, "ema_sigmas": SIGMAS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with checkpoints of two steps, states by step), its averages all drawn, each in another way."""
    workdir = tmp_path_factory.mktemp("averages") / "run"
    job = build.build(build.plain_config(small.config(CHANGES, ldm)), jax.devices())
    states, state = {}, small.random_state(job)
    frozen = checkpoint.fingerprint(frozen_weights.load_frozen_vae(job))
    with Checkpointer(workdir) as checkpointer:
        for step in (10, 20):
            drawn = {name: drawn_like(state.ema, step + number) for number, name in enumerate(NAMES)}
            states[step] = state.replace(averages=jax.device_put(drawn, jax.tree.map(lambda leaf: leaf.sharding, drawn)))
            checkpointer.save(step, states[step], {"loader": {}, "inputs": {"frozen_vae": frozen}}, job.config)
    return workdir, states


def drawn_like(ema, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(rng.random(leaf.shape)), leaf.sharding), ema)


def without_projectors(params):
    return {name: part for name, part in params.items() if not name.startswith("projectors_")}


@pytest.mark.integration
@pytest.mark.parametrize(("choice", "name"), [("0.9", "decay_0_9"), ("sigma=0.05", "sigma_0_05"), (None, None), ("0.99", None)])
def test_a_kept_average_is_chosen(run, choice, name):
    workdir, states = run
    expected = states[20].ema if name is None else states[20].averages[name]
    model = load_model(workdir, ema=choice)
    assert small.differing(model.params["sit"], without_projectors(expected.params)) == []
    assert small.differing(model.params["latent_stats"], expected.latent_stats) == []
    assert model.ema_decay == (0.99 if name is None else choice if "=" in choice else float(choice))
    opened = runs.open_run(workdir, ema=choice)
    assert small.differing(opened.read("ema.params"), expected.params) == []


@pytest.mark.integration
def test_a_reconstructed_average_is_chosen(run, warnings):
    workdir, states = run
    kept = [Profile(step, sigma) for step in (10, 20) for sigma in SIGMAS]
    factors, _ = averages.coefficients(kept, Profile(20, 0.075))
    parts = [states[step].averages[averages.name_of("sigma", sigma)] for step, sigma in kept]
    expected = jax.tree.map(lambda *leaves: sum(f * np.float64(leaf) for f, leaf in zip(factors, leaves)), *parts)
    model = load_model(workdir, ema="sigma=0.075")
    assert small.largest_error(model.params["sit"], without_projectors(expected.params)) < 1e-6
    assert model.ema_decay == "sigma=0.075"
    assert any("from averages of sigma (0.05, 0.1) in 2 checkpoints" in message for message in warnings)
    alone, _ = averages.read(workdir, {"params": states[10].ema.params}, 10, "sigma=0.1")
    assert small.differing(alone["params"], states[10].averages["sigma_0_1"].params) == []


@pytest.mark.integration
def test_averages_that_a_run_has_not_kept(run, tmp_path):
    with pytest.raises(ValueError, match=r"ema=0.999: .* decay \[0.99, 0.5, 0.9\], and any sigma=S"):
        load_model(run[0], ema="0.999")
    other = small.save_run(tmp_path / "run", small.config({**small.SIT_ALONE}, ldm))
    with pytest.raises(ValueError, match=r"ema=sigma=0.1: .* decay \[0.99\], and no sigma=S, .*config.ema_sigmas is empty"):
        averages.read(other, {}, None, "sigma=0.1")


def test_a_checkpoint_of_before_there_were_further_averages(tmp_path):
    """Its state has no such name, and is restored."""
    state = create_state(
        vae=None, disc=None, sit=create_net({"w": jnp.ones(5)}, Walk()), latent_stats=ChannelStats(jnp.zeros(2), jnp.ones(2))
    )
    older = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "averages"}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, older, {}, {})
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(jax.eval_shape(lambda: state), {})
    assert restored.averages is None and small.differing(restored, state) == []


def test_names_are_of_numbers_not_of_how_they_are_written():
    """A whole number in a config is found again by --ema, which reads floats."""
    assert averages.name_of("decay", 0) == averages.name_of(*averages.parse("0")) == "decay_0_0"
    assert averages.name_of("decay", np.float64(0.999)) == averages.name_of(*averages.parse("0.9990")) == "decay_0_999"


def test_the_state_has_what_the_config_names():
    changes = {**small.SIT_ALONE, "ema_decays": (0.9995,), "ema_sigmas": SIGMAS}
    state = initial_state.abstract_state(build.build(small.config(changes, ldm), jax.devices()[:1]))
    assert set(state.averages) == {"decay_0_9995", "sigma_0_05", "sigma_0_1"}
    assert all(isinstance(average, Ema) for average in state.averages.values())
    assert initial_state.abstract_state(build.build(small.config(small.SIT_ALONE, ldm), jax.devices()[:1])).averages is None
