"""Ranges of config fields and command-line options, and the base class of config sections.

A section is a frozen dataclass whose annotations are its rules: `Annotated[int, whole(1)]` is a number with bounds, and `bool`,
`str`, `int`, `float`, `X | None`, `tuple[X, ...]` and `Mapping[str, X]` of such types mean what they say. Of several sections,
`X | Y`, the field `family` says which one it is; the first has none.

The size of an image or a grid is a number for a square, or a pair (height, width): `Extent`.
"""

import copy
import ctypes
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

LARGEST = 2**31 - 1  # largest integer of the devices
Extent = int | Sequence[int]  # a square's side, or (height, width)
PATH = "path"  # the rule of texts that are paths or addresses
_LATER = "later"  # in the metadata of a field, see `later`


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
class NumberOrPair:
    """A number that `rule` allows, or a pair of them."""

    rule: Range

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as Range.problem."""
        if isinstance(value, tuple | list):
            text = Several(self.rule, count=2).problem(value)
            return text and f"{text}: (height, width)"
        text = self.rule.problem(value)
        return text and f"{text}, or a pair (height, width)"


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


# ---- sizes of images and grids ---------------------------------------------------------------------------------------


def height_width(extent: Extent) -> tuple[int, int]:
    """Returns (height, width) of an extent."""
    height, width = (extent, extent) if isinstance(extent, numbers.Integral) else extent
    return int(height), int(width)


def as_extent(sides: Extent) -> int | tuple[int, int]:
    """Returns the one form of an extent that is stored and compared: of a square the number, otherwise a tuple."""
    height, width = height_width(sides)
    return height if height == width else (height, width)


def in_words(extent: Extent) -> str:
    """Returns an extent for people: '256', or '256 x 384'."""
    return " x ".join(map(str, dict.fromkeys(height_width(extent))))


def as_option(extent: Extent) -> str:
    """Returns an extent as options and config fields take it on the command line: '256', or '256,384'."""
    return ",".join(map(str, dict.fromkeys(height_width(extent))))


# ---- sections of a config -------------------------------------------------------------------------------------------

Size = Annotated[int, whole(1, 2**20)]  # one axis of an array
ImageSize = Annotated[Extent, NumberOrPair(whole(1, 2**20))]  # in pixels
Positive = Annotated[int, whole(1)]
Count = Annotated[int, whole(0)]
Share = Annotated[float, real(0, 1)]
Weight = Annotated[float, real(0)]
PathText = Annotated[str, PATH]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of sections: FieldError unless annotations allow the values; lists become tuples, `~` the user's folder.

    Sizes of images become what `as_extent` returns.
    """

    def __post_init__(self):
        for name, rule in _rules(type(self)).items():
            value = getattr(self, name)
            check(name, rule, value)
            if isinstance(value, list):
                value = tuple(value)
            if value and PATH in (rule, getattr(rule, "rule", None)):
                value = os.path.expanduser(value)
            if value is not None and any(isinstance(part, NumberOrPair) for part in (rule, getattr(rule, "rule", None))):
                value = as_extent(value)
            object.__setattr__(self, name, value)


def later(default: Any) -> Any:
    """Returns a field of a section that the first runs did not have, with the default that stands for them; see `plain`."""
    return dataclasses.field(default=default, metadata={_LATER: True})


def plain(value: Any) -> Any:
    """Returns a section as nested plain values, a copy; a field made by `later` is left out at its default."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return copy.deepcopy(value)
    entries = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {f.name: plain(entry) for f, entry in entries if not (f.metadata.get(_LATER) and entry == f.default)}


@functools.cache
def _rules(section):
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: _rule(hint) for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}


def _rule(hint):
    """Returns an annotation's rule; None for dataclasses and Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return hint.__metadata__[0]
    if origin in (typing.Union, types.UnionType):
        return None if dataclasses.is_dataclass(arguments[0]) else OrNone(_rule(arguments[0]))
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
    sections = [entry for entry in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(entry)]
    if typing.get_origin(hint) is Mapping and sections:
        check_mapping(where, value)
        return {name: construct(f"{where}.{name}", sections[0], entry) for name, entry in value.items()}
    if not sections or (value is None and type(None) in typing.get_args(hint)):
        return value
    return construct(where, _member(where, sections, value), value)


def _member(where, sections, value):
    """Returns the dataclass that a section is of: that of its `family`, or the first, which has no such field."""
    check_mapping(where, value)
    families = {section.family: section for section in sections[1:]}
    if not families or "family" not in value:
        return sections[0]
    check(f"{where}.family", Choice(tuple(families)), value["family"])
    return families[value["family"]]
