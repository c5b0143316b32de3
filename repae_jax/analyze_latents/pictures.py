"""Pictures of an analysis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from repae_jax.analysis import channels
from repae_jax.analyze_latents.encoding import Model
from repae_jax.evaluation import plots


def draw(
    folder: epath.Path, models: Sequence[Model], descriptions: Sequence[dict[str, Any]],
    originals: UInt8[np.ndarray, "n H W 3"], rgb_spectrum: Float[np.ndarray, " K"],
) -> None:
    """Writes all pictures of models and `describe` of each, of the first images, and of their spectrum."""
    _draw_latents(folder / "pca.png", models, descriptions, originals)
    order = np.arange(len(rgb_spectrum))
    lines = {description["name"]: (order, description["spectrum"]) for description in descriptions}
    plots.plot_lines(
        folder / "spectrum.png", {"blockwise DCT": lines}, "frequency, in zig-zag order",
        ["amplitude, relative to frequency 0"], log_scale=True, reference=("images (RGB)", order, rgb_spectrum),
    )  # fmt: skip
    _draw_channels(folder / "channels.png", models, descriptions)
    _draw_equivariance(folder / "equivariance.png", descriptions)
    if any(description["cknna"] for description in descriptions):
        _draw_cknna(folder / "cknna.png", descriptions)


def _draw_latents(path, models, descriptions, originals):
    rows = {"images": originals}
    for model, description in zip(models, descriptions):
        name, latents = model.source.name, model.latents
        if description["collapsed"]:
            rows[name] = f"all {latents.shape[-1]} channels are collapsed: the latents are the same everywhere"
        elif latents.shape[-1] < 3:
            rows[name] = f"{latents.shape[-1]} channels: three principal components need three"
        else:
            share = description["numbers"]["pca3_share"]
            label = f"{name}: {share:.0%} of the variance in 3 of {latents.shape[-1]} dimensions"
            rows[label] = plots.pca_colors(latents)[: len(originals)]
    plots.show_rows(path, rows)


def _draw_channels(path, models, descriptions):
    panels = {}
    for model, description in zip(models, descriptions):
        (edges, shares), stats = channels.histograms(model.latents), description["channels"]
        collapsed = description["numbers"]["collapsed_channels"]
        title = description["name"] + (f" ({collapsed} of {len(shares)} channels collapsed)" if collapsed else "")
        quantiles = {"median": stats["median"], "low": stats["quantile_01"], "high": stats["quantile_99"]}
        panels[title] = {"edges": edges, "shares": shares, **quantiles}
    plots.plot_channels(path, panels)


def _draw_equivariance(path, descriptions):
    by_name = [{row["transform"]: row for row in description["equivariance"]} for description in descriptions]
    names = list(dict.fromkeys(name for rows in by_name for name in rows))

    def bars(field, transforms):
        return {name: [rows.get(name, {}).get(field, np.nan) for rows in by_name] for name in transforms}

    panels = {
        "|E(Tx) - T E(x)| over the spread of E(Tx) (0: equivariant)": bars("latent_error", names[1:]),
        "PSNR in dB of D(T E(x)) against Tx": bars("psnr", names),
    }
    plots.plot_bars(path, panels, [description["name"] for description in descriptions])


def _draw_cknna(path, descriptions):
    panels = {}
    rows = [(i, description["name"], row) for i, description in enumerate(descriptions) for row in description["cknna"]]
    encoders, timesteps = (list(dict.fromkeys(row[field] for *_, row in rows)) for field in ("encoder", "timestep"))
    for encoder in encoders:
        for formula, title in (("paper", "paper's formula"), ("platonic_code", "released code's formula")):
            lines = {}
            for i, name, row in rows:
                if row["encoder"] == encoder and row["measure"] == f"cknna_{formula}":
                    line_style = ("-", "--", ":", "-.")[timesteps.index(row["timestep"]) % 4]
                    style = {"color": f"C{i % 10}", "linestyle": line_style}
                    at = np.arange(1, len(row["blocks"]) + 1)
                    lines[f"{name}, t = {row['timestep']:g}"] = (at, row["blocks"], style)
            panels[f"{encoder}\n{title}"] = lines
    plots.plot_lines(path, panels, "block", ["CKNNA"] * len(panels))
