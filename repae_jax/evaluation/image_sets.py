"""Sets of images to measure, however many: in ADM's npz, in a folder, from a dataset, drawn by a model.

They are read in blocks, never all at once.
"""

import contextlib
import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from grain import MapDataset
from jaxtyping import UInt8

from repae_jax import faults
from repae_jax.data import decoding, loader, reading, records_hash
from repae_jax.data.folder import FolderSource

SORTED = (
    "the images come class by class: splits of consecutive ones hold few classes each, so the inception score is too low; "
    "shuffle them"
)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)

Range = tuple[int, int]  # first, end
Images = UInt8[np.ndarray, "N H W 3"]


class ImageSet(Protocol):
    """A set of images."""

    count: int
    shape: list[int]  # [H, W]
    description: dict[str, Any]  # plain values that identify the set
    warnings: Sequence[str]  # reasons why its scores could mislead

    def blocks(self, ranges: Sequence[Range]) -> Iterator[Images]:
        """Yields the images first..end - 1 for each of the ranges, which ascend."""


class NpzImages:
    """ADM's npz, key arr_0: uint8 [N, H, W, 3], read from the archive in order, whether compressed or not."""

    def __init__(self, path: epath.PathLike):
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"{path} does not exist; check the path")
        with self._open_arr_0() as (_, shape):
            self.count, *self.shape = shape[:3]
        self.warnings = [SORTED] * self._is_sorted()
        stat = self._path.stat()
        self.description = {"npz": self._path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}

    def _is_sorted(self) -> bool:
        """Tells whether there are integer labels (arr_1) of several classes, in order."""
        with naming_damage(self._path), zipfile.ZipFile(self._path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return False
            with archive.open("arr_1.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            return False
        return len(set(labels.tolist())) > 1 and bool((np.diff(labels) >= 0).all())

    @contextlib.contextmanager
    def _open_arr_0(self):
        """Opens the archive; yields the file at the first pixel, and the shape of arr_0."""
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

    def blocks(self, ranges: Sequence[Range]) -> Iterator[Images]:
        """See `ImageSet`."""
        with self._open_arr_0() as (file, (_, *image)):
            begin, size = file.tell(), int(np.prod(image))
            for first, end in ranges:
                file.seek(begin + first * size)
                content = file.read((end - first) * size)
                if len(content) < (end - first) * size:
                    raise EOFError(f"arr_0 ends before image {end}")
                yield np.frombuffer(content, np.uint8).reshape(-1, *image)


class FolderImages:
    """All images below a folder, in the order of their paths, unchanged: never cropped or resized, all of one size.

    When they are read, there is a ValueError if one cannot be, has another size, or is not 8-bit gray or RGB.
    """

    def __init__(self, path: epath.PathLike):
        self._root = Path(path)
        self._names = FolderSource(path, image_size=1, labelled=False).paths
        self.count = len(self._names)
        self.shape = list(self._decode(0)[1].shape[:2])
        stats = [faults.read((self._root / name).stat, name=functools.partial(str, name)) for name in self._names]
        content = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in zip(self._names, stats)]
        digest = hashlib.sha256("\n".join(content).encode(errors="surrogateescape")).hexdigest()[:16]
        self.description = {"folder": self._root.name, "files": self.count, "listing": digest}
        lossy = sum(name.lower().endswith((".jpg", ".jpeg", ".webp")) for name in self._names)
        self.warnings = [f"{lossy} of {self.count} images are JPEG or WebP, whose losses change all scores"] * bool(lossy)
        if len({Path(name).parent for name in self._names}) > 1:
            self.warnings.append(SORTED)

    def _decode(self, i: int) -> tuple[str, UInt8[np.ndarray, "H W 3"]]:
        """Returns PIL's mode and the pixels of an image."""
        path = self._root / self._names[i]
        try:
            with decoding.open_image(faults.read(decoding.read_file, path, name=lambda: str(path))) as image:
                return image.mode, np.asarray(image.convert("RGB"))
        except Exception as error:  # PIL raises nearly anything
            if faults.is_of_the_system(error):
                raise
            raise ValueError(f"{path} cannot be read ({reading.describe_error(error)}); make it again") from error

    def _read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        path = self._root / self._names[i]
        mode, pixels = self._decode(i)
        if mode not in ("RGB", "L", "P", "1"):
            raise ValueError(f"{path} has PIL's mode {mode}; allowed: 8-bit gray or RGB, without transparency")
        if list(pixels.shape[:2]) != self.shape:
            raise ValueError(
                f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {self._names[0]} {self.shape[0]} x {self.shape[1]}; "
                "all must have one size, that of the reference, for they are not cropped here"
            )
        return pixels

    def blocks(self, ranges: Sequence[Range]) -> Iterator[Images]:
        """See `ImageSet`."""
        return read_blocks(self._read, [range(*limits) for limits in ranges])


class DatasetImages:
    """A source of `repae_jax.data`, in its order, cropped as for training; `description` are values that identify it."""

    warnings = ()

    def __init__(self, source, description: dict[str, Any]):
        self._source = source
        self.count = len(source)
        self.shape = [source.image_size] * 2
        records = records_hash(source)
        self.description = {**description, "images": self.count, "image_size": source.image_size, "records": records}

    def blocks(self, ranges: Sequence[Range]) -> Iterator[Images]:
        """See `ImageSet`."""
        return source_blocks(self._source, [range(*limits) for limits in ranges])


class SampledImages:
    """Images that a model draws as they are measured; `description` identifies model and settings.

    `draw` yields (batch number, images) of the batches that its argument `skip` does not hold, all but the last of batch_size.
    """

    warnings = ()

    def __init__(
        self, draw: Callable[..., Iterable], count: int, shape: list[int], batch_size: int, description: dict[str, Any]
    ):
        self._draw, self._batch_size = draw, batch_size
        self.count, self.shape, self.description = count, shape, description

    def blocks(self, ranges: Sequence[Range]) -> Iterator[Images]:
        """See `ImageSet`; the ranges are whole batches."""
        wanted = {first // self._batch_size for first, _ in ranges}
        skip = set(range(-(-self.count // self._batch_size))) - wanted
        for _, images in self._draw(skip=skip):
            yield images


def open_images(path: epath.Path) -> NpzImages | FolderImages | None:
    """Returns the images in an npz or a folder; None for anything else, such as a workdir or weights of a model."""
    if (path / "checkpoints").is_dir() or (path / "args.json").exists():  # a workdir of ours, or a published one
        return None
    unfinished = [path] if path.suffix == ".parts" else sorted(path.glob("*.parts")) if path.is_dir() else []
    if path.suffix == ".npz" and not path.exists() and path.with_suffix(".parts").is_dir():
        unfinished = [path.with_suffix(".parts")]
    if unfinished:
        raise ValueError(
            f"{unfinished[0]} holds unfinished samples: finish them with the same `python -m repae_jax.sample` command, and "
            "evaluate the npz it writes"
        )
    if path.suffix == ".npz":
        return NpzImages(path)
    if not path.is_dir():
        return None
    if archives := sorted(path.glob("*.npz")):
        raise ValueError(f"{path} holds {archives[0].name}, not only images: give the npz, or a folder of nothing but samples")
    return FolderImages(path)


def source_blocks(source, blocks: Sequence[Sequence[int]]) -> Iterator[Images]:
    """Yields the images of each block of records of a source, decoded ahead; ValueError, with its name, if one is broken."""

    def read(record):
        fields, error = reading.attempt(source, record)
        if error:
            raise ValueError(f"{source.name(record)} cannot be read ({error}); repair or remove it")
        return fields["image"]

    return read_blocks(read, blocks)


def read_blocks(read: Callable[[int], UInt8[np.ndarray, "H W 3"]], blocks: Sequence[Sequence[int]]) -> Iterator[Images]:
    """Yields the stacked results of `read` for each block of records, read ahead in threads."""
    dataset = MapDataset.source(blocks).map(lambda block: np.stack(reading.at_once(read, block)))
    with contextlib.closing(loader.read_ahead(dataset, workers=0)) as images:
        yield from images


@contextlib.contextmanager
def naming_damage(path: epath.PathLike, advice: str = "make it or download it again"):
    """Turns any error of reading a damaged npz into a ValueError that names the file."""
    try:
        yield
    except _ZIP_ERRORS as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is no npz, or it is damaged or incomplete ({type(error).__name__}: {error}); {advice}"
        ) from error
