"""Images to be measured, however many: in ADM's npz, in a folder, from a dataset. They are read in blocks, never all at once.

A set of images is any object with `count`, `shape` (H, W), `description` (plain values that tell it from others), `warnings`
(list of str) and `blocks(ranges)`, which yields uint8 [end - first, H, W, 3] for each (first, end) of `ranges`; those ascend.
"""

import contextlib
import functools
import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
from grain import MapDataset

from repae_jax import faults
from repae_jax.data import decoding, loader, reading, records_hash
from repae_jax.data.folder import FolderSource

SORTED = (
    "the images come class by class: splits of consecutive ones hold few classes each, so the inception score is too low; "
    "shuffle them"
)
_LOSSY = (".jpg", ".jpeg", ".webp")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


@contextlib.contextmanager
def naming_damage(path, advice="make it or download it again"):
    """Whatever reading a damaged npz raises becomes a ValueError that names the file."""
    try:
        yield
    except _ZIP_ERRORS as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is no npz, or it is damaged or incomplete ({type(error).__name__}: {error}); {advice}"
        ) from error


class NpzImages:
    """ADM's npz, key arr_0; read from the archive in order, whether compressed or not.

    Args:
      path: of the npz.

    Raises:
      FileNotFoundError: if it does not exist.
      ValueError: if it is damaged, or arr_0 is not there or not uint8 [N, H, W, 3].
    """

    def __init__(self, path):
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"{path} does not exist; check the path")
        with self._opened() as (_, shape):
            self.count, *self.shape = shape[:3]
        self.warnings = []
        with naming_damage(path), zipfile.ZipFile(path) as archive:
            if "arr_1.npy" in archive.namelist():
                with archive.open("arr_1.npy") as file:
                    labels = np.lib.format.read_array(file, allow_pickle=False)
                whole = labels.ndim == 1 and labels.dtype.kind in "iu"  # not names, say
                if whole and len(set(labels.tolist())) > 1 and (np.diff(labels) >= 0).all():
                    self.warnings = [SORTED]
        stat = self._path.stat()
        self.description = {"npz": self._path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}

    @contextlib.contextmanager
    def _opened(self):
        """(file at the first pixel, shape of arr_0)."""
        with naming_damage(self._path), zipfile.ZipFile(self._path) as archive:
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise ValueError(f"{self._path} holds {names or 'nothing'}; needed: arr_0, uint8 [N, H, W, 3]")
            with archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran_order, dtype = read(file)
                if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
                    raise ValueError(
                        f"arr_0 of {self._path} is {dtype} {list(shape)}; needed: uint8 [N, H, W, 3] with values 0..255. "
                        "The published code makes it of floats x in [-1, 1] by clip(255 * (x + 1) / 2), and truncates"
                    )
                yield file, shape

    def blocks(self, ranges):
        """See above."""
        with self._opened() as (file, (_, *image)):
            begin, size = file.tell(), int(np.prod(image))
            for first, end in ranges:
                file.seek(begin + first * size)
                content = file.read((end - first) * size)
                if len(content) < (end - first) * size:
                    raise EOFError(f"arr_0 ends before image {end}")
                yield np.frombuffer(content, np.uint8).reshape(-1, *image)


class _Decoded:
    """Item k holds the images of the k-th range: for `loader.read_ahead`."""

    def __init__(self, read, ranges):
        self._read, self._ranges = read, ranges

    def __len__(self):
        return len(self._ranges)

    def __getitem__(self, k):
        return np.stack(reading.at_once(self._read, range(*self._ranges[k])))


def _decoded(read, ranges):
    blocks = loader.read_ahead(MapDataset.source(_Decoded(read, ranges)), workers=0)
    try:
        yield from blocks
    finally:
        blocks.close()


class FolderImages:
    """All images below a folder, in the order of their paths, as they are: never cropped or resized, all of one size.

    Args:
      path: of the folder.

    Raises:
      ValueError: if there is no image; when they are read, if one cannot be, has another size, or is not 8-bit grey or RGB.
    """

    def __init__(self, path):
        self._root = Path(path)
        self._names = FolderSource(path, image_size=1, labelled=False).paths
        self.count = len(self._names)
        self.shape = list(self._decode(0)[1].shape[:2])
        stats = [faults.read((self._root / name).stat, name=functools.partial(str, name)) for name in self._names]
        content = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in zip(self._names, stats)]
        digest = hashlib.sha256("\n".join(content).encode(errors="surrogateescape")).hexdigest()[:16]
        self.description = {"folder": self._root.name, "files": self.count, "listing": digest}
        lossy = sum(name.lower().endswith(_LOSSY) for name in self._names)
        self.warnings = [f"{lossy} of {self.count} images are JPEG or WebP, whose losses change all scores"] * bool(lossy)
        if len({Path(name).parent for name in self._names}) > 1:
            self.warnings.append(SORTED)

    def _decode(self, i):
        """Returns (PIL's mode, uint8 [H, W, 3])."""
        path = self._root / self._names[i]
        try:
            with decoding.open_image(faults.read(decoding.read_file, path, name=lambda: str(path))) as image:
                return image.mode, np.asarray(image.convert("RGB"))
        except Exception as error:  # PIL raises nearly anything
            if faults.is_of_the_system(error):
                raise
            raise ValueError(f"{path} cannot be read ({reading.describe_error(error)}); make it again") from error

    def _read(self, i):
        path = self._root / self._names[i]
        mode, pixels = self._decode(i)
        if mode not in ("RGB", "L", "P", "1"):
            raise ValueError(f"{path} has PIL's mode {mode}; allowed: 8-bit grey or RGB, without transparency")
        if list(pixels.shape[:2]) != self.shape:
            raise ValueError(
                f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {self._names[0]} {self.shape[0]} x {self.shape[1]}; "
                "all must have one size, that of the reference, for they are not cropped here"
            )
        return pixels

    def blocks(self, ranges):
        """See above."""
        return _decoded(self._read, ranges)


class DatasetImages:
    """A source of `repae_jax.data`, in its order, cropped as for training.

    Args:
      source: the source.
      description: plain values that tell it from others.
    """

    warnings = ()

    def __init__(self, source, description):
        self._source = source
        self.count = len(source)
        self.shape = [source.image_size] * 2
        records = records_hash(source)
        self.description = {**description, "images": self.count, "image_size": source.image_size, "records": records}

    def _read(self, i):
        fields, wrong = reading.attempt(self._source, i)
        if wrong:
            raise ValueError(f"{self._source.name(i)} cannot be read ({wrong}); repair or remove it")
        return fields["image"]

    def blocks(self, ranges):
        """See above."""
        return _decoded(self._read, ranges)

