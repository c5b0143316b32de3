import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from repae_jax import features

TINY = {"patch_size": 7, "hidden_size": 16, "depth": 2, "num_heads": 2}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def golden():
    return reference.load("preprocessing").arrays


def upsampled(low, size):
    """[B, C, h, w] in [0, 1] -> uint8 [B, size, size, C]: bilinear with half-pixel centres and repeated edges."""

    def weights(length):
        positions = np.clip((np.arange(size, dtype=np.float32) + 0.5) * (length / size) - 0.5, 0, None)
        below = positions.astype(int)
        matrix = np.zeros((size, length), np.float32)
        np.add.at(matrix, (np.arange(size), below), 1 - (positions - below))
        np.add.at(matrix, (np.arange(size), np.minimum(below + 1, length - 1)), positions - below)
        return matrix

    image = np.einsum("ih,jw,bchw->bijc", weights(low.shape[2]), weights(low.shape[3]), low)
    return np.round(image * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("dinov2_and_jepa_input", features.IMAGENET_MEAN, features.IMAGENET_STD),
        # CLIP's published order is resize, then normalise: the resize keeps constants, so the order does not matter
        ("clip_input", CLIP_MEAN, CLIP_STD),
    ],
)
def test_preprocess_matches_the_published_one(golden, record_property, name, mean, std):
    encoder = dataclasses.replace(features.make_encoder("dinov2-small", 256), mean=mean, std=std)
    images = upsampled(golden["image_low"], 256)
    actual = jax.jit(features.preprocess, static_argnums=0)(encoder, images)
    assert actual.shape == (2, 224, 224, 3) and actual.dtype == jnp.float32
    expected = reference.nhwc(golden[name])
    reference.check(actual[:, ::7, ::7], expected, reference.NETWORK_RTOL, name, record_property)


def test_preprocess_without_resize(golden, record_property):
    encoder = features.make_encoder("dinov2-small", 256)
    encoder = dataclasses.replace(encoder, image_size=256)
    actual = features.preprocess(encoder, upsampled(golden["image_low"], 256))
    expected = reference.nhwc(golden["mae_moco_dino1_input"])
    reference.check(actual[:, ::7, ::7], expected, reference.NETWORK_RTOL, "mae_moco_dino1_input", record_property)


def test_resize_bicubic_up_and_down(golden, record_property):
    images = reference.nhwc(golden["bicubic_small"])
    actual = features.resize_bicubic(images, 13, 29)
    expected = reference.nhwc(golden["bicubic_small_to_13x29"])
    reference.check(actual, expected, reference.NETWORK_RTOL, "bicubic 23x17 -> 13x29", record_property)
    assert features.resize_bicubic(images, *images.shape[1:3]) is images


@pytest.mark.parametrize("side", [37, 14])
def test_resample_positions(golden, record_property, side):
    stored = golden[f"pos_embed_{side}"]
    actual = features.resample_positions(stored, 16)
    reference.check(
        actual, golden[f"pos_embed_{side}_to_16"], reference.NETWORK_RTOL, f"positions {side} -> 16", record_property
    )
    np.testing.assert_array_equal(actual[:, 0], stored[:, 0])
    np.testing.assert_array_equal(features.resample_positions(stored, side), stored)


@pytest.mark.parametrize("shape", [(1, 12, 4), (2, 17, 4), (17, 4), (1, 1, 4)])
def test_resample_positions_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="square number"):
        features.resample_positions(np.zeros(shape, np.float32), 4)


def test_encode_gives_patch_tokens_without_gradient():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    single, half = (
        features.make_encoder({**TINY, "num_registers": 3}, 32, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    params = jax.jit(features.init_params, static_argnums=0)(single, jax.random.key(0))

    @jax.jit
    def tokens_and_gradient(params):
        tokens = features.encode(single, params, images)
        return tokens, jax.grad(lambda p: jnp.sum(features.encode(single, p, images) ** 2))(params)

    tokens, gradient = tokens_and_gradient(params)
    assert tokens.shape == (2, 16, 16) and tokens.dtype == jnp.float32
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    rounded = jax.jit(features.encode, static_argnums=0)(half, params, images)
    assert rounded.dtype == jnp.float32
    reference.check(rounded, tokens, 0.05, "bfloat16")


@pytest.mark.parametrize("images", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 32, 28, 3), np.uint8)])
def test_preprocess_refuses_what_is_no_square_uint8(images):
    with pytest.raises(ValueError, match="uint8"):
        features.preprocess(features.make_encoder(TINY, 32), images)


@pytest.mark.parametrize("resolution, image_size, grid", [(256, 224, 16), (512, 448, 32)])
def test_input_size_follows_the_published_rule(resolution, image_size, grid):
    encoder = features.make_encoder("dinov2-base", resolution)
    assert (encoder.image_size, encoder.grid, encoder.module.grid) == (image_size, grid, (grid, grid))
    assert encoder.name == "dinov2-base"


@pytest.mark.parametrize(
    "name, millions",  # of the published models
    [("small", 22.06), ("base", 86.58), ("large", 304.37), ("giant", 1136.48)],
)
def test_published_sizes(name, millions):
    for suffix, registers in (("", 0), ("-with-registers", 4)):
        encoder = features.make_encoder(f"dinov2-{name}{suffix}", 592, image_size=518)
        shapes = jax.eval_shape(lambda key, e=encoder: features.init_params(e, key), jax.random.key(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert encoder.module.num_registers == registers
        assert abs(count / 1e6 - millions) < 0.01, count


@pytest.mark.parametrize(
    "architecture, options, message",
    [
        ("dinov3-base", {}, "'dinov3-base' is unknown; allowed: dinov2-small, dinov2-base"),
        ({**TINY, "widht": 3}, {}, r"unknown fields \['widht'\]"),
        ({"patch_size": 7}, {}, r"lacks \['hidden_size', 'depth', 'num_heads'\]"),
        ({**TINY, "num_heads": 3}, {}, "hidden_size 16 is not divisible by num_heads 3"),
        (TINY, {"image_size": 30}, "image_size 30 .* patch size 7; set .* 28 or 35"),
        ("dinov2-base", {"image_size": 6}, "image_size 6 .* e.g. 14"),
    ],
)
def test_make_encoder_refuses(architecture, options, message):
    with pytest.raises(ValueError, match=message):
        features.make_encoder(architecture, 32, **options)


def test_check_grid():
    encoder = features.make_encoder(TINY, 32)
    features.check_grid(encoder, 4)
    with pytest.raises(
        ValueError, match=r"gives 4 x 4 tokens .* the SiT has 8 x 8; set .* image_size to 56.*patch_size"
    ):
        features.check_grid(encoder, 8)
