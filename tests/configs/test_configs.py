"""Every config that can be asked for describes networks that exist, of the published sizes; nothing is computed."""

import functools
import re
import time

import jax
import pytest
from full_size import check_step, millions

from configs import common, paper, repae, vae
from repae_jax.job import build, frozen_weights, initial_state
from repae_jax.models import encoders

ENCODERS = sorted(common.ENCODERS)


def described(arg="", **loss):
    """A config whose weights are all random, so that nothing is looked up."""
    config = repae.get_config(arg)
    for encoder in config.encoders.values():
        encoder.weights = frozen_weights.RANDOM
    config.lpips.vgg16 = config.lpips.linear = frozen_weights.RANDOM
    config.loss.vae.update(loss)
    return config


def make(arg="", **loss):
    return build.build(described(arg, **loss), jax.devices()[:1])


@functools.cache
def shapes(arg):
    return initial_state.abstract_state(make(arg))


@pytest.mark.parametrize("size", common.SIT_SIZES)
@pytest.mark.parametrize(("patch", "vae", "grid"), [(1, "f16d32", 16), (2, "f8d4", 16), (4, "f8d4", 8)])
def test_every_sit_with_either_vae(size, patch, vae, grid):
    config = described(f"sit={size}/{patch},vae={vae}")
    for encoder in config.encoders.values():
        encoder.image_size = 14 * grid
    job = build.build(config, jax.devices()[:1])
    assert job.latent_shape == {"f8d4": (32, 32, 4), "f16d32": (16, 16, 32)}[vae]
    assert (job.nets.sit.patch_size, job.encoders[0].grid) == (patch, grid)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder(encoder):
    job = make(f"sit=S/2,encoder={encoder}")
    assert job.nets.sit.feature_dims == (encoders.ARCHITECTURES[encoder]["hidden_size"],)
    assert job.encoders[0].grid == 16 and job.encoders[0].image_size in (224, 256)


def test_every_architecture_has_weights():
    assert set(common.ENCODERS) == set(encoders.ARCHITECTURES)


@pytest.mark.integration
def test_512_pixels():
    job = make("resolution=512,sit=B/1,vae=f16d32")
    assert job.latent_shape == (32, 32, 32) and job.encoders[0].image_size == 448
    job = make("resolution=512")
    assert job.latent_shape == (64, 64, 4) and job.encoders[0].image_size == 448


@pytest.mark.parametrize("preset", ["digits", "tiny"])
def test_presets(preset):
    job = make(preset) if preset == "tiny" else build.build(digits(), jax.devices()[:1])
    assert job.latent_shape[:2] == (4, 4) and job.encoders[0].grid == 4 and job.nets.lpips is None


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        (lambda: repae.get_config("digits"), 3.2e-5),  # 1e-6 x 4,096 latents of f8d4 / 128 latents
        (lambda: repae.get_config("tiny"), 6.4e-5),  # / 64 latents
        (lambda: paper.get_config("repae-l,digits"), 3.2e-5),
        (lambda: paper.get_config("repae-vavae,digits"), 6.4e-5),  # 8,192 latents of f16d32
        (lambda: paper.get_config("repae-512,tiny"), 2.56e-4),  # 16,384 latents of f8d4 at 512 pixels
        (lambda: vae.get_config("digits"), 1e-6),  # a tokenizer alone keeps its weight
    ],
    ids=("digits", "tiny", "f8d4", "f16d32", "512", "tokenizer"),
)
def test_kl_weighs_as_much_per_latent_as_in_the_whole_config(config, weight):
    assert config().loss.vae.kl == pytest.approx(weight, rel=1e-12)


def digits():
    config = described("digits")
    config.encoders.target.architecture = {"patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4}
    return config


@pytest.mark.integration
def test_building_is_cheap():
    began = time.monotonic()
    job = make("sit=XL/2,encoder=dinov2-giant")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(initial_state.abstract_state(job)))
    seconds = time.monotonic() - began
    print(f"XL/2 with DINOv2-g: {seconds:.1f} s")
    assert seconds < 30


# ---- published sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "published"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_sizes_of_sit(name, published):
    params = dict(shapes(f"sit={name}").sit.params)
    projectors = {key: params.pop(key) for key in list(params) if key.startswith("projectors")}
    assert projectors
    print(f"SiT-{name}: {millions(params):.2f} M, projectors {millions(projectors):.2f} M")
    assert millions(params) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("name", "published"), [("f8d4", 83.65), ("f16d32", 70.0)])
def test_sizes_of_the_vaes(name, published):
    """f8d4 is Stable Diffusion's; f16d32's count is nowhere published exactly."""
    size = millions(shapes(f"sit=S/{1 if name == 'f16d32' else 2},vae={name}").vae.params)
    print(f"{name}: {size:.2f} M")
    assert size == pytest.approx(published, rel=0.01 if name == "f8d4" else 0.02)


def test_size_of_the_discriminator():
    size = millions(shapes("sit=S/2").disc.params)
    print(f"PatchGAN: {size:.3f} M")
    assert size == pytest.approx(2.77, rel=0.01)


@pytest.mark.parametrize(("name", "published"), [("small", 22.06), ("base", 86.58), ("large", 304.37), ("giant", 1136.5)])
def test_sizes_of_the_encoders(name, published):
    encoder = encoders.make_encoder(f"dinov2-{name}", 256)
    params = jax.eval_shape(functools.partial(encoders.init_params, encoder), jax.random.key(0))
    del params["pos_embed"]  # published for another grid: 37 x 37
    width = encoder.module.hidden_size
    size = millions(params) + (1 + 37**2) * width / 1e6
    print(f"DINOv2-{name}: {size:.2f} M")
    assert size == pytest.approx(published, rel=0.01)


# ---- the main run ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_step_of_the_main_run():
    metrics = check_step(make())
    terms = {f"vae/{name}" for name in ("loss", "l1", "lpips", "kl", "gan", "align")}
    terms |= {f"sit/{name}" for name in ("loss", "velocity", "align")} | {"disc/loss", "disc/hinge"}
    assert terms < set(metrics)


def test_defaults_are_the_papers():
    config = repae.get_config()
    loss = config.loss.to_dict()
    named = {name: {term: weight for term, weight in loss[name].items() if weight} for name in ("vae", "sit")}
    assert named["vae"] == {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "gan": 0.1, "align": 1.5}
    assert named["sit"] == {"velocity": 1.0, "align": 0.5} and loss["gan_start"] == 0
    assert (config.data.batch_size, config.ema_decay, config.diffusion.label_dropout) == (256, 0.9999, 0.1)
    assert all(section.learning_rate == 1e-4 and section.clip_norm == 1.0 for section in config.optim.values())


def test_the_docstrings_example():
    """The arguments after the colon are named, each once."""
    assert {"sit", "vae", "encoder", "resolution"} <= set(re.findall(r"^    (\w+)  ", repae.__doc__, re.MULTILINE))
    (example,) = re.findall(r"`--config configs/repae.py:(\S+)`", repae.__doc__)
    assert make(example).latent_shape == (16, 16, 32)
