"""The comparisons of the miniature paper: settings, tables with settings as rows, and the published results.

Nothing runs here.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from checkpoints_tools.vae import DISCRIMINATOR
from configs import common, ldm, repae, vae
from launch.quickstart import digits_models
from repae_jax.files import RANDOM
from repae_jax.job.build import plain_config

STEPS = 800  # training steps of every SiT, alone or together with a VAE
VAE_STEPS = 1200  # training steps of the VAE that the others start from
PRESETS = {"repae": repae, "ldm": ldm, "vae": vae}
SIZE = {  # smaller than configs/repae.py:digits, so that some sixty runs take an hour on two cores
    "data.batch_size": 32,
    "vae.channels": 8, "vae.channel_multipliers": (1, 2, 4), "vae.norm_groups": 4,
    "sit.hidden_size": 64, "sit.num_heads": 2, "sit.projector_dim": 128, "sit.unroll": 1,
    "disc.channels": 16,
}  # fmt: skip
ENCODERS = {RANDOM: None, "weak": 40, "trained": digits_models.ENCODER_STEPS}  # steps of training; None: none
SAMPLES = 1000  # samples of a Frechet distance
SAMPLERS = {"sit": {"sampler": "heun", "steps": 10}, "dit": {"sampler": "ancestral", "steps": 25}}

# changes of settings: field -> value
NO_REPA = {"encoders": {}, "loss.sit.align": 0.0}
DIT = {
    "sit.learned_sigma": True, "diffusion.path": "ddpm", "sampling.sampler": "ancestral",
    "loss.sit.velocity": 0.0, "loss.sit.noise": 1.0, "loss.sit.bound": 1.0,
}  # fmt: skip
NO_BATCH_NORM = {"diffusion.norm_momentum": 0.0}
DIFFUSION_INTO_VAE = {"loss.vae.diffusion": 1.0}
NO_VAE_ALIGN = {"loss.vae.align": 0.0}
NO_REGULARIZATION = {f"loss.vae.{term}": 0.0 for term in ("l1", "l2", "lpips", "kl", "gan")}
KL_AS_STRONG = 1e-6 * (32 * 32 * 4) / (4 * 4 * 8)  # KL is a sum over the latents of an image


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a run for every seed."""

    label: str  # in RESULTS.md
    job: str = "repae"  # one of PRESETS
    changes: Mapping = dataclasses.field(default_factory=dict)  # dotted config fields -> values, after the preset and SIZE
    vae: str = "vae"  # setting whose VAE of seed 0 it starts from; '' is from scratch
    encoder: str = "trained"  # one of ENCODERS

    @property
    def network(self):
        """'sit', 'dit', or '' for a VAE alone."""
        if self.job == "vae":
            return ""
        return "dit" if self.changes.get("diffusion.path") == "ddpm" else "sit"


SETTINGS = {
    "vae": Setting("VAE by itself", "vae", {"encoders": {}, "loss.vae.vf": 0.0}, vae=""),
    "sit": Setting("SiT", "ldm", NO_REPA),
    "repa": Setting("SiT + REPA", "ldm"),
    "repa-e": Setting("REPA-E"),
    "naive": Setting("naive: diffusion loss into the VAE", changes={**DIFFUSION_INTO_VAE, **NO_BATCH_NORM, **NO_VAE_ALIGN}),
    "no-stop-gradient": Setting("without stop-gradient", changes=DIFFUSION_INTO_VAE),
    "no-batch-norm": Setting("without batch norm", changes=NO_BATCH_NORM),
    "no-gan": Setting("without GAN", changes={"loss.vae.gan": 0.0}),
    "no-regularisation": Setting("without L_REG", changes=NO_REGULARIZATION),
    "repa-e-kl": Setting("REPA-E, KL as strong as published", changes={"loss.vae.kl": KL_AS_STRONG}),
    "no-vae-align": Setting("control: VAE without alignment", changes=NO_VAE_ALIGN),
    "depth-1": Setting("REPA-E, aligned after block 1", changes={"sit.encoder_depth": 1}),
    "depth-4": Setting("REPA-E, aligned after block 4", changes={"sit.encoder_depth": 4}),
    "repa-random": Setting("SiT + REPA, random encoder", "ldm", encoder=RANDOM),
    "repa-weak": Setting("SiT + REPA, weak encoder", "ldm", encoder="weak"),
    "repa-e-random": Setting("REPA-E, random encoder", encoder=RANDOM),
    "repa-e-weak": Setting("REPA-E, weak encoder", encoder="weak"),
    "scratch": Setting("REPA-E, VAE from scratch", vae=""),
    "dit": Setting("DiT", "ldm", {**NO_REPA, **DIT}),
    "dit-repa": Setting("DiT + REPA", "ldm", DIT),
    "e2e-sit": Setting("SiT on the E2E-VAE", "ldm", NO_REPA, vae="repa-e"),
    "e2e-repa": Setting("SiT + REPA on the E2E-VAE", "ldm", vae="repa-e"),
    "e2e-dit": Setting("DiT on the E2E-VAE", "ldm", {**NO_REPA, **DIT}, vae="repa-e"),
    "e2e-dit-repa": Setting("DiT + REPA on the E2E-VAE", "ldm", DIT, vae="repa-e"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """One column: title, digits after the decimal point, and whether more is better."""

    title: str
    digits: int
    more_is_better: bool = False


MEASURES = {
    "fid": Measure("Frechet distance", 1),
    "fid_halfway": Measure("… after half of the steps", 1),
    "fid_of_reconstructions": Measure("… of reconstructions", 2),
    "label_accuracy": Measure("label accuracy", 3, True),
    "velocity": Measure("velocity loss", 3),
    "alignment": Measure("alignment loss", 3),
    "l1": Measure("reconstruction L1", 4),
    "psnr": Measure("PSNR", 1, True),
    "spatial_variance": Measure("spatial variance", 4, True),
    "total_variation": Measure("total variation", 2),
}
DEFAULT_MEASURES = ("fid", "fid_halfway", "fid_of_reconstructions", "label_accuracy", "velocity", "alignment", "l1")


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
    measures: tuple[str, ...] = DEFAULT_MEASURES  # columns
    seeds: int = 3  # runs of each row, but one of the VAE alone
    curve: str = ""  # metric of metrics.jsonl drawn over the steps, '' for none


IMAGENET = "Published: gFID on ImageNet 256 px, without guidance"
TABLES = {
    "main": Table(
        "SiT, REPA, REPA-E",
        f"All three train the same number of steps, from the same VAE. {IMAGENET}, SiT-XL/2 with SD-VAE, 400k steps.",
        {"sit": "17.20", "repa": "7.90", "repa-e": "4.07"},
        (Claim("repa", "sit", "7.90 against 17.20"), Claim("repa-e", "repa", "4.07 against 7.90")),
    ),
    "collapse": Table(
        "Naive end-to-end training collapses the latents",
        "Latents of held-out digits, not normalized. Naive: the diffusion loss reaches the VAE, there is no batch norm, and "
        "REPA trains SiT alone. Published: spatial variance and total variation of SD-VAE's latents (appendix A).",
        {"vae": "17.06 / 6627", "naive": "0.02 / 89.8", "repa-e": "18.02 / 5516"},
        (
            Claim("vae", "naive", "17.06 against 0.02", "spatial_variance"),
            Claim("vae", "repa-e", "17.06 and 18.02", "spatial_variance", alike=True),
            Claim("naive", "vae", "89.8 against 6627", "total_variation"),
            Claim("repa-e", "vae", "5516 against 6627", "total_variation"),
        ),
        ("spatial_variance", "total_variation", "l1", "psnr", "velocity", "fid"),
        seeds=2,
        curve="latents/std",
    ),
    "kl": Table(
        "How strong KL is",
        "A second look at the latents that grew in the table above. KL is a sum over the latents of an image and all else a "
        "mean, so the published weight counts 32 times less for the 128 latents here than for SD-VAE's 4096. With 32 times "
        "the weight it is as strong. All other tables have the published weight.",
        {"vae": "17.06 / 6627", "repa": "", "repa-e": "18.02 / 5516", "repa-e-kl": "18.02 / 5516"},
        (
            Claim("vae", "repa-e-kl", "17.06 and 18.02", "spatial_variance", alike=True),
            Claim("repa-e-kl", "repa", "gFID 4.07 against 7.90"),
        ),
        ("spatial_variance", "total_variation", *DEFAULT_MEASURES),
        curve="latents/std",
    ),
    "components": Table(
        "What REPA-E is made of",
        "REPA-E with one part taken away; L_REG is reconstruction, KL and GAN together. The control's VAE is trained along, "
        f"but not aligned. {IMAGENET}, SiT-L/2, 100k steps.",
        {
            "repa-e": "16.3", "no-stop-gradient": "444", "no-batch-norm": "18.1", "no-gan": "19.2", "no-regularisation": "",
            "no-vae-align": "",
        },
        (
            Claim("repa-e", "no-stop-gradient", "16.3 against 444"),
            Claim("repa-e", "no-batch-norm", "16.3 against 18.1"),
            Claim("repa-e", "no-gan", "16.3 against 19.2"),
        ),
        (*DEFAULT_MEASURES, "spatial_variance"),
    ),
    "depth": Table(
        "Alignment depth",
        "The block after which SiT is compared with the encoder: 1, 2 or 4 of 6. "
        f"{IMAGENET}, SiT-L/2, 100k steps, after block 6, 8 or 10 of 24.",
        {"depth-1": "16.4", "repa-e": "16.3", "depth-4": "16.2"},
        (Claim("depth-1", "repa-e", "16.4 and 16.3", alike=True), Claim("depth-4", "repa-e", "16.2 and 16.3", alike=True)),
    ),
    "encoders": Table(
        "Target encoders",
        "One architecture, of three qualities: random weights, 40 steps of training, and 600. "
        f"{IMAGENET}, SiT-L/2, 100k steps: REPA-E 16.0 with DINOv2-L, 16.3 with DINOv2-B, 16.5 with I-JEPA-H, 23.4 with "
        "CLIP-L; REPA with DINOv2-B 24.1.",
        {"repa-random": "", "repa-weak": "", "repa": "24.1", "repa-e-random": "", "repa-e-weak": "", "repa-e": "16.3"},
        (
            Claim("repa-e", "repa", "16.3 against 24.1"),
            Claim("repa-e-weak", "repa-weak", "better than REPA with every encoder"),
            Claim("repa-e", "repa-e-weak", "the better encoder gives the better model, mostly"),
            Claim("repa-e-weak", "repa-e-random", "the better encoder gives the better model, mostly"),
        ),
    ),
    "init": Table(
        "VAE from scratch",
        f"REPA-E from a trained VAE, and from random weights. {IMAGENET}, SiT-XL/2, 400k steps.",
        {"repa": "7.90", "repa-e": "4.07", "scratch": "4.34"},
        (Claim("repa-e", "scratch", "4.07 against 4.34"), Claim("scratch", "repa", "4.34 against 7.90")),
        (*DEFAULT_MEASURES, "psnr"),
    ),
    "drop-in": Table(
        "The E2E-VAE for others",
        "A new SiT or DiT on the frozen VAE that REPA-E has trained (seed 0), and on the one that it began with. "
        f"{IMAGENET}, XL/1, 80 epochs, on E2E-VAVAE and on the VA-VAE that it began with (table 8). DiT's loss is the noise's.",
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
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One setting with one seed."""

    setting: str
    seed: int = 0

    @property
    def name(self):
        """Its task's name."""
        return f"{self.setting} seed {self.seed}"

    @property
    def source(self):
        """The run whose VAE it starts from; None for a VAE from scratch."""
        name = SETTINGS[self.setting].vae
        return Run(name) if name else None


def runs_per_setting(table, setting, seeds=None):
    """Returns the number of runs of a row: `seeds`, by default the table's; one for the VAE that all others start from."""
    return 1 if SETTINGS[setting].job == "vae" else seeds or table.seeds


def runs_of(names, seeds=None):
    """Returns the runs of the named tables, every run once and after the one that it needs; `seeds` as in `runs_per_setting`.

    All first seeds come before the second ones, so that an interrupted program has all settings.
    """
    rows = [(TABLES[name], setting) for name in names for setting in TABLES[name].rows]
    needed = {Run(setting, seed) for table, setting in rows for seed in range(runs_per_setting(table, setting, seeds))}
    for run in list(needed):
        while run.source:
            run = run.source
            needed.add(run)
    order = list(SETTINGS)
    return sorted(needed, key=lambda run: (run.seed, order.index(run.setting)))


def config_of(run, workdir=Path()):
    """Returns the config of a run; `workdir` is the folder with all runs and encoders."""
    setting = SETTINGS[run.setting]
    config = PRESETS[setting.job].get_config("digits").unlock()
    steps = VAE_STEPS if setting.job == "vae" else STEPS
    changes = {
        **SIZE, **setting.changes, "seed": run.seed, "steps": steps, "log.every": 20, "hooks.samples_every": 0,
        "hooks.reconstructions_every": 0, "checkpoint.every": steps // 2, "checkpoint.keep_every": steps // 2,
    }  # fmt: skip
    for name in common.change(config, changes):  # a job has no fields of networks that it does not train
        if name not in SIZE and not name.startswith("hooks."):
            raise ValueError(f"setting {run.setting!r} changes {name}, which the config of job {setting.job!r} does not have")
    if "encoders" in config and config.encoders:
        weights = RANDOM if ENCODERS[setting.encoder] is None else str(workdir / encoder_folder(setting.encoder))
        config.encoders.target.update(weights=weights, architecture=copy.deepcopy(digits_models.ENCODER))
    if run.source:
        files = vae_files(workdir / folder_name(run.source))
        config.init.update(vae=str(files["vae"]), latent_stats=str(files["vae"]))
        if config.loss.get("vae", {}).get("gan"):
            config.init.disc = str(files["disc"])
    return config.lock()


def vae_files(folder):
    """Returns paths of a run's VAE, with its latent statistics, and of its discriminator, for runs that start from them."""
    return {"vae": folder / "vae", "disc": folder / "vae" / DISCRIMINATOR}


def description(run):
    """Returns all that a run's result depends on as plain values, independent of the work folder."""
    return {
        "setting": run.setting,
        "config": plain(config_of(run)),
        "evaluation": {"samples": SAMPLES, "sampler": SAMPLERS.get(SETTINGS[run.setting].network)},
    }


def plain(config):
    """Returns a config as JSON reads it."""
    return json.loads(json.dumps(plain_config(config)))


def encoder_folder(name):
    """Returns an encoder's folder in the work folder."""
    return f"encoder-{ENCODERS[name]}-steps"


def is_source(run):
    """Returns True if other runs start from this run's VAE."""
    return not run.seed and any(setting.vae == run.setting for setting in SETTINGS.values())


@functools.cache
def folder_name(run):
    """Returns the name of a run's folder, which ends in a hash of the description: another config is another run."""
    content = json.dumps(description(run), sort_keys=True)
    return f"{run.setting}-seed{run.seed}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
