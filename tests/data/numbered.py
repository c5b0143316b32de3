"""Sources whose records tell their numbers, also for scripts that tests start."""

import time

import numpy as np


class Numbers:
    """Record i has label i and shows i; the records in `bad` cannot be decoded."""

    image_size = 4

    def __init__(self, count, bad=()):
        self.labels = np.arange(count, dtype=np.int32)
        self.num_classes = count
        self.bad = set(bad)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"broken {i}")
        return {"image": np.full((4, 4, 3), i % 256, np.uint8), "label": self.labels[i]}

    def name(self, i):
        return f"number-{i}"


class Slow(Numbers):
    """Each record takes a while to read."""

    def __getitem__(self, i):
        time.sleep(0.02)
        return super().__getitem__(i)
