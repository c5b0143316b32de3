"""The analytic count of FLOP against the compiler's and the traced steps'; sampling; peaks of devices."""

import jax
import jax.numpy as jnp
import pytest
import traced_flops

from configs import ldm, repae, vae
from repae_jax.benchmark import parts as benchmark_parts
from repae_jax.cost import flops
from repae_jax.job import build, compilation, initial_state
from repae_jax.models import encoders as features
from repae_jax.sampling import generate

BATCH = 2
TOY_PART = 0.12  # measured: 0.108, of the discriminator, most of whose pixels are at an edge


def made(file, arg, **changes):
    """A job on one device that keeps everything for the backward pass, with random weights."""
    config = file.get_config(arg)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    config.data.batch_size = BATCH
    if "sit" in config:
        config.sit.remat = "none"
    for encoder in config.encoders.values():
        encoder.weights = "random"
    if config.job == "ldm" or not any(config.loss.vae.values()):
        config.init.vae = "random"
    return build.build(config, devices=jax.devices()[:1])


def of_compiler(function, *args):
    """FLOP of an image by XLA's own cost analysis: without loops of more than one turn, whose body it counts once.

    It adds elementwise operations, and leaves out products with a convolution's padding: these are up to 3 % at these sizes.
    """
    return jax.jit(function).lower(*args).cost_analysis()["flops"] / BATCH


def image(size, channels=3):
    return jax.ShapeDtypeStruct((BATCH, size, size, channels), jnp.float32)


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_vae(name):
    job = made(vae, f"vae={name}")
    module, key = job.nets.vae, jax.random.key(0)
    params = jax.eval_shape(module.init, key, image(256), image(256 // module.factor, module.latent_channels))
    for method, argument, expected in zip(
        ("encode", "decode"), (image(256), image(256 // module.factor, module.latent_channels)), flops.vae(job.config)
    ):
        found = of_compiler(lambda p, x, method=method: module.apply(p, x, method=method), params, argument)
        assert found == pytest.approx(expected.forward, rel=0.03)


def test_discriminator_and_lpips():
    job = made(repae, "")
    key = jax.random.key(0)
    disc = jax.eval_shape(job.nets.disc.init, key, image(256))
    found = of_compiler(lambda p, x: job.nets.disc.apply(p, x, mutable=["batch_stats"])[0], disc, image(256))
    assert found == pytest.approx(flops.discriminator(job.config).forward, rel=0.03)
    lpips = jax.eval_shape(job.nets.lpips.init, key, image(64), image(64))
    found = of_compiler(job.nets.lpips.apply, lpips, image(256), image(256))
    assert found == pytest.approx(2 * flops.perceptual(job.config).forward, rel=0.03)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_sit(projector):
    """Two stacks of one block each, as the compiler counts a loop's body once."""
    job = made(repae, "sit=B/2", sit__depth=2, sit__encoder_depth=1, sit__projector=projector)
    side, c = job.latent_shape[0], job.latent_shape[2]
    args = image(side, c), jnp.zeros((BATCH,)), jnp.zeros((BATCH,), jnp.int32)
    params = jax.eval_shape(job.nets.sit.init, jax.random.key(0), *args)
    heads = flops.projectors(job.config, job.encoders)
    for method, expected in (("__call__", flops.sit(job.config, 2) + heads), ("align", flops.sit(job.config, 1) + heads)):
        found = of_compiler(lambda p, *xs, method=method: job.nets.sit.apply(p, *xs, method=method), params, *args)
        assert found == pytest.approx(expected.forward, rel=0.03)


@pytest.mark.parametrize("name", ["dinov2-base", "dinov2-giant", "dinov3-vitb16", "clip-vit-large-patch14"])
def test_encoder(name):
    module = features.make_encoder(name, 256).module.clone(depth=1)
    images = image(module.grid[0] * module.patch_size)
    params = jax.eval_shape(module.init, jax.random.key(0), images)
    assert of_compiler(module.apply, params, images) == pytest.approx(flops.vision_transformer(module).forward, rel=0.03)


@pytest.mark.parametrize(
    ("file", "arg", "tolerance", "changes"),
    [
        (repae, "", 1e-3, {}),
        (ldm, "model=DiT-XL/2,vae=f8d4,encoder=ijepa_vith14_1k", 1e-3, {}),
        # at toy sizes what is not counted weighs more: resizing, gradients of padding and of images
        (vae, "vavae-stage1,tiny", 0.05, {}),  # an adaptive VF weight
        (repae, "tiny", 0.05, {"accumulation": 2, "loss__vae__diffusion": 0.5, "diffusion__norm_momentum": 0.0}),
        (ldm, "tiny", 0.05, {}),
        (ldm, "tiny", 0.05, {"data__cache": "latents"}),
        (vae, "sdvae-ft-mse,tiny", 0.05, {}),  # a fixed encoder
        (vae, "se,tiny", 0.05, {}),
        pytest.param(vae, "eqvae,tiny", 0.05, {}, marks=pytest.mark.slow),
        (vae, "discriminator,tiny", 0.05, {}),
    ],
)
def test_steps(file, arg, tolerance, changes):
    job = made(file, arg, **changes)
    shares = flops.scale_shares(job.config)
    inputs = initial_state.abstract_state(job), *compilation.abstract_inputs(job)
    traced = traced_flops.count(job.step, *inputs, shares={len(shares): shares})
    assert flops.per_image(job.config, job.encoders) == pytest.approx(traced / BATCH, rel=tolerance)


@pytest.mark.parametrize(
    ("file", "arg", "tolerance", "changes"),
    [
        pytest.param(vae, "vavae-stage1", 0.015, {}, marks=pytest.mark.slow),  # f16d32, an adaptive VF weight
        pytest.param(repae, "", 0.015, {}, marks=pytest.mark.slow),
        (vae, "vavae-stage1,tiny", TOY_PART, {}),
        (vae, "se,tiny", TOY_PART, {}),
        (vae, "discriminator,tiny", TOY_PART, {}),
        (repae, "tiny", TOY_PART, {"loss__vae__diffusion": 0.5, "diffusion__norm_momentum": 0.0}),
    ],
)
def test_parts(file, arg, tolerance, changes):
    """Each as the benchmark times it."""
    job = made(file, arg, **changes)
    size, key = job.config["data"]["image_size"], jax.random.key(0)
    pixels = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8)
    batch = jax.eval_shape(lambda pixels: benchmark_parts.make_batch(job, pixels, key), pixels)
    state, frozen = initial_state.abstract_state(job), compilation.abstract_inputs(job)[1]
    timed = benchmark_parts.make_parts(job, state, frozen, batch, batch)
    traced = {name: traced_flops.count(part.function, *part.arguments) / BATCH for name, part in timed.items()}
    assert flops.parts(job.config, job.encoders) == pytest.approx(traced, rel=tolerance)


def test_remat_is_not_counted():
    config = repae.get_config()
    before = flops.per_image(config)
    config.sit.remat = "full"
    assert flops.per_image(config) == before == flops.per_image(config.to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "euler"},
        {"sampler": "heun", "guidance_scale": 2.0, "guidance_low": 0.3},
        {"sampler": "heun", "guidance_scale": 2.0, "guidance_high": 0.7},
        {"sampler": "sde", "guidance_scale": 2.0, "guidance_high": 0.65},
        {"sampler": "ancestral", "guidance_scale": 4.0, "guidance_low": 0.2},
    ],
)
def test_sampling(changes):
    job = made(ldm, "tiny") if changes["sampler"] != "ancestral" else made(ldm, "model=DiT-S/2,encoder=none")
    sampling = generate.Sampling(**{"steps": 7, **changes})
    function = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, sampling)
    state, frozen = initial_state.abstract_state(job), compilation.abstract_inputs(job)[1]
    counted = jnp.zeros((BATCH,), jnp.int32)
    traced = traced_flops.count(function, generate.sampling_params(state, frozen), counted, counted, jax.random.key(0))
    assert sum(flops.sampling_parts(job.config, sampling).values()) == pytest.approx(traced / BATCH, rel=0.02)


def test_an_encoder_that_only_its_weights_describe():
    config = repae.get_config("digits")
    config.encoders.target.weights = "folder"
    with pytest.raises(ValueError, match="encoders.target.architecture is not set.*dinov2-base"):
        flops.per_image(config)
    described = features.make_encoder({"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}, 16, image_size=16)
    assert flops.parts(config, (described,))["encoder_target"] == flops.vision_transformer(described.module).forward


@pytest.mark.parametrize(
    ("device", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("TPU7x", 1153.5e12, 1153.5e12),
        ("TPU v3", 61.5e12, 61.5e12),
        ("NVIDIA H200", 989e12, 494.5e12),
        ("NVIDIA H200 NVL", 835e12, 417.5e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA GB200", 2500e12, 1250e12),
        ("NVIDIA L40S", 362e12, 181e12),
        ("NVIDIA L4", None, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("cpu", None, None),
        ("TPU v99", None, None),
    ],
)
def test_peaks(device, bfloat16, float32):
    assert flops.peak(device) == bfloat16 and flops.peak(device, "float32") == float32
