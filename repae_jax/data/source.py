"""Base class of sources whose records are encoded image files."""

import abc
import functools

import numpy as np
from jaxtyping import Int32

from repae_jax.data.decoding import decode_crop
from repae_jax.ranges import Extent, height_width

MAX_LABEL = np.iinfo(np.int32).max


class ReopenedByWorkers:
    """Mixin for objects with open files: a pickled copy lacks the `functools.cached_property` values and computes them anew."""

    def __getstate__(self):
        kinds = {name: getattr(type(self), name, None) for name in self.__dict__}
        return {name: self.__dict__[name] for name, kind in kinds.items() if not isinstance(kind, functools.cached_property)}


class EncodedImages(ReopenedByWorkers, abc.ABC):
    """Random access to encoded images, center-cropped as they are read.

    A subclass is a dataclass whose fields are `image_size` and the source's options. Its `__post_init__` checks them and sets
    `labels` and `num_classes`, without decoding an image.
    """

    image_size: Extent  # of the images in pixels
    labels: Int32[np.ndarray, " N"]  # 0..num_classes-1
    num_classes: int

    @abc.abstractmethod
    def content(self, i: int) -> bytes:
        """Returns the encoded image of record `i`, 0..N-1."""

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Returns the name of record `i` for people."""

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        """Returns `{'image': uint8 [H, W, 3] of image_size, 'label': int32}` of record `i`.

        Damaged content raises errors of any type, as Pillow and the libraries that read files do.
        """
        i = range(len(self))[i]  # IndexError beyond the end
        return {"image": decode_crop(self.content(i), self.image_size), "label": self.labels[i]}


def check_image_size(image_size: Extent) -> None:
    """Raises ValueError unless the sides of an image are positive."""
    if min(height_width(image_size)) < 1:
        raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")


def check_label_range(labels, names, max_label: int, advice: str, shown: int = 1) -> None:
    """Raises ValueError unless all labels lie in 0..max_label; the message lists `shown` wrong ones with `names(record)`."""
    wrong = np.flatnonzero((labels < 0) | (labels > max_label))
    if len(wrong):
        first = ", ".join(f"{names(i)}: {labels[i]}" for i in wrong[:shown])
        out_of_range = f"{len(wrong)} of {len(labels)} labels are out of range"
        raise ValueError(f"{out_of_range}, first {first}; allowed: 0..{max_label}{advice}")
