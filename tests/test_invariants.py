"""Invariants of every step, whatever the numbers: who gets which gradient, which statistics move, where it may run.

Tolerances, relative to the largest entry of an array: FLOAT is for the same float32 sums in another order (other devices,
micro-batches, another program).
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import step_inputs
from sgd_jobs import BATCH, KEY, make_job, sgd

from configs import ldm
from repae_jax import train_step
from repae_jax.diffusion import interpolant
from repae_jax.distributed import sharding
from repae_jax.images import to_float
from repae_jax.job import build, compilation, frozen_weights, initial_state
from repae_jax.models.channel_stats import batch_stats, update_running
from repae_jax.training import inputs
from repae_jax.training.accumulation import accumulate
from repae_jax.training.inputs import Inputs
from repae_jax.training.networks import bind
from repae_jax.training.recipe import Recipe
from repae_jax.training.state import apply_update, update_ema

FLOAT = 5e-5  # measured: 6e-6 after two steps
pytestmark = pytest.mark.integration
MOVING = {"step", "skipped", "skipped_in_a_row"}



def take_step(job, state, x, hyper=None):
    """`repae_step` on given inputs; `hyper` are fields of the recipe."""
    bound = SimpleNamespace(nets=bind(job.nets), tx=job.tx)
    return step_inputs.repae_step(bound, state, x, {"lpips": None}, dataclasses.replace(job.recipe, **(hyper or {})))


def make_update(job):
    """Jitted step; the weights and the start of the GAN are arguments, so that one program serves all values."""
    return jax.jit(functools.partial(take_step, job))


def inputs_of(job, seed=0):
    """Random inputs of a step, as numpy."""
    rng = np.random.default_rng(seed)
    size, (h, w, c) = job.config["data"]["image_size"], job.latent_shape
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Inputs(
        images=rng.uniform(-1, 1, (BATCH, size, size, 3)).astype(np.float32),
        labels=rng.integers(0, 10, BATCH).astype(np.int32),
        targets=tuple(normal(BATCH, e.grid**2, e.module.hidden_size) for e in job.encoders),
        posterior_noise=normal(BATCH, h, w, c),
        t=rng.uniform(0.05, 0.95, BATCH).astype(np.float32),
        noise=normal(BATCH, h, w, c),
        label_drop=rng.uniform(size=BATCH) < 0.3,
    )


def hyper_of(job, vae=None, sit=None, **other):
    hyper = {
        "vae_weights": {**job.recipe.vae_weights, **(vae or {})},
        "sit_weights": {**job.recipe.sit_weights, **(sit or {})},
        "gan_start": 0,
        "lecam_weight": 0.1,
        **other,
    }
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if isinstance(x, int) else np.float32), hyper)


@pytest.fixture(scope="module")
def base():
    """One step on one device: .job, .state, .inputs, .run(**changes) -> (state, metrics)."""
    job = make_job()
    update, state, inputs = make_update(job), small.random_state(job), inputs_of(job)

    def run(state=state, hyper=None, inputs=inputs, **changes):
        args = (state, inputs.replace(**changes), hyper or hyper_of(job))
        return update(*jax.device_put(args, sharding.replicated(job.mesh)))  # always the same kind: compiled once

    new, metrics = run()
    return SimpleNamespace(job=job, state=state, inputs=inputs, run=run, new=new, metrics=metrics)


@pytest.fixture(scope="module")
def latents(base):
    encode = jax.jit(lambda params, images: base.job.nets.vae.apply({"params": params}, images, method="encode"))
    posterior = encode(base.state.vae.params, base.inputs.images)
    return np.asarray(posterior.sample(base.inputs.posterior_noise), np.float64)


# ---- who gets which gradient ----------------------------------------------------------------------------------------


def test_the_random_state_moves_everywhere(base):
    """Otherwise "unchanged" would mean nothing."""
    changed = small.differing(base.new, base.state)
    still = [name for name in small.leaves(base.state) if name not in changed and ".params." in name]
    assert all(name.endswith((".k.bias", ".key.bias")) for name in still), still  # softmax takes a shift of all keys off again
    assert all(np.isfinite(value) for value in base.metrics.values())


@pytest.mark.parametrize(
    "change",
    [
        {"hyper": {"sit": {"velocity": 100.0}}},
        {"hyper": {"sit": {"velocity": 0.0}}},
        {"hyper": {"sit": {"align": 7.0}}},
        {"label_drop": np.ones(BATCH, bool)},
        {"sit": "late_blocks"},
        {"sit": "final_layer"},
    ],
    ids=["velocity x 100", "velocity 0", "align 7", "all labels dropped", "other late blocks", "other head"],
)
def test_the_sit_phase_gives_the_vae_and_the_discriminator_nothing(base, change):
    state = base.state
    if "sit" in change:
        params = dict(state.sit.params)
        params[change["sit"]] = jax.tree.map(lambda x: 1.5 * x, params[change["sit"]])
        state = state.replace(sit=state.sit.replace(params=params))
    hyper = hyper_of(base.job, **change["hyper"]) if "hyper" in change else None
    inputs = {name: value for name, value in change.items() if name == "label_drop"}
    new, metrics = base.run(state=state, hyper=hyper, **inputs)
    assert small.differing((new.vae, new.disc, new.lecam, new.latent_stats),
                           (base.new.vae, base.new.disc, base.new.lecam, base.new.latent_stats)) == []  # fmt: skip
    assert small.differing(new.sit, base.new.sit)
    assert all(metrics[name] == base.metrics[name] for name in metrics if name.startswith(("vae/", "disc/")))


@pytest.mark.parametrize("weight", [0.0, 50.0])
def test_the_vae_phase_alignment_gives_sit_nothing(base, weight):
    new, metrics = base.run(hyper=hyper_of(base.job, vae={"align": weight}))
    assert small.differing((new.sit, new.ema, new.latent_stats, new.disc),
                           (base.new.sit, base.new.ema, base.new.latent_stats, base.new.disc)) == []  # fmt: skip
    assert metrics["grad_norm/sit"] == base.metrics["grad_norm/sit"]
    assert metrics["grad_norm/vae"] != base.metrics["grad_norm/vae"]
    assert small.differing(new.vae, base.new.vae)


def test_the_gradient_of_the_whole_sit_loss_by_the_vae_is_exactly_zero(base):
    def terms(vae_params):
        state = base.state.replace(vae=base.state.vae.replace(params=vae_params))
        return take_step(base.job, state, base.inputs)[1]

    gradient = jax.jit(jax.grad(lambda params: terms(params)["sit/loss"]))(base.state.vae.params)
    assert not any(np.any(leaf) for leaf in small.leaves(gradient).values())


# ---- what the two passes share, and what not ------------------------------------------------------------------------


def test_both_passes_see_the_same_t_and_noise(base, latents):
    """The two alignments are one number if the running statistics are the batch's own and no label is dropped."""
    stats = base.state.latent_stats.replace(
        mean=jnp.asarray(latents.mean((0, 1, 2)), jnp.float32), var=jnp.asarray(latents.var((0, 1, 2)), jnp.float32)
    )
    kept = {"label_drop": np.zeros(BATCH, bool)}
    _, same = base.run(state=base.state.replace(latent_stats=stats), **kept)
    assert abs(same["vae/align"] - same["sit/align"]) < 1e-6
    for other in ({"t": base.inputs.t[::-1].copy()}, {"noise": -base.inputs.noise}):
        _, metrics = base.run(state=base.state.replace(latent_stats=stats), **kept, **other)
        assert abs(metrics["vae/align"] - same["vae/align"]) > 1e-4
        assert abs(metrics["vae/align"] - metrics["sit/align"]) < 1e-6


def test_both_passes_interpolate_with_the_same_arrays(base, monkeypatch):
    seen, original = [], interpolant.interpolate

    def record(path, z, noise, t):
        seen.append((noise, t))
        return original(path, z, noise, t)

    monkeypatch.setattr(interpolant, "interpolate", record)
    jax.eval_shape(lambda x: take_step(base.job, base.state, x)[1], base.inputs)
    assert len(seen) == 2
    assert seen[0][0] is seen[1][0] and seen[0][1] is seen[1][1]


def test_label_dropout_acts_in_the_sit_phase_alone(base):
    none, every = (base.run(label_drop=np.full(BATCH, drop))[1] for drop in (False, True))
    assert none["vae/align"] == every["vae/align"]
    assert none["sit/align"] != every["sit/align"] and none["sit/velocity"] != every["sit/velocity"]
    _, null = base.run(labels=np.full(BATCH, 10, np.int32))
    assert null["sit/velocity"] == every["sit/velocity"]  # a dropped label is the null label
    assert null["vae/align"] != none["vae/align"]  # the VAE phase sees the labels


def test_running_statistics_in_the_vae_phase_batch_statistics_in_the_sit_phase(base):
    stats = jax.tree.map(lambda x: x + 0.5, base.state.latent_stats)
    new, metrics = base.run(state=base.state.replace(latent_stats=stats))
    assert metrics["vae/align"] != base.metrics["vae/align"]
    assert all(metrics[f"sit/{name}"] == base.metrics[f"sit/{name}"] for name in ("loss", "velocity", "align"))
    assert small.differing(new.sit, base.new.sit) == []


def test_the_running_statistics_move_by_torchs_rule(base, latents):
    old, n = base.state.latent_stats, latents.size // latents.shape[-1]
    mean, var = latents.mean((0, 1, 2)), latents.var((0, 1, 2)) * n / (n - 1)
    np.testing.assert_allclose(base.new.latent_stats.mean, 0.9 * np.float64(old.mean) + 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(base.new.latent_stats.var, 0.9 * np.float64(old.var) + 0.1 * var, rtol=1e-5)


def test_the_averages_follow_parameters_and_statistics(base):
    decay = base.job.recipe.ema_decay
    state = base.state.replace(ema=jax.tree.map(lambda x: x + 1, base.state.ema))
    new, _ = base.run(state=state)
    expected = jax.tree.map(
        lambda old, x: decay * np.float64(old) + (1 - decay) * np.float64(x),
        (state.ema.params, state.ema.latent_stats), (new.sit.params, new.latent_stats),
    )  # fmt: skip
    assert small.largest_error((new.ema.params, new.ema.latent_stats), expected) < 1e-6


def test_the_published_order_gives_the_same_step(base):
    """VAE, then discriminator, then SiT, each updated before the next one's loss, from tensors made before any update."""
    nets, tx, recipe = bind(base.job.nets), base.job.tx, dataclasses.replace(base.job.recipe, lecam_weight=0.1)
    options = {"nets": nets, "recipe": recipe}

    def grad_of(loss, params, x, carry, **more):
        return jax.grad(functools.partial(loss, **options, **more), has_aux=True)(params, x, carry)

    def loop(state, x):
        vae = {"state": state, "frozen": {"lpips": None}, "weights": recipe.vae_weights}
        grads, aux = grad_of(train_step.vae_loss, state.vae.params, x, state.disc.batch_stats, **vae)
        state = state.replace(vae=apply_update(state.vae, grads, tx.vae))
        (latents, recon), stats = aux.rows, aux.carry
        x = x.replace(latents=latents, recon=recon)
        grads, aux = grad_of(train_step.disc_loss, state.disc.params, x, (stats, state.lecam), gan_factor=1.0)
        running, lecam = aux.carry
        state = state.replace(disc=apply_update(state.disc, grads, tx.disc).replace(batch_stats=running), lecam=lecam)
        stats = batch_stats(latents)
        count = latents.size // latents.shape[-1]
        state = state.replace(latent_stats=update_running(state.latent_stats, stats, count, 0.1))
        grads, _ = grad_of(train_step.sit_loss, state.sit.params, x, None, stats=stats, weights=recipe.sit_weights)
        state = state.replace(sit=apply_update(state.sit, grads, tx.sit))
        ema = update_ema(state.ema, state.sit.params, state.latent_stats, recipe.ema_decay)
        return state.replace(ema=ema, step=state.step + 1)

    sequential = jax.jit(loop)(base.state, base.inputs)
    error = small.largest_error(sequential, base.new)
    print(f"published order: {error:.1e}")
    assert error < FLOAT


# ---- where it runs --------------------------------------------------------------------------------------------------


def two_steps(job, state, update):
    """State and metrics of two steps, on the job's mesh."""
    for seed in (0, 1):
        state, metrics = update(state, sharding.put_batch(job.mesh, inputs_of(job, seed)), hyper_of(job))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def one_device(base):
    return base.run(state=base.new, inputs=inputs_of(base.job, 1))


@pytest.mark.parametrize("fsdp", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 8])
def test_eight_devices_equal_one(base, one_device, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    job = make_job(8, mesh__fsdp=fsdp)
    state = small.random_state(job)
    assert small.differing(state, base.state) == []
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = sharding.with_mesh_context(job.mesh, make_update(job))
    update = jax.jit(update, out_shardings=(shardings, sharding.replicated(job.mesh)))
    update = update.lower(state, sharding.put_batch(job.mesh, inputs_of(job, 0)), hyper_of(job)).compile()
    new, metrics = two_steps(job, state, update)
    error = small.largest_error(new, one_device[0])
    error_metrics = small.largest_error(metrics, one_device[1])
    print(f"fsdp={fsdp}: state {error:.1e}, metrics {error_metrics:.1e}")
    assert error < FLOAT and error_metrics < FLOAT

    # really sharded: all but the smallest arrays are cut, of parameters, optimizer state and averages
    for tree in (state.vae, state.disc.params, state.sit, state.ema.params):
        held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))
        total = sum(leaf.size for leaf in jax.tree.leaves(tree))
        assert held == total if fsdp == 1 else held < (1 / fsdp + 0.06) * total, (held, total)

    check_gathers(update.as_text(), fsdp)


def check_gathers(text, fsdp):
    """Parameters are unsharded where they are used, never the images, latents or activations that they meet."""
    unsharded = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    assert bool(unsharded) == (fsdp > 1)
    assert not [shape for shape in unsharded if "," in shape and int(shape.split(",")[0]) == BATCH]


def test_no_activations_are_gathered_in_the_step_of_training(monkeypatch):
    """The program that `train`, `benchmark` and `plan` compile."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    job = build.build(small.config(file=ldm, data__batch_size=BATCH, mesh__fsdp=8))
    state = initial_state.abstract_state(job)
    check_gathers(compilation.jit_step(job, state).lower(state, *compilation.abstract_inputs(job)).compile().as_text(), 8)


def test_eight_devices_and_two_half_batches_align_with_the_average_as_one(monkeypatch):
    """Self-Flow's term reads a part of a stack whose parameters are cut; times of tokens are cut with the batch."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)
    after = []
    for devices, accumulation in ((1, 1), (8, 1), (1, 2)):
        changes = {**small.SIT_ALONE, **small.SELF_FLOW, "data.batch_size": BATCH, "mesh.fsdp": devices}
        changes["accumulation"] = accumulation
        job = build.build(small.config(changes, ldm), jax.devices()[:devices])
        job = dataclasses.replace(job, tx=job.tx._replace(sit=sgd()))
        batch = sharding.put_batch(job.mesh, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10})
        inputs = small.random_state(job), batch, frozen_weights.load_frozen(job), KEY
        step = compilation.jit_step(job, inputs[0]).lower(*inputs).compile()
        check_gathers(step.as_text(), devices)
        after.append(jax.device_get(step(*inputs)))
    errors = [small.largest_error(other, after[0]) for other in after[1:]]
    print(f"state and metrics {errors}")
    assert max(errors) < FLOAT


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accumulated(base):
    job = make_job(accumulation=2)
    update = make_update(job)

    def run(**hyper):
        args = (base.state, base.inputs, hyper_of(job, **hyper))
        return update(*jax.device_put(args, sharding.replicated(job.mesh)))

    return run


def test_two_half_batches_equal_one_batch_without_a_gan(base, accumulated):
    """SiT included: its latent batch norm has the statistics of the whole batch."""
    none = {"vae": {"gan": 0.0}}
    (new, metrics), (expected, expected_metrics) = accumulated(**none), base.run(hyper=hyper_of(base.job, **none))
    kept = [(s.vae, s.sit, s.ema, s.latent_stats) for s in (new, expected)]
    error = small.largest_error(*kept)
    print(f"accumulation: {error:.1e}")
    assert error < FLOAT
    for name in metrics:
        if not name.startswith("disc/") and name not in ("vae/gan", "grad_norm/disc"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_under_accumulation_only_the_discriminators_terms_may_differ(base, accumulated):
    """Its batch norm sees half batches, as it would in torch; the running averages then move twice as often."""
    new, metrics = accumulated()
    for name in ("vae/l1", "vae/kl", "vae/align", "sit/loss", "sit/velocity", "sit/align", "grad_norm/sit"):
        np.testing.assert_allclose(metrics[name], base.metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert (
        small.largest_error((new.sit, new.ema, new.latent_stats), (base.new.sit, base.new.ema, base.new.latent_stats)) < FLOAT
    )
    # near enough to be the same loss, yet not the same
    np.testing.assert_allclose(metrics["disc/loss"], base.metrics["disc/loss"], rtol=0.2)
    assert abs(metrics["disc/loss"] - base.metrics["disc/loss"]) > 1e-5


def test_micro_batches_come_back_in_order():
    rows = jnp.arange(12).reshape(6, 2)
    carry, means, back = accumulate(lambda c, x: (c + 1, x.astype(float).mean(), x), 0, rows, 3)
    assert carry == 3 and means == rows.mean() and np.array_equal(back, rows)


# ---- not finite -----------------------------------------------------------------------------------------------------


def with_nan(tree):
    return jax.tree.map(lambda x: np.full_like(x, np.nan), tree)


@pytest.mark.parametrize("poison", ["images", "targets", "t", "velocity overflows", "gradient overflows", "discriminator"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(base, poison):
    change = {
        "images": lambda: {"images": with_nan(base.inputs.images)},
        "targets": lambda: {"targets": with_nan(base.inputs.targets)},
        "t": lambda: {"t": np.where(np.arange(BATCH) == 3, np.inf, base.inputs.t)},
        "velocity overflows": lambda: {"hyper": hyper_of(base.job, sit={"velocity": np.inf})},
        "gradient overflows": lambda: {"hyper": hyper_of(base.job, sit={"velocity": 1e37})},  # the loss itself is finite
        "discriminator": lambda: {"hyper": hyper_of(base.job, lecam_weight=np.inf)},
    }[poison]()
    state = base.state.replace(step=jnp.int32(7), skipped=jnp.int32(2), skipped_in_a_row=jnp.int32(1))
    new, metrics = base.run(state=state, **change)
    assert set(small.differing(new, state)) == MOVING
    assert (new.step, new.skipped, new.skipped_in_a_row) == (8, 3, 2)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (3, 2)
    bad = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert any(name.endswith("/loss") or name.startswith("grad_norm/") for name in bad)
    if poison == "gradient overflows":
        assert bad == {"grad_norm/sit"}

    good, _ = base.run(state=new)
    assert (good.step, good.skipped, good.skipped_in_a_row) == (9, 3, 0)
    assert set(small.differing(good, base.new)) == {"step", "skipped"}  # as if nothing had happened


# ---- other recipes --------------------------------------------------------------------------------------------------


def test_the_gan_waits_for_its_start(base):
    _, before = base.run(hyper=hyper_of(base.job, gan_start=5))
    without = before["vae/loss"] - (base.metrics["vae/loss"] - 0.1 * base.metrics["vae/gan"])
    assert abs(without) < 1e-6 and before["disc/hinge"] == 0
    _, at = base.run(state=base.state.replace(step=jnp.int32(5)), hyper=hyper_of(base.job, gan_start=5))
    assert at["vae/gan"] == base.metrics["vae/gan"] != 0 and at["disc/hinge"] == base.metrics["disc/hinge"] > 0


def batch_of(job):
    size, rng = job.config["data"]["image_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    return sharding.put_batch(job.mesh, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10})


@pytest.mark.slow
def test_without_gan_on_the_cosine_path_with_lognormal_times():
    job = make_job(loss__vae__gan=0.0, diffusion__path="cosine", diffusion__time_distribution="lognormal")
    state = small.random_state(job)
    assert job.nets.disc is None and state.disc is None and state.lecam is None
    new, metrics = jax.jit(job.step)(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
    assert new.disc is None and new.lecam is None and new.skipped == 0
    assert not [name for name in metrics if "disc" in name or "gan" in name]
    assert all(np.isfinite(value) for value in metrics.values())
    assert small.differing(new.vae.params, state.vae.params) and small.differing(new.sit.params, state.sit.params)


def test_plain_vae_and_sit_in_bfloat16_with_donation():
    """No encoder, no alignment; compute in bfloat16 leaves every array of the state in float32; the old state is given up."""
    changes = {"loss.vae.align": 0.0, "loss.sit.align": 0.0, "encoders": {}, "precision.compute": "bfloat16"}
    job = make_job(changes=changes, loss__gan_start=1)
    state = small.random_state(job)
    assert not [name for name in small.leaves(state) if "projector" in name]
    before = jax.tree.map(np.copy, small.leaves(state))  # a view would keep the buffer
    buffers = jax.tree.leaves(state)
    step = compilation.jit_step(job, state)
    new, metrics = step(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
    assert all(np.isfinite(value) for value in metrics.values())
    assert not [name for name in metrics if "align" in name]
    assert metrics["disc/hinge"] == 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(new)} == {"float32", "int32"}
    assert all(buffer.is_deleted() for buffer in buffers)
    after = small.leaves(new)
    assert any(not np.array_equal(after[name], before[name]) for name in after if name.startswith("vae.params"))
    newer, metrics = step(new, batch_of(job), frozen_weights.load_frozen(job), KEY)
    assert metrics["disc/hinge"] != 0 and newer.step == 2


def test_inputs_are_the_batch_its_targets_and_the_noise_of_the_step(base):
    job, batch, frozen = base.job, batch_of(base.job), frozen_weights.load_frozen(base.job)
    options = {"nets": bind(job.nets), "encoders": job.encoders, "recipe": job.recipe}
    x = inputs.prepare(batch, base.state.step, frozen, KEY, **options)
    np.testing.assert_array_equal(x.images, to_float(batch["image"]))
    np.testing.assert_array_equal(x.labels, batch["label"])
    expected = inputs.sample_noise(KEY, base.state.step, (BATCH, *job.latent_shape), job.recipe)
    assert small.differing({name: getattr(x, name) for name in expected}, expected) == []
    assert [t.shape for t in x.targets] == [(BATCH, 16, 16)]


def test_the_random_numbers_of_a_step():
    recipe = Recipe(vae_weights={}, sit_weights={}, label_dropout=0.25)
    noise = inputs.sample_noise(KEY, 5, (4000, 1, 1, 2), recipe)
    assert abs(float(noise["label_drop"].mean()) - 0.25) < 0.03
    assert noise["t"].min() >= 0 and noise["t"].max() < 1 and abs(float(noise["t"].mean()) - 0.5) < 0.03
    for name in ("noise", "posterior_noise"):
        assert abs(float(noise[name].mean())) < 0.05 and abs(float(noise[name].std()) - 1) < 0.05
    assert abs(float(jnp.mean(noise["noise"] * noise["posterior_noise"]))) < 0.05
    other = inputs.sample_noise(KEY, 6, (4000, 1, 1, 2), recipe)
    assert sorted(small.differing(noise, other)) == ["label_drop", "noise", "posterior_noise", "t"]
    never = inputs.sample_noise(KEY, 5, (64, 1, 1, 2), dataclasses.replace(recipe, label_dropout=0.0))
    assert not never["label_drop"].any()
