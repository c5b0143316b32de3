"""The summary of a planned scale: steps, memory, disk, and the time of the headline and of everything, by device."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from launch.miniature import markdown
from launch.miniature.scales import Scale
from launch.miniature.sizes import Planned
from repae_jax.cost.chips import GIB

# Guesses, in seconds, of what is not compiled here: a process until it trains, a program that is new to the compiler, a
# checkpoint until it samples, and training the encoders and the classifier.
START, COMPILING, LOADING, SMALL_NETWORKS = 20, 60, 5, 180
DECODING_MS = 0.23  # of one core for a picture of 64 pixels: measured with repae_jax.data on the machine of the scale `small`
Plans = Mapping[str, Mapping[str, Any]]  # device -> numbers of `repae_jax.plan` for REPA-E's step


def lines_of(scale: Scale, plans: Plans, rows: Mapping[str, Planned], headline: Collection[str]) -> list[str]:
    """Returns the summary as Markdown; `rows` has every setting, and `headline` the names of those of the headline."""
    lines = [["step of REPA-E, as compiled", *map(_step, plans.values())]]
    lines.append(["its memory", *map(_memory, plans.values())])
    for title, settings in (("headline", headline), ("everything", list(rows))):
        chosen = [rows[setting] for setting in settings]
        times = [_times(chosen, device) for device in plans]
        name = f"**{title}**, {sum(row.runs for row in chosen)} runs"
        lines.append([f"{name}: training + samples + the rest", *(" + ".join(map(_minutes, three)) for three in times)])
        lines.append([f"{name}: all", *(f"**{_minutes(sum(three))}**" for three in times)])
    notes = map(markdown.wrapped, _notes(scale, rows, headline))
    return [*markdown.table(["", *plans], lines), "", *notes]


def _step(numbers):
    return f"{1000 * numbers['seconds']:.1f} ms, {numbers['share_of_peak']:.0%} of the peak"


def _memory(numbers):
    needed, there = numbers["memory_bytes"]["total"] / GIB, numbers["memory_of_chip_bytes"] / GIB
    return f"{needed:.1f} of {there:.0f} GiB: {'fits' if numbers['fits'] else '**does not fit**'}"


def _times(rows: Sequence[Planned], device: str) -> tuple[float, float, float]:
    """Returns the seconds of training, of sampling, and those guessed for the rest."""
    training, sampling = sum(row.training(device) for row in rows), sum(row.sampling[device] * row.runs for row in rows)
    started = sum(row.runs * (START + LOADING * row.checkpoints) for row in rows)
    return training, sampling, started + COMPILING * len(rows) + SMALL_NETWORKS


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _notes(scale, rows, headline):
    fastest = min(seconds for row in rows.values() for seconds in row.step_seconds.values())
    cores = DECODING_MS * scale.batch_size / (1000 * fastest)
    disk, disk_of_headline = (sum(rows[name].disk * rows[name].runs for name in names) / GIB for names in (rows, headline))
    return [
        "* **Nothing was measured.** REPA-E's step was compiled for these devices. Its time is a roofline's: what arithmetic, "
        "memory and starts of kernels take at the shares of the peaks that another step, measured on one H200, reached "
        "([performance](../../performance.md)), without overlap. Trust ratios. Memory is a lower bound. SiT's blocks are "
        "compiled as a loop, whose stacks of arrays take time that unrolled blocks, as they train, save.",
        "* **Other settings** are made of its parts (SiT, alignment of the VAE, the VAE's encoder and decoder, …), each as "
        "much longer as it has FLOP: too little for the smaller SiT, too much for the larger one.",
        "* **Samples** are the FLOP of all of them at every evaluated checkpoint, in TF32 at the share that products reach.",
        f"* **The rest** is a guess: {START} s for every run to start, {LOADING} s for every evaluated checkpoint, {COMPILING} "
        f"s of compiling for every setting, {SMALL_NETWORKS / 60:.0f} min for encoders and classifier.",
        f"* **Input** is not in it: a core takes {DECODING_MS} ms to decode a picture, so the fastest of these steps keeps "
        f"{cores:.0f} cores busy; with fewer, the time of training is theirs.",
        f"* **Disk.** Checkpoints are kept to be evaluated: {disk_of_headline:,.0f} GiB of the headline's, {disk:,.0f} in all.",
    ]
