"""The comparisons of the miniature paper: settings, tables with settings as rows, and the published results.

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
from launch.miniature.scales import BLOCK, CKNNA_TIME, SAMPLERS, SDVAE_STD, SHOWN, Scale
from repae_jax.job.build import plain_config

PRESETS = {"repae": repae, "ldm": ldm, "vae": vae}
LONG = 2  # times the steps of all others that the headline trains; four times in the paper
EMOJI = {"data.source": "folder", "data.num_classes": 9, "data.flip_probability": 0.5}

# changes of settings: field -> value
NO_ENCODER = {"encoders": {}, "loss.vae.vf": 0.0}
NO_REPA = {"encoders": {}, "loss.sit.align": 0.0}
DIT = {
    "sit.learned_sigma": True, "diffusion.path": "ddpm", "sampling.sampler": "ancestral",
    "loss.sit.velocity": 0.0, "loss.sit.noise": 1.0, "loss.sit.bound": 1.0,
}  # fmt: skip
NO_BATCH_NORM = {"diffusion.norm_momentum": 0.0}
DIFFUSION_INTO_VAE = {"loss.vae.diffusion": 1.0}
NO_VAE_ALIGN = {"loss.vae.align": 0.0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a run for every seed."""

    label: str  # in the report
    job: str = "repae"  # one of PRESETS
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dotted config fields -> values, after the scale's
    scaled: tuple[str, ...] = ()  # names of Scale's sets of fields, which are applied after the changes
    vae: str = "vae"  # setting whose VAE of seed 0 it starts from; '' is from scratch
    encoder: str = "trained"  # a name in `Scale.encoder_steps`
    headline: bool = False  # goes on for LONG times the steps
    cheaper: str = ""  # name in `Scale.compute_ratio`: it goes on until it has cost as much as REPA-E
    longer: int = 1  # times the scale's steps

    @property
    def network(self) -> str:
        """'sit', 'dit', or '' for a VAE alone."""
        if self.job == "vae":
            return ""
        return "dit" if self.changes.get("diffusion.path") == "ddpm" else "sit"


SETTINGS = {
    "vae": Setting("VAE trained alone", "vae", NO_ENCODER, ("tokenizer",), vae=""),
    "sit": Setting("SiT", "ldm", NO_REPA, headline=True, cheaper="sit"),
    "repa": Setting("SiT + REPA", "ldm", headline=True, cheaper="repa"),
    "repa-e": Setting("REPA-E", headline=True),
    "naive": Setting("naive: diffusion loss into the VAE", changes={**DIFFUSION_INTO_VAE, **NO_BATCH_NORM, **NO_VAE_ALIGN}),
    "no-stop-gradient": Setting("without stop-gradient", changes=DIFFUSION_INTO_VAE),
    "no-batch-norm": Setting("without batch norm", changes=NO_BATCH_NORM),
    "no-gan": Setting("without GAN", changes={"loss.vae.gan": 0.0}),
    "shallow": Setting("REPA-E, aligned earlier", scaled=("shallow",)),
    "deep": Setting("REPA-E, aligned later", scaled=("deep",)),
    "repa-weak": Setting("SiT + REPA, weak encoder", "ldm", encoder="weak"),
    "repa-e-weak": Setting("REPA-E, weak encoder", encoder="weak"),
    "repa-smaller": Setting("smaller SiT + REPA", "ldm", scaled=("smaller",)),
    "repa-e-smaller": Setting("REPA-E, smaller SiT", scaled=("smaller",)),
    "repa-larger": Setting("larger SiT + REPA", "ldm", scaled=("larger",)),
    "repa-e-larger": Setting("REPA-E, larger SiT", scaled=("larger",)),
    "vae-other": Setting("other VAE trained alone", "vae", NO_ENCODER, ("other_vae", "tokenizer"), vae=""),
    "repa-other": Setting("SiT + REPA, other VAE", "ldm", scaled=("other_vae",), vae="vae-other"),
    "repa-e-other": Setting("REPA-E, other VAE", scaled=("other_vae",), vae="vae-other"),
    "scratch": Setting("REPA-E, VAE from scratch", vae=""),
    "e2e-sit": Setting("SiT on the E2E-VAE", "ldm", NO_REPA, vae="repa-e"),
    "e2e-repa": Setting("SiT + REPA on the E2E-VAE", "ldm", vae="repa-e"),
    "dit": Setting("DiT", "ldm", {**NO_REPA, **DIT}, longer=2),
    "dit-repa": Setting("DiT + REPA", "ldm", DIT, longer=2),
    "e2e-dit": Setting("DiT on the E2E-VAE", "ldm", {**NO_REPA, **DIT}, vae="repa-e", longer=2),
    "e2e-dit-repa": Setting("DiT + REPA on the E2E-VAE", "ldm", DIT, vae="repa-e", longer=2),
    "fast-vae": Setting("REPA-E, VAE as fast as SiT", changes={"optim.vae.learning_rate": 1e-3}),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """One column: title, digits after the decimal point, and whether more is better."""

    title: str
    digits: int
    more_is_better: bool = False


MEASURES = {
    "fid": Measure("Frechet distance", 1),
    "fid_long": Measure("Frechet distance after twice the steps", 1),
    "fid_equal_compute": Measure("Frechet distance at equal compute", 1),
    "fid_held_out": Measure("Frechet distance to held-out pictures", 1),
    "fid_of_reconstructions": Measure("… of reconstructions", 2),
    "label_accuracy": Measure("label accuracy", 3, True),
    "velocity": Measure("velocity loss", 3),
    "alignment": Measure("alignment loss", 3),
    "alignment_long": Measure("alignment loss after twice the steps", 3),
    "cknna": Measure("CKNNA of SiT", 3, True),
    "cknna_long": Measure("CKNNA of SiT after twice the steps", 3, True),
    "cknna_of_latents": Measure("CKNNA of the latents", 3, True),
    "l1": Measure("reconstruction L1", 4),
    "psnr": Measure("PSNR", 1, True),
    "spatial_variance": Measure("spatial variance", 3, True),
    "total_variation": Measure("total variation", 1),
    "drift": Measure("drift of the latents", 3),
    "high_frequencies": Measure("share of high frequencies", 3),
}
DEFAULT_MEASURES = ("fid", "label_accuracy", "velocity", "alignment", "cknna", "psnr")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published comparison of two settings: the first is the better one, or both are about equal."""

    first: str
    second: str
    published: str
    measure: str = "fid"
    alike: bool = False  # about equal


@dataclasses.dataclass(frozen=True)
class Table:
    """One experiment."""

    title: str
    question: str  # the comparison, and the source of the published numbers
    rows: Mapping[str, str]  # setting -> published number, '' if there is none
    claims: tuple[Claim, ...]
    expected: str  # and why: written before the first run
    measures: tuple[str, ...] = DEFAULT_MEASURES  # columns
    curve: str = ""  # metric of metrics.jsonl drawn over the steps, '' for none


IMAGENET = "Published: gFID on ImageNet 256 px, without guidance"
TABLES = {
    "main": Table(
        "SiT, REPA, REPA-E",
        "From the same VAE, at equal steps: as many as all other tables have, and twice as many; and at equal compute, when "
        f"the runs on a frozen VAE have cost what twice the steps of REPA-E cost. {IMAGENET}, SiT-XL/2 with SD-VAE, 400k "
        "steps. Published at 4M steps, twice the compute of REPA-E's 400k by the FLOP of a step: REPA 5.90.",
        {"sit": "17.20", "repa": "7.90", "repa-e": "4.07"},
        (
            Claim("repa", "sit", "7.90 against 17.20", "fid_long"),
            Claim("repa-e", "repa", "4.07 against 7.90", "fid_long"),
            Claim("repa-e", "repa", "12.83 against 19.40, at 100k steps"),
            Claim("repa-e", "repa", "4.07 against 5.90 at twice the compute", "fid_equal_compute"),
        ),
        "REPA before SiT, clearly: at so few steps SiT is far from done, and alignment helps early. REPA-E before REPA after "
        "twice the steps, because REPA's alignment saturates on this VAE; after once the steps about equal, as in the probe "
        "on another VAE, because REPA-E first pays for latents that move. At equal compute REPA, with 3.5 times the steps: so "
        "far from convergence, steps are worth more than better latents.",
        measures=(
            "fid", "fid_long", "fid_equal_compute", "fid_of_reconstructions", "label_accuracy", "velocity", "alignment", "psnr"
        ),
    ),
    "bottleneck": Table(
        "What the frozen VAE costs in alignment",
        "The paper's reason for training end to end: with a frozen VAE the alignment saturates. Alignment loss in training; "
        "CKNNA of held-out pictures, between the encoder and SiT after the aligned block at t = 0.5, and the latents "
        "themselves. Published: CKNNA of REPA about 0.42, of REPA-E more (read off figure 3).",
        {"sit": "", "repa": "CKNNA about 0.42", "repa-e": "more"},
        (
            Claim("repa", "sit", "REPA's figure 2", "cknna_long"),
            Claim("repa-e", "repa", "figure 3", "cknna_long"),
            Claim("repa-e", "repa", "figure 3", "alignment_long"),
        ),
        "REPA-E aligns better by at least 0.05, in both measures, and its latents themselves come closer to the encoder.",
        measures=("alignment", "alignment_long", "cknna", "cknna_long", "cknna_of_latents", "high_frequencies"),
    ),
    "collapse": Table(
        "Naive end-to-end training collapses the latents",
        "Latents of held-out pictures, not normalized. Naive: the diffusion loss reaches the VAE, there is no batch norm, and "
        "REPA trains SiT alone. Published: spatial variance and total variation of SD-VAE's latents (appendix A).",
        {"vae": "17.06 / 6627", "naive": "0.02 / 89.8", "repa-e": "18.02 / 5516"},
        (
            Claim("vae", "naive", "17.06 against 0.02", "spatial_variance"),
            Claim("vae", "repa-e", "17.06 and 18.02", "spatial_variance", alike=True),
            Claim("naive", "vae", "89.8 against 6627", "total_variation"),
            Claim("repa-e", "vae", "5516 against 6627", "total_variation"),
        ),
        "The naive run's variance falls by more than ten times within the run, as on the digits before. REPA-E keeps it "
        "within a third: KL pulls as strongly as published.",
        measures=("spatial_variance", "total_variation", "high_frequencies", "l1", "psnr", "velocity", "fid"),
        curve="latents/std",
    ),
    "components": Table(
        "What REPA-E is made of",
        f"REPA-E with one part taken away. {IMAGENET}, SiT-L/2, 100k steps.",
        {"repa-e": "16.3", "no-stop-gradient": "444", "no-batch-norm": "18.1", "no-gan": "19.2"},
        (
            Claim("repa-e", "no-stop-gradient", "16.3 against 444"),
            Claim("repa-e", "no-batch-norm", "16.3 against 18.1"),
            Claim("repa-e", "no-gan", "16.3 against 19.2"),
        ),
        "Without stop-gradient far worse: latents become easy to denoise and empty. Without batch norm worse: the scale drifts "
        "from the statistics of the beginning. Without GAN undecided: there is no LPIPS here, and the GAN's share is small.",
        measures=(*DEFAULT_MEASURES, "spatial_variance"),
    ),
    "depth": Table(
        "Alignment depth",
        f"The block after which SiT is compared with the encoder. {IMAGENET}, SiT-L/2, 100k steps, after block 6, 8 or 10 of "
        "24.",
        {"shallow": "16.4", "repa-e": "16.3", "deep": "16.2"},
        (Claim("shallow", "repa-e", "16.4 and 16.3", alike=True), Claim("deep", "repa-e", "16.2 and 16.3", alike=True)),
        "Undecided within 10 %: of six blocks, one more or less is a larger change than 6 or 10 of 24.",
    ),
    "encoders": Table(
        "Target encoders",
        f"One architecture, of two qualities: a short training, and the whole. {IMAGENET}, SiT-L/2, 100k "
        "steps: REPA-E 16.0 with DINOv2-L, 16.3 with DINOv2-B, 16.5 with I-JEPA-H, 23.4 with CLIP-L; REPA with DINOv2-B 24.1.",
        {"repa-weak": "", "repa": "24.1", "repa-e-weak": "", "repa-e": "16.3"},
        (
            Claim("repa-e", "repa", "16.3 against 24.1"),
            Claim("repa-e-weak", "repa-weak", "better than REPA with every encoder"),
            Claim("repa-e", "repa-e-weak", "the better encoder gives the better model, mostly"),
        ),
        "The better the encoder, the better both; a random one does not help REPA-E, whose VAE learns to please it at the "
        "cost of its latents.",
    ),
    "sizes": Table(
        "Sizes of SiT",
        f"Half and one and a half times the width. {IMAGENET}, B/2, L/2 at 100k steps; XL/2 at 100k: 19.40 against 12.83.",
        {
            "repa-smaller": "49.5", "repa-e-smaller": "34.8", "repa": "24.1", "repa-e": "16.3", "repa-larger": "19.4",
            "repa-e-larger": "12.83",
        },
        (
            Claim("repa-e-smaller", "repa-smaller", "34.8 against 49.5"),
            Claim("repa-e", "repa", "16.3 against 24.1"),
            Claim("repa-e-larger", "repa-larger", "12.83 against 19.40"),
        ),
        "REPA-E before REPA at every size, as published.",
    ),
    "vaes": Table(
        "Another VAE to begin with, and none",
        f"The other one has fewer channels. {IMAGENET}: from IN-VAE 12.7 against REPA's 22.7 (L/1, 100k steps); from random "
        "weights 4.34, from SD-VAE 4.07 (XL/2, 400k steps).",
        {"repa": "7.90", "repa-e": "4.07", "repa-other": "22.7", "repa-e-other": "12.7", "scratch": "4.34"},
        (
            Claim("repa-e-other", "repa-other", "12.7 against 22.7"),
            Claim("repa-e", "scratch", "4.07 against 4.34"),
            Claim("scratch", "repa", "4.34 against 7.90"),
        ),
        "REPA-E before REPA from the other VAE, too. From scratch worse than from the trained VAE: 1,200 steps at a tenth of "
        "the VAE's own learning rate are too few to learn to reconstruct; the paper has 400k.",
        measures=(*DEFAULT_MEASURES, "fid_of_reconstructions"),
    ),
    "drop-in": Table(
        "The E2E-VAE for others",
        "A new SiT or DiT on the frozen VAE that REPA-E has trained (seed 0), and on the one that it began with. DiT trains "
        f"twice as long. {IMAGENET}, XL/1, 80 epochs, on E2E-VAVAE and on the VA-VAE that it began with (table 8). "
        "DiT's loss is the noise's.",
        {
            "sit": "5.93", "e2e-sit": "5.26", "repa": "4.88", "e2e-repa": "3.46", "dit": "6.74", "e2e-dit": "6.75",
            "dit-repa": "4.71", "e2e-dit-repa": "4.20",
        },
        (
            Claim("e2e-sit", "sit", "5.26 against 5.93"),
            Claim("e2e-repa", "repa", "3.46 against 4.88"),
            Claim("e2e-repa", "e2e-sit", "3.46 against 5.26"),
            Claim("e2e-dit-repa", "e2e-dit", "4.20 against 6.75"),
            Claim("e2e-dit", "dit", "6.75 and 6.74", alike=True),
            Claim("e2e-dit-repa", "dit-repa", "4.20 against 4.71"),
        ),
        "SiT on the E2E-VAE before SiT on the VAE it began with, at a fraction of REPA-E's cost: its latents are easier. The "
        "same with REPA and for DiT, with more noise.",
    ),
    "rate": Table(
        "How fast the VAE may learn",
        "REPA-E with the VAE's learning rate as high as SiT's, as published; elsewhere it is a tenth. The drift is the share "
        "of the variance of normalized latents of held-out pictures that is lost in the second half of the steps. No published "
        "comparison: the row varies what the miniature had to choose.",
        {"repa": "", "repa-e": "", "fast-vae": ""},
        (),
        "With a VAE as fast as SiT: no better than REPA, as on the digits before, because SiT follows latents that move.",
        measures=(*DEFAULT_MEASURES, "drift", "spatial_variance"),
        curve="latents/std",
    ),
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
    def source(self) -> "Run | None":
        """The run whose VAE it starts from; None for a VAE from scratch."""
        name = SETTINGS[self.setting].vae
        return Run(name) if name else None


def runs_per_setting(scale: Scale, setting: str, seeds: int | None = None) -> int:
    """Returns the number of runs of a row: `seeds`, by default the scale's; one for a VAE that others start from."""
    return 1 if SETTINGS[setting].job == "vae" else seeds or scale.seeds


def runs_of(scale: Scale, names: Iterable[str], seeds: int | None = None) -> list[Run]:
    """Returns the runs of the named tables, every run once and after the one that it needs; `seeds` as in `runs_per_setting`.

    All first seeds come before the second ones, so that an interrupted program has all settings.
    """
    rows = [setting for name in names for setting in TABLES[name].rows]
    needed = {Run(setting, seed) for setting in rows for seed in range(runs_per_setting(scale, setting, seeds))}
    for run in list(needed):
        while run.source:
            run = run.source
            needed.add(run)
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
        "samples": scale.samples, "sampler": SAMPLERS.get(setting.network), "steps": evaluated_steps(scale, setting),
        "cknna_time": CKNNA_TIME, "block": BLOCK, "shown": SHOWN,
    }  # fmt: skip
    return {
        "scale": scale.name,
        "setting": run.setting,
        "config": plain(config_of(scale, run)),
        "latent_std": SDVAE_STD if setting.job == "vae" else None,
        "evaluation": evaluation,
        "judge": classifier_description(scale),
        "encoder": encoder_description(scale, "trained"),
    }


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
    return json.loads(json.dumps(plain_config(config)))


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
