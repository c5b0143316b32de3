"""Scores of generated images against real ones in Inception's space."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from repae_jax import data
from repae_jax.evaluation import reference_stats
from repae_jax.evaluation.image_sets import ImageSet, dataset_images, npz_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, IsDone
from repae_jax.evaluation.reference_stats import KEPT_IMAGES, PUBLISHED_COUNT, Reference
from repae_jax.evaluation.space_networks import SpaceNetwork
from repae_jax.metrics import frechet_confidence
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.metrics.inception_score import SPLIT_SIZE, RunningInceptionScore
from repae_jax.metrics.kernel_distances import SUBSET_SIZE, SUBSETS, kernel_inception_distance
from repae_jax.metrics.monge import DIRECTIONS, monge_inception_distance
from repae_jax.metrics.precision_recall import NEIGHBORS, precision_recall
from repae_jax.metrics.resampling import GROUPS
from repae_jax.models.inception import InceptionFeatures
from repae_jax.ranges import Extent, as_extent, height_width, in_words

# how the scores that are not ADM's are computed, for the protocol
COMPUTED = {
    "fid_stderr": f"one standard error of the samples, jackknife over {GROUPS} random groups; the reference counts as exact",
    "fid_infinity": f"value at 0 of a line in 1/N through FIDs of unions of {GROUPS} random groups, >= 2 samples per feature",
    "kid": f"{SUBSETS} subsets of {SUBSET_SIZE}, kernel (x.y / F + 1)^3, unbiased; kid_std is over subsets",
    "mind": f"3 F times the mean squared 2-Wasserstein distance along {DIRECTIONS} directions; equally many images of each",
}  # fmt: skip


def open_real_images(text: str, image_size: Extent) -> ImageSet:
    """Returns the images of an npz of this size, or of a source as `data.parse_source` takes it, cropped to this size."""
    if text.endswith(".npz"):
        images = npz_images(text)
        if images.shape != [*height_width(image_size)]:
            sizes = f"{images.shape[0]} x {images.shape[1]} pixels, not {in_words(image_size)}"
            raise ValueError(f"the images of {text} have {sizes}")
        return images
    name, fields = data.parse_source(text, labelled=False)
    return dataset_images(data.make_source(name, image_size, **fields), {"data": text})


def open_reference(
    text: str, images: ImageSet, network: InceptionNetwork, folder: Path, is_done: IsDone,
    spaces: Mapping[str, SpaceNetwork] | None = None,
) -> Reference | None:
    """Returns the reference to compare images with, of their size, with features where the real images are at hand.

    `text` is an npz of statistics, or as of `open_real_images`. The folder holds unfinished work; `is_done` tells whether it
    has been removed. None is returned in processes other than the first if features had to be made. Spaces that an npz lacks
    are measured on its images alone.
    """
    spaces = spaces or {}
    if not text.endswith(".npz"):
        real = open_real_images(text, as_extent(images.shape))
        measured = reference_stats.measure_reference(real, network, folder, is_done=is_done, spaces=spaces)
        return measured and measured[0]
    reference = reference_stats.read_reference(text, network, spaces)
    reference_stats.check_shape(images.shape, reference, text)
    missing = {name: space for name, space in spaces.items() if name not in reference.spaces}
    if reference.images is None and not missing:
        return reference
    parts = FeatureParts(folder, reference.pictures, network, is_done=is_done, spaces=missing)
    if not parts.make("reference") or jax.process_index():
        return None
    of_images = {name: reference_stats.space_of_parts(parts, name) for name in missing}
    reference = dataclasses.replace(reference, spaces={**reference.spaces, **of_images})
    if reference.images is None:
        return reference
    return dataclasses.replace(reference, features=np.concatenate([part.pool for part in parts.read()]))


def score(features: Iterable[InceptionFeatures], reference: Reference) -> tuple[dict[str, float], list[str]]:
    """Computes all scores in Inception's space that the reference allows, from features in the order of the samples.

    They are 'fid', 'sfid', 'inception_score', 'precision', 'recall', 'kid' and 'mind', as far as they are known, some with
    'NAME_stderr' (one standard error of the samples) or 'NAME_std' (deviation over splits or subsets), and 'fid_infinity', of
    infinitely many samples; with warnings: which are missing or not to be compared, and why.
    """
    spatial, inception, kept = RunningGaussian(), RunningInceptionScore(), []
    for part in features:
        kept.append(part.pool)
        inception.update(part.logits)
        if reference.spatial is not None:
            spatial.update(part.spatial)
    pool = np.concatenate(kept)
    del kept
    metrics, warnings = score_fid(pool, reference)
    if len(pool) < SPLIT_SIZE:
        warnings.append(
            f"inception_score: of {len(pool)} samples; splits have {SPLIT_SIZE}, and shorter ones give lower scores"
        )
    if reference.spatial is None:
        warnings.append("no sfid: the reference has no mu_s and sigma_s")
    else:
        metrics["sfid"] = frechet_distance(*spatial.stats(), *reference.spatial)
    metrics["inception_score"], metrics["inception_score_std"] = inception.result()
    if reference.features is None:
        return metrics, [*warnings, "no precision and recall: the reference has no images (arr_0)"]
    count = len(reference.features)
    if min(count, len(pool)) <= NEIGHBORS:
        warnings.append(
            f"no precision and recall: {len(pool)} samples and {count} reference images; needed: more than {NEIGHBORS} of each"
        )
    else:
        metrics["precision"], metrics["recall"] = precision_recall(reference.features, pool)
        if count != KEPT_IMAGES:
            warnings.append(f"precision and recall: against {count} reference images, {KEPT_IMAGES} in published scores")
    further, more = score_pairs(pool, reference.features)
    return {**metrics, **further}, [*warnings, *more]


def score_fid(pool: Float[np.ndarray, "N F"], reference: Reference) -> tuple[dict[str, float], list[str]]:
    """Computes FID, its standard error, and what it would be of infinitely many samples; with warnings."""
    groups = frechet_confidence.split(pool)
    metrics = {"fid": frechet_distance(*frechet_confidence.merged(groups).stats(), *reference.pool)}
    warnings = reference_stats.count_warnings(len(pool), reference)
    if len(pool) < 2 * len(groups):
        return metrics, [*warnings, f"no fid_stderr: {len(pool)} samples; needed: {2 * len(groups)} or more"]
    confidence = frechet_confidence.frechet_confidence(groups, reference.pool)
    metrics["fid_stderr"] = confidence.stderr
    if confidence.infinity is None:
        least = frechet_confidence.least_samples(reference.pool[0].size)
        return metrics, [*warnings, f"no fid_infinity: {len(pool)} samples; needed: {least} or more, for a line through sizes"]
    if len(pool) < PUBLISHED_COUNT:
        of_published = confidence.infinity + (metrics["fid"] - confidence.infinity) * len(pool) / PUBLISHED_COUNT
        warnings.append(f"fid: of {PUBLISHED_COUNT} samples, it would be about {of_published:.2f}, by the line to fid_infinity")
    return {**metrics, "fid_infinity": confidence.infinity, "fid_infinity_stderr": confidence.infinity_stderr}, warnings


def score_pairs(pool: Float[np.ndarray, "N F"], real: Float[np.ndarray, "M F"]) -> tuple[dict[str, float], list[str]]:
    """Computes KID and MIND, which need the features of real images, as far as there are enough; with warnings."""
    metrics, warnings, fewest = {}, [], min(len(pool), len(real))
    found = f"{len(pool)} samples and {len(real)} reference images"
    if fewest < SUBSET_SIZE:
        warnings.append(f"no kid: {found}; needed: {SUBSET_SIZE} or more of each, the size of its subsets")
    else:
        metrics["kid"], metrics["kid_std"] = kernel_inception_distance(real, pool)
    if fewest < 2 * GROUPS:
        warnings.append(f"no mind: {found}; needed: {2 * GROUPS} or more of each")
    else:
        metrics["mind"], metrics["mind_stderr"] = monge_inception_distance(real, pool)
        if fewest < KEPT_IMAGES:
            warnings.append(f"mind: of {fewest} images each; fewer give larger distances: compare equal numbers only")
    return metrics, warnings
