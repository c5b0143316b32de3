"""Parquet shards as Hugging Face's image data sets come: a column of encoded images, and one of labels.

A file gives whole row groups, not rows: about 100 images, 11 MB in ImageNet's, are read for one. In order that costs nothing,
as for `repae_jax.prepare_images`, `cache_latents` and evaluation. In training's shuffled order every image costs a row group,
which a fast local disk may bear for small data; else prepare the images first.
"""

import functools
import json
import re
import threading
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from repae_jax import faults
from repae_jax.data.decoding import decode_crop
from repae_jax.data.listing import list_below, printable

_KEPT_GROUPS = 8  # row groups in memory: one for each thread that reads in order, and some
_MOST_GROUP_BYTES = 2**31 - 1  # of a row group's images: pyarrow's offsets


class ParquetSource:
    """Random access to the images in parquet files, centre-cropped as they are read. Worker processes open them for themselves.

    The records are in the order of the files' names, and of the rows.

    Attributes:
      labels: int32 `[N]`, 0 and above.
      num_classes: as the files' metadata name them, or the largest label plus one.
      image_size: side of the images in pixels.
    """

    def __init__(self, path, image_size, split="train", image_column="image", label_column="label"):
        """Reads the files' footers and labels; no image.

        Args:
          path: folder with the files SPLIT-*.parquet or SPLIT.parquet, or with numbered ones in a subfolder SPLIT; at any
            depth, but all of one split in one folder.
          image_size: side of the images in pixels.
          split: 'train', 'validation' or whatever the files are named.
          image_column: column of encoded images: bytes, or a struct with a field `bytes`.
          label_column: column of whole numbers; '' if classes do not matter: all images have label 0.

        Raises:
          ValueError: if folder, split, columns or files of a numbered set are missing, the split is in several folders, a file
            is damaged, has too large a row group, or names its classes unlike the first, or a label is out of range.
          OSError: if the system fails.
          ImportError: without pyarrow.
        """
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")
        self._root = Path(path)
        self._files = _list_files(self._root, split)
        self._label_column = label_column
        footers = [_read_footer(self._root / file) for file in self._files]
        paths = [self._root / file for file in self._files]
        columns = [
            _check_columns(path, footer.schema.to_arrow_schema(), image_column, label_column)
            for path, footer in zip(paths, footers)
        ]
        for path, footer, found in zip(paths, footers, columns):
            _check_alike(paths[0], columns[0], path, found)
            _check_groups(path, footer, found[0])
        self._image_column, names = columns[0]
        groups = [  # one entry per row group: (file, its number in it, rows)
            (place, group, footer.row_group(group).num_rows)
            for place, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = [(place, group) for place, group, _ in groups]
        self._ends = np.cumsum([rows for *_, rows in groups], dtype=np.int64)  # record i is in the first that ends beyond i
        self._file_starts = np.cumsum([0] + [footer.num_rows for footer in footers])
        count = int(self._file_starts[-1])
        if not count:
            raise ValueError(f"the files of split {split!r} in {str(path)!r} hold no rows")
        self.labels = self._read_labels() if label_column else np.zeros(count, np.int32)
        self.num_classes = len(names) if names else int(self.labels.max()) + 1
        self.image_size = image_size
        self._start()

    def _start(self):
        self._read = functools.lru_cache(_KEPT_GROUPS)(self._read_group)
        self._reading = [threading.Lock() for _ in self._groups]  # else threads that want one group all read it

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_read", "_reading")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`.

        Raises:
          Exception: whatever Pillow or pyarrow raise for what they cannot decode; ValueError for a row without an image.
        """
        i = range(len(self))[i]
        number = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        with self._reading[number]:
            group = self._read(number)
        content = group[i - first].as_py()
        if content is None:
            raise ValueError(f"column {self._image_column!r} is empty")
        return {"image": decode_crop(content, self.image_size), "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: its file, and its row there."""
        place = int(np.searchsorted(self._file_starts, i, side="right")) - 1
        return f"{printable(self._files[place])} row {i - int(self._file_starts[place])}"

    def _read_group(self, number):
        """The encoded images of a row group: a pyarrow array."""
        place, group = self._groups[number]
        with _open(self._root / self._files[place]) as file:
            table = file.read_row_group(group, columns=[self._image_column])
        column = table.column(0).combine_chunks()
        return column.field("bytes") if self._image_column.endswith(".bytes") else column

    def _read_labels(self):
        """int32 [N]: reads the column of labels of all files."""
        labels = []
        for file in self._files:
            column = _read_whole(self._root / file, lambda opened: opened.read(columns=[self._label_column]).column(0))
            if column.null_count:
                raise ValueError(f"{self._root / file} has {column.null_count} rows without {self._label_column!r}")
            labels.append(column.to_numpy())
        labels = np.concatenate(labels)
        wrong = np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int32).max))
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(labels)} labels are out of range, first {self.name(wrong[0])}: {labels[wrong[0]]}; "
                f"allowed: 0..{np.iinfo(np.int32).max}. Splits for testing often come without labels; label_column='' takes "
                "their images alone"
            )
        return labels.astype(np.int32)


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"parquet is read by pyarrow, which cannot be imported ({error}): pip install pyarrow") from error
    return pyarrow


def _read_footer(file):
    """pyarrow.parquet.FileMetaData; the file is closed: a data set may have more of them than may be open."""
    return _read_whole(file, lambda opened: opened.metadata)


def _read_whole(file, read):
    """Returns what `read` makes of an opened file; ValueError if the file is damaged."""
    pyarrow = _pyarrow()

    def opened():
        with _open(file) as parquet:
            return read(parquet)

    try:
        return faults.read(opened, name=lambda: str(file))
    except (OSError, pyarrow.ArrowInvalid) as error:
        if faults.is_of_the_system(error):
            raise
        raise ValueError(f"{file} cannot be read as parquet ({error}); is it whole? Download it again") from error


def _open(file):
    """Returns a pyarrow.parquet.ParquetFile, to be closed."""
    return _pyarrow().parquet.ParquetFile(file)


def _list_files(root, split):
    """Files of a split, relative to `root`, sorted."""
    if not root.is_dir():
        raise ValueError(f"path is {str(root)!r}, which is not a folder; give the folder that holds the parquet files")
    files = [PurePosixPath(file) for file in list_below(root, (".parquet",)).files]
    chosen = [file for file in files if _split_of(file) == split]
    if not chosen:
        found = ", ".join(sorted({repr(_split_of(file)) for file in files})) or "none: no parquet files"
        raise ValueError(f"split is {split!r}; splits in {str(root)!r}: {found}")
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        raise ValueError(
            f"split {split!r} is in several folders below {str(root)!r}: {', '.join(map(repr, folders))}; each is a "
            "configuration of the data set, or a copy: give one of them as path"
        )
    _check_numbers(root / folders[0], split, [file.name for file in chosen])
    return [file.as_posix() for file in chosen]


def _check_numbers(folder, split, names):
    """Raises ValueError unless all files are numbered as one set, 'train-00000-of-00002.parquet', or none is."""
    matches = {name: re.fullmatch(r".*-(\d+)-of-(\d+)(-.*)?\.parquet", name) for name in names}
    plain = [name for name, match in matches.items() if not match]
    numbers = [(int(match[1]), int(match[2])) for match in matches.values() if match]
    totals = sorted({total for _, total in numbers})
    if plain and numbers:
        raise ValueError(
            f"split {split!r} in {str(folder)!r} is in files numbered up to {totals[0]}, and in others, such as {plain[0]}: "
            "keep those of one download"
        )
    if len(totals) > 1:
        raise ValueError(f"files of split {split!r} are numbered up to {totals}: keep those of one download")
    repeated = sorted(number for number, count in Counter(number for number, _ in numbers).items() if count > 1)
    if repeated:
        raise ValueError(
            f"file {repeated[0]} of split {split!r} is in {str(folder)!r} more than once: keep those of one download"
        )
    missing = sorted(set(range(max(totals, default=0))) - {number for number, _ in numbers})
    if missing:
        raise ValueError(
            f"{len(missing)} of {totals[0]} files of split {split!r} are missing in {str(folder)!r}, first number "
            f"{missing[0]}; download them"
        )


def _split_of(file):
    """'train' of data/train-00000-of-00294.parquet, train.parquet and train/0000.parquet."""
    word = file.stem.partition("-")[0]
    return file.parent.name if word.isdecimal() else word


def _check_columns(path, schema, image_column, label_column):
    """Returns (leaf column of the images, names of the classes); ValueError if a column is missing or of a wrong type."""
    pyarrow = _pyarrow()
    for name in filter(None, (image_column, label_column)):
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}")
    if label_column and not pyarrow.types.is_integer(schema.field(label_column).type):
        kind = schema.field(label_column).type
        raise ValueError(f"column {label_column!r} of {path} is of type {kind}; allowed: whole numbers")
    kind = schema.field(image_column).type
    column = image_column
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{image_column}.bytes", kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ValueError(
            f"column {image_column!r} of {path} is of type {kind}; allowed: bytes, or a struct with a field 'bytes'"
        )
    return column, _class_names(schema, label_column)


def _check_alike(first, expected, path, found):
    """Raises ValueError if two files' `_check_columns` differ: equal labels would not be equal classes."""
    if found != expected:
        raise ValueError(
            f"{path} has images in column {found[0]!r} and {_names(found[1])}, {first} in {expected[0]!r} and "
            f"{_names(expected[1])}: keep the files of one data set"
        )


def _names(names):
    return f"classes {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "no names of classes"


def _check_groups(path, footer, column):
    """Raises ValueError if a row group's images are more than pyarrow gives in one piece, or memory should hold."""
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column and chunk.total_uncompressed_size > _MOST_GROUP_BYTES:
                raise ValueError(
                    f"row group {number} of {path} holds {chunk.total_uncompressed_size / 2**30:.1f} GiB of images; allowed: "
                    f"{_MOST_GROUP_BYTES / 2**30:g}, for a group is read as a whole: write the file anew with smaller ones "
                    "(row_group_size=100 in pyarrow.parquet.write_table)"
                )


def _class_names(schema, label_column):
    """Names of the classes, as Hugging Face's datasets notes them in a file; None if it does not."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])
        return info["info"]["features"][label_column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
