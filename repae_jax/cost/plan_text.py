"""The text that `repae_jax.plan` prints: tables of its numbers."""

import signal
import textwrap
from collections.abc import Mapping
from typing import Any

from repae_jax.cost.roofline_text import exchange_table, kernel_table, part_table

GIB = 2**30
TIGHT = 0.1  # largest free share of the memory that is called tight
COMPILERS = {"TPU": ("jax", "jaxlib", "libtpu"), "NVIDIA": ("jax", "jaxlib", "jax-cuda13-plugin")}  # by maker or kind of chips
_UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def lines_of(numbers: Mapping[str, Any]) -> list[str]:
    """Returns the text on the numbers of `plan.plan`."""
    sampling = numbers["job"] == "sample"
    mesh = " x ".join(f"{name} {size}" for name, size in numbers["mesh"].items())
    slices = f" in each of {numbers['slices']} slices" if numbers["slices"] > 1 else ""
    noun, compilers = numbers["chip"], COMPILERS[numbers["device_kind"].partition(" ")[0]]
    peak, memory = numbers["peak_flop_per_second"] / 1e12, _gib(numbers["memory_of_chip_bytes"])
    lines = [
        f"{numbers['topology']}{slices}: {_count(numbers['chips'], noun)}, {numbers['device_kind']}, with "
        f"{peak:.0f} TFLOP/s in bfloat16 and {memory} GiB each",
        f"{numbers['job']}: {numbers['images']} images {'at a time' if sampling else 'a step'}, "
        f"{numbers['images_per_chip']} a {noun}; mesh {mesh}",
        ", ".join(f"{name} {numbers['versions'][name] or 'unknown'}" for name in compilers),
        "",
    ]
    if numbers["fits"] is None:
        return [*lines, *_failed(numbers)]
    lines += [*_flop_table(numbers), ""]
    if not numbers["fits"]:
        lines += _does_not_fit(numbers)
    if "seconds" not in numbers:
        return lines
    lines += [*_memory_table(numbers), "", *_time_table(numbers), ""]
    if numbers["estimated_cycles"]:
        return [*lines, *textwrap.wrap(note(numbers), 120)]
    found = numbers["roofline"]
    tables = (part_table(found), exchange_table(found, numbers["link"]), kernel_table(found))
    return [*lines, *(line for table in tables if table for line in (*table, "")), *textwrap.wrap(roofline_note(numbers), 120)]


def _count(number, noun):
    return f"{number} {noun}" + ("s" if number > 1 else "")


def _gib(size):
    return f"{size / GIB:.2f}"


def _does_not_fit(numbers):
    needed, size = numbers["needed_bytes"], f"the {_gib(numbers['memory_of_chip_bytes'])} GiB of a {numbers['chip']}"
    needs = f"needs {_gib(needed)} GiB or more of {size}" if needed else f"needs more than {size}"
    said = "Why" if "seconds" in numbers else "The compiler says"
    return [
        f"DOES NOT FIT: {needs}; its {_state_of(numbers)} alone: {_gib(numbers['state_bytes'])} GiB",
        *textwrap.wrap(f"{said}: {numbers['message'].removeprefix('RESOURCE_EXHAUSTED: ')}", 120),
        "What helps:",
        *(f"  {line}" for line in numbers["advice"]),
        *([""] if "seconds" in numbers else []),
    ]


def _failed(numbers):
    remedy = "another topology, another --config.mesh.fsdp, other versions of jax and its plugin"
    reason = "it could not be compiled"
    if numbers["exitcode"] == -signal.SIGKILL:
        reason, remedy = "the process that compiled it was killed", "a machine with more memory, or with less else at work"
    elif numbers["exitcode"] is not None:
        reason = "the compiler failed, by a mistake of its own"
    message = textwrap.wrap(f"The message: {numbers['message']}", 120)
    return [f"NOT KNOWN whether it fits: {reason}", *message, f"What may help: {remedy}"]


def note(numbers: Mapping[str, Any]) -> str:
    """Returns the caveats of the estimate."""
    unknown = numbers["unknown_loops"]
    short = f"{unknown} loops whose length is unknown count once, so all is too small. " if unknown else ""
    drawn = len(numbers["branch_shares"])
    mean = f"Of the {drawn} scales of which a step draws one, FLOP, cycles and collectives are the mean. " if drawn else ""
    return (
        f"{short}{mean}How far to trust it: these are the cycles that the compiler expects of each operation, loops "
        f"multiplied, over a clock of {numbers['clock_hz'] / 1e9:g} GHz; of a large matrix product it expects "
        f"{numbers['matmul_share']:.0%} of the peak. Collectives, host and input are not in it, and nothing overlaps. No "
        "chip was measured: trust ratios only."
    )


def roofline_note(numbers: Mapping[str, Any]) -> str:
    """Returns the assumptions of a GPU's estimate."""
    found, speeds = numbers["roofline"], numbers["bytes_per_second"]
    shares = {name: f"{share:.0%}" for name, share in found["assumed"].items()}
    unknown = numbers["unknown_loops"]
    short = f"{unknown} loops whose length is unknown count once, so all is too small. " if unknown else ""
    drawn = len(numbers["branch_shares"])
    mean = f"Of the {drawn} scales of which a step draws one, all is the mean. " if drawn else ""
    return (
        f"{short}{mean}How far to trust it: each kernel of the compiled program takes as long as products do at "
        f"{shares['product']} of the peak, convolutions at {shares['convolution']} (float32 as TF32, half as fast), its bytes "
        f"at {shares['memory']} of {speeds['memory'] / 1e12:.2f} TB/s, collectives at {shares['link']} of "
        f"{speeds['link'] / 1e9:.0f} GB/s of {numbers['link']} or {speeds['network'] / 1e9:g} of the network, and 2 us or "
        "more; nothing overlaps, host and input are not in it. These shares were chosen for the one step that was measured, "
        "on one H200: 339 ms, where this says 341. Nothing is tuned here: a real GPU chooses among kernels, Triton's, too, "
        "and gives convolutions workspaces, of 0 bytes here: memory is a lower bound."
    )


def _state_of(numbers):
    return "weights" if numbers["job"] == "sample" else "state"


def _row(name, value, unit, rest=""):
    return f"  {name:<32}{value:>12} {unit:<7}{rest}".rstrip()


def _flop(value):
    unit = next((unit for unit, size in _UNITS.items() if value >= size), "k")
    return f"{value / _UNITS[unit]:.3f}", f"{unit}FLOP"


def _flop_table(numbers):
    parts = numbers["flop_per_image"]
    total = sum(parts.values())
    rows = [_row(name, *_flop(value), f"{value / total:6.1%}") for name, value in parts.items()]
    every = _row(f"of all {numbers['images']} images", *_flop(total * numbers["images"]))
    return ["FLOP of an image, as traced, without recomputation", *rows, _row("total", *_flop(total)), every]


def _memory_table(numbers):
    kinds, size, noun = numbers["memory_bytes"], numbers["memory_of_chip_bytes"], numbers["chip"]
    free = 1 - kinds["total"] / size
    fits = f"fits, {free:.0%} free" + (", which is tight" if free < TIGHT else "") if numbers["fits"] else "does not fit"
    notes = {
        "arguments": f"{_gib(numbers['state_bytes'])} of it {_state_of(numbers)}",
        "outputs": f"and {_gib(kinds['aliased'])} in place of arguments",
        "total": f"of {_gib(size)}: {fits}",
    }
    names = ("arguments", "outputs", "temporaries", "code", "total")
    lines = [f"memory of a {noun}", *(_row(name, _gib(kinds[name]), "GiB", notes.get(name, "")) for name in names)]
    if numbers["estimated_cycles"]:
        return lines
    most = numbers["most_images"]
    grow = "an estimate: temporaries but gradients grow with them"
    lines.append(_row(f"images that a {noun} has room for", f"{most}", "", grow))
    lines += ["with so much memory free, these are worth a try:"] if numbers.get("spend") else []
    return [*lines, *(f"  {line}" for line in numbers.get("spend", ()))]


def _time_table(numbers):
    sampling, found, noun = numbers["job"] == "sample", numbers["roofline"], numbers["chip"]
    cycles = numbers["estimated_cycles"]
    float32 = "sampling is in float32: three products in bfloat16, or more, for one" if sampling and cycles else ""
    runs = f"{numbers['runs']:,.0f} {'batches' if sampling else 'steps'}"
    bounds = ", ".join(f"{1000 * seconds:,.1f} {bound}" for bound, seconds in found["by_bound"].items() if seconds)
    roofline = _row("a roofline's", f"{1000 * found['seconds']:,.1f}", "ms", bounds)
    collectives = sorted(numbers["collective_bytes"].items()) if cycles else []
    return [
        f"time of a {'batch' if sampling else 'step'}, by {'the compiler' if cycles else 'a roofline'}'s estimate",
        _row("time", f"{numbers['seconds'] * 1000:,.1f}", "ms", f"{cycles:,.0f} cycles" if cycles else bounds),
        *([roofline] if cycles else []),
        _row("share of bfloat16 peak", f"{numbers['share_of_peak']:.1%}", "", float32),
        _row("images per second", f"{numbers['images_per_second']:,.1f}", ""),
        _row(runs, f"{numbers['hours']:,.1f}", "hours", f"{numbers['chip_hours']:,.0f} {noun}-hours"),
        *(_row(kind, f"{size / 1e9:.3f}", "GB", "a chip; its time is not in the estimate") for kind, size in collectives),
    ]
