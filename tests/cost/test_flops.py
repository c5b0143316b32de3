"""FLOP of traced programs: by hand, against the compiler's count and published sizes; steps, sampling; peaks of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from configs import ldm, repae, vae
from repae_jax.cost import flops
from repae_jax.diffusion.samplers import Sampling
from repae_jax.distributed import sharding
from repae_jax.job import build, frozen_weights
from repae_jax.models import encoders

BATCH = 2


def make_job(file, arg, **changes):
    """A job on one device with random weights."""
    config = file.get_config(arg)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    config.data.batch_size = BATCH
    for encoder in config.encoders.values():
        encoder.weights = "random"
    if config.job == "ldm" or not any(config.loss.vae.values()):
        config.init.vae = "random"
    return build.build(config, devices=jax.devices()[:1])


def total(function, *args, **options):
    return sum(flops.count(function, *args, **options).values())


# ---- by hand --------------------------------------------------------------------------------------------------------

SIDE, TURNS = 8, 5
PRODUCT = 2 * SIDE**3
MATRIX = jnp.ones((SIDE, SIDE))


def product(x):
    return x @ MATRIX


def shared_out(x):
    """Eight matrices, one on each device."""
    run = sharding.with_mesh_context(sharding.make_mesh(2), lambda x: sharding.of_each_device(lambda stack: stack @ MATRIX, x))
    return run(jnp.stack([x] * 8))


def scanned(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(product(x)), None), x, length=TURNS)[0]


@jax.custom_vjp
def twice_backward(x):
    return product(x)


twice_backward.defvjp(lambda x: (product(x), x), lambda x, g: (product(product(g)),))


def switch(x):
    return jax.lax.switch(jnp.int32(x[0, 0]), [product, lambda x: product(product(x)), lambda x: x], x)


def grad(function):
    return jax.grad(lambda x: jnp.sum(jnp.square(function(x))))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (product, 1),
        (jax.jit(lambda x: product(jax.jit(product)(x))), 2),
        (lambda x: (product(x), x)[1], 0),  # not needed by what is returned
        (lambda x: jnp.einsum("ij,kj->ik", x, x), 1),
        (scanned, TURNS),
        (shared_out, 8),
        (grad(scanned), 2 * TURNS),
        (grad(jax.checkpoint(scanned)), 2 * TURNS),  # recomputation is not counted
        (grad(lambda x: jnp.tanh(product(jnp.tanh(product(x))))), 4),
        (grad(jax.checkpoint(lambda x: jnp.tanh(product(jnp.tanh(product(x)))))), 4),
        (twice_backward, 1),
        (grad(twice_backward), 3),
        (lambda x: jax.lax.cond(x[0, 0] > 0, product, lambda x: x, x), 1),
        (switch, 2),  # the costliest branch
        (lambda x: jax.vmap(product)(jnp.stack([x] * 3)), 3),
        (lambda x: jax.lax.platform_dependent(x, cpu=lambda x: product(product(x)), default=product), 1),
    ],
)
def test_products_by_hand(function, products):
    assert total(function, MATRIX) == products * PRODUCT


def test_branches_count_as_often_as_they_are_taken():
    assert total(switch, MATRIX, shares=(0.5, 0.25, 0.25)) == (0.5 + 2 * 0.25) * PRODUCT
    assert total(switch, MATRIX, shares=(0.5, 0.5)) == 2 * PRODUCT, "shares of other conditionals"


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_by_hand(stride):
    images, kernel = jnp.ones((BATCH, 16, 16, 3)), jnp.ones((3, 3, 3, 4))

    def convolve(images, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (stride, stride), "SAME", dimension_numbers=dimensions)

    forward = 2 * BATCH * (16 // stride) ** 2 * 4 * 3 * 9
    assert total(convolve, images, kernel) == forward
    backward = jax.grad(lambda *args: jnp.sum(jnp.square(convolve(*args))), (0, 1))
    assert total(backward, images, kernel) == pytest.approx(3 * forward, rel=1e-6)


def test_scopes_are_those_of_phases_and_modules():
    @jax.named_scope("phase")
    def step(x):
        def loss(x):
            with jax.named_scope("Network.call"):
                x = jax.lax.scan(lambda x, _: (jax.named_scope("layer")(product)(x), None), x, length=TURNS)[0]
            return jnp.sum(jnp.einsum("ij,jk->ik", x, x))

        return jax.jit(jax.grad(loss))(x)

    counts = flops.count(lambda x: product(step(x)), MATRIX)
    assert counts == {"phase/Network.call": 2 * TURNS * PRODUCT, "phase": 2 * PRODUCT, "": PRODUCT}


# ---- networks -------------------------------------------------------------------------------------------------------


def of_compiler(function, *args):
    """FLOP by XLA's own cost analysis: without loops of more than one turn, whose body it counts once.

    It adds elementwise operations, and leaves out products with a convolution's padding: these are up to 3 % at these sizes.
    """
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def check(function, *args):
    assert total(function, *args) == pytest.approx(of_compiler(function, *args), rel=0.03)


def image(size, channels=3):
    return jax.ShapeDtypeStruct((BATCH, size, size, channels), jnp.float32)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_vae(name):
    module, key = make_job(vae, f"vae={name}").nets.vae, jax.random.key(0)
    latents = image(256 // module.factor, module.latent_channels)
    params = jax.eval_shape(module.init, key, image(256), latents)
    for method, argument in (("encode", image(256)), ("decode", latents)):
        check(functools.partial(module.apply, method=method), params, argument)


def test_discriminator_and_lpips():
    job = make_job(repae, "")
    key = jax.random.key(0)
    disc = jax.eval_shape(job.nets.disc.init, key, image(256))
    check(lambda p, x: job.nets.disc.apply(p, x, mutable=["batch_stats"])[0], disc, image(256))
    lpips = jax.eval_shape(job.nets.lpips.init, key, image(64), image(64))
    check(job.nets.lpips.apply, lpips, image(256), image(256))


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_sit(projector):
    """Two stacks of one block each, as the compiler counts a loop's body once."""
    job = make_job(repae, "sit=B/2", sit__depth=2, sit__encoder_depth=1, sit__projector=projector)
    side, c = job.latent_shape[0], job.latent_shape[2]
    args = image(side, c), jnp.zeros((BATCH,)), jnp.zeros((BATCH,), jnp.int32)
    params = jax.eval_shape(job.nets.sit.init, jax.random.key(0), *args)
    for method in ("__call__", "align"):
        check(functools.partial(job.nets.sit.apply, method=method), params, *args)


@pytest.mark.parametrize("name", ["dinov2-base", "dinov2-giant", "dinov3-vitb16", "clip-vit-large-patch14"])
def test_encoder(name):
    module = encoders.make_encoder(name, 256).module.clone(depth=1)
    images = image(module.grid[0] * module.patch_size)
    check(module.apply, jax.eval_shape(module.init, jax.random.key(0), images), images)


# ---- steps and sampling ---------------------------------------------------------------------------------------------

# TFLOP an image, by formulas of each network's sizes
STEPS = [
    (repae, "sit=XL/2", 3.7722, {}),
    (repae, "sit=XL/2", 3.7722, {"sit__remat": "full", "vae__remat": True}),
    (ldm, "model=DiT-XL/2,vae=f8d4,encoder=ijepa_vith14_1k", 1.3318, {}),
    (vae, "vavae-stage1", 1.7563, {}),  # an adaptive VF weight
]


@pytest.mark.integration
@pytest.mark.parametrize(("file", "arg", "expected", "changes"), STEPS)
def test_steps(file, arg, expected, changes):
    assert sum(flops.of_step(make_job(file, arg, **changes)).values()) == pytest.approx(expected * 1e12, rel=1e-3)


def step_flop(file, arg, **changes):
    return sum(flops.of_step(make_job(file, arg, **changes)).values())


@pytest.mark.slow
def test_what_does_not_change_the_cost_of_an_image():
    expected = step_flop(repae, "tiny")
    assert step_flop(repae, "tiny", accumulation=2) == pytest.approx(expected, rel=1e-4)
    assert step_flop(repae, "tiny", sit__remat="full", vae__remat=True) == expected
    assert step_flop(repae, "tiny", sit__remat="none", vae__remat=False) == expected
    assert step_flop(repae, "tiny", loss__vae__gan=0.0) < expected
    assert step_flop(ldm, "tiny", data__cache="latents") < step_flop(ldm, "tiny") < expected


@pytest.mark.slow
def test_a_drawn_scale_counts_as_often_as_it_is_drawn():
    job = make_job(vae, "eqvae,tiny", loss__eq_prior=0.75)
    assert flops.branch_shares(job.config) == [0.75, 0.25] and flops.branch_shares(make_job(vae, "tiny").config) == []
    always, half, never = (step_flop(vae, "eqvae,tiny", loss__eq_prior=share) for share in (1.0, 0.5, 0.0))
    assert always > half > never and half == pytest.approx((always + never) / 2)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"sampler": "euler"}, 7),
        ({"sampler": "heun"}, 13),
        ({"sampler": "dpmpp"}, 7),
        ({"sampler": "heun", "guidance_scale": 2.0, "guidance_low": 0.3}, 2 * (2 * 5 + 2) - 1),
        ({"sampler": "heun", "guidance_scale": 2.0, "guidance_high": 0.7}, 2 * (3 + 2 * 4) - 2),
        ({"sampler": "sde", "guidance_scale": 2.0, "guidance_high": 0.65}, 3 + 2 * 4),
        ({"sampler": "ancestral", "guidance_scale": 4.0, "guidance_low": 0.2}, 2 * 5 + 2),
    ],
)
def test_sampling(changes, calls):
    """Compares with the SiT's calls for one image, counted by hand for seven steps; a guided call is two."""
    job = make_job(ldm, "tiny") if changes["sampler"] != "ancestral" else make_job(ldm, "model=DiT-S/2,encoder=none")
    sit, latents = job.nets.sit, image(job.latent_shape[0], job.latent_shape[2])
    args = latents, jnp.zeros((BATCH,)), jnp.zeros((BATCH,), jnp.int32)
    params = jax.eval_shape(sit.init, jax.random.key(0), *args)
    once = total(lambda *args: sit.apply(*args)[0], params, *args) / BATCH
    vae_params = jax.eval_shape(functools.partial(frozen_weights.initial_vae, job), jax.random.key(0))
    decoding = total(lambda p, z: job.nets.vae.apply({"params": p}, z, method="decode"), vae_params, latents) / BATCH
    job = dataclasses.replace(job, sampling=Sampling(**{"steps": 7, **changes}))
    assert flops.of_sampling(job) == pytest.approx({"SiT": calls * once, "AutoencoderKL.decode": decoding})


def test_steps_that_nobody_knows_before_are_not_counted():
    job = dataclasses.replace(make_job(ldm, "tiny"), sampling=Sampling("dopri5"))
    with pytest.raises(ValueError, match="config.sampling.sampler='dopri5' takes as many steps as it needs.*choose another"):
        flops.of_sampling(job)


def test_hours():
    config = {"data": {"batch_size": 10}, "steps": 3600, "precision": {"compute": "bfloat16"}}
    assert flops.h100_hours(989e12 * 0.3, config) == pytest.approx(10)


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
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 D", 147e12, 73.5e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("cpu", None, None),
        ("TPU v99", None, None),
    ],
)
def test_peaks(device, bfloat16, float32):
    assert flops.peak(device) == bfloat16 and flops.peak(device, "float32") == float32
