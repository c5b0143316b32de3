"""The 1,797 handwritten digits that come with scikit-learn: a complete data set with nothing to download."""

import dataclasses

import numpy as np
from PIL import Image

from repae_jax.data.source import check_image_size
from repae_jax.ranges import Extent, height_width

_SPLITS = ("train", "test", "all")


@dataclasses.dataclass(eq=False)
class DigitsSource:
    """Random access to 8x8 gray digits, enlarged to RGB images.

    The split is fixed: every fifth digit of each class, in file order, is for testing (355), the others for training (1,442).
    """

    image_size: Extent  # in pixels, to which digits are stretched; 8 and above make sense
    split: str = "train"  # one of _SPLITS
    num_classes = 10

    def __post_init__(self):
        from sklearn.datasets import load_digits  # here: only this source needs scikit-learn
        if self.split not in _SPLITS:
            raise ValueError(f"split is {self.split!r}; allowed: {', '.join(map(repr, _SPLITS))}")
        check_image_size(self.image_size)
        digits = load_digits()
        self._indices = _split_indices(digits.target, self.split)
        self._digits = np.round(digits.images[self._indices] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        self.labels = digits.target[self._indices].astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        size = height_width(self.image_size)[::-1]
        image = Image.fromarray(self._digits[i]).resize(size, resample=Image.Resampling.BICUBIC)
        return {"image": np.array(image.convert("RGB")), "label": self.labels[i]}

    def name(self, i: int) -> str:
        """Returns the split, the position in the full set and the class of record `i`."""
        return f"digits {self.split} #{self._indices[i]} (a {self.labels[i]})"


def _split_indices(labels, split):
    if split == "all":
        return np.arange(len(labels))
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return np.flatnonzero(is_test == (split == "test"))
