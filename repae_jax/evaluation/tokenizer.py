"""Scores of a tokenizer: images compared with their reconstructions by rFID, PSNR, SSIM and LPIPS.

Pixels are rounded to the nearest of 0..255 and latents sampled, as in LightningDiT's evaluate_tokenizer.py, which the numbers
in its paper and in REPA-E's come from. There SSIM is computed on images in [-1, 1]. That is another number than that of pixels
0..255, which has black at zero as the definition has; both are given.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from grain import MapDataset
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from repae_jax import images
from repae_jax.data import loader, reading
from repae_jax.distributed import sharding
from repae_jax.evaluation.batches import run_padded
from repae_jax.evaluation.reference_stats import PUBLISHED_COUNT
from repae_jax.metrics import image_quality
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.models.lpips import LPIPS
from repae_jax.models.vae_families import VaeModule
from repae_jax.ranges import height_width

LATENTS = ("sampled", "mode")
SHOWN = 16  # images in the picture, and in the list of the worst


class Metric(NamedTuple):
    """A score for people: its name, its unit or range, and how it is computed."""

    name: str
    unit: str
    computed: str


METRICS = {
    "rfid": Metric(
        "rFID", "",
        "Frechet distance of Inception's pool features of originals and reconstructions; uint8, prepared as by pytorch-fid",
    ),
    "psnr": Metric("PSNR", "dB", "mean over images of 20 log10(255 / root mean squared error), both uint8"),
    "ssim": Metric(
        "SSIM", "of images in [-1, 1], as published",
        "mean over images; both in [-1, 1], reconstructions clipped; 11 x 11 Gaussian of 1.5 pixels, inside the image",
    ),
    "ssim_pixels": Metric("SSIM", "of pixels 0..255", "the same, of both as uint8, data range 255"),
    "lpips": Metric(
        "LPIPS", "", "mean over images; VGG16, version 0.1; both in [-1, 1], reconstructions as decoded, not clipped"
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Images compared with their reconstructions."""

    records: Int[np.ndarray, " N"]  # the records of the source that were compared
    values: Mapping[str, Float[np.ndarray, " N"]]  # scores of each of them, float64, by name
    rfid: float | None  # None if no feature function was given
    bad_records: list[tuple[int, str]]  # (record, error) of those that could not be decoded
    pairs: UInt8[np.ndarray, "2n H W 3"]  # the first originals, each followed by its reconstruction


def read_images(source: Any, records: Sequence[int]) -> tuple[UInt8[np.ndarray, "n H W 3"], Int[np.ndarray, " n"], list]:
    """Returns (images, their records, [(record, error), ...] of those that cannot be decoded) of records of a source."""
    results = reading.at_once(functools.partial(reading.attempt, source), records)
    decoded = {record: fields["image"] for record, (fields, error) in zip(records, results) if not error}
    images = np.array([*decoded.values()], np.uint8).reshape(-1, *height_width(source.image_size), 3)
    return images, np.array([*decoded], np.int32), [(record, error) for record, (_, error) in zip(records, results) if error]


def make_compare(vae: VaeModule, latents: str) -> Callable:
    """Makes the function that reconstructs and compares, in float32, to be jitted.

    It takes ({'vae': parameters, 'lpips': parameters or None}, pixels uint8 [B, H, W, 3], records int32 [B], key), and
    returns reconstructions uint8 [B, H, W, 3], and {'psnr': float32 [B], …, 'finite': bool [B]}. Image i depends on
    (key, records[i]) alone, not on the batch it is in. Latents are 'sampled' or 'mode'; images with a side smaller than
    the window have no SSIM.
    """
    vae = vae.clone(dtype=jnp.float32)

    @jax.default_matmul_precision("high")  # at least three bfloat16 passes on TPUs, TF32 on GPUs as published
    def compare(params, pixels, records, key):
        originals = images.to_float(pixels)
        posterior = vae.apply({"params": params["vae"]}, originals, method="encode")
        z = posterior.mode()
        if latents == "sampled":
            keys = jax.vmap(lambda record: jax.random.fold_in(key, record))(records)
            z = posterior.sample(jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys))
        recon = vae.apply({"params": params["vae"]}, z, method="decode")
        rounded = images.to_uint8(recon + 1 / 255)  # half a gray level up, where truncating is rounding
        values = {"finite": jnp.isfinite(recon).all(axis=(1, 2, 3)), "psnr": image_quality.psnr(pixels, rounded)}
        if min(pixels.shape[1:3]) >= image_quality.WINDOW:
            values["ssim"] = image_quality.ssim(originals, recon.clip(-1, 1), 2)
            values["ssim_pixels"] = image_quality.ssim(pixels.astype(jnp.float32), rounded.astype(jnp.float32), 255)
        if params["lpips"] is not None:
            values["lpips"] = LPIPS().apply({"params": params["lpips"]}, originals, recon)
        return rounded, values

    return compare


def compare_all(
    vae: VaeModule, params: Any, source: Any, records: Int[np.ndarray, " N"], *, mesh: jax.sharding.Mesh, batch_size: int,
    latents: str, seed: int, lpips: Any = None, workers: int = 0,
    features_fn: Callable[[UInt8[np.ndarray, "b H W 3"]], Float[np.ndarray, "b F"]] | None = None,
) -> Comparison:
    """Compares records of a source with their reconstructions, one batch in memory at a time, over all devices of the mesh.

    `batch_size` is a multiple of the devices; latents are as of `make_compare`, `lpips` are parameters, and `features_fn`
    computes features of pixels, for rFID. ValueError if no image can be decoded, or a reconstruction is not finite.
    """
    placed = jax.device_put({"vae": params, "lpips": lpips}, sharding.replicated(mesh))
    compare = jax.jit(make_compare(vae, latents))
    compare = functools.partial(compare, placed, key=jax.random.key(seed))
    of_originals, of_recons = RunningGaussian(), RunningGaussian()
    compared, parts, failures, pairs = [], [], [], []
    batches = [records[first : first + batch_size].tolist() for first in range(0, len(records), batch_size)]
    blocks = loader.read_ahead(MapDataset.source(batches).map(functools.partial(read_images, source)), workers)
    with contextlib.closing(blocks), tqdm(total=len(records), unit="img", desc="reconstructing") as bar:
        for pixels, good, failed in blocks:
            bar.update(len(good) + len(failed))
            failures += failed
            if not len(good):
                continue
            recon, values = run_padded(compare, (pixels, good), batch_size, sharding.batch_sharding(mesh))
            if len(broken := good[~values.pop("finite")]):
                first = ", ".join(source.name(int(record)) for record in broken[:5])
                raise ValueError(
                    f"the reconstructions of {len(broken)} of {len(good)} images hold nan or infinity, first {first}; the "
                    "VAE's weights are damaged, or its training has diverged: take an earlier --step"
                )
            if features_fn is not None:
                of_originals.update(features_fn(pixels))
                of_recons.update(features_fn(recon))
            if sum(map(len, pairs)) < SHOWN:
                pairs.append(np.stack([pixels, recon], axis=1))
            compared.append(np.array(good))
            parts.append(values)
    if not compared:
        record, error = failures[0]
        raise ValueError(f"none of the {len(records)} images can be decoded, first {source.name(record)}: {error}")
    return Comparison(
        records=np.concatenate(compared),
        values={name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]},
        rfid=None if features_fn is None else frechet_distance(*of_originals.stats(), *of_recons.stats()),
        bad_records=failures,
        pairs=np.concatenate(pairs)[:SHOWN].reshape(-1, *pairs[0].shape[2:]),
    )


def mean_values(values: Mapping[str, Float[np.ndarray, " N"]], warn: Callable[[str], None]) -> dict[str, float | None]:
    """Computes means over images; of PSNR without images that came out exactly, whose PSNR is infinite (None if all did)."""
    means: dict[str, float | None] = {name: float(column.mean()) for name, column in values.items()}
    exact = np.isinf(values["psnr"])
    if exact.any():
        warn(f"{exact.sum()} of {len(exact)} images came out exactly: their PSNR is infinite, and left out of the mean")
        means["psnr"] = None if exact.all() else float(values["psnr"][~exact].mean())
    return means


def check_count(count: int, features: int, warn: Callable[[str], None]) -> None:
    """Warns of an rFID from fewer images than published ones, or than there are features."""
    if count <= features:
        warn(
            f"rFID from {count} images: the covariance of {features} features has rank {count - 1} at most, so the number "
            "says more about the number of images than about the tokenizer, and is too high; compare it with rFIDs of the same "
            f"images alone. Published ones are from {PUBLISHED_COUNT:,} images"
        )
    elif count < PUBLISHED_COUNT:
        warn(f"rFID from {count} images is higher than from {PUBLISHED_COUNT:,}, of which published ones are")


def worst_images(comparison: Comparison, source: Any) -> list[dict[str, Any]]:
    """Returns the images of lowest PSNR, worst first."""
    decibels = comparison.values["psnr"]
    order = [i for i in np.argsort(decibels, kind="stable")[:SHOWN] if np.isfinite(decibels[i])]
    records: Sequence[int] = [int(comparison.records[i]) for i in order]
    return [{"image": source.name(r), "record": r, "psnr": float(decibels[i])} for r, i in zip(records, order)]
