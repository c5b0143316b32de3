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


def write(path, tasks, seeds=None):
    """Writes the tables that have results to a Markdown file, and their pictures into the folder `results` beside it.

    `tasks` is name -> miniature.Task of every run, `seeds` the runs of each setting, by default the tables' own numbers.
    """
    folder = path.parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: task.result() for name, task in tasks.items()}
    sections, claims, missing = [], [], []
    for name, table in tables.TABLES.items():
        runs_of = {}  # setting -> [(folder, result)] of its finished runs, by seed
        for setting in table.rows:
            names = [tables.Run(setting, seed).name for seed in range(tables.runs_per_setting(table, setting, seeds))]
            runs_of[setting] = [(tasks[run].folder, results[run]) for run in names if results.get(run)]
        if not any(runs_of.values()):
            missing.append(f"`{name}`")
            continue
        verdicts = [(claim, *judge(claim, runs_of)) for claim in table.claims]
        claims += [(table.title, *verdict) for verdict in verdicts]
        pictures = draw(name, table, runs_of, folder)
        sections.append(section(name, table, runs_of, verdicts, [f"{folder.name}/{picture}" for picture in pictures], results))
    content = [introduction(results, tasks), summary(claims, missing), *sections]
    path.write_text("\n\n".join(content) + "\n")


def numbers_of(runs, measure):
    """Returns a measure of each run: infinite if the run diverged, nan if it has no such measure."""
    return [math.inf if result["status"] == "diverged" else _number(result["numbers"].get(measure)) for _, result in runs]


def _number(value):
    if value is None:
        return math.nan
    return float(value) if math.isfinite(float(value)) else math.inf


def judge(claim, runs_of):
    """Compares the order of our runs, setting -> [(folder, result)], with a claim; returns (verdict, our numbers as text)."""
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
    header = ["setting", "runs", *(tables.MEASURES[measure].title for measure in table.measures), "published"]
    rows = []
    for setting, runs in runs_of.items():
        cells = [cell(numbers_of(runs, measure), tables.MEASURES[measure]) for measure in table.measures]
        rows.append([tables.SETTINGS[setting].label, str(len(runs)), *cells, table.rows[setting] or "–"])
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
    other = f"{'as' if claim.alike else 'than'} with “{second}”"
    return f"Published: {measure.title} {relation} with “{first}” {other} ({claim.published})"


def _qualities(runs_of, results):
    """Returns a line on the encoders' accuracies, if a table compares encoders."""
    names = {tables.SETTINGS[setting].encoder for setting in runs_of}
    trained = [(name, results.get(f"{name} encoder")) for name in tables.ENCODERS if name in names]
    accuracies = [f"{name} {result['numbers']['accuracy']:.3f}" for name, result in trained if result]
    if len(names) < 2 or not accuracies:
        return []
    return ["", f"Held-out accuracy of the encoders, with the linear layer of their training: {', '.join(accuracies)}."]


def _table(header, rows):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def summary(claims, missing):
    """Returns all comparisons as Markdown."""
    verdicts = [verdict for *_, verdict, _ in claims]
    counts = [(verdicts.count(verdict), verdict) for verdict in (AGREES, NOISE, DISAGREES, DIVERGED, NOT_RUN)]
    total = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    rows = [[title, sentence(claim).removeprefix("Published: "), ours or "–", how] for title, claim, how, ours in claims]
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
    samplers = {name: "{steps} steps of `{sampler}`".format(**settings) for name, settings in tables.SAMPLERS.items()}
    classifier = ""
    if results.get("classifier"):
        numbers = results["classifier"]["numbers"]
        distance = f"whose Frechet distance is {numbers['fid_of_held_out_digits']:.1f}"
        classifier = f" It reads {numbers['accuracy']:.1%} of the held-out digits rightly, {distance}."
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
        f"the steps; reconstruction is of held-out digits in [-1, 1]. SiT samples with {samplers['sit']}, DiT with "
        f"{samplers['dit']}.",
        f"* **Verdicts.** “{AGREES}” and “{DISAGREES}” are about the order of the means. “{NOISE}”: they differ by no more "
        f"than the spread, the root of both variances' sum. Two settings are alike within the spread or {ALIKE:.0%}.",
        f"* **Machine.** {_processor()}, {os.cpu_count()} cores, JAX {importlib.metadata.version('jax')}: {len(runs)} runs "
        f"in {minutes:.0f} core-minutes, with classifier and encoders.",
    ]
    return "\n\n".join(["# The miniature paper", *map(_wrapped, paragraphs)])


def _wrapped(text):
    """Wraps a paragraph or an item of a list."""
    indent = "  " if text.startswith("* ") else ""
    return textwrap.fill(text, 128, subsequent_indent=indent, break_on_hyphens=False)


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def draw(name, table, runs_of, folder):
    """Draws the pictures of one table; returns the files' names."""
    runs_by_label = {tables.SETTINGS[setting].label: runs for setting, runs in runs_of.items() if runs}
    values, curves, samples, latents = {}, {}, {}, {}
    for label, runs in runs_by_label.items():
        values[label] = numbers_of(runs, table.measures[0])
        source, result = runs[0]
        if table.curve and (source / "metrics.jsonl").exists():
            read = plots.read_curves(source / "metrics.jsonl")
            if table.curve in read:
                curves[label] = read[table.curve]
        elif not table.curve and "fid_steps" in result["numbers"]:
            heights = [np.mean(numbers_of(runs, key)) for key in ("fid_halfway", "fid")]
            curves[label] = np.array(result["numbers"]["fid_steps"]), np.array(heights)
        if (source / "samples.npy").exists():
            shown = np.load(source / "samples.npy")  # [classes, SHOWN, H, W, 3]; a class is a column
            samples[label] = grid(shown.swapaxes(0, 1).reshape(-1, *shown.shape[2:]), columns=len(shown), scale=2)
        if table.curve and (source / "latents.npy").exists():
            colors = plots.pca_colors(np.load(source / "latents.npy"))
            latents[f"{label}: latents"] = grid(colors, columns=5, padding=1, scale=8)
    files = [f"{name}.png"]
    titles = tables.MEASURES[table.measures[0]].title, table.curve or f"{tables.MEASURES['fid'].title}, halfway and at the end"
    plots.plot_settings(folder / files[0], values, titles[0], curves, titles[1], log_scale=bool(table.curve))
    for kind, pictures in (("samples", samples), ("latents", latents)):
        if pictures:
            files.append(f"{name}-{kind}.png")
            plots.show_pictures(folder / files[-1], pictures)
    return files
