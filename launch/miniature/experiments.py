"""All experiments, the paper's and those beyond it: the runs that they need, each with its config, description and folder.

Nothing runs here.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from checkpoints_tools.vae import DISCRIMINATOR
from configs import common, ldm, repae, vae
from launch import emoji, pictures, small_networks
from launch.miniature import beyond, tables
from launch.miniature.scales import BLOCK, CKNNA_TIME, SAMPLERS, SDVAE_STD, SHOWN, Scale
from launch.miniature.tables import LONG, Setting
from repae_jax.job.build import plain_config
from repae_jax.job.config import read_config

PRESETS = {"repae": repae, "ldm": ldm, "vae": vae}
EMOJI = {"data.source": "folder", "data.num_classes": 9, "data.flip_probability": 0.5}
SETTINGS = {**tables.SETTINGS, **beyond.SETTINGS}
TABLES = {**tables.TABLES, **beyond.TABLES}
# Fields that have a default, and stand in every description, because those of the first runs have them.
DESCRIBED = {
    "deterministic", "attention", "sampler", "steps", "guidance_scale", "guidance_low", "guidance_high", "guidance_channels",
    "precision",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One setting with one seed."""

    setting: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Its task's name."""
        return f"{self.setting} seed {self.seed}"

    @property
    def trained(self) -> "Run":
        """The run whose checkpoints are evaluated: itself, or the one that it samples in another way."""
        return Run(SETTINGS[self.setting].samples_of or self.setting, self.seed)

    @property
    def source(self) -> "Run | None":
        """The run whose VAE it starts from; None for a VAE from scratch."""
        name = SETTINGS[self.trained.setting].vae
        return Run(name) if name else None

    @property
    def needs(self) -> "list[Run]":
        """The runs that must be done before."""
        return [run for run in (self.source, self.trained) if run not in (None, self)]


def runs_per_setting(scale: Scale, setting: str, seeds: int | None = None) -> int:
    """Returns the number of runs of a row: `seeds`, by default the scale's; one for a VAE that others start from."""
    if SETTINGS[setting].job == "vae":
        return 1
    return seeds or (scale.main_seeds if setting in tables.TABLES["main"].rows else scale.seeds)


def runs_of(scale: Scale, names: Iterable[str], seeds: int | None = None) -> list[Run]:
    """Returns the runs of the named tables, every run once and after the one that it needs; `seeds` as in `runs_per_setting`.

    All first seeds come before the second ones, so that an interrupted program has all settings.
    """
    rows = [setting for name in names for setting in TABLES[name].rows]
    needed = {Run(setting, seed) for setting in rows for seed in range(runs_per_setting(scale, setting, seeds))}
    waiting = list(needed)
    while waiting:
        needs = waiting.pop().needs
        needed.update(needs)
        waiting += needs
    order = list(SETTINGS)
    return sorted(needed, key=lambda run: (run.seed, order.index(run.setting)))


def equal_steps(scale: Scale, setting: Setting) -> int:
    """Returns the step at which a run is compared with all others."""
    return scale.vae_steps if setting.job == "vae" else scale.steps * setting.longer


def evaluated_steps(scale: Scale, setting: Setting) -> list[int]:
    """Returns the steps whose checkpoints are evaluated; the last one is where the run ends.

    They are halfway and the end. A run of the headline goes on for LONG times the steps, and on a frozen VAE until it has cost
    what REPA-E costs; it is evaluated at quarters and halves of the steps, and when it has cost what REPA-E costs then.
    """
    steps = equal_steps(scale, setting)
    if not setting.headline:
        return [steps // 2, steps]
    chosen = {steps // 4 * quarters for quarters in (1, 2, 3, 4, 6, 4 * LONG)}
    if setting.cheaper:
        ratio = scale.compute_ratio[setting.cheaper]
        chosen |= {math.floor(ratio * quarters + 0.5) * steps // 4 for quarters in (2, 4, 4 * LONG)}
    return sorted(chosen)


def config_of(scale: Scale, run: Run, workdir: Path = Path(), images: Path = Path()) -> ConfigDict:
    """Returns the config of a run; `workdir` is the folder with all runs and encoders, `images` that of prepared pictures."""
    run = run.trained
    setting = SETTINGS[run.setting]
    config = PRESETS[setting.job].get_config("digits").unlock()
    source = {"data.source": "digits"} if scale.pictures == "digits" else EMOJI
    every = equal_steps(scale, setting) // (4 if setting.headline else 2)
    changes = {
        **source, "data.image_size": scale.image_size, "data.batch_size": scale.batch_size, "ema_decay": scale.ema_decay,
        "log.every": 20,
        **scale.fields, **setting.changes, "seed": run.seed, "steps": evaluated_steps(scale, setting)[-1],
        "hooks.samples_every": 0, "hooks.reconstructions_every": 0, "checkpoint.every": every, "checkpoint.keep_every": every,
    }  # fmt: skip
    for name in setting.scaled:
        changes |= getattr(scale, name)
    for name in common.change(config, changes):  # a job has no fields of networks that it does not train
        if name in setting.changes:
            raise ValueError(f"setting {run.setting!r} changes {name}, which the config of job {setting.job!r} does not have")
    if scale.pictures != "digits":
        config.data.options.path = str(images / "train")
    if "encoders" in config and config.encoders:
        weights = str(workdir / encoder_folder(scale, setting.encoder))
        config.encoders.target.update(
            weights=weights, image_size=scale.image_size, architecture=copy.deepcopy(dict(scale.encoder))
        )
    if run.source:
        files = vae_files(workdir / folder_name(scale, run.source))
        config.init.update(vae=str(files["vae"]), latent_stats=str(files["vae"]))
        if config.loss.get("vae", {}).get("gan"):
            config.init.disc = str(files["disc"])
    return config.lock()


def default_workdir(scale: Scale) -> Path:
    """Returns the folder of a scale's runs and encoders unless another one is chosen."""
    return Path("runs/miniature", scale.name).absolute()


def pictures_folder(scale: Scale, workdir: Path) -> Path:
    """Returns the folder in the work folder in which emoji are prepared."""
    return workdir / f"emoji-{scale.image_size}"


def vae_files(folder: Path) -> dict[str, Path]:
    """Returns paths of a run's VAE, with its latent statistics, and of its discriminator, for runs that start from them."""
    return {"vae": folder / "vae", "disc": folder / "vae" / DISCRIMINATOR}


def description(scale: Scale, run: Run) -> dict[str, Any]:
    """Returns all that a run's result depends on as plain values, independent of the work folder."""
    setting = SETTINGS[run.setting]
    evaluation = {
        "samples": scale.samples, "sampler": sampler_of(setting), "steps": evaluated_steps(scale, setting),
        "cknna_time": CKNNA_TIME, "block": BLOCK, "shown": SHOWN,
    }  # fmt: skip
    return {
        "scale": scale.name,
        "setting": run.setting,
        "config": json_values(_described(read_config(config_of(scale, run)))),
        "latent_std": SDVAE_STD if setting.job == "vae" else None,
        "evaluation": evaluation,
        "judge": classifier_description(scale),
        "encoder": encoder_description(scale, "trained"),
    }


def sampler_of(setting: Setting) -> dict[str, Any] | None:
    """Returns the fields of `Sampling` by which a setting is evaluated; None for a VAE alone."""
    return {**SAMPLERS[setting.network], **setting.sampling} if setting.network else None


def picture_description(scale: Scale) -> dict[str, Any]:
    """Returns what decides which pictures there are."""
    return {"name": scale.pictures, "size": scale.image_size, **(emoji.CONTENT if scale.pictures == "emoji" else {})}


def classifier_description(scale: Scale) -> dict[str, Any]:
    """Returns all that the classifier depends on."""
    recipe, widths = (part[scale.pictures] for part in (small_networks.CLASSIFIER_RECIPES, small_networks.CONVOLUTIONS))
    return {"pictures": picture_description(scale), "recipe": dataclasses.asdict(recipe), "widths": list(widths)}


def encoder_description(scale: Scale, quality: str) -> dict[str, Any]:
    """Returns all that an encoder depends on."""
    recipe = encoder_recipe(scale, quality)
    return {
        "pictures": picture_description(scale), "recipe": dataclasses.asdict(recipe), "architecture": dict(scale.encoder)
    }  # fmt: skip


def encoder_recipe(scale: Scale, quality: str) -> small_networks.Recipe:
    """Returns how an encoder of a quality is trained."""
    return dataclasses.replace(small_networks.ENCODER_RECIPES[scale.pictures], steps=scale.encoder_steps[quality])


def plain(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON reads it."""
    return json_values(plain_config(config))


def json_values(content: Any) -> Any:
    """Returns a mapping as JSON reads it: tuples are lists."""
    return json.loads(json.dumps(content))


def _described(part: Any) -> Any:
    """Returns a config's section as plain values, without fields that came later and have their default, which changes nothing.

    So a field that is new in the configs leaves descriptions, and folders, of runs without it as they were.
    """
    if isinstance(part, Mapping):
        return {name: _described(value) for name, value in part.items()}
    if not dataclasses.is_dataclass(part):
        return part
    values = {field: getattr(part, field.name) for field in dataclasses.fields(part)}
    kept = {field.name: value for field, value in values.items() if field.name in DESCRIBED or value != field.default}
    return {name: _described(value) for name, value in kept.items()}


def encoder_folder(scale: Scale, quality: str) -> str:
    """Returns an encoder's folder in the work folder."""
    return f"encoder-{scale.encoder_steps[quality]}-steps"


def is_source(run: Run) -> bool:
    """Returns True if other runs start from this run's VAE."""
    return not run.seed and any(setting.vae == run.setting for setting in SETTINGS.values())


@functools.cache
def folder_name(scale: Scale, run: Run) -> str:
    """Returns the name of a run's folder, which ends in a hash of the description: another config is another run."""
    content = json.dumps(description(scale, run), sort_keys=True)
    return f"{run.setting}-seed{run.seed}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def load_pictures(scale: Scale, images: str | Path) -> pictures.Pictures:
    """Returns the scale's pictures; `images` is the folder of prepared ones, unused for digits."""
    return pictures.digits(scale.image_size) if scale.pictures == "digits" else pictures.emoji(images)
