"""Cost of a compiled program: memory by kind; from a TPU program's text, cycles and collectives, loops multiplied.

The compiler writes the cycles that it expects of an instruction into the instruction's backend config. XLA's own summary of a
program, `cost_analysis`, counts the body of a loop once.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from repae_jax.cost import hlo

TO_OTHER_SLICES = "to other slices"
_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'  # marks transfers over the network that connects slices
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of one execution of a program on one device.

    The compiler splits collectives over several slices into some within a slice and what is sent between slices.
    """

    cycles: float  # the compiler's estimates; of a conditional, its longest branch, or the mean where `analyze` knows shares
    collectives: dict[str, float]  # kind -> bytes of the arrays before they are scattered, or after they are gathered
    unknown_loops: int  # how many have a length that is not known; their bodies are counted once


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


def analyze(text: str, shares: Sequence[float] = ()) -> ProgramCost:
    """Computes the cost of a compiled program from its scheduled HLO, the text of `compiled.as_text()`.

    Of conditionals with as many branches as `shares`, which add up to 1, each branch is taken so often.
    """
    computations, entry = hlo.parse(text)
    counter = _Counter(computations, shares)
    cycles, moved = counter.cost(entry, {})
    return ProgramCost(cycles, dict(moved), len(counter.unknown_loops))


class _Counter:
    """Adds up the cost of computations and of those that they call, as (cycles, Counter of collectives' bytes)."""

    def __init__(self, computations: Mapping[str, hlo.Computation], shares: Sequence[float]):
        self.unknown_loops: set[str] = set()
        self._computations, self._shares = computations, shares

    def cost(self, name: str, known: Mapping[int, int]) -> tuple[float, collections.Counter[str]]:
        """Returns the cost of a computation; `known` holds the elements of its parameter that are known integers."""
        computation, cycles = self._computations[name], 0.0
        moved: Any = collections.Counter()
        fused: dict[str, tuple[hlo.Computation, hlo.Instruction]] = {}
        for instruction in computation.values():
            estimate = _CYCLES.search(instruction.attributes)
            own = float(estimate[1]) if estimate else 0.0
            kind = instruction.opcode.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                moved[kind] += hlo.moved_bytes(computation, instruction)
            elif instruction.opcode == "send" and _SLICES in instruction.attributes:
                moved[TO_OTHER_SLICES] += hlo.array_bytes(computation[instruction.operands[0]].shape)
            elif instruction.opcode in hlo.CALLS:
                for called in instruction.called("calls", "to_apply"):
                    inner, inner_moved = self.cost(called, {})
                    own = own or inner  # a fusion's estimate covers all in it
                    if instruction.opcode == "call":
                        moved.update(inner_moved)
                    else:
                        fused |= hlo.fused_collectives(self._computations, called)
            else:
                for times, (inner, inner_moved) in self._branches(computation, instruction, known):
                    own += times * inner
                    moved.update({kind: times * size for kind, size in inner_moved.items()})
            cycles += own
        for inside, collective in fused.values():
            moved[collective.opcode.removesuffix("-start")] += hlo.moved_bytes(inside, collective)
        return cycles, moved

    def _branches(self, computation, instruction, known):
        """Returns [(how often it runs, cost)] of the computations of a loop or a conditional."""
        if instruction.opcode == "while":
            constant, trips = hlo.loop_turns(self._computations, computation, instruction, known)
            if trips is None:
                self.unknown_loops.add(instruction.name)
                trips = 1
            return [(trips, self.cost(name, constant)) for name in instruction.called("body", "condition")]
        if instruction.opcode == "conditional":
            branches = [self.cost(name, {}) for name in hlo.branches(instruction)]
            if len(branches) == len(self._shares):
                return list(zip(self._shares, branches))
            return [(1, max(branches, key=lambda branch: (branch[0], sum(branch[1].values()))))]
        return []
