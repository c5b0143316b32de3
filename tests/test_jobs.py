"""The jobs beside REPA-E, and the options of all three: what each moves, and its numbers against the same written by hand.

Tolerances, relative to the largest entry: EXACT for two programs of the same float32 sums, 1e-4 where a ratio of norms is
meant.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import step_inputs
from sgd_jobs import BATCH, KEY, make_job, sgd

from configs import ldm, vae
from repae_jax import train_step
from repae_jax.diffusion import ddpm, interpolant, latent_norm
from repae_jax.distributed import sharding
from repae_jax.images import to_float
from repae_jax.job import build, frozen_weights
from repae_jax.losses import adversarial, alignment, reconstruction, regularizers
from repae_jax.models import encoders as features
from repae_jax.models.channel_stats import batch_stats
from repae_jax.models.sit import with_tap
from repae_jax.training.inputs import flip
from repae_jax.training.recipe import Optimizers
from repae_jax.training.rng import named_keys

EXACT = 2e-5
pytestmark = pytest.mark.integration



def make(file, arg="tiny", changes=None, **more):
    job = build.build(small.config(changes, file, arg, data__batch_size=BATCH, **more), jax.devices()[:1])
    return dataclasses.replace(job, tx=Optimizers(*(None if tx is None else sgd() for tx in job.tx)))


def batch_of(job, seed=0):
    size, rng = job.config["data"]["image_size"], np.random.default_rng(seed)
    images = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    return sharding.put_batch(job.mesh, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10})


def one_step(job, batch=None, state=None):
    """(state before, frozen, state after, metrics)."""
    state = small.random_state(job) if state is None else state
    frozen = frozen_weights.load_frozen(job)
    new, metrics = jax.jit(job.step)(state, batch_of(job) if batch is None else batch, frozen, KEY)
    assert new.skipped == 0 and all(np.isfinite(value) for value in metrics.values())
    return state, frozen, new, {name: float(value) for name, value in metrics.items()}


def close(actual, expected, tolerance=EXACT):
    error = small.largest_error(actual, expected)
    print(f"{error:.1e}")
    assert error < tolerance


def draws_of(job, step=0):
    return step_inputs.sample(KEY, step, job, BATCH)


def targets_of(job, frozen, images):
    return tuple(features.encode(e, params, images) for e, params in zip(job.encoders, frozen["encoders"]))


# ---- ldm ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sit_run():
    job = make(ldm)
    return job, *one_step(job)


def test_ldm_moves_sit_and_its_average_alone(sit_run):
    _, state, _, new, metrics = sit_run
    assert state.vae is None and state.disc is None and state.lecam is None
    moved = {name.split(".")[0] for name in small.differing(new, state)}
    assert moved == {"sit", "ema", "step"}
    assert small.differing(new.latent_stats, state.latent_stats) == []
    assert small.differing(new.ema.latent_stats, state.ema.latent_stats) == []
    assert {name for name in metrics if name.startswith("sit/")} == {"sit/loss", "sit/velocity", "sit/align"}


def test_ldm_is_the_second_half_of_repae(sit_run):
    """Its SiT phase has the same loss and gradient on REPA-E's VAE without batch norm."""
    _, _, _, _, metrics = sit_run
    job = make_job(diffusion__norm_momentum=0.0, sit__learned_positions=False)
    ldm_job, state, frozen, _, _ = sit_run
    joint = small.random_state(job)
    joint = joint.replace(
        sit=state.sit, vae=joint.vae.replace(params=frozen["vae"]), latent_stats=state.latent_stats, ema=state.ema
    )
    _, same = jax.jit(job.step)(joint, batch_of(job), frozen_weights.load_frozen(job), KEY)
    for name in ("sit/loss", "sit/velocity", "sit/align", "grad_norm/sit"):
        np.testing.assert_allclose(same[name], metrics[name], rtol=EXACT)


def moments_of(job, frozen, images):
    encode = jax.jit(lambda params, x: job.nets.vae.apply({"params": params}, to_float(x), method="encode"))
    posterior = encode(frozen["vae"], images)
    return np.concatenate([posterior.mean, posterior.std], axis=-1)


@pytest.mark.parametrize("flip_probability", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_cached_and_fresh_latents_give_the_same_step(sit_run, flip_probability):
    job, _, frozen, new, metrics = sit_run
    batch = batch_of(job)
    cached = moments_of(job, frozen, batch["image"])
    if flip_probability:
        job = make(ldm, data__flip_probability=flip_probability)
        _, _, new, metrics = one_step(job)
        cached = np.stack([cached, moments_of(job, frozen, batch["image"][:, :, ::-1])], axis=1)
    _, _, from_cache, same = one_step(job, {**batch, "moments": jnp.asarray(cached)})
    close(from_cache, new)
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=EXACT, atol=1e-6, err_msg=name)


def test_latents_are_drawn_anew_every_step(sit_run):
    job = sit_run[0]
    first, second = draws_of(job, 0), draws_of(job, 1)
    assert not np.array_equal(first.posterior_noise, second.posterior_noise)


def test_ldm_without_encoders_needs_no_images(sit_run):
    job = make(ldm, "tiny,encoder=none")
    assert job.encoders == () and not [name for name in small.leaves(small.random_state(job)) if "projector" in name]
    batch = batch_of(job)
    cached = jnp.asarray(moments_of(job, frozen_weights.load_frozen(job), batch["image"]))
    _, _, with_images, _ = one_step(job, batch)
    _, _, without, _ = one_step(job, {"label": batch["label"], "moments": cached})
    close(without, with_images)


def test_predicted_latents_by_hand():
    """Of times with a shift."""
    times = {"time_distribution": "lognormal", "time_mean": 0.8, "time_std": 0.8, "time_shift": 2.0}
    job = make(ldm, changes={f"diffusion.{name}": value for name, value in {"predicts": "data", **times}.items()})
    assert job.recipe.objective == interpolant.DataObjective(**times)
    state, frozen, _, metrics = one_step(job)
    batch, draws = batch_of(job), draws_of(job)
    without = dataclasses.replace(job.recipe, objective=dataclasses.replace(job.recipe.objective, time_shift=1.0))
    before = draws_of(dataclasses.replace(job, recipe=without)).t
    np.testing.assert_allclose(draws.t, 2 * before / (1 + before), rtol=1e-5)
    mean, std = np.split(moments_of(job, frozen, batch["image"]), 2, axis=-1)
    z = latent_norm.normalize(mean + std * draws.posterior_noise, state.latent_stats)
    labels = np.where(draws.label_drop, job.nets.sit.null_label, batch["label"])
    at = draws.t[:, None, None, None]
    output, _ = job.nets.sit.apply({"params": state.sit.params}, (1 - at) * z + at * draws.noise, draws.t, labels)
    expected = np.mean(((output - z) / np.maximum(at, 0.05)) ** 2)
    np.testing.assert_allclose(metrics["sit/velocity"], expected, rtol=EXACT)


def test_dit_by_hand():
    changes = {"sit.learned_sigma": True, "diffusion.path": "ddpm", "sampling.sampler": "ancestral"}
    weights = {"velocity": 0.0, "noise": 1.0, "bound": 1.0, "align": 0.5}
    job = make(ldm, changes={**changes, "loss.sit": weights})
    assert isinstance(job.recipe.objective, ddpm.NoiseObjective) and job.nets.sit.learned_sigma
    state, frozen, _, metrics = one_step(job)
    batch, draws = batch_of(job), draws_of(job)
    assert draws.t.dtype == jnp.int32 and draws.t.min() >= 0 and draws.t.max() > 1
    mean, std = np.split(moments_of(job, frozen, batch["image"]), 2, axis=-1)
    z = latent_norm.normalize(mean + std * draws.posterior_noise, state.latent_stats)
    labels = np.where(draws.label_drop, job.nets.sit.null_label, batch["label"])
    output, projections = job.nets.sit.apply(
        {"params": state.sit.params}, ddpm.q_sample(z, draws.noise, draws.t), draws.t, labels
    )
    c = z.shape[-1]
    np.testing.assert_allclose(metrics["sit/noise"], np.mean((output[..., :c] - draws.noise) ** 2), rtol=EXACT)
    bound = np.mean(ddpm.variational_bound(output, z, draws.noise, draws.t))
    np.testing.assert_allclose(metrics["sit/bound"], bound, rtol=1e-4)
    align = alignment.alignment_loss(projections, targets_of(job, frozen, batch["image"]))
    np.testing.assert_allclose(metrics["sit/align"], align, rtol=1e-4)
    expected = metrics["sit/noise"] + metrics["sit/bound"] + 0.5 * metrics["sit/align"]
    np.testing.assert_allclose(metrics["sit/loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_the_head_at_the_tap_by_hand(predicts):
    """Its loss is the squared error of its velocity, beside that of the whole network; both may predict latents."""
    job = make(ldm, changes={**small.SIT_ALONE, "loss.sit.internal": 0.25, "diffusion.predicts": predicts})
    state, frozen, new, metrics = one_step(job)
    batch, draws = batch_of(job), draws_of(job)
    mean, std = np.split(moments_of(job, frozen, batch["image"]), 2, axis=-1)
    z = latent_norm.normalize(mean + std * draws.posterior_noise, state.latent_stats)
    labels = np.where(draws.label_drop, job.nets.sit.null_label, batch["label"])
    z_t = interpolant.interpolate("linear", z, draws.noise, draws.t)
    whole, tap = with_tap(job.nets.sit, state.sit.params, z_t, draws.t, labels)
    least = np.maximum(draws.t, 0.05)[:, None, None, None]
    for name, output in (("velocity", whole), ("internal", tap.output)):
        error = output - (draws.noise - z) if predicts == "velocity" else (output - z) / least
        np.testing.assert_allclose(metrics[f"sit/{name}"], np.mean(error**2), rtol=EXACT)
    np.testing.assert_allclose(metrics["sit/loss"], metrics["sit/velocity"] + 0.25 * metrics["sit/internal"], rtol=1e-5)
    assert any(name.startswith("internal_layer") for name in small.differing(new.sit.params, state.sit.params))


@pytest.mark.parametrize("changes", [small.SIT_ALONE, {}], ids=["alone", "beside an encoder"])
def test_the_alignment_with_the_average_by_hand(changes):
    """Self-Flow's formula in numpy; the average, here another network, sees the image at the time of its cleanest token."""
    job = make(ldm, changes={**changes, **small.SELF_FLOW})
    state = small.random_state(job)
    state = state.replace(ema=state.ema.replace(params=jax.tree.map(lambda leaf: leaf * 0.9, state.sit.params)))
    _, frozen, new, metrics = one_step(job, state=state)
    batch, draws, sit = batch_of(job), draws_of(job), job.nets.sit
    t = np.asarray(draws.t)
    assert t.shape == (BATCH, *job.latent_shape[:2]) and any(len(np.unique(sample)) == 2 for sample in t)
    mean, std = np.split(moments_of(job, frozen, batch["image"]), 2, axis=-1)
    z = latent_norm.normalize(mean + std * draws.posterior_noise, state.latent_stats)
    labels = np.where(draws.label_drop, sit.null_label, batch["label"])
    mixed, least = t[..., None], t.min(axis=(1, 2))
    cleaner = least[:, None, None, None]
    output, projections = sit.apply({"params": state.sit.params}, (1 - mixed) * z + mixed * draws.noise, t, labels)
    target = sit.apply(
        {"params": state.ema.params}, (1 - cleaner) * z + cleaner * draws.noise, least, labels, 2, method="tokens_after"
    )
    assert len(projections) == 1 + len(job.encoders) and projections[-1].shape == target.shape
    a, b = (np.asarray(x, np.float64) for x in (projections[-1], target))
    cosines = np.sum(a * b, axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    np.testing.assert_allclose(metrics["sit/self"], -np.mean(cosines), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["sit/velocity"], np.mean((output - (draws.noise - z)) ** 2), rtol=EXACT)
    align = 0.5 * metrics.get("sit/align", 0.0)
    expected = metrics["sit/velocity"] + align + 0.25 * metrics["sit/self"]
    np.testing.assert_allclose(metrics["sit/loss"], expected, rtol=1e-5)
    assert any(name.startswith(f"projectors_{len(job.encoders)}") for name in small.differing(new.sit.params, state.sit.params))


@pytest.mark.parametrize("vae_every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_joint_training_takes_the_alignment_with_the_average(vae_every):
    """The encoder's alignment of both networks is without the projector to SiT's own tokens."""
    job = make_job(**{name.replace(".", "__"): value for name, value in {**small.SELF_FLOW, "vae_every": vae_every}.items()})
    state = small.random_state(job)
    for variant, _ in job.variants:
        new, metrics = jax.jit(variant.step)(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
        assert -1 <= metrics["sit/self"] <= 1 and np.isfinite(metrics["sit/loss"]) and new.skipped == 0


def test_networks_for_sampling_have_no_projector_to_their_own_tokens():
    config = small.config({**small.SIT_ALONE, **small.SELF_FLOW}, ldm)
    assert build.build(config).nets.sit.feature_dims == (32,)
    assert build.build(config, encoders=()).nets.sit.feature_dims == ()


# ---- vae ------------------------------------------------------------------------------------------------------------

VF = {"loss.vae.vf": 0.1, "loss.vf_margins": (0.1, 0.05)}
ADAPTIVE = {"loss.adaptive.gan": 1e4, "loss.adaptive.vf": 1e8, "loss.vae.gan": 0.5}


def tokenizer(changes):
    """A vae job at 8 pixels; VF's tokens are on the latents' grid."""
    encoder = "dinov2-base" if changes.get("loss.vae.vf") else "none"
    return make(vae, f"tiny,encoder={encoder}", {"ema_decay": 0.0, **changes})


def hand_terms(job, params, state, frozen):
    """Every term of the VAE's loss, unweighted, as functions of its parameters, and the latents."""
    batch, draws = batch_of(job), draws_of(job)
    images = to_float(batch["image"])

    def latents_of(params):
        return job.nets.vae.apply({"params": params}, images, method="encode").sample(draws.posterior_noise)

    def recon_of(params):
        return job.nets.vae.apply({"params": params}, latents_of(params), method="decode")

    def gan(params):
        variables = {"params": state.disc.params, "batch_stats": state.disc.batch_stats}
        return -jnp.mean(job.nets.disc.apply(variables, recon_of(params), mutable=["batch_stats"])[0])

    def vf(params):
        projected = latents_of(params) @ params["vf_projection"]["kernel"]
        return regularizers.vf_loss(projected, targets_of(job, frozen, batch["image"])[0], 0.1, 0.05)

    def kl(params):
        return reconstruction.kl(job.nets.vae.apply({"params": params}, images, method="encode"))

    return {"l1": lambda p: jnp.mean(jnp.abs(images - recon_of(p))), "gan": gan, "vf": vf, "kl": kl}


def test_a_tokenizer_moves_vae_discriminator_and_statistics():
    job = tokenizer({})
    state, _, new, metrics = one_step(job)
    assert state.sit is None and new.sit is None
    moved = {".".join(name.split(".")[:2]) for name in small.differing(new, state)}
    assert {"vae.params", "disc.params", "disc.batch_stats", "latent_stats.mean", "lecam.real", "ema.params"} <= moved
    assert small.differing(new.ema.params, new.vae.params) == []  # a decay of 0
    for name in ("vae/l1", "vae/kl", "vae/gan", "disc/hinge", "latents/std"):
        assert name in metrics


def test_the_adaptive_weights_are_ratios_of_gradients_at_the_last_layers():
    job = tokenizer({**VF, **ADAPTIVE})
    state, frozen, new, metrics = one_step(job)
    terms = hand_terms(job, None, state, frozen)
    params = state.vae.params
    gradients = {name: jax.jit(jax.grad(term))(params) for name, term in terms.items()}
    norm = np.linalg.norm
    decoder = {name: norm(tree["decoder"]["conv_out"]["kernel"]) for name, tree in gradients.items()}
    encoder = {name: norm(tree["encoder"]["conv_out"]["kernel"]) for name, tree in gradients.items()}
    weights = {
        "l1": 1.0, "kl": job.recipe.vae_weights["kl"],
        "gan": 0.5 * decoder["l1"] / (decoder["gan"] + 1e-4), "vf": 0.1 * encoder["l1"] / (encoder["vf"] + 1e-4),
    }  # fmt: skip
    for name in ("gan", "vf"):
        np.testing.assert_allclose(metrics[f"vae/weight_{name}"], weights[name], rtol=1e-4)
    # and the whole gradient is the weighted sum
    total = jax.tree.map(lambda *leaves: sum(w * x for w, x in zip(weights.values(), leaves)), *(gradients[n] for n in weights))
    np.testing.assert_allclose(metrics["grad_norm/vae"], np.sqrt(sum(norm(x) ** 2 for x in jax.tree.leaves(total))), rtol=1e-4)
    np.testing.assert_allclose(metrics["vae/loss"], sum(w * float(terms[n](params)) for n, w in weights.items()), rtol=1e-4)


def test_adaptive_weights_are_clipped():
    job = tokenizer({**VF, **ADAPTIVE, "loss.adaptive.gan": 1e-3, "loss.adaptive.vf": 1e-2})
    _, _, _, metrics = one_step(job)
    np.testing.assert_allclose([metrics["vae/weight_gan"], metrics["vae/weight_vf"]], [0.5e-3, 0.1e-2], rtol=1e-6)


@pytest.mark.parametrize(("scales", "side"), [pytest.param((), 8, marks=pytest.mark.slow), ((1.0, 0.5), 4)])
def test_summing_pixels_counts_those_that_are_there(scales, side):
    """EQ-VAE's transform makes them fewer; the metrics stay means."""
    changes = {"loss.pixel_reduction": "sum", "loss.vae.gan": 0.0, "loss.eq_scales": scales, "loss.eq_prior": 0.0}
    job = tokenizer(changes)
    _, _, _, metrics = one_step(job)
    expected = side * side * 3 * metrics["vae/l1"] + job.recipe.vae_weights["kl"] * metrics["vae/kl"]
    np.testing.assert_allclose(metrics["vae/loss"], expected, rtol=1e-5)
    assert metrics["vae/l1"] < 2


def test_before_its_start_the_adversarial_term_has_no_weight():
    changes = {**ADAPTIVE, "loss.gan_start": 3, "loss.adaptive.vf": 0.0}
    job = tokenizer(changes)
    _, _, _, metrics = one_step(job)
    assert metrics["vae/weight_gan"] == 0 and metrics["disc/hinge"] == 0
    state = small.random_state(job)
    _, _, _, metrics = one_step(job, state=state.replace(step=jax.device_put(jnp.int32(3), state.step.sharding)))
    assert metrics["vae/weight_gan"] > 0 and metrics["disc/hinge"] > 0


def test_the_discriminator_alone():
    job = tokenizer({"init.vae": "random", **{f"loss.vae.{name}": 0.0 for name in ("l1", "lpips", "kl", "gan")}})
    state, frozen, new, metrics = one_step(job)
    assert state.vae is None and state.ema is None
    moved = {name.split(".")[0] for name in small.differing(new, state)}
    assert moved == {"disc", "lecam", "latent_stats", "step"}
    images, draws = to_float(batch_of(job)["image"]), draws_of(job)
    latents = job.nets.vae.apply({"params": frozen["vae"]}, images, method="encode").sample(draws.posterior_noise)
    recon = job.nets.vae.apply({"params": frozen["vae"]}, latents, method="decode")

    def logits(x):
        variables = {"params": state.disc.params, "batch_stats": state.disc.batch_stats}
        return job.nets.disc.apply(variables, x, mutable=["batch_stats"])[0]

    np.testing.assert_allclose(metrics["disc/loss"], adversarial.hinge_loss(logits(images), logits(recon)), rtol=1e-4)
    assert not [name for name in metrics if name.startswith("vae/")]


# ---- options --------------------------------------------------------------------------------------------------------


def test_equivariance_compares_transformed_images():
    """The drawn scale and rotation, found again from the key, give the reported loss."""
    job = tokenizer({"loss.eq_scales": (1.0, 0.5), "loss.eq_prior": 0.0, "loss.vae.gan": 0.0})
    state, _, _, metrics = one_step(job)
    drawn = regularizers.draw_transform(named_keys(KEY, 0, "transform")["transform"], (1.0, 0.5), 0.0)
    assert drawn.scale_index == 1 and drawn.quarter_turns in (1, 2, 3)
    images, draws, turns = to_float(batch_of(job)["image"]), draws_of(job), int(drawn.quarter_turns)
    apply = lambda *args, **kwargs: job.nets.vae.apply({"params": state.vae.params}, *args, **kwargs)  # noqa: E731
    latents = apply(images, method="encode").sample(draws.posterior_noise)
    changed = [np.rot90(regularizers.downscale(x, 0.5), -turns, axes=(1, 2)) for x in (latents, images)]
    recon = apply(jnp.asarray(changed[0]), method="decode")
    assert recon.shape == (BATCH, 4, 4, 3)
    np.testing.assert_allclose(metrics["vae/l1"], np.mean(np.abs(changed[1] - recon)), rtol=1e-5)


@pytest.mark.slow
def test_equivariance_with_a_prior_of_one_is_the_plain_step():
    changes = {"loss.vae.gan": 0.0}  # no discriminator sees 4 x 4 pixels
    plain = one_step(tokenizer(changes))
    prior = one_step(tokenizer({"loss.eq_scales": (1.0, 0.5), "loss.eq_prior": 1.0, **changes}))
    close(prior[2], plain[2])


def test_scale_equivariance_by_hand():
    job = tokenizer({"loss.vae.se": 0.25, "loss.se_factors": (2, 4), "loss.vae.gan": 0.0})
    state, _, _, metrics = one_step(job)
    images, draws = to_float(batch_of(job)["image"]), draws_of(job)
    apply = lambda *args, **kwargs: job.nets.vae.apply({"params": state.vae.params}, *args, **kwargs)  # noqa: E731
    latents = apply(images, method="encode").sample(draws.posterior_noise)
    small_ones = [(regularizers.downscale(images, 1 / f), regularizers.downscale(latents, 1 / f)) for f in (2, 4)]
    expected = np.mean([np.mean(np.abs(image - apply(z, method="decode"))) for image, z in small_ones])
    np.testing.assert_allclose(metrics["vae/se"], expected, rtol=5e-5)  # measured: 2e-5
    weights = job.recipe.vae_weights
    loss = weights["l1"] * metrics["vae/l1"] + weights["kl"] * metrics["vae/kl"] + 0.25 * expected
    np.testing.assert_allclose(metrics["vae/loss"], loss, rtol=1e-5)


def test_without_stop_gradient_the_diffusion_loss_reaches_the_vae():
    """The term is SiT's own loss, through the statistics of the batch; its gradient is the one of the loss written by hand."""
    job = make_job(changes={"loss.vae": {"diffusion": 1.0}})
    state = small.random_state(job)
    new, metrics = jax.jit(job.step)(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
    images, draws, labels = to_float(batch_of(job)["image"]), draws_of(job), batch_of(job)["label"]

    def loss(params):
        latents = job.nets.vae.apply({"params": params}, images, method="encode").sample(draws.posterior_noise)
        z = latent_norm.normalize(latents, batch_stats(latents))
        z_t = interpolant.interpolate("linear", z, draws.noise, draws.t)
        dropped = jnp.where(draws.label_drop, job.nets.sit.null_label, labels)
        velocity, _ = job.nets.sit.apply({"params": state.sit.params}, z_t, draws.t, dropped)
        return jnp.mean(jnp.square(velocity - (draws.noise - z)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.vae.params)
    np.testing.assert_allclose(metrics["vae/diffusion"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["vae/diffusion"], metrics["sit/velocity"], rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm/vae"], norm, rtol=1e-4)
    assert norm > 0 and small.differing(new.vae.params["encoder"], state.vae.params["encoder"])


def test_without_batch_norm_the_statistics_stay():
    job = make_job(diffusion__norm_momentum=0.0)
    state, _, new, metrics = one_step(job)
    assert small.differing(new.latent_stats, state.latent_stats) == []
    assert "latents/running_std" not in metrics and "latents/std" in metrics
    assert small.differing(new.ema.latent_stats, state.ema.latent_stats) == []


@pytest.mark.parametrize(
    ("shape", "values"),
    [("constant", (1, 1, 1, 0, 0)), ("linear", (1, 0.75, 0.25, 0, 0)), ("cosine", (1, 0.853553, 0.146447, 0, 0))],
)
def test_alignment_schedules(shape, values):
    steps = jnp.array([0, 25, 75, 100, 200])
    np.testing.assert_allclose([alignment.schedule_factor(step, shape, 100) for step in steps], values, atol=1e-6)


def test_the_alignment_ends_in_both_phases():
    job = make_job(loss__align_end=2)
    state = small.random_state(job)
    at = lambda step: state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))  # noqa: E731
    run, frozen, batch = jax.jit(job.step), frozen_weights.load_frozen(job), batch_of(job)
    _, before = run(at(1), batch, frozen, KEY)
    _, after = run(at(2), batch, frozen, KEY)
    for name, terms in (("vae", ("l1", "kl", "gan")), ("sit", ("velocity",))):
        weights = getattr(job.recipe, f"{name}_weights")
        rest = [sum(weights[term] * metrics[f"{name}/{term}"] for term in terms) for metrics in (before, after)]
        np.testing.assert_allclose(after[f"{name}/loss"], rest[1], rtol=1e-5)
        np.testing.assert_allclose(before[f"{name}/loss"] - rest[0], weights["align"] * before[f"{name}/align"], rtol=1e-3)


def test_flips_mirror_images_for_all_who_see_them():
    rng = np.random.default_rng(0)
    images, moments = rng.integers(0, 256, (64, 4, 4, 3), np.uint8), rng.random((64, 2, 2, 2, 4))
    batch = {"image": images, "label": np.arange(64), "moments": moments}
    flipped = flip(batch, KEY, 0, 0.5)
    mirrored = [not np.array_equal(a, b) for a, b in zip(flipped["image"], batch["image"])]
    assert 16 < sum(mirrored) < 48
    for i, is_mirrored in enumerate(mirrored):
        np.testing.assert_array_equal(flipped["image"][i], batch["image"][i, :, ::-1] if is_mirrored else batch["image"][i])
        np.testing.assert_array_equal(flipped["moments"][i], batch["moments"][i, int(is_mirrored)].astype(np.float32))
    again = flip(batch, KEY, 1, 0.5)
    assert not np.array_equal(again["image"], flipped["image"])


def test_several_encoders_share_the_loss():
    architecture = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    encoder = {"architecture": architecture, "weights": "random", "image_size": 8, "spatial_gamma": None}
    other = {**encoder, "architecture": {**encoder["architecture"], "hidden_size": 24}, "spatial_gamma": 0.6}
    job = make_job(changes={"encoders": {"a": encoder, "b": other}}, sit__projector="conv")
    assert job.nets.sit.feature_dims == (16, 24)
    state, frozen, _, metrics = one_step(job)
    assert state.sit.params["projectors_1"]["conv"]["kernel"].shape == (3, 3, 32, 24)
    targets = targets_of(job, frozen, batch_of(job)["image"])
    assert abs(float(jnp.mean(jnp.std(targets[1], axis=1, ddof=1))) - 1) < 1e-3  # normalised over the positions
    assert -1 <= metrics["sit/align"] <= 1


def test_fixed_parts_stay():
    config = small.config({"optim.vae.fixed": ("encoder", "quant_conv")}, vae, data__batch_size=BATCH)
    job = build.build(config, jax.devices()[:1])
    state, _, new, metrics = one_step(job)
    moved = {name.split(".")[0] for name in small.differing(new.vae.params, state.vae.params)}
    assert moved == {"decoder", "post_quant_conv"}
    whole = one_step(tokenizer({}))[3]["grad_norm/vae"]
    assert 0 < metrics["grad_norm/vae"] < whole  # norm of the parts that move


# ---- a further loss -------------------------------------------------------------------------------------------------


def edges(v):
    """A loss term as a contributor would write it: horizontal differences of images and reconstructions."""
    return jnp.mean(jnp.abs(jnp.diff(v.x.images, axis=2) - jnp.diff(v.recon, axis=2)))


def test_a_further_loss_is_a_function_and_a_table_entry(monkeypatch):
    monkeypatch.setitem(train_step.VAE_TERMS, "edges", edges)
    monkeypatch.setitem(train_step.SIT_TERMS, "size", lambda s: jnp.mean(jnp.square(s.tap.projections[0])))
    job = make_job(changes={"loss.vae.edges": 0.5, "loss.sit.size": 0.25})
    _, _, _, metrics = one_step(job)
    for name, further in (("vae", "edges"), ("sit", "size")):
        weights = getattr(job.recipe, f"{name}_weights")
        assert metrics[f"{name}/{further}"] > 0 and weights[further] > 0
        expected = sum(weight * metrics[f"{name}/{term}"] for term, weight in weights.items())
        np.testing.assert_allclose(metrics[f"{name}/loss"], expected, rtol=1e-5)
