"""The Python interface, on a tiny run."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import repae_jax
from checkpoints_tools.convert import extract_vae
from checkpoints_tools.vit import save_encoder
from repae_jax import images as pixels
from repae_jax.models import encoders


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as it is on disk; its weights are random."""
    return small.save_run(tmp_path_factory.mktemp("run"), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def vae(workdir):
    return repae_jax.load_vae(workdir)


@pytest.fixture(scope="module")
def model(workdir):
    return repae_jax.load_model(workdir)


def draw_images(count=3, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.integration
def test_importing_the_package_imports_nothing_heavy():
    code = "import repae_jax, sys; repae_jax.__version__, dir(repae_jax); assert 'jax' not in sys.modules; repae_jax.load_vae"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_exists():
    assert all(getattr(repae_jax, name) for name in repae_jax.__all__) and set(repae_jax.__all__) <= {*dir(repae_jax)}
    with pytest.raises(AttributeError, match="'repae_jax' has no attribute 'load_images'"):
        repae_jax.load_images  # noqa: B018


def test_a_vae_encodes_and_decodes_as_its_network_does(vae):
    images = draw_images()
    posterior = vae.module.apply({"params": vae.params}, pixels.to_float(images), method="encode")
    latents = vae.encode(images)
    np.testing.assert_allclose(latents, posterior.mean, rtol=1e-5, atol=1e-5)
    decoded = vae.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    sampled = vae.encode(images, jax.random.key(0))
    assert jnp.std((sampled - latents) / posterior.std) == pytest.approx(1, abs=0.3)
    assert jnp.array_equal(sampled, vae.encode(images, jax.random.key(0)))


def test_normalized_latents_have_the_published_statistics(vae):
    latents = vae.encode(draw_images())
    z, stats = vae.normalize(latents), vae.latent_stats
    np.testing.assert_allclose(z, (latents - stats.mean) / np.sqrt(stats.var + 1e-4), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vae.denormalize(z), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.integration
def test_an_exported_vae_is_the_same(vae, workdir, tmp_path):
    extract_vae(workdir, tmp_path / "hf/")
    again = repae_jax.load_vae(tmp_path / "hf")
    assert jnp.array_equal(again.encode(draw_images()), vae.encode(draw_images()))
    stats = again.latent_stats
    np.testing.assert_allclose((stats.mean, stats.var), (vae.latent_stats.mean, vae.latent_stats.var), rtol=1e-6)


def test_samples_depend_on_seed_and_label_alone(model):
    samples = model.sample([0, 1, 2], seed=3, steps=2)
    assert samples.shape == (3, 8, 8, 3) and samples.dtype == np.uint8
    assert np.abs(model.sample([0, 1, 2], seed=3, steps=2, batch_size=2).astype(int) - samples).max() <= 1
    assert np.any(model.sample([0, 1, 2], seed=4, steps=2) != samples)
    assert (model.step, model.num_classes) == (2, 10)


def test_a_model_has_its_vae(model, vae):
    assert jnp.array_equal(model.vae.encode(draw_images()), vae.encode(draw_images()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": [10]}, ValueError, r"labels \[10\]: expected a list of whole numbers from 0 to 9"),
        ({"labels": []}, ValueError, "expected a list of whole numbers"),
        ({"labels": 3}, ValueError, "expected a list of whole numbers"),
        ({"labels": [1.7]}, ValueError, r"labels \[1.7\]: expected a list of whole numbers"),
        ({"labels": ["cat"]}, ValueError, r"labels \['cat'\]: expected a list of whole numbers"),
        ({"labels": [2**40]}, ValueError, "expected a list of whole numbers"),
        ({"labels": [0], "batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"labels": [0], "sampler": "ancestral"}, ValueError, "ancestral"),
        ({"labels": [0], "autoguidance_scale": 2.0}, ValueError, "autoguidance_scale=2.0, but autoguidance names no"),
        ({"labels": [0], "guidance_channels": 9}, ValueError, "guidance_channels=9: the latents have 4"),
        ({"labels": [0], "internal_scale": 2.0}, ValueError, "internal_scale=2.0: the model has no head at its tap"),
        ({"labels": [0], "precision": "float16"}, ValueError, "precision='float16' is unknown; allowed"),
        ({"labels": [0], "speed": 2}, TypeError, "speed"),
    ],
)
def test_wrong_samplings(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.sample(**arguments)


def test_pixels_must_be_uint8(vae):
    with pytest.raises(ValueError, match="allowed: uint8"):
        vae.encode(pixels.to_float(draw_images()))
    with pytest.raises(ValueError, match=r"images have the shape \(8, 8, 3\); allowed: uint8 \[B, H, W, 3\]"):
        vae.encode(draw_images()[0])
    with pytest.raises(ValueError, match=r"latents have the shape \(2, 4, 4, 3\); allowed: float32 \[B, h, w, 4\]"):
        vae.decode(np.zeros((2, 4, 4, 3), np.float32))


def test_one_line_loads_what_there_is(workdir, vae, model, tmp_path):
    loaded = repae_jax.load(workdir, device="cpu:1")
    images = draw_images()
    latents = loaded.encode(images)
    assert latents.devices() == {jax.devices()[1]}
    np.testing.assert_allclose(latents, vae.encode(images), rtol=1e-5, atol=1e-5)
    assert np.array_equal(loaded.decode(latents), vae.decode(np.asarray(latents)))
    assert np.array_equal(loaded.sample([0], steps=2), model.sample([0], steps=2))
    extract_vae(workdir, tmp_path / "vae")
    assert isinstance(repae_jax.load(tmp_path / "vae"), repae_jax.Vae)
    original = encoders.make_encoder({"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}, 8, image_size=8)
    params = original.module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    save_encoder(tmp_path / "encoder", original.module, jax.device_get(params))
    assert isinstance(repae_jax.load(tmp_path / "encoder"), repae_jax.Encoder)
    with pytest.raises(ValueError, match=r"vae is a VAE, no diffusion model: leave vae='x' out"):
        repae_jax.load(tmp_path / "vae", vae="x")
    with pytest.raises(ValueError, match="device 'cpu:99' is not on this machine; allowed: cpu, cpu:0"):
        repae_jax.load(workdir, device="cpu:99")
    with pytest.raises(ValueError, match=r"device 1: allowed: one of jax.devices\(\), or a name"):
        repae_jax.load(workdir, device=1)


def test_features_are_the_hidden_states_at_the_tap(model):
    images, loaded = draw_images(2), model.loaded
    z = model.vae.normalize(model.encode(images))
    for labels, t in (None, 0.0), ([3, 4], 0.5):
        noised = (1 - t) * z + t * jax.random.normal(jax.random.key(1), z.shape)
        given = jnp.asarray([10, 10] if labels is None else labels)
        arguments = {"params": loaded.params["sit"]}, noised, jnp.full(2, t), given
        expected = loaded.nets.sit.apply(*arguments, method="tap_tokens")
        np.testing.assert_allclose(model.features(images, labels, t=t, seed=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": draw_images(size=16)}, "images of 16x16 pixels: the model is for 8x8"),
        ({"images": draw_images(), "t": 2}, "t=2 is out of range; allowed: 0"),
        ({"images": draw_images(), "labels": [1]}, "1 labels for 3 images"),
        ({"images": draw_images(), "labels": [1, 2, 10]}, "expected a list of whole numbers from 0 to 9"),
    ],
)
def test_wrong_features(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.features(**arguments)


def test_an_encoder_gives_the_tokens_that_training_aligns_to(tmp_path):
    original = encoders.make_encoder({"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}, 8, image_size=8)
    params = original.module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    save_encoder(tmp_path / "encoder", original.module, jax.device_get(params))
    encoder = repae_jax.load_encoder(tmp_path / "encoder", resolution=19)
    images = draw_images(size=16)
    features = encoder.features(images)
    assert features.shape == (3, 16, 16)
    expected = encoders.encode(encoder.encoder, encoder.params, images)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def test_a_run_is_no_encoder(workdir):
    with pytest.raises(ValueError, match="run[0-9]* is the folder of a run, which holds no vision encoder: give .*; load_vae"):
        repae_jax.load_encoder(workdir)


def test_a_missing_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        repae_jax.load_vae(tmp_path / "nothing")
