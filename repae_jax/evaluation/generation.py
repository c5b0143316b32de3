"""Scores of generated images against real ones: FID, sFID, inception score, precision and recall."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from repae_jax import data
from repae_jax.evaluation import reference_stats
from repae_jax.evaluation.image_sets import ImageSet, dataset_images, npz_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, IsDone
from repae_jax.evaluation.reference_stats import KEPT_IMAGES, Reference
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.metrics.inception_score import SPLIT_SIZE, RunningInceptionScore
from repae_jax.metrics.precision_recall import NEIGHBORS, precision_recall
from repae_jax.models.inception import InceptionFeatures


def open_real_images(text: str, image_size: int) -> ImageSet:
    """Returns the images of an npz of this size, or of a source as `data.parse_source` takes it, cropped to this size."""
    if text.endswith(".npz"):
        images = npz_images(text)
        if images.shape != [image_size] * 2:
            raise ValueError(f"the images of {text} have {images.shape[0]} x {images.shape[1]} pixels, not {image_size}")
        return images
    name, fields = data.parse_source(text, labelled=False)
    return dataset_images(data.make_source(name, image_size, **fields), {"data": text})


def open_reference(text: str, images: ImageSet, network: InceptionNetwork, folder: Path, is_done: IsDone) -> Reference | None:
    """Returns the reference to compare images with, of their size, with features where the real images are at hand.

    `text` is an npz of statistics, or as of `open_real_images`. The folder holds unfinished work; `is_done` tells whether it
    has been removed. None is returned in processes other than the first if features had to be made.
    """
    if not text.endswith(".npz"):
        if images.shape[0] != images.shape[1]:
            raise ValueError(f"the samples have {images.shape[0]} x {images.shape[1]} pixels; datasets are cropped to squares")
        measured = reference_stats.measure_reference(open_real_images(text, images.shape[0]), network, folder, is_done=is_done)
        return measured and measured[0]
    reference = reference_stats.read_reference(text, network)
    reference_stats.check_shape(images.shape, reference, text)
    if reference.images is None:
        return reference
    parts = FeatureParts(folder, reference.images, network, is_done=is_done)
    if not parts.make("reference") or jax.process_index():
        return None
    return dataclasses.replace(reference, features=np.concatenate([part.pool for part in parts.read()]))


def score(features: Iterable[InceptionFeatures], reference: Reference) -> tuple[dict[str, float], list[str]]:
    """Computes all scores that the reference allows, from features in the order of the samples.

    They are 'fid', 'sfid', 'inception_score', 'inception_score_std', 'precision' and 'recall', as far as they are known; with
    warnings: which are missing or not to be compared, and why.
    """
    pool, spatial, inception, kept = RunningGaussian(), RunningGaussian(), RunningInceptionScore(), []
    for part in features:
        pool.update(part.pool)
        inception.update(part.logits)
        if reference.spatial is not None:
            spatial.update(part.spatial)
        if reference.features is not None:
            kept.append(part.pool)
    metrics = {"fid": frechet_distance(*pool.stats(), *reference.pool)}
    warnings = reference_stats.count_warnings(pool.count, reference)
    if pool.count < SPLIT_SIZE:
        warnings.append(
            f"inception_score: of {pool.count} samples; splits have {SPLIT_SIZE}, and shorter ones give lower scores"
        )
    if reference.spatial is None:
        warnings.append("no sfid: the reference has no mu_s and sigma_s")
    else:
        metrics["sfid"] = frechet_distance(*spatial.stats(), *reference.spatial)
    metrics["inception_score"], metrics["inception_score_std"] = inception.result()
    if reference.features is None:
        return metrics, [*warnings, "no precision and recall: the reference has no images (arr_0)"]
    count = len(reference.features)
    if min(count, pool.count) <= NEIGHBORS:
        warnings.append(
            f"no precision and recall: {pool.count} samples and {count} reference images; needed: more than {NEIGHBORS} of each"
        )
    else:
        metrics["precision"], metrics["recall"] = precision_recall(reference.features, np.concatenate(kept))
        if count != KEPT_IMAGES:
            warnings.append(f"precision and recall: against {count} reference images, {KEPT_IMAGES} in published scores")
    return metrics, warnings
