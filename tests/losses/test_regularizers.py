"""VF against the published code; transforms and iREPA's normalisation against torch; the rest by hand. Relative tolerances."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from repae_jax.losses import reconstruction
from repae_jax.losses.regularizers import (
    downscale,
    draw_transform,
    marginal_cosine_loss,
    marginal_distance_loss,
    scale_equivariance_loss,
    transform,
    vf_loss,
)
from repae_jax.models.encoders import spatial_normalize

EQ_SCALES = (1.0, 0.25, 0.5, 0.75)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# VF


@pytest.mark.parametrize("name", reference.cases("vf_loss"))
def test_vf_terms_and_gradient(name, record_property):
    case = reference.load(name)
    projected, features = (reference.nhwc(case.arrays[key]) for key in ("projected_latents", "features"))
    tokens = features.reshape(features.shape[0], -1, features.shape[-1])
    margins = case.meta["cos_margin"], case.meta["distmat_margin"]
    check = partial(reference.check, rtol=reference.LOSS_RTOL, record=record_property)
    cosine = marginal_cosine_loss(projected, tokens, margins[0])
    distance = marginal_distance_loss(projected, tokens, margins[1])
    check(cosine, case.arrays["mcos"], name="marginal cosine similarity")
    check(distance, case.arrays["mdms"], name="marginal distance matrix similarity")
    loss, grad = jax.jit(jax.value_and_grad(lambda x: vf_loss(x, tokens, *margins)))(projected)
    check(loss, case.arrays["mcos"] + case.arrays["mdms"], name="sum")
    check(grad, reference.nhwc(case.arrays["grad"]), name="gradient on the projected latents")


def test_vf_by_hand():
    projected = jnp.array([[[[2.0, 0.0], [0.0, 3.0]]]])  # cosine between the two: 0
    tokens = jnp.array([[[1.0, 0.0], [-1.0, 1.0]]])  # to the latents: 1 and sqrt(1/2); to each other: -sqrt(1/2)
    half = math.sqrt(0.5)
    np.testing.assert_allclose(marginal_cosine_loss(projected, tokens, 0), (1 - half) / 2, rtol=1e-6)
    np.testing.assert_allclose(marginal_cosine_loss(projected, tokens, 0.25), (0.75 - half) / 2, rtol=1e-5)
    np.testing.assert_allclose(marginal_distance_loss(projected, tokens, 0), 2 * half / 4, rtol=1e-6)
    np.testing.assert_allclose(marginal_distance_loss(projected, tokens, 0.25), 2 * (half - 0.25) / 4, rtol=1e-6)
    assert vf_loss(projected, tokens, 0.5, 1.0) == 0


def test_vf_ignores_lengths_and_is_finite_for_zero_vectors():
    projected, tokens = normal(2, 3, 2, 5), normal(2, 6, 5, seed=1)
    np.testing.assert_allclose(vf_loss(7 * projected, tokens, 0.1, 0.1), vf_loss(projected, 3 * tokens, 0.1, 0.1), rtol=1e-6)
    assert np.isfinite(jax.grad(vf_loss)(jnp.zeros((1, 1, 2, 3)), jnp.ones((1, 2, 3)), 0.5, 0.25)).all()
    assert vf_loss(projected.astype(jnp.bfloat16), tokens, 0.1, 0.1).dtype == jnp.float32


def test_vf_errors():
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\) and encoder tokens \(1, 4, 3\); allowed"):
        vf_loss(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 3)), 0.5, 0.25)
    with pytest.raises(ValueError, match="cosine margin -0.5; allowed: 0 <= margin < 2"):
        vf_loss(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 4, 3)), -0.5, 0.25)
    with pytest.raises(ValueError, match="distance margin 2; allowed: 0 <= margin < 2"):
        vf_loss(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 4, 3)), 0.5, 2)


# EQ


@pytest.mark.parametrize("scale", [*EQ_SCALES, 9 / 32, 31 / 32])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_transform_is_torchs(scale, turns):
    torch = pytest.importorskip("torch")
    x = normal(2, 32, 32, 3)
    y = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), scale_factor=scale, mode="bilinear", align_corners=False
    )
    expected = torch.rot90(y, k=turns, dims=(-1, -2)).permute(0, 2, 3, 1).numpy()
    reference.check(transform(x, scale, turns), expected, 1e-6, f"scale {scale}, {turns} quarter turns")


def test_transform_by_hand():
    x = jnp.arange(1.0, 5).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(transform(x, 1, 0), x)
    np.testing.assert_array_equal(transform(x, 1, 1)[0, :, :, 0], [[3, 1], [4, 2]])  # clockwise
    np.testing.assert_array_equal(transform(x, 0.5, 3), [[[[2.5]]]])


def test_draws():
    count = 4000
    draw = partial(draw_transform, scales=EQ_SCALES, prior_probability=0.3)
    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count))
    scale, turns = np.asarray(drawn.scale_index), np.asarray(drawn.quarter_turns)
    np.testing.assert_array_equal(scale == 0, turns == 0)  # the identity, or a new size and a turn
    assert set(zip(scale, turns)) == {(0, 0), *((i, k) for i in (1, 2, 3) for k in (1, 2, 3))}
    for share, expected in [((scale == 0).mean(), 0.3)] + [
        (((scale == i) & (turns == k)).mean(), 0.7 / 9) for i in (1, 2, 3) for k in (1, 2, 3)
    ]:
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)  # five standard deviations


@pytest.mark.parametrize("probability, changed", [(1, False), (0, True)])
def test_draws_at_the_ends(probability, changed):
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = jax.vmap(lambda key: draw_transform(key, EQ_SCALES, probability))(keys)
    assert ((drawn.scale_index > 0) == changed).all() and ((drawn.quarter_turns > 0) == changed).all()


def decode(params, latents):
    """A decoder that is not equivariant: nearest upsampling by 2 and a 3 x 3 convolution to RGB."""
    x = latents.repeat(2, axis=1).repeat(2, axis=2)
    return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_one_compiled_step_draws_scales_by_switching_over_gradients():
    """The recipe of the module's head: same values (1e-6) and gradients (1e-5) as a program per transform."""
    params, images, latents = normal(3, 3, 4, 3), normal(2, 16, 16, 3, seed=1), normal(2, 8, 8, 4, seed=2)

    def loss(params, latents, turns, scale):
        recon = decode(params, transform(latents, scale, turns))
        return reconstruction.l1(transform(images, scale, turns), recon)

    traces = []

    @jax.jit
    def step(key):
        traces.append(key)
        drawn = draw_transform(key, EQ_SCALES, 0.25)
        branches = [jax.value_and_grad(partial(loss, scale=scale), argnums=(0, 1)) for scale in EQ_SCALES]
        return drawn, jax.lax.switch(drawn.scale_index, branches, params, latents, drawn.quarter_turns)

    seen = set()
    for key in jax.random.split(jax.random.key(3), 16):
        drawn, (value, grads) = step(key)
        scale, turns = EQ_SCALES[drawn.scale_index], int(drawn.quarter_turns)
        seen.add(scale)
        expected, expected_grads = jax.value_and_grad(loss, argnums=(0, 1))(params, latents, turns, scale)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for grad, expected_grad in zip(grads, expected_grads):
            reference.check(grad, expected_grad, 1e-5, f"gradient at scale {scale}")
    assert seen == set(EQ_SCALES) and len(traces) == 1


def test_an_equivariant_decoder_has_no_loss_under_rotation():
    latents = normal(1, 4, 4, 3)
    kernel = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    images = decode(kernel, latents)
    for turns in range(4):
        np.testing.assert_array_equal(decode(kernel, transform(latents, 1, turns)), transform(images, 1, turns))


@pytest.mark.parametrize("scales", [(), (1.0,), (0.5, 0.25), (1.0, 1.0), (1.0, 0.0)])
def test_draw_names_bad_scales(scales):
    with pytest.raises(ValueError, match=r"scales \(.*allowed: 1 first"):
        draw_transform(jax.random.key(0), scales, 0.5)


def test_transform_errors():
    with pytest.raises(ValueError, match="prior_probability 1.5; allowed: 0 to 1"):
        draw_transform(jax.random.key(0), EQ_SCALES, 1.5)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 3\); allowed: \[B, n, n, C\]"):
        transform(jnp.zeros((1, 4, 8, 3)), 0.5, 1)
    with pytest.raises(ValueError, match="grid of 6 x 6 is 1.5 x 1.5; allowed: whole sizes"):
        transform(jnp.zeros((1, 6, 6, 3)), 0.25, 1)
    with pytest.raises(ValueError, match="scale 2 .*allowed: 0 < scale <= 1"):
        transform(jnp.zeros((1, 6, 6, 3)), 2, 1)


# SE


def test_scale_equivariance_by_hand():
    images = jnp.array([[1.0, 2], [3, 6]]).reshape(1, 2, 2, 1)  # mean 3
    latents = jnp.array([[0.0, 1], [1, 0]]).reshape(1, 2, 2, 1)  # mean 0.5
    function = jax.value_and_grad(lambda z: scale_equivariance_loss(images, z, lambda z: 4 * z, reconstruction.l2, 2))
    value, grad = function(latents)
    np.testing.assert_allclose(value, (3 - 4 * 0.5) ** 2, rtol=1e-6)
    np.testing.assert_allclose(grad.ravel(), [-2 * (3 - 4 * 0.5) * 4 / 4] * 4, rtol=1e-6)  # reaches the latents


@pytest.mark.parametrize("factor", [2, 4])
def test_scale_equivariance_is_torchs(factor):
    torch = pytest.importorskip("torch")
    params, images, latents = normal(3, 3, 4, 3), normal(2, 16, 16, 3, seed=1), normal(2, 8, 8, 4, seed=2)

    def smaller(x):
        x = torch.from_numpy(x).permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(x, scale_factor=1 / factor, mode="bilinear", align_corners=False)

    weight = torch.from_numpy(params).permute(3, 2, 0, 1)
    recon = torch.nn.functional.conv2d(smaller(latents).repeat_interleave(2, 2).repeat_interleave(2, 3), weight, padding=1)
    expected = (smaller(images) - recon).abs().mean().item()
    actual = jax.jit(lambda z: scale_equivariance_loss(images, z, partial(decode, params), reconstruction.l1, factor))(latents)
    reference.check(actual, expected, 1e-6, f"factor {factor}")


def test_scale_equivariance_errors():
    images, latents = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 4, 3))
    for factor in (1, 2.5):
        with pytest.raises(ValueError, match=f"factor {factor}; allowed: an integer >= 2"):
            scale_equivariance_loss(images, latents, lambda z: z, reconstruction.l1, factor)
    with pytest.raises(ValueError, match="grid of 8 x 8 is 2.66.*allowed: whole sizes"):
        scale_equivariance_loss(images, latents, lambda z: z, reconstruction.l1, 3)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\) and decoded latents \(1, 2, 2, 3\) differ"):
        scale_equivariance_loss(images, latents, lambda z: z, reconstruction.l1, 2)


def test_downscale_keeps_constants_and_dtype():
    x = downscale(jnp.full((1, 8, 16, 2), 3, jnp.bfloat16), 0.25)
    assert x.shape == (1, 2, 4, 2) and x.dtype == jnp.bfloat16 and (x == 3).all()


# iREPA's normalisation of the targets


@pytest.mark.parametrize("gamma", [0, 0.6, 1])
def test_spatial_normalize_is_torchs(gamma):
    torch = pytest.importorskip("torch")
    tokens = 3 * normal(2, 9, 5) + 2
    x = torch.from_numpy(tokens)
    expected = (x - gamma * x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    reference.check(spatial_normalize(tokens, gamma), expected.numpy(), 1e-6, f"gamma {gamma}")


def test_spatial_normalize_by_hand():
    tokens = jnp.array([[[1.0, 5.0], [3.0, 5.0]]])  # means 2 and 5; unbiased standard deviations sqrt(2) and 0
    actual = spatial_normalize(tokens, 1)
    np.testing.assert_allclose(actual, [[[-math.sqrt(0.5), 0], [math.sqrt(0.5), 0]]], rtol=2e-6)
    assert spatial_normalize(tokens.astype(jnp.bfloat16), 1).dtype == jnp.float32


def test_spatial_normalize_errors():
    with pytest.raises(ValueError, match=r"\(2, 1, 3\); allowed: \[B, T, F\] with T >= 2"):
        spatial_normalize(jnp.zeros((2, 1, 3)), 0.6)
    with pytest.raises(ValueError, match="gamma 1.5; allowed: 0 to 1"):
        spatial_normalize(jnp.zeros((2, 4, 3)), 1.5)
