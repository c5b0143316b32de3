"""Roofline over a compiled program: how long each kernel takes at least, what bounds it, and what part of the model it is of.

A kernel takes as long as the slowest of its arithmetic, its traffic with the memory and its start, at the shares of the chip's
peaks that it reaches; loops count as often as they turn. Collectives take as long as rings over the slowest connection in their
group need. Nothing overlaps. It reads the scheduled text of GPU and of TPU programs.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from repae_jax.cost import hlo, kernels
from repae_jax.cost.chips import Chip

ARITHMETIC, MEMORY, STARTS, COLLECTIVES = "arithmetic", "memory", "starts", "collectives"
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
BOUNDS = (ARITHMETIC, MEMORY, STARTS, COLLECTIVES)


@dataclasses.dataclass(frozen=True)
class Moved:
    """A collective: how much a chip sends, and where to."""

    kind: str
    axes: str  # of the mesh
    size: float  # bytes of the arrays before they are scattered, or after they are gathered
    over_link: float  # bytes that a chip sends to others that links connect
    over_network: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how often it runs."""

    name: str
    kind: str  # 'product', 'convolution', 'fusion', 'all-reduce', …
    part: str
    op_name: str
    times: float
    flop: Mapping[str, float]  # precision -> FLOP, each time
    bytes: float  # of the memory, each time
    seconds: float  # each time
    bound: str
    moved: Moved | None = None


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the chips of a program are connected, and which groups of them the axes of its mesh make."""

    domains: tuple[int, ...]  # of each chip, in the order of the mesh: the number of the set that links connect
    axes: Mapping[frozenset[frozenset[int]], str]  # groups of chips -> names of axes

    @classmethod
    def of_mesh(cls, shape: Mapping[str, int], per_domain: int) -> "Groups":
        """Returns the groups of a mesh whose chips are in order, `per_domain` of them connected by links."""
        grid = np.arange(int(np.prod(list(shape.values())))).reshape(tuple(shape.values()))
        names, axes = list(shape), {}
        for first, last in ((i, j) for i in range(len(names)) for j in range(i + 1, len(names) + 1)):
            rows = np.moveaxis(grid, range(first, last), range(-(last - first), 0))
            rows = rows.reshape(-1, int(np.prod(rows.shape[rows.ndim - (last - first) :])))
            axes.setdefault(frozenset(frozenset(row.tolist()) for row in rows), " and ".join(names[first:last]))
        return cls(tuple((np.arange(grid.size) // per_domain).tolist()), axes)


ALONE = Groups((0,), {})


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The kernels of one execution of a program on one chip."""

    kernels: tuple[Kernel, ...]
    reached: Mapping[str, float]  # assumed shares of the chip's peaks
    unknown_loops: int  # how many have a length that is not known; their bodies are counted once

    @property
    def seconds(self) -> float:
        """Returns the time of all kernels, one after the other."""
        return sum(self.by_bound().values())

    def by_bound(self) -> dict[str, float]:
        """Returns the seconds of the kernels that each of BOUNDS bounds."""
        return {bound: sum(k.times * k.seconds for k in self.kernels if k.bound == bound) for bound in BOUNDS}

    def by_part(self) -> dict[str, dict[str, float]]:
        """Returns the parts of the model, the longest first: seconds by bound, in total, FLOP and bytes."""
        parts: dict[str, dict[str, float]] = collections.defaultdict(collections.Counter)
        for kernel in self.kernels:
            part = parts[kernel.part]
            for name, value in (
                (kernel.bound, kernel.seconds), ("seconds", kernel.seconds), ("flop", sum(kernel.flop.values())),
                ("bytes", kernel.bytes), ("kernels", 1.0),
            ):  # fmt: skip
                part[name] += kernel.times * value
        return {name: dict(part) for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"])}

    def flop(self) -> dict[str, float]:
        """Returns precision -> FLOP of all kernels."""
        total: dict[str, float] = collections.Counter()
        for kernel in self.kernels:
            total.update({name: kernel.times * value for name, value in kernel.flop.items()})
        return dict(total)

    def largest(self, count: int) -> list[Kernel]:
        """Returns the kernels that take longest, all their runs together."""
        return sorted(self.kernels, key=lambda kernel: -kernel.times * kernel.seconds)[:count]

    def exchanges(self) -> dict[tuple[str, str], dict[str, float]]:
        """Returns (kind, axes) of the collectives -> their bytes, those over links and network, and seconds."""
        sums: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(collections.Counter)
        for kernel in self.kernels:
            if kernel.moved is not None:
                one = sums[kernel.moved.kind, kernel.moved.axes]
                for name in ("size", "over_link", "over_network"):
                    one[name] += kernel.times * getattr(kernel.moved, name)
                one["seconds"] += kernel.times * kernel.seconds
        return {key: dict(value) for key, value in sums.items()}

    def numbers(self, count: int) -> dict[str, Any]:
        """Returns all sums, and the `count` kernels that take longest, for JSON."""
        kernels = [dataclasses.asdict(kernel) | {"flop": dict(kernel.flop)} for kernel in self.largest(count)]
        return {
            "assumed": dict(self.reached), "seconds": self.seconds, "by_bound": self.by_bound(), "by_part": self.by_part(),
            "flop": self.flop(), "kernels": sum(kernel.times for kernel in self.kernels), "largest": kernels,
            "moved": [{"kind": kind, "axes": axes, **sums} for (kind, axes), sums in self.exchanges().items()],
        }  # fmt: skip


def analyze(text: str, chip: Chip, groups: Groups = ALONE, shares: Sequence[float] = ()) -> Roofline:
    """Computes the roofline of a compiled program from its scheduled HLO, the text of `compiled.as_text()`.

    Of conditionals with as many branches as `shares`, which add up to 1, each branch is taken so often; of others the longest.
    """
    computations, entry = hlo.parse(text)
    walk = _Walk(computations, chip, groups, shares)
    kernels_run = tuple(walk.kernels(entry, 1.0, {}))
    return Roofline(kernels_run, chip.reached, len(walk.unknown_loops))


class _Walk:
    """Visits the computations that a program runs, one after the other."""

    def __init__(self, computations: Mapping[str, hlo.Computation], chip: Chip, groups: Groups, shares: Sequence[float]):
        self.unknown_loops: set[str] = set()
        self._computations, self._chip, self._groups, self._shares = computations, chip, groups, shares

    def kernels(self, name: str, times: float, known: Mapping[int, int]) -> Iterator[Kernel]:
        """Yields the kernels of a computation; `known` holds the elements of its parameter that are known integers."""
        computation = self._computations[name]
        users = kernels.users_of(computation)
        fused: dict[str, tuple[hlo.Computation, hlo.Instruction]] = {}
        for instruction in computation.values():
            if kernels.is_free(instruction):
                continue
            if instruction.opcode == "while":
                constant, turns = hlo.loop_turns(self._computations, computation, instruction, known)
                if turns is None:
                    self.unknown_loops.add(instruction.name)
                for called in instruction.called("body"):  # the conditions of counting loops cost nothing
                    yield from self.kernels(called, times * (1 if turns is None else turns), constant)
            elif instruction.opcode == "conditional":
                yield from self._branches(instruction, times)
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.called("calls", "to_apply"):
                    yield from self.kernels(called, times, {})
            else:
                op_name = kernels.op_name(self._computations, users, instruction)
                yield self._kernel(computation, instruction, op_name, times)
                if instruction.opcode == "fusion":
                    fused |= hlo.fused_collectives(self._computations, instruction.called("calls")[0])
        for inside, collective in fused.values():
            yield self._kernel(inside, collective, kernels.op_name(self._computations, {}, collective), times)

    def _branches(self, instruction, times):
        names = hlo.branches(instruction)
        if len(names) == len(self._shares):
            for share, name in zip(self._shares, names):
                yield from self.kernels(name, share * times, {})
            return
        branches = [list(self.kernels(name, times, {})) for name in names]
        yield from max(branches, key=lambda branch: sum(kernel.times * kernel.seconds for kernel in branch))

    def _kernel(self, computation, instruction, op_name, times):
        moved = self._exchange(computation, instruction)
        flop = kernels.flop(self._computations, computation, instruction)
        size = kernels.traffic(self._computations, computation, instruction)
        kind = self._kind(instruction, flop)
        reached = self._chip.reached
        products = sum(value / self._chip.peak(precision) for precision, value in flop.items())
        bounds = {
            ARITHMETIC: products / reached["convolution" if kind == "convolution" else "product"],
            MEMORY: size / self._chip.bandwidth / reached["memory"],
            STARTS: self._chip.start,
        }
        if moved:
            bounds = {COLLECTIVES: max(self._sending(moved), self._chip.start)}
        bound = max(bounds, key=lambda each: bounds[each])
        part = kernels.part_of(op_name)
        return Kernel(instruction.name, kind, part, op_name, times, flop, size, bounds[bound], bound, moved)

    def _kind(self, instruction, flop):
        if instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
            return "convolution" if target.startswith("__cudnn$conv") else "product" if flop else target
        return instruction.opcode.removesuffix("-start")

    def _sending(self, moved):
        return max(moved.over_link / self._chip.link, moved.over_network / self._chip.network) / self._chip.reached["link"]

    def _exchange(self, computation, instruction):
        """Returns what a collective sends, as rings do it: within the domains, and between them, each chip a part.

        In an all-to-all no chip passes anything on: each sends its own parts to all others.
        """
        kind = instruction.opcode.removesuffix("-start")
        if kind not in hlo.COLLECTIVES:
            return None
        size = hlo.moved_bytes(computation, instruction)
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=(\{.*?\}\})", instruction.attributes)[1])
            far = any(self._domain(int(start)) != self._domain(int(end)) for start, end in pairs)
            return Moved(kind, "pairs", size, 0.0 if far else size, size if far else 0.0)
        replicas = replica_groups(instruction.attributes, len(self._groups.domains))
        axes = self._groups.axes.get(frozenset(frozenset(group) for group in replicas), "other groups")
        groups = [sorted(collections.Counter(map(self._domain, group)).values()) for group in replicas]
        members = max(groups, key=lambda sizes: (len(sizes), -sizes[0]))  # of the group with most to send over the network
        chips, domains, least, most = sum(members), len(members), members[0], members[-1]
        if kind == "all-to-all":
            return Moved(kind, axes, size, size * (most - 1) / chips, size * (chips - least) / chips)
        passes = 2 if kind == "all-reduce" else 1
        over_link = passes * size * (chips - 1) / chips if most > 1 else 0.0
        return Moved(kind, axes, size, over_link, passes * size * (domains - 1) / domains / least)

    def _domain(self, chip):
        return self._groups.domains[chip]


def replica_groups(attributes: str, chips: int) -> list[list[int]]:
    """Returns the groups of chips of a collective; all are one group where none is named.

    Raises:
      ValueError: for a notation that is not known here.
    """
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = [[int(chip) for chip in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(chips))]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        shape, sides, order = ([int(n) for n in part.split(",")] if part else None for part in tiled.groups())
        chips = np.arange(int(np.prod(sides))).reshape(sides)
        return (chips.transpose(order) if order else chips).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]+)\))? \{([^}]*)\}", attributes)
    if named:
        return _groups_of_axes(*named.groups())
    if "replica_groups=" in attributes:
        raise ValueError(f"groups of a collective in a notation that is not known here: {attributes[:200]}")
    return [list(range(chips))]


def _groups_of_axes(mesh, ids, axes):
    """Returns the groups along some axes of a mesh, or along parts of axes: 'x':(2)4 are 4 of x, with 2 before them."""
    sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    grid = np.array([int(chip) for chip in ids.split(",")]) if ids else np.arange(int(np.prod(list(sides.values()))))
    shape, along = [], []
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(axes)}
    for name, side in sides.items():
        before, size = parts.get(name, (side, 1))
        size = size or side
        along.append(len(shape) + 1)
        shape += [before, size, side // before // size]
    grid = np.moveaxis(grid.reshape(shape), along, range(-len(along), 0))
    return grid.reshape(-1, int(np.prod(grid.shape[-len(along) :]))).tolist()
