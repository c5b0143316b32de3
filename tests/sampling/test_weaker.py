"""Guidance away from a weaker network or the model's own head: whole samples, with networks of a line, and with runs."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from repae_jax import sample
from repae_jax.api import Model
from repae_jax.diffusion.interpolant import MIN_TIME, DataObjective, VelocityObjective
from repae_jax.diffusion.samplers import Sampling
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import add_weaker, load_model, load_weaker
from repae_jax.sampling.stepwise import Stepper
from repae_jax.training import checkpoint

SHAPE, LABELS, NULL = (2, 2, 3), np.asarray([1, 4, 2], np.int32), 5
EULER = Sampling("euler", 6)
VELOCITY = VelocityObjective()


class Network:
    """Some function of everything that a SiT is given; its head at the tap gives what the class NULL does."""

    null_label, internal_head = NULL, True

    def clone(self, **_):
        return self

    def output(self, variables, z, t, labels):
        scale = variables["params"]["kernel"] * (1 + 0.1 * labels)[:, None, None, None]
        return jnp.sin(scale * z) + 0.3 * jnp.cos(t)[:, None, None, None]

    def apply(self, variables, z, t, labels, mutable=()):
        output = self.output(variables, z, t, labels), ()
        return (output, {"internal": {"output": self.null(variables, z, t)}}) if mutable else output

    def null(self, variables, z, t):
        return self.output(variables, z, t, jnp.full(len(z), NULL))


class Unconditional(Network):
    """The same without a class."""

    def output(self, variables, z, t, labels):
        return super().output(variables, z, t, jnp.full_like(labels, NULL))


class Predicting(Network):
    """The network that predicts latents, of the same velocity."""

    def output(self, variables, z, t, labels):
        return z - jnp.maximum(t, MIN_TIME)[:, None, None, None] * super().output(variables, z, t, labels)


class UnconditionalPredicting(Predicting, Unconditional):
    """The same without a class, that predicts latents."""


class Decoder:
    """Pixels that are latents, stretched to where they are told apart."""

    def clone(self, **_):
        return self

    def apply(self, variables, latents, method):
        return latents / 4


NETS = SimpleNamespace(sit=Network(), vae=Decoder())
STATS = ChannelStats(mean=jnp.asarray([0.1, 0.0, -0.2]), var=jnp.asarray([1.0, 2.0, 0.5]))
PARAMS = {"sit": {"kernel": jnp.float32(0.7)}, "vae": {}, "latent_stats": STATS, "weaker": {"kernel": jnp.float32(0.7)}}


def images(sampling, weaker=None, nets=NETS, objective=VELOCITY):
    run = generate.make_generate(nets, objective, SHAPE, sampling, weaker)
    return np.asarray(jax.jit(run)(PARAMS, LABELS, np.arange(3), jax.random.key(1))[0]).astype(int)


def alike(found, expected):
    """The same up to rounding, which may cross the border of a gray level."""
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("low, high, channels", [(0.0, 1.0, None), (0.3, 0.7, None), (0.0, 1.0, 2)])
def test_of_the_null_label_samples_are_those_of_classifier_free_guidance(low, high, channels):
    free = dataclasses.replace(EULER, guidance_scale=2.5, guidance_low=low, guidance_high=high, guidance_channels=channels)
    expected, plain = images(free), images(EULER)
    assert np.abs(expected - plain).max() > 3
    ends = {"weaker_low": low, "weaker_high": high, "guidance_channels": channels}
    alike(images(dataclasses.replace(EULER, autoguidance_scale=2.5, **ends), Unconditional()), expected)
    alike(images(dataclasses.replace(EULER, internal_scale=2.5, **ends)), expected)


def test_outside_its_interval_nothing_is_guided():
    none = dataclasses.replace(EULER, internal_scale=2.5, weaker_low=0.97, weaker_high=0.98)  # between two steps
    np.testing.assert_array_equal(images(none), images(EULER))


def test_two_kinds_with_intervals_of_their_own():
    """From noise: the weaker network's, both, the label's, by Euler's method written out."""
    both = dataclasses.replace(
        EULER, autoguidance_scale=2.0, weaker_low=0.4, guidance_scale=3.0, guidance_high=0.7, guidance_schedule="linear"
    )
    network, weaker, variables = Network(), Unconditional(), {"params": PARAMS["sit"]}
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(np.arange(3))
    z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 6), SHAPE))(keys)

    def stronger(z, t, y):
        strong, weak = (net.output(variables, z, t, y) for net in (network, weaker))
        return weak + 2.0 * (strong - weak) if t[0] >= 0.4 else strong

    times = np.linspace(1, 0, 7)
    for start, end in zip(times[:-1], times[1:]):
        t = jnp.full(3, start)
        v, v_null = stronger(z, t, LABELS), stronger(z, t, np.full(3, NULL))
        scale = 1 + 2 * 2 * (1 - start)
        z = z + (end - start) * (v_null + scale * (v - v_null) if start <= 0.7 else v)
    latents = z * jnp.sqrt(STATS.var) + STATS.mean
    expected = np.clip(np.asarray(latents / 4) * 127.5 + 128, 0, 255).astype(int)
    alike(images(both, weaker), expected)


@pytest.mark.parametrize("kind", ["autoguidance_scale", "internal_scale"])
def test_predicted_latents_are_guided_as_velocities_are(kind):
    """Both outputs are latents then, the head's too; the last step starts at 0.02, where its velocity is limited."""
    sampling = Sampling("euler", 50, guidance_scale=1.5, guidance_high=0.8, guidance_channels=2, **{kind: 2.0})
    weaker = UnconditionalPredicting() if kind == "autoguidance_scale" else None
    nets = SimpleNamespace(sit=Predicting(), vae=Decoder())
    found = images(sampling, weaker, nets, DataObjective())
    alike(found, images(sampling, weaker and Unconditional()))
    assert np.abs(found - images(Sampling("euler", 50), None, nets, DataObjective())).max() > 3


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "dpmpp", "dopri5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"internal_scale": 1.8, "weaker_low": 0.1},
        {"guidance_scale": 2.0, "guidance_schedule": "power_cosine", "guidance_power": 2.0},
        {
            "internal_scale": 1.8, "weaker_low": 0.3, "guidance_scale": 2.0, "guidance_schedule": "cosine",
            "guidance_high": 0.6, "time_shift": 1.5,
        },
    ],
    ids=["internal", "schedule", "both"],
)  # fmt: skip
def test_steps_one_by_one_make_the_same_images(sampler, settings):
    sampling = Sampling(sampler, 6, **settings)
    *_, last = Stepper(NETS, VELOCITY, SHAPE).steps(PARAMS, LABELS, jax.random.key(1), sampling)
    decoded = Stepper(NETS, VELOCITY, SHAPE).decode(PARAMS, last.z)
    alike(decoded.astype(int), images(sampling))


def test_a_weaker_network_is_not_for_steps_one_by_one():
    with pytest.raises(ValueError, match=r"autoguidance_scale=2.0, but autoguidance names no weaker network"):
        sampling = dataclasses.replace(EULER, autoguidance_scale=2.0)
        next(Stepper(NETS, VELOCITY, SHAPE).steps(PARAMS, LABELS, jax.random.key(1), sampling))


@pytest.mark.parametrize(
    ("settings", "weaker", "message"),
    [
        ({"autoguidance_scale": 2.0}, None, "autoguidance_scale=2.0, but autoguidance names no weaker network; name one"),
        ({}, Unconditional(), "autoguidance is given, but autoguidance_scale=1.0 is no guidance"),
    ],
)
def test_scales_and_networks_come_together(settings, weaker, message):
    with pytest.raises(ValueError, match=message):
        images(dataclasses.replace(EULER, **settings), weaker)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_schedule": "sine"}, "guidance_schedule='sine' is unknown; allowed: .*'power_cosine'"),
        ({"internal_scale": 0.5}, "internal_scale=0.5 must be at least 1"),
        ({"weaker_low": 0.8, "weaker_high": 0.2}, "weaker_low=0.8 and weaker_high=0.2 must be an interval, low first"),
        ({"internal_scale": 1.5, "autoguidance_scale": 2.0}, "autoguidance_scale=2.0 and internal_scale=1.5: guide away"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EULER, **settings)


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps with a head at the tap, as it is on disk; its weights are drawn."""
    return small.save_run(tmp_path_factory.mktemp("run"), small.config({"loss.sit.internal": 0.5}))


@pytest.fixture(scope="module")
def model(workdir):
    return load_model(workdir)


def weakened(model, seed=0, **changes):
    """The model with other weights."""
    draw = np.random.default_rng(seed)
    sit = jax.tree.map(lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32), model.params["sit"])
    return dataclasses.replace(model, params={**model.params, "sit": sit}, **changes)


def test_a_run_has_its_head_and_cannot_guide_itself(model, workdir):
    assert model.nets.sit.internal_head and "internal_layer" in model.params["sit"]
    message = rf"autoguidance={workdir}@2: its weights, of step 2, are the model's, of step 2, which guides nothing"
    with pytest.raises(ValueError, match=message):
        load_weaker(model, f"{workdir}@2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 9}, "its number of classes is 9, the model's 10"),
        ({"latent_shape": (8, 8, 4)}, r"its latent shape is \(8, 8, 4\), the model's \(4, 4, 4\)"),
        ({"objective": VelocityObjective("cosine")}, "its prediction is .*'cosine'.*, the model's .*'linear'"),
    ],
)
def test_networks_that_do_not_fit(model, changes, message):
    with pytest.raises(ValueError, match=f"autoguidance=other: {message}"):
        add_weaker(model, weakened(model, **changes), "other")


def test_latents_of_another_vae(model):
    other = weakened(model)
    other.params["vae"] = jax.tree.map(lambda leaf: leaf * 2, other.params["vae"])
    message = "its VAE is [0-9a-f]+, the model's [0-9a-f]+; take an earlier checkpoint of a run on a frozen VAE"
    with pytest.raises(ValueError, match=message):
        add_weaker(model, other, "other")


def test_weights_are_hashed_once(model, monkeypatch):
    """However often one model guides another, as in a notebook: network, VAE and statistics of both."""
    ours, other, hashed, fingerprint = dataclasses.replace(model), weakened(model), [], checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: hashed.append(tree) or fingerprint(tree))
    for _ in range(2):
        add_weaker(ours, other, "other")
        assert len(hashed) == 6


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["autoguidance_scale", "internal_scale"])
def test_eight_devices_draw_what_one_does(workdir, kind):
    sampling = dataclasses.replace(EULER, steps=2, guidance_scale=1.5, **{kind: 2.0})
    drawn = []
    for devices in (jax.devices(), jax.devices()[:1]):
        model = load_model(workdir, devices=devices)
        model = add_weaker(model, weakened(model), "other")
        ((_, found),) = sample.sample_batches(model, sampling, np.arange(8, dtype=np.int32), 8, seed=0)
        drawn.append(found.astype(int))
    alike(*drawn)


@pytest.mark.integration
def test_python_draws_what_the_command_does(workdir):
    model, labels = load_model(workdir, devices=jax.devices()[:1]), np.arange(4, dtype=np.int32)
    other, settings = weakened(model), {"sampler": "euler", "steps": 2, "autoguidance_scale": 2.0}
    sampling = dataclasses.replace(model.sampling, **settings)
    ((_, expected),) = sample.sample_batches(add_weaker(model, other, "other"), sampling, labels, 4, seed=0)
    found = Model(model).sample(labels, seed=0, autoguidance=Model(other), **settings)
    alike(found.astype(int), expected.astype(int))
    assert np.any(found != Model(model).sample(labels, seed=0, sampler="euler", steps=2))


def test_what_is_saved_names_the_weaker_network(model):
    with_weaker = add_weaker(model, weakened(model, step=1), "runs/other@1")
    found = sample.describe(dataclasses.replace(EULER, autoguidance_scale=2.0), with_weaker)
    assert found["autoguidance_scale"] == 2.0 and found["autoguidance"]["source"] == "runs/other@1"
    assert found["autoguidance"]["step"] == 1 and len(found["autoguidance"]["weights"]) == 16
    assert "autoguidance" not in sample.describe(EULER, with_weaker)  # a point of a sweep that is not guided
