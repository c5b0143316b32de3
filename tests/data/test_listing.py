"""Folders that are not trees of plain files."""

import base64
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from repae_jax import faults
from repae_jax.analyze_latents.encoding import read_batches
from repae_jax.data import records_hash
from repae_jax.data.folder import FolderSource
from repae_jax.data.listing import list_below
from repae_jax.data.loader import Loader
from repae_jax.data.reading import attempt
from repae_jax.data.shard_writer import read_block
from repae_jax.evaluation import tokenizer
from repae_jax.evaluation.image_sets import dataset_images, folder_images

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGklEQVR4nGNkYGDgYGEiHpGgdFTDqIahpgEAgIEOEiEMTFYAAAAASUVORK5CYII="
)


@pytest.fixture
def png(tmp_path):
    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PIXEL)
        return tmp_path

    return write


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_a_link_to_a_folder_above(png):
    root = png("a/0.png", "b/0.png")
    (root / "a/up").symlink_to("..")
    source = FolderSource(root, 8)
    assert names(source) == ["a/0.png", "b/0.png"] and source.labels.tolist() == [0, 1]
    assert folder_images(root).count == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_two_links_to_folders_above(png, target):
    root = png("a/0.png")
    (root / "a/x").symlink_to(target)
    (root / "a/y").symlink_to(target)
    assert names(FolderSource(root, 8)) == ["a/0.png"]


def test_a_link_to_itself_is_no_class(png):
    root = png("b/0.png")
    (root / "a").symlink_to(".")
    source = FolderSource(root, 8)
    assert names(source) == ["b/0.png"] and source.num_classes == 1 and folder_images(root).count == 1


def test_classes_may_be_links(png, tmp_path):
    png("elsewhere/cat/0.png", "elsewhere/dog/1.png")
    root = tmp_path / "classes"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    assert names(FolderSource(root, 8)) == ["cat/0.png", "dog/1.png"]
    (root / "again").symlink_to(tmp_path / "elsewhere/cat")
    with pytest.raises(ValueError, match="class subfolders without images .*: cat"):  # a link to the folder itself
        FolderSource(root, 8)


def test_a_folder_counts_where_it_is_and_not_where_links_to_it_are(png):
    root = png("b/0.png", "c/1.png")
    (root / "a").symlink_to("b")
    (root / "c/b").symlink_to("../b")
    assert list_below(root, (".png",)).files == ["b/0.png", "c/1.png"]


def test_dangling_links(png):
    root = png("a/0.png")
    (root / "a/1.png").symlink_to("nowhere.png")
    (root / "a/2.png").symlink_to("2.png")
    source = FolderSource(root, 8)
    assert names(source) == ["a/0.png", "a/1.png", "a/2.png"]
    assert [attempt(source, i)[1] is None for i in range(3)] == [True, False, False]
    with pytest.raises(OSError, match="1.png"):
        folder_images(root)
    (root / "b").symlink_to("unmounted")
    with pytest.raises(ValueError, match="b' is a link that leads to nothing"):
        FolderSource(root, 8)


def test_names_that_are_not_utf8(png):
    latin = os.fsdecode(b"caf\xe9.png")
    root = png("a/0.png", f"a/{latin}")
    source = FolderSource(root, 8)
    assert names(source) == ["a/0.png", "a/caf\\xe9.png"] and source[1]["image"].shape == (8, 8, 3)
    assert records_hash(source) and folder_images(root).description["files"] == 2
    assert sum(len(block) for block in folder_images(root).blocks([(0, 2)])) == 2
    (root / "labels.csv").write_bytes(b"a/0.png,1\na/caf\xe9.png,2\n")
    assert FolderSource(root, 8, labels_file="labels.csv").labels.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["[lr=1]", "back\\slash", "*", "a,b", " "])
def test_names_with_odd_letters(png, name):
    png(f"{name}/a/0.png", "other/a/0.png")
    root = png() / name
    assert names(FolderSource(root, 8)) == ["a/0.png"] and FolderSource(root, 8)[0]["image"].shape == (8, 8, 3)
    assert folder_images(root).count == 1


def test_a_folder_that_may_not_be_listed(png, monkeypatch):
    root = png("a/0.png", "b/0.png")
    if os.geteuid():
        (root / "b").chmod(0)
    else:  # root may list everything
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("/b"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
    for listed in (lambda: FolderSource(root, 8), lambda: folder_images(root)):
        with pytest.raises(ValueError, match="/b' cannot be listed .Permission denied.: make it readable"):
            listed()


@pytest.mark.parametrize("fails", [2, 3])
def test_a_disk_that_fails_while_it_is_listed(png, monkeypatch, fails):
    root, scandir, failed = png("a/0.png", "b/0.png"), os.scandir, []

    def flaky(path):
        if str(path).endswith("/b") and len(failed) < fails:
            failed.append(path)
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", flaky)
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    if fails == 3:
        with pytest.raises(OSError, match="/b' cannot be read, tried 3 times"):
            FolderSource(root, 8)
    assert len(FolderSource(root, 8)) == 2


@pytest.mark.timeout(20)
def test_a_pipe_is_no_image(png):
    root = png("a/0.png")
    os.mkfifo(root / "a/1.png")
    with pytest.raises(ValueError, match="a/1.png' is a pipe"):
        FolderSource(root, 8)


READERS = {
    "attempt": lambda source: attempt(source, 1),
    "loader": lambda source: next(Loader(source, batch_size=2, seed=0, max_bad_fraction=1)),
    "prepare_images, cache_latents": lambda source: read_block(source, lambda fields: fields, None, (0, 2)),
    "evaluate_tokenizer": lambda source: tokenizer.read_images(source, [0, 1]),
    "analyze_latents": lambda source: list(read_batches(source, np.arange(2), 2)),
    "evaluate, a source": lambda source: list(dataset_images(source, {}).blocks([(0, 2)])),
    "evaluate, a folder": lambda source: list(folder_images(source._root).blocks([(0, 2)])),
}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file of Linux that cannot be read")
@pytest.mark.parametrize("reader", READERS)
def test_a_real_error_of_reading_is_no_fault_of_the_image(png, monkeypatch, reader):
    root = png("a/0.png")
    (root / "a/1.png").symlink_to("/proc/self/mem")
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    with pytest.raises(OSError, match="a/1.png cannot be read, tried 3 times .*Input/output error"):
        READERS[reader](FolderSource(root, 8))
    (root / "a/1.png").unlink()
    (root / "a/1.png").symlink_to("nowhere.png")
    if reader.startswith(("analyze", "evaluate,")):
        with pytest.raises((ValueError, OSError), match=r"a/1.png"):
            READERS[reader](FolderSource(root, 8))
    else:
        READERS[reader](FolderSource(root, 8))


def test_hidden_files_and_folders_never_count(png):
    root = png("a/0.png", "a/._0.png", ".cache/a/1.png", "a/.hidden/2.png", ".0.png")
    (root / "a/.#lock").symlink_to("user@host.1:2")
    for endings, files in (((".png",), ["a/0.png"]), ((".txt",), [])):
        listing = list_below(root, endings)
        assert listing.files == files and listing.folders == ["a"]


def test_what_is_left_out_is_told(png, caplog):
    root = png("a/0.png")
    (root / "a/notes.txt").write_text("")
    (root / "a/README").write_text("")
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "absl"):
            FolderSource(root, 8)
    finally:
        logger.removeHandler(caplog.handler)
    assert ".txt (1)" in caplog.text and "none (1)" in caplog.text
    shutil.copy(root / "a/0.png", root / "a/1.HEIC")
    with pytest.raises(ValueError, match="kinds that are not read.* a/1.HEIC .*convert or move"):
        FolderSource(root, 8)
    (root / "labels.csv").write_text("a/0.png,1\n")
    assert names(FolderSource(root, 8, labels_file="labels.csv")) == ["a/0.png"]  # the others are not meant
