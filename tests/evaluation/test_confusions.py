"""Folders of real images that would shift all scores."""

import numpy as np
import pytest
from PIL import Image

from repae_jax.data.folder import FolderSource
from repae_jax.evaluation import confusions


def folder(path, sizes, ending):
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.fromarray(np.full((*size, 3), 20 * i, np.uint8)).save(path / f"{i}.{ending}")
    return FolderSource(path, 32, labelled=False)


@pytest.mark.parametrize(
    ("sizes", "ending", "message"),
    [
        ([(48, 64)] * 3, "jpg", None),  # as ImageNet's, to be cropped
        ([(32, 32)] * 3, "png", None),  # cropped before, without loss
        ([(32, 32)] * 2 + [(40, 40)], "jpg", "2 of 3 files that were looked at are JPEG or WebP of exactly 32 x 32 pixels"),
        ([(24, 64), (64, 64)], "png", "1 of 2 files that were looked at have fewer than 32 pixels and are enlarged"),
    ],
)
def test_real_images(tmp_path, sizes, ending, message):
    warnings = confusions.of_real_images(folder(tmp_path / "real", sizes, ending))
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


def test_broken_files_are_reported_elsewhere(tmp_path):
    source = folder(tmp_path / "real", [(32, 32)], "png")
    (tmp_path / "real" / "0.png").write_bytes(b"no image")
    assert confusions.of_real_images(source) == []


def test_high_distances_are_not_of_reconstructions():
    assert confusions.of_reconstructions(8.0) == []
