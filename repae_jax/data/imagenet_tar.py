"""ImageNet straight from the archives of the ILSVRC 2012 challenge, which are not unpacked.

ILSVRC2012_img_train.tar is a tar of 1000 tars, one for each class, and ILSVRC2012_img_val.tar a tar of images; a file's content
tells which of them it is. Classes are numbered in the order of their WordNet ids. The classes of the validation images, which
only the challenge's development kit holds, are read from a list of tensorflow_datasets (TFDS).

Names, labels and order of the records are those that `repae_jax.data.folder` gives a folder with a subfolder for each class.
"""

import dataclasses
import errno
import functools
import importlib.util
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from repae_jax.data.decoding import check_bytes
from repae_jax.data.source import EncodedImages, check_image_size
from repae_jax.ranges import Extent

_CLASS = re.compile(r"(n\d{8})\.tar")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_TRAINING_IMAGES, _VALIDATION_IMAGES = 1_281_167, 50_000
_WHOLE = "is it whole? Copy or download it again"
_BLOCK = tarfile.BLOCKSIZE
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_NOT_FILES = (tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)  # folders, dates, long names
_LISTING_THREADS = 16  # they mostly wait for the disk


@dataclasses.dataclass(eq=False)
class ImagenetTarSource(EncodedImages):
    """Random access to the images in an archive, center-cropped as they are read. Worker processes open it for themselves.

    The constructor reads the header of each image. It raises ValueError if the file is missing, no such archive, compressed,
    truncated or damaged, or lacks classes; and ImportError without tensorflow_datasets, whose list of classes is read.
    """

    path: str | os.PathLike  # ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, under any name
    image_size: Extent

    def __post_init__(self):
        check_image_size(self.image_size)
        self._path = Path(self.path).expanduser()
        if not self._path.is_file():
            raise ValueError(f"path is {str(self.path)!r}, which is no file; give ILSVRC2012_img_train.tar or …_val.tar")
        self._wnids = _table("labels.txt")
        members = list(_members(self._file, 0, self._path.stat().st_size, self._path))
        first = members[0][0] if members else "nothing"
        if _CLASS.fullmatch(first):
            listing, expected = self._list_training(members), _TRAINING_IMAGES
        elif _VALIDATION.fullmatch(first):
            listing, expected = self._list_validation(members), _VALIDATION_IMAGES
        else:
            raise ValueError(
                f"{self.path} holds {first}; allowed are the challenge's archives of training images (n01440764.tar, …) and of "
                "validation images (ILSVRC2012_val_00000001.JPEG, …), as they are; other images are read from a folder"
            )
        self.labels, self._names, self._starts, self._sizes = listing
        if len(self) != expected:
            logging.warning("%s holds %d images, the challenge's archive %d", self.path, len(self), expected)
        self.num_classes = len(self._wnids)

    def content(self, i: int) -> bytes:
        """Returns the member's bytes."""
        check_bytes(self._sizes[i])
        try:
            file = self._file  # this reference keeps it open if another thread drops it
            content = os.pread(file.fileno(), self._sizes[i], self._starts[i])
            if len(content) < self._sizes[i]:
                raise OSError(errno.EIO, f"{self._path} ends within it, as it did not when it was listed")
        except OSError:
            self.__dict__.pop("_file", None)  # a file server may have forgotten the open file
            raise
        return content

    def name(self, i: int) -> str:
        """Returns class and file of record `i`, 'n01440764/n01440764_10026.JPEG'."""
        return f"{self._wnids[self.labels[i]]}/{self._names[i].decode()}"

    @functools.cached_property
    def _file(self):
        return self._path.open("rb", buffering=0)

    def _list_training(self, members):
        """Returns arrays (labels, names, starts, sizes) of the images in the tars of the classes."""
        wnids = [self._match(_CLASS, name)[1] for name, _, _ in members]
        _check_unique(self._path, wnids)
        unknown, missing = sorted(set(wnids) - set(self._wnids)), sorted(set(self._wnids) - set(wnids))
        if unknown:
            raise ValueError(f"{self._path} holds {len(unknown)} classes that are not of the challenge, first {unknown[0]}")
        if missing:
            count = f"{len(missing)} of the {len(self._wnids)} classes"
            raise ValueError(f"{self._path} lacks {count}, first {missing[0]}.tar; {_WHOLE}")

        def listed(member):
            name, start, size = member
            where = f"{self._path}: {name}"
            images = list(_members(self._file, start, start + size, where))
            own = re.compile(rf"{name.removesuffix('.tar')}_\d+\.JPEG")
            for image, _, _ in images:
                self._match(own, image, where)
            if not images:
                raise ValueError(f"{where} holds no images; {_WHOLE}")
            return _columns(images, where)

        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            listing = pool.map(listed, sorted(members))
            columns = list(tqdm(listing, total=len(members), unit="class", desc="listing images"))
        labels = np.repeat(np.arange(len(columns), dtype=np.int32), [len(names) for names, *_ in columns])
        return (labels, *map(np.concatenate, zip(*columns)))

    def _list_validation(self, members):
        """Returns the same arrays of the validation images."""
        names, starts, sizes = _columns(members, self._path)
        label_of_wnid = {wnid: label for label, wnid in enumerate(self._wnids)}
        label_of_number = [label_of_wnid[wnid] for wnid in _table("validation_labels.txt")]
        numbers = [int(self._match(_VALIDATION, name.decode())[1]) for name in names]
        if wrong := [number for number in numbers if not 1 <= number <= len(label_of_number)]:
            raise ValueError(f"{self._path} holds validation image {wrong[0]}; they have the numbers 1..{len(label_of_number)}")
        labels = np.array([label_of_number[number - 1] for number in numbers], np.int32)
        order = np.argsort(labels, kind="stable")  # by name within a class
        return labels[order], names[order], starts[order], sizes[order]

    def _match(self, pattern, name, where=None):
        """Returns the pattern's match of a member's name; raises ValueError if the challenge's archive has no such name."""
        if not (match := pattern.fullmatch(name)):
            raise ValueError(f"{where or self._path} holds {name}, which the challenge's archive has not there; {_WHOLE}")
        return match


def _members(file, start, end, where):
    """Yields (name without folders, start, size in bytes) of each file in the archive start..end-1; leaves hidden ones out."""
    at = start
    while True:
        header = os.pread(file.fileno(), _BLOCK, at) if at + _BLOCK <= end else b""
        if len(header) < _BLOCK:
            raise ValueError(f"{where} is truncated: it ends after {end - start} bytes, without a mark of its end; {_WHOLE}")
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            compressed = "; if it is compressed, unpack it once, as with gunzip" if at == start else ""
            raise ValueError(f"{where} is no tar archive, or damaged at byte {at - start} ({error}){compressed}") from error
        content, at = at + _BLOCK, at + _BLOCK * (1 + -(-info.size // _BLOCK))
        if at > end:
            raise ValueError(f"{where} is truncated: it ends after {end - start} bytes, within {info.name}; {_WHOLE}")
        name = info.name.rpartition("/")[2]
        if info.type in _FILES and not name.startswith("."):
            yield name, content, info.size
        elif info.type not in (*_FILES, *_NOT_FILES):
            raise ValueError(f"{where} holds {info.name}, which is a link or the like; allowed: files")


def _columns(members, where):
    """Returns arrays (names, starts, sizes), sorted by name; raises ValueError if two members have one name."""
    members = sorted(members)
    _check_unique(where, [name for name, _, _ in members])
    names, starts, sizes = zip(*members)
    return np.array(names, "S"), np.array(starts, np.int64), np.array(sizes, np.int64)


def _check_unique(where, names):
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where} holds {len(repeated)} names more than once, first {repeated[0]}; {_WHOLE}")


def _table(name):
    """Returns the lines of one of TFDS' text files on ImageNet, without importing TFDS."""
    package = importlib.util.find_spec("tensorflow_datasets")
    if package is None:
        needed = "the list of ImageNet's classes is that of tensorflow_datasets, which is not installed"
        raise ImportError(f"{needed}: pip install tensorflow-datasets")
    return (Path(package.origin).parent / "datasets/imagenet2012" / name).read_text().split()
