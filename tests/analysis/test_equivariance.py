import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.analysis import equivariance


def turn(x):
    return jnp.rot90(x, axes=(1, 2))


def pool(x):
    """An encoder that commutes with quarter turns: means over 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def repeat(z):
    return jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)


def images(count=4):
    return np.random.default_rng(0).uniform(-1, 1, size=(count, 8, 8, 3)).astype(np.float32)


def error_of(encode, scale=1.0):
    x, code = images(), lambda x: scale * encode(x)
    encoded, transformed, *_ = equivariance.compare(code, lambda z: repeat(z / scale), turn, x, code(x))
    return equivariance.relative_error(equivariance.difference_sums(encoded, transformed))


def test_zero_for_an_encoder_that_commutes():
    assert error_of(pool) == pytest.approx(0, abs=1e-6)


def test_grows_with_what_does_not_commute_and_not_with_the_scale():
    ramp = jnp.arange(4.0)[None, None, :, None]
    errors = [error_of(lambda x, size=size: pool(x) + size * ramp) for size in (0.1, 1.0)]
    assert 0 < errors[0] < errors[1] < 2
    assert error_of(lambda x: pool(x) + ramp, scale=1000) == pytest.approx(errors[1], rel=1e-5)


def test_unrelated_latents_have_root_two():
    first, second = np.random.default_rng(1).normal(size=(2, 16, 8, 8, 4))
    assert equivariance.relative_error(equivariance.difference_sums(first, second)) == pytest.approx(np.sqrt(2), rel=0.05)


def test_batches_add_up():
    first, second = np.random.default_rng(1).normal(size=(2, 6, 4, 4, 3)) + 5
    whole = equivariance.difference_sums(first, second)
    parts = equivariance.difference_sums(first[:2], second[:2]) + equivariance.difference_sums(first[2:], second[2:])
    np.testing.assert_allclose(parts, whole)
    expected = np.sqrt(((first - second) ** 2).sum() / ((first - first.mean(axis=(0, 1, 2))) ** 2).sum())
    assert equivariance.relative_error(whole) == pytest.approx(expected)


def test_pixels():
    x = images()
    _, _, ratio, error = equivariance.compare(lambda x: x, lambda z: z, turn, x, x)
    np.testing.assert_allclose(ratio, 100)  # as far as it goes
    np.testing.assert_allclose(error, 0)
    np.testing.assert_allclose(equivariance.psnr(jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2, 3), 0.2)), 20, rtol=1e-5)
    np.testing.assert_allclose(equivariance.psnr(jnp.ones((1, 2, 2, 3)), jnp.full((1, 2, 2, 3), 9.0)), 100)  # is clipped


def test_collapsed_and_wrong_shapes():
    constant = np.full((2, 4, 4, 3), 0.3, np.float32)
    assert np.isnan(equivariance.relative_error(equivariance.difference_sums(constant, constant)))
    with pytest.raises(ValueError, match=r"E\(T x\) is \[2, 4, 4, 3\], T E\(x\) \[1, 4, 4, 3\]"):
        equivariance.difference_sums(constant, constant[:1])
