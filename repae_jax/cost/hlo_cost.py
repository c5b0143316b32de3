"""What a compiled program tells of its cost: bytes by kind; of a TPU's text, cycles and collectives, loops multiplied.

The compiler writes the cycles that it expects of an instruction into the instruction's backend config. XLA's own summary of a
program, `cost_analysis`, counts the body of a loop once. The length of a loop is not in the text: it follows from the loop's
condition, `counter < limit`, and from where the counter starts.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
TO_OTHER_SLICES = "to other slices"
_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'  # of the hosts' network, which connects slices
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
_SAME_VALUE = ("copy", "copy-done", "bitcast", "convert", "optimization-barrier")


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What one device spends on one run of a program.

    Attributes:
      cycles: sum of the compiler's estimates; of a conditional, its longest branch, or the mean where `analyze` knows shares.
      collectives: kind -> bytes of the arrays before they are scattered, or after they are unsharded. Those over several slices
        are split by the compiler into some within a slice and what is sent between, TO_OTHER_SLICES.
      unknown_loops: loops whose length is not known; their bodies are counted once.
    """

    cycles: float
    collectives: dict[str, float]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses
    attributes: str

    def called(self, attribute):
        """Names of the computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []


@dataclasses.dataclass
class Computation:
    """A named list of instructions."""

    instructions: dict[str, Instruction]
    root: Instruction | None = None


def memory(stats):
    """Bytes that a compiled program takes on one device, by kind.

    Args:
      stats: its CompiledMemoryStats.

    Returns:
      dict: arguments; outputs, but those in place of arguments; temporaries; code; their total; peak, which the compiler
      reports itself; and aliased, the outputs in place of arguments.
    """
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(kinds.values())
    return {**kinds, "total": total, "peak": stats.peak_memory_in_bytes, "aliased": stats.alias_size_in_bytes}


def parse(text):
    """Computations of an HLO module.

    Args:
      text: as `compiled.as_text()` gives it.

    Returns:
      (name -> Computation, name of the entry).

    Raises:
      ValueError: if there is no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line) if line.endswith("{") else None
        if header:
            current = computations[header[2]] = Computation({})
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line) if current is not None else None
        if found:
            instruction = _read_instruction(found[2], line[found.end() :])
            current.instructions[instruction.name] = instruction
            current.root = instruction if found[1] else current.root
    if entry is None:
        raise ValueError("the text of the compiled program has no ENTRY computation: the format of this XLA is not known here")
    return computations, entry


def _read_instruction(name, rest):
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")  # only tuples' shapes have spaces
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, shape, rest[:opening], operands, literal, rest[closing + 1 :])


def _closing(text, opening):
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def array_bytes(shape):
    """Bytes of all arrays of a shape, such as '(f32[8,128]{1,0}, u32[])'; layouts and their padding do not count."""
    total = 0.0
    for kind, sides in _ARRAY.findall(shape):
        size = 1 if kind.startswith("f8") or kind == "f" else _BYTES.get(kind, 0)
        total += size * math.prod(int(side.lstrip("<=")) for side in sides.split(",") if side)
    return total


def analyze(text, shares=()):
    """Cost of a compiled program.

    Args:
      text: of its HLO, scheduled, as `compiled.as_text()` gives it.
      shares: how often each branch is taken of conditionals with as many branches, adding up to 1.

    Returns:
      ProgramCost.
    """
    computations, entry = parse(text)
    unknown = set()
    cycles, moved = _cost(computations, entry, {}, unknown, shares)
    return ProgramCost(cycles, dict(moved), len(unknown))


def _cost(computations, name, known, unknown, shares):
    """(cycles, Counter of collectives' bytes) of a computation.

    Args:
      computations: name -> Computation.
      name: of the computation.
      known: index of an element of its parameter -> integer, of those that are known.
      unknown: set that gets the names of loops of unknown length.
      shares: as `analyze` takes them.
    """
    computation, cycles, moved, beside = computations[name], 0.0, collections.Counter(), {}
    for instruction in computation.instructions.values():
        found = _CYCLES.search(instruction.attributes)
        own = float(found[1]) if found else 0.0
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            moved[kind] += _moved_bytes(computation, instruction)
        elif instruction.opcode == "send" and _SLICES in instruction.attributes:
            moved[TO_OTHER_SLICES] += array_bytes(computation.instructions[instruction.operands[0]].shape)
        elif instruction.opcode == "while":
            inner, trips = _loop(computations, computation, instruction, known)
            if trips is None:
                unknown.add(instruction.name)
                trips = 1
            parts = [_cost(computations, instruction.called(part)[0], inner, unknown, shares) for part in ("body", "condition")]
            own += trips * sum(part[0] for part in parts)
            for part in parts:
                moved.update({kind: trips * size for kind, size in part[1].items()})
        elif instruction.opcode == "conditional":
            names = [n for a in ("branch_computations", "false_computation", "true_computation") for n in instruction.called(a)]
            branches = [_cost(computations, branch, {}, unknown, shares) for branch in names]
            longest = max(branches, key=lambda branch: (branch[0], sum(branch[1].values())))
            for share, branch in zip(shares, branches) if len(shares) == len(branches) else [(1, longest)]:
                own += share * branch[0]
                moved.update({kind: share * size for kind, size in branch[1].items()})
        elif instruction.opcode in _CALLS:
            for called in instruction.called("calls") + instruction.called("to_apply"):
                inside = _cost(computations, called, {}, unknown, shares)
                own = own or inside[0]  # the estimate of a fusion is that of all in it
                if instruction.opcode == "call":
                    moved.update(inside[1])
                else:
                    beside |= _collectives(computations, called)
        cycles += own
    for kind, size in beside.values():
        moved[kind] += size
    return cycles, moved


def _collectives(computations, name):
    """Channel -> (kind, bytes) of the collectives in a computation that a fusion calls, and in those that it calls.

    A collective that goes on beside other work stands in all fusions that it goes on in, with one channel.
    """
    found = {}
    for instruction in computations[name].instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
            size = _moved_bytes(computations[name], instruction)
            found[channel[1] if channel else instruction.name] = kind, size
        elif instruction.opcode in _CALLS:
            for called in instruction.called("calls") + instruction.called("to_apply"):
                found |= _collectives(computations, called)
    return found


def _moved_bytes(computation, instruction):
    given = sum(array_bytes(computation.instructions[name].shape) for name in instruction.operands)
    made = array_bytes(instruction.shape)
    if instruction.opcode == "all-gather-start":
        return made - given  # its shape lists the operands, too
    return given if instruction.opcode.endswith("-start") else max(given, made)


# ---------------------------------------------------------------------------------------------------------------------
# How often a loop runs.
# ---------------------------------------------------------------------------------------------------------------------


def _loop(computations, computation, loop, known):
    """(elements of the loop's state that are known integers and stay what they are, number of turns or None)."""
    body, condition = (computations[loop.called(part)[0]] for part in ("body", "condition"))
    initial = computation.instructions.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple" or body.root is None or body.root.opcode != "tuple":
        return {}, _known_trips(loop)
    start = {index: _integer(computation, name, known) for index, name in enumerate(initial.operands)}
    kept = {index for index, name in enumerate(body.root.operands) if _element_of(body, name) == index}
    constant = {index: value for index, value in start.items() if value is not None and index in kept}
    if _known_trips(loop) is not None:
        return constant, _known_trips(loop)
    compare = _follow(condition, condition.root)
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return constant, None
    index, limit = _element_of(condition, compare.operands[0]), _integer(condition, compare.operands[1], constant)
    if index is None or limit is None or start.get(index) is None:
        return constant, None
    step = _step(body, index, constant)
    return constant, max(0, -(-(limit - start[index]) // step)) if step else None


def _known_trips(loop):
    found = _KNOWN_TRIPS.search(loop.attributes)
    return int(found[1]) if found else None


def _follow(computation, instruction):
    """The instruction whose value this one has."""
    while instruction is not None and instruction.opcode in _SAME_VALUE:
        source = computation.instructions.get(instruction.operands[0])
        if source is not None and instruction.opcode == "copy-done":  # of copy-start
            source = computation.instructions.get(source.operands[0])
        instruction = source
    return instruction


def _element_of(computation, name):
    """Index of the element of the parameter that the instruction `name` is; None if it is something else."""
    instruction = _follow(computation, computation.instructions.get(name))
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    if computation.instructions[instruction.operands[0]].opcode != "parameter":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _integer(computation, name, known):
    """Value of an instruction, if it is a known integer."""
    instruction = _follow(computation, computation.instructions.get(name))
    if instruction is not None and instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    return known.get(_element_of(computation, name))


def _step(body, index, known):
    """What a turn adds to element `index` of the loop's state; None if unknown."""
    instruction = _follow(body, body.instructions.get(body.root.operands[index]))
    if instruction is None or instruction.opcode != "add":
        return None
    before, by = instruction.operands
    if _element_of(body, before) != index:
        before, by = by, before
    return _integer(body, by, known) if _element_of(body, before) == index else None
