"""Scores of generated images in feature spaces beside Inception's: Frechet distances, FDr6, CMMD, precision, recall, copies."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from repae_jax.evaluation.image_sets import ImageSet
from repae_jax.evaluation.inception_features import FeatureParts
from repae_jax.evaluation.reference_stats import KEPT_IMAGES, PUBLISHED_COUNT, Reference, SpaceReference
from repae_jax.metrics.frechet import frechet_distance
from repae_jax.metrics.frechet_confidence import frechet_confidence, merged, split
from repae_jax.metrics.kernel_distances import BANDWIDTH, SCALE, cmmd
from repae_jax.metrics.memorization import QUANTILE, nearest
from repae_jax.metrics.precision_recall import precision_recall
from repae_jax.metrics.resampling import GROUPS, SEED
from repae_jax.models.feature_spaces import FDR6, INCEPTION_DIVISOR, SPACES

NEIGHBORS = 5  # of DINOv2's precision and recall, as dgm-eval's
IMAGENET_TRAIN = 1_281_167  # images that FDr6 compares with
SHOWN = 16  # closest pairs in the picture

# how scores are computed, for the protocol
COMPUTED = {
    **{f"fd_{name}": f"Frechet distance; {space.protocol}" for name, space in SPACES.items() if name != "clip_336"},
    "cmmd": f"{SCALE:g} MMD^2, kernel exp(-|x - y|^2 / {2 * BANDWIDTH**2:g}), with diagonals; {SPACES['clip_336'].protocol}",
    "precision_dinov2": f"{NEIGHBORS} neighbors, of equally many samples and real images, {KEPT_IMAGES} at most",
    "recall_dinov2": f"{NEIGHBORS} neighbors, of equally many samples and real images, {KEPT_IMAGES} at most",
    "memorized": f"share of samples as near to a real image as the nearest {QUANTILE:g} of real ones to another, in dinov2",
    "fdr6": f"mean of fid / {INCEPTION_DIVISOR}, " + ", ".join(f"fd_{name} / {SPACES[name].divisor}" for name in FDR6),
}


@dataclasses.dataclass
class SpaceScores:
    """Scores of samples in some feature spaces, and what limits them."""

    metrics: dict[str, float]
    warnings: list[str]
    memorization: dict[str, Any] | None = None  # threshold, quantiles of distances, closest pairs; None if not measured


def score_spaces(parts: FeatureParts, reference: Reference, fid: float, image_size: list[int]) -> SpaceScores:
    """Computes the scores of all spaces of the reference, one space in memory at a time.

    'fd_NAME' for all but CLIP of 336 px, which has 'cmmd'; for DINOv2 'precision_dinov2', 'recall_dinov2' and 'memorized',
    too; 'fdr6' if there are all six distances, of which Inception's is `fid`.
    """
    scores, count, sizes = SpaceScores({}, []), 0, {}
    for name, real in reference.spaces.items():
        samples = np.concatenate(list(parts.read_space(name)))
        count, sizes[f"fd_{name}"] = samples.shape
        if name == "clip_336":
            _score_cmmd(scores, samples, real)
        else:
            _score_frechet(scores, name, samples, real)
        if name == "dinov2":
            _score_neighbors(scores, samples, real)
            _score_memorization(scores, samples, real)
    scores.warnings += _count_warnings(count, reference, {name: size for name, size in sizes.items() if name in scores.metrics})
    if set(FDR6) <= set(reference.spaces):
        _score_fdr6(scores, reference, fid, image_size)
    return scores


def _count_warnings(count: int, reference: Reference, sizes: Mapping[str, int]) -> list[str]:
    """Returns reasons not to trust distances of `count` samples to a reference, in spaces of so many features."""
    warnings = []
    for kind, number in (("samples", count), ("reference images", reference.description.get("count"))):
        few = [name for name, size in sizes.items() if number is not None and number <= size]
        if few:
            found = f"{', '.join(few)}: {number} {kind} span at most {number - 1} dimensions, of {sizes[few[0]]} in {few[0]}"
            warnings.append(f"{found}: the distances are far too large; take more than {max(map(sizes.get, few))}")
    if sizes and count != PUBLISHED_COUNT:
        found = f"{', '.join(sizes)}: of {count} samples; published ones are of {PUBLISHED_COUNT}"
        warnings.append(f"{found}. Fewer give larger distances: compare equal numbers only")
    return warnings


def _score_frechet(scores: SpaceScores, name: str, samples: Float[np.ndarray, "N F"], real: SpaceReference) -> None:
    if real.stats is None:
        scores.warnings.append(
            f"no fd_{name}: the reference has {len(real.features)} images to measure it with, and a distance needs statistics "
            "of all: give the real images as --reference, or make it by --make_reference with these --features"
        )
        return
    groups = split(samples)
    scores.metrics[f"fd_{name}"] = frechet_distance(*merged(groups).stats(), *real.stats)
    if name == "dinov2" and len(samples) >= 2 * GROUPS:
        scores.metrics["fd_dinov2_stderr"] = frechet_confidence(groups, real.stats).stderr


def _score_cmmd(scores: SpaceScores, samples: Float[np.ndarray, "N F"], real: SpaceReference) -> None:
    fewest = min(len(samples), len(real.features))
    found = f"{len(samples)} samples and {len(real.features)} reference images"
    if fewest < 2 * GROUPS:
        scores.warnings.append(f"no cmmd: {found}; needed: {2 * GROUPS} or more of each")
        return
    scores.metrics["cmmd"], scores.metrics["cmmd_stderr"] = cmmd(real.features, samples)


def _score_neighbors(scores: SpaceScores, samples: Float[np.ndarray, "N F"], real: SpaceReference) -> None:
    """Adds precision and recall, of equally many samples and reference images: recall grows with the number of samples."""
    count = min(len(samples), len(real.features), KEPT_IMAGES)
    found = f"{len(samples)} samples and {len(real.features)} reference images"
    if count <= NEIGHBORS:
        scores.warnings.append(f"no precision_dinov2 and recall_dinov2: {found}; needed: more than {NEIGHBORS} of each")
        return
    rng = np.random.default_rng(SEED)
    chosen, others = (features[np.sort(rng.permutation(len(features))[:count])] for features in (samples, real.features))
    precision, recall = precision_recall(others, chosen, NEIGHBORS)
    scores.metrics |= {"precision_dinov2": precision, "recall_dinov2": recall}
    if count < KEPT_IMAGES:
        scores.warnings.append(f"precision_dinov2 and recall_dinov2: of {count} of each; {KEPT_IMAGES} in published scores")


def _score_memorization(scores: SpaceScores, samples: Float[np.ndarray, "N F"], real: SpaceReference) -> None:
    """Adds the share of samples that are as near to a real image as the nearest hundredth of real ones are to others.

    Where more than that are duplicates, the threshold is zero, and exact copies count.
    """
    if len(real.features) < 2:
        scores.warnings.append("no memorized: the reference has fewer than two images at hand")
        return
    among_real = nearest(real.features, real.every(), itself=real.rows)
    threshold = float(np.quantile(among_real.distance, QUANTILE))
    found = nearest(samples, real.every())
    scores.metrics["memorized"] = float((found.distance <= threshold).mean())
    order = np.argsort(found.distance, kind="stable")[:SHOWN]
    scores.memorization = {
        "space": "dinov2", "threshold": threshold, "quantile_of_real_images": QUANTILE,
        "median_of_samples": float(np.median(found.distance)), "median_of_real_images": float(np.median(among_real.distance)),
        "closest": [
            {"sample": int(i), "reference_image": int(found.neighbor[i]), "distance": float(found.distance[i])} for i in order
        ],
    }  # fmt: skip
    if not real.is_whole:
        scores.warnings.append(
            f"memorized: beside {len(real.features)} reference images alone; to find copies of any training image, give all of "
            "them as --reference folder:path=…"
        )


def _score_fdr6(scores: SpaceScores, reference: Reference, fid: float, image_size: list[int]) -> None:
    """Adds FDr6, the mean of the six distances, each relative to that of ImageNet's validation images."""
    missing = [name for name in FDR6 if f"fd_{name}" not in scores.metrics]
    if missing:
        scores.warnings.append(f"no fdr6: there is no fd_{', no fd_'.join(missing)}")
        return
    ratios = [fid / INCEPTION_DIVISOR, *(scores.metrics[f"fd_{name}"] / SPACES[name].divisor for name in FDR6)]
    scores.metrics["fdr6"] = float(np.mean(ratios))
    count = reference.description.get("count")
    if image_size != [256, 256] or count != IMAGENET_TRAIN:
        scores.warnings.append(
            f"fdr6: its divisors are of ImageNet at 256 px, against all {IMAGENET_TRAIN} training images; these samples have "
            f"{image_size[0]} x {image_size[1]} pixels, the reference {count or 'an unknown number of'} images"
        )


def closest_pairs(
    memorization: Mapping[str, Any], samples: ImageSet, real: ImageSet, batch_size: int
) -> UInt8[np.ndarray, "2n H W 3"]:
    """Returns the closest samples, each followed by the real image that it is close to; drawn or read again."""
    closest = memorization["closest"]
    drawn = pick(samples, [pair["sample"] for pair in closest], batch_size)
    read = pick(real, [pair["reference_image"] for pair in closest], 1)
    return np.stack([drawn, read], axis=1).reshape(-1, *drawn.shape[1:])


def pick(images: ImageSet, numbers: list[int], batch_size: int) -> UInt8[np.ndarray, "n H W 3"]:
    """Returns some images of a set, in the order of their numbers given, which is read in whole batches."""
    batches = sorted({number // batch_size for number in numbers})
    ranges = [(batch * batch_size, min((batch + 1) * batch_size, images.count)) for batch in batches]
    blocks = {batch: block for batch, block in zip(batches, images.blocks(ranges))}
    return np.stack([blocks[number // batch_size][number % batch_size] for number in numbers])
