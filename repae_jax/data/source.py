"""Base class of sources whose records are encoded image files."""

import abc
import functools

import numpy as np
from jaxtyping import Int32

from repae_jax.data.decoding import decode_crop

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

    Attributes:
      image_size: side of the images in pixels.
      labels: int32 `[N]`, 0..num_classes-1.
      num_classes: number of classes.
    """

    image_size: int
    labels: Int32[np.ndarray, " N"]
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
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`.

        Raises:
          Exception: the types that Pillow, or the library that reads the file, raise for damaged content.
          OSError: if the file cannot be read.
        """
        i = range(len(self))[i]  # IndexError beyond the end
        return {"image": decode_crop(self.content(i), self.image_size), "label": self.labels[i]}


def check_image_size(image_size: int) -> None:
    """Raises ValueError unless the side of an image is positive."""
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")


def check_label_range(labels, names, max_label: int, advice: str, shown: int = 1) -> None:
    """Checks that all labels lie in 0..max_label.

    Args:
      labels: whole numbers `[N]`.
      names: function of a record's number that returns its name.
      max_label: largest allowed label.
      advice: end of the message.
      shown: number of wrong labels that the message lists.

    Raises:
      ValueError: if a label is out of range.
    """
    wrong = np.flatnonzero((labels < 0) | (labels > max_label))
    if len(wrong):
        first = ", ".join(f"{names(i)}: {labels[i]}" for i in wrong[:shown])
        raise ValueError(
            f"{len(wrong)} of {len(labels)} labels are out of range, first {first}; allowed: 0..{max_label}{advice}"
        )
