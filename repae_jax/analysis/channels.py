"""Statistics of each latent channel, and how many channels count: moments, quantiles, histograms, effective dimensions."""

import numpy as np
from jaxtyping import Bool, Float

QUANTILES = {"quantile_01": 0.01, "median": 0.5, "quantile_99": 0.99}


def channel_stats(latents: Float[np.ndarray, "B h w C"]) -> dict[str, Float[np.ndarray, " C"]]:
    """Computes statistics of each channel over all positions of all images, in float64; ValueError for other shapes.

    They are 'mean', 'std' (biased), 'min', 'max', the names of QUANTILES, 'skewness' and 'kurtosis' (excess: 0 for a Gaussian).
    The last two are nan for collapsed channels.
    """
    tokens = _tokens(latents)
    mean, std = tokens.mean(axis=0), tokens.std(axis=0)
    stats = {"mean": mean, "std": std, "min": tokens.min(axis=0), "max": tokens.max(axis=0)}
    stats |= dict(zip(QUANTILES, np.quantile(tokens, list(QUANTILES.values()), axis=0)))
    scaled = (tokens - mean) / np.where(_is_collapsed(tokens), np.nan, std)
    return stats | {"skewness": (scaled**3).mean(axis=0), "kurtosis": (scaled**4).mean(axis=0) - 3}


def collapsed(latents: Float[np.ndarray, "B h w C"]) -> Bool[np.ndarray, " C"]:
    """Tells which channels hold the same number everywhere, up to float32's rounding."""
    return _is_collapsed(_tokens(latents))


def _is_collapsed(tokens: Float[np.ndarray, "N C"]) -> Bool[np.ndarray, " C"]:
    return tokens.std(axis=0) <= 1e-6 * np.maximum(np.abs(tokens.mean(axis=0)), 1)


def variance_shares(latents: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, " C"]:
    """Computes the shares of the variance along the principal axes of the channels, largest first; nan if all are collapsed."""
    tokens = _tokens(latents)
    centered = tokens - tokens.mean(axis=0)
    variances = np.linalg.eigvalsh(centered.T @ centered / len(tokens))[::-1].clip(min=0)
    if _is_collapsed(tokens).all():
        return np.full(len(variances), np.nan)
    return variances / variances.sum()


def effective_rank(shares: Float[np.ndarray, " C"]) -> float:
    """Computes exp of the entropy of `variance_shares`: C if all axes vary alike, 1 if one does alone.

    Reference: Roy and Vetterli, "The effective rank", EUSIPCO 2007, of the covariance's eigenvalues.
    """
    if np.isnan(shares).any():
        return np.nan
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def participation_ratio(shares: Float[np.ndarray, " C"]) -> float:
    """Computes 1 / sum of the squared `variance_shares`: as `effective_rank`, but axes that vary little count less."""
    return float(1 / np.square(shares).sum())


def histograms(
    latents: Float[np.ndarray, "B h w C"], bins: int = 80
) -> tuple[Float[np.ndarray, " bins+1"], Float[np.ndarray, "C bins"]]:
    """Computes the histogram of each channel: edges of the bins, the same for all, and shares of the channel's values per bin.

    They lie between the 0.05 % and 99.95 % quantiles of all channels together; values outside are left out.
    """
    tokens = _tokens(latents)
    low, high = np.quantile(tokens, [0.0005, 0.9995])
    edges = np.linspace(low, high, bins + 1) if high > low else np.linspace(low - 0.5, low + 0.5, bins + 1)
    counts = [np.histogram(tokens[:, channel], edges)[0] for channel in range(tokens.shape[1])]
    return edges, np.array(counts) / len(tokens)


def _tokens(latents: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, "N C"]:
    latents = np.asarray(latents, np.float64)
    if latents.ndim != 4 or not latents.size:
        raise ValueError(f"latents have shape {list(latents.shape)}; allowed: [B, h, w, C], none of them 0")
    return latents.reshape(-1, latents.shape[-1])
