"""Sets of small real pictures on which a whole run takes minutes: scikit-learn's digits, and color emoji.

Their classes are what a SiT is conditioned on. Encoder and classifier learn targets, which may be finer: an emoji's subgroup.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt8

from launch import emoji as prepared_emoji
from repae_jax.data.digits import DigitsSource
from repae_jax.data.folder import FolderSource


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Pictures of one split, in the order of the source that training reads."""

    images: UInt8[np.ndarray, "N H H 3"]
    labels: Int32[np.ndarray, " N"]
    targets: Int32[np.ndarray, " N"]

    def __len__(self):
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """A set of pictures, and what about them may be changed without changing what they show."""

    name: Literal["digits", "emoji"]
    train: Split
    test: Split
    classes: tuple[str, ...]  # names of the labels
    target_names: tuple[str, ...]
    label_of_target: Int32[np.ndarray, " T"]
    edges: Literal["constant", "nearest"]  # what lies beyond a shifted picture's edges: black, or their pixels again
    mirrored: bool  # whether mirrored pictures are as good

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.classes)


def digits(image_size: int = 16) -> Pictures:
    """Returns the handwritten digits; targets are the labels."""

    def split(name):
        source = DigitsSource(image_size, name)
        return Split(_images(source), source.labels, source.labels)

    names = tuple(map(str, range(DigitsSource.num_classes)))
    label_of_target = np.arange(len(names), dtype=np.int32)
    return Pictures("digits", split("train"), split("test"), names, names, label_of_target, edges="constant", mirrored=False)


def emoji(folder: str | os.PathLike) -> Pictures:
    """Returns the emoji that `launch.emoji` prepared; targets are the subgroups.

    Labels are the groups, numbered as the source 'folder' numbers those of FOLDER/train; all groups are there.
    ValueError if the folder is something else, or incomplete.
    """
    folder = Path(folder)
    size = prepared_emoji.check_prepared(folder)["size"]
    sources = {name: FolderSource(folder / name, size) for name in ("train", "test")}
    subgroups = sorted({_subgroup(path) for source in sources.values() for path in source.paths})
    classes = sorted({name.partition("/")[0] for name in subgroups})
    number = {name: i for i, name in enumerate(subgroups)}

    label_of_target = np.array([classes.index(name.partition("/")[0]) for name in subgroups], np.int32)

    def split(source):
        targets = np.array([number[_subgroup(path)] for path in source.paths], np.int32)
        return Split(_images(source), label_of_target[targets], targets)

    train, test = map(split, sources.values())
    return Pictures("emoji", train, test, tuple(classes), tuple(subgroups), label_of_target, edges="nearest", mirrored=True)


def _subgroup(path):
    return path.rpartition("/")[0]


def _images(source):
    return np.stack([source[i]["image"] for i in range(len(source))])
