import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden_networks import TINY, abstract_tree, draw, load_sit

from checkpoints_tools import mapping
from checkpoints_tools.torch_reference import torch_sit
from repae_jax.diffusion import interpolant, latent_norm
from repae_jax.diffusion.samplers import Sampling
from repae_jax.losses.alignment import alignment_loss
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.channel_stats import ChannelStats, batch_stats, update_running
from repae_jax.models.layers import sincos_position_embedding
from repae_jax.models.sit import SiT, with_tap
from repae_jax.sampling import generate
from repae_jax.training.networks import Nets


def inputs(case):
    a = case.arrays
    targets = tuple(a[key] for key in sorted(k for k in a if k.startswith("features")))
    return reference.nhwc(a["latents"]), a["time"], a["labels"].astype(np.int32), reference.nhwc(a["noise"]), targets


def check_alignment(loss, expected, name):
    """A mean of cosines in [-1, 1] that may cancel to almost zero: 1e-5 relative plus one float32 rounding of a cosine."""
    error = abs(float(loss) - float(expected))
    print(f"{name} alignment loss: error {error:.1e} of {float(expected):.1e}")
    assert error <= reference.LOSS_RTOL * abs(float(expected)) + np.finfo(np.float32).eps, (name, error)


@pytest.mark.parametrize("name", reference.cases("sit_"))
def test_matches_the_published_sit(name, record_property):
    case = reference.load(name)
    sit, _, params, stats = load_sit(case)
    latents, t, labels, noise, targets = inputs(case)
    expected, rtol, loss_rtol = case.arrays, reference.NETWORK_RTOL, reference.LOSS_RTOL
    z = latent_norm.normalize(latents, stats)

    apply = jax.jit(sit.apply)
    for path in ("linear", "cosine"):
        velocity, projections = apply(params, interpolant.interpolate(path, z, noise, t), t, labels)
        per_sample = interpolant.mean_squared_velocity_error(path, velocity, z, noise, t)
        reference.check(
            per_sample, expected[f"eval_{path}_denoising_loss"], loss_rtol, f"{path} denoising loss", record_property
        )
        check_alignment(alignment_loss(projections, targets), expected[f"eval_{path}_proj_loss"], path)
    for i, projection in enumerate(projections):  # the file keeps those of the cosine path
        reference.check(projection, expected[f"projected{i}"], rtol, f"projection {i}", record_property)

    # velocity and tap are of the network alone, given the raw latents as z_t
    velocity, _ = apply(params, latents, t, labels)
    tap = sit.apply(params, latents, t, labels, method="tap_tokens")
    reference.check(velocity, reference.nhwc(expected["velocity"]), rtol, "velocity", record_property)
    reference.check(tap, expected["tap_tokens"], rtol, "tap tokens", record_property)


@pytest.mark.parametrize("name", reference.cases("sit_"))
def test_alignment_gradient_on_the_latents(name, record_property):
    case = reference.load(name)
    sit, _, params, stats = load_sit(case)
    latents, t, labels, noise, targets = inputs(case)

    def loss(latents):
        z_t = interpolant.interpolate("linear", latent_norm.normalize(latents, stats), noise, t)
        return alignment_loss(sit.apply(params, z_t, t, labels, method="align"), targets)

    grad = jax.grad(loss)(latents)
    expected = reference.nhwc(case.arrays["grad_latents_align_only"])
    reference.check(grad, expected, reference.NETWORK_RTOL, "gradient on latents", record_property)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", reference.cases("sit_"))
def test_training_losses_gradients_and_statistics(name, remat, record_property):
    case = reference.load(name)
    sit, table, params, running = load_sit(case, remat)
    latents, t, labels, noise, targets = inputs(case)
    expected = case.arrays
    stats = batch_stats(latents)

    def losses(params):
        z = latent_norm.normalize(latents, stats)
        velocity, projections = sit.apply(params, interpolant.interpolate("linear", z, noise, t), t, labels)
        denoising = interpolant.mean_squared_velocity_error("linear", velocity, z, noise, t)
        alignment = alignment_loss(projections, targets)
        return denoising.mean() + 0.5 * alignment, (denoising, alignment)

    (loss, (denoising, alignment)), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    rtol = reference.LOSS_RTOL
    reference.check(denoising, expected["train_denoising_loss"], rtol, "denoising loss", record_property)
    check_alignment(alignment, expected["train_proj_loss"], "training")
    reference.check(loss, expected["train_loss"], rtol, "loss", record_property)

    updated = update_running(running, stats, latents.size // latents.shape[-1], case.meta["config"]["bn_momentum"])
    reference.check(updated.mean, expected["train_running_mean"], rtol, "running mean", record_property)
    reference.check(updated.var, expected["train_running_var"], rtol, "running var", record_property)

    grads = mapping.to_torch(table, {**grads, "latent_stats": {"mean": running.mean, "var": running.var}})
    largest = max(case.meta["grad_norms"].values())
    for weight, norm in case.meta["grad_norms"].items():
        # true zeros (key biases) are rounding noise on both sides: compare relative to the largest gradient
        assert abs(np.linalg.norm(grads[weight]) - norm) <= 1e-4 * norm + 1e-6 * largest, weight
    for key in (k for k in expected if k.startswith("grad:")):
        reference.check(grads[key[5:]], expected[key], 5e-5, key, record_property)


@pytest.mark.parametrize("name", reference.cases("sit_"))
def test_round_trip_is_the_identity(name):
    case = reference.load(name)
    _, table, params, stats = load_sit(case)
    back = mapping.to_torch(table, {**params, "latent_stats": {"mean": stats.mean, "var": stats.var}})
    assert set(back) == {*case.weights, "pos_embed"}
    for key, value in case.weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    np.testing.assert_allclose(back["pos_embed"], case.arrays["pos_embed"], atol=1e-6)


ARGS = (
    jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
    jnp.array([0.2, 0.7]),
    jnp.array([3, 10], jnp.int32),
)


def test_align_needs_nothing_past_the_tap():
    sit = SiT(**TINY)
    params = sit.init(jax.random.key(1), *ARGS)["params"]
    full = sit.apply({"params": params}, *ARGS)[1]
    cut = {name: value for name, value in params.items() if name not in ("late_blocks", "final_layer")}
    np.testing.assert_allclose(sit.apply({"params": cut}, *ARGS, method="align")[0], full[0], rtol=1e-5, atol=1e-6)
    flops = [
        jax.jit(lambda p, m=method: sit.apply({"params": p}, *ARGS, method=m)).lower(params).compile().cost_analysis()["flops"]
        for method in ("align", "__call__")
    ]
    assert flops[0] < flops[1]


def test_plain_sit_has_no_projector_and_no_late_stack():
    sit = SiT(**{**TINY, "encoder_depth": 4, "feature_dims": ()})
    params = sit.init(jax.random.key(1), *ARGS)["params"]
    assert set(params) == {"x_embedder", "pos_embed", "t_embedder", "y_embedder", "early_blocks", "final_layer"}
    assert sit.apply({"params": params}, *ARGS)[1] == ()


@pytest.mark.parametrize("learned", [False, True])
def test_positions_begin_as_sincos_and_move_only_if_learned(learned):
    sit = SiT(**TINY, learned_positions=learned)
    params = draw(abstract_tree(sit, 8)["params"])
    start = sit.init(jax.random.key(1), *ARGS)["params"]["pos_embed"]["table"]
    np.testing.assert_array_equal(start[0], sincos_position_embedding(32, 4, 4))
    grads = jax.grad(lambda params: jnp.square(sit.apply({"params": params}, *ARGS)[0]).sum())(params)
    assert bool(np.any(grads["pos_embed"]["table"])) == learned
    assert np.any(grads["x_embedder"]["kernel"])


def test_a_grid_on_its_side_gives_the_same_on_its_side():
    """Rows and columns are never mistaken: with positions and convolution turned, turned latents give turned results."""
    sit = SiT(**{**TINY, "patch_size": 1, "depth": 2, "encoder_depth": 1}, projector="conv")
    rng = np.random.default_rng(0)
    z, t, labels = rng.standard_normal((2, 4, 6, 4)).astype(np.float32), *ARGS[1:]
    params = draw(jax.eval_shape(sit.init, jax.random.key(1), z, t, labels))["params"]

    def turned(grid):
        return np.swapaxes(grid, 1, 2)

    table = turned(params["pos_embed"]["table"].reshape(1, 4, 6, -1)).reshape(1, 24, -1)
    conv = params["projectors_0"]["conv"]
    conv = {**conv, "kernel": np.swapaxes(conv["kernel"], 0, 1)}
    other = {**params, "pos_embed": {"table": table}, "projectors_0": {"conv": conv}}
    run = jax.jit(sit.apply)
    velocity, (projection,) = run({"params": params}, z, t, labels)
    velocity_turned, (projection_turned,) = run({"params": other}, turned(z), t, labels)
    np.testing.assert_allclose(turned(velocity_turned), velocity, atol=2e-5)
    back = turned(np.asarray(projection_turned).reshape(2, 6, 4, -1)).reshape(2, 24, -1)
    np.testing.assert_allclose(back, projection, atol=2e-5)
    assert np.abs(np.asarray(projection_turned) - projection).max() > 0.1


def test_initialisation_is_the_published_one():
    sit = SiT(**{**TINY, "hidden_size": 128})
    params = sit.init(jax.random.key(1), *ARGS)["params"]
    velocity, _ = sit.apply({"params": params}, *ARGS)
    assert not np.any(velocity), "the final layer starts at zero"
    bound = np.sqrt(6 / (4 * 128))
    for name in ("query", "key", "value"):
        kernel = params["early_blocks"]["attn"][name]["kernel"]
        assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.98 * bound
    assert not np.any(params["early_blocks"]["adaLN_modulation"]["kernel"])
    assert abs(np.std(params["y_embedder"]["embedding"]) - 0.02) < 2e-3
    assert abs(np.std(params["t_embedder"]["fc1"]["kernel"]) - 0.02) < 1e-3
    # xavier over the (D, p*p*C) view of the patch convolution
    embed = params["x_embedder"]["kernel"]
    np.testing.assert_allclose(np.abs(embed).max(), np.sqrt(6 / (128 + 16)), rtol=0.05)


def test_layers_of_a_stack_start_differently():
    params = SiT(**TINY).init(jax.random.key(1), *ARGS)["params"]
    kernel = params["early_blocks"]["mlp"]["fc1"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_depth": 5}, "encoder_depth=5 must lie in 1..depth=4"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**TINY, **change}).init(jax.random.key(0), *ARGS)


@pytest.mark.parametrize(
    "change, longest_time",
    [
        ({}, 1.0),
        ({"patch_size": 1, "feature_dims": (), "encoder_depth": 4}, 1.0),  # plain SiT
        ({"learned_sigma": True}, 1.0),
        ({"learned_sigma": True}, 999.0),  # DiT
    ],
)
def test_matches_the_dit_of_diffusers(change, longest_time, record_property):
    check_against_diffusers(SiT(**{**TINY, **change}), 4, longest_time, record_property)


def check_against_diffusers(sit, grid, longest_time, record_property):
    pytest.importorskip("diffusers")
    rng = np.random.default_rng(1)
    side = grid * sit.patch_size
    params = draw(abstract_tree(sit, side)["params"])
    z = rng.standard_normal((3, side, side, sit.latent_channels), np.float32)
    t = np.round(np.array([0.013, 0.617, 1.0]) * longest_time, 3 if longest_time == 1 else 0).astype(np.float32)
    labels = np.array([0, sit.num_classes - 1, sit.null_label], np.int32)
    expected = torch_sit(sit, params, grid)(z, t, labels)
    velocity, _ = jax.jit(sit.apply)({"params": params}, z, t, labels)
    assert velocity.shape == (3, side, side, (2 if sit.learned_sigma else 1) * sit.latent_channels)
    assert expected.dtype == velocity.dtype == np.float32
    reference.check(velocity, expected, reference.NETWORK_RTOL, f"velocity, t up to {longest_time}", record_property)


XL_2 = {
    "num_classes": 1000, "latent_channels": 4, "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "encoder_depth": 28,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("longest_time", [1.0, 999.0])
def test_full_size_matches_the_dit_of_diffusers(longest_time, record_property):
    check_against_diffusers(SiT(**XL_2, learned_sigma=True), 16, longest_time, record_property)


@pytest.mark.slow
def test_bfloat16_at_full_size_stays_close_to_float32(record_property):
    sit = SiT(**XL_2)
    params = draw(abstract_tree(sit, 32)["params"])
    z = np.random.default_rng(1).standard_normal((3, 32, 32, 4), np.float32)
    args = {"params": params}, z, np.float32([0.013, 0.617, 1.0]), np.array([0, 999, 1000])
    exact, rounded = (np.asarray(jax.jit(sit.clone(dtype=dtype).apply)(*args)[0]) for dtype in (jnp.float32, jnp.bfloat16))
    rms = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
    print(f"bfloat16: relative RMS {rms:.1e}, largest {reference.relative_error(rounded, exact):.1e} of the largest entry")
    record_property("bfloat16 relative RMS", rms)
    assert 1e-4 < rms < 0.1


def test_independent_implementation_lacks_qk_norm():
    with pytest.raises(ValueError, match="no qk_norm"):
        torch_sit(SiT(**TINY, qk_norm=True), {}, 4)


def test_learned_sigma_changes_only_the_last_layer():
    trees = [abstract_tree(SiT(**TINY, learned_sigma=learned), 8)["params"] for learned in (False, True)]
    shapes = [jax.tree.map(lambda x: x.shape, {**tree, "final_layer": None}) for tree in trees]
    assert shapes[0] == shapes[1]
    assert [tree["final_layer"]["linear"]["kernel"].shape for tree in trees] == [(32, 16), (32, 32)]
    # the first C channels are the velocity
    params = draw(trees[1])
    both, projections = SiT(**TINY, learned_sigma=True).apply({"params": params}, *ARGS)
    first = np.arange(32).reshape(4, 8)[:, :4].ravel()
    params["final_layer"]["linear"] = {k: x[..., first] for k, x in params["final_layer"]["linear"].items()}
    velocity, same = SiT(**TINY).apply({"params": params}, *ARGS)
    np.testing.assert_allclose(both[..., :4], velocity, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(projections[0], same[0])


def test_samples_do_not_see_the_learned_sigma():
    sit = SiT(**TINY, learned_sigma=True)
    vae = AutoencoderKL(latent_channels=4, channel_multipliers=(1,), channels=8, num_res_blocks=1, norm_groups=4)
    decoder = draw(jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 4)))["params"])
    sampling = Sampling(sampler="euler", steps=2, guidance_scale=2.0)
    nets, objective = Nets(vae, sit, None, None), interpolant.VelocityObjective("linear")
    make = jax.jit(generate.make_generate(nets, objective, (8, 8, 4), sampling))
    params = draw(abstract_tree(sit, 8)["params"])
    stats = ChannelStats(mean=jnp.zeros(4), var=jnp.ones(4))
    linear = params["final_layer"]["linear"]
    is_sigma = np.tile(np.arange(8) >= 4, 4)  # the second half of each pixel's channels

    def images(factor):
        last = {**params["final_layer"], "linear": {k: np.where(is_sigma, factor * x, x) for k, x in linear.items()}}
        tree = {"sit": {**params, "final_layer": last}, "vae": decoder, "latent_stats": stats}
        return make(tree, jnp.array([1, 2]), jnp.arange(2), jax.random.key(0))[0]

    np.testing.assert_array_equal(images(1.0), images(-3.0))
    assert len(np.unique(images(1.0))) > 20


@pytest.mark.parametrize("name", reference.cases("sit_patch"))
def test_mean_tokens_of_every_block(name):
    case = reference.load(name)
    sit, _, params, _ = load_sit(case)
    latents, t, labels, *_ = inputs(case)
    means = sit.apply(params, latents, t, labels, method="mean_tokens")
    assert means.shape == (sit.depth, len(latents), sit.hidden_size) and means.dtype == jnp.float32
    tap = sit.apply(params, latents, t, labels, method="tap_tokens")
    np.testing.assert_allclose(means[sit.encoder_depth - 1], tap.mean(axis=1), rtol=1e-5, atol=1e-6)
    # a network that ends after the block has it as its tap
    stacks = [params["params"][stack] for stack in ("early_blocks", "late_blocks")]
    whole = sit.clone(encoder_depth=sit.depth, feature_dims=())
    joined = {**params["params"], "early_blocks": jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)}
    last = whole.apply({"params": joined}, latents, t, labels, method="tap_tokens")
    np.testing.assert_allclose(means[-1], last.mean(axis=1), rtol=1e-5, atol=1e-6)
    of_whole = whole.apply({"params": joined}, latents, t, labels, method="mean_tokens")
    np.testing.assert_allclose(of_whole, means, rtol=1e-5, atol=1e-6)


def test_the_head_at_the_tap_changes_nothing_else():
    """All other parameters have their names and shapes; the head is a final layer on the tokens at the tap."""
    plain, sit = SiT(**TINY), SiT(**TINY, internal_head=True)
    z, t, labels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 4))), jnp.asarray([0.2, 0.9]), jnp.arange(2)
    trees = [jax.eval_shape(module.init, jax.random.key(0), z, t, labels)["params"] for module in (plain, sit)]
    assert trees[0] == {name: tree for name, tree in trees[1].items() if name != "internal_layer"}
    params = draw(trees[1])
    velocity, tap = with_tap(sit, params, z, t, labels)
    without = {name: tree for name, tree in params.items() if name != "internal_layer"}
    expected, projections = plain.apply({"params": without}, z, t, labels)
    np.testing.assert_array_equal(velocity, expected)
    np.testing.assert_array_equal(tap.projections, projections)
    assert with_tap(plain, without, z, t, labels)[1].output is None
    # all late blocks as identities: zero modulations leave the tokens as they are, and both final layers are the same
    late = {**params["late_blocks"], "adaLN_modulation": jax.tree.map(np.zeros_like, params["late_blocks"]["adaLN_modulation"])}
    same = {**params, "late_blocks": late, "internal_layer": params["final_layer"]}
    velocity, tap = with_tap(sit, same, z, t, labels)
    np.testing.assert_allclose(tap.output, velocity, atol=1e-5)


def _tiny_inputs():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 4)), jnp.float32)
    return z, jnp.asarray([0.2, 0.9]), jnp.arange(2)


def test_tokens_may_have_times_of_their_own():
    """The same time in all tokens is a time of the image, 1e-5; another time in one token changes that one most."""
    sit, (z, t, labels) = SiT(**TINY), _tiny_inputs()
    params = draw(jax.eval_shape(sit.init, jax.random.key(0), z, t, labels)["params"])
    apply = jax.jit(lambda times: sit.apply({"params": params}, z, times, labels))
    alike = jnp.broadcast_to(t[:, None, None], (2, 8, 8))
    velocity, projections = apply(alike)
    expected, of_image = apply(t)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(projections[0], of_image[0], rtol=1e-5, atol=1e-5)
    _, changed = apply(alike.at[0, 2:4, 6:8].set(0.9))  # token 1 x 4 + 3
    moved = np.abs(np.asarray(changed[0] - of_image[0])).max(axis=-1)
    assert moved[0].argmax() == 7 and moved[0, 7] > 1e-3 and moved[1].max() < 1e-5


@pytest.mark.parametrize("blocks", [3, 4])
def test_tokens_after_a_later_block_are_those_of_a_network_that_ends_there(blocks):
    sit, (z, t, labels) = SiT(**TINY), _tiny_inputs()
    params = draw(jax.eval_shape(sit.init, jax.random.key(0), z, t, labels)["params"])
    late = jax.tree.map(lambda leaf: leaf[: blocks - 2], params["late_blocks"])
    early = jax.tree.map(lambda *parts: jnp.concatenate(parts), params["early_blocks"], late)
    joined = {name: tree for name, tree in params.items() if name != "late_blocks"} | {"early_blocks": early}
    whole = sit.clone(encoder_depth=blocks, depth=blocks)
    expected = whole.apply({"params": joined}, z, t, labels, method="tap_tokens")
    tokens = sit.apply({"params": params}, z, t, labels, blocks, method="tokens_after")
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
