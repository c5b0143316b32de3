"""What a tracker is, and what it is told of a run."""

import abc
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from repae_jax import faults

Picture = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, as trackers see it."""

    name: str  # for people
    identity: str  # which no other run has; where the tracker knows it, the record is continued
    first_step: int  # the first that this start will write
    project: str
    config: Mapping[str, Any]  # nested plain values
    folder: Path  # a local one, for TensorBoard's files


class Tracker(abc.ABC):
    """A place for metrics and pictures, open for one start of a run."""

    package: ClassVar[str]  # the module that it needs
    extra: ClassVar[str]  # of this project, which installs the package; '' for one that is always there
    has_records: ClassVar[bool] = True  # whether it knows a run by its identity; False for files in the workdir

    @abc.abstractmethod
    def __init__(self, run: Record):
        """Opens the record of a run."""

    @abc.abstractmethod
    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the metrics of a step; one step may come several times, with other metrics."""

    @abc.abstractmethod
    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Adds pictures of a step by their kind."""

    @abc.abstractmethod
    def close(self, *, is_failed: bool) -> None:
        """Ends the record; `is_failed` says that an error ends the run."""


def named(tracker: str) -> str:
    """Returns how an error begins that is about one of a config's trackers."""
    return f"config.log.trackers has {tracker!r}"


def reason(error: BaseException) -> str:
    """Returns an error's type and the first line of its message, without the passwords of addresses in it."""
    return re.sub(r"(?<=://)[^/\s]+@", "", f"{type(error).__name__}: {faults.first_line(error)}".removesuffix(": "))
