"""What a run has left in its folder so far: metrics, config, cost, pictures, results of evaluations and of the analysis."""

import array
import json
import math

import numpy as np
from etils import epath

from repae_jax.report.files import listing, place_of, read_json, unreadable
from repae_jax.report.pictures import Picture

STOP_SECONDS = 3600  # a longer wait between two lines of metrics is a pause of the run, not its cost
LONGEST_TEXT = 400  # characters of one value in a table
# title, and what the pictures of a folder show
SERIES = {
    "samples": ("Samples", "Samples from the EMA weights; labels and noise are the same at every step."),
    "reconstructions": ("Reconstructions", "Pairs: the original on the left, its reconstruction on the right."),
}
ANALYSIS_PICTURES = {
    "pca": "Latents as colors: their first three principal components",
    "spectrum": "Spectrum of the latents beside that of the images",
    "channels": "Statistics of each latent channel",
    "equivariance": "Equivariance error under scaling and rotation",
    "cknna": "CKNNA of the SiT's hidden states with an encoder, by block and timestep",
}
KINDS = {"generation": "Generation", "tokenizer": "Tokenizer"}


def read_run(workdir, name, now):
    """Everything the page shows of one run.

    Args:
      workdir: its folder.
      name: it goes by.
      now: seconds since 1970.

    Returns:
      dict for the page, with `Picture` where a picture belongs and arrays in 'curves'.

    Raises:
      FileNotFoundError: if the folder is not a run's.
    """
    workdir = epath.Path(workdir)
    check_run(workdir)
    problems = []
    curves, steps, times = read_metrics(workdir / "metrics.jsonl", problems)
    config, devices = read_checkpoint(workdir, problems)
    cost = run_cost(curves, steps, times, config, devices, now)
    curves.pop("eta_seconds", None)  # told once, at the top
    return {
        "name": name, "path": str(workdir), "job": (config or {}).get("job"), "cost": cost, "curves": curves,
        "config": None if config is None else flatten(config), "problems": problems,
        "series": {kind: _read_series(workdir / kind, title) for kind, (title, _) in SERIES.items()},
        "generated": [_read_generated(path, problems) for path in listing(workdir / "generated", ".png")],
        "evaluations": read_evaluations(workdir, problems), "analysis": read_analysis(workdir, problems),
    }  # fmt: skip


def check_run(workdir):
    """FileNotFoundError if the folder has nothing that training writes."""
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no folder; give the --workdir of a training run")
    if not (workdir / "metrics.jsonl").exists() and not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} is not the folder of a run: it has neither metrics.jsonl nor checkpoints/")


def read_metrics(path, problems):
    """All curves of a metrics.jsonl, whatever state it is in.

    Unlike `plots.read_curves` it keeps the times, and goes on after a broken line.

    Args:
      path: the file; may be missing.
      problems: list of messages, added to.

    Returns:
      (name -> (steps int64 [N], values float64 [N]), steps int64 [L] and times float64 [L] of all lines).
    """
    curves, lines, broken = {}, (array.array("q"), array.array("d")), []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    record = json.loads(raw)
                    step, seconds = int(record.pop("step")), float(record.pop("time"))
                    values = {name: float(value) for name, value in record.items()}
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                    if raw.endswith(b"\n"):  # else the run is still writing it, or was killed there
                        broken.append(number)
                    continue
                lines[0].append(step)
                lines[1].append(seconds)
                for name, value in values.items():
                    points = curves.setdefault(name, (array.array("q"), array.array("d")))
                    points[0].append(step)
                    points[1].append(value)
    except FileNotFoundError:
        problems.append("metrics.jsonl is not there: no curves, no cost.")
    except OSError as error:
        problems.append(unreadable(path, error))
    if broken:
        problems.append(f"metrics.jsonl: {len(broken)} broken line(s) left out, the first is line {broken[0]}.")
    curves = {name: (np.array(steps, np.int64), np.array(values, np.float64)) for name, (steps, values) in curves.items()}
    return curves, np.array(lines[0], np.int64), np.array(lines[1], np.float64)


def read_checkpoint(workdir, problems):
    """Config and number of devices, from the newest checkpoint that is complete.

    Read as the JSON files that Orbax keeps: `checkpoint.read_config` starts JAX's backend, which would take seconds, and the
    accelerator from a run that is using it.

    Args:
      workdir: the run's folder.
      problems: list of messages, added to.

    Returns:
      (dict, int), each None if unknown; no checkpoints is no problem.
    """
    folder = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in listing(folder) if path.name.isdigit())
    for step in reversed(steps):  # a name of digits alone is a finished checkpoint's
        config = read_json(folder / str(step) / "config" / "metadata", problems)
        if config is not None:
            return config, _count_devices(folder / str(step) / "state" / "_sharding")
    return None, None


def _count_devices(path):
    """Devices that the arrays of a checkpoint were spread over; None if that is not stored."""
    named = (text for text in (read_json(path, []) or {}).values() if "NamedSharding" in str(text))
    try:
        return math.prod(json.loads(next(named))["shape"])
    except (StopIteration, ValueError, KeyError, TypeError):  # Orbax's own file, whose layout is no promise
        return None


def run_cost(curves, steps, times, config, devices, now):
    """What a run took so far, as numbers; those that are unknown are left out.

    Args:
      curves: name -> (steps, values).
      steps: int [L] of the lines of metrics.jsonl.
      times: float [L], seconds since 1970.
      config: the run's; None if unknown.
      devices: number; None if unknown.
      now: seconds since 1970.

    Returns:
      dict: step, total, state ('running', 'stopped', 'finished'), updated, eta_seconds, images_per_second, seconds_per_step,
      mfu, tflops_per_device, input_wait, images, training_seconds (without compilation and pictures), elapsed_seconds (with
      them, without pauses of more than STOP_SECONDS), pauses, devices, device_hours.
    """
    cost = {"devices": devices, "total": (config or {}).get("steps")}
    for name in ("images_per_second", "seconds_per_step", "mfu", "tflops_per_device", "input_wait"):
        found = [values[np.isfinite(values)] for key, (_, values) in curves.items() if key.rpartition("/")[2] == name]
        cost[name] = float(np.median(found[0])) if found and len(found[0]) else None
    if len(steps):
        step, gaps = int(steps.max()), np.diff(times)
        pauses = gaps - np.diff(steps) * (cost["seconds_per_step"] or 0) > STOP_SECONDS
        elapsed = float(gaps[~pauses].clip(0).sum())
        cost |= {"step": step, "updated": float(times[-1]), "elapsed_seconds": elapsed, "pauses": int(pauses.sum())}
        usual = float(np.max(gaps[~pauses][-20:], initial=120))
        running = now - times[-1] < 5 * usual
        cost["state"] = "finished" if step == cost["total"] else "running" if running else "stopped"
        if cost["state"] == "running" and "eta_seconds" in curves:
            cost["eta_seconds"] = float(curves["eta_seconds"][1][-1])
        if cost["seconds_per_step"]:
            cost["training_seconds"] = cost["seconds_per_step"] * step
        if config is not None:
            cost["images"] = config["data"]["batch_size"] * step
        if devices:
            cost["device_hours"] = elapsed * devices / 3600
    return {name: value for name, value in cost.items() if value is not None and value == value}


def read_evaluations(workdir, problems):
    """Results of evaluations, oldest step first: dicts of kind, name, step, metrics, protocol, warnings, picture or None."""
    found = []
    for path in listing(workdir / "evaluations", ".json"):
        record = read_json(path, problems)
        if record is None:
            continue
        metrics = record.get("metrics")
        if record.get("kind") not in KINDS or not isinstance(metrics, dict):
            problems.append(f"{place_of(path)} is no evaluation: it lacks metrics, or its kind is none of {', '.join(KINDS)}.")
            continue
        warnings, picture = record.get("warnings") or [], path.with_suffix(".png")
        found.append({
            "kind": record["kind"], "name": path.stem, "step": _leaf(record.get("step")), "metrics": flatten(metrics),
            "protocol": flatten(record.get("protocol") or {}),
            "warnings": [_leaf(warning) for warning in (warnings if isinstance(warnings, list) else [warnings])],
            "picture": Picture(picture, f"Pictures of {path.stem}") if picture.exists() else None,
        })  # fmt: skip
    return sorted(found, key=lambda one: (one["kind"], str(one["step"]).zfill(12), one["name"]))


def read_analysis(workdir, problems):
    """Results of the latent analysis: numbers of each model, and pictures."""
    folder = workdir / "analysis"
    paths = {path.stem: path for path in listing(folder, ".png")}
    order = [*(stem for stem in ANALYSIS_PICTURES if stem in paths), *sorted(set(paths) - set(ANALYSIS_PICTURES))]
    record = (read_json(folder / "analysis.json", problems) or {}) if (folder / "analysis.json").exists() else {}
    models = [model for model in record.get("models") or [] if isinstance(model, dict)]

    def shown(model):
        return {key: _leaf(model.get(key)) for key in ("name", "step", "source")} | {
            "numbers": flatten(model.get("numbers") or {})
        }

    rows = [
        {
            "model": _leaf(model.get("name")), **{name: _leaf(row.get(name)) for name in ("encoder", "measure", "timestep")},
            "best": max(values), "block": 1 + values.index(max(values)), "last": values[-1],
        }
        for model in models for row in model.get("cknna") or []
        if (values := [value for value in row.get("blocks") or [] if isinstance(value, float)])
    ]  # fmt: skip
    return {
        "models": [shown(model) for model in models], "cknna": rows, "protocol": flatten(record.get("protocol") or {}),
        "warnings": [_leaf(text) for text in record.get("warnings") or []],
        "pictures": [{"picture": Picture(paths[stem], ANALYSIS_PICTURES.get(stem, stem))} for stem in order],
    }  # fmt: skip


def _read_series(folder, title):
    """[{step, picture}] of a folder of pictures named by their step."""
    paths = sorted((int(path.stem), path) for path in listing(folder, ".png") if path.stem.isdigit())
    return [{"step": step, "picture": Picture(path, f"{title} at step {step}")} for step, path in paths]


def _read_generated(path, problems):
    """A picture of samples, and the settings beside it if they are there."""
    settings = path.with_suffix(".json")
    return {
        "name": path.stem,
        "picture": Picture(path, f"Generated images {path.stem}"),
        "settings": flatten(read_json(settings, problems) or {}) if settings.exists() else {},
    }


def flatten(value, prefix=""):
    """Nested dicts as one dict of dotted names, safe to show: long texts and lists cut, numbers that JSON lacks as text."""
    if isinstance(value, dict) and (value or not prefix):
        parts = [flatten(child, f"{prefix}.{name}" if prefix else str(name)) for name, child in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: _leaf(value)}


def _leaf(value):
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
