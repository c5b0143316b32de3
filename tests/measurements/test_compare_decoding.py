"""What measurements/compare_decoding.py compares, and how."""

from pathlib import Path

import compare_decoding
import numpy as np
import pytest
from PIL import Image

from repae_jax.data.folder import FolderSource


def test_ratio_is_taken_within_each_repeat():
    found = {compare_decoding.PYTORCH: [100.0, 50.0, 100.0], compare_decoding.OURS: [200.0, 100.0, 150.0]}
    assert compare_decoding.summarize(found) == {"median": 2.0, "low": 1.5, "high": 2.0}


def test_both_sides_read_the_same_images(tmp_path):
    compare_decoding.make_jpegs(tmp_path, 2)
    source = FolderSource(tmp_path, 128)
    files = compare_decoding.Files(tmp_path, source)
    assert len(files) == 2 and Image.open(tmp_path / "class/00000.jpg").size == (500, 375)
    for i in range(2):
        pixels, label = files[i]
        assert label == source[i]["label"]
        np.testing.assert_allclose(
            pixels.astype(int), source[i]["image"].astype(int), atol=2
        )  # Pillow may resize columns first


def test_both_sides_read_the_same_files_in_the_same_order(tmp_path, monkeypatch):
    """In every turn, and no others are read before."""
    pytest.importorskip("torch")
    for i in range(40):
        (tmp_path / f"{i:02d}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02d}" / "a.jpg")
    numbers = ["--batch_size=4", "--batches=2", "--workers=1", "--image_size=8"]
    options, source = compare_decoding.parse_args([f"--folder={tmp_path}", *numbers]), FolderSource(tmp_path, 8)
    order, labels = compare_decoding.order_of(source, options), []
    for side in compare_decoding.SIDES:
        batches, close = compare_decoding.batches_of(side, tmp_path, source, order, options)
        found = [next(batches) for _ in range(4)]
        labels.append(np.concatenate([batch["label"] if side == compare_decoding.OURS else batch[1] for batch in found]))
        close()
    assert labels[0].tolist() == labels[1].tolist() == order[:16], "a label is a file's number here"

    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(int(path.parent.name)) or read_bytes(path))
    monkeypatch.setattr(compare_decoding, "images_per_second", lambda *_: 1.0)
    compare_decoding.run(options, lambda line: None)
    assert read == sorted(set(order)) and len(read) == 24 < len(source)


def test_a_run(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    compare_decoding.make_jpegs(tmp_path, 4)
    monkeypatch.setattr(compare_decoding, "images_per_second", lambda side, *_: 1.0 + (side == compare_decoding.OURS))
    lines = []
    options = compare_decoding.parse_args([f"--folder={tmp_path}", "--batch_size=4", "--repeats=2", "--workers=3"])
    assert compare_decoding.run(options, lines.append)["median"] == 2
    sides = [line.partition(": ")[2].rpartition("images")[0].split("  ")[0] for line in lines[:-1]]
    assert sides == [*compare_decoding.SIDES, *compare_decoding.SIDES[::-1]] and lines[-1].endswith("3 workers each")
    with pytest.raises(ValueError, match=r"--batch_size=5: .* holds 4 images"):
        compare_decoding.run(compare_decoding.parse_args([f"--folder={tmp_path}", "--batch_size=5"]), lines.append)


def test_wrong_numbers(capsys):
    with pytest.raises(SystemExit):
        compare_decoding.parse_args(["--workers=0"])
    assert "--workers is 0; allowed: 1 and above" in capsys.readouterr().err
