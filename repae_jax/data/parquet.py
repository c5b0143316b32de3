"""Parquet shards of Hugging Face's image data sets: a column of encoded images, and one of labels.

Files are read by row groups, about 100 images (11 MB in ImageNet's). Reading in order, as `repae_jax.prepare_images`,
`cache_latents` and evaluation do, that costs nothing. In training's shuffled order every image costs a row group: prepare the
images first, unless the data are small and the disk is fast.
"""

import dataclasses
import functools
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from repae_jax import faults
from repae_jax.data.listing import list_below, printable
from repae_jax.data.source import MAX_LABEL, EncodedImages, check_image_size, check_label_range
from repae_jax.ranges import Extent

_KEPT_GROUPS = 8  # row groups in memory: one for each thread that reads in order, and some
_MAX_GROUP_BYTES = 2**31 - 1  # size of a row group's images: pyarrow's offsets have 32 bits


@dataclasses.dataclass(eq=False)
class ParquetSource(EncodedImages):
    """Random access to the images in parquet files, center-cropped as they are read. Worker processes open them for themselves.

    The records are in the order of the files' names, and of the rows. `path` is a folder with the files SPLIT-*.parquet or
    SPLIT.parquet, or with numbered ones in a subfolder SPLIT; at any depth, but all of one split in one folder.

    The constructor raises ValueError if folder, split, columns or files of a numbered set are missing, the split is in several
    folders, a file is damaged, has too large a row group, or names its classes unlike the first, or a label is out of range;
    and ImportError without pyarrow.
    """

    path: str | os.PathLike
    image_size: Extent
    split: str = "train"
    image_column: str = "image"  # encoded images: bytes, or a struct with a field `bytes`
    label_column: str = "label"  # whole numbers; '' if classes do not matter: all images have label 0

    def __post_init__(self):
        check_image_size(self.image_size)
        self._root = Path(self.path)
        self._files = _list_files(self._root, self.split)
        paths = [self._root / file for file in self._files]
        # footers are read from files that are closed again: a data set may have more files than may be open
        footers = [_read_whole(path, lambda opened: opened.metadata) for path in paths]
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        columns = [_check_columns(path, schema, self.image_column, self.label_column) for path, schema in zip(paths, schemas)]
        for path, footer, (column, names) in zip(paths, footers, columns):
            if (column, names) != columns[0]:  # equal labels would not be equal classes
                first = f"{paths[0]} in {columns[0][0]!r} and {_names(columns[0][1])}"
                here = f"{path} has images in column {column!r} and {_names(names)}"
                raise ValueError(f"{here}, {first}: keep the files of one data set")
            _check_groups(path, footer, column)
        self._image_leaf, class_names = columns[0]
        self._groups = [(number, group) for number, footer in enumerate(footers) for group in range(footer.num_row_groups)]
        rows = [footers[number].row_group(group).num_rows for number, group in self._groups]
        self._ends = np.cumsum(rows, dtype=np.int64)  # record i is in the first group that ends beyond i
        self._file_starts = np.cumsum([0] + [footer.num_rows for footer in footers])
        if not self._file_starts[-1]:
            raise ValueError(f"the files of split {self.split!r} in {str(self.path)!r} hold no rows")
        self.labels = self._read_labels() if self.label_column else np.zeros(self._file_starts[-1], np.int32)
        self.num_classes = len(class_names) if class_names else int(self.labels.max()) + 1

    @functools.cached_property
    def _read(self):
        return functools.lru_cache(_KEPT_GROUPS)(self._read_group)

    @functools.cached_property
    def _group_locks(self):
        return [threading.Lock() for _ in self._groups]  # without them, threads that want one group would all read it

    def content(self, i: int) -> bytes:
        """Returns the encoded image; raises ValueError for an empty row."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        with self._group_locks[number]:
            group = self._read(number)
        content = group[i - first].as_py()
        if content is None:
            raise ValueError(f"column {self._image_leaf!r} is empty")
        return content

    def name(self, i: int) -> str:
        """Returns the file of record `i`, and its row there."""
        number = int(np.searchsorted(self._file_starts, i, side="right")) - 1
        return f"{printable(self._files[number])} row {i - int(self._file_starts[number])}"

    def _read_group(self, number):
        file_number, group = self._groups[number]
        with _pyarrow().parquet.ParquetFile(self._root / self._files[file_number]) as file:
            table = file.read_row_group(group, columns=[self._image_leaf])
        column = table.column(0).combine_chunks()
        return column.field("bytes") if self._image_leaf.endswith(".bytes") else column

    def _read_labels(self):
        labels = []
        for file in self._files:
            column = _read_whole(self._root / file, lambda opened: opened.read(columns=[self.label_column]).column(0))
            if column.null_count:
                raise ValueError(f"{self._root / file} has {column.null_count} rows without {self.label_column!r}")
            labels.append(column.to_numpy())
        labels = np.concatenate(labels)
        advice = ". Splits for testing often come without labels; label_column='' takes their images alone"
        check_label_range(labels, self.name, MAX_LABEL, advice)
        return labels.astype(np.int32)


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"parquet is read by pyarrow, which cannot be imported ({error}): pip install pyarrow") from error
    return pyarrow


def _read_whole(file, read):
    pyarrow = _pyarrow()

    def opened():
        with pyarrow.parquet.ParquetFile(file) as parquet:
            return read(parquet)

    try:
        return faults.read(opened, name=lambda: str(file))
    except (OSError, pyarrow.ArrowInvalid) as error:
        if faults.is_of_the_system(error):
            raise
        raise ValueError(f"{file} cannot be read as parquet ({error}); is it whole? Download it again") from error


def _list_files(root, split):
    if not root.is_dir():
        raise ValueError(f"path is {str(root)!r}, which is not a folder; give the folder that holds the parquet files")
    files = [PurePosixPath(file) for file in list_below(root, (".parquet",)).files]
    if not (chosen := [file for file in files if _split_of(file) == split]):
        splits = ", ".join(sorted({repr(_split_of(file)) for file in files})) or "none: no parquet files"
        raise ValueError(f"split is {split!r}; splits in {str(root)!r}: {splits}")
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        advice = "each is a configuration of the data set, or a copy: give one of them as path"
        found = f"split {split!r} is in several folders below {str(root)!r}"
        raise ValueError(f"{found}: {', '.join(map(repr, folders))}; {advice}")
    _check_numbers(root / folders[0], split, [file.name for file in chosen])
    return [file.as_posix() for file in chosen]


def _check_numbers(folder, split, names):
    """Raises ValueError unless all files are numbered as one set, 'train-00000-of-00002.parquet', or none is."""
    matches = {name: re.fullmatch(r".*-(\d+)-of-(\d+)(-.*)?\.parquet", name) for name in names}
    plain = [name for name, match in matches.items() if not match]
    counts = Counter(int(match[1]) for match in matches.values() if match)
    totals = sorted({int(match[2]) for match in matches.values() if match})
    if plain and totals:
        found = f"in files numbered up to {totals[0]}, and in others, such as {plain[0]}"
        raise ValueError(f"split {split!r} in {str(folder)!r} is {found}: keep those of one download")
    if len(totals) > 1:
        raise ValueError(f"files of split {split!r} are numbered up to {totals}: keep those of one download")
    if repeated := sorted(number for number, count in counts.items() if count > 1):
        where = f"file {repeated[0]} of split {split!r} is in {str(folder)!r}"
        raise ValueError(f"{where} more than once: keep those of one download")
    if missing := sorted(set(range(max(totals, default=0))) - set(counts)):
        count = f"{len(missing)} of {totals[0]} files of split {split!r}"
        raise ValueError(f"{count} are missing in {str(folder)!r}, first number {missing[0]}; download them")


def _split_of(file):
    """Returns the split of a file: 'train' of data/train-00000-of-00294.parquet, train.parquet and train/0000.parquet."""
    word = file.stem.partition("-")[0]
    return file.parent.name if word.isdecimal() else word


def _check_columns(path, schema, image_column, label_column):
    """Returns (leaf column of the images, class names or None); raises ValueError for a missing column or a wrong type."""
    pyarrow = _pyarrow()
    for name in filter(None, (image_column, label_column)):
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}")
    if label_column and not pyarrow.types.is_integer(kind := schema.field(label_column).type):
        raise ValueError(f"column {label_column!r} of {path} is of type {kind}; allowed: whole numbers")
    column, kind = image_column, schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{image_column}.bytes", kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        allowed = "bytes, or a struct with a field 'bytes'"
        raise ValueError(f"column {image_column!r} of {path} is of type {kind}; allowed: {allowed}")
    try:  # as Hugging Face's datasets writes them
        class_names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (TypeError, KeyError, ValueError):
        class_names = None
    return column, class_names


def _names(names):
    return f"classes {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "no names of classes"


def _check_groups(path, footer, column):
    """Raises ValueError if a row group's images are too large for pyarrow's offsets, or for memory."""
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column and chunk.total_uncompressed_size > _MAX_GROUP_BYTES:
                raise ValueError(
                    f"row group {number} of {path} holds {chunk.total_uncompressed_size / 2**30:.1f} GiB of images; allowed: "
                    f"{_MAX_GROUP_BYTES / 2**30:g}, for a group is read as a whole: write the file anew with smaller ones "
                    "(row_group_size=100 in pyarrow.parquet.write_table)"
                )
