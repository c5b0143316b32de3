"""Healthy runs raise no warning, every fault raises its own, once, and the documents show the table that is checked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from repae_jax.training import health

ROOT = Path(__file__).parents[2]
LOGGED = json.loads((ROOT / "tests" / "golden" / "training_logs.json").read_text())
LOGS = 160


def curves(name):
    """The log of a real run, as `read_metrics` would give it."""
    log = LOGGED[name]
    return {metric: (log["step"], values) for metric, values in log.items() if metric != "step"}


def usual(**changes):
    """A healthy run of REPA-E from a trained VAE, logged every 100 steps; `changes` are metric -> function of the log's index.

    Level and noise of the metrics are like those of the logged runs.
    """
    rng = np.random.default_rng(0)
    level = {
        "latents/std": lambda i: 5.5, "vae/kl": lambda i: 1e5, "skipped": lambda i: 0.0, "vae/l1": lambda i: 0.05,
        "grad_norm/vae": lambda i: 0.6, "grad_norm/sit": lambda i: 0.8, "grad_norm/disc": lambda i: 0.3,
        "sit/align": lambda i: -0.7 * (1 - math.exp(-i / 10)), "vae/align": lambda i: -0.72 * (1 - math.exp(-i / 10)),
        "sit/velocity": lambda i: 0.8 + 1.2 * math.exp(-i / 3),
        "disc/hinge": lambda i: 0.95, "disc/logits_real": lambda i: 0.1, "disc/logits_fake": lambda i: -0.1,
    }  # fmt: skip
    level |= {name.replace("__", "/"): value for name, value in changes.items()}
    return [
        (max(100 * i, 1), {name: float(value(i) * rng.normal(1, 0.03)) for name, value in level.items()}) for i in range(LOGS)
    ]


def named(log, watch=None):
    """[(step, name of the check)] of the warnings of a log."""
    watch = watch or health.Watch()
    return [(step, sentence.partition(":")[0]) for step, values in log for sentence in watch.update(step, values)]


def from_log_60(value, before):
    return lambda i: before if i < 60 else value


FAULTS = {  # check -> changes of the usual run
    "collapsing latents": {"latents__std": from_log_60(1.0, before=5.5)},
    "growing latents": {"latents__std": lambda i: 1 + i},
    "exploding KL": {"vae__kl": from_log_60(2e6, before=1e5)},
    "zero gradients": {"grad_norm__sit": from_log_60(0.0, before=0.8)},
    "skipped updates": {"skipped": lambda i: max(0, i - 60)},
    "no alignment": {"sit__align": lambda i: -0.02, "vae__align": lambda i: -0.02},
    "stalled alignment": {"sit__align": lambda i: -0.2, "vae__align": lambda i: -0.21},
    "trivial velocity": {"sit__velocity": lambda i: 2.0},
    "worse reconstructions": {"vae__l1": from_log_60(0.1, before=0.05)},
    "discriminator has won": {
        "disc__hinge": from_log_60(0.01, before=0.95), "disc__logits_real": from_log_60(3.0, before=0.1),
        "disc__logits_fake": from_log_60(-3.0, before=-0.1),
    },
    "dead discriminator": {
        "disc__logits_real": from_log_60(1e-5, before=0.1), "disc__logits_fake": from_log_60(1e-5, before=-0.1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, log in LOGGED.items() if name != "naive"])
def test_logged_runs_that_were_healthy_raise_no_warning(name):
    assert len(LOGGED[name]["step"]) >= 30 and set(LOGGED[name]) <= {"step", *health.WATCHED}
    assert health.Watch().replay(curves(name)) == []


def test_the_logged_run_whose_diffusion_loss_reaches_the_vae_raises_one():
    warnings = health.Watch().replay(curves("naive"))
    assert [sentence.partition(":")[0] for _, sentence in warnings] == ["collapsing latents"]


def test_a_usual_run_raises_no_warning():
    assert named(usual()) == []


@pytest.mark.parametrize("check", health.CHECKS, ids=lambda check: check.name)
def test_every_fault_raises_its_warning_once(check):
    log = usual(**FAULTS[check.name])
    warnings = named(log)
    assert [name for _, name in warnings] == [check.name]
    assert warnings[0][0] > 6000 or check.name in ("growing latents", "no alignment", "trivial velocity", "stalled alignment")
    # a check looks at no metric that the table does not name
    others = [(step, {name: value for name, value in values.items() if name not in check.metrics}) for step, values in log]
    assert check.name not in [name for _, name in named(others)]


def test_the_sentence_says_what_is_seen_what_it_means_and_what_helps():
    watch = health.Watch()
    values = {"grad_norm/sit": 0.0, "grad_norm/vae": 0.5}
    assert watch.update(1, values) == watch.update(100, values) == []
    (sentence,) = watch.update(200, values)
    check = next(check for check in health.CHECKS if check.name == "zero gradients")
    assert sentence == f"zero gradients: grad_norm/sit exactly 0 in the last 3 logs. {check.means} {check.advice}"


def test_a_fault_is_named_again_if_it_comes_back_or_lasts():
    zero, well = {"grad_norm/vae": 0.0}, {"grad_norm/vae": 1.0}
    logs = [zero] * 3 + [well] * 5 + [zero] * 3 + [well] * health.CAME_BACK + [zero] * (health.REPEAT + 3)
    warnings = named(list(enumerate(logs)))
    came_back = 3 + 5 + 3 + health.CAME_BACK + 2
    assert [step for step, _ in warnings] == [2, came_back, came_back + health.REPEAT]


def test_a_continued_run_warns_as_if_it_had_never_stopped():
    log = usual(**FAULTS["collapsing latents"])
    whole = health.Watch()
    expected = [(step, sentence) for step, values in log for sentence in whole.update(step, values)]
    steps = [step for step, _ in log]
    file = {name: (steps, [values[name] for _, values in log]) for name in log[0][1]}
    for stopped in (3000, 6100, 9000):  # before the fault, while it begins, after it was named
        continued = health.Watch()
        before = continued.replay(file, last_step=stopped)
        after = [(step, sentence) for step, values in log if step > stopped for sentence in continued.update(step, values)]
        assert before + after == expected


def test_alignment_may_be_lost_after_its_end():
    lost = usual(sit__align=from_log_60(0.0, before=-0.6), vae__align=from_log_60(0.0, before=-0.6))
    assert named(lost) == [(lost[62][0], "no alignment")]
    assert named(lost, health.Watch(align_end=6000)) == []


def test_a_target_that_moves_is_not_watched():
    assert "sit/self" not in health.WATCHED and named(usual(sit__self=lambda i: -0.2)) == []


def test_a_gan_that_has_not_begun_is_no_fault():
    """Its hinge loss is logged with its factor, 0, the gradient is 0, and untrained logits are alike."""
    silent = dict.fromkeys(("disc__hinge", "grad_norm__disc", "disc__logits_real", "disc__logits_fake"), lambda i: 0.0)
    assert named(usual(**silent)) == []


def test_trained_weights_to_start_from_are_no_fault():
    trained = {"sit__velocity": lambda i: 0.8, "sit__align": lambda i: -0.7, "vae__align": lambda i: -0.7}
    assert named(usual(**trained)) == []


def test_numbers_that_are_not_finite_are_left_out():
    log = [(step, values if step % 300 == 0 else dict.fromkeys(values, math.nan)) for step, values in usual()]
    assert named(log) == []


def test_white_noise_has_the_error_that_is_compared_with():
    """The best velocity for data of independent unit normals, a linear function of z_t, fitted at many times."""
    rng = np.random.default_rng(0)
    errors = []
    for t in (np.arange(200) + 0.5) / 200:
        x, noise = rng.standard_normal((2, 20_000))
        z, velocity = (1 - t) * x + t * noise, noise - x
        errors.append(np.mean((velocity - z * (z @ velocity) / (z @ z)) ** 2))
    assert np.mean(errors) == pytest.approx(health.WHITE_VELOCITY, rel=0.005)  # 4 million draws


def test_the_documents_show_the_table():
    text = (ROOT / "docs" / "reproducing.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 3]
    expected = []
    for check in health.CHECKS:
        metrics = ", ".join(f"`{name}`" for name in check.metrics)
        expected.append(f"| {check.name} | {metrics} | {check.healthy} | {check.means} {check.advice} |")
    assert [row for row in rows if row.split(" | ")[0][2:] in FAULTS] == expected
