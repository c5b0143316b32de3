"""The pictures of an analysis."""

import numpy as np

from repae_jax.analysis import channels
from repae_jax.evaluation import plots


def draw(folder, models, described, originals, rgb_spectrum):
    """Writes all pictures.

    Args:
      folder: where.
      models: of Model.
      described: what `describe` says of each, CKNNA added.
      originals: uint8 [n, H, W, 3], the first images.
      rgb_spectrum: [K].
    """
    rows = {"images": originals}
    for model, about in zip(models, described):
        name, latents = model.source.name, model.latents
        if about["collapsed"]:
            rows[name] = f"all {latents.shape[-1]} channels are collapsed: the latents are the same everywhere"
        elif latents.shape[-1] < 3:
            rows[name] = f"{latents.shape[-1]} channels: three principal components need three"
        else:
            share = about["numbers"]["pca3_share"]
            label = f"{name}: {share:.0%} of the variance in 3 of {latents.shape[-1]} dimensions"
            rows[label] = plots.pca_colors(latents)[: len(originals)]
    plots.show_rows(folder / "pca.png", rows)

    order = np.arange(len(rgb_spectrum))
    lines = {about["name"]: (order, about["spectrum"]) for about in described}
    plots.plot_lines(
        folder / "spectrum.png", {"blockwise DCT": lines}, "frequency, in zig-zag order",
        ["amplitude, relative to frequency 0"], log_scale=True, reference=("images (RGB)", order, rgb_spectrum),
    )  # fmt: skip

    panels = {}
    for model, about in zip(models, described):
        edges, shares = channels.histograms(model.latents)
        stats = about["channels"]
        dead = about["numbers"]["collapsed_channels"]
        title = about["name"] + (f" ({dead} of {len(shares)} channels collapsed)" if dead else "")
        quantiles = {"median": stats["median"], "low": stats["quantile_01"], "high": stats["quantile_99"]}
        panels[title] = {"edges": edges, "shares": shares, **quantiles}
    plots.plot_channels(folder / "channels.png", panels)

    by_name = [{row["transform"]: row for row in about["equivariance"]} for about in described]
    names = list(dict.fromkeys(name for rows in by_name for name in rows))

    def bars(field, transform_names):
        return {name: [rows.get(name, {}).get(field, np.nan) for rows in by_name] for name in transform_names}

    plots.plot_bars(
        folder / "equivariance.png",
        {
            "|E(Tx) - T E(x)| over the spread of E(Tx) (0: equivariant)": bars("latent_error", names[1:]),
            "PSNR in dB of D(T E(x)) against Tx": bars("psnr", names),
        },
        [about["name"] for about in described],
    )
    if any(about["cknna"] for about in described):
        _draw_cknna(folder / "cknna.png", described)


def _draw_cknna(path, described):
    styles = ("-", "--", ":", "-.")
    panels, titles = {}, []
    encoders = list(dict.fromkeys(row["encoder"] for about in described for row in about["cknna"]))
    timesteps = list(dict.fromkeys(row["timestep"] for about in described for row in about["cknna"]))
    for encoder in encoders:
        for formula, title in (("paper", "paper's formula"), ("platonic_code", "released code's formula")):
            lines = {}
            for number, about in enumerate(described):
                for row in about["cknna"]:
                    if row["encoder"] == encoder and row["measure"] == f"cknna_{formula}":
                        linestyle = styles[timesteps.index(row["timestep"]) % len(styles)]
                        style = {"color": f"C{number % 10}", "linestyle": linestyle}
                        at = np.arange(1, len(row["blocks"]) + 1)
                        lines[f"{about['name']}, t = {row['timestep']:g}"] = (at, row["blocks"], style)
            panels[f"{encoder}\n{title}"] = lines
            titles.append("CKNNA")
    plots.plot_lines(path, panels, "block", titles)
