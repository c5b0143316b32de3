"""Sampling step by step beside the loop that `repae_jax.sample` compiles, with networks of a line or two."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.diffusion.ddpm import NoiseObjective
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.diffusion.mean_flow import MeanFlow, Span
from repae_jax.diffusion.samplers import SAMPLERS, Sampling
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling import generate
from repae_jax.sampling.stepwise import Stepper

SHAPE = (2, 2, 3)
OBJECTIVES = {"ancestral": NoiseObjective(), "meanflow": MeanFlow(kappa=0.0)}
LABELS = np.asarray([1, 4, 2], np.int32)


class Network:
    """Some function of everything that a SiT is given; `outputs` times as many channels."""

    null_label = 5

    def __init__(self, outputs):
        self.outputs = outputs

    def clone(self, **_):
        return self

    def apply(self, variables, z, t, labels):
        t = t.t + t.duration if isinstance(t, Span) else t
        scale = variables["params"]["kernel"] * (1 + 0.1 * labels)[:, None, None, None]
        output = jnp.sin(scale * z) + 0.3 * jnp.cos(t)[:, None, None, None]
        return jnp.concatenate([output] * self.outputs, axis=-1), ()


class Decoder:
    """Pixels that are latents, stretched to where they are told apart."""

    def clone(self, **_):
        return self

    def apply(self, variables, latents, method):
        return latents / 4


def model_of(sampler):
    objective = OBJECTIVES.get(sampler, VelocityObjective())
    outputs = 2 if sampler == "ancestral" else 1
    nets = SimpleNamespace(sit=Network(outputs), vae=Decoder())
    stats = ChannelStats(mean=jnp.asarray([0.1, 0.0, -0.2]), var=jnp.asarray([1.0, 2.0, 0.5]))
    return nets, objective, {"sit": {"kernel": jnp.float32(0.7)}, "vae": {}, "latent_stats": stats}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_steps_make_the_samplers_images(sampler, scale):
    nets, objective, params = model_of(sampler)
    sampling = Sampling(sampler, 6, guidance_scale=scale, guidance_low=0.2, guidance_high=0.7, guidance_channels=2)
    run = jax.jit(generate.make_generate(nets, objective, SHAPE, sampling))
    expected, _ = run(params, LABELS, np.arange(3), jax.random.key(1))
    stepper = Stepper(nets, objective, SHAPE)
    times, latents = zip(*stepper.steps(params, LABELS, jax.random.key(1), sampling))
    images = stepper.decode(params, latents[-1])
    assert images.std() > 10
    assert np.abs(images.astype(int) - np.asarray(expected)).max() <= 1
    assert len(times) == len(latents) == 7 and times[0] == 1 and times[-1] == 0 and np.all(np.diff(times) <= 0)


def test_one_program_serves_all_settings():
    nets, objective, params = model_of("heun")
    stepper = Stepper(nets, objective, SHAPE)
    for steps, scale, shift in ((3, 1.5, 1.0), (5, 4.0, 1.0), (8, 2.0, 3.0)):
        sampling = Sampling("heun", steps, guidance_scale=scale, time_shift=shift)
        assert len(list(stepper.steps(params, LABELS, jax.random.key(0), sampling))) == steps + 1
    assert stepper._step._cache_size() == 2  # the step, and the last one


def test_one_program_serves_all_tolerances():
    """Each of which makes other steps, the smallest the most exact."""
    nets, objective, params = model_of("dopri5")
    stepper = Stepper(nets, objective, SHAPE)
    ends = {}
    for tolerance in (0.3, 1e-3, 1e-5):
        sampling = Sampling("dopri5", 2, tolerance=tolerance)
        ends[tolerance] = np.asarray(list(stepper.steps(params, LABELS, jax.random.key(0), sampling))[-1].z)
    assert stepper._step._cache_size() == 1
    errors = [np.abs(ends[tolerance] - ends[1e-5]).max() for tolerance in (0.3, 1e-3)]
    assert errors[0] > errors[1] > 0
