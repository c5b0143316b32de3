import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden_networks import abstract_params, drawn_params, golden_vae

from checkpoints_tools import mapping
from checkpoints_tools.torch_reference import torch_vae
from checkpoints_tools.vae_layouts import vae_table
from configs import common
from repae_jax.models.autoencoder import AutoencoderKL, ResnetBlock
from repae_jax.models.fused_ops import DeferredBias, recompute_norms


@pytest.mark.parametrize("name", reference.cases("vae_f"))
def test_matches_the_published_vae(name, record_property):
    case = reference.load(name)
    vae = golden_vae(case.meta, case.weights)
    params = mapping.to_flax(vae_table(vae), case.weights, abstract_params(vae))
    posterior = vae.apply({"params": params}, reference.nhwc(case.arrays["image"]), method="encode")
    decoded = vae.apply({"params": params}, reference.nhwc(case.arrays["latents"]), method="decode")
    nhwc, rtol = reference.nhwc, reference.NETWORK_RTOL
    reference.check(posterior.mean, nhwc(case.arrays["mean"]), rtol, "mean", record_property)
    reference.check(posterior.logvar, nhwc(case.arrays["logvar"]), rtol, "logvar", record_property)
    reference.check(posterior.kl(), case.arrays["kl"], rtol, "kl", record_property)
    reference.check(decoded, nhwc(case.arrays["decoded"]), rtol, "decoded", record_property)


@pytest.mark.parametrize("name", reference.cases("vae_f"))
def test_round_trip_is_the_identity(name):
    case = reference.load(name)
    vae = golden_vae(case.meta, case.weights)
    table = vae_table(vae)
    back = mapping.to_torch(table, mapping.to_flax(table, case.weights, abstract_params(vae)))
    assert set(back) == set(case.weights)
    for key, value in case.weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def check_against_diffusers(vae, size, record):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    params, rng = drawn_params(vae), np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    latents = rng.standard_normal((1, vae.latent_channels, size // vae.factor, size // vae.factor)).astype(np.float32)
    theirs = torch_vae(vae, params)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(image)).latent_dist
        images = theirs.decode(torch.from_numpy(latents)).sample
    expected = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": images}
    ours = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode"))(reference.nhwc(image))
    decoded = jax.jit(lambda z: vae.apply({"params": params}, z, method="decode"))(reference.nhwc(latents))
    for name, actual in (("mean", ours.mean), ("logvar", ours.logvar), ("decoded", decoded)):
        reference.check(actual, reference.nhwc(expected[name].numpy()), reference.NETWORK_RTOL, name, record)


@pytest.mark.parametrize("name", common.VAES)
def test_matches_diffusers(name, record_property):
    check_against_diffusers(AutoencoderKL(**common.VAES[name], channels=32, num_res_blocks=1), 32, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", common.VAES)
def test_full_size_matches_diffusers(name, record_property):
    check_against_diffusers(AutoencoderKL(**common.VAES[name]), 256, record_property)


def test_without_quant_convs_the_rest_is_the_same():
    sizes = {"latent_channels": 4, "channels": 8, "channel_multipliers": (1, 2), "norm_groups": 4}
    bare, whole = abstract_params(AutoencoderKL(**sizes, quant_convs=False)), abstract_params(AutoencoderKL(**sizes))
    assert bare == {half: whole[half] for half in ("encoder", "decoder")}
    assert set(whole) - set(bare) == {"quant_conv", "post_quant_conv"}


@pytest.mark.slow
def test_remat_changes_nothing():
    sizes = {"latent_channels": 4, "channels": 8, "channel_multipliers": (1, 2), "norm_groups": 4}
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    noise = jnp.zeros((2, 4, 4, 4))
    plain, remat = AutoencoderKL(**sizes), AutoencoderKL(**sizes, remat=True)
    params = plain.init(jax.random.key(1), x, noise)

    def loss(vae):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(vae.apply(p, x, noise)[0]))))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), loss(plain), loss(remat))


def test_compute_dtype_is_bfloat16_inside_and_float32_outside():
    vae = AutoencoderKL(latent_channels=4, channels=8, channel_multipliers=(1, 2), norm_groups=4, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 8, 8, 3))
    params = vae.init(jax.random.key(0), x, jnp.zeros((1, 4, 4, 4)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    recon, posterior = vae.apply(params, x, jnp.zeros((1, 4, 4, 4)))
    assert recon.dtype == posterior.mean.dtype == jnp.float32


def test_groups_that_do_not_divide_are_refused():
    vae = AutoencoderKL(latent_channels=4, channels=24)
    with pytest.raises(ValueError, match="norm_groups=32 does not divide the width 24"):
        vae.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 1, 1, 4)))


def test_gradients_of_a_block_keep_two_arrays_of_its_size():
    """Its input, and the result of the first convolution; not the float32 results of normalization and SiLU in between."""
    block = recompute_norms(ResnetBlock)(64, 32, jnp.bfloat16)
    x = DeferredBias(jax.ShapeDtypeStruct((4, 16, 16, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.float32))
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    _, back = jax.eval_shape(lambda variables, x: jax.vjp(block.apply, variables, x), variables, x)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size >= x.x.size]
    assert len(kept) == 2 and all(leaf.dtype == jnp.bfloat16 for leaf in kept)


def test_no_convolution_is_computed_again():
    """Backwards, a convolution with moments needs its result, which the group norm that follows keeps anyway."""
    block = recompute_norms(ResnetBlock)(32, 8, jnp.float32)
    x = DeferredBias(jax.ShapeDtypeStruct((1, 16, 16, 32), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.float32))
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    gradient = jax.jit(jax.value_and_grad(lambda params, x: block.apply(params, x).x.sum(), argnums=(0, 1)))
    text = gradient.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3 * 2, "each forward, to its input and to its kernel"
