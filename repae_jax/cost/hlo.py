"""The text of compiled programs, scheduled HLO: computations, their instructions, bytes of arrays, lengths of loops.

The length of a loop need not be in the text: it follows from the loop's condition, `counter < limit`, and from where the
counter starts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
CALLS = ("fusion", "call", "async-start")
_BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,<=]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}')
_SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "optimization-barrier")


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
    opcode = rest[:opening]
    if opcode.endswith("-start") and shape.startswith("((") and opcode != "async-start":
        opcode, shape = opcode.removesuffix("-start"), _started(shape)
    return Instruction(name, shape, opcode, operands, literal, rest[closing + 1 :], is_root)


def _started(shape):
    """Returns the shape of the result in that of an instruction that is only started: ((operands), result, context)."""
    rest = re.sub(r"^(, |/\*.*?\*/)+", "", shape[_closing(shape, 1) + 1 :])
    return rest[: _closing(rest, 0) + 1] if rest.startswith("(") else _ARRAY.match(rest)[0]


def _closing(text, opening):
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the shape of an instruction, which may be a tuple of several."""

    dtype: str
    sides: tuple[int, ...]
    is_near: bool  # in a memory of its own beside the processors, such as a TPU's vector memory, or in the host's

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.sides)

    @property
    def bytes(self) -> float:
        """Returns the bytes, without the padding of layouts; 0 of tokens."""
        return self.size * (1 if self.dtype.startswith("f8") or self.dtype == "f" else _BYTES.get(self.dtype, 0))


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape, such as '(f32[8,128]{1,0:T(8,128)S(1)}, u32[])'."""
    return [
        Array(kind, tuple(int(side.lstrip("<=")) for side in sides.split(",") if side), bool(re.search(r"S\([1-9]", layout)))
        for kind, sides, layout in _ARRAY.findall(shape)
    ]


def array_bytes(shape: str) -> float:
    """Returns the bytes of all arrays of a shape."""
    return sum(array.bytes for array in arrays(shape))


def moved_bytes(computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of a collective's arrays before they are scattered, or after they are gathered."""
    operands = sum(array_bytes(computation[name].shape) for name in instruction.operands)
    result = array_bytes(instruction.shape)
    if instruction.opcode == "all-gather-start":
        return result - operands  # this shape lists the operands, too
    return operands if instruction.opcode.endswith("-start") else max(operands, result)


def fused_collectives(computations: Mapping[str, Computation], name: str) -> dict[str, tuple[Computation, Instruction]]:
    """Finds the collectives in a computation that a fusion calls, and in those that it calls: channel -> (computation, it).

    A collective that overlaps with other work stands in every fusion that it overlaps with, under one channel.
    """
    collectives = {}
    for instruction in computations[name].values():
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
            collectives[channel[1] if channel else instruction.name] = computations[name], instruction
        elif instruction.opcode in CALLS:
            for called in instruction.called("calls", "to_apply"):
                collectives |= fused_collectives(computations, called)
    return collectives


def loop_turns(
    computations: Mapping[str, Computation], computation: Computation, loop: Instruction, known: Mapping[int, int]
) -> tuple[dict[int, int], int | None]:
    """Returns the elements of the loop's state that are known integers and do not change, and the trip count or None."""
    body, condition = (computations[loop.called(part)[0]] for part in ("body", "condition"))
    match = _KNOWN_TRIPS.search(loop.attributes)
    trips = int(match[1]) if match else None
    initial, result = computation.get(loop.operands[0]), root(body)
    if initial is None or initial.opcode != "tuple" or result.opcode != "tuple":
        return {}, trips
    start = {index: _integer(computation, name, known) for index, name in enumerate(initial.operands)}
    kept = {index for index, name in enumerate(result.operands) if _element_of(body, name) == index}
    constant = {index: value for index, value in start.items() if value is not None and index in kept}
    compare = _follow(condition, root(condition).name)
    if trips is not None or compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return constant, trips
    index, limit = _element_of(condition, compare.operands[0]), _integer(condition, compare.operands[1], constant)
    if index is None or limit is None or start.get(index) is None:
        return constant, None
    step = _step(body, result.operands[index], index, constant)
    return constant, max(0, -(-(limit - start[index]) // step)) if step else None


def branches(conditional: Instruction) -> list[str]:
    """Returns the names of the computations of a conditional, in the order of their index."""
    attributes = ("branch_computations", "false_computation", "true_computation")
    return [name for attribute in attributes for name in conditional.called(attribute)]


def root(computation: Computation) -> Instruction:
    """Returns the instruction that gives a computation's result."""
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
