"""Any folder of image files, labelled by class subfolders or by a labels file."""

import codecs
import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from absl import logging

from repae_jax import faults
from repae_jax.data.decoding import KINDS, decode_crop, read_file
from repae_jax.data.listing import list_below, printable

EXTENSIONS = tuple(ending for endings in KINDS.values() for ending in endings)
# Of images, too, but not read: who has them should know.
_REFUSED = (
    ".apng", ".arw", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".icns", ".ico",
    ".jxl", ".jxr", ".mpo", ".nef", ".pcx", ".pfm", ".psd", ".qoi", ".raf", ".sgi", ".svg", ".tga", ".xcf",
)  # fmt: skip
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"
}  # fmt: skip
_LARGEST = np.iinfo(np.int32).max


class FolderSource:
    """Random access to the images below a folder, centre-cropped as they are read.

    The records are sorted by their path, so they do not depend on the file system or on the order of a labels file.

    Attributes:
      paths: of the records, relative to the folder, with forward slashes.
      labels: int32 `[N]`, 0 and above.
      num_classes: the number of class subfolders, or the largest label of the labels file plus one.
      image_size: side of the images in pixels.
    """

    def __init__(self, path, image_size, labels_file=None, labelled=True):
        """Lists the folder and checks the labels; decodes nothing.

        Args:
          path: the folder. Without a labels file each of its subfolders is a class; sorted by name they get the
            labels 0, 1, ...; images may lie deeper inside them.
          image_size: side of the images in pixels.
          labels_file: path of a labels file, relative to the folder or absolute. Either JSON
            `{"labels": [["sub/a.png", 3], ...]}`, or `.csv` / `.tsv` with two columns, path and label. The paths in
            it are relative to the folder; images it does not list are left out.
          labelled: whether classes matter; if not, the images may lie anywhere below the folder, and all have label 0.

        Raises:
          ValueError: if the folder is missing, cannot be listed, or holds no images or some of a kind that is not read, if it
            has neither class subfolders nor a labels file, or if the labels file is malformed, names missing files or has
            labels out of range.
          OSError: if the system fails.
        """
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")
        if not str(path):
            raise ValueError("path is ''; give the folder that holds the images")
        self._root = Path(path)
        if not self._root.is_dir():
            raise ValueError(f"path is {str(path)!r}, which is not a folder; give the folder that holds the images")
        paths, others, classes = list_below(self._root, EXTENSIONS)
        if labels_file is None or not labelled:  # else what the file lists is meant, and no more
            _check_others(self._root, others)
        if not paths:
            raise ValueError(f"no images below {str(path)!r}; files with these extensions count: {_extensions()}")
        if not labelled:
            self.paths, labels = paths, np.zeros(len(paths))
        elif labels_file is None:
            self.paths, labels = paths, _labels_from_subfolders(self._root, paths, classes)
        else:
            self.paths, labels = _labels_from_file(self._root / labels_file, paths)
        self.labels = np.asarray(labels, np.int32)
        self.num_classes = int(self.labels.max()) + 1
        self.image_size = image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`.

        Raises:
          Exception: whatever PIL raises for a file it cannot decode, a truncated one included.
        """
        content = read_file(self._root / self.paths[i])
        return {"image": decode_crop(content, self.image_size), "label": self.labels[i]}

    def name(self, i):
        """Returns the path of record `i`, relative to the folder, as `printable`."""
        return printable(self.paths[i])


def _extensions():
    return " ".join(EXTENSIONS)


def _check_others(root, others):
    """Raises ValueError for images of kinds that are not read; logs what other files there are."""
    refused = [path for path in others if path.lower().endswith(_REFUSED)]
    if refused:
        raise ValueError(
            f"images of kinds that are not read, below {str(root)!r}: {_some(refused)}; convert or move them; these extensions "
            f"are read: {_extensions()}"
        )
    if others:
        endings = Counter(Path(path).suffix.lower() or "none" for path in others)
        counts = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(10))
        logging.info("Below %s files with these extensions are left out, as no images: %s", root, counts)


def _labels_from_subfolders(root, paths, classes):
    """Numbers the subfolders of `root` by name; returns one label per path."""
    if not classes:
        raise ValueError(
            f"{str(root)!r} holds {len(paths)} images but no class subfolders; allowed: one subfolder per class, or a "
            "labels_file (JSON, CSV or TSV)"
        )
    class_of_path = [path.partition("/")[0] for path in paths]
    outside = [path for path in paths if "/" not in path]
    if outside:
        raise ValueError(f"images outside the class subfolders of {str(root)!r}: {_some(outside)}; move them into one")
    # An empty class is most often an unfinished copy; leaving it out would shift the labels of the others.
    empty = sorted(set(classes) - set(class_of_path))
    if empty:
        raise ValueError(f"class subfolders without images ({_extensions()}): {_some(empty)}; fill or remove them")
    if all(map(str.isdecimal, classes)) and classes != sorted(classes, key=int):
        other = next(label for label, name in enumerate(classes) if int(name) != label)
        logging.warning(
            "the class subfolders of %r are numbers, and labelled in the order of their names: %s is class %d. If the numbers "
            "are the classes, fill them up with zeros (0002, 0010), or give a labels_file",
            str(root), classes[other], other,
        )  # fmt: skip
    label_of_class = {name: label for label, name in enumerate(classes)}
    return [label_of_class[name] for name in class_of_path]


def _labels_from_file(file, paths):
    """Reads a labels file and checks it against the listing; returns sorted paths and their labels."""
    if not file.is_file():
        raise ValueError(f"labels_file is {str(file)!r}, which does not exist; give it relative to the image folder")
    entries = _read_json(file) if file.suffix.lower() == ".json" else _read_table(file)
    if not entries:
        raise ValueError(f"labels file {str(file)!r} lists no images; allowed: at least one [path, label]")
    listed = [path for path, _ in entries]
    missing = sorted(set(listed) - set(paths))
    if missing:
        raise ValueError(
            f"labels file {str(file)!r} names files that are not images ({_extensions()}) below the folder: "
            f"{_some(missing)}; paths in it are relative to the folder"
        )
    repeated = sorted(path for path, count in Counter(listed).items() if count > 1)
    if repeated:
        raise ValueError(f"labels file {str(file)!r} lists a file more than once: {_some(repeated)}; allowed: once")
    wrong = [f"{path}: {label}" for path, label in entries if not 0 <= label <= _LARGEST]
    if wrong:
        raise ValueError(f"labels file {str(file)!r} has labels out of range: {_some(wrong)}; allowed: 0..{_LARGEST}")
    entries.sort()
    return [path for path, _ in entries], [label for _, label in entries]


def _read_json(file):
    """Entries `[(path, label), ...]` of a JSON labels file."""
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
    """Entries `[(path, label), ...]` of a CSV or TSV labels file, with or without the header `path,label`."""
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
            raise ValueError(
                f"labels file {str(file)!r} has {row!r} in row {number}; allowed: two columns, path and integer"
            ) from error
    return entries


def _read_text(file):
    """Returns the text of a labels file: UTF-8, with a byte-order mark or not; other bytes as Python has them in names."""
    content = faults.read(file.read_bytes, name=lambda: f"labels file {str(file)!r}")
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), None)
    if encoding or b"\0" in content:
        raise ValueError(f"labels file {str(file)!r} is in {encoding or 'UTF-16, or no text'}; save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _some(names):
    """The first few of a list, and how many there are."""
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)} in all)"
