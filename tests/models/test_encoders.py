import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from repae_jax.models import encoders

TINY = {"patch_size": 7, "hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def golden():
    return reference.load("preprocessing").arrays


def upsampled(low, size):
    """[B, C, h, w] in [0, 1] -> uint8 [B, size, size, C]: bilinear with half-pixel centers and repeated edges."""

    def weights(length):
        positions = np.clip((np.arange(size, dtype=np.float32) + 0.5) * (length / size) - 0.5, 0, None)
        below = positions.astype(int)
        matrix = np.zeros((size, length), np.float32)
        np.add.at(matrix, (np.arange(size), below), 1 - (positions - below))
        np.add.at(matrix, (np.arange(size), np.minimum(below + 1, length - 1)), positions - below)
        return matrix

    image = np.einsum("ih,jw,bchw->bijc", weights(low.shape[2]), weights(low.shape[3]), low)
    return np.round(image * 255).astype(np.uint8)


PUBLISHED_INPUTS = {
    "dinov2_and_jepa_input": ["dinov2-base", "dinov2-giant-with-registers", "ijepa_vith14_1k"],
    "clip_input": ["clip-vit-large-patch14"],  # resized before it is normalized; ours is the other way round
    "mae_moco_dino1_input": ["vit-mae-large", "mocov3-base", "dino-vitb16"],
}


@pytest.mark.parametrize("name, architecture", [(n, a) for n, names in PUBLISHED_INPUTS.items() for a in names])
def test_preprocess_matches_the_published_one(golden, record_property, name, architecture):
    encoder = encoders.make_encoder(architecture, 256)
    actual = jax.jit(encoders.preprocess, static_argnums=0)(encoder, upsampled(golden["image_low"], 256))
    assert actual.shape == (2, encoder.image_size, encoder.image_size, 3) and actual.dtype == jnp.float32
    expected = reference.nhwc(golden[name])
    step = -(-encoder.image_size // expected.shape[1])  # the golden file stores every step-th pixel
    reference.check(actual[:, ::step, ::step], expected, reference.NETWORK_RTOL, architecture, record_property)


@pytest.mark.parametrize(
    "architecture, mean, std",
    [
        ("dinov3-vitb16", encoders.IMAGENET_MEAN, encoders.IMAGENET_STD),
        ("siglip2-base-patch16-256", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_preprocess_of_encoders_that_see_all_pixels(architecture, mean, std):
    images = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    actual = encoders.preprocess(encoders.make_encoder(architecture, 256), images)
    reference.check(actual, (images / 255 - np.asarray(mean)) / np.asarray(std), 1e-6, architecture)


def test_resize_bicubic_up_and_down(golden, record_property):
    images = reference.nhwc(golden["bicubic_small"])
    actual = encoders.resize_bicubic(images, 13, 29)
    expected = reference.nhwc(golden["bicubic_small_to_13x29"])
    reference.check(actual, expected, reference.NETWORK_RTOL, "bicubic 23x17 -> 13x29", record_property)
    assert encoders.resize_bicubic(images, *images.shape[1:3]) is images


@pytest.mark.parametrize("side", [37, 14])
def test_resample_positions(golden, record_property, side):
    stored = golden[f"pos_embed_{side}"]
    actual = encoders.resample_positions(stored, 16)
    reference.check(
        actual, golden[f"pos_embed_{side}_to_16"], reference.NETWORK_RTOL, f"positions {side} -> 16", record_property
    )
    np.testing.assert_array_equal(actual[:, 0], stored[:, 0])
    np.testing.assert_array_equal(encoders.resample_positions(stored, side), stored)


@pytest.mark.integration  # imports torch
@pytest.mark.parametrize("grid", [(16, 24), (24, 16), (40, 37), (37, 20)])
def test_resample_positions_to_other_shapes(golden, record_property, grid):
    """By timm's rule: torch's antialiased bicubic filter."""
    torch = pytest.importorskip("torch")
    stored = golden["pos_embed_37"]
    maps = torch.tensor(stored[:, 1:]).reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(maps, size=grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()
    expected, actual = resized.reshape(1, -1, stored.shape[2]), encoders.resample_positions(stored, grid)
    reference.check(actual[:, 1:], expected, reference.NETWORK_RTOL, f"positions 37 -> {grid}", record_property)
    np.testing.assert_array_equal(actual[:, 0], stored[:, 0])


@pytest.mark.integration  # imports transformers
def test_positions_of_other_shapes_are_nearly_those_of_dinov2():
    """Its interpolation has another cubic kernel (a = -0.75) and repeats the edges; a table that varies slowly tells little of
    that, and all of which axis is which."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rows, columns = np.divmod(np.arange(64), 8)
    waves = [(1, 0), (0, 1), (1, 1), (1, -0.5)]
    table = np.stack([np.sin((u * rows + v * columns) * np.pi / 8) for u, v in waves], axis=-1).astype(np.float32)
    table = np.concatenate([np.ones((1, 4), np.float32), table])[None]
    config = transformers.Dinov2Config(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=56, patch_size=7)
    embeddings = transformers.Dinov2Model(config).embeddings
    with torch.no_grad():
        embeddings.position_embeddings.copy_(torch.tensor(table))
        expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 12 * 20, 4), 12 * 7, 20 * 7).numpy()
    resampled = [np.asarray(encoders.resample_positions(table, grid)) for grid in ((12, 20), (20, 12))]
    differences = [np.abs(positions - expected).max() for positions in resampled]
    assert differences[0] < 0.1 and differences[1] > 0.9, differences


@pytest.mark.parametrize("shape", [(1, 12, 4), (2, 17, 4), (17, 4), (1, 1, 4)])
def test_resample_positions_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="square number"):
        encoders.resample_positions(np.zeros(shape, np.float32), 4)


def test_encode_gives_patch_tokens_without_gradient():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    single, half = (
        encoders.make_encoder({**TINY, "num_registers": 3}, 32, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(encoders.init_params, single), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)

    @jax.jit
    def tokens_and_gradient(params):
        tokens = encoders.encode(single, params, images)
        return tokens, jax.grad(lambda p: jnp.sum(encoders.encode(single, p, images) ** 2))(params)

    tokens, gradient = tokens_and_gradient(params)
    assert tokens.shape == (2, 16, 16) and tokens.dtype == jnp.float32
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    rounded = jax.jit(encoders.encode, static_argnums=0)(half, params, images)
    assert rounded.dtype == jnp.float32
    reference.check(rounded, tokens, 0.05, "bfloat16")


@pytest.mark.parametrize("images", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 32, 28, 3), np.uint8)])
def test_preprocess_refuses_other_than_square_uint8(images):
    with pytest.raises(ValueError, match="uint8"):
        encoders.preprocess(encoders.make_encoder(TINY, 32), images)


def test_other_shapes_keep_their_proportions():
    encoder = encoders.make_encoder("dinov2-base", (256, 384))
    assert (encoder.image_size, encoder.grid, encoder.num_tokens) == ((224, 336), (16, 24), 384)
    assert encoder.module.grid == (16, 24)
    assert encoders.make_encoder("dinov3-vitb16", (512, 256)).image_size == (512, 256)
    assert encoders.make_encoder(TINY, (32, 48), image_size=(28, 42)).grid == (4, 6)
    with pytest.raises(ValueError, match=r"image_size 218 x 332 \(resolution 250 x 380\).*patch size 14.*e.g. \(210, 322\) or"):
        encoders.make_encoder("dinov2-base", (250, 380))


def test_images_that_would_be_distorted_are_refused():
    wide = encoders.make_encoder(TINY, (32, 48), image_size=(28, 42))
    assert encoders.preprocess(wide, np.zeros((1, 32, 48, 3), np.uint8)).shape == (1, 28, 42, 3)
    with pytest.raises(ValueError, match="allowed: uint8 .B, H, W, 3., H : W as 28 : 42"):
        encoders.preprocess(wide, np.zeros((1, 48, 32, 3), np.uint8))


@pytest.mark.parametrize("resolution, grid", [(256, 16), (512, 32)])
@pytest.mark.parametrize("architecture", encoders.ARCHITECTURES)
def test_input_size_follows_the_published_rule(architecture, resolution, grid):
    encoder = encoders.make_encoder(architecture, resolution)
    assert (encoder.image_size, encoder.grid) == (grid * encoder.module.patch_size, grid)
    assert encoder.module.grid == (grid, grid) and encoder.name == architecture


@pytest.mark.parametrize(
    "architecture, image_size, millions",  # of the published models, without what follows the tokens
    [
        ("dinov2-small", 518, 22.06),
        ("dinov2-base", 518, 86.58),
        ("dinov2-large", 518, 304.37),
        ("dinov2-giant", 518, 1136.48),
        ("dinov2-base-with-registers", 518, 86.58),
        ("dino-vitb16", 224, 85.80),
        ("vit-mae-large", 224, 303.30),
        ("ijepa_vith14_1k", 224, 630.76),
        ("clip-vit-large-patch14", 224, 303.18),
        ("dinov3-vits16", 224, 21.60),
        ("dinov3-vitb16", 224, 85.66),
        ("dinov3-vitl16", 224, 303.13),
        ("siglip2-base-patch16-256", 256, 85.84),  # 92.93 with the attention pooling
    ],
)
def test_published_sizes(architecture, image_size, millions):
    encoder = encoders.make_encoder(architecture, 256, image_size=image_size)
    shapes = jax.eval_shape(functools.partial(encoders.init_params, encoder), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - millions) < 0.01, count


@pytest.mark.parametrize(
    "architecture, options, message",
    [
        ("dinov3-base", {}, "'dinov3-base' is unknown; allowed: dinov2-small, dinov2-base"),
        ({**TINY, "widht": 3}, {}, r"unknown fields \['widht'\]"),
        ({"patch_size": 7}, {}, r"lacks \['hidden_size', 'depth', 'num_heads'\]"),
        ({**TINY, "num_heads": 3}, {}, "hidden_size 16 is not divisible by num_heads 3"),
        ({**TINY, "family": "dinov4"}, {}, "family 'dinov4' is unknown; allowed: dinov2, dino, "),
        ({**TINY, "activation": "relu"}, {}, "activation 'relu' is unknown; allowed: gelu, "),
        ({**TINY, "no_bias": ["keys"]}, {}, "no_bias 'keys' is unknown; allowed: patch_embed, query"),
        (TINY, {"image_size": 30}, "image_size 30 .* patch size 7; set .* 28 or 35"),
        ("dinov2-base", {"image_size": 6}, "image_size 6 .* e.g. 14"),
    ],
)
def test_make_encoder_refuses(architecture, options, message):
    with pytest.raises(ValueError, match=message):
        encoders.make_encoder(architecture, 32, **options)


def test_check_grid():
    encoder = encoders.make_encoder(TINY, 32)
    encoders.check_grid(encoder, 4)
    with pytest.raises(ValueError, match=r"gives 4 x 4 tokens .* the SiT has 8 x 8; set .* image_size to 56.*patch_size"):
        encoders.check_grid(encoder, 8)
    encoders.check_grid(encoders.make_encoder(TINY, (32, 48), image_size=(28, 42)), (4, 6))
    with pytest.raises(ValueError, match=r"gives 4 x 4 tokens .* the SiT has 4 x 6; set .* image_size to \(28, 42\)"):
        encoders.check_grid(encoder, (4, 6))


class Pyramid(nn.Module):
    """An encoder that is no transformer: one strided convolution, whose result is named."""

    grid: tuple[int, int]
    patch_size: int
    hidden_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        side = (self.patch_size, self.patch_size)
        return {"stage_1": nn.Conv(self.hidden_size, side, strides=side, padding="VALID", dtype=self.dtype)(images)}


def test_a_new_family_is_one_entry_of_the_table(monkeypatch):
    """Another network, statistics and choice of tokens; nothing else is touched."""
    family = encoders.Family(
        pixels=128,
        architectures={"pyramid-small": encoders.Release("lab/pyramid-small", {"patch_size": 8, "hidden_size": 6})},
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        module=Pyramid,
        tokens=lambda outputs: outputs["stage_1"].reshape(len(outputs["stage_1"]), -1, 6),
    )
    monkeypatch.setitem(encoders.FAMILIES, "pyramid", family)
    encoder = encoders.make_encoder("pyramid-small", 64)
    assert (encoder.image_size, encoder.grid) == (32, 4)
    encoders.check_grid(encoder, 4)
    params = encoders.init_params(encoder, jax.random.key(0))
    images = np.full((2, 64, 64, 3), 255, np.uint8)
    tokens = jax.jit(encoders.encode, static_argnums=0)(encoder, params, images)
    assert tokens.shape == (2, 16, 6)
    expected = 2 * params["Conv_0"]["kernel"].sum((0, 1, 2)) + params["Conv_0"]["bias"]  # white is (1 - 0.5) / 0.25
    reference.check(tokens, np.broadcast_to(expected, tokens.shape), 1e-5, "tokens")
    with pytest.raises(ValueError, match="is unknown; allowed: .*pyramid-small"):
        encoders.make_encoder("pyramid-large", 64)
    with pytest.raises(ValueError, match="family 'pyramid' is unknown; allowed: dinov2, "):
        encoders.make_encoder({**TINY, "family": "pyramid"}, 64)
