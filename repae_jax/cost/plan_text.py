"""The text that `repae_jax.plan` prints: tables of its numbers."""

import signal
import textwrap
from collections.abc import Mapping
from typing import Any

from repae_jax.cost.chips import GIB, JAX_SHARE
from repae_jax.cost.roofline_text import exchange_table, kernel_table, part_table

TIGHT = 0.1  # largest free share of the memory that is called tight
COMPILERS = {"chip": ("jax", "jaxlib", "libtpu"), "GPU": ("jax", "jaxlib", "jax-cuda13-plugin")}  # by the noun of TPUs and GPUs
_JOINT = "; as all below, of a joint step"  # in a plan of steps of several kinds
_UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def lines_of(numbers: Mapping[str, Any]) -> list[str]:
    """Returns the text on the numbers of `plan.plan`."""
    sampling = numbers["job"] == "sample"
    mesh = " x ".join(f"{name} {size}" for name, size in numbers["mesh"].items())
    slices = f" in each of {numbers['slices']} slices" if numbers["slices"] > 1 else ""
    noun, compilers = numbers["chip"], COMPILERS[numbers["chip"]]
    peak, memory = numbers["peak_flop_per_second"] / 1e12, _gib(numbers["memory_of_chip_bytes"])
    lines = [
        f"{numbers['topology']}{slices}: {plural(numbers['chips'], noun)}, {numbers['device_kind']}, with "
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
    roofline = numbers["roofline"]
    tables = (part_table(roofline), exchange_table(roofline, numbers["link"]), kernel_table(roofline))
    return [*lines, *(line for table in tables if table for line in (*table, "")), *textwrap.wrap(roofline_note(numbers), 120)]


def plural(number: int, noun: str) -> str:
    """Returns a number of things, such as '8 GPUs'."""
    return f"{number} {noun}" + ("s" if number > 1 else "")


def _gib(size):
    return f"{size / GIB:.2f}"


def _does_not_fit(numbers):
    needed, size = numbers["needed_bytes"], f"the {_gib(numbers['memory_of_chip_bytes'])} GiB of a {numbers['chip']}"
    needs = f"needs {_gib(needed)} GiB or more of {size}" if needed else f"needs more than {size}"
    source = "Why" if "seconds" in numbers else "The compiler says"
    return [
        f"DOES NOT FIT: {needs}; its {_state_of(numbers)} alone: {_gib(numbers['state_bytes'])} GiB",
        *textwrap.wrap(f"{source}: {numbers['message'].removeprefix('RESOURCE_EXHAUSTED: ')}", 120),
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
    """Returns the caveats of the estimate of a TPU program."""
    return (
        f"{_counted(numbers, 'FLOP, cycles and collectives are')}How far to trust it: these are the cycles that the compiler "
        f"expects of each operation, loops multiplied, over a clock of {numbers['clock_hz'] / 1e9:g} GHz; of a large matrix "
        f"product it expects {numbers['matmul_share']:.0%} of the peak. Collectives, host and input are not in it, and nothing "
        f"overlaps. In the roofline, a second opinion{'' if numbers['chips'] == 1 else ' with collectives'}, "
        f"{_assumptions(numbers)}. No chip was measured: trust ratios only."
    )


def roofline_note(numbers: Mapping[str, Any]) -> str:
    """Returns the assumptions of a GPU's estimate."""
    return (
        f"{_counted(numbers, 'all is')}How far to trust it: {_assumptions(numbers)}; nothing overlaps, host and input are not "
        "in it. These shares were chosen so that the one step that was measured, on one H200, comes out right; the step has "
        "changed since. Nothing is tuned here: a real GPU chooses among kernels, Triton's, too, and gives convolutions "
        "workspaces, of 0 bytes here: memory is a lower bound."
    )


def _counted(numbers, means):
    """Returns what to know of loops of unknown length and of drawn branches."""
    unknown, drawn = numbers["unknown_loops"], len(numbers["branch_shares"])
    short = f"{unknown} loops whose length is unknown count once, so all is too small. " if unknown else ""
    return short + (f"Of the {drawn} scales of which a step draws one, {means} the mean. " if drawn else "")


def _assumptions(numbers):
    """Returns how long a kernel takes by the roofline."""
    speeds, start = numbers["bytes_per_second"], numbers["start_seconds"]
    shares = {name: f"{share:.0%}" for name, share in numbers["roofline"]["assumed"].items()}
    float32 = "bfloat16" if numbers["estimated_cycles"] else "TF32, half as fast"
    exchanges = (
        f", collectives at {shares['link']} of {speeds['link'] / 1e9:.0f} GB/s of {numbers['link']} or "
        f"{speeds['network'] / 1e9:.3g} of the network"
    )
    return (
        f"each kernel of the compiled program takes as long as products do at {shares['product']} of the peak, convolutions at "
        f"{shares['convolution']} (float32 as {float32}), its bytes at {shares['memory']} of {speeds['memory'] / 1e12:.2f} TB/s"
        f"{exchanges if numbers['chips'] > 1 else ''}{f', and {1e6 * start:g} us or more' if start else ''}"
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
    if not numbers["estimated_cycles"]:  # compilers for TPUs lay out a larger batch otherwise
        grow = "an estimate: temporaries but gradients grow with them"
        lines.append(_row(f"images that a {noun} has room for", f"{numbers['most_images']}", "", grow))
    if not numbers["fits"]:
        return lines
    if noun == "GPU" and kinds["total"] > JAX_SHARE * size:
        why = f"as launch/multi_gpu.sh does: by itself JAX takes {JAX_SHARE:.0%} of a card"
        lines.append(f"set XLA_CLIENT_MEM_FRACTION=.9, {why}")
    worth = ["with so much memory free, these are worth a try:"] if numbers["advice"] else []
    return [*lines, *worth, *(f"  {line}" for line in numbers["advice"])]


def _time_table(numbers):
    sampling, estimate, noun = numbers["job"] == "sample", numbers["roofline"], numbers["chip"]
    cycles = numbers["estimated_cycles"]
    is_float32 = sampling and numbers["config"]["sampling"]["precision"] == "float32"
    slower = "three products in bfloat16, or more, for one" if cycles else "TF32, half as fast"
    float32 = f"sampling is in float32: {slower}" if is_float32 else ""
    runs = f"{numbers['runs']:,.0f} {'batches' if sampling else 'steps'}"
    bounds = ", ".join(f"{1000 * seconds:,.1f} {bound}" for bound, seconds in estimate["by_bound"].items() if seconds)
    bounds += _JOINT * (len(numbers["kinds_of_steps"]) > 1)
    roofline = _row("a roofline's", f"{1000 * estimate['seconds']:,.1f}", "ms", bounds)
    collectives = sorted(numbers["collective_bytes"].items()) if cycles else []
    sent = "a chip; its time is not in the compiler's estimate"
    return [
        f"time of a {'batch' if sampling else 'step'}, by {'the compiler' if cycles else 'a roofline'}'s estimate",
        _row("time", f"{numbers['seconds'] * 1000:,.1f}", "ms", f"{cycles:,.0f} cycles" if cycles else bounds),
        *([roofline] if cycles else []),
        *_kind_rows(numbers["kinds_of_steps"]),
        _row("share of bfloat16 peak", f"{numbers['share_of_peak']:.1%}", "", float32),
        _row("images per second", f"{numbers['images_per_second']:,.1f}", ""),
        _row(runs, f"{numbers['hours']:,.1f}", "hours", f"{numbers['chip_hours']:,.0f} {noun}-hours"),
        *(_row(kind, f"{size / 1e9:.3f}", "GB", sent) for kind, size in collectives),
    ]


def _kind_rows(kinds):
    """Returns rows on the kinds of steps, where there are several."""
    if len(kinds) == 1:
        return []
    names = ("of a joint step", "of a step of the SiT alone")
    return [
        _row(name, f"{1000 * kind['seconds']:,.1f}", "ms", f"{kind['share']:.0%} of the steps")
        for name, kind in zip(names, kinds)
    ]
