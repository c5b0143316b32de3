"""Any folder of image files, labeled by class subfolders or by a labels file."""

import csv
import dataclasses
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from absl import logging

from repae_jax import faults
from repae_jax.data.decoding import KINDS, read_file
from repae_jax.data.listing import list_below, printable
from repae_jax.data.source import MAX_LABEL, EncodedImages, check_image_size
from repae_jax.ranges import Extent

EXTENSIONS = tuple(ending for endings in KINDS.values() for ending in endings)
_EXTENSIONS = " ".join(EXTENSIONS)
# Formats that are not read: the user is told of such files.
_REFUSED = (
    ".apng", ".arw", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".icns", ".ico",
    ".jxl", ".jxr", ".mpo", ".nef", ".pcx", ".pfm", ".psd", ".qoi", ".raf", ".sgi", ".svg", ".tga", ".xcf",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class FolderSource(EncodedImages):
    """Random access to the images below a folder, center-cropped as they are read.

    The records are sorted by their path, so they do not depend on the file system or on the order of a labels file. Without
    such a file each subfolder is a class; sorted by name they get the labels 0, 1, ...; images may lie deeper inside them.

    A labels file is either JSON `{"labels": [["sub/a.png", 3], ...]}`, or `.csv` / `.tsv` with two columns, path and label. The
    paths in it are relative to the folder; images that it does not list are left out.

    The constructor raises ValueError if the folder or its classes are missing, it cannot be listed, holds no images or some of
    a format that is not read, or if the labels file is malformed, names missing files or has labels out of range.
    """

    path: str | os.PathLike
    image_size: Extent
    labels_file: str | os.PathLike | None = None  # absolute, or relative to the folder
    labelled: bool = True  # whether classes matter; if not, the images may lie anywhere below the folder, and all have label 0

    def __post_init__(self):
        check_image_size(self.image_size)
        if not str(self.path):
            raise ValueError("path is ''; give the folder that holds the images")
        self._root = Path(self.path)
        if not self._root.is_dir():
            raise ValueError(f"path is {str(self.path)!r}, which is not a folder; give the folder that holds the images")
        paths, others, classes = list_below(self._root, EXTENSIONS)
        if self.labels_file is None or not self.labelled:  # a labels file says which images are wanted
            _check_others(self._root, others)
        if not paths:
            raise ValueError(f"no images below {str(self.path)!r}; files with these extensions count: {_EXTENSIONS}")
        if not self.labelled:
            labels = np.zeros(len(paths))
        elif self.labels_file is None:
            labels = _labels_from_subfolders(self._root, paths, classes)
        else:
            paths, labels = _labels_from_file(self._root / self.labels_file, paths)
        self.paths, self.labels = paths, np.asarray(labels, np.int32)  # paths are relative to the folder, with forward slashes
        self.num_classes = int(self.labels.max()) + 1

    def content(self, i: int) -> bytes:
        """Returns the file's bytes."""
        return read_file(self._root / self.paths[i])

    def name(self, i: int) -> str:
        """Returns the path of record `i`, relative to the folder, as `printable`."""
        return printable(self.paths[i])


def _check_others(root, others):
    """Raises ValueError for images of formats that are not read; logs the extensions of all other files."""
    if refused := [path for path in others if path.lower().endswith(_REFUSED)]:
        advice = f"convert or move them; these extensions are read: {_EXTENSIONS}"
        raise ValueError(f"images of kinds that are not read, below {str(root)!r}: {_some(refused)}; {advice}")
    if others:
        endings = Counter(Path(path).suffix.lower() or "none" for path in others)
        counts = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(10))
        logging.info("Below %s files with these extensions are left out, as no images: %s", root, counts)


def _labels_from_subfolders(root, paths, classes):
    """Returns one label per path: the rank of its subfolder of `root` by name."""
    if not classes:
        allowed = "allowed: one subfolder per class, or a labels_file (JSON, CSV or TSV)"
        raise ValueError(f"{str(root)!r} holds {len(paths)} images but no class subfolders; {allowed}")
    class_of_path = [path.partition("/")[0] for path in paths]
    if outside := [path for path in paths if "/" not in path]:
        raise ValueError(f"images outside the class subfolders of {str(root)!r}: {_some(outside)}; move them into one")
    # An empty class is most often an unfinished copy; leaving it out would shift the labels of the others.
    if empty := sorted(set(classes) - set(class_of_path)):
        raise ValueError(f"class subfolders without images ({_EXTENSIONS}): {_some(empty)}; fill or remove them")
    if all(map(str.isdecimal, classes)) and classes != sorted(classes, key=int):
        other = next(label for label, name in enumerate(classes) if int(name) != label)
        logging.warning(
            "the class subfolders of %r are numbers, and labeled in the order of their names: %s is class %d. If the numbers "
            "are the classes, fill them up with zeros (0002, 0010), or give a labels_file",
            str(root), classes[other], other,
        )  # fmt: skip
    label_of_class = {name: label for label, name in enumerate(classes)}
    return [label_of_class[name] for name in class_of_path]


def _labels_from_file(file, paths):
    """Returns the sorted paths of a labels file and their labels, checked against the listing."""
    if not file.is_file():
        raise ValueError(f"labels_file is {str(file)!r}, which does not exist; give it relative to the image folder")
    entries = _read_json(file) if file.suffix.lower() == ".json" else _read_table(file)
    if not entries:
        raise ValueError(f"labels file {str(file)!r} lists no images; allowed: at least one [path, label]")
    listed = [path for path, _ in entries]
    if missing := sorted(set(listed) - set(paths)):
        found = f"names files that are not images ({_EXTENSIONS}) below the folder: {_some(missing)}"
        raise ValueError(f"labels file {str(file)!r} {found}; paths in it are relative to the folder")
    if repeated := sorted(path for path, count in Counter(listed).items() if count > 1):
        raise ValueError(f"labels file {str(file)!r} lists a file more than once: {_some(repeated)}; allowed: once")
    if wrong := [f"{path}: {label}" for path, label in entries if not 0 <= label <= MAX_LABEL]:
        raise ValueError(f"labels file {str(file)!r} has labels out of range: {_some(wrong)}; allowed: 0..{MAX_LABEL}")
    entries.sort()
    return [path for path, _ in entries], [label for _, label in entries]


def _read_json(file):
    """Returns the entries `[(path, label), ...]` of a JSON labels file."""
    try:
        content = json.loads(_read_text(file))
    except ValueError as error:
        raise ValueError(f"labels file {str(file)!r} is not valid JSON: {error}") from error
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'labels file {str(file)!r} has no list "labels"; allowed: {{"labels": [["a.png", 3], ...]}}')
    for entry in entries:
        if not (isinstance(entry, list) and [type(item) for item in entry] == [str, int]):
            raise ValueError(f'labels file {str(file)!r} has the entry {entry!r}; allowed: ["path", integer]')
    return [tuple(entry) for entry in entries]


def _read_table(file):
    """Returns the entries `[(path, label), ...]` of a CSV or TSV labels file, with or without the header `path,label`."""
    separators = {".csv": ",", ".tsv": "\t"}
    if file.suffix.lower() not in separators:
        raise ValueError(f"labels_file is {str(file)!r}; allowed: a file ending in .json, .csv or .tsv")
    entries = []
    lines = io.StringIO(_read_text(file), newline="")
    for number, row in enumerate(csv.reader(lines, delimiter=separators[file.suffix.lower()]), start=1):
        if not row or (number == 1 and row == ["path", "label"]):
            continue
        try:
            path, label = row
            entries.append((path, int(label)))
        except ValueError as error:
            where = f"labels file {str(file)!r} has {row!r} in row {number}"
            raise ValueError(f"{where}; allowed: two columns, path and integer") from error
    return entries


def _read_text(file):
    """Returns the text of a UTF-8 labels file without its byte-order mark; other bytes become surrogates, as in file names."""
    content = faults.read(file.read_bytes, name=lambda: f"labels file {str(file)!r}")
    if b"\0" in content:
        raise ValueError(f"labels file {str(file)!r} is in UTF-16 or UTF-32, or no text; save it as UTF-8")
    return content.decode("utf-8-sig", "surrogateescape")


def _some(names):
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)} in all)"
