"""The plan of a scale of the miniature paper, without compiling: what costs as what, sums by hand, what is kept, mistakes."""

import dataclasses

import jax
import pytest

from launch.miniature import plan as miniature_plan
from launch.miniature import plan_summary, sizes, tables
from launch.miniature.scales import SCALES
from repae_jax import cli, plan
from repae_jax.distributed import multihost

GIB = 2**30
H200, RTX = "NVIDIA H200", "NVIDIA GeForce RTX 4090"
MEDIUM = SCALES["medium"]


def run_main(monkeypatch, *words):
    """Exit status, or the message of an error, of the command; None if it ends well."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(cli, "_log_information", lambda: None)
    try:
        return miniature_plan.main(words)
    except SystemExit as error:
        return error.code


def compiled(topology, scale=1.0, fits=True):
    """Numbers of `repae_jax.plan` of REPA-E's step: 10 ms, a tenth of it of no part with FLOP."""
    seconds = {"sit/SiT": 5e-3, "vae/AutoencoderKL.encode": 1e-3, "vae/SiT.align": 3e-3, "update": 1e-3}
    return {
        "topology": topology, "seconds": 0.01 * scale, "share_of_peak": 0.25, "fits": fits,
        "memory_bytes": {"total": 3 * GIB}, "memory_of_chip_bytes": 24 * GIB,
        "roofline": {"by_part": {part: {"seconds": value * scale} for part, value in seconds.items()}},
    }  # fmt: skip


def cost(sit, encode, align=0.0, arrays=100):
    flop = {"sit/SiT": sit * 1e12, "vae/AutoencoderKL.encode": encode * 1e12, "vae/SiT.align": align * 1e12}
    return miniature_plan.Cost({part: value for part, value in flop.items() if value}, arrays, GIB // 2)


WHOLE = cost(4, 3, 2)
FROZEN = cost(4, 1, arrays=20)


@pytest.fixture
def counted(monkeypatch):
    """Costs that are easy to reckon with."""
    costs = {"repa-e": WHOLE, "repa-larger": cost(16, 1, arrays=20), "vae": cost(0, 3, arrays=80)}
    monkeypatch.setattr(miniature_plan, "step_cost", lambda scale, setting: costs.get(setting, FROZEN))
    monkeypatch.setattr(miniature_plan, "sampling_flop", lambda scale, setting: 1e15)


def test_what_costs_as_what():
    expected = {
        "vae-other": "vae", "e2e-sit": "sit", "e2e-repa": "repa", "repa-weak": "repa", "naive": "repa-e", "deep": "repa-e",
        "scratch": "repa-e", "e2e-dit": "dit", "e2e-dit-repa": "dit-repa", "repa-larger": "repa-larger",
        "repa-e-smaller": "repa-e-smaller",
    }  # fmt: skip
    assert {setting: miniature_plan.costs_as(setting) for setting in expected} == expected


def test_a_step_is_made_of_the_parts_of_the_whole():
    parts = compiled("h200:1")["roofline"]["by_part"]
    assert WHOLE.seconds(WHOLE, parts) == pytest.approx(0.01) and WHOLE.total == 9e12
    assert FROZEN.seconds(WHOLE, parts) == pytest.approx(5e-3 + 1e-3 / 3 + 1e-3 / 5), (
        "a third of the encoder, a fifth of the rest"
    )
    with pytest.raises(ValueError, match=r"parts \['sit/DiT'\] are not in the compiled step, whose parts are \['sit/SiT'"):
        miniature_plan.Cost({"sit/DiT": 1.0}, 1, 1).seconds(WHOLE, parts)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["vae", "sit", "dit-repa"])
def test_traced_steps_have_no_other_parts(setting):
    whole, step = (miniature_plan.step_cost(SCALES["digits"], name) for name in ("repa-e", setting))
    assert set(step.flop) < set(whole.flop) and step.arrays < whole.arrays and step.state_bytes < whole.state_bytes


def test_a_row_by_hand(counted):
    """Samples are in TF32, at 60 % of half of 989 TFLOP/s."""
    plans = {H200: compiled("h200:1")}
    row = miniature_plan.planned(MEDIUM, "repa-larger", 3, plans)
    assert (row.steps, row.runs, row.checkpoints, row.flop_per_step) == (MEDIUM.steps, 3, 2, 17e12)
    assert row.step_seconds == {H200: pytest.approx(4 * 5e-3 + 1e-3 / 3 + 1e-3 / 5)}
    assert row.training(H200) == pytest.approx(3 * MEDIUM.steps * row.step_seconds[H200])
    assert row.sampling == {H200: pytest.approx(2e15 / (0.6 * 989e12 / 2))}
    assert row.disk == 2 * GIB // 2, "checkpoints halfway and at the end"
    row = miniature_plan.planned(MEDIUM, "vae", 1, plans)
    assert (row.steps, row.checkpoints, row.sampling) == (MEDIUM.vae_steps, 0, {H200: 0})
    assert row.step_seconds == {H200: pytest.approx(1e-3 + 0.8e-3)}


def test_a_summary_by_hand():
    plans = {H200: compiled("h200:1"), RTX: compiled("rtx4090:1", 5, fits=False)}
    rows = {
        "sit": sizes.Planned("sit", 1e12, 60_000, 3, {H200: 0.004, RTX: 0.02}, {H200: 20, RTX: 100}, 4, 2.0 * GIB),
        "dit": sizes.Planned("dit", 1e12, 900_000, 2, {H200: 0.004, RTX: 0.02}, {H200: 30, RTX: 150}, 2, 1.0 * GIB),
    }
    text = "\n".join(plan_summary.lines_of(MEDIUM, plans, rows, {"sit"}))
    assert f"|  | {H200} | {RTX} |\n| --- | --- | --- |" in text
    assert "| step of REPA-E, as compiled | 10.0 ms, 25% of the peak | 50.0 ms, 25% of the peak |" in text
    assert "| 3.0 of 24 GiB: fits | 3.0 of 24 GiB: **does not fit** |" in text
    rest = 3 * (20 + 5 * 4) + 60 + 180
    assert f"3 runs: training + samples + the rest | 12.0 min + 1.0 min + {rest / 60:.1f} min | 60.0 min + 5.0 min" in text
    assert f"**headline**, 3 runs: all | **{(720 + 60 + rest) / 60:.1f} min** |" in text
    assert "**everything**, 5 runs: training + samples + the rest | 2.2 h + 2.0 min +" in text
    words = " ".join(text.split())
    assert "6 GiB of the headline's, 8 in all" in words
    assert f"keeps {0.23 * MEDIUM.batch_size / 4:.0f} cores busy" in words and "**Nothing was measured.**" in words


def test_the_page_and_what_is_kept(counted, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(plan, "prepare", lambda config, topology: (None, {"chips": 1, "topology": topology}))

    def compile_apart(config, numbers):
        calls.append((config.job, numbers["topology"]))
        return compiled(numbers["topology"])

    monkeypatch.setattr(plan, "plan_apart", compile_apart)
    words = [f"--plans={tmp_path}/plans", f"--results={tmp_path}/medium/README.md", "--topology=h200:1", "--topology=rtx4090:1"]
    assert run_main(monkeypatch, *words) is None
    text = (tmp_path / "medium/README.md").read_text()
    assert text.startswith("# The miniature paper at scale `medium`: not run yet") and len(text.splitlines()) <= 100
    assert f"|  | {H200} | {RTX} |" in text and "**headline**, 10 runs" in text
    assert all(f"\n| {setting.label} |" in text for setting in tables.SETTINGS.values())
    assert calls == [("repae", "h200:1"), ("repae", "rtx4090:1")]
    assert run_main(monkeypatch, *words) is None and len(calls) == 2, "nothing is compiled again"


def test_a_step_that_could_not_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "prepare", lambda config, topology: (None, {"topology": topology}))
    monkeypatch.setattr(plan, "plan_apart", lambda config, numbers: numbers | {"fits": None, "message": "killed"})
    with pytest.raises(ValueError, match="^--topology=h200:1: the step of scale medium has no plan: killed$"):
        miniature_plan.compiled_plan(MEDIUM, "h200:1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(monkeypatch):
    monkeypatch.setattr(miniature_plan, "compiled_plan", lambda *_: pytest.fail("not reached"))
    monkeypatch.setattr(multihost, "versions", lambda: dict.fromkeys(multihost.PACKAGES))
    message = run_main(monkeypatch, "--topology=h200:1")
    assert message.startswith("error: compiling for GPUs needs JAX's CUDA plugin") and "\n" not in message
    assert run_main(monkeypatch, "--topology=h900:1").startswith("error: --topology=h900:1: expected CHIP:GRID")
    monkeypatch.setattr(plan, "topology_devices", lambda *_: jax.devices()[:2])
    message = run_main(monkeypatch, "--topology=h200:2")
    assert message == "error: --topology=h200:2: the miniature runs on one accelerator; allowed: one, such as h200:1"


def test_samples_are_counted_once(monkeypatch):
    """`Scale.samples` is the number of all samples of a checkpoint, not of those of a class."""
    monkeypatch.setattr(miniature_plan.flops, "of_sampling", lambda job: {"sit/SiT": 2.0, "vae/decode": 1.0})
    scale = dataclasses.replace(SCALES["digits"], samples=70)
    assert miniature_plan.sampling_flop(scale, "sit") == 3.0 * 70
