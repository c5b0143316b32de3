"""RESULTS.md of the miniature paper: every table with the published numbers beside ours, and pictures."""

import importlib.metadata
import math
import os
import platform
import textwrap
from pathlib import Path

import numpy as np

from launch.miniature import tables
from repae_jax.evaluation import plots
from repae_jax.images import grid

AGREES, NOISE, DISAGREES, DIVERGED, NOT_RUN = "agrees", "within noise", "disagrees", "both diverged", "not run"
ALIKE = 0.1  # relative difference up to which two settings are about equal
_SAMPLE_SCALE = 2


def write(path, tasks, seeds=None):
    """Writes the tables that have results, and their pictures into the folder `results` beside the file.

    Args:
      path: path of the Markdown file.
      tasks: name -> miniature.Task of every run; without a result it counts as not run.
      seeds: runs of each setting; default the tables' own numbers.
    """
    path = Path(path)
    folder = path.parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: task.result() for name, task in tasks.items()}
    sections, claims, missing = [], [], []
    for name, table in tables.TABLES.items():
        counts = {setting: tables.runs_per_setting(table, setting, seeds) for setting in table.rows}
        runs_of = {setting: _runs(setting, count, tasks, results) for setting, count in counts.items()}
        if not any(runs_of.values()):
            missing.append(f"`{name}`")
            continue
        verdicts = [(claim, *judge(claim, runs_of)) for claim in table.claims]
        claims += [(name, table, *verdict) for verdict in verdicts]
        pictures = draw(name, table, runs_of, folder)
        sections.append(section(name, table, runs_of, verdicts, [f"{folder.name}/{picture}" for picture in pictures], results))
    content = [introduction(results, tasks), summary(claims, missing), *sections]
    path.write_text("\n\n".join(content) + "\n")


def _runs(setting, seeds, tasks, results):
    """Returns [(folder, result)] of a setting's finished runs, by seed."""
    runs = [f"{setting} seed {seed}" for seed in range(seeds)]
    return [(tasks[name].folder, results[name]) for name in runs if results.get(name)]


def numbers_of(runs, measure):
    """Returns a measure of each run: infinite if the run diverged, nan if it has no such measure."""
    return [math.inf if result["status"] == "diverged" else _number(result["numbers"].get(measure)) for _, result in runs]


def _number(value):
    if value is None:
        return math.nan
    return float(value) if math.isfinite(float(value)) else math.inf


def judge(claim, runs_of):
    """Compares the order of our runs with the published one.

    Args:
      claim: tables.Claim.
      runs_of: setting -> [(folder, result)].

    Returns:
      (verdict, our numbers as text).
    """
    measure = tables.MEASURES[claim.measure]
    first, second = (np.array(numbers_of(runs_of.get(name, []), claim.measure)) for name in (claim.first, claim.second))
    if not len(first) or not len(second) or np.isnan([*first, *second]).any():
        return NOT_RUN, ""
    ours = f"{cell(first, measure)} against {cell(second, measure)}"
    failed = not np.isfinite(first).all(), not np.isfinite(second).all()
    if any(failed):
        return (DIVERGED if all(failed) else DISAGREES if claim.alike or failed[0] else AGREES), ours
    gap = (first.mean() - second.mean()) * (1 if measure.more_is_better else -1)
    spread = math.hypot(_std(first), _std(second))
    if len(first) == len(second) == 1:
        ours += " (one run each)"
    if claim.alike:
        return (AGREES if abs(gap) <= max(spread, ALIKE * abs(second.mean())) else DISAGREES), ours
    if abs(gap) <= spread:
        return NOISE, ours
    return (AGREES if gap > 0 else DISAGREES), ours


def _std(values):
    return values.std(ddof=1) if len(values) > 1 else 0.0


def cell(values, measure):
    """Returns 'mean ± std' of the runs, and the number of those that diverged."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    finite = values[np.isfinite(values)]
    if not len(values):
        return "–"
    if not len(finite):
        return "diverged"
    text = f"{finite.mean():.{measure.digits}f}"
    if len(finite) > 1:
        text += f" ± {_std(finite):.{measure.digits}f}"
    return text if len(finite) == len(values) else f"{text} ({len(values) - len(finite)} of {len(values)} diverged)"


def section(name, table, runs_of, verdicts, pictures, results):
    """Returns one table as Markdown."""
    measures = {key: tables.MEASURES[key] for key in table.measures}
    header = ["setting", "runs", *(measure.title for measure in measures.values()), "published"]
    rows = [
        [tables.SETTINGS[setting].label, str(len(runs))]
        + [cell(numbers_of(runs, key), measure) for key, measure in measures.items()]
        + [table.rows[setting] or "–"]
        for setting, runs in runs_of.items()
    ]
    lines = [f"## {table.title}", "", _wrapped(table.question), *_qualities(runs_of, results), "", *_table(header, rows), ""]
    lines += [f"* {sentence(claim)}: **{verdict}**{f', {ours}' if ours else ''}." for claim, verdict, ours in verdicts]
    messages = [result["message"] for runs in runs_of.values() for _, result in runs if result["message"]]
    lines += [f"* Diverged: {message.split('. ')[0]}." for message in messages]
    lines += ["", f"`bash launch/miniature.sh --table {name}`"]
    lines += ["", *(f"![{table.title}]({picture})" for picture in pictures)]
    return "\n".join(lines)


def sentence(claim):
    """Returns a claim in words."""
    first, second = (tables.SETTINGS[name].label for name in (claim.first, claim.second))
    measure = tables.MEASURES[claim.measure]
    relation = "about the same" if claim.alike else "larger" if measure.more_is_better else "smaller"
    conjunction = "as with" if claim.alike else "than with"
    return f"Published: {measure.title} {relation} with “{first}” {conjunction} “{second}” ({claim.published})"


def _qualities(runs_of, results):
    """Returns a line on the encoders' accuracies, if a table compares encoders."""
    names = {tables.SETTINGS[setting].encoder for setting in runs_of}
    trained = {name: results.get(f"{name} encoder") for name in tables.ENCODERS if name in names}
    accuracies = [f"{name} {result['numbers']['accuracy']:.3f}" for name, result in trained.items() if result]
    if len(names) < 2 or not accuracies:
        return []
    return ["", f"Held-out accuracy of the encoders, with the linear layer of their training: {', '.join(accuracies)}."]


def _table(header, rows):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def summary(claims, missing):
    """Returns all comparisons as Markdown."""
    verdicts = [verdict for *_, verdict, _ in claims]
    counts = {verdict: verdicts.count(verdict) for verdict in (AGREES, NOISE, DISAGREES, DIVERGED, NOT_RUN)}
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    rows = [
        [table.title, sentence(claim).removeprefix("Published: "), ours or "–", verdict]
        for _, table, claim, verdict, ours in claims
    ]
    lines = ["## Summary", "", f"Of {len(claims)} published comparisons: {total or 'none run yet'}.", ""]
    lines += _table(["experiment", "published", "here", "order"], rows)
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines)


def introduction(results, tasks):
    """Returns sizes, measures and machine as Markdown."""
    done = [name for name, result in results.items() if result]
    runs = [name for name in done if tasks[name].kind in tables.PRESETS]
    minutes = sum(results[name]["cpu_seconds"] for name in done) / 60
    config = tables.config_of(tables.Run("repa-e"))
    vae, sit, pixels = config.vae, config.sit, config.data.image_size
    side = pixels // 2 ** (len(vae.channel_multipliers) - 1)
    classifier = ""
    if results.get("classifier"):
        numbers = results["classifier"]["numbers"]
        classifier = (
            f" It reads {numbers['accuracy']:.1%} of the held-out digits rightly, whose Frechet distance is "
            f"{numbers['fid_of_held_out_digits']:.1f}."
        )
    paragraphs = [
        "REPA-E's comparisons, repeated on scikit-learn's handwritten digits at a size that two CPU cores manage. "
        "`bash launch/miniature.sh` makes this file: every number and every verdict in it is computed. A miniature can "
        "differ from the paper for many reasons, its size first of all; where it does, this file says so.",
        f"* **Size.** Digits at {pixels} x {pixels} pixels. A VAE of {vae.channels} channels, with {vae.latent_channels} "
        f"latent ones at {side} x {side} positions, trained {tables.VAE_STEPS} steps. SiT and DiT of width "
        f"{sit.hidden_size} with {sit.depth} blocks, aligned after block {sit.encoder_depth}, {tables.STEPS} steps of batch "
        f"{config.data.batch_size}; averages with decay {config.ema_decay}.",
        "* **Numbers.** Mean ± standard deviation over runs with different seeds, all from the same VAE. The Frechet "
        f"distance is between {tables.SAMPLES} samples without guidance and the training digits, in the features of a small "
        f"classifier, so it compares with nothing outside this file.{classifier} Losses are means over the last quarter of "
        f"the steps; reconstruction is of held-out digits in [-1, 1]. SiT samples with {_sampler('sit')}, DiT with "
        f"{_sampler('dit')}.",
        f"* **Verdicts.** “{AGREES}” and “{DISAGREES}” are about the order of the means. “{NOISE}”: they differ by no more "
        f"than the spread, the root of both variances' sum. Two settings are alike within the spread or {ALIKE:.0%}.",
        f"* **Machine.** {_processor()}, {os.cpu_count()} cores, JAX {importlib.metadata.version('jax')}: {len(runs)} runs "
        f"in {minutes:.0f} core-minutes, with classifier and encoders.",
    ]
    return "# The miniature paper\n\n" + "\n\n".join(_wrapped(paragraph) for paragraph in paragraphs)


def _wrapped(text):
    """Wraps a paragraph or an item of a list."""
    indent = "  " if text.startswith("* ") else ""
    return textwrap.fill(text, 128, subsequent_indent=indent, break_on_hyphens=False)


def _sampler(network):
    sampler = tables.SAMPLERS[network]
    return f"{sampler['steps']} steps of `{sampler['sampler']}`"


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def draw(name, table, runs_of, folder):
    """Draws the pictures of one table; returns the files' names."""
    labels = {setting: tables.SETTINGS[setting].label for setting, runs in runs_of.items() if runs}
    measure = table.measures[0]
    values = {labels[setting]: numbers_of(runs_of[setting], measure) for setting in labels}
    curves = {}
    for setting, label in labels.items():
        source, result = runs_of[setting][0]
        if table.curve and (source / "metrics.jsonl").exists():
            read = plots.read_curves(source / "metrics.jsonl")
            if table.curve in read:
                curves[label] = read[table.curve]
        elif not table.curve and "fid_steps" in result["numbers"]:
            heights = [np.mean(numbers_of(runs_of[setting], key)) for key in ("fid_halfway", "fid")]
            curves[label] = np.array(result["numbers"]["fid_steps"]), np.array(heights)
    title = table.curve or tables.MEASURES["fid"].title
    files = [f"{name}.png"]
    plots.plot_settings(folder / files[0], values, tables.MEASURES[measure].title, curves, title, log_scale=bool(table.curve))
    samples = {labels[setting]: _samples(runs_of[setting][0][0]) for setting in labels}
    samples = {label: picture for label, picture in samples.items() if picture is not None}
    if samples:
        files.append(f"{name}-samples.png")
        plots.show_pictures(folder / files[-1], samples)
    if table.curve:
        latents = {labels[setting]: runs_of[setting][0][0] / "latents.npy" for setting in labels}
        pictures = {
            f"{label}: latents": grid(plots.pca_colors(np.load(file)), columns=5, padding=1, scale=8)
            for label, file in latents.items()
            if file.exists()
        }
        if pictures:
            files.append(f"{name}-latents.png")
            plots.show_pictures(folder / files[-1], pictures)
    return files


def _samples(folder):
    """Returns samples with one column per class; None if there are none."""
    file = folder / "samples.npy"
    if not file.exists():
        return None
    samples = np.load(file)  # [classes, SHOWN, H, W, 3]
    return grid(samples.swapaxes(0, 1).reshape(-1, *samples.shape[2:]), columns=len(samples), scale=_SAMPLE_SCALE)
