"""The text that `repae_jax.plan` prints: tables of its numbers."""

import signal
import textwrap
from collections.abc import Mapping
from typing import Any

GIB = 2**30
TIGHT = 0.1  # largest free share of the memory that is called tight
COMPILERS = ("jax", "jaxlib", "libtpu")
_UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def lines_of(numbers: Mapping[str, Any]) -> list[str]:
    """Returns the text on the numbers of `plan.plan`."""
    sampling = numbers["job"] == "sample"
    mesh = " x ".join(f"{name} {size}" for name, size in numbers["mesh"].items())
    slices = f" in each of {numbers['slices']} slices" if numbers["slices"] > 1 else ""
    lines = [
        f"{numbers['topology']}{slices}: {numbers['chips']} chips, {numbers['device_kind']}, with "
        f"{numbers['peak_flop_per_second'] / 1e12:.0f} TFLOP/s in bfloat16 and {numbers['hbm_bytes'] / GIB:.2f} GiB each",
        f"{numbers['job']}: {numbers['images']} images {'at a time' if sampling else 'a step'}, "
        f"{numbers['images_per_chip']} a chip; mesh {mesh}",
        ", ".join(f"{name} {version or 'unknown'}" for name, version in numbers["versions"].items() if name in COMPILERS),
        "",
    ]
    if numbers["fits"] is None:
        return [*lines, *_failed(numbers)]
    lines += [*_flop_table(numbers), ""]
    if not numbers["fits"]:
        return [*lines, *_does_not_fit(numbers)]
    return [*lines, *_memory_table(numbers), "", *_time_table(numbers), *textwrap.wrap(note(numbers), 120)]


def _does_not_fit(numbers):
    needed, size = numbers["needed_bytes"], f"the {numbers['hbm_bytes'] / GIB:.2f} GiB of a chip"
    needs = f"needs {needed / GIB:.2f} GiB or more of {size}" if needed else f"needs more than {size}"
    return [
        f"DOES NOT FIT: {needs}; its {_state_of(numbers)} alone: {numbers['state_bytes'] / GIB:.2f} GiB",
        *textwrap.wrap(f"The compiler says: {numbers['message'].removeprefix('RESOURCE_EXHAUSTED: ')}", 120),
        "What helps:",
        *(f"  {line}" for line in numbers["advice"]),
    ]


def _failed(numbers):
    reason, remedy = "it could not be compiled", "another topology, another --config.mesh.fsdp, another version of libtpu"
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
    kinds, hbm = numbers["memory_bytes"], numbers["hbm_bytes"]
    free = 1 - kinds["total"] / hbm
    notes = {
        "arguments": f"{numbers['state_bytes'] / GIB:.2f} of it {_state_of(numbers)}",
        "outputs": f"and {kinds['aliased'] / GIB:.2f} in place of arguments",
        "total": f"of {hbm / GIB:.2f}: fits, {free:.0%} free" + (", which is tight" if free < TIGHT else ""),
    }
    names = ("arguments", "outputs", "temporaries", "code", "total")
    return ["memory of a chip", *(_row(name, f"{kinds[name] / GIB:.2f}", "GiB", notes.get(name, "")) for name in names)]


def _time_table(numbers):
    sampling = numbers["job"] == "sample"
    float32 = "sampling is in float32: three products in bfloat16, or more, for one" if sampling else ""
    runs = f"{numbers['runs']:,.0f} {'batches' if sampling else 'steps'}"
    return [
        f"time of a {'batch' if sampling else 'step'}, by the compiler's estimate",
        _row("time", f"{numbers['seconds'] * 1000:,.1f}", "ms", f"{numbers['estimated_cycles']:,.0f} cycles"),
        _row("share of bfloat16 peak", f"{numbers['share_of_peak']:.1%}", "", float32),
        _row("images per second", f"{numbers['images_per_second']:,.1f}", ""),
        _row(runs, f"{numbers['hours']:,.1f}", "hours", f"{numbers['chip_hours']:,.0f} chip-hours"),
        *(
            _row(kind, f"{size / 1e9:.3f}", "GB", "a chip; its time is not in the estimate")
            for kind, size in sorted(numbers["collective_bytes"].items())
        ),
    ]
