"""The page of one scale of the miniature paper: every table with the published numbers beside ours, and figures.

A page opens with the headline in one figure and with what was reproduced and what was not, computed from the verdicts. It ends
with the tables beyond the paper that have run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.miniature import (
    beyond,
    cknna,
    comparisons,
    experiments,
    figures,
    findings,
    markdown,
    table_figures,
    tables,
    verdicts,
)
from launch.miniature.comparisons import Comparison, Comparisons
from launch.miniature.finished import Runs, finished_runs
from launch.miniature.scales import Scale
from launch.miniature.sizes import in_short, size_lines
from launch.miniature.style import label_of
from launch.miniature.verdicts import AGREES, DISAGREES, DIVERGED, NOT_RUN, UNDECIDED

HEADLINE = "main"  # the table of the opening figure


def write(path: Path, scale: Scale, tasks: Mapping[str, Any], front: Path | None = None) -> None:
    """Writes the tables that have results to a Markdown file, and their figures into the folder `figures` beside it.

    `tasks` is name -> miniature.Task of every run of the scale, and of its encoders and classifier. Figures that an earlier
    page had and this one has not are removed. `front` is a PNG of the headline for a front page, drawn if the headline has run.
    """
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in ("opening.png", *table_figures.possible_names()):
        (folder / figure).unlink(missing_ok=True)
    runs_of = finished_runs(tasks.values())
    every = comparisons.compare(runs_of)
    compared, later = ({name: every[name] for name in made} for made in (tables.TABLES, beyond.TABLES))
    shown, shown_later = ([name for name in part if comparisons.is_shown(name, every, runs_of)] for part in (compared, later))
    content = [f"# The miniature paper at scale `{scale.name}`"]
    if figures.has_headline(runs_of):
        figures.draw_opening(folder / "opening.png", runs_of)
        content += [f"![Frechet distance, samples and latents of SiT, REPA and REPA-E]({folder.name}/opening.png)"]
        content += [markdown.wrapped(OPENING_CAPTION)]
        if front:
            front.parent.mkdir(parents=True, exist_ok=True)
            figures.draw_front(front, runs_of)
    content += [opening(scale, tasks, runs_of, compared, shown), comparisons.summary(compared, shown)]
    content.append(method(scale, tasks, runs_of))
    for name in (*shown, *shown_later):
        if name in shown_later[:1]:
            content.append(beyond_the_paper(later, shown_later))
        drawn = table_figures.draw(name, experiments.TABLES[name], runs_of, folder)
        pictures = [f"{folder.name}/{picture}" for picture in drawn]
        content.append(section(name, scale, runs_of, every[name], pictures, tasks))
    path.write_text("\n\n".join(content) + "\n")


OPENING_CAPTION = (
    "*Frechet distance (less is better) over training steps and over training compute, which counts all networks, but not the "
    "training of the first VAE, the same for all. Lines are means over runs, bands reach from the smallest run to the largest; "
    "dotted lines mark where the first curve ends and all can be compared. Samples have the same noise and labels everywhere "
    "and no guidance. Latents are of held-out pictures: of the VAE that was trained alone, which SiT and REPA keep, and of "
    "REPA-E's VAE at the end of its training.*"
)


# ---- the opening ----------------------------------------------------------------------------------------------------------


def opening(scale: Scale, tasks: Mapping[str, Any], runs_of: Runs, compared: Comparisons, shown: Sequence[str]) -> str:
    """Returns what was reproduced, at what scale, and what was not: a paragraph, and a row of verdicts for every experiment."""
    steps = next(task.content["config"]["steps"] for task in tasks.values() if task.kind == "repae")
    numbers = [len(runs_of.get(setting, [])) for setting in figures.HEADLINE]
    several = f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else f"{numbers[0]}"
    sentences = [
        "SiT is a transformer that generates pictures in the latents of a VAE, REPA aligns it with a vision encoder, and "
        "REPA-E trains the VAE together with it. The paper compares the three on ImageNet, this page on "
        f"{in_short(scale, _run_tasks(tasks))} and {several} runs of each; in brackets are Frechet distances."
    ]
    starts = {
        AGREES: "Published, and so here", DISAGREES: "Published, and the other way round here",
        UNDECIDED: "Published, undecided here", DIVERGED: "Published, diverged here", NOT_RUN: "Published, not run yet",
    }  # fmt: skip
    for outcome, start in starts.items():
        found = [_in_words(one, steps) for one in compared[HEADLINE] if one.verdict.outcome == outcome]
        if found:
            sentences.append(f"**{start}:** {'; '.join(found)}.")
    sentences.append(f"{comparisons.counts(compared)} None of the paper's ImageNet numbers is reproduced here.")
    return "\n".join([markdown.wrapped(" ".join(sentences)), "", *comparisons.overview(compared, shown)]).rstrip()


def _in_words(one: Comparison, steps: int) -> str:
    """Returns a comparison of the headline as it was published, and our numbers."""
    when = {
        "fid": f"after {steps // tables.LONG:,} steps", "fid_long": f"after {steps:,} steps",
        "fid_equal_compute": f"at the compute of {steps:,} steps of REPA-E",
    }  # fmt: skip
    claim, values = one.claim, one.verdict.values
    published = comparisons.relation(claim)
    if claim.measure in when and not claim.alike:
        published = f"{label_of(claim.first)} beats {label_of(claim.second)} {when[claim.measure]}"
    return f"{published} ({values})" if values else published


# ---- how it was made ------------------------------------------------------------------------------------------------------


def method(scale: Scale, tasks: Mapping[str, Any], runs_of: Runs) -> str:
    """Returns sizes, measures, verdicts and machine as Markdown."""
    lines = ["## How it was made", ""]
    lines += [f"* {line}" for line in size_lines(scale, _run_tasks(tasks))]
    lines += [
        "* **Numbers** are means ± half of the 95 % confidence interval over runs with different seeds (of three runs: 2.5 "
        "times their standard deviation). All runs of a setting start from one VAE, so the intervals do not show how "
        f"much another would change.{_classifier(tasks)} Losses are means over the last quarter of a run; reconstruction is "
        "of held-out pictures in [-1, 1].",
        "* **Verdicts** are by the 95 % confidence interval of the difference of two means, first minus second (Welch's). "
        f"“{AGREES}”: all of it lies on the published side of 0; “{DISAGREES}”: all on the other; “{UNDECIDED}”: it contains "
        "0. Of two settings that are about alike as published (≈) it lies within a margin, outside, or across its edge; the "
        f"margin is {verdicts.MARGIN:.0%} of the second mean. A single run decides nothing, except of a VAE that is trained "
        "alone: there is one of each, taken as given, so the interval does not show how much another one would differ. A "
        "setting with a run that diverged loses. One in twenty such intervals misses the truth, and none is widened for how "
        "many there are. A comparison that several tables make is counted once.",
    ]
    lines.append(
        f"* **Machine and time.** {_machine([result for task in tasks.values() if (result := task.result())], runs_of)}"
    )
    lines.append(f"* **To repeat it:** `bash launch/miniature.sh --scale {scale.name}`, or the command below a table.")
    return "\n".join(map(markdown.wrapped, lines))


def _machine(results: Sequence[Mapping[str, Any]], runs_of: Runs) -> str:
    """Returns where and how long the runs were made, with classifier and encoders: core-minutes on CPUs, minutes elsewhere."""
    seconds: dict[str, float] = {}
    for result in results:
        cpu = result["device"] == "cpu"
        known = "processor" in result  # results of earlier versions do not name it
        host = f"{result['processor']} with {result['cores']} cores" if known else "a processor that was not recorded"
        place = f"core-minutes on {host}" if cpu else f"minutes on {result['device']}, in a machine of {host}"
        seconds[place] = seconds.get(place, 0) + result["cpu_seconds" if cpu else "seconds"]
    parts = [f"{value / 60:,.0f} {place}" for place, value in seconds.items()]
    versions = sorted({result.get("jax", "of a version that was not recorded") for result in results})
    count = sum(map(len, runs_of.values()))
    return f"{count} runs, with classifier and encoders: {'; '.join(parts)}. JAX {markdown.listed(versions)}."


def _run_tasks(tasks: Mapping[str, Any]) -> list[Any]:
    """Returns the runs of the paper's settings."""
    of_the_paper = [task for task in tasks.values() if task.kind in experiments.PRESETS]
    return [task for task in of_the_paper if task.content["description"]["setting"] in tables.SETTINGS]


def _classifier(tasks: Mapping[str, Any]) -> str:
    """Returns sentences on the Frechet distance's features."""
    sentence = " The Frechet distance is in the features of a small classifier, so it compares with nothing outside this page."
    result = tasks["classifier"].result() if "classifier" in tasks else None
    if not result:
        return sentence
    numbers = result["numbers"]
    sentence += f" It recognizes {numbers['accuracy']:.1%} of the held-out pictures"
    sentence += f", whose Frechet distance is {numbers['fid_of_held_out']:.1f}"
    if "fid_of_training_pictures" in numbers:
        sentence += f"; of as many training pictures as there are samples it is {numbers['fid_of_training_pictures']:.1f}"
    return sentence + "."


def beyond_the_paper(compared: Comparisons, shown: Sequence[str]) -> str:
    """Returns the beginning of the part on what other work has found, with the numbers of its verdicts."""
    ran = {name: compared[name] for name in shown}
    text = (
        "What other work has found since, by the same runs, measures and verdicts; “published” is what its authors found. None "
        f"of it is among the comparisons counted above. {comparisons.counts(ran, 'comparison')}"
    )
    return "\n".join(["## Beyond the paper", "", markdown.wrapped(text), "", *comparisons.overview(compared, shown)])


# ---- one table ------------------------------------------------------------------------------------------------------------


def section(
    name: str,
    scale: Scale,
    runs_of: Runs,
    compared: Sequence[Comparison],
    pictures: Sequence[str],
    tasks: Mapping[str, Any],
) -> str:
    """Returns one table as Markdown."""
    table = experiments.TABLES[name]
    header = ["setting", "runs", *(tables.MEASURES[measure].title for measure in table.measures), "published"]
    rows, messages = [], []
    for setting, runs in ((setting, runs_of.get(setting, [])) for setting in table.rows):
        if runs:
            cells = [verdicts.cell([run.number(column) for run in runs], tables.MEASURES[column]) for column in table.measures]
            rows.append([label_of(setting), str(len(runs)), *cells, table.rows[setting] or "–"])
        messages += [f"* {label_of(setting)} diverged: {run.result['message'].split('. ')[0]}." for run in runs if run.diverged]
    level = "###" if name in beyond.TABLES else "##"
    lines = [f"{level} {table.title}", "", markdown.wrapped(table.question)]
    lines += ["", markdown.wrapped(f"**Expected, before the runs of this table.** {table.expected}")]
    if why := findings.FOUND.get(scale.name, {}).get(name):
        lines += ["", markdown.wrapped(f"**Where it differs.** {why}")]
    lines += [*_qualities(table, tasks), "", *markdown.table(header, rows)]
    waiting = [
        f"{label_of(setting)}{f' (published: {number})' if number else ''}"
        for setting, number in table.rows.items()
        if not runs_of.get(setting)
    ]
    if waiting:
        lines += ["", markdown.wrapped(f"Not run: {'; '.join(waiting)}.")]
    judged = [*map(_finding, (one for one in compared if one.verdict.outcome != NOT_RUN)), *messages]
    if table_figures.CKNNA in table_figures.FIGURES.get(name, ()):
        judged += cknna.lines(list(table.rows), runs_of)
    lines += ["", *map(markdown.wrapped, judged)] if judged else []
    lines += ["", f"`bash launch/miniature.sh --scale {scale.name} --table {name}`"]
    for picture in pictures:
        lines += ["", f"![{table.title}]({picture})"]
    return "\n".join(lines)


def _finding(one: Comparison) -> str:
    """Returns a comparison with its numbers as an item of a list."""
    ours = "; ".join(filter(None, (one.verdict.values, one.verdict.difference)))
    published = f" (published: {one.claim.published})" if one.claim.published else ""
    return f"* {comparisons.relation(one.claim)}{published}: {comparisons.outcome_of(one)}, {ours}."


def _qualities(table: tables.Table, tasks: Mapping[str, Any]) -> list[str]:
    """Returns a line on the encoders' accuracies, if a table compares encoders."""
    names = list(dict.fromkeys(experiments.SETTINGS[setting].encoder for setting in table.rows))
    results = {name: tasks[f"{name} encoder"].result() for name in names if f"{name} encoder" in tasks}
    accuracies = [f"{name} {result['numbers']['probe_accuracy']:.3f}" for name, result in results.items() if result]
    if len(names) < 2 or not accuracies:
        return []
    return [
        "",
        f"Share of held-out pictures that a linear layer on an encoder's frozen tokens recognizes: {', '.join(accuracies)}.",
    ]
