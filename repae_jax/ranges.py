"""Ranges of config fields and command-line options, and the base class of config sections.

A section is a frozen dataclass whose annotations are its rules: `Annotated[int, whole(1)]` is a number with bounds, and `bool`,
`str`, `int`, `float`, `X | None`, `tuple[X, ...]` and `Mapping[str, X]` of such types mean what they say.
"""

import ctypes
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

LARGEST = 2**31 - 1  # largest integer of the devices
PATH = "path"  # the rule of texts that are paths or addresses


class FieldError(ValueError):
    """A value that a field cannot have; the message starts with the field's name."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers within bounds, as devices see them: float32 without subnormal numbers."""

    whole: bool  # integers alone
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # exclusive bounds
    below: float = math.inf

    def problem(self, value: Any) -> str | None:
        """Returns the second half of a sentence that starts with the value; None if the value is allowed."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return "must be a whole number" if self.whole else "must be a number"
        seen = value if self.whole else _in_float32(value)
        if not math.isfinite(seen):
            return "must be finite" if math.isinf(value) or math.isnan(value) else "must be finite in float32"
        if self.whole and self.most == LARGEST and seen > LARGEST:
            return f"must be at most {LARGEST}"
        return None if self.least <= seen <= self.most and self.above < seen < self.below else f"must {self}"

    def __str__(self):
        low, high = max(self.least, self.above), min(self.most, self.below)
        if high == math.inf or (self.whole and high == LARGEST):
            return f"be at least {low}" if low == self.least else "be positive" if low == 0 else f"be above {low}"
        if low == -math.inf:
            return f"be at most {high}" if high == self.most else f"be below {high}"
        return f"lie in {'[' if low == self.least else '('}{low}, {high}{']' if high == self.most else ')'}"


def _in_float32(value):
    seen = ctypes.c_float(value).value
    return 0.0 if abs(seen) < 2.0**-126 else seen  # XLA flushes subnormal numbers to zero


def whole(least: int, most: int = LARGEST) -> Range:
    """Returns the Range of integers from `least` to `most`."""
    return Range(True, least, most)


real = functools.partial(Range, False)  # finite numbers: real(least, most, above, below)
_NUMBERS = {int: whole(-LARGEST), float: real()}  # numbers without bounds of their own
SEED = whole(0, 2**32 - 1)  # seeds of every command and config: numpy's, JAX's and grain's generators all take them


@dataclasses.dataclass(frozen=True)
class Several:
    """Tuples and lists of entries that `rule` allows: at least `least` of them, or exactly `count`."""

    rule: Any
    least: int = 0
    count: int | None = None

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as Range.problem."""
        if not isinstance(value, tuple | list):
            return "must be a tuple"
        if self.count is not None and len(value) != self.count:
            return f"must have {self.count} entries"
        if len(value) < self.least:
            return f"must have at least {self.least} {'entry' if self.least == 1 else 'entries'}"
        first = next(filter(None, (problem(self.rule, entry) for entry in value)), None)
        return first and f"has an entry that {first}"


@dataclasses.dataclass(frozen=True)
class OrNone:
    """None, or a value that `rule` allows."""

    rule: Any

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as Range.problem."""
        text = None if value is None else problem(self.rule, value)
        return text and f"{text}, or None"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values."""

    allowed: tuple[Any, ...]

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as Range.problem."""
        return None if value in self.allowed else f"is unknown; allowed: {list(self.allowed)}"


@dataclasses.dataclass(frozen=True)
class Named:
    """Mappings of names to values that `rule` allows."""

    rule: Any


def problem(rule: Any, value: Any) -> str | None:
    """Returns what is wrong with a value by a rule, PATH, or the type bool, str, int or float, as Range.problem."""
    if rule is bool:
        return None if isinstance(value, bool) else "must be True or False"
    if rule in (str, PATH):
        return None if isinstance(value, str) else "must be a text"
    return _NUMBERS.get(rule, rule).problem(value)


def check(name: str, rule: Any, value: Any) -> None:
    """Raises FieldError that names the value unless the rule allows it; a rule that is None allows everything."""
    if isinstance(rule, Named):
        check_mapping(name, value)
        for entry, inner in value.items():
            check(f"{name}.{entry}", rule.rule, inner)
    elif rule is not None and (text := problem(rule, value)):
        raise FieldError(f"{name}={value!r} {text}")


def check_mapping(name: str, value: Any) -> None:
    """Raises FieldError unless the value is a mapping, as sections are."""
    if not isinstance(value, Mapping):
        raise FieldError(f"{name}={value!r} must be a section with fields of its own")


# ---- sections of a config -------------------------------------------------------------------------------------------

Size = Annotated[int, whole(1, 2**20)]  # one axis of an array
Positive = Annotated[int, whole(1)]
Count = Annotated[int, whole(0)]
Share = Annotated[float, real(0, 1)]
Weight = Annotated[float, real(0)]
PathText = Annotated[str, PATH]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of sections: FieldError unless annotations allow the values; lists become tuples, `~` the user's folder."""

    def __post_init__(self):
        for name, rule in _rules(type(self)).items():
            value = getattr(self, name)
            check(name, rule, value)
            if isinstance(value, list):
                value = tuple(value)
            if value and PATH in (rule, getattr(rule, "rule", None)):
                value = os.path.expanduser(value)
            object.__setattr__(self, name, value)


@functools.cache
def _rules(section):
    return {name: _rule(hint) for name, hint in typing.get_type_hints(section, include_extras=True).items()}


def _rule(hint):
    """Returns an annotation's rule; None for dataclasses and Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return hint.__metadata__[0]
    if origin in (typing.Union, types.UnionType):
        return OrNone(_rule(arguments[0]))
    if origin is tuple:
        return Several(_rule(arguments[0]), count=None if arguments[1] is Ellipsis else len(arguments))
    if origin is Mapping:
        return Named(_rule(arguments[1]))
    return hint if hint in (bool, str, int, float) else None


def construct(where: str, section: type, values: Any) -> Any:
    """Builds a dataclass, with the dataclasses among its fields, from a mapping of plain values at `where`, e.g. 'config.data'.

    Raises ValueError that names every field that is unknown or missing, or the first one with a value that is not allowed.
    """
    check_mapping(where, values)
    fields = {field.name: field for field in dataclasses.fields(section)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values)
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; allowed: {sorted(fields)}")
    hints = typing.get_type_hints(section)
    built = {name: _construct_field(f"{where}.{name}", hints[name], value) for name, value in values.items()}
    try:
        return section(**built)
    except ValueError as error:
        raise ValueError(f"{where}{'.' if isinstance(error, FieldError) else ': '}{error}") from error


def _construct_field(where, hint, value):
    if dataclasses.is_dataclass(hint):
        return construct(where, hint, value)
    if typing.get_origin(hint) is Mapping and dataclasses.is_dataclass(inner := typing.get_args(hint)[1]):
        check_mapping(where, value)
        return {name: construct(f"{where}.{name}", inner, entry) for name, entry in value.items()}
    return value
