"""Statistics of real images' features, in ADM's form: the reference that generated images are compared with."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from repae_jax import buckets, files
from repae_jax.evaluation.image_sets import ImageSet, naming_damage, npz_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, IsDone
from repae_jax.metrics.frechet import RunningGaussian, Stats

PUBLISHED_COUNT = 50_000  # samples behind published scores
KEPT_IMAGES = 10_000  # as in ADM's files, for precision and recall
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images; None is unknown."""

    pool: Stats  # statistics of the 2048 features of pool_3, for FID
    spatial: Stats | None  # statistics of the 2023 spatial features, for sFID
    features: Float[np.ndarray, "M F"] | None  # float32, pool_3 of some of the images, for precision and recall
    images: ImageSet | None  # these images if there are no `features` yet
    shape: list[int] | None  # [H, W] of the images
    description: dict[str, Any]  # plain values that identify the reference


def check_on_disk(path: epath.PathLike) -> None:
    """Raises ValueError for the address of a bucket, of which `Path` would make a local folder."""
    if buckets.is_address(path):
        raise ValueError(f"{path}: statistics of real images are kept on a disk; give a local or mounted path")


def read_reference(path: epath.PathLike, network: InceptionNetwork) -> Reference:
    """Reads ADM's `VIRTUAL_*.npz`, or a file of `write_reference`, whose weights the network must have.

    Its keys are mu, sigma; mu_s, sigma_s for sFID; arr_0, uint8 [M, H, W, 3], for precision and recall.
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
    _check_content(path, features, about, network)
    arrays = [array for array in (*pool, *(spatial or ()), features) if array is not None]
    checksum = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]
    return Reference(
        pool=pool, spatial=spatial, features=features, images=None if features is not None else images,
        shape=None if images is None else images.shape,
        description={"npz": path.name, "checksum": checksum, **about},
    )  # fmt: skip


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
    images: ImageSet, network: InceptionNetwork, folder: Path, keep_images: bool = False, is_done: IsDone = lambda: False
) -> tuple[Reference, FeatureParts] | None:
    """Measures the statistics of all images of a set; returns them and their parts, None in processes other than the first.

    The folder holds unfinished work, which is continued; `is_done` tells whether process 0 has removed it. `keep_images` keeps
    the images that `write_reference` needs.
    """
    chosen = np.zeros(images.count, bool)
    chosen[np.random.default_rng(0).permutation(images.count)[:KEPT_IMAGES]] = True
    parts = FeatureParts(folder, images, network, chosen if keep_images else None, is_done)
    if not parts.make("reference") or jax.process_index():
        return None
    pool, spatial, features, at = RunningGaussian(), RunningGaussian(), [], 0
    for part in parts.read():
        pool.update(part.pool)
        spatial.update(part.spatial)
        features.append(part.pool[chosen[at : at + len(part.pool)]])
        at += len(part.pool)
    reference = Reference(
        pool=pool.stats(), spatial=spatial.stats(), features=np.concatenate(features), images=None, shape=images.shape,
        description={"count": images.count, "source": images.description, "inception": network.checksum},
    )  # fmt: skip
    return reference, parts


def write_reference(path: epath.PathLike, reference: Reference, parts: FeatureParts) -> None:
    """Writes an npz that ADM's evaluator reads, too, from `measure_reference` with keep_images; errors as `files.write_all`."""
    arrays = {
        "mu": reference.pool[0], "sigma": reference.pool[1], "mu_s": reference.spatial[0], "sigma_s": reference.spatial[1],
        "pool": reference.features, "about": np.array(json.dumps({"format": _FORMAT, **reference.description})),
    }  # fmt: skip
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
