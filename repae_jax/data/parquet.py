"""Parquet shards as Hugging Face's image data sets come: a column of encoded images, and one of labels.

A file gives whole row groups, not rows: about 100 images, 11 MB in ImageNet's, are read for one. In order that costs nothing,
as for `repae_jax.prepare_images`, `cache_latents` and evaluation. In training's shuffled order every image costs a row group,
which a fast local disk may bear for small data; else prepare the images first.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from repae_jax.data.decoding import decode_crop
from repae_jax.data.reading import is_of_the_system

_KEPT_GROUPS = 8  # row groups in memory: one for each thread that reads in order, and some


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
          path: folder with the files SPLIT-*.parquet or SPLIT.parquet, or with them in a subfolder SPLIT; at any depth.
          image_size: side of the images in pixels.
          split: 'train', 'validation' or whatever the files are named.
          image_column: column of encoded images: bytes, or a struct with a field `bytes`.
          label_column: column of whole numbers; '' if classes do not matter: all images have label 0.

        Raises:
          ValueError: if folder, split, columns or files of a numbered set are missing, a file is damaged, or a label negative.
          ImportError: without pyarrow.
        """
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")
        self._root = Path(path)
        self._files = _list_files(self._root, split)
        self._label_column = label_column
        footers = [_read_footer(self._root / file) for file in self._files]
        schema = footers[0].schema.to_arrow_schema()
        self._image_column = _check_columns(self._root / self._files[0], schema, image_column, label_column)
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
        names = _class_names(schema, label_column)
        self.num_classes = len(names) if names else int(self.labels.max()) + 1
        self.image_size = image_size
        self._start()

    def _start(self):
        self._read = functools.lru_cache(_KEPT_GROUPS)(self._read_group)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

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
        content = self._read(number)[i - first].as_py()
        if content is None:
            raise ValueError(f"column {self._image_column!r} is empty")
        return {"image": decode_crop(content, self.image_size), "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: its file, and its row there."""
        place = int(np.searchsorted(self._file_starts, i, side="right")) - 1
        return f"{self._files[place]} row {i - int(self._file_starts[place])}"

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
            try:
                with _open(self._root / file) as opened:
                    column = opened.read(columns=[self._label_column]).column(0)
            except (OSError, KeyError) as error:
                if is_of_the_system(error):
                    raise
                raise ValueError(f"{self._root / file} cannot be read ({error}); download it again") from error
            if column.null_count:
                raise ValueError(f"{self._root / file} has {column.null_count} rows without {self._label_column!r}")
            labels.append(column.to_numpy())
        labels = np.concatenate(labels)
        wrong = np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int32).max))
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(labels)} labels are out of range, first {self.name(wrong[0])}: {labels[wrong[0]]}; "
                "allowed: 0 and above. Splits for testing often come without labels; label_column='' takes their images alone"
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
    with _open(file) as opened:
        return opened.metadata


def _open(file):
    """pyarrow.parquet.ParquetFile, to be closed."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        if is_of_the_system(error):
            raise
        raise ValueError(f"{file} cannot be read as parquet ({error}); is it whole? Download it again") from error


def _list_files(root, split):
    """Files of a split, relative to `root`, sorted."""
    if not root.is_dir():
        raise ValueError(f"path is {str(root)!r}, which is not a folder; give the folder that holds the parquet files")
    files = sorted(file.relative_to(root) for file in root.rglob("*.parquet") if not file.name.startswith("."))
    chosen = [file for file in files if _split_of(file) == split]
    if not chosen:
        found = ", ".join(sorted({repr(_split_of(file)) for file in files})) or "none: no parquet files"
        raise ValueError(f"split is {split!r}; splits in {str(root)!r}: {found}")
    for folder in sorted({file.parent for file in chosen}):
        numbers = [re.fullmatch(r".*-(\d+)-of-(\d+)(-.*)?\.parquet", file.name) for file in chosen if file.parent == folder]
        totals = {int(match[2]) for match in numbers if match}
        if len(totals) > 1:
            raise ValueError(f"files of split {split!r} are numbered up to {sorted(totals)}: keep those of one download")
        missing = sorted(set(range(max(totals, default=0))) - {int(match[1]) for match in numbers if match})
        if missing:
            raise ValueError(
                f"{len(missing)} of {max(totals)} files of split {split!r} are missing in {str(root / folder)!r}, first number "
                f"{missing[0]}; download them"
            )
    return [file.as_posix() for file in chosen]


def _split_of(file):
    """'train' of data/train-00000-of-00294.parquet, train.parquet and train/0000.parquet."""
    word = re.match(r"[^\W\d_]+", file.name.removesuffix(".parquet"))
    return word[0] if word else file.parent.name


def _check_columns(path, schema, image_column, label_column):
    """The leaf column that holds the encoded images; ValueError if a column is missing or of a wrong type."""
    pyarrow = _pyarrow()
    for name in filter(None, (image_column, label_column)):
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}")
    if label_column and not pyarrow.types.is_integer(schema.field(label_column).type):
        kind = schema.field(label_column).type
        raise ValueError(f"column {label_column!r} of {path} is of type {kind}; allowed: whole numbers")
    kind = schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        image_column, kind = f"{image_column}.bytes", kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ValueError(
            f"column {image_column!r} of {path} is of type {kind}; allowed: bytes, or a struct with a field 'bytes'"
        )
    return image_column


def _class_names(schema, label_column):
    """Names of the classes, as Hugging Face's datasets notes them in a file; None if it does not."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])
        return info["info"]["features"][label_column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
