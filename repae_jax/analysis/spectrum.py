"""Spectrum of latents or images: amplitudes of the blockwise 2D DCT in zig-zag order, which show how fast frequencies fall off.

Reference: Skorokhodov et al., "Improving the diffusability of autoencoders" (arXiv 2502.14831): A_uv = |D_uv / D_00|, averaged.
Latents have no offset as images have, so D_00 of a block can be about 0, and the average of such ratios is ruled by a few
blocks (for a Gaussian D_00 it does not exist). `relative_spectrum` therefore divides averages; `mean_ratios` averages ratios.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy import fft


def zigzag(block: int) -> Int[np.ndarray, "block**2 2"]:
    """Returns the frequencies (u, v) of a block in JPEG's order, lowest first."""
    pairs = [(u, v) for u in range(block) for v in range(block)]
    # Diagonals of equal u + v are walked through in turns from either end.
    return np.array(sorted(pairs, key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1])))


def mean_amplitudes(x: Float[np.ndarray, "B h w C"], block: int) -> Float[np.ndarray, "block**2 C"]:
    """Computes |D_uv| of the orthonormal DCT-II in the order of `zigzag`, averaged over blocks and images, in float64.

    Rows and columns beyond the last whole block are left out. ValueError if no block fits.
    """
    return np.abs(_blocks(x, block)).mean(axis=0)


def mean_ratios(x: Float[np.ndarray, "B h w C"], block: int) -> Float[np.ndarray, "block**2 C"]:
    """Computes |D_uv / D_00|, averaged as `mean_amplitudes` without blocks whose D_00 is exactly 0; nan if none is left."""
    amplitudes = np.abs(_blocks(x, block))
    usable = amplitudes[:, :1] > 0
    ratios = np.divide(amplitudes, amplitudes[:, :1], out=np.zeros_like(amplitudes), where=usable)
    count = usable.sum(axis=0)
    return np.where(count > 0, ratios.sum(axis=0) / np.maximum(count, 1), np.nan)


def relative_spectrum(amplitudes: Float[np.ndarray, "K C"]) -> Float[np.ndarray, " K"]:
    """Divides `mean_amplitudes` by their first row, averaged over channels that are not 0 everywhere; nan if all are."""
    usable = amplitudes[0] > 0
    if not usable.any():
        return np.full(len(amplitudes), np.nan)
    return (amplitudes[:, usable] / amplitudes[0, usable]).mean(axis=1)


def high_frequency_share(amplitudes: Float[np.ndarray, "K C"]) -> float:
    """Computes the share of the upper half of the order in the amplitudes without the first, summed over channels."""
    total = amplitudes[1:].sum()
    return float(amplitudes[len(amplitudes) // 2 :].sum() / total) if total > 0 else np.nan


def _blocks(x: Float[np.ndarray, "B h w C"], block: int) -> Float[np.ndarray, "N block**2 C"]:
    """Returns the DCT coefficients of all blocks, in float64."""
    x = np.asarray(x, np.float64)
    if x.ndim != 4 or not x.size or not 1 <= block <= min(x.shape[1:3]):
        raise ValueError(
            f"blocks of {block} x {block} in shape {list(x.shape)}; allowed: [B, h, w, C], and a block of at least 1 and at "
            "most h and w"
        )
    b, h, w, c = x.shape
    rows, columns = h // block, w // block
    whole = x[:, : rows * block, : columns * block].reshape(b, rows, block, columns, block, c)
    coefficients = fft.dctn(whole, axes=(2, 4), norm="ortho").transpose(0, 1, 3, 2, 4, 5).reshape(-1, block, block, c)
    u, v = zigzag(block).T
    return coefficients[:, u, v]
