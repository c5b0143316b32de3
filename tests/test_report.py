import base64
import contextlib
import fcntl
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from repae_jax.report import __main__ as command
from repae_jax.report import curves, page, pictures, run_folder
from repae_jax.training import metric_log

NOW = 1.8e9
CHROMIUM = next(
    filter(None, [os.environ.get("REPAE_CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]),
    None,
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028$title"


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def write_run(folder, steps=(100, 200, 300), size=64, seed=0, config=(), lines=300):
    """A run of 400 steps as training leaves it at step 300; pictures of noise, which compresses worst."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = [
        {"step": i, "time": NOW - 2 * (lines - i) - 10, "vae/l1": 1 / i + seed, "sit/align": -0.1 * i, "skipped": 0.0,
         "images_per_second": 32.0, "seconds_per_step": 2.0, "eta_seconds": 200.0}
        for i in range(1, lines + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind in ("samples", "reconstructions"):
        for step in steps:
            save(folder / kind / f"{step:07d}.png", rng.integers(0, 256, (size, size, 3), np.uint8))
    write_json(
        folder / "checkpoints" / "300" / "config" / "metadata",
        {"job": "repae", "steps": 400, "data": {"batch_size": 64}, **dict(config)},
    )
    sharding = json.dumps({"sharding_type": "NamedSharding", "shape": [2, 4]})
    write_json(folder / "checkpoints" / "300" / "state" / "_sharding", {"abc=": sharding})
    return folder


def log_fids(folder, **fids):
    """Adds FIDs to the log, of step100 and so on."""
    lines = [{"step": int(step.removeprefix("step")), "time": NOW, "fid/5000_samples": fid} for step, fid in fids.items()]
    with (folder / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


def write_json(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def write_results(folder):
    """Files that evaluation, analysis and sampling leave beside a run."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    write_json(
        folder / "evaluations" / "fid.json",
        {"kind": "generation", "step": 300, "metrics": {"gfid": 4.07, "recall": float("nan")},
         "protocol": {"sampler": "sde", "guidance": {"scale": 2.2}}, "warnings": ["few samples"]},
    )  # fmt: skip
    save(folder / "evaluations" / "fid.png", pixels)
    write_json(folder / "evaluations" / "rfid.json", {"kind": "tokenizer", "step": None, "metrics": {"rfid": 0.74}})
    model = {"name": "sdvae", "source": "sdvae.pt", "step": None, "numbers": {"tv": 6627.35, "error": {"rot90": 0.4}}}
    model["cknna"] = [{"encoder": "dino", "measure": "cknna_paper", "timestep": 0.5, "blocks": [0.1, 0.6, 0.4, None]}]
    about = {"protocol": {"data": "digits", "cknna": {"k": 10}}, "warnings": ["few images"]}
    write_json(folder / "analysis" / "analysis.json", {"kind": "analysis", "models": [model], **about})
    for name in ("spectrum", "pca"):
        save(folder / "analysis" / f"{name}.png", pixels)
    save(folder / "generated" / "0000300-sde.png", pixels)
    write_json(folder / "generated" / "0000300-sde.json", {"step": 300, "sampler": "sde"})


def page_of(*workdirs, out=None):
    """The page of runs: (its text, the data in it)."""
    arguments = [*map(str, workdirs), *(["--out", str(out)] if out else [])]
    text = command.run(command.parse_args(arguments)).read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def error_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command.main()
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [16, 100, 2000])
@pytest.mark.parametrize("gaps", [False, True])
def test_thinned_curves_keep_their_extremes(limit, gaps):
    rng = np.random.default_rng(0)
    steps, values = np.arange(7, 30_007, 3), rng.normal(size=10_000)
    values[[1234, 8000]] = 50, -70
    if gaps:
        values[5000:5200] = np.nan
        values[9999] = np.inf
    thin_steps, thin_values = curves.thin_curve(steps, values, limit)
    assert limit / 2 < len(thin_steps) <= limit
    assert thin_steps[0] == 7 and thin_steps[-1] == 30_004 and (np.diff(thin_steps) > 0).all()
    assert thin_values[np.isfinite(thin_values)].max() == 50 and thin_values[np.isfinite(thin_values)].min() == -70
    np.testing.assert_array_equal(thin_values, values[(thin_steps - 7) // 3])
    assert np.isnan(thin_values).any() == gaps


def test_short_curves_stay_as_they_are():
    steps, values = np.arange(2000), np.random.default_rng(0).normal(size=2000)
    assert curves.thin_curve(steps, values)[1] is values


def test_curves_leave_room_for_the_rest(monkeypatch):
    monkeypatch.setattr(curves, "CURVES_BYTES", 70_000)
    rng = np.random.default_rng(0)
    runs = [{"curves": {f"loss/{i}": (np.arange(5000), rng.normal(size=5000)) for i in range(20)}}]
    notes = curves.fit_curves(runs)
    assert len(json.dumps(runs)) < 70_100
    points = len(runs[0]["curves"]["loss/3"]["s"])
    assert notes == [
        f"Curves of more than {2000 // 2 ** round(np.log2(2000 / points))} points are thinned out; the lowest and highest of "
        "every stretch are kept."
    ]
    assert runs[0]["curves"]["loss/3"]["n"] == 5000


def test_cost():
    metrics = {
        "images_per_second": (np.arange(5), np.array([32.0, 32, 32, np.nan, 40])),
        "seconds_per_step": (np.arange(5), np.full(5, 2.0)),
        "eta_seconds": (np.arange(5), np.arange(5.0)),
        "mfu": (np.arange(5), np.array([0.4, 0.4, np.nan, 0.4, 0.5])),
        "tflops_per_device": (np.arange(5), np.full(5, 80.0)),
        "input_wait": (np.arange(5), np.array([0.5, 0, 0, 0.1, 0])),
    }
    steps = np.array([1, 100, 200, 300, 400])
    times = NOW - np.array([250_800, 250_600, 250_400, 210, 10])  # three days between steps 200 and 300
    config = {"steps": 500, "data": {"batch_size": 64}}
    cost = run_folder.run_cost(metrics, steps, times, config, 8, NOW)
    assert cost == {
        "step": 400, "total": 500, "devices": 8, "images_per_second": 32, "seconds_per_step": 2, "mfu": 0.4, "images": 25_600,
        "tflops_per_device": 80, "input_wait": 0,
        "training_seconds": 800, "elapsed_seconds": 600, "pauses": 1, "device_hours": 8 * 600 / 3600, "updated": NOW - 10,
        "state": "running", "eta_seconds": 4,
    }  # fmt: skip
    assert run_folder.run_cost(metrics, steps, times, config, 8, NOW + 9e4)["state"] == "stopped"
    finished = run_folder.run_cost(metrics, steps, times, config | {"steps": 400}, None, NOW)
    assert finished["state"] == "finished" and not {"devices", "device_hours", "eta_seconds"} & set(finished)
    empty = np.array([])
    assert run_folder.run_cost({}, empty, empty, None, None, NOW) == {}


def test_speed_is_read_as_training_logs_it(tmp_path):
    clock = iter([0.0, 10.0])
    speed_of = functools.partial(metric_log.arithmetic_speed, flop_per_image=2e12, devices=4, peak=100e12)
    progress = metric_log.Progress(100, 0, 64, waited=[0.0], arithmetic=speed_of, clock=lambda: next(clock))
    speed = progress.update(20, waited=[1.0])
    lines = metric_log.JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.write(20, speed)
    lines.close()
    cost = page_of(tmp_path / "run")[1]["runs"][0]["cost"]
    assert set(speed) == set(metric_log.SPEED_NAMES) and speed["mfu"] == pytest.approx(0.64)
    shown = set(speed) - {"eta_seconds"}
    assert {name: cost[name] for name in shown} == {name: pytest.approx(speed[name]) for name in shown}


def test_slow_steps_are_no_pause():
    metrics = {"seconds_per_step": (np.arange(3), np.full(3, 60.0))}
    times = NOW + np.array([0, 6000, 12_300])
    cost = run_folder.run_cost(metrics, np.array([0, 100, 200]), times, None, None, NOW + 12_300)
    assert cost["pauses"] == 0 and cost["elapsed_seconds"] == 12_300


def test_config_differences():
    first = {"a.b": 1, "c": [1, 2], "d": None}
    assert page.config_differences([first, dict(first)]) == []
    assert page.config_differences([first, None, {"a.b": 2, "c": [1, 2], "e": 0}]) == ["a.b", "d", "e"]
    assert page.config_differences([None]) == []


def test_flatten():
    record = {"a": {"b": 1, "c": {}}, "x": [1, {"y": 2}], "nan": float("nan"), "text": "z" * 500, "none": None, "yes": True}
    flat = run_folder.flatten(record)
    assert flat.pop("text") == "z" * run_folder.LONGEST_TEXT + " …"
    assert flat == {"a.b": 1, "a.c": "{}", "x": '[1, {"y": 2}]', "nan": "NaN", "none": None, "yes": True}
    assert run_folder.flatten({}) == {}


def test_names_tell_runs_apart():
    assert command.names_of(["/runs/a", "/runs/b"]) == ["a", "b"]
    assert command.names_of(["/x/digits", "/y/digits"]) == ["x/digits", "y/digits"]
    with pytest.raises(ValueError, match="/runs/a is given more than once"):
        command.names_of(["/runs/a", "/runs/b", "/runs/a"])


# ---- whole pages ----------------------------------------------------------------------------------------------------------


def test_page_of_one_run(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "digits")
    write_results(folder)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    command.main()
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    text, data = page_of(folder)  # over the one before
    run = data["runs"][0]
    assert run["problems"] == run["warnings"] == [] and data["notes"] == []
    assert run["name"] == "digits" and run["job"] == "repae" and run["config"]["data.batch_size"] == 64
    assert run["cost"]["step"] == 300 and run["cost"]["total"] == 400 and run["cost"]["devices"] == 8
    assert set(run["curves"]) == {"vae/l1", "sit/align", "skipped", "images_per_second", "seconds_per_step"}
    assert [point["step"] for point in run["series"]["samples"]] == [100, 200, 300]
    picture = run["series"]["samples"][2]["picture"]
    assert picture["alt"] == "Samples at step 300" and picture["src"].startswith("data:image/png;base64,")
    generation, tokenizer = run["evaluations"]
    assert generation["metrics"] == {"gfid": 4.07, "recall": "NaN"} and generation["warnings"] == ["few samples"]
    assert generation["protocol"] == {"sampler": "sde", "guidance.scale": 2.2} and generation["picture"]["width"] == 60
    assert tokenizer["step"] is None and tokenizer["picture"] is None
    assert run["analysis"]["models"][0]["numbers"] == {"tv": 6627.35, "error.rot90": 0.4}
    assert run["analysis"]["protocol"] == {"data": "digits", "cknna.k": 10} and run["analysis"]["warnings"] == ["few images"]
    assert run["analysis"]["cknna"] == [
        {"model": "sdvae", "encoder": "dino", "measure": "cknna_paper", "timestep": 0.5, "best": 0.6, "block": 2, "last": 0.4}
    ]
    assert [point["picture"]["alt"][:8] for point in run["analysis"]["pictures"]] == ["Latents ", "Spectrum"]
    assert run["generated"][0]["settings"] == {"step": 300, "sampler": "sde"}
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["metrics.jsonl", "report.html"]


def test_what_the_log_warned_of_is_on_the_page(tmp_path):
    folder = write_run(tmp_path / "collapsed", config={"loss": {"align_end": None}})
    lines = [
        {"step": step, "time": NOW, "latents/std": 5.5 if step < 300 else 0.1, "sit/align": -0.5 if step < 2000 else 0.0}
        for step in range(100, 4100, 100)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shrunk, lost = page_of(folder)[1]["runs"][0]["warnings"]
    assert shrunk.startswith("Step 400: collapsing latents: latents/std is 0.1, and was 5.5 at the beginning. ")
    assert lost.startswith("Step 2,200: no alignment: sit/align is ")
    ended = {"data": {"batch_size": 64}, "loss": {"align_end": 1500}}
    write_json(folder / "checkpoints" / "300" / "config" / "metadata", ended)
    assert [text[:8] for text in page_of(folder)[1]["runs"][0]["warnings"]] == ["Step 400"]


def test_epochs_until_fid_is_low(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [{"step": step, "time": NOW, "fid/5000_samples": fid} for step, fid in [(100, 60.0), (200, 25.0), (300, 9.0)]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = page_of(folder)[1]["runs"][0]["epochs_to_fid"]
    assert [(row["k"], row["step"], row["epochs"]) for row in rows] == [
        (50, 200, None), (30, 200, None), (20, 300, None), (15, 300, None), (10, 300, None)
    ]  # fmt: skip
    write_json(folder / "checkpoints" / "300" / "loader" / "metadata", {"next_batch": 300, "records": 3200})
    rows = page_of(folder)[1]["runs"][0]["epochs_to_fid"]
    assert rows[0] == {"curve": "fid/5000_samples", "k": 50, "step": 200, "epochs": 200 * 64 / 3200}


def test_differences_within_noise(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    protocol = {"num_samples": 50_000, "reference": {"checksum": "0123"}}
    of_few = {**protocol, "num_samples": 500}
    results = [(0, "x", 2.0, protocol), (0, "y", 2.05, protocol), (1, "z", 2.2, protocol), (1, "few", 9, of_few)]
    for run, name, fid, about in results:
        record = {"kind": "generation", "step": 300, "metrics": {"fid": fid, "fid_stderr": 0.03}, "protocol": about}
        write_json(folders[run] / "evaluations" / f"{name}.json", record)
    runs = page_of(*folders)[1]["runs"]
    noise = {one["name"]: one.get("noise") for run in runs for one in run["evaluations"]}
    assert noise == {"x": "lowest", "y": "within noise: +0.05 ± 0.083", "z": "above noise: +0.2 ± 0.083", "few": None}


def test_page_of_several_runs(tmp_path):
    first = write_run(tmp_path / "a" / "run", config={"lr": 1e-4, "same": 1})
    second = write_run(tmp_path / "b" / "run", config={"lr": 2e-4, "same": 1}, seed=1)
    text, data = page_of(first, second)
    assert (first / "comparison.html").read_text(encoding="utf-8") == text
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"] and data["differing"] == ["lr"]
    assert "<title>a/run &#183; b/run</title>" in text
    assert page_of(first, second, out=tmp_path / "x.html")[1]["runs"][1]["curves"]["vae/l1"]["v"][0] == 2


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "ti')
    run = page_of(folder)[1]["runs"][0]
    assert run["problems"] == [] and run["config"] is None and run["curves"] == {} and run["cost"] == {}
    (folder / "metrics.jsonl").unlink()
    write_json(folder / "checkpoints" / "5" / "config" / "metadata", {"steps": 7})
    run = page_of(folder)[1]["runs"][0]
    assert run["problems"] == ["metrics.jsonl is not there: no curves, no cost."] and run["cost"] == {"total": 7}


def test_what_cannot_be_read_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    write_results(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[10], lines[20], lines[30] = '{"step"', "[1]", '{"step": 31, "time": 1e9, "vae/l1": null}'
    lines[40] = lines[40].replace('"sit/align": ', '"sit/align": "nan", "old": ')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    sample = folder / "samples" / "0000200.png"
    sample.write_bytes(sample.read_bytes()[:2000])
    (folder / "samples" / ".0000300.png.17.tmp").write_bytes(b"half")
    (folder / "samples" / "0000400.png").write_bytes(b"")
    (folder / "evaluations" / "half.json").write_text('{"kind": "gen')
    write_json(folder / "evaluations" / "other.json", {"kind": "speed", "metrics": {}})
    write_json(folder / "evaluations" / "list.json", [1])
    (folder / "analysis" / "analysis.json").write_text("")
    (folder / "checkpoints" / "400.orbax-checkpoint-tmp-1").mkdir()
    (folder / "checkpoints" / "400").mkdir()
    data = page_of(folder)[1]
    run = data["runs"][0]
    text = "\n".join(run["problems"])
    for name in (
        "metrics.jsonl: 3 broken line(s) left out, the first is line 11", "samples/0000200.png", "samples/0000400.png",
        "evaluations/half.json", "evaluations/other.json is no evaluation", "evaluations/list.json", "analysis/analysis.json",
        "400/config/metadata",
    ):  # fmt: skip
        assert name in text, name
    assert len(run["problems"]) == 8
    assert len(run["curves"]["vae/l1"]["s"]) == 297 and run["curves"]["sit/align"]["bad"] == 1
    assert [point["step"] for point in run["series"]["samples"]] == [100, 300] and len(run["evaluations"]) == 2
    assert run["config"]["steps"] == 400 and len(run["analysis"]["pictures"]) == 2


def test_texts_of_a_run_cannot_become_html(tmp_path):
    folder = write_run(tmp_path / HOSTILE.replace("/", ""), config={"note": HOSTILE, HOSTILE: 1})
    write_json(folder / "evaluations" / "x.json", {"kind": "generation", "metrics": {HOSTILE: 1}, "warnings": [HOSTILE]})
    text, data = page_of(folder)
    assert data["runs"][0]["config"]["note"] == HOSTILE and data["runs"][0]["evaluations"][0]["warnings"] == [HOSTILE]
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert "&lt;script&gt;alert(1)" in re.search("<title>(.*)</title>", text)[1]


@pytest.mark.parametrize("size", [200, pytest.param(400, marks=pytest.mark.integration)])
def test_the_page_stays_small(tmp_path, size, monkeypatch):
    monkeypatch.setattr(page, "PAGE_BYTES", 2_000_000)
    folder = write_run(tmp_path / "run", steps=range(1, 17), size=size)
    for i in range(5):
        save(folder / "generated" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8))
    text, data = page_of(folder)
    run = data["runs"][0]
    assert 800_000 < len(text) <= 2_000_000
    steps = [point["step"] for point in run["series"]["samples"]]
    assert 4 < len(steps) < 16 and steps[0] == 1 and steps[-1] == 16 and len(run["generated"]) == 5
    assert f"run: samples of {len(steps)} of 16 steps are shown, evenly chosen." in data["notes"]
    assert any("pictures are compressed" in note for note in data["notes"])


def test_many_small_pictures_are_kept_as_they_are(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(1, pictures.SERIES_POINTS + 1), size=32)
    data = page_of(folder)[1]
    assert data["notes"] == [] and len(data["runs"][0]["series"]["samples"]) == pictures.SERIES_POINTS


def test_too_many_single_pictures(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=())
    write_results(folder)
    monkeypatch.setattr(pictures, "PICTURE_BYTES", (150, 100))
    run = run_folder.read_run(folder, "run", NOW)
    assert pictures.thin_series([run], 450) == ["generated/0000300-sde.png is left out: too many pictures for one page."]
    assert run["generated"][0]["picture"] is None and run["evaluations"][0]["picture"] is not None
    notes = pictures.embed_pictures([run], 450)  # not one of them can be made so small
    assert len(notes) == 3 and all("does not fit into the page" in note for note in notes)
    assert run["generated"] == run["analysis"]["pictures"] == [] and len(run["evaluations"]) == 2


def test_encode_picture(tmp_path):
    path = epath.Path(tmp_path / "x.png")
    save(Path(path), np.random.default_rng(0).integers(0, 256, (500, 300, 3), np.uint8))
    whole = pictures.encode_picture(path, 1_000_000)
    assert whole["src"].startswith("data:image/png") and (whole["width"], whole["height"], whole["reduced"]) == (300, 500, 0)
    compressed = pictures.encode_picture(path, 250_000)
    assert compressed["src"].startswith("data:image/webp") and compressed["reduced"] == -1
    small = pictures.encode_picture(path, 30_000)
    assert len(small["src"]) <= 30_000 and small["reduced"] in (200, 350) and small["height"] == 500
    assert pictures.encode_picture(path, 100) is None


def test_mistakes(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    assert "is no folder" in error_of(monkeypatch, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither metrics.jsonl nor checkpoints/" in error_of(monkeypatch, tmp_path / "empty")
    assert "more than once" in error_of(monkeypatch, folder, folder)
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my notes</html>")
    assert "is not a report" in error_of(monkeypatch, folder, "--out", mine)
    assert mine.read_text() == "<html>my notes</html>"
    assert "is a folder" in error_of(monkeypatch, folder, "--out", tmp_path / "empty")
    assert "does not exist" in error_of(monkeypatch, folder, "--out", tmp_path / "no" / "x.html")


@pytest.mark.integration
def test_no_accelerator_is_touched(tmp_path):
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from repae_jax.report import __main__ as command; "
        f"command.run(command.parse_args([{str(folder)!r}])); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---- in a browser ---------------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, driven over its debugging pipe: no port, no package."""

    def __init__(self, folder):
        ours, theirs = [], []
        for mine in (1, 0):  # we write commands, it reads them; then the answers
            ends = os.pipe()
            ours.append(ends[mine])
            theirs.append(fcntl.fcntl(ends[1 - mine], fcntl.F_DUPFD, 10))
            os.close(ends[1 - mine])
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        command = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "-", CHROMIUM, *flags]
        self.process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL, start_new_session=True)
        for end in theirs:
            os.close(end)
        self.commands, self.answers = os.fdopen(ours[0], "wb", 0), os.fdopen(ours[1], "rb", 0)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], 300)[0], "the browser does not answer"
            part = os.read(self.answers.fileno(), 1 << 20)
            assert part, "the browser is gone"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=Path(path).as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.settle()

    def settle(self):
        """Waits until the page has drawn what was asked for."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def box(self, selector):
        """[left, top, width, height] of an element on the screen, scrolled to it."""
        return self.evaluate(
            f"(e => (e.scrollIntoView({{block: 'center', behavior: 'instant'}}), (r => [r.x, r.y, r.width, r.height])"
            f"(e.getBoundingClientRect())))(document.querySelector({json.dumps(selector)}))"
        )

    def mouse(self, kind, x, y, clicks=0):
        buttons = {} if kind == "mouseMoved" and not clicks else {"button": "left", "clickCount": clicks}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def key(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self):
        """Errors and warnings of the console, and requests that are not for the page itself or for data in it."""
        complaints = []
        for event in self.events:
            method, params = event["method"], event.get("params", {})
            if method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and params["type"] != "log"):
                complaints.append(params)
            if method == "Log.entryAdded":
                complaints.append(params["entry"])
            if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
                complaints.append(params["request"]["url"])
        return complaints

    def screenshot(self, path, width=1280, height=900, dark=False, whole=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.settle()
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # ends the session that was made for it
        self.process.wait()
        self.commands.close()
        self.answers.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install one, or name its program in REPAE_CHROMIUM")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """The page of two runs in the browser."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", config={"note": HOSTILE})
    second = write_run(folder / HOSTILE.replace("/", ""), steps=(100, 250), seed=1)
    write_results(second)
    log_fids(first, step100=60.0, step200=25.0, step300=9.0)
    log_fids(second, step100=30.0, step300=9.5)
    write_json(second / "checkpoints" / "300" / "loader" / "metadata", {"next_batch": 300, "records": 3200})
    (second / "samples" / "0000300.png").write_bytes(b"half")
    page_of(first, second)
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(first / "comparison.html")
    yield browser
    assert browser.complaints() == []


@pytest.mark.integration
def test_browser_renders_everything(opened):
    titles = opened.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert titles == [
        "Curves", "Samples", "Reconstructions", "Generated images", "Evaluations", "Latents", "Config", "Cost"
    ]  # fmt: skip
    assert opened.evaluate("document.querySelectorAll('.chart .line').length") == 6  # three metrics change, in two runs
    assert "⚠ few images" in opened.evaluate("document.querySelector('#latents').innerText")
    agreement = opened.evaluate("document.querySelector('#latents details.fields tbody tr').textContent")
    assert "cknna_paper" in agreement and agreement.endswith("0.50.620.4")
    assert "[object" not in opened.evaluate("document.body.textContent")
    assert "skipped = 0" in opened.evaluate("document.querySelector('#curves').textContent")
    assert HOSTILE.replace("/", "") in opened.evaluate("document.querySelector('header').innerText")
    assert "samples/0000300.png" in opened.evaluate("document.querySelector('.box').innerText")
    assert opened.evaluate("[...document.images].every(e => e.alt && (e.complete ? e.naturalWidth > 0 : true))")
    unnamed = "[...document.querySelectorAll('input')].filter(e => !e.labels.length && !e.getAttribute('aria-label')).length"
    assert opened.evaluate(unnamed) == 0
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.integration
def test_browser_shows_fids_of_runs_side_by_side(opened):
    """A chart of its own name, and the epochs until k of each run, or the step alone where the data set's size is unknown."""
    drawn = "[...document.querySelectorAll('[data-metric=\"fid/5000_samples\"]')]"
    charts = opened.evaluate(f"{drawn}.map(e => e.parentNode.innerText)")
    assert len(charts) == 1 and charts[0].startswith("FID of 5,000 samples")
    heading = "[...document.querySelectorAll('h3')].find(e => e.textContent.includes('EP_FID'))"
    rows = opened.evaluate(f"[...{heading}.nextSibling.querySelectorAll('tr')].map(e => [...e.children].map(c => c.innerText))")
    assert rows[0][:2] == ["k, FID of 5,000 samples", "first"]
    assert rows[1:] == [
        ["50", "step 200", "–"], ["30", "step 200", "6 step 300"], ["20", "step 300", "6 step 300"],
        ["15", "step 300", "6 step 300"], ["10", "step 300", "6 step 300"],
    ]  # fmt: skip


@pytest.mark.integration
def test_browser_slider_changes_the_picture(opened):
    shown = "[...document.querySelectorAll('#samples img')].map(e => e.alt)"
    assert opened.evaluate(shown) == ["Samples at step 300", "Samples at step 250"]
    before = opened.evaluate("document.querySelector('#samples img').src")
    opened.box("#samples-time")
    opened.evaluate("document.querySelector('#samples-time').focus()")
    for _ in range(3):
        opened.key("ArrowLeft", 37)
    assert opened.evaluate(shown) == ["Samples at step 100", "Samples at step 100"]
    assert opened.evaluate("document.querySelector('#samples output').textContent") == "step 100"
    assert opened.evaluate("document.querySelector('#samples img').src") != before
    left, top, width, height = opened.box("#samples-time")
    opened.mouse("mousePressed", left + width - 3, top + height / 2, 1)
    opened.mouse("mouseReleased", left + width - 3, top + height / 2, 1)
    assert opened.evaluate("document.querySelector('#samples img').src") == before


@pytest.mark.integration
def test_browser_enlarges_a_picture(opened):
    left, top, width, height = opened.box("#samples img")
    for kind in ("mousePressed", "mouseReleased"):
        opened.mouse(kind, left + width / 2, top + height / 2, 1)
    assert opened.evaluate("document.querySelector('dialog[open] img').alt") == "Samples at step 300"
    opened.key("Escape", 27)
    assert opened.evaluate("document.querySelector('dialog[open]')") is None


@pytest.mark.integration
def test_browser_zooms_charts(opened):
    axis = "[...document.querySelectorAll('[data-metric=\"vae/l1\"] .step')].map(e => e.textContent)"
    whole = opened.evaluate(axis)
    left, top, width, height = opened.box('[data-metric="vae/l1"]')
    middle = top + height / 2
    opened.mouse("mouseMoved", left + 0.5 * width, middle)
    assert "step" in opened.evaluate("document.querySelector('.chart:has([data-metric=\"vae/l1\"]) .tip').innerText")
    opened.mouse("mousePressed", left + 0.4 * width, middle, 1)
    opened.mouse("mouseMoved", left + 0.6 * width, middle, 1)
    assert opened.evaluate("document.querySelectorAll('.brush').length") == 1
    opened.mouse("mouseReleased", left + 0.6 * width, middle, 1)
    opened.settle()
    assert opened.evaluate(axis) != whole
    for metric in ("vae/l1", "sit/align"):  # all charts together
        low, high = opened.evaluate(
            f"(e => [Number(e.dataset.low), Number(e.dataset.high)])(document.querySelector('[data-metric=\"{metric}\"]'))"
        )
        assert 70 < low < 140 and 150 < high < 220
    for clicks in (1, 2):
        opened.mouse("mousePressed", left + 0.5 * width, middle, clicks)
        opened.mouse("mouseReleased", left + 0.5 * width, middle, clicks)
    opened.settle()
    assert opened.evaluate(axis) == whole
    opened.evaluate("document.querySelector('[data-metric=\"vae/l1\"]').focus()")
    opened.key("+", 187)
    opened.settle()
    assert opened.evaluate(axis) != whole
    opened.evaluate("document.querySelector('#reset-zoom').click()")
    opened.settle()
    assert opened.evaluate(axis) == whole


@pytest.mark.integration
def test_browser_log_scale_smoothing_and_runs(opened):
    heights = "document.querySelector('[data-metric=\"vae/l1\"] .line').getAttribute('d')"
    before = opened.evaluate(heights)
    opened.evaluate("document.querySelector('#log-scale').click()")
    opened.settle()
    logarithmic = opened.evaluate(heights)
    assert logarithmic != before
    note = "document.querySelector('.chart:has([data-metric=\"sit/align\"]) figcaption').textContent"
    assert "linear: not all positive" in opened.evaluate(note)
    opened.evaluate("zoom([320, 340])")  # a range in which no run has values
    opened.settle()
    assert opened.evaluate("document.querySelectorAll('.chart .line').length") == 0
    opened.evaluate("zoom(null)")
    opened.evaluate("(e => (e.value = 0, e.dispatchEvent(new Event('input'))))(document.querySelector('#smoothing'))")
    opened.settle()
    assert opened.evaluate("document.querySelectorAll('.chart .raw').length") == 0
    opened.evaluate("document.querySelector('.legend button').click()")
    opened.settle()
    assert opened.evaluate("document.querySelectorAll('[data-metric=\"vae/l1\"] .line').length") == 1


@pytest.mark.integration
def test_browser_screenshots(opened, tmp_path):
    """Desktop, dark and narrow: nothing sticks out, and the schemes differ. REPAE_SCREENSHOTS=FOLDER keeps them."""
    folder = Path(os.environ.get("REPAE_SCREENSHOTS", tmp_path))
    opened.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    for name, options in {"desktop": {}, "dark": {"dark": True}, "narrow": {"width": 390, "height": 800}}.items():
        opened.screenshot(folder / f"{name}.png", **options)
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    light, dark = (np.asarray(Image.open(folder / f"{name}.png").convert("L")) for name in ("desktop", "dark"))
    assert light.mean() > 200 > 80 > dark.mean() and light.std() > 5
