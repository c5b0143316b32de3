"""Numbers of an analysis."""

from typing import Any

import numpy as np
from jaxtyping import Float

from repae_jax import images
from repae_jax.analysis import channels, smoothness, spectrum
from repae_jax.analyze_latents.encoding import Model, read_batches
from repae_jax.training.checkpoint import fingerprint


def describe(model: Model, block: int, compared: set[str]) -> dict[str, Any]:
    """Computes the entry of a model in analysis.json, without CKNNA; numbers that collapsed latents do not define are nan.

    `block` is the side of the DCT's blocks; mean equivariance errors are over the transforms `compared`.
    """
    latents = model.latents
    stats, collapsed, shares = channels.channel_stats(latents), channels.collapsed(latents), channels.variance_shares(latents)
    amplitudes = spectrum.mean_amplitudes(latents, block)
    alive = latents[..., ~collapsed] / stats["std"][~collapsed]
    identity, *rows = model.equivariance
    rows = [row for row in rows if row["transform"] in compared]
    errors = {kind: [row["latent_error"] for row in rows if row["transform"].startswith(kind)] for kind in ("scale", "turn")}
    numbers = {
        "spatial_variance": smoothness.spatial_variance(latents), "total_variation": smoothness.total_variation(latents),
        "relative_spatial_variance": smoothness.spatial_variance(alive) if alive.size else np.nan,
        "relative_total_variation": smoothness.total_variation(alive) if alive.size else np.nan,
        "std": np.sqrt(np.mean(stats["std"] ** 2)), "collapsed_channels": int(collapsed.sum()),
        "effective_rank": channels.effective_rank(shares), "participation_ratio": channels.participation_ratio(shares),
        "pca3_share": shares[:3].sum(), "high_frequency_share": spectrum.high_frequency_share(amplitudes),
        "scale_error": np.mean(errors["scale"]) if errors["scale"] else np.nan, "rotation_error": np.mean(errors["turn"]),
        "psnr": identity["psnr"], "l1": identity["l1"],
    }  # fmt: skip
    return {
        "name": model.source.name, "source": model.source.path,
        "step": model.source.step if model.vae.step is None else model.vae.step,
        "vae_fingerprint": fingerprint(model.vae.params),
        "latent_shape": list(latents.shape[1:]), "collapsed": bool(collapsed.all()),
        "numbers": {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()},
        "spectrum": spectrum.relative_spectrum(amplitudes),
        "spectrum_of_ratios": spectrum.mean_ratios(latents, block).mean(axis=1),
        "channels": {**stats, "collapsed": collapsed, "variance_shares": shares},
        "equivariance": model.equivariance, "cknna": [],
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Converts nested values for JSON: arrays to lists, numbers that are not finite to None."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def spectrum_of_images(source: Any, records, batch_size: int, block: int) -> tuple[Float[np.ndarray, " K"], ...]:
    """Computes the `relative_spectrum` and the mean ratios of the images themselves."""
    sums = np.zeros((2, block**2, 3))
    for pixels, count in read_batches(source, records, batch_size):
        x = images.to_float(pixels[:count])
        sums += count * np.stack([spectrum.mean_amplitudes(x, block), spectrum.mean_ratios(x, block)])
    amplitudes, ratios = sums / len(records)
    return spectrum.relative_spectrum(amplitudes), ratios.mean(axis=1)
