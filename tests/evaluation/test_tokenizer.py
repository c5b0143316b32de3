"""Comparing images with their reconstructions: the numbers of each image, independence of batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer_stub import Extent, Pictures, features_of, random_vae

from repae_jax import images
from repae_jax.distributed import sharding
from repae_jax.evaluation import tokenizer
from repae_jax.metrics import image_quality
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.sampling.load_model import LoadedTokenizer


@pytest.fixture(scope="module")
def vae():
    return random_vae()


def compare(vae, source, records=None, *, devices=8, **options):
    options = {"batch_size": 8, "latents": "sampled", "seed": 0, "features_fn": features_of, **options}
    records = np.arange(len(source)) if records is None else np.asarray(records)
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    return tokenizer.compare_all(vae.module, vae.params, source, records, mesh=mesh, **options)


@pytest.fixture(scope="module")
def compared(vae):
    return compare(vae, Pictures())


@pytest.mark.integration
def test_values_of_the_mean_by_hand(vae):
    source = Pictures(8)
    comparison = compare(vae, source, latents="mode")

    @jax.jit
    def reconstruct(pixels):
        posterior = vae.module.apply({"params": vae.params}, images.to_float(pixels), method="encode")
        return vae.module.apply({"params": vae.params}, posterior.mean, method="decode")

    recon = np.asarray(reconstruct(source.pixels))
    rounded = np.floor(127.5 * recon + 128).clip(0, 255).astype(np.uint8)  # LightningDiT's
    np.testing.assert_array_equal(comparison.pairs[::2], source.pixels)
    assert np.abs(comparison.pairs[1::2].astype(int) - rounded).max() <= 1  # float rounding at a gray level's edge
    decibels = -10 * np.log10(((source.pixels - rounded.astype(float)) ** 2).mean(axis=(1, 2, 3)) / 255**2)
    np.testing.assert_allclose(comparison.values["psnr"], decibels, atol=1e-2)
    expected = image_quality.ssim(images.to_float(source.pixels), recon.clip(-1, 1), 2)
    np.testing.assert_allclose(comparison.values["ssim"], expected, atol=1e-4)
    expected = image_quality.ssim(source.pixels.astype(np.float32), rounded.astype(np.float32), 255)
    np.testing.assert_allclose(comparison.values["ssim_pixels"], expected, atol=1e-3)
    sides = (gaussian_stats(features_of(comparison.pairs[start::2])) for start in (0, 1))
    assert comparison.rfid == pytest.approx(frechet_distance(*next(sides), *next(sides)), rel=1e-9)


def test_pixels_are_rounded_not_truncated():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(images.to_uint8(images.to_float(levels) + np.float32(1 / 255)), levels)


@pytest.mark.integration
@pytest.mark.parametrize("batch_size, devices", [(16, 8), (3, 1)])
def test_batches_and_devices_change_nothing(vae, compared, batch_size, devices):
    comparison = compare(vae, Pictures(), batch_size=batch_size, devices=devices)
    np.testing.assert_array_equal(comparison.records, np.arange(20))
    for name, values in compared.values.items():
        np.testing.assert_allclose(comparison.values[name], values, rtol=1e-3, err_msg=name)
    assert comparison.rfid == pytest.approx(compared.rfid, rel=1e-2)
    assert np.abs(comparison.pairs.astype(int) - compared.pairs).max() <= 1
    assert len(comparison.pairs) == 2 * tokenizer.SHOWN


@pytest.mark.integration
def test_noise_depends_on_seed_and_record_alone(vae, compared):
    some = [3, 7, 8, 19]
    comparison = compare(vae, Pictures(), some, features_fn=None)
    assert comparison.rfid is None
    np.testing.assert_allclose(comparison.values["psnr"], compared.values["psnr"][some], rtol=1e-4)
    other, mean = (compare(vae, Pictures(), some, **changed) for changed in ({"seed": 1}, {"latents": "mode"}))
    for changed in (other, mean):
        assert (np.abs(changed.values["psnr"] - comparison.values["psnr"]) > 1e-4).all()
    # two records of the same image get different noise
    same = Pictures(8)
    same.pixels[:] = same.pixels[1]
    assert len(set(compare(vae, same).values["psnr"])) == 8
    assert np.ptp(compare(vae, same, latents="mode").values["psnr"]) < 1e-4


@pytest.mark.integration
def test_undecodable_images_do_not_count(vae, compared):
    comparison = compare(vae, Pictures(bad=(0, 9, 16, 17, 18, 19)))  # the last block holds none
    good = [i for i in range(20) if i not in (0, 9, 16, 17, 18, 19)]
    np.testing.assert_array_equal(comparison.records, good)
    np.testing.assert_allclose(comparison.values["psnr"], compared.values["psnr"][good], rtol=1e-4)
    assert [record for record, _ in comparison.bad_records] == [0, 9, 16, 17, 18, 19]
    assert comparison.bad_records[0][1] == "OSError: broken 0"
    with pytest.raises(ValueError, match="none of the 3 images can be decoded, first picture-0: OSError: broken 0"):
        compare(vae, Pictures(3, bad=range(3)))


@pytest.mark.integration
def test_images_that_are_not_finite_are_refused(vae):
    broken = LoadedTokenizer(vae.module, jax.tree.map(lambda leaf: leaf * np.nan, vae.params), None)
    with pytest.raises(ValueError, match="reconstructions of 8 of 8 images hold nan or infinity, first picture-0, picture-1"):
        compare(broken, Pictures())


@pytest.mark.integration
def test_lpips_gets_images_from_minus_one_to_one(vae, monkeypatch):
    """The code that trained the published weights gave it images in [-3, 1]."""
    monkeypatch.setattr(tokenizer, "LPIPS", Extent)
    assert compare(vae, Pictures(8), lpips=jnp.ones(())).values["lpips"][0] == 2


def test_means_leave_exact_images_out():
    warnings = []
    values = {"psnr": np.array([20.0, np.inf, 30.0]), "ssim": np.array([0.2, 1.0, 0.3])}
    assert tokenizer.mean_values(values, warnings.append) == {"psnr": 25.0, "ssim": 0.5}
    assert "1 of 3 images came out exactly" in warnings[0]
    assert tokenizer.mean_values({"psnr": np.array([np.inf])}, warnings.append) == {"psnr": None}


@pytest.mark.parametrize("count, text", [(2048, "has rank 2047 at most"), (2049, "higher than from 50,000"), (50_000, None)])
def test_too_few_images_for_rfid(count, text):
    warnings = []
    tokenizer.check_count(count, 2048, warnings.append)
    assert [text in warning for warning in warnings] == ([True] if text else [])
