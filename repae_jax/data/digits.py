"""The 1,797 handwritten digits that come with scikit-learn: a complete data set with nothing to download."""

import numpy as np
from PIL import Image

_SPLITS = ("train", "test", "all")


class DigitsSource:
    """Random access to 8x8 grey digits, enlarged to RGB images.

    The split is fixed: every fifth digit of each class, in file order, is for testing (355), the others for
    training (1,442).

    Attributes:
      labels: int32 `[N]`, 0..9.
      num_classes: 10.
      image_size: side of the images in pixels.
    """

    num_classes = 10

    def __init__(self, image_size, split="train"):
        """Reads the digits of one split.

        Args:
          image_size: side of the images in pixels; 8 and above make sense.
          split: 'train', 'test' or 'all'.

        Raises:
          ValueError: if the split is unknown or the size not positive.
        """
        from sklearn.datasets import load_digits  # here: only this source needs scikit-learn

        if split not in _SPLITS:
            raise ValueError(f"split is {split!r}; allowed: {', '.join(map(repr, _SPLITS))}")
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")
        digits = load_digits()
        self._indices = _split_indices(digits.target, split)
        self._digits = np.round(digits.images[self._indices] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        self._split = split
        self.labels = digits.target[self._indices].astype(np.int32)
        self.image_size = image_size

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`."""
        image = Image.fromarray(self._digits[i]).resize((self.image_size,) * 2, resample=Image.Resampling.BICUBIC)
        return {"image": np.array(image.convert("RGB")), "label": self.labels[i]}

    def name(self, i):
        """Names record `i` for people: its split, its position in the full set and its class."""
        return f"digits {self._split} #{self._indices[i]} (a {self.labels[i]})"


def _split_indices(labels, split):
    """Positions of a split's records in file order, int64 `[N]`."""
    if split == "all":
        return np.arange(len(labels))
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return np.flatnonzero(is_test == (split == "test"))
