"""Cost of a compiled program: memory by kind; from a TPU program's text, cycles and collectives, loops multiplied.

The compiler writes the cycles that it expects of an instruction into the instruction's backend config. XLA's own summary of a
program, `cost_analysis`, counts the body of a loop once. The length of a loop is not in the text: it follows from the loop's
condition, `counter < limit`, and from where the counter starts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
TO_OTHER_SLICES = "to other slices"
_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'  # marks transfers over the network that connects slices
_BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = ("fusion", "call", "async-start")
_SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "optimization-barrier")


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of one execution of a program on one device.

    The compiler splits collectives over several slices into some within a slice and what is sent between slices.
    """

    cycles: float  # the compiler's estimates; of a conditional, its longest branch, or the mean where `analyze` knows shares
    collectives: dict[str, float]  # kind -> bytes of the arrays before they are scattered, or after they are gathered
    unknown_loops: int  # how many have a length that is not known; their bodies are counted once


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # the text in the parentheses
    attributes: str
    is_root: bool  # gives the computation's result

    def called(self, *attributes: str) -> list[str]:
        """Returns the names of the computations that some attributes name."""
        pattern = rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))"
        matches = re.findall(pattern, self.attributes)
        return [name for braced, single in matches for name in re.findall(r"[\w.\-]+", braced or single)]


Computation = dict[str, Instruction]  # by name


def memory(stats: Any) -> dict[str, int]:
    """Returns the bytes that a compiled program takes on one device, by kind, from its CompiledMemoryStats.

    Outputs are without those in place of arguments, which are 'aliased'; the compiler reports 'peak' itself.
    """
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(kinds.values())
    return {**kinds, "total": total, "peak": stats.peak_memory_in_bytes, "aliased": stats.alias_size_in_bytes}


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses the text of `compiled.as_text()`; returns the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line) if line.endswith("{") else None
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (match := _INSTRUCTION.match(line)) and current is not None:
            current[match[2]] = _read_instruction(match[2], line[match.end() :], bool(match[1]))
    if entry is None:
        raise ValueError("the text of the compiled program has no ENTRY computation: the format of this XLA is not known here")
    return computations, entry


def _read_instruction(name, rest, is_root):
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")  # only tuples' shapes have spaces
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, shape, rest[:opening], operands, literal, rest[closing + 1 :], is_root)


def _closing(text, opening):
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def array_bytes(shape: str) -> float:
    """Returns the bytes of all arrays of a shape, such as '(f32[8,128]{1,0}, u32[])', without the padding of layouts."""
    total = 0.0
    for kind, sides in _ARRAY.findall(shape):
        size = 1 if kind.startswith("f8") or kind == "f" else _BYTES.get(kind, 0)
        total += size * math.prod(int(side.lstrip("<=")) for side in sides.split(",") if side)
    return total


def analyze(text: str, shares: Sequence[float] = ()) -> ProgramCost:
    """Computes the cost of a compiled program from its scheduled HLO, the text of `compiled.as_text()`.

    Of conditionals with as many branches as `shares`, which add up to 1, each branch is taken so often.
    """
    computations, entry = parse(text)
    counter = _Counter(computations, shares)
    cycles, moved = counter.cost(entry, {})
    return ProgramCost(cycles, dict(moved), len(counter.unknown_loops))


class _Counter:
    """Adds up the cost of computations and of those that they call, as (cycles, Counter of collectives' bytes)."""

    def __init__(self, computations: Mapping[str, Computation], shares: Sequence[float]):
        self.unknown_loops: set[str] = set()
        self._computations, self._shares = computations, shares

    def cost(self, name: str, known: Mapping[int, int]) -> tuple[float, collections.Counter[str]]:
        """Returns the cost of a computation; `known` holds the elements of its parameter that are known integers."""
        computation, cycles = self._computations[name], 0.0
        moved: Any = collections.Counter()
        fused: dict[str, tuple[str, Any]] = {}
        for instruction in computation.values():
            estimate = _CYCLES.search(instruction.attributes)
            own = float(estimate[1]) if estimate else 0.0
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                moved[kind] += _moved_bytes(computation, instruction)
            elif instruction.opcode == "send" and _SLICES in instruction.attributes:
                moved[TO_OTHER_SLICES] += array_bytes(computation[instruction.operands[0]].shape)
            elif instruction.opcode in _CALLS:
                for called in instruction.called("calls", "to_apply"):
                    inner, inner_moved = self.cost(called, {})
                    own = own or inner  # a fusion's estimate covers all in it
                    if instruction.opcode == "call":
                        moved.update(inner_moved)
                    else:
                        fused |= _collectives(self._computations, called)
            else:
                for times, (inner, inner_moved) in self._branches(computation, instruction, known):
                    own += times * inner
                    moved.update({kind: times * size for kind, size in inner_moved.items()})
            cycles += own
        for kind, size in fused.values():
            moved[kind] += size
        return cycles, moved

    def _branches(self, computation, instruction, known):
        """Returns [(how often it runs, cost)] of the computations of a loop or a conditional."""
        if instruction.opcode == "while":
            constant, trips = _loop(self._computations, computation, instruction, known)
            if trips is None:
                self.unknown_loops.add(instruction.name)
                trips = 1
            return [(trips, self.cost(name, constant)) for name in instruction.called("body", "condition")]
        if instruction.opcode == "conditional":
            attributes = ("branch_computations", "false_computation", "true_computation")  # in the order of their index
            branches = [self.cost(name, {}) for attribute in attributes for name in instruction.called(attribute)]
            if len(branches) == len(self._shares):
                return list(zip(self._shares, branches))
            return [(1, max(branches, key=lambda branch: (branch[0], sum(branch[1].values()))))]
        return []


def _collectives(computations, name):
    """Finds the collectives in a computation that a fusion calls, and in those that it calls: channel -> (kind, bytes).

    A collective that overlaps with other work stands in every fusion that it overlaps with, under one channel.
    """
    collectives = {}
    for instruction in computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
            size = _moved_bytes(computations[name], instruction)
            collectives[channel[1] if channel else instruction.name] = kind, size
        elif instruction.opcode in _CALLS:
            for called in instruction.called("calls", "to_apply"):
                collectives |= _collectives(computations, called)
    return collectives


def _moved_bytes(computation, instruction):
    operands = sum(array_bytes(computation[name].shape) for name in instruction.operands)
    result = array_bytes(instruction.shape)
    if instruction.opcode == "all-gather-start":
        return result - operands  # this shape lists the operands, too
    return operands if instruction.opcode.endswith("-start") else max(operands, result)


def _loop(computations, computation, loop, known):
    """Returns the elements of the loop's state that are known integers and do not change, and the trip count or None."""
    body, condition = (computations[loop.called(part)[0]] for part in ("body", "condition"))
    match = _KNOWN_TRIPS.search(loop.attributes)
    trips = int(match[1]) if match else None
    initial, result = computation.get(loop.operands[0]), _root(body)
    if initial is None or initial.opcode != "tuple" or result.opcode != "tuple":
        return {}, trips
    start = {index: _integer(computation, name, known) for index, name in enumerate(initial.operands)}
    kept = {index for index, name in enumerate(result.operands) if _element_of(body, name) == index}
    constant = {index: value for index, value in start.items() if value is not None and index in kept}
    compare = _follow(condition, _root(condition).name)
    if trips is not None or compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return constant, trips
    index, limit = _element_of(condition, compare.operands[0]), _integer(condition, compare.operands[1], constant)
    if index is None or limit is None or start.get(index) is None:
        return constant, None
    step = _step(body, result.operands[index], index, constant)
    return constant, max(0, -(-(limit - start[index]) // step)) if step else None


def _root(computation):
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _follow(computation, name):
    """Returns the instruction whose value the instruction `name` copies, or that itself; None if it is not known."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _SAME_VALUE:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _element_of(computation, name):
    """Returns the index of the parameter's element that the instruction `name` is, or None."""
    instruction = _follow(computation, name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    if computation[instruction.operands[0]].opcode != "parameter":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _integer(computation, name, known):
    """Returns the value of an instruction if it is a known integer, else None."""
    instruction = _follow(computation, name)
    if instruction is not None and instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    return known.get(_element_of(computation, name))


def _step(body, name, index, known):
    """Returns the increment per iteration of the state's element `index`, whose next value is `name`; None if unknown."""
    instruction = _follow(body, name)
    if instruction is None or instruction.opcode != "add":
        return None
    before, by = instruction.operands
    if _element_of(body, before) != index:
        before, by = by, before
    return _integer(body, by, known) if _element_of(body, before) == index else None
