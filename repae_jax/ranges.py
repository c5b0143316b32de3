"""What a field of a config or an option of a command may be: finite numbers within bounds, texts, several of them."""

import ctypes
import dataclasses
import math
import numbers
from typing import Any

LARGEST = 2**31 - 1  # of the devices' integers
PATH = "path"  # the rule of texts that are paths or addresses


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers within bounds, as devices see them: what is no finite or normal number in float32 is infinite or zero.

    Attributes:
      whole: whether they are integers.
      least, most: bounds that belong to it; None for none.
      above, below: bounds that do not.
    """

    whole: bool
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value):
        """Returns what is wrong with a value, as a text that follows it; None if nothing is."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return "must be a whole number" if self.whole else "must be a number"
        seen = value if self.whole else _in_float32(value)
        if not math.isfinite(seen):
            return "must be finite" if math.isinf(value) or math.isnan(value) else "must be finite in float32"
        inside = (
            (self.least is None or seen >= self.least)
            and (self.most is None or seen <= self.most)
            and (self.above is None or seen > self.above)
            and (self.below is None or seen < self.below)
        )
        if self.whole and self.most == LARGEST and seen > LARGEST:
            return f"must be at most {LARGEST}"
        return None if inside else f"must {self}"

    def __str__(self):
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high is None or (self.whole and high == LARGEST and low is not None):
            if self.above is None:
                return f"be at least {low}"
            return "be positive" if self.above == 0 else f"be above {low}"
        if low is None:
            return f"be at most {high}" if self.below is None else f"be below {high}"
        return f"lie in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"


def _in_float32(value):
    seen = ctypes.c_float(value).value
    return 0.0 if abs(seen) < 2.0**-126 else seen  # XLA takes subnormal numbers for zero


def whole(least, most=LARGEST):
    """Returns the Range of integers from `least` to `most`."""
    return Range(True, least, most)


def real(least=None, most=None, above=None, below=None):
    """Returns the Range of finite numbers within bounds."""
    return Range(False, least, most, above, below)


SEED = whole(0, 2**32 - 1)  # of every command and config: what numpy's, JAX's and grain's generators all take


@dataclasses.dataclass(frozen=True)
class Several:
    """Allows tuples and lists of what `rule` allows, `least` of them or more; exactly `count`, if that is given."""

    rule: Any
    least: int = 0
    count: int | None = None

    def problem(self, value):
        """Returns what is wrong with a value, as Range.problem."""
        if not isinstance(value, tuple | list):
            return "must be a tuple"
        if self.count is not None and len(value) != self.count:
            return f"must have {self.count} entries"
        if len(value) < self.least:
            return f"must have at least {self.least} {'entry' if self.least == 1 else 'entries'}"
        found = next(filter(None, (problem(self.rule, entry) for entry in value)), None)
        return found and f"has an entry that {found}"


@dataclasses.dataclass(frozen=True)
class OrNone:
    """Allows None, or what `rule` allows."""

    rule: Any

    def problem(self, value):
        """Returns what is wrong with a value, as Range.problem."""
        found = None if value is None else problem(self.rule, value)
        return found and f"{found}, or None"


def problem(rule, value):
    """Returns what is wrong with a value by a Range, Several, OrNone, PATH, or the type bool or str; None if nothing is."""
    if rule is bool:
        return None if isinstance(value, bool) else "must be True or False"
    if rule in (str, PATH):
        return None if isinstance(value, str) else "must be a text"
    if rule in (int, float):
        return Range(rule is int).problem(value)
    return rule.problem(value)


def check(name, rule, value):
    """Raises ValueError that names the value unless the rule allows it."""
    found = problem(rule, value)
    if found:
        raise ValueError(f"{name}={value!r} {found}")
