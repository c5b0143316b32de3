"""Sets of images to measure, however many: in ADM's npz, in a folder, from a dataset, drawn by a model.

They are read in blocks, never all at once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from grain import MapDataset
from jaxtyping import UInt8

from repae_jax import faults
from repae_jax.data import decoding, loader, reading, records_hash
from repae_jax.data.folder import FolderSource
from repae_jax.evaluation import confusions
from repae_jax.ranges import height_width

SORTED = (
    "the images come class by class: splits of consecutive ones hold few classes each, so the inception score is too low; "
    "shuffle them"
)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)

Range = tuple[int, int]  # first, end
Images = UInt8[np.ndarray, "N H W 3"]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images."""

    count: int
    shape: list[int]  # [H, W]
    description: dict[str, Any]  # plain values that identify the set
    blocks: Callable[[Sequence[Range]], Iterator[Images]]  # yields images first..end-1 of each of the ranges, which ascend
    warnings: Sequence[str] = ()  # reasons why its scores could mislead


def npz_images(path: epath.PathLike) -> ImageSet:
    """Returns the images of ADM's npz, key arr_0: uint8 [N, H, W, 3], read from the archive in order, compressed or not."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    with _open_arr_0(path) as (_, shape):
        count, *size = shape[:3]
    stat = path.stat()
    description = {"npz": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
    labels = _read_labels(path)
    warnings = [] if labels is None else [*[SORTED] * _are_sorted(labels), *confusions.of_labels(labels)]
    return ImageSet(count, size, description, functools.partial(_npz_blocks, path), warnings)


def _read_labels(path: Path) -> np.ndarray | None:
    """Returns the integer labels (arr_1), if there are any."""
    with naming_damage(path), zipfile.ZipFile(path) as archive:
        if "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    return labels if labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) else None


def _are_sorted(labels: np.ndarray) -> bool:
    """Tells whether labels of several classes are in order."""
    return len(set(labels.tolist())) > 1 and bool((np.diff(labels) >= 0).all())


@contextlib.contextmanager
def _open_arr_0(path: Path):
    """Opens the archive; yields the file at the first pixel, and the shape of arr_0."""
    with naming_damage(path), zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
            raise ValueError(f"{path} holds {names or 'nothing'}; needed: arr_0, uint8 [N, H, W, 3]")
        with archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
                raise ValueError(
                    f"arr_0 of {path} is {dtype} {list(shape)}; needed: uint8 [N, H, W, 3] with values 0..255. "
                    "The published code makes it of floats x in [-1, 1] by clip(255 * (x + 1) / 2), and truncates"
                )
            yield file, shape


def _npz_blocks(path: Path, ranges: Sequence[Range]) -> Iterator[Images]:
    with _open_arr_0(path) as (file, (_, *image)):
        begin, size = file.tell(), int(np.prod(image))
        for first, end in ranges:
            file.seek(begin + first * size)
            content = file.read((end - first) * size)
            if len(content) < (end - first) * size:
                raise EOFError(f"arr_0 ends before image {end}")
            yield np.frombuffer(content, np.uint8).reshape(-1, *image)


def folder_images(path: epath.PathLike) -> ImageSet:
    """Returns all images below a folder, in the order of their paths, unchanged: never cropped or resized, all of one size.

    When they are read, there is a ValueError if one cannot be, has another size, or is not 8-bit gray or RGB.
    """
    root, names = Path(path), FolderSource(path, image_size=1, labelled=False).paths
    shape = list(_decode(root / names[0])[1].shape[:2])
    stats = [faults.read((root / name).stat, name=functools.partial(str, name)) for name in names]
    content = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in zip(names, stats)]
    digest = hashlib.sha256("\n".join(content).encode(errors="surrogateescape")).hexdigest()[:16]
    lossy = sum(name.lower().endswith((".jpg", ".jpeg", ".webp")) for name in names)
    warnings = [f"{lossy} of {len(names)} images are JPEG or WebP, whose losses change all scores"] * bool(lossy)
    warnings += [SORTED] * (len({Path(name).parent for name in names}) > 1)

    def read(i):
        mode, pixels = _decode(root / names[i])
        if mode not in ("RGB", "L", "P", "1"):
            raise ValueError(f"{root / names[i]} has PIL's mode {mode}; allowed: 8-bit gray or RGB, without transparency")
        if list(pixels.shape[:2]) != shape:
            sizes = f"{pixels.shape[0]} x {pixels.shape[1]} pixels, {names[0]} {shape[0]} x {shape[1]}"
            advice = "all must have one size, that of the reference, for they are not cropped here"
            raise ValueError(f"{root / names[i]} has {sizes}; {advice}")
        return pixels

    description = {"folder": root.name, "files": len(names), "listing": digest}
    return ImageSet(len(names), shape, description, lambda ranges: read_blocks(read, [range(*r) for r in ranges]), warnings)


def _decode(path: Path) -> tuple[str, UInt8[np.ndarray, "H W 3"]]:
    """Returns PIL's mode and the pixels of an image."""
    try:
        with decoding.open_image(faults.read(decoding.read_file, path, name=lambda: str(path))) as image:
            return image.mode, np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises nearly anything
        if faults.is_of_the_system(error):
            raise
        raise ValueError(f"{path} cannot be read ({reading.describe_error(error)}); make it again") from error


def dataset_images(source, description: dict[str, Any]) -> ImageSet:
    """Returns the images of a source of `repae_jax.data`, in its order, cropped as for training, and described as given."""
    size, records = source.image_size, records_hash(source)
    described = size if isinstance(size, int) else list(size)  # as JSON gives it back
    description = {**description, "images": len(source), "image_size": described, "records": records}
    warnings = confusions.of_real_images(source)

    def blocks(ranges):
        return source_blocks(source, [range(*r) for r in ranges])

    return ImageSet(len(source), [*height_width(size)], description, blocks, warnings)


def sampled_images(
    draw: Callable[..., Iterable], count: int, shape: list[int], batch_size: int, description: dict[str, Any]
) -> ImageSet:
    """Returns images that a model draws as they are measured, in blocks of whole batches.

    `draw` yields (batch number, images) of the batches that its argument `skip` does not hold, all but the last of batch_size;
    `description` identifies model and settings.
    """

    def blocks(ranges):
        skip = set(range(-(-count // batch_size))) - {first // batch_size for first, _ in ranges}
        for _, images in draw(skip=skip):
            yield images

    return ImageSet(count, shape, description, blocks)


def open_images(path: epath.Path) -> ImageSet | None:
    """Returns the images in an npz or a folder; None for anything else, such as a workdir or weights of a model."""
    if (path / "checkpoints").is_dir() or (path / "args.json").exists():  # a workdir of ours, or a published one
        return None
    unfinished = [path] if path.suffix == ".parts" else sorted(path.glob("*.parts")) if path.is_dir() else []
    if path.suffix == ".npz" and not path.exists() and path.with_suffix(".parts").is_dir():
        unfinished = [path.with_suffix(".parts")]
    if unfinished:
        advice = "finish them with the same `python -m repae_jax.sample` command, and evaluate the npz it writes"
        raise ValueError(f"{unfinished[0]} holds unfinished samples: {advice}")
    if path.suffix == ".npz":
        return npz_images(path)
    if not path.is_dir():
        return None
    if archives := sorted(path.glob("*.npz")):
        raise ValueError(f"{path} holds {archives[0].name}, not only images: give the npz, or a folder of nothing but samples")
    return folder_images(path)


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
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no npz, or it is damaged or incomplete ({reason}); {advice}") from error
