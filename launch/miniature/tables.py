"""The comparisons of the miniature paper: settings, tables with settings as rows, and the published results.

Nothing runs here. What other work found is in `beyond.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

LONG = 2  # times the steps of all others that the headline trains; four times in the paper

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
    job: str = "repae"  # or "ldm", "vae"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dotted config fields -> values, after the scale's
    scaled: tuple[str, ...] = ()  # names of Scale's sets of fields, which are applied after the changes
    vae: str = "vae"  # setting whose VAE of seed 0 it starts from; '' is from scratch
    encoder: str = "trained"  # a name in `Scale.encoder_steps`
    headline: bool = False  # goes on for LONG times the steps
    cheaper: str = ""  # name in `Scale.compute_ratio`: it goes on until it has cost as much as REPA-E
    longer: int = 1  # times the scale's steps
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of `Sampling` -> values, after the network's
    samples_of: str = ""  # setting whose runs it samples in another way; it trains nothing itself

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
    "e2e-repa-smaller": Setting("smaller SiT + REPA on the E2E-VAE", "ldm", scaled=("smaller",), vae="repa-e"),
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
            "repa-smaller": "49.5", "repa-e-smaller": "34.8", "e2e-repa-smaller": "", "repa": "24.1", "repa-e": "16.3",
            "repa-larger": "19.4", "repa-e-larger": "12.83",
        },
        (
            Claim("repa-e-smaller", "repa-smaller", "34.8 against 49.5"),
            Claim("repa-e", "repa", "16.3 against 24.1"),
            Claim("repa-e-larger", "repa-larger", "12.83 against 19.40"),
        ),
        "REPA-E before REPA at every size, as published. Added after the others, as REPA-E with the smaller SiT had come out "
        "worse on emoji: the smaller SiT on the frozen VAE that REPA-E has trained, with the whole SiT. If its latents are "
        "harder for a small network, it is worse there than on the first VAE, too; if the harm is that they move, it is "
        "better there than both. The latter, because REPA-E's latents have the lower velocity loss.",
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
