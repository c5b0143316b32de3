"""The figures of one table: which there are, and what is drawn in them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from launch.miniature import cknna, experiments, tables
from launch.miniature.figures import PICTURES, Spectra, draw_representation, draw_values
from launch.miniature.finished import Band, Runs, band, logged_band
from launch.miniature.picture_rows import LATENT_TITLES, compared_samples, draw_rows, latent_rows
from launch.miniature.style import Look, label_of, looks

# Figures of a table; of others, the values alone. What the opening figure shows is not shown again.
VALUES, SAMPLES, LATENTS, SPECTRA, CKNNA = "values", "samples", "latents", "spectra", "CKNNA"
FIGURES = {
    "main": (),
    "bottleneck": (VALUES, SPECTRA, CKNNA),
    "collapse": (VALUES, SAMPLES, LATENTS),
    "components": (VALUES, SAMPLES, LATENTS),
    "vaes": (VALUES, SAMPLES, LATENTS, SPECTRA),
    "drop-in": (VALUES, SAMPLES),
}
CHECKPOINT_CURVES = {"bottleneck": "cknna"}  # beside a table's values; of others, the Frechet distance
CURVE_TITLES = {"latents/std": "standard deviation of the latents in training", "sit/velocity": "velocity loss in training"}


def draw(name: str, table: tables.Table, runs_of: Runs, folder: Path) -> list[str]:
    """Draws the figures of one table; returns the files' names."""
    tokenizers, shown = tokenizers_of(table), FIGURES.get(name, (VALUES,))
    look_of = looks([*table.rows, *tokenizers])
    rows = {setting: runs_of[setting] for setting in table.rows if runs_of.get(setting)}
    compared = {setting: runs_of[setting] for setting in tokenizers if runs_of.get(setting)}
    written = []
    if VALUES in shown:
        written.append(f"{name}.png")
        values = {setting: [run.number(table.measures[0]) for run in runs] for setting, runs in rows.items()}
        values = {setting: numbers for setting, numbers in values.items() if not np.isnan(numbers).all()}
        curves, title = curves_of(name, table, rows)
        draw_values(folder / written[-1], look_of, values, tables.MEASURES[table.measures[0]].title, curves, title)
    samples, sample_titles = compared_samples(rows, look_of) if SAMPLES in shown else ([], [])
    if samples:
        written.append(f"{name}-samples.png")
        draw_rows(folder / written[-1], samples, sample_titles)
    latents = latent_rows(compared, look_of) if LATENTS in shown else []
    if len(latents) > 2:  # the pictures, and two VAEs or more
        written.append(f"{name}-latents.png")
        draw_rows(folder / written[-1], latents, LATENT_TITLES)
    spectra = spectra_of(compared, look_of) if SPECTRA in shown else {}
    points = cknna.checkpoints_of(table.rows, runs_of) if CKNNA in shown else {}
    if len(spectra) > 2 or points:
        written.append(f"{name}-representation.png")
        draw_representation(folder / written[-1], look_of, spectra, points)
    return written


def possible_names() -> list[str]:
    """Returns the names of all files that `draw` may write."""
    return [f"{name}{kind}.png" for name in experiments.TABLES for kind in ("", "-samples", "-latents", "-representation")]


def curves_of(name: str, table: tables.Table, rows: Runs) -> tuple[dict[str, Band], str]:
    """Returns the curves drawn beside a table's values, of the settings that have one, and their title.

    A metric of training is not shown of a VAE that is trained alone: that is before its latents are scaled. A measure of
    checkpoints is shown up to the last one whose Frechet distance stands in the table.
    """
    if table.curve:
        together = {setting: runs for setting, runs in rows.items() if experiments.SETTINGS[setting].job != "vae"}
        curves = {setting: logged_band(runs, table.curve) for setting, runs in together.items()}
        return {setting: curve for setting, curve in curves.items() if curve is not None}, CURVE_TITLES[table.curve]
    measure = CHECKPOINT_CURVES.get(name, "fid")
    last = max((run.steps[run.compared] for runs in rows.values() for run in runs if run.compared is not None), default=0)
    bands = {setting: band(runs, measure, last) for setting, runs in rows.items()}
    return {setting: curve for setting, curve in bands.items() if curve is not None}, tables.MEASURES[measure].title


def tokenizers_of(table: tables.Table) -> list[str]:
    """Returns the settings whose VAEs a table compares: those that its rows start from, and those that they train."""
    names = []
    for name in table.rows:
        setting = experiments.SETTINGS[experiments.Run(name).trained.setting]
        names += [setting.vae] * bool(setting.vae) + [name] * (setting.job != "ldm")
    return list(dict.fromkeys(names))


def spectra_of(runs_of: Runs, look_of: Mapping[str, Look]) -> Spectra:
    """Returns label -> (color, amplitudes) of the pictures and of the latents of every VAE, as far as they were measured."""
    spectra: dict = {}
    for setting, runs in runs_of.items():
        both = next((spectrum for run in runs if (spectrum := run.array("spectrum")) is not None), None)
        if both is not None:
            spectra.setdefault(PICTURES, ("#444444", both[0]))
            spectra[label_of(setting)] = look_of[setting].color, both[1]
    return spectra
