"""Tables of a roofline's numbers: what bounds each part of the model, what collectives send, the kernels that take longest."""

from collections.abc import Mapping
from typing import Any

from repae_jax.cost.roofline import BOUNDS

SMALL = 0.002  # share of the time below which parts are one line


def part_table(roofline: Mapping[str, Any]) -> list[str]:
    """Returns lines: the parts of the model, with milliseconds by bound; times are those of `Roofline.numbers`."""
    bounds = [bound for bound in BOUNDS if roofline["by_bound"][bound]]
    head = "".join(f"{bound:>12}" for bound in bounds)
    lines = [f"  {'milliseconds':<36}{'in all':>8}{head}{'TFLOP':>9}{'GB':>8}{'kernels':>9}"]
    small: dict[str, float] = {}
    for name, part in roofline["by_part"].items():
        if part["seconds"] >= SMALL * roofline["seconds"]:
            lines.append(_part(name, part, bounds))
        else:
            small = {key: small.get(key, 0.0) + part.get(key, 0.0) for key in {*small, *part}}
    lines += [_part("smaller parts", small, bounds)] if small else []
    parts = roofline["by_part"].values()
    keys = {key for part in parts for key in part}
    return [*lines, _part("in all", {key: sum(part.get(key, 0.0) for part in parts) for key in keys}, bounds)]


def _part(name, part, bounds):
    times = "".join(f"{1000 * part.get(bound, 0.0):>12.1f}" for bound in bounds)
    rest = f"{part['flop'] / 1e12:>9.2f}{part['bytes'] / 1e9:>8.1f}{part['kernels']:>9,.0f}"
    return f"  {name:<36}{1000 * part['seconds']:>8.1f}{times}{rest}"


def exchange_table(roofline: Mapping[str, Any], link: str) -> list[str]:
    """Returns lines: the collectives by kind and axes of the mesh, and the bytes that a chip sends; [] if there are none."""
    if not roofline["moved"]:
        return []
    lines = [f"  {'collectives over':<36}{'GB':>8}{'by ' + link:>16}{'by network':>12}{'ms':>9}"]
    for moved in sorted(roofline["moved"], key=lambda each: -each["seconds"]):
        sizes = f"{moved['size'] / 1e9:>8.2f}{moved['over_link'] / 1e9:>16.2f}{moved['over_network'] / 1e9:>12.2f}"
        lines.append(f"  {moved['kind'] + ' over ' + moved['axes']:<36}{sizes}{1000 * moved['seconds']:>9.1f}")
    return lines


def kernel_table(roofline: Mapping[str, Any]) -> list[str]:
    """Returns lines: the kernels that take longest, all their runs together."""
    lines = [f"  {'the longest kernels':<44}{'times':>6}{'ms':>8}{'bound by':>12}{'GFLOP':>9}{'MB':>8}  of"]
    for kernel in roofline["largest"]:
        name = f"{kernel['kind']} {kernel['name']}"
        row = f"  {name:<44.43}{kernel['times']:>6.0f}{1000 * kernel['times'] * kernel['seconds']:>8.2f}{kernel['bound']:>12}"
        size = f"{sum(kernel['flop'].values()) / 1e9:>9.1f}{kernel['bytes'] / 1e6:>8.1f}"
        lines.append(f"{row}{size}  {kernel['op_name'].partition('/')[2][-34:]}")
    return lines
