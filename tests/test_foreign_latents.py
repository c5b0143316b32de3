"""Runs on RAE's and VTP's latents: a SiT on frozen ones, a decoder trained beside it, and what is refused."""

import jax
import numpy as np
import pytest
import small

import repae_jax
from checkpoints_tools import convert, export
from configs import ldm, paper, repae, vae
from repae_jax import cache_latents, evaluate_tokenizer, train
from repae_jax.analyze_latents import encoding
from repae_jax.data.latents import CachedLatents
from repae_jax.job import build, frozen_weights
from repae_jax.models import rae
from repae_jax.sampling.load_model import load_vae

TINY = paper.get_config("rae-dit-xl,tiny").vae.to_dict()  # 4 x 4 latents of 16 x 16 pixels
# of joint training: the encoder stays as it is, and the terms that reach it alone are gone
DECODER = {"vae": TINY, "optim.vae.fixed": rae.FROZEN, "loss.vae.kl": 0.0}


VTP = paper.get_config("vtp-dit-xl,tiny").vae.to_dict()


def config(file=ldm, changes=None):
    """The tiny preset on a random RAE; of a job that trains it, with its encoder fixed."""
    if file is not ldm:
        changes = {**DECODER, "data.image_size": 16, "loss.vae.align": 0.0, **(changes or {})}
        return small.config(changes if file is repae else {k: x for k, x in changes.items() if k != "loss.vae.align"}, file)
    result = paper.get_config("rae-dit-xl,tiny")
    result.unlock().update_from_flattened_dict(changes or {})
    return result


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "messages"),
    [
        (repae, {"optim.vae.fixed": ()}, ["config.vae.family='rae'", "config.optim.vae.fixed=() lacks encoder, "]),
        (repae, {"optim.vae.fixed": ("encoder",)}, ["fixed=('encoder',) lacks encoder_positions, latent_norm"]),
        (repae, {"loss.vae.kl": 1e-6}, ["config.loss.vae.kl=1e-06 is not for config.vae.family", "set it to 0"]),
        (repae, {"loss.vae.align": 1.5}, ["config.loss.vae.align=1.5 is not for config.vae.family='rae'"]),
        (vae, {"loss.adaptive.gan": 1e4}, ["config.loss.adaptive.gan=10000.0 is not for config.vae.family='rae'"]),
        (vae, {"loss.vae.se": 1.0}, ["config.loss.vae.se=1.0 is not for config.vae.family='rae'"]),
        (repae, {"vae": VTP, "loss.vae.kl": 1e-6}, ["config.loss.vae.kl=1e-06 is not for config.vae.family='vtp'"]),
        (ldm, {"vae.family": "vq"}, ["config.vae.family='vq' is unknown; allowed: ['rae', 'vtp']"]),
        (ldm, {"vae.encoder_heads": 3}, ["config.vae.encoder_heads=3 does not divide latent_channels=4"]),
        (ldm, {"vae.decoder_hidden_size": 6}, ["config.vae.decoder_hidden_size=6 must be divisible by 4"]),
        (ldm, {"data.image_size": 18}, ["config.data.image_size=18 is not a multiple of the VAE's factor 4 (config.vae.patch"]),
        (ldm, {"data.image_size": (16, 24)}, ["config.vae.family='rae' has statistics", "config.data.image_size=(16, 24)"]),
    ],
)  # fmt: skip
def test_what_cannot_be(file, changes, messages):
    with pytest.raises(ValueError) as caught:
        build.build(config(file, changes), jax.devices()[:1])
    for message in messages:
        assert message in str(caught.value), str(caught.value)


def test_fields_of_another_family_are_unknown():
    changed = config()
    changed.vae.channels = 128
    with pytest.raises(ValueError, match=r"config.vae: unknown fields \['channels'\]"):
        build.build(changed)
    del changed.vae["family"], changed.vae["channels"]
    with pytest.raises(ValueError, match="config.vae: unknown fields .*'decoder_depth'"):
        build.build(changed)


def test_vtp_takes_images_that_are_no_squares():
    job = build.build(config(changes={"vae": VTP, "data.image_size": (16, 24)}), jax.devices()[:1])
    assert job.latent_shape == (4, 6, 4)
    image = jax.ShapeDtypeStruct((1, 16, 24, 3), np.float32)
    latents = jax.ShapeDtypeStruct((1, *job.latent_shape), np.float32)
    recon, posterior = jax.eval_shape(lambda *x: job.nets.vae.init_with_output(jax.random.key(0), *x)[0], image, latents)
    assert (recon.shape, posterior.mean.shape) == (image.shape, latents.shape)


@pytest.mark.parametrize(
    ("arg", "shift"),
    [
        ("vae=rae-dinov2-base", 48**0.5), ("vae=rae-dinov2-base,resolution=512", 192**0.5), ("vae=rae-dinov2-large", 8.0),
        ("vae=rae-dinov2-base,model=DiT-XL/1", 1.0), ("vae=rae-dinov2-base,model=MF-XL/1", 1.0), ("vae=vtp-large", 1.0),
        ("", 1.0),
    ],
)  # fmt: skip
def test_times_are_shifted_as_in_rae(arg, shift):
    """By sqrt(numbers of the latents / 4096), where the network learns a velocity."""
    described = ldm.get_config(arg)
    assert described.diffusion.time_shift == described.sampling.time_shift == pytest.approx(shift)


def test_configs_without_a_family_are_of_the_convolutional_vae():
    job = build.build(small.config(file=ldm), jax.devices()[:1])
    assert "family" not in job.config["vae"] and type(job.nets.vae).__name__ == "AutoencoderKL"


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on a frozen RAE with random weights, with samples."""
    folder = tmp_path_factory.mktemp("rae") / "run"
    state, finished = train.train(config(), folder)
    assert finished and state.vae is None and int(state.step) == 2
    return folder


@pytest.mark.integration
def test_a_run_samples_and_its_rae_is_used(run):
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["0000002.png"]
    model = repae_jax.load(str(run))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    latents = model.encode(images)
    assert latents.shape == (2, 4, 4, 4) and model.decode(latents).shape == images.shape
    np.testing.assert_array_equal(model.vae.encode(images, jax.random.key(0)), latents)  # nothing to sample
    assert model.sample([0, 1], seed=0, steps=2).shape == images.shape
    with pytest.raises(ValueError, match="32 x 32 pixels; this RAE is for 16 x 16"):
        model.encode(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.slow
def test_it_is_evaluated_as_a_tokenizer(run, tmp_path):
    options = "--num_images", "16", "--batch_size", "16", "--out", str(tmp_path / "rae.json")
    _, result = evaluate_tokenizer.run(evaluate_tokenizer.parse_args([str(run), *options]))
    assert 0 < result["metrics"]["psnr"] < 30 and result["protocol"]["image_size"] == 16


@pytest.mark.slow
def test_its_latents_are_analyzed_at_one_size(run):
    module = load_vae(run).module
    kept = [name for name in encoding.transforms(4) if encoding.takes(module, name)]
    assert kept == ["none", "turn 90°", "turn 180°", "turn 270°"]


@pytest.mark.integration
def test_a_run_on_vtp(tmp_path):
    changed = paper.get_config("vtp-dit-xl,tiny").unlock()
    changed.hooks.samples_every = 0
    state, finished = train.train(changed, tmp_path)
    assert finished and int(state.step) == 2 and state.vae is None


@pytest.mark.slow
def test_cached_latents_have_no_spread(tmp_path):
    cache_latents.cache_latents(config(), tmp_path / "cache", shard_size=2000)
    moments = CachedLatents(tmp_path / "cache")[0]["moments"]
    assert moments.shape == (4, 4, 8) and moments[..., :4].any() and not moments[..., 4:].any()


@pytest.mark.slow
def test_the_decoder_trains_beside_the_sit_and_the_encoder_stays(tmp_path):
    never = {"hooks.samples_every": 0, "hooks.reconstructions_every": 0}
    changed = config(repae, {**never, "steps": 1, "checkpoint.every": 1})
    job = build.build(changed, jax.devices())
    state, finished = train.train(changed, tmp_path)
    assert finished and int(state.step) == 1
    key = jax.random.split(jax.random.key(changed.seed), 3)[0]  # the first network's in `initial_state`
    before = jax.device_get(jax.jit(lambda key: frozen_weights.initial_vae(job, key))(key))
    after = jax.device_get(state.vae.params)
    for name in rae.FROZEN:
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    moved = small.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), after["decoder"], before["decoder"]))
    # a key's bias has no gradient: all keys moved alike change no softmax
    assert not [name for name, distance in moved.items() if distance == 0 and "key.bias" not in name]


@pytest.mark.slow
def test_vtp_trains_whole_beside_the_sit(tmp_path):
    """The alignment reaches its encoder through the SiT; there is no KL."""
    never = {"hooks.samples_every": 0, "hooks.reconstructions_every": 0}
    whole = {"vae": VTP, "optim.vae.fixed": (), "loss.vae.align": 1.5}
    changed = config(repae, {**never, **whole, "steps": 1, "checkpoint.every": 1})
    job = build.build(changed, jax.devices())
    state, finished = train.train(changed, tmp_path)
    key = jax.random.split(jax.random.key(changed.seed), 3)[0]
    before = jax.device_get(jax.jit(lambda key: frozen_weights.initial_vae(job, key))(key))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.vae.params), before)
    assert finished and not [name for name, far in small.leaves(moved).items() if far == 0 and "key.bias" not in name]


@pytest.mark.integration
def test_what_a_run_on_it_is_not_written_as(run, tmp_path):
    with pytest.raises(ValueError, match="config.vae.family='rae'; a pipeline is written for those of AutoencoderKL alone"):
        export.export(run, tmp_path / "pipeline")
    with pytest.raises(ValueError, match="of config.vae.family='rae', which the published code has not"):
        convert.convert(run, tmp_path / "published")
