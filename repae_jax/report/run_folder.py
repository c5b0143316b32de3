"""Results in the folder of a run so far: metrics, config, cost, pictures, evaluations and the latent analysis."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from repae_jax.evaluation.metrics_file import Curve, MetricsFile, read_metrics
from repae_jax.report.fid import epochs_to_fid
from repae_jax.report.files import listing, place_of, read_json, unreadable
from repae_jax.report.pictures import Picture
from repae_jax.training import health

STOP_SECONDS = 3600  # a longer wait between two lines of metrics is a pause of the run, not its cost
LONGEST_TEXT = 400  # characters of one value in a table
# title and explanation of the pictures of a folder
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


def read_run(workdir: epath.PathLike, name: str, now: float) -> dict[str, Any]:
    """Reads everything that the page shows of one run, with `Picture` where a picture belongs and arrays in 'curves'.

    `now` is in seconds since 1970. FileNotFoundError if the folder has nothing that training writes.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no folder; give the --workdir of a training run")
    if not (workdir / "metrics.jsonl").exists() and not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} is not the folder of a run: it has neither metrics.jsonl nor checkpoints/")
    problems: list[str] = []
    metrics = _read_metrics(workdir / "metrics.jsonl", problems)
    config, devices, records = read_checkpoint(workdir, problems)
    curves = {metric: curve for metric, curve in metrics.curves.items() if metric != "eta_seconds"}  # shown once, at the top
    return {
        "name": name, "path": str(workdir), "job": (config or {}).get("job"), "curves": curves,
        "cost": run_cost(metrics.curves, metrics.steps, metrics.times, config, devices, now),
        "config": None if config is None else flatten(config), "problems": problems, "warnings": _warnings(metrics, config),
        "series": {kind: _read_series(workdir / kind, title) for kind, (title, _) in SERIES.items()},
        "generated": [_read_generated(path, problems) for path in listing(workdir / "generated", ".png")],
        "epochs_to_fid": epochs_to_fid(metrics.curves, (config or {}).get("data", {}).get("batch_size"), records),
        "evaluations": read_evaluations(workdir, problems), "analysis": read_analysis(workdir, problems),
    }  # fmt: skip


def _read_metrics(path: epath.Path, problems: list[str]) -> MetricsFile:
    try:
        metrics = read_metrics(path)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        problems.append("metrics.jsonl is not there: no curves, no cost." if is_missing else unreadable(path, error))
        return MetricsFile({}, np.array([], np.int64), np.array([]), [])
    if broken := metrics.broken:
        problems.append(f"metrics.jsonl: {len(broken)} broken line(s) left out, the first is line {broken[0]}.")
    return metrics


def _warnings(metrics: MetricsFile, config: Mapping[str, Any] | None) -> list[str]:
    """Returns what the run has logged as unhealthy."""
    align_end = flatten(config or {}).get("loss.align_end")
    watch = health.Watch(align_end if isinstance(align_end, int) else None)
    return [f"Step {step:,}: {sentence}" for step, sentence in watch.replay(metrics.curves)]


def read_checkpoint(workdir: epath.Path, problems: list[str]) -> tuple[dict[str, Any] | None, int | None, int | None]:
    """Returns config, number of devices and of training images from the newest complete checkpoint, each None if unknown.

    Read as the JSON files that Orbax keeps: `checkpoint.read_config` starts JAX's backend, which would take seconds, and the
    accelerator from a run that is using it.
    """
    finished = [path for path in listing(workdir / "checkpoints") if path.name.isdigit()]
    for path in sorted(finished, key=lambda path: -int(path.name)):
        if (config := read_json(path / "config" / "metadata", problems)) is not None:
            records = (read_json(path / "loader" / "metadata", []) or {}).get("records")
            return config, _count_devices(path / "state" / "_sharding"), records if isinstance(records, int) else None
    return None, None, None


def _count_devices(path: epath.Path) -> int | None:
    """Returns the number of devices that the arrays of a checkpoint were spread over; None if that is not stored."""
    named = (text for text in (read_json(path, []) or {}).values() if "NamedSharding" in str(text))
    try:
        return math.prod(json.loads(next(named))["shape"])
    except (StopIteration, ValueError, KeyError, TypeError):  # the layout of Orbax's own file is no promise
        return None


def run_cost(
    curves: Mapping[str, Curve], steps: Int[np.ndarray, " L"], times: Float[np.ndarray, " L"], config: Mapping[str, Any] | None,
    devices: int | None, now: float,
) -> dict[str, Any]:
    """Computes the cost of a run so far from the lines of its metrics.jsonl; times are in seconds since 1970, None is unknown.

    Returns:
      step, total, state ('running', 'stopped', 'finished'), updated, eta_seconds, images_per_second, seconds_per_step,
      mfu, tflops_per_device, input_wait, images, training_seconds (without compilation and pictures), elapsed_seconds (with
      them, without pauses of more than STOP_SECONDS), pauses, devices, device_hours; without those that are unknown.
    """
    cost = {"devices": devices, "total": (config or {}).get("steps")}
    for name in ("images_per_second", "seconds_per_step", "mfu", "tflops_per_device", "input_wait"):
        finite = [values[np.isfinite(values)] for key, (_, values) in curves.items() if key.rpartition("/")[2] == name]
        cost[name] = float(np.median(finite[0])) if finite and len(finite[0]) else None
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


def read_evaluations(workdir: epath.Path, problems: list[str]) -> list[dict[str, Any]]:
    """Returns the results of evaluations, oldest step first."""
    evaluations = []
    for path in listing(workdir / "evaluations", ".json"):
        record = read_json(path, problems)
        if record is None:
            continue
        metrics = record.get("metrics")
        if record.get("kind") not in KINDS or not isinstance(metrics, dict):
            problems.append(f"{place_of(path)} is no evaluation: it lacks metrics, or its kind is none of {', '.join(KINDS)}.")
            continue
        warnings, picture = record.get("warnings") or [], path.with_suffix(".png")
        evaluations.append({
            "kind": record["kind"], "name": path.stem, "step": _leaf(record.get("step")), "metrics": flatten(metrics),
            "protocol": flatten(record.get("protocol") or {}),
            "warnings": [_leaf(warning) for warning in (warnings if isinstance(warnings, list) else [warnings])],
            "picture": Picture(picture, f"Pictures of {path.stem}") if picture.exists() else None,
        })  # fmt: skip
    return sorted(evaluations, key=lambda result: (result["kind"], str(result["step"]).zfill(12), result["name"]))


def read_analysis(workdir: epath.Path, problems: list[str]) -> dict[str, Any]:
    """Returns the results of the latent analysis: numbers of each model, and pictures."""
    folder = workdir / "analysis"
    paths = {path.stem: path for path in listing(folder, ".png")}
    order = [*(stem for stem in ANALYSIS_PICTURES if stem in paths), *sorted(set(paths) - set(ANALYSIS_PICTURES))]
    record = (read_json(folder / "analysis.json", problems) or {}) if (folder / "analysis.json").exists() else {}
    models = [model for model in record.get("models") or [] if isinstance(model, dict)]
    rows = [
        {
            "model": _leaf(model.get("name")), **{name: _leaf(row.get(name)) for name in ("encoder", "measure", "timestep")},
            "best": max(values), "block": 1 + values.index(max(values)), "last": values[-1],
        }
        for model in models for row in model.get("cknna") or []
        if (values := [value for value in row.get("blocks") or [] if isinstance(value, float)])
    ]  # fmt: skip
    return {
        "models": [
            {name: _leaf(model.get(name)) for name in ("name", "step", "source")}
            | {"numbers": flatten(model.get("numbers") or {})} for model in models
        ],
        "cknna": rows, "protocol": flatten(record.get("protocol") or {}),
        "warnings": [_leaf(text) for text in record.get("warnings") or []],
        "pictures": [{"picture": Picture(paths[stem], ANALYSIS_PICTURES.get(stem, stem))} for stem in order],
    }  # fmt: skip


def _read_series(folder: epath.Path, title: str) -> list[dict[str, Any]]:
    paths = sorted((int(path.stem), path) for path in listing(folder, ".png") if path.stem.isdigit())
    return [{"step": step, "picture": Picture(path, f"{title} at step {step}")} for step, path in paths]


def _read_generated(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    settings = path.with_suffix(".json")
    return {
        "name": path.stem, "picture": Picture(path, f"Generated images {path.stem}"),
        "settings": flatten(read_json(settings, problems) or {}) if settings.exists() else {},
    }  # fmt: skip


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted names, safe to show: long texts and lists cut, numbers that JSON lacks as text."""
    if isinstance(value, dict) and (value or not prefix):
        parts = [flatten(child, f"{prefix}.{name}" if prefix else str(name)) for name, child in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: _leaf(value)}


def _leaf(value: Any) -> Any:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
