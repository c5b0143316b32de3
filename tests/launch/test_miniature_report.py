"""Verdicts, figures and page of the miniature paper, on made-up results of a declaration of five settings."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from launch.miniature import (
    beyond,
    cknna,
    comparisons,
    experiments,
    figures,
    findings,
    finished,
    markdown,
    miniature,
    picture_rows,
    report,
    sizes,
    style,
    table_figures,
    tables,
    verdicts,
)
from launch.miniature.finished import Finished

# ---- verdicts -----------------------------------------------------------------------------------------------------------


def runs(*values, measure="fid"):
    """Runs with these numbers; None is a run that diverged."""
    results = [{"status": "diverged" if value is None else "done", "numbers": {measure: value}} for value in values]
    return [Finished("folder", result) for result in results]


def judged(first, second, **claim):
    measure = claim.get("measure", "fid")
    sides = {"repa-e": runs(*first, measure=measure), "repa": runs(*second, measure=measure)}
    return verdicts.judge(tables.Claim("repa-e", "repa", "4.07 against 7.90", **claim), sides)


def test_welch_by_hand():
    gap = verdicts.difference([10, 11, 12], [20, 21, 22])
    half = 2.776445 * math.sqrt(2 / 3)  # t(0.975) of 4 degrees of freedom, both variances are 1
    np.testing.assert_allclose([gap.center, gap.low, gap.high], [-10, -10 - half, -10 + half], rtol=1e-6)
    gap = verdicts.difference([1, 3], [10, 20, 60])
    a, b = 2 / 2, 700 / 3  # variances of the means
    freedom = (a + b) ** 2 / (a**2 / 1 + b**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    np.testing.assert_allclose([gap.center, gap.low, gap.high], [-28, -28 - half, -28 + half], rtol=1e-9)


def test_a_side_of_one_value_is_taken_as_given():
    half = 4.302653 / math.sqrt(3)  # t(0.975) of 2 degrees of freedom, standard deviation 1
    for given in ([5], [5, 5], [5, 5, 5]):  # Welch's freedom, where one side has no spread, is the other side's
        gap = verdicts.difference([1, 2, 3], given)
        np.testing.assert_allclose([gap.center, gap.low, gap.high], [-3, -3 - half, -3 + half], rtol=1e-6)
        gap = verdicts.difference(given, [1, 2, 3])
        np.testing.assert_allclose([gap.center, gap.low, gap.high], [3, 3 - half, 3 + half], rtol=1e-6)
    assert verdicts.difference([2, 2], [1]) == verdicts.Interval(1, 1, 1)
    assert verdicts.difference([2], [1]) == verdicts.Interval(1, -math.inf, math.inf)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([10, 11, 12], [20, 21, 22], verdicts.AGREES),
        ([20, 21, 22], [10, 11, 12], verdicts.DISAGREES),
        ([10, 20, 30], [22, 32, 42], verdicts.UNDECIDED),  # the means differ, but the interval is +-23
        ([10, 11, 12], [12.2, 13.2, 14.2], verdicts.UNDECIDED),  # just inside: half of the interval is 2.27
        ([10, 11, 12], [12.3, 13.3, 14.3], verdicts.AGREES),
        ([1, 2, 3], [5], verdicts.UNDECIDED),  # an unfinished sweep: one run of the second setting says nothing of its spread
        ([5], [1, 2, 3], verdicts.UNDECIDED),
        ([10], [20], verdicts.UNDECIDED),
        ([1, 2], [None], verdicts.UNDECIDED),
        ([1, 2], [None, 3], verdicts.AGREES),
        ([1, math.nan], [3, 3], verdicts.DISAGREES),
        ([None], [None], verdicts.DIVERGED),
        ([], [1], verdicts.NOT_RUN),
        ([1, 2], [], verdicts.NOT_RUN),
    ],
)
def test_better(first, second, expected):
    assert judged(first, second).outcome == expected
    if None not in first + second and not any(map(math.isnan, first)):  # for a measure of which more is better all is reversed
        assert judged(second, first, measure="label_accuracy").outcome == expected


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([100, 101, 102], [99, 100, 101], verdicts.AGREES),  # 1 +- 2.3 within +-10
        ([98, 100, 102], [108, 109, 110], verdicts.UNDECIDED),  # -9 +- 4 is across the edge of +-10.9
        ([10, 11, 12], [20, 21, 22], verdicts.DISAGREES),
        ([10, 20, 30], [10, 20, 30], verdicts.UNDECIDED),  # equal means, but a wide interval
        ([5, 5], [5, 5], verdicts.AGREES),
        ([5, 5], [5], verdicts.UNDECIDED),
        ([5], [5], verdicts.UNDECIDED),
        ([None, 5], [5, 5], verdicts.DISAGREES),
    ],
)
def test_alike(first, second, expected):
    assert judged(first, second, alike=True).outcome == expected


def test_a_vae_alone_has_one_run_by_design():
    claim = tables.Claim("vae", "naive", "17.06 against 0.02", "spatial_variance")

    def outcome(vae, naive):
        return verdicts.judge(claim, {"vae": runs(*vae, measure=claim.measure), "naive": runs(*naive, measure=claim.measure)})

    assert outcome([5], [1, 2, 3]).outcome == verdicts.AGREES and outcome([5], [6, 7, 8]).outcome == verdicts.UNDECIDED
    assert outcome([5], [8, 8.1, 8.2]).outcome == verdicts.DISAGREES and outcome([5], [None, 9]).outcome == verdicts.AGREES
    unfinished = outcome([5], [1])
    assert (
        unfinished.outcome == verdicts.UNDECIDED
        and unfinished.difference == "+4.000 (one run of “naive: diffusion loss into the VAE”)"
    )
    both = {name: runs(value, measure="psnr") for name, value in (("vae", 30.0), ("vae-other", 20.0))}
    assert verdicts.judge(tables.Claim("vae", "vae-other", "", "psnr"), both).outcome == verdicts.UNDECIDED


def test_verdicts_show_the_difference():
    verdict = judged([10, 11, 12], [20, 21, 22])
    assert verdict.values == "11.0 ± 2.5 against 21.0 ± 2.5" and verdict.difference == "−10.0 [−12.3, −7.7]"
    assert judged([10], [20]).difference == "−10.0 (one run each)"
    assert judged([10, 11, 12], [20, 21, 22], alike=True).difference.endswith(", margin ±2.1")
    assert judged([10, 11, 12], [20]).difference == "−9.0 (one run of “SiT + REPA”)"
    assert judged([None, 10], [20, 21]).difference == ""


def test_missing_number_is_not_run():
    side = [Finished("folder", {"status": "done", "numbers": {}})]
    assert verdicts.judge(tables.Claim("a", "b", ""), {"a": side, "b": runs(1.0)}).outcome == verdicts.NOT_RUN


def test_cells():
    measure = tables.MEASURES["fid"]
    assert verdicts.cell([1.0, 2.0, 3.0], measure) == "2.0 ± 2.5"
    assert verdicts.cell([-1.0], measure) == "−1.0"
    assert verdicts.cell([1.0, math.inf], measure) == "1.0 (1 of 2 diverged)"
    assert verdicts.cell([math.inf], measure) == "diverged"
    assert verdicts.cell([math.nan], measure) == verdicts.cell([], measure) == "–"


def test_correlation():
    x = np.array([0.1, 0.2, 0.4, 0.8])
    fit = cknna.correlation((x, np.exp(1 - 2 * x)))
    np.testing.assert_allclose([fit.r2, fit.slope, fit.intercept], [1, -2, 1], rtol=1e-9)
    y = np.array([5.0, 3.0, 4.0, 1.0])
    fit = cknna.correlation((x, y))
    np.testing.assert_allclose(fit.r2, np.corrcoef(x, np.log(y))[0, 1] ** 2, rtol=1e-9)
    assert fit.points == 4 and cknna.correlation(([1, 2], [1, 2])) is None and cknna.correlation(([1, 1, 1], [1, 2, 3])) is None


def test_cknna_is_fitted_within_settings_and_at_one_step():
    """Each setting lies on a line that falls, but at one step more CKNNA goes with a larger distance."""
    ended = {}
    for setting, shift in (("sit", 0), ("repa", 0.2), ("repa-e", 0.4)):
        distances = [[8.0 + 20 * shift + seed, 4.0 + 20 * shift + seed, 2.0 + 20 * shift + seed] for seed in range(2)]
        aligned = [[0.5 + shift - np.log(value / (1 + 20 * shift)) / 20 for value in row] for row in distances]
        ended[setting] = [checkpoints([10, 20, 30], fid=fid, cknna=x) for fid, x in zip(distances, aligned)]
    ended["repa"].append(checkpoints([10, 20], fid=[3.0, 2.0], cknna=[0.1, 0.2]))
    ended["repa-e"] += [checkpoints([10], fid=[3.0]), *runs(None)]  # without CKNNA: no part of it
    within = cknna.fits(cknna.checkpoints_of(ended, ended))
    np.testing.assert_allclose([within["sit"].r2, within["sit"].slope], [1, -20], rtol=1e-9)
    step, points = cknna.at_last_common_step(ended, ended)
    assert step == 20 and points["sit"] == ([ended["sit"][0].curve("cknna")[1], ended["sit"][1].curve("cknna")[1]], [4.0, 5.0])
    text = cknna.lines(["sit", "repa", "repa-e"], ended)
    assert (
        len(text) == 2
        and "R² is 1.00 with SiT (6 checkpoints), " in text[0]
        and "after 20 steps, over 7 runs of 3 settings" in text[1]
    )
    assert len(cknna.lines(["sit"], ended)) == 1  # two runs at one step are no correlation
    assert cknna.lines(["scratch"], ended) == [] and cknna.at_last_common_step(["scratch"], ended) is None


# ---- curves and pictures --------------------------------------------------------------------------------------------------


def checkpoints(steps, folder="folder", **curves):
    return Finished(folder, {"status": "done", "numbers": {"steps": steps, "curves": curves}})


def test_bands_are_over_common_steps():
    one, two = checkpoints([10, 20, 40], fid=[5, 4, 2]), checkpoints([20, 40, 60], fid=[6, 3, 1])
    curve = finished.band([one, two, checkpoints([10]), *runs(None)], "fid")
    np.testing.assert_array_equal(curve, [[20, 40], [5, 2.5], [4, 2], [6, 3]])
    np.testing.assert_array_equal(finished.band([one, two], "fid", last=30), [[20], [5], [4], [6]])
    assert finished.band([one], "cknna") is None and finished.band([one, checkpoints([7], fid=[1])], "fid") is None
    assert finished.common_steps([one, two]) == [20, 40]


def test_bands_of_logs(tmp_path):
    for name, values in (("a", {1: 2.0, 3: 4.0}), ("b", {3: 8.0, 4: 1.0})):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "time": 1.0, "latents/std": value}) for step, value in values.items()]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    ended = [Finished(tmp_path / name, {}) for name in "abc"]
    np.testing.assert_array_equal(finished.logged_band(ended, "latents/std"), [[3], [6], [4], [8]])
    assert finished.logged_band(ended, "vae/kl") is None


def test_samples_are_at_steps_of_all(tmp_path):
    rng = np.random.default_rng(0)
    ended = {}
    for name, steps in (("sit", [10, 20, 40, 60]), ("repa-e", [10, 20, 60])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "samples.npy", rng.integers(0, 256, (len(steps), 3, 4, 8, 8, 3), np.uint8))
        ended[name] = [checkpoints(steps, tmp_path / "missing"), checkpoints(steps, tmp_path / name)]
    rows, titles = picture_rows.samples_over_steps(ended, style.looks(ended))
    assert titles == ["samples after 20 steps", "samples after 60 steps"] and len(rows) == 2
    samples = np.load(tmp_path / "sit" / "samples.npy")
    for block, chosen in zip(rows[0].blocks, samples[[1, 3]]):
        assert block.shape == (2, 6, 8, 8, 3)  # a class after the other
        np.testing.assert_array_equal(block[1, 4], chosen[2, 2])
    assert picture_rows.samples_over_steps({"sit": runs(None)}, style.looks(["sit"])) == ([], [])


def test_samples_of_a_table_are_of_its_numbers(tmp_path):
    ended = {}
    for name, steps, compared in (("sit", [10, 20, 40], 1), ("dit", [30, 60], 1)):
        (tmp_path / name).mkdir()
        np.save(
            tmp_path / name / "samples.npy", np.arange(len(steps), dtype=np.uint8)[:, None, None, None, None, None].repeat(4, 2)
        )
        run = checkpoints(steps, tmp_path / name, fid=[30.0, 20.0, 10.0][: len(steps)])
        run.result["numbers"]["fid"] = run.curve("fid")[compared]
        ended[name] = [run]
    rows, titles = picture_rows.compared_samples(ended, style.looks(ended))
    assert [row.label for row in rows] == ["SiT\n(20 steps)", "DiT\n(60 steps)"] and titles == ["samples"]
    assert all((row.blocks[0] == 1).all() and row.blocks[0].shape[:2] == (2, 2) for row in rows)
    assert picture_rows.compared_samples({"sit": ended["sit"]}, style.looks(ended))[1] == ["samples after 20 steps"]


def test_latents_of_a_vae_share_their_colors(tmp_path):
    latents = np.random.default_rng(0).normal(size=(4, 2, 2, 5)) * [1, 1, 1, 0.01, 0.01]
    latents[0] *= 100
    np.save(tmp_path / "latents.npy", latents)
    for name in ("pictures", "reconstructions"):
        np.save(tmp_path / f"{name}.npy", np.full((4, 8, 8, 3), len(name), np.uint8))
    rows = picture_rows.latent_rows({"vae": [checkpoints([], tmp_path)]}, style.looks(["vae"]), count=3)
    assert [row.label for row in rows] == ["pictures", picture_rows.broken(style.label_of("vae"))]
    colors, reconstructions = rows[1].blocks
    assert colors.shape == (1, 3, 2, 2, 3) and reconstructions.shape == (1, 3, 8, 8, 3) and (reconstructions == 15).all()
    assert np.ptp(colors[0, 0].astype(int)) > 3 * np.ptp(colors[0, 1].astype(int), axis=(0, 1)).max()


def test_colors_are_kept_and_distinct():
    every = style.looks([*experiments.SETTINGS][:10])
    assert len({look.color for look in every.values()}) == len(every)
    assert style.looks(["repa-e", "other", "repa-e"])["repa-e"] == every["repa-e"] == style.FIXED["repa-e"]
    assert style.looks(["a", "a", "b"])["b"] == style.FREE[1]


def test_labels_are_broken_into_lines():
    assert picture_rows.broken("control: VAE without alignment") == "control: VAE\nwithout alignment"
    assert picture_rows.broken("SiT") == "SiT"


# ---- the page -------------------------------------------------------------------------------------------------------------

SCALE = SimpleNamespace(name="toy", pictures="emoji")
CONFIG = {
    "steps": 800, "ema_decay": 0.99, "data": {"image_size": 16, "batch_size": 32},
    "vae": {"channels": 8, "latent_channels": 8, "channel_multipliers": [1, 2, 4]},
    "sit": {"hidden_size": 64, "depth": 6, "encoder_depth": 2, "patch_size": 2},
}  # fmt: skip
DISTANCES = {"sit": 60.0, "repa": 50.0, "repa-e": 40.0, "naive": 90.0}


def fake_table(title, rows, claims, measures, **fields):
    return SimpleNamespace(
        title=title, question="Question.", rows=dict.fromkeys(rows, "4.07"), claims=claims, measures=measures,
        **({"expected": "The published order.", "curve": ""} | fields),
    )  # fmt: skip


def declare(monkeypatch, of_the_paper, later=None):
    """Makes these the tables of the paper, and those beyond it."""
    monkeypatch.setattr(tables, "TABLES", of_the_paper)
    monkeypatch.setattr(beyond, "TABLES", later or {})
    monkeypatch.setattr(experiments, "TABLES", of_the_paper | (later or {}))


@pytest.fixture
def declaration(monkeypatch):
    """Four tables; their figures are small. Two repeat a comparison of the first one."""
    monkeypatch.setitem(style.STYLE, "figure.dpi", 40)
    better = tables.Claim("repa", "sit", "7.90 against 17.20"), tables.Claim("repa-e", "repa", "4.07 against 7.90")
    larger = (
        tables.Claim("vae", "naive", "", "spatial_variance"),
        tables.Claim("vae", "repa-e", "", "spatial_variance", alike=True),
    )
    made_up = {
        "main": fake_table("SiT, REPA, REPA-E", ("sit", "repa", "repa-e"), better, ("fid", "label_accuracy")),
        "collapse": fake_table("Collapse", ("vae", "naive", "repa-e"), larger, ("spatial_variance",), curve="latents/std"),
        "bottleneck": fake_table("Bottleneck", ("repa", "repa-e"), (better[1],), ("fid", "alignment")),
        "later": fake_table("Later", ("sit", "scratch"), (tables.Claim("sit", "scratch", ""), better[0]), ("fid",)),
    }
    declare(monkeypatch, made_up)
    monkeypatch.setitem(findings.FOUND, "toy", {"main": "By chance."})
    monkeypatch.setitem(tables.MEASURES, "fid_equal_compute", tables.Measure("Frechet distance at equal compute", 1))
    return made_up


def make_task(folder, setting, seed=0):
    kind = experiments.SETTINGS[setting].job
    sampler = None if kind == "vae" else {"sampler": "heun", "steps": 10}
    description = {"setting": setting, "evaluation": {"samples": 100, "sampler": sampler}}
    content = {"description": description, "config": CONFIG | ({"steps": 1200} if kind == "vae" else {})}
    return miniature.Task(f"{setting} seed {seed}", kind, folder / f"{setting}-{seed}", content)


def finish(task, numbers, status="done", message=""):
    task.folder.mkdir(parents=True)
    result = {"status": status, "message": message, "numbers": numbers, "seconds": 2.0, "cpu_seconds": 60.0, "device": "cpu"}
    result |= {"processor": "Processor", "cores": 2, "jax": "0.10.1"}
    (task.folder / "result.json").write_text(json.dumps(result | {"description": task.content["description"]}))


def write_arrays(folder, checkpoints, rng):
    def pictures(*shape):
        return rng.integers(0, 256, (*shape, 16, 16, 3), np.uint8)

    arrays = {"latents": rng.normal(size=(6, 4, 4, 8)), "pictures": pictures(6), "reconstructions": pictures(6)}
    arrays["spectrum"] = np.linspace([1, 1], [0.01, 0.1], 16).T
    if checkpoints:
        arrays["samples"] = pictures(checkpoints, 3, 4)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    lines = [json.dumps({"step": step, "time": 1.0, "latents/std": 1 / step}) for step in (1, 10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def tasks(tmp_path, declaration):
    """Tasks of all settings, all finished but 'scratch'; a naive run diverged. REPA trains longer than REPA-E."""
    rng = np.random.default_rng(0)
    made = {"classifier": miniature.Task("classifier", "classifier", tmp_path / "classifier", {"description": {}})}
    finish(made["classifier"], {"accuracy": 0.9, "fid_of_held_out": 2.5})
    made["vae seed 0"] = make_task(tmp_path, "vae")
    finish(made["vae seed 0"], {"spatial_variance": 1.0})
    write_arrays(made["vae seed 0"].folder, 0, rng)
    for setting, distance in DISTANCES.items():
        steps = [200, 400, 800] if setting == "repa-e" else [200, 400, 800, 1000]
        for seed in range(3):
            task = made[f"{setting} seed {seed}"] = make_task(tmp_path, setting, seed)
            fid = [distance * 800 / step + seed for step in steps]
            curves = {"fid": fid, "cknna": [0.5 - 0.001 * value for value in fid]}
            numbers = {
                "fid": fid[2],
                "fid_equal_compute": fid[-1],
                "label_accuracy": 0.5,
                "spatial_variance": 1.1 + 0.01 * seed,
                "flop_per_step": 2e9,
            }
            finish(task, numbers | {"steps": steps, "curves": curves})
            write_arrays(task.folder, len(steps), rng)
    task = made["naive seed 3"] = make_task(tmp_path, "naive", 3)
    finish(task, {}, "diverged", "stopped at step 40: sit/loss=nan. Parameters are those of step 20")
    made["scratch seed 0"] = make_task(tmp_path, "scratch")
    return made


@pytest.mark.integration
def test_page(tasks, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("later-samples", "mine"):
        (tmp_path / "figures" / f"{name}.png").touch()
    report.write(tmp_path / "README.md", SCALE, tasks, tmp_path / "docs" / "front.png")
    text = (tmp_path / "README.md").read_text()
    beginning, rest = text.split("## All comparisons")
    assert "figures/opening.png" in beginning.splitlines()[2]
    words, others = (" ".join(part.split()) for part in (beginning, rest))
    assert "emoji of 16 x 16 pixels with a SiT of width 64 and 6 blocks, 800 steps of batch 32 and 3 runs of each" in words
    assert "Of 5 published comparisons 3 come out as published, 1 is undecided and 1 has not run." in words
    assert (
        "**Published, and so here:** SiT + REPA beats SiT after 400 steps (51.0 ± 2.5 against 61.0 ± 2.5); REPA-E beats"
        in words
    )
    assert "| [Collapse](#collapse) | 1 | 1 | 0 | 0 | 0 |" in beginning
    assert "| [Bottleneck](#bottleneck) | 0 | 0 | 0 | 0 | 1 |" in beginning
    difference = "51.0 ± 2.5 against 61.0 ± 2.5 | −10.0 [−12.3, −7.7] | **agrees** |"
    assert f"| SiT, REPA, REPA-E | Frechet distance of “SiT + REPA” < “SiT” | 7.90 against 17.20 | {difference}" in rest
    assert rest.count("**agrees** (counted in “SiT, REPA, REPA-E”)") == 2  # in the summary and in its table
    assert "Experiments that have not run: Later." in others and "## Later" not in rest
    assert "| SiT + REPA | 3 | 51.0 ± 2.5 | 0.500 ± 0.000 | 4.07 |" in rest
    assert "**Expected, before the runs of this table.** The published order." in others
    assert rest.count("**Where it differs.** By chance.") == 1
    assert "1.110 ± 0.025 (1 of 4 diverged)" in rest and "diverged: stopped at step 40: sit/loss=nan." in others
    assert "R² is 0.96 with SiT + REPA (12 checkpoints)" in others and others.count("R²") == 3
    assert "The same after 800 steps, over 6 runs of 2 settings" in others
    assert "bash launch/miniature.sh --scale toy --table main" in rest
    assert "14 runs, with classifier and encoders: 15 core-minutes on Processor with 2 cores. JAX 0.10.1." in others
    assert "90.0% of the held-out pictures" in others
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "!"))) <= 128
    shown = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    kinds = ["collapse", "collapse-samples", "collapse-latents", "bottleneck", "bottleneck-representation"]
    assert shown == [f"figures/{name}.png" for name in ("opening", *kinds)]
    for name in (*shown, "docs/front.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100, name
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"mine.png", *(Path(name).name for name in shown)}


@pytest.fixture
def haste(monkeypatch, declaration):
    """A setting beyond the paper, and its table, which repeats a comparison of the paper's, and one that has not run."""
    setting = tables.Setting("REPA, then none", "ldm", sampling={"steps": 4})
    monkeypatch.setitem(experiments.SETTINGS, "haste", setting)
    claims = tables.Claim("haste", "repa", "5.0 against 7.9"), tables.Claim("repa-e", "repa", "4.07 against 7.90")
    later = {
        "haste": fake_table("Alignment that ends", ("repa", "repa-e", "haste"), claims, ("fid",)),
        "muon": fake_table("Muon", ("sit", "muon"), (tables.Claim("muon", "sit", ""),), ("fid",)),
    }
    monkeypatch.setitem(experiments.SETTINGS, "muon", tables.Setting("Muon", "ldm"))
    declare(monkeypatch, declaration, later)


@pytest.mark.integration
def test_beyond_the_paper(tasks, tmp_path, monkeypatch, declaration, haste):
    """Without runs the page is as if there were no such table; with them it has a part more, which nothing above counts."""
    waiting = {f"haste seed {seed}": make_task(tmp_path, "haste", seed) for seed in range(3)}
    report.write(tmp_path / "before" / "README.md", SCALE, tasks)
    report.write(tmp_path / "waiting" / "README.md", SCALE, tasks | waiting)
    for seed, task in enumerate(waiting.values()):
        finish(task, {"fid": 45.0 + seed})
    report.write(tmp_path / "after" / "README.md", SCALE, tasks | waiting)
    before, same, after = (
        (tmp_path / name / "README.md").read_text().replace("17 runs, with classifier and encoders: 18", "14 runs, with "
        "classifier and encoders: 15")
        for name in ("before", "waiting", "after")
    )  # fmt: skip
    assert before == same and "Beyond" not in before
    paper, part = after.split("\n## Beyond the paper\n")
    assert paper == before
    words = " ".join(part.split())
    assert "None of it is among the comparisons counted above. Of 1 comparison 1 comes out as published." in words
    assert "| [Alignment that ends](#alignment-that-ends) | 1 | 0 | 0 | 0 | 1 |" in part
    assert "\n### Alignment that ends\n" in part and "Muon" not in part
    assert "“REPA, then none” < “SiT + REPA” (published: 5.0 against 7.9): **agrees**" in words
    assert "**agrees** (counted in “SiT, REPA, REPA-E”)" in words
    assert "](figures/haste.png)" in part and (tmp_path / "after" / "figures" / "haste.png").exists()


def test_page_of_nothing(tmp_path, declaration):
    tasks = {name: make_task(tmp_path, name) for name in ("vae", "sit", "repa-e")}
    report.write(tmp_path / "README.md", SCALE, tasks, tmp_path / "front.png")
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "No published comparison has run." in text and "![" not in text and not (tmp_path / "front.png").exists()
    assert "Experiments that have not run: SiT, REPA, REPA-E; Collapse; Bottleneck; Later." in text


def test_page_of_a_part(tasks, tmp_path):
    """Two settings, which have no arrays or CKNNA, are a page, too."""
    part = {name: make_task(tmp_path / "part", name) for name in ("vae", "sit", "repa", "repa-e")}
    for name, distance in (("sit", 5.0), ("repa", 4.0)):
        numbers = {"fid": distance, "flop_per_step": 1.0, "steps": [10], "curves": {"fid": [distance]}}
        finish(part[name], numbers)
    report.write(tmp_path / "README.md", SCALE, part)
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "Of 5 published comparisons 1 is undecided and 4 have not run." in text and "figures/opening.png" in text
    assert "0 to 1 runs of each" in text and "Not run: REPA-E (published: 4.07)." in text
    assert "figures/bottleneck" not in text and "R²" not in text


def test_where_a_run_diverged_its_other_samples_have_too(tmp_path):
    """Without them, sampling it in another way would win against a setting that loses for that run."""
    tasks = []
    for seed in range(4):
        trained, again = (make_task(tmp_path, setting, seed) for setting in ("repa", "repa-euler"))
        again.content["trained"] = str(trained.folder)
        tasks += [trained, again]
        if seed == 1:
            finish(trained, {}, "diverged")
        elif seed < 3:
            finish(trained, {"fid": 50.0 + seed})
            finish(again, {"fid": 40.0 + seed})
    ended = finished.finished_runs(tasks)
    assert [run.diverged for run in ended["repa-euler"]] == [run.diverged for run in ended["repa"]] == [False, True, False]
    assert verdicts.judge(tables.Claim("repa-euler", "repa", ""), ended).outcome == verdicts.DIVERGED


def test_a_table_is_shown_for_something_of_its_own(declaration):
    def shown(**ended):
        compared = comparisons.compare(ended)
        return [name for name in experiments.TABLES if comparisons.is_shown(name, compared, ended)]

    one = {"fid": 1.0, "spatial_variance": 1.0}
    run = [Finished("folder", {"status": "done", "numbers": one})]
    assert shown(repa=run) == shown(sit=run) == []
    assert shown(sit=run, repa=run) == ["main"]
    assert shown(**{"repa": run, "repa-e": run}) == ["main", "bottleneck"]  # of the second, all rows
    assert shown(sit=run, scratch=run) == ["later"]


def test_repeated_comparisons_are_counted_once():
    """Of the real tables: what is compared again, by the same runs and measure, names the table that counts it."""
    compared = comparisons.compare({})
    counted = [
        (one.claim.first, one.claim.second, one.claim.measure)
        for part in compared.values()
        for one in part
        if not one.counted_in
    ]
    assert len(counted) == len(set(counted)) < sum(map(len, compared.values()))
    assert [one.counted_in for one in compared["sizes"] if (one.claim.first, one.claim.second) == ("repa-e", "repa")] == [
        "main"
    ]
    assert not any(one.counted_in for one in compared["main"])


def test_machines_are_those_of_the_runs():
    """Two machines, and two versions of JAX: each with its own time; a GPU's is wall time."""
    cpu = {"device": "cpu", "processor": "A", "cores": 4, "jax": "0.10.1", "seconds": 1.0, "cpu_seconds": 120.0}
    gpu = {"device": "H200", "processor": "B", "cores": 16, "jax": "0.12.0", "seconds": 300.0, "cpu_seconds": 1.0}
    text = report._machine([cpu, gpu, cpu], {"sit": runs(1.0, 2.0)})
    assert "2 runs, " in text and "4 core-minutes on A with 4 cores; 5 minutes on H200, in a machine of B with 16 cores" in text
    assert text.endswith("JAX 0.10.1 and 0.12.0.")
    assert "on a processor that was not recorded" in report._machine([{"device": "cpu", "cpu_seconds": 60.0}], {})


def test_markdown():
    assert (
        markdown.link("What REPA-E is made of, in short")
        == "[What REPA-E is made of, in short](#what-repa-e-is-made-of-in-short)"
    )
    assert markdown.listed(["a", "b", "c"]) == "a, b and c" and markdown.listed(["a"]) == "a" and markdown.listed([]) == ""
    assert markdown.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    lines = markdown.wrapped("* " + "word " * 60).splitlines()
    assert len(lines) == 3 and all(line.startswith("  ") and len(line) <= 128 for line in lines[1:])


def test_a_figure_keeps_its_colors(tmp_path):
    """A saved figure has few levels of each color, white and black among them, and none is further off than half a level."""
    figure = figures.Figure(figsize=(2.56, 1), dpi=100)
    shades = np.arange(256, dtype=np.uint8)
    figure.figimage(np.stack([shades, shades[::-1], shades], axis=-1)[None].repeat(100, axis=0))
    style.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        row = np.asarray(picture)[50].astype(int)
    assert np.abs(row - np.stack([shades, shades[::-1], shades], axis=-1)).max() <= 4
    assert len(np.unique(row[:, 0])) == 32 and row[0, 0] == 0 and row[255, 0] == 255


def test_opening_figure_has_all_of_its_parts(tasks, tmp_path):
    ended = finished.finished_runs(tasks.values())
    figures.draw_opening(tmp_path / "opening.png", ended)
    with Image.open(tmp_path / "opening.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for setting in figures.HEADLINE:
        color = np.array([int(style.FIXED[setting].color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - color).max(axis=1) < 5).sum() > 10, setting


def test_tokenizers_of_a_table(monkeypatch):
    assert table_figures.tokenizers_of(SimpleNamespace(rows=("sit", "repa", "repa-e"))) == ["vae", "repa-e"]
    assert table_figures.tokenizers_of(SimpleNamespace(rows=("scratch", "vae"))) == ["scratch", "vae"]
    monkeypatch.setitem(experiments.SETTINGS, "later", tables.Setting("", "ldm", vae="repa-e"))
    assert table_figures.tokenizers_of(SimpleNamespace(rows=("sit", "later"))) == ["vae", "repa-e"]


def test_curves_end_where_the_table_compares():
    """The long runs of the headline are cut in tables of shorter ones; of the bottleneck CKNNA is shown."""
    ended = {"sit": [checkpoints([10, 20, 40], fid=[3.0, 2.0, 1.0], cknna=[0.1, 0.2, 0.3])], "naive": runs(None)}
    ended["sit"][0].result["numbers"]["fid"] = 2.0
    table = fake_table("", ("sit", "naive"), (), ("fid",))
    for name, measure, values in (("depth", "fid", [3, 2]), ("bottleneck", "cknna", [0.1, 0.2])):
        curves, title = table_figures.curves_of(name, table, ended)
        assert list(curves) == ["sit"] and title == tables.MEASURES[measure].title
        np.testing.assert_array_equal(curves["sit"][:2], [[10, 20], values])


def test_points_without_a_finite_distance_are_left_out():
    ended = {"sit": [checkpoints([1, 2, 3], fid=[3.0, math.inf, 1.0], cknna=[0.1, 0.2, 0.3])], "repa": runs(1.0)}
    assert cknna.checkpoints_of(("sit", "repa"), ended) == {"sit": ([0.1, 0.3], [3.0, 1.0])}


def test_plan_page(tmp_path):
    rows = [
        sizes.Planned("sit", 2e11, 20_000, 3, {"H200": 0.045, "RTX 4090": 0.18}, {}, 9, 0.0),
        sizes.Planned("repa-e", 3e11, 10_000, 2, {"H200": 0.18, "RTX 4090": 7.2}, {}, 6, 0.0),
    ]
    tasks = [make_task(tmp_path, name) for name in ("vae", "sit", "repa-e")]
    text = sizes.plan_page(SCALE, tasks, rows, ["The summary."])
    assert "\nThe summary.\n" in text
    header = "| setting | runs | steps | GFLOP per step | TFLOP of all runs | ms per step, one H200 | hours, one H200 | ms per"
    assert header in text
    assert "| SiT | 3 | 20,000 | 200.0 | 12,000 | 45.0 | 0.75 | 180.0 | 3.00 |" in text
    assert "| REPA-E | 2 | 10,000 | 300.0 | 6,000 | 180.0 | 1.00 | 7200.0 | 40 |" in text
    assert "| **all** | 5 |  |  | 18,000 |  | 1.75 |  | 43 |" in text
    words = " ".join(text.split())
    assert "1,200 steps of the VAE that is trained alone, 800 of all else (REPA-E has 800), of batch 32" in words
    assert (
        "8 latent ones at 4 x 4 positions (6.0 times fewer numbers than pixels have)" in words
        and "with 6 blocks on 4 tokens" in words
    )
    assert "by 10 steps of `heun`, without guidance" in words


def test_sheets_have_every_picture(tmp_path):
    """A row is drawn at its place: its pictures' color is found there, and its height is as computed."""
    block = np.zeros((2, 5, 8, 8, 3), np.uint8)
    rows = [picture_rows.PictureRow("a", "black", [block]), picture_rows.PictureRow("b", "black", [block + np.uint8(197)])]
    picture_rows.draw_rows(tmp_path / "rows.png", rows, ["title"])
    with Image.open(tmp_path / "rows.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] == round(100 * picture_rows.height_of(rows)) and pixels.shape[1] == 1000
    dark = (pixels == 0).all(axis=2).sum() / (pixels == 197).all(axis=2).sum()
    assert 0.9 < dark < 1.15  # equally large, beside the letters; 197 is a level of saved figures
