"""Statistics of real images' features, in ADM's form: the reference that generated images are compared with."""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from repae_jax import buckets, files
from repae_jax.evaluation.image_sets import ImageSet, naming_damage, npz_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, IsDone
from repae_jax.evaluation.space_networks import SpaceNetwork
from repae_jax.metrics.frechet import RunningGaussian, Stats

PUBLISHED_COUNT = 50_000  # samples behind published scores
KEPT_IMAGES = 10_000  # as in ADM's files, for precision and recall
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class SpaceReference:
    """Real images in a feature space other than Inception's."""

    stats: Stats | None  # None if only `features` are known: fewer images than a distance needs
    features: Float[np.ndarray, "M F"]  # of some of the images, at most KEPT_IMAGES
    every: Callable[[], Iterator[Float[np.ndarray, "n F"]]]  # of all images at hand, in the order of Reference.pictures
    rows: Int[np.ndarray, " M"]  # places of `features` among those
    is_whole: bool  # whether those are all images of the reference


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images; None is unknown."""

    pool: Stats  # statistics of the 2048 features of pool_3, for FID
    spatial: Stats | None  # statistics of the 2023 spatial features, for sFID
    features: Float[np.ndarray, "M F"] | None  # float32, pool_3 of some of the images, for precision and recall
    images: ImageSet | None  # these images if there are no `features` yet
    shape: list[int] | None  # [H, W] of the images
    description: dict[str, Any]  # plain values that identify the reference
    spaces: Mapping[str, SpaceReference] = dataclasses.field(default_factory=dict)  # by name
    pictures: ImageSet | None = None  # the images at hand, if any


def check_on_disk(path: epath.PathLike) -> None:
    """Raises ValueError for the address of a bucket, of which `Path` would make a local folder."""
    if buckets.is_address(path):
        raise ValueError(f"{path}: statistics of real images are kept on a disk; give a local or mounted path")


def read_reference(
    path: epath.PathLike, network: InceptionNetwork, spaces: Mapping[str, SpaceNetwork] | None = None
) -> Reference:
    """Reads ADM's `VIRTUAL_*.npz`, or a file of `write_reference`, whose weights the networks must have.

    Its keys are mu, sigma; mu_s, sigma_s for sFID; arr_0, uint8 [M, H, W, 3], for precision and recall; mu_NAME, sigma_NAME and
    pool_NAME for other feature spaces, which may lack here.
    """
    check_on_disk(path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    with naming_damage(path), np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is a single array; needed: an npz with mu and sigma")
        if not {"mu", "sigma"} <= set(archive):
            raise ValueError(
                f"{path} holds {', '.join(archive)}; needed: mu and sigma, the statistics of real images. Those of its images, "
                f"if any, are made by `python -m repae_jax.evaluate --make_reference OUT.npz --data {path} --image_size PIXELS "
                "--inception WEIGHTS`"
            )
        pool = _read_stats(path, archive, "mu", "sigma", network.pool_features)
        spatial = None
        if {"mu_s", "sigma_s"} <= set(archive):
            spatial = _read_stats(path, archive, "mu_s", "sigma_s", network.spatial_features)
        features = np.asarray(archive["pool"]) if "pool" in archive else None
        about = json.loads(str(archive["about"])) if "about" in archive else {}
        images = npz_images(path) if "arr_0" in archive else None
        of_spaces = {
            name: _read_space(path, archive, name, space, about)
            for name, space in (spaces or {}).items() if _space_keys(name) <= set(archive)
        }  # fmt: skip
    _check_content(path, features, about, network)
    return Reference(
        pool=pool, spatial=spatial, features=features, images=None if features is not None else images,
        shape=None if images is None else images.shape,
        description={"npz": path.name, "checksum": read_checksum(path), **about}, spaces=of_spaces, pictures=images,
    )  # fmt: skip


def check_spaces(path: epath.PathLike, names: Collection[str]) -> None:
    """Raises ValueError unless a file has these feature spaces, or images to measure them on: before networks are fetched."""
    if not names:
        return
    with naming_damage(Path(path)), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
    missing = [name for name in names if not _space_keys(name) <= held]
    if missing and "arr_0" not in held:
        raise ValueError(
            f"{path} holds neither the feature spaces {', '.join(missing)} nor images (arr_0): give the real images as "
            "--reference, or make the file again by --make_reference with these --features"
        )


def _space_keys(name: str) -> set[str]:
    return {f"mu_{name}", f"sigma_{name}", f"pool_{name}"}


def read_checksum(path: epath.PathLike) -> str:
    """Returns what identifies a reference, 16 digits: of its statistics and features in Inception's space, not of the file."""
    digest = hashlib.sha256()
    with naming_damage(Path(path)), np.load(path, allow_pickle=False) as archive:
        names = [name for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if set(pair) <= set(archive) for name in pair]
        for name in names:
            digest.update(np.ascontiguousarray(archive[name].astype(np.float64)).tobytes())
        if "pool" in archive:
            digest.update(np.ascontiguousarray(archive["pool"]).tobytes())
    return digest.hexdigest()[:16]


def _read_space(path: Path, archive: Any, name: str, space: SpaceNetwork, about: Any) -> SpaceReference:
    made = about.get("spaces", {}).get(name) if isinstance(about, dict) else None
    if made != space.checksum:
        found = f"the space {name} of {path} was made with weights of checksum {made}, these have {space.checksum}"
        raise ValueError(f"{found}: give the same weights (--features {name}=WEIGHTS), or make the reference again")
    stats = _read_stats(path, archive, f"mu_{name}", f"sigma_{name}", space.size)
    features = np.asarray(archive[f"pool_{name}"])
    if features.ndim != 2 or features.shape[1] != space.size or features.dtype.kind != "f":
        found = f"pool_{name} of {path} is {features.dtype} {list(features.shape)}"
        raise ValueError(f"{found}; needed: floats [M, {space.size}]")
    is_whole = about.get("count") == len(features)
    return SpaceReference(stats, features, lambda: iter([features]), np.arange(len(features)), is_whole)


def space_of_parts(parts: FeatureParts, name: str) -> SpaceReference:
    """Returns the features of finished parts, all of which are kept, without statistics."""
    features = np.concatenate(list(parts.read_space(name)))
    return SpaceReference(None, features, lambda: iter([features]), np.arange(len(features)), False)


def _read_stats(path: Path, archive: Any, mean: str, cov: str, size: int) -> Stats:
    arrays = archive[mean].astype(np.float64), archive[cov].astype(np.float64)
    shapes = [list(array.shape) for array in arrays]
    if shapes != [[size], [size, size]]:
        needed = f"[{size}] and [{size}, {size}]"
        raise ValueError(f"{mean} and {cov} of {path} have shapes {shapes[0]} and {shapes[1]}; needed: {needed}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{mean} or {cov} of {path} is not finite everywhere; make it or download it again")
    return arrays


def _check_content(path: Path, features: np.ndarray | None, about: Any, network: InceptionNetwork) -> None:
    """Checks what `write_reference` adds to ADM's form."""
    if not isinstance(about, dict) or (about and "inception" not in about):
        raise ValueError(f"about of {path} is {about!r}, which does not tell of Inception's weights; make the file again")
    if about and about["inception"] != network.checksum:
        found = f"Inception weights of checksum {about['inception']}, these have {network.checksum}"
        raise ValueError(f"{path} was made with {found}: give the same weights, or make the reference again")
    size = network.pool_features
    if features is not None and (features.ndim != 2 or features.shape[1] != size or features.dtype.kind != "f"):
        raise ValueError(f"pool of {path} is {features.dtype} {list(features.shape)}; needed: floats [M, {size}]")


def measure_reference(
    images: ImageSet, network: InceptionNetwork, folder: Path, keep_images: bool = False, is_done: IsDone = lambda: False,
    spaces: Mapping[str, SpaceNetwork] | None = None,
) -> tuple[Reference, FeatureParts] | None:
    """Measures the statistics of all images of a set; returns them and their parts, None in processes other than the first.

    The folder holds unfinished work, which is continued; `is_done` tells whether process 0 has removed it. `keep_images` keeps
    the images that `write_reference` needs.
    """
    chosen = np.zeros(images.count, bool)
    chosen[np.random.default_rng(0).permutation(images.count)[:KEPT_IMAGES]] = True
    spaces = spaces or {}
    parts = FeatureParts(folder, images, network, chosen if keep_images else None, is_done, spaces)
    if not parts.make("reference") or jax.process_index():
        return None
    pool, spatial, features, at = RunningGaussian(), RunningGaussian(), [], 0
    for part in parts.read():
        pool.update(part.pool)
        spatial.update(part.spatial)
        features.append(part.pool[chosen[at : at + len(part.pool)]])
        at += len(part.pool)
    description = {"count": images.count, "source": images.description, "inception": network.checksum}
    description |= {"spaces": {name: space.checksum for name, space in spaces.items()}} if spaces else {}
    description |= {"warnings": list(images.warnings)} if images.warnings else {}
    reference = Reference(
        pool=pool.stats(), spatial=spatial.stats(), features=np.concatenate(features), images=None, shape=images.shape,
        description=description, spaces={name: _measure_space(parts, name, chosen) for name in spaces}, pictures=images,
    )  # fmt: skip
    return reference, parts


def _measure_space(parts: FeatureParts, name: str, chosen: np.ndarray) -> SpaceReference:
    running, kept, at = RunningGaussian(), [], 0
    for features in parts.read_space(name):
        running.update(features)
        kept.append(features[chosen[at : at + len(features)]])
        at += len(features)
    every = functools.partial(parts.read_space, name)
    return SpaceReference(running.stats(), np.concatenate(kept), every, np.flatnonzero(chosen), True)


def write_reference(path: epath.PathLike, reference: Reference, parts: FeatureParts) -> None:
    """Writes an npz that ADM's evaluator reads, too, from `measure_reference` with keep_images; errors as `files.write_all`."""
    arrays = {
        "mu": reference.pool[0], "sigma": reference.pool[1], "mu_s": reference.spatial[0], "sigma_s": reference.spatial[1],
        "pool": reference.features, "about": np.array(json.dumps({"format": _FORMAT, **reference.description})),
    }  # fmt: skip
    for name, space in reference.spaces.items():
        arrays |= {f"mu_{name}": space.stats[0], f"sigma_{name}": space.stats[1], f"pool_{name}": space.features}
    shape = (len(reference.features), *reference.shape, 3)
    files.write_all({path: files.npz_writer(arrays, {"arr_0": (shape, parts.read_images())})})


def check_shape(shape: list[int], reference: Reference, name: str) -> None:
    """Raises ValueError unless images [H, W] have the size of the reference `name`, if that is known."""
    if reference.shape is not None and list(reference.shape) != list(shape):
        theirs = f"the images of {name} {reference.shape[0]} x {reference.shape[1]}"
        raise ValueError(f"the samples have {shape[0]} x {shape[1]} pixels, {theirs}; scores compare equal sizes only")


def count_warnings(count: int, reference: Reference) -> list[str]:
    """Returns reasons not to trust Frechet distances of `count` samples to a reference."""
    size, warnings = reference.pool[0].size, []
    for kind, number in (("samples", count), ("reference images", reference.description.get("count", size + 1))):
        if number <= size:
            warnings.append(
                f"fid, sfid: the features of {number} {kind} span at most {number - 1} dimensions, of {size} in FID: the "
                f"covariances are rank-deficient and the distances far too large; take more than {size}"
            )
    if count != PUBLISHED_COUNT:
        warnings.append(
            f"fid, sfid: of {count} samples; published ones are of {PUBLISHED_COUNT}. Fewer give larger distances: compare "
            "equal numbers only"
        )
    return warnings
