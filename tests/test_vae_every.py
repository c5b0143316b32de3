"""Joint training whose VAE is trained in the first of every k steps: the steps between, schedules, the loop, FLOP and plans.

Tolerance, relative to the largest entry of an array: FLOAT for the same float32 sums in another program or order.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import small
import step_inputs
from sgd_jobs import BATCH, KEY, make_job

from configs import ldm
from repae_jax import train
from repae_jax.benchmark import measure, timing
from repae_jax.cost import flops
from repae_jax.distributed import sharding
from repae_jax.job import build, compilation, frozen_weights, initial_state, training_data
from repae_jax.models.channel_stats import batch_stats, update_running
from repae_jax.training import checkpoint, health, metric_log
from repae_jax.training.optimizer import AdamW, in_updates, learning_rate

FLOAT = 5e-5
QUIET = {"hooks.samples_every": 0, "hooks.reconstructions_every": 0}


def config(steps, every, **changes):
    run = {"steps": steps, "vae_every": every, "checkpoint.every": 3, "log.every": 2, "optim.sit.learning_rate": 2e-4}
    return small.config({**run, **QUIET, **changes})


def batch_of(job):
    size, rng = job.config["data"]["image_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    return sharding.put_batch(job.mesh, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10})


# ---- the step between -----------------------------------------------------------------------------------------------


@functools.cache
def stepped(is_between, devices=1, accumulation=1):
    """(the job's state before, after a joint step or one of the SiT alone, and metrics)."""
    job = make_job(devices, steps=8, vae_every=2, accumulation=accumulation)
    job = job.variants[is_between][0]
    state = small.random_state(job)
    new, metrics = jax.jit(job.step)(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
    return state, new, metrics


@pytest.mark.integration
def test_the_step_between_moves_what_the_joint_step_moves_but_the_vae():
    """Its loss, gradient, update, average and running statistics of the latents are those of the joint step."""
    state, between, metrics = stepped(True)
    _, joint, of_joint = stepped(False)
    assert small.differing((between.vae, between.disc, between.lecam), (state.vae, state.disc, state.lecam)) == []
    assert small.differing(joint.vae, state.vae) and small.differing(joint.disc, state.disc)
    for part in ("sit", "ema", "latent_stats"):
        assert small.differing(getattr(between, part), getattr(state, part))
        assert small.largest_error(getattr(between, part), getattr(joint, part)) < FLOAT, part
    assert int(between.step) == 1 and int(between.skipped) == 0
    lost = set(of_joint) - set(metrics)
    assert set(metrics) < set(of_joint) and {name.partition("/")[0] for name in lost} == {"vae", "disc", "grad_norm"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, of_joint[name], rtol=FLOAT, atol=1e-6, err_msg=name)


@pytest.mark.integration
def test_running_statistics_by_hand():
    state, new, _ = stepped(True)
    job = make_job(steps=8, vae_every=2)
    posterior = job.nets.vae.apply({"params": state.vae.params}, batch_of(job)["image"] / 127.5 - 1.0, method="encode")
    latents = posterior.sample(step_inputs.sample(KEY, 0, job, BATCH).posterior_noise)
    expected = update_running(state.latent_stats, batch_stats(latents), latents.size // latents.shape[-1], 0.1)
    assert small.largest_error(new.latent_stats, expected) < FLOAT


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "accumulation"), [(8, 1), (1, 2)])
def test_eight_devices_and_micro_batches_equal_one(devices, accumulation):
    _, expected, expected_metrics = stepped(True)
    _, new, metrics = stepped(True, devices, accumulation)
    assert small.largest_error(new, expected) < FLOAT
    assert small.largest_error(metrics, expected_metrics) < FLOAT


@pytest.mark.integration
def test_a_step_that_is_not_finite_is_skipped_whole():
    job = make_job(steps=8, vae_every=2).variants[1][0]
    state = small.random_state(job)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), jax.device_get(state.vae.params))
    state = state.replace(vae=state.vae.replace(params=broken))
    new, metrics = jax.jit(job.step)(state, batch_of(job), frozen_weights.load_frozen(job), KEY)
    assert int(new.skipped) == int(metrics["skipped_in_a_row"]) == int(new.step) == 1
    assert small.differing((new.sit, new.ema, new.latent_stats), (state.sit, state.ema, state.latent_stats)) == []


def test_the_joint_step_does_not_depend_on_how_often_it_is_taken():
    """Its program is that of a run without `vae_every`, to the last letter; so is the config of a run from before the field."""
    jobs = [build.build(config(8, every)) for every in (1, 4)]
    assert build.plain_config(jobs[0].config) == jobs[0].config and "vae_every" not in jobs[0].config
    texts = []
    for job in jobs:
        state = initial_state.abstract_state(job)
        texts.append(compilation.jit_step(job, state).lower(state, *compilation.abstract_inputs(job)).as_text())
    assert texts[0] == texts[1]
    assert [share for _, share in jobs[0].variants] == [1] and [share for _, share in jobs[1].variants] == [0.25, 0.75]
    assert [jobs[1].kind_of(step) for step in range(1, 10)] == [0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert [jobs[0].kind_of(step) for step in range(1, 4)] == [0, 0, 0]


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "start", "end"), [("constant", None, None), ("linear", None, 40), ("cosine", None, 40), ("1-sqrt", 20, 40)]
)
def test_learning_rates_are_of_steps(schedule, start, end):
    """The rate of the n-th update is that of step 4 n."""
    section = AdamW(
        learning_rate=1e-3, warmup_steps=8, schedule=schedule, decay_start=start, decay_steps=end, final_learning_rate=1e-5,
        b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0, fixed=(),
    )  # fmt: skip
    of_steps, of_updates = learning_rate(section), learning_rate(in_updates(section, 4))
    for update in range(15):
        np.testing.assert_allclose(of_updates(update), of_steps(4 * update), rtol=1e-6)
    assert in_updates(section, 1) == section


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_every": 0}, "config.vae_every=0 must be at least 1"),
        ({"steps": 3}, "config.vae_every=4 .* first of every 4 steps, but config.steps=3 is less: set steps to 4 or more, or"),
        ({"loss.gan_start": 2}, "config.vae_every=4 .* config.loss.gan_start=2 is less: .* or vae_every to 2 or less"),
        ({"loss.align_end": 1}, "config.vae_every=4 .* config.loss.align_end=1 is less"),
        ({"optim.vae.warmup_steps": 6}, "config.vae_every=4 does not divide config.optim.vae.warmup_steps=6, .*set it to 8"),
        (
            {"optim.disc.schedule": "linear", "optim.disc.decay_steps": 3},
            "config.vae_every=4 does not divide config.optim.disc.decay_steps=3, .*set it to 4",
        ),
        (
            {"optim.vae.schedule": "1-sqrt", "optim.vae.decay_start": 6, "optim.vae.decay_steps": 8},
            "config.vae_every=4 does not divide config.optim.vae.decay_start=6, .*set it to 8",
        ),
        (
            {"init.checkpoint": "x.pt", "optim.disc.schedule": "linear", "optim.disc.decay_steps": 8},
            "config.vae_every=4 and config.optim.disc.decay_steps=8: .* config.init.checkpoint='x.pt'",
        ),
    ],
)
def test_schedules_that_do_not_go_with_it(changes, message):
    with pytest.raises(ValueError, match=message):
        build.build(small.config({"steps": 8, "vae_every": 4, **changes}))


def test_other_jobs_have_no_such_field():
    with pytest.raises(ValueError, match=r"config: unknown fields \['vae_every'\]"):
        build.build(small.config({"vae_every": 2}, ldm))


# ---- the loop -------------------------------------------------------------------------------------------------------


def metrics_of(workdir):
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    clock = {"time", *metric_log.SPEED_NAMES}
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def by_hand(config):
    """State of a run and its metrics by step, from the two step functions."""
    job = build.build(config)
    frozen, key = frozen_weights.load_frozen(job), jax.random.key(job.config["seed"])
    source = training_data.make_images(config)
    state, logged = train._create_state(job, frozen, source), []
    joint, between = (compilation.jit_step(variant, state) for variant, _ in job.variants)
    with training_data.make_loader(job, source) as loader:
        for step in range(config.steps):
            batch = sharding.put_batch(job.mesh, next(loader))
            state, metrics = (between if step % config.vae_every else joint)(state, batch, frozen, key)
            logged.append({name: float(value) for name, value in metrics.items()})
    return state, logged


@pytest.mark.slow
def test_a_run_is_the_two_steps_in_turn_and_continues_bit_for_bit(tmp_path):
    """State and lines of metrics of seven steps by hand; then again the last two, from a checkpoint between two joint steps.

    A line has the metrics of its step, and those that this step lacks of the last joint one: step 6 those of step 4.
    """
    run = config(7, 3, **{"checkpoint.every": 5, "checkpoint.keep_last": 2, "log.every": 6})
    expected, logged = by_hand(run)
    for _ in range(2):
        state, finished = train.train(run, tmp_path)
        assert finished and small.differing(state, expected) == []
        lines = metrics_of(tmp_path)
        assert [(line.pop("step"), line.pop("bad_records")) for line in lines] == [(1, 0), (6, 0), (7, 0)]
        assert lines == [logged[0], {**logged[3], **logged[5]}, logged[6]]
        assert checkpoint.read_data_state(tmp_path, 5)["pending_metrics"] == {**logged[3], **logged[4]}
        assert "pending_metrics" not in checkpoint.read_data_state(tmp_path, 7)
        shutil.rmtree(tmp_path / "checkpoints" / "7")


def test_a_line_has_the_newest_of_every_metric_once(monkeypatch):
    """Steps 1, 4, 7 are joint ones; lines at steps 1, 5, 10."""
    lines, saved = {}, {}
    job = SimpleNamespace(
        kind_of=lambda step: int((step - 1) % 3 > 0), variants=((None, 1 / 3), (None, 2 / 3)), mesh=None,
        config={
            "steps": 10, "seed": 0, "checkpoint": {"every": 2}, "log": {"every": 5}, "max_skipped_in_a_row": 1,
            "data": {"batch_size": 1, "max_bad_fraction": 0},
        },
    )  # fmt: skip
    now = [0]

    def step(has_vae):
        def run(state, *_):
            now[0] += 1
            metrics = {"sit/loss": now[0], "skipped_in_a_row": 0, **({"vae/loss": now[0]} if has_vae else {})}
            return state, {name: np.float32(value) for name, value in metrics.items()}

        return run

    run = SimpleNamespace(
        job=job, start=0, loader=iter(range(10)), source=(), state=None, frozen=None, pending={}, hooks=[], arithmetic=None,
        stopped=lambda: False, end_if_stopped=lambda _: None, checkpointer=SimpleNamespace(wait=lambda: None),
        log=lambda step, values, *_: lines.update({step: {n: v for n, v in values.items() if "/" in n}}),
    )  # fmt: skip
    run.save = lambda step, *_: saved.update({step: run.pending.get("vae/loss")})
    monkeypatch.setattr(train.sharding, "put_batch", lambda mesh, batch: batch)
    programs = iter([step(True), step(False)])
    monkeypatch.setattr(train, "compile_step", lambda *_: next(programs))
    monkeypatch.setattr(train, "input_so_far", lambda *_: ({"bad_records": []}, []))
    train.run_steps(run)
    assert lines == {1: {"vae/loss": 1, "sit/loss": 1}, 5: {"vae/loss": 4, "sit/loss": 5}, 10: {"vae/loss": 10, "sit/loss": 10}}
    assert saved == {2: None, 4: 4, 6: None, 8: 7, 10: None}


def test_lines_without_the_vae_are_healthy():
    """Its metrics in every fourth line, as with log.every=1 and k = 4, or in every line: nothing is warned of."""
    of_vae = {
        "vae/l1": 0.1, "vae/kl": 5.0, "vae/align": -0.6, "grad_norm/vae": 1.0, "grad_norm/disc": 1.0, "disc/hinge": 1.0,
        "disc/logits_real": 0.2, "disc/logits_fake": -0.1,
    }  # fmt: skip
    for every in (1, 4):
        watch = health.Watch()
        for step in range(1, 801):
            of_sit = {"latents/std": 5.5, "sit/velocity": 2 / (1 + step / 100), "sit/align": -0.6, "grad_norm/sit": 1.0}
            assert watch.update(step, of_sit | {"skipped": 0.0} | (of_vae if step % every == 1 % every else {})) == []


@pytest.mark.slow
def test_a_run_from_before_the_field_is_continued(tmp_path):
    before = build.plain_config(config(8, 1))
    assert "vae_every" not in before and before == build.plain_config(before)
    state = {"x": np.zeros(2, np.float32)}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {}, before)
        checkpointer.wait()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        assert checkpointer.restore(shapes, before)[2] == 2
        with pytest.raises(ValueError, match="vae_every: stored '<absent>', given 2"):
            checkpointer.restore(shapes, build.plain_config(config(8, 2)))


# ---- FLOP, benchmark, plan ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_flop_of_a_step_are_the_mean_of_its_kinds():
    job = build.build(config(8, 4))
    arguments = initial_state.abstract_state(job), *compilation.abstract_inputs(job)
    steps = (sharding.with_mesh_context(job.mesh, variant.step) for variant, _ in job.variants)
    joint, between = (sum(flops.count(step, *arguments).values()) / job.config["data"]["batch_size"] for step in steps)
    assert between < 0.7 * joint
    assert sum(flops.of_step(job).values()) == pytest.approx((joint + 3 * between) / 4)
    scopes = flops.of_step(job.variants[0][0])
    assert {"vae/SiT.align", "vae/AutoencoderKL.decode", "sit/SiT"} <= set(scopes)


@pytest.mark.integration
def test_the_alignment_of_the_vae_computes_no_block_behind_the_one_it_is_taken_from():
    """Its FLOP do not grow with the depth, neither forward nor backward; those of the SiT's own loss do."""
    shallow, deep = (flops.of_step(build.build(config(8, 1, **{"sit.depth": depth}))) for depth in (2, 6))
    assert shallow["vae/SiT.align"] == deep["vae/SiT.align"] > 0
    assert deep["sit/SiT"] > 2 * shallow["sit/SiT"]


def test_windows_have_whole_periods(monkeypatch):
    """Every third call takes 7 s and the others 1 s: 3 s in the mean, in each of the windows."""
    now, calls = [0.0], iter(range(100))

    def wait(call):
        now[0] += 7.0 if call % 3 == 0 else 1.0

    monkeypatch.setattr(timing.jax, "block_until_ready", wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    np.testing.assert_allclose(timing.time_calls(lambda: next(calls), 12, ahead=2, period=3), [3.0] * 4)


def test_the_benchmark_takes_the_programs_in_turn():
    job = build.build(config(8, 3))
    run = measure.in_turn(job, [lambda: "joint", lambda: "between"])
    assert [run() for _ in range(7)] == ["joint", "between", "between"] * 2 + ["joint"]


def test_optimizers_of_the_vae_take_updates_for_steps():
    changes = {"optim.vae.warmup_steps": 8, "optim.disc.warmup_steps": 8, "optim.sit.warmup_steps": 8}
    tx = build.build(config(8, 4, **changes)).tx
    params = {"x": np.ones(3, np.float32)}
    for name, rate in (("vae", 0.5), ("disc", 0.5), ("sit", 0.125)):  # after one update: half of two, an eighth of eight
        state = getattr(tx, name).init(params)
        for _ in range(2):
            updates, state = getattr(tx, name).update({"x": np.ones(3, np.float32)}, state, params)
        full = build.build(config(8, 4)).config["optim"][name]["learning_rate"]
        np.testing.assert_allclose(optax.tree.norm(updates) / np.sqrt(3), rate * full, rtol=1e-4)


def test_replacing_keeps_the_kind():
    job = build.build(config(8, 2))
    assert dataclasses.replace(job.variants[1][0], tx=job.tx).is_between and not job.is_between
