"""What generated images are compared with: statistics of real images' features, in ADM's form."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from repae_jax import buckets, files
from repae_jax.evaluation import image_sets
from repae_jax.evaluation.inception_features import FeatureParts
from repae_jax.metrics.frechet import RunningGaussian

PUBLISHED_COUNT = 50_000  # samples behind published scores
KEPT_IMAGES = 10_000  # as in ADM's files, for precision and recall
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
      pool: (mean [2048], covariance [2048, 2048]) of pool_3: FID.
      spatial: the same of the 2023 spatial features: sFID; None if unknown.
      features: float32 [M, 2048], pool_3 of some of the images: precision and recall; None if unknown.
      images: those images if there are no `features` yet, a set of images; or None.
      shape: (H, W) of the images, None if unknown.
      description: plain values that tell it from others.
    """

    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None
    features: np.ndarray | None
    images: image_sets.NpzImages | None
    shape: list[int] | None
    description: dict


def check_on_disk(path):
    """Checks that the path of statistics is no address; ValueError if it is: `Path` would make a folder of it here."""
    if buckets.is_address(path):
        raise ValueError(f"{path}: statistics of real images are kept on a disk; give a local or mounted path")


def read_reference(path, network):
    """Reads ADM's `VIRTUAL_*.npz`, or what `make_reference` wrote.

    Args:
      path: of the npz. Keys: mu, sigma; mu_s, sigma_s for sFID; arr_0, uint8 [M, H, W, 3], for precision and recall.
      network: whose weights must be those of the file, if it tells them.

    Returns:
      Reference.

    Raises:
      FileNotFoundError: if it does not exist.
      ValueError: if it is damaged, lacks mu and sigma, or they have other sizes, are not finite, or are of other weights.
    """
    check_on_disk(path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    with image_sets.naming_damage(path), np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is a single array; needed: an npz with mu and sigma")
        if not {"mu", "sigma"} <= set(archive):
            raise ValueError(
                f"{path} holds {', '.join(archive)}; needed: mu and sigma, the statistics of real images. Those of its images, "
                f"if any, are made by `python -m repae_jax.evaluate --make_reference OUT.npz --data {path} --image_size PIXELS "
                "--inception WEIGHTS`"
            )
        pool = _checked(path, archive, "mu", "sigma", network.pool_features)
        spatial = None
        if {"mu_s", "sigma_s"} <= set(archive):
            spatial = _checked(path, archive, "mu_s", "sigma_s", network.spatial_features)
        features = np.asarray(archive["pool"]) if "pool" in archive else None
        about = json.loads(str(archive["about"])) if "about" in archive else {}
        if not isinstance(about, dict) or (about and "inception" not in about):
            raise ValueError(f"about of {path} is {about!r}, which does not tell of Inception's weights; make the file again")
        images = image_sets.NpzImages(path) if "arr_0" in archive else None
    if about and about["inception"] != network.checksum:
        raise ValueError(
            f"{path} was made with Inception weights of checksum {about['inception']}, these have {network.checksum}: "
            "give the same weights, or make the reference again"
        )
    if features is not None and (
        features.ndim != 2 or features.shape[1] != network.pool_features or features.dtype.kind != "f"
    ):
        raise ValueError(
            f"pool of {path} is {features.dtype} {list(features.shape)}; needed: floats [M, {network.pool_features}]"
        )
    return Reference(
        pool=pool, spatial=spatial, features=features, images=None if features is not None else images,
        shape=None if images is None else images.shape,
        description={"npz": path.name, "checksum": _checksum(*pool, *(spatial or ()), features), **about},
    )  # fmt: skip


def _checksum(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _checked(path, archive, mean, cov, size):
    arrays = archive[mean].astype(np.float64), archive[cov].astype(np.float64)
    shapes = [list(array.shape) for array in arrays]
    if shapes != [[size], [size, size]]:
        raise ValueError(
            f"{mean} and {cov} of {path} have shapes {shapes[0]} and {shapes[1]}; needed: [{size}] and [{size}, {size}]"
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{mean} or {cov} of {path} is not finite everywhere; make it or download it again")
    return arrays


def _chosen(count):
    """bool [count]: the images that a reference keeps, at random."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[:KEPT_IMAGES]] = True
    return chosen


def measure_reference(images, network, folder, keep_images=False, process_index=0, process_count=1, is_done=lambda: False):
    """Statistics of a set of images, all of them.

    Args:
      images: set of images, see `repae_jax.evaluation.image_sets`.
      network: InceptionNetwork.
      folder: of the unfinished work; continued if it exists.
      keep_images: keep in the parts what `write_reference` needs.
      process_index, process_count: this process' share.
      is_done: whether process 0 has removed the folder.

    Returns:
      (Reference, FeatureParts); None in processes other than the first.

    Raises:
      ValueError: for images that cannot be read, or fewer than two.
    """
    chosen = _chosen(images.count)
    parts = FeatureParts(
        folder, images, network, chosen if keep_images else None, process_index, process_count
    )  # fmt: skip
    if not parts.make("reference", is_done) or process_index:
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


def write_reference(path, reference, parts):
    """Writes an npz that ADM's evaluator reads, too.

    Args:
      path: of the npz; must not exist.
      reference: Reference, from measure_reference with keep_images.
      parts: its FeatureParts.

    Raises:
      FileExistsError, OSError: as `files.write_all`.
    """
    arrays = {
        "mu": reference.pool[0], "sigma": reference.pool[1], "mu_s": reference.spatial[0], "sigma_s": reference.spatial[1],
        "pool": reference.features, "about": np.array(json.dumps({"format": _FORMAT, **reference.description})),
    }  # fmt: skip
    shape = (len(reference.features), *reference.shape, 3)
    files.write_all({path: files.npz_writer(arrays, {"arr_0": (shape, parts.read_images())})})


def check_shape(shape, reference, name):
    """ValueError unless images [H, W] have the size of those of the reference, if that is known; `name` is for the message."""
    if reference.shape is not None and list(reference.shape) != list(shape):
        raise ValueError(
            f"the samples have {shape[0]} x {shape[1]} pixels, the images of {name} {reference.shape[0]} x "
            f"{reference.shape[1]}; scores compare equal sizes only"
        )


def count_warnings(count, reference):
    """What is wrong with Frechet distances of so many samples to a reference: list of str."""
    size, warnings = reference.pool[0].size, []
    for what, number in (("samples", count), ("reference images", reference.description.get("count", size + 1))):
        if number <= size:
            warnings.append(
                f"fid, sfid: the features of {number} {what} span at most {number - 1} dimensions, of {size} in FID: the "
                f"covariances are rank-deficient and the distances far too large; take more than {size}"
            )
    if count != PUBLISHED_COUNT:
        warnings.append(
            f"fid, sfid: of {count} samples; published ones are of {PUBLISHED_COUNT}. Fewer give larger distances: compare "
            "equal numbers only"
        )
    return warnings
