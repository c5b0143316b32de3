"""Comparisons beyond the paper: settings and tables of what other work has found since, run by the same program.

A claim names what its source found; "published" are the source's numbers. A table may have settings of the paper as rows.
"""

import dataclasses

from launch.miniature.tables import DEFAULT_MEASURES, NO_REPA, Claim, Setting, Table
from repae_jax.diffusion.mean_flow import MeanFlow

HEAD = {"loss.sit.internal": 0.5}  # as published for SiT and LightningDiT
SELF, TWO_TIMES = {"loss.sit.self": 0.8}, {"diffusion.second_time_share": 0.25}  # Self-Flow's, of images
PREDICTS_LATENTS = {"diffusion.predicts": "data"}
JIT_TIMES = {"diffusion.time_distribution": "lognormal", "diffusion.time_mean": 0.8, "diffusion.time_std": 0.8}


_ONE, _TWO = ({"sampler": "meanflow", "steps": steps} for steps in (1, 2))


def _mean_flow(label: str, objective: MeanFlow) -> Setting:
    """Returns the setting of MeanFlow on the frozen E2E-VAE, sampled in one step."""
    changes = {
        "encoders": {}, "loss.sit": {"mean_flow": 1.0}, "diffusion.mean_flow": dataclasses.asdict(objective),
        "diffusion.time_distribution": "lognormal", "sampling.guidance_scale": 1.0,
        **{f"sampling.{name}": value for name, value in _ONE.items()},
    }  # fmt: skip
    return Setting(label, "ldm", changes, vae="repa-e", sampling=_ONE)


# no guidance, as in all other tables; half of the samples with r = t, as in the improved form's code
_FIRST = MeanFlow(kappa=0.0, velocity_share=0.5)
_IMPROVED = MeanFlow(kappa=0.0, velocity_share=0.5, tangent="network")

SETTINGS: dict[str, Setting] = {
    "repa-guided": Setting(
        "SiT + REPA, guided from no class", "ldm", sampling={"guidance_scale": 1.5}, samples_of="repa"
    ),
    "repa-guided-late": Setting(
        "SiT + REPA, guided from no class, more toward data", "ldm",
        sampling={"guidance_scale": 1.5, "guidance_schedule": "linear"}, samples_of="repa",
    ),
    "repa-autoguided": Setting(
        "SiT + REPA, guided from its half-way self", "ldm", sampling={"autoguidance_scale": 2.0}, samples_of="repa"
    ),
    "repa-autoguided-little": Setting(
        "SiT + REPA, guided a little from its half-way self", "ldm", sampling={"autoguidance_scale": 1.2}, samples_of="repa"
    ),
    "repa-head": Setting("SiT + REPA, with a head at the tap", "ldm", HEAD),
    "repa-head-guided": Setting(
        "SiT + REPA, guided from that head", "ldm", sampling={"internal_scale": 1.7}, samples_of="repa-head"
    ),
    "repa-euler": Setting(
        "SiT + REPA, Euler's method", "ldm", sampling={"sampler": "euler", "steps": 16}, samples_of="repa"
    ),
    "repa-dpmpp": Setting(
        "SiT + REPA, DPM-Solver++", "ldm", sampling={"sampler": "dpmpp", "steps": 16}, samples_of="repa"
    ),
    "repa-dopri5": Setting(
        "SiT + REPA, Dormand and Prince's method", "ldm", sampling={"sampler": "dopri5", "tolerance": 1e-3}, samples_of="repa"
    ),
    "sit-latents": Setting("SiT that predicts latents", "ldm", {**NO_REPA, **PREDICTS_LATENTS}),
    "sit-latents-jit": Setting(
        "SiT that predicts latents, at JiT's times", "ldm", {**NO_REPA, **PREDICTS_LATENTS, **JIT_TIMES}
    ),
    "sit-jit": Setting("SiT, at JiT's times", "ldm", {**NO_REPA, **JIT_TIMES}),
    "repa-latents": Setting("SiT + REPA that predicts latents", "ldm", PREDICTS_LATENTS),
    "sit-less-noise": Setting(
        "SiT, times shifted to less noise", "ldm", {**NO_REPA, "diffusion.time_shift": 0.5}, sampling={"time_shift": 0.5}
    ),
    "sit-more-noise": Setting(
        "SiT, times shifted to more noise", "ldm", {**NO_REPA, "diffusion.time_shift": 2.0}, sampling={"time_shift": 2.0}
    ),
    "sit-more-noise-trained": Setting("SiT, more noise in training alone", "ldm", samples_of="sit-more-noise"),
    "sit-more-noise-sampled": Setting(
        "SiT, more noise in sampling alone", "ldm", sampling={"time_shift": 2.0}, samples_of="sit"
    ),
    "self-align": Setting("SiT aligned with its average", "ldm", {**NO_REPA, **SELF}, ("self_aligned",)),
    "self-flow": Setting("Self-Flow", "ldm", {**NO_REPA, **SELF, **TWO_TIMES}, ("self_aligned",)),
    "two-times": Setting("SiT, two times in an image", "ldm", {**NO_REPA, **TWO_TIMES}),
    "vae-every-2": Setting("REPA-E, VAE every 2nd step", changes={"vae_every": 2}, headline=True, cheaper="vae-every-2"),
    "vae-every-4": Setting("REPA-E, VAE every 4th step", changes={"vae_every": 4}, headline=True, cheaper="vae-every-4"),
    "repa-e-muon": Setting("REPA-E, SiT by Muon", changes={"optim.sit.method": "muon"}),
    "repa-e-cooled": Setting("REPA-E, SiT's rate falls at the end", scaled=("cooled",)),
    "mean-flow-one": _mean_flow("MeanFlow, one step", _FIRST),
    "mean-flow-two": Setting("MeanFlow, two steps", "ldm", sampling=_TWO, samples_of="mean-flow-one"),
    "improved-mean-flow-one": _mean_flow("improved MeanFlow, one step", _IMPROVED),
    "improved-mean-flow-two": Setting(
        "improved MeanFlow, two steps", "ldm", sampling=_TWO, samples_of="improved-mean-flow-one"
    ),
}  # fmt: skip
TABLES: dict[str, Table] = {
    "guidance": Table(
        "Guidance from a weaker output",
        "The same training, sampled without guidance, with classifier-free guidance, constant or growing toward data, and with "
        "autoguidance by the checkpoint of half of the steps; and the same with a second loss, of a head at the tap, sampled "
        "without and with guidance from that head. Published: FID on ImageNet at 512 px of EDM2-S, guided from an "
        "unconditional network 2.23, by autoguidance 1.34 (arXiv 2406.02507); gFID at 256 px of RAE's DiTDH-XL 1.51, by "
        "autoguidance 1.13 (2510.11690); of SiT-XL/2 at 80 epochs 17.20, with a head and guided from it 5.31 (2512.24176).",
        {
            "repa": "1.51", "repa-guided": "2.23", "repa-guided-late": "", "repa-autoguided": "1.13; 1.34", "repa-head": "",
            "repa-head-guided": "5.31", "repa-autoguided-little": "",
        },
        (
            Claim("repa-autoguided", "repa", "1.13 against 1.51"),
            Claim("repa-autoguided", "repa-guided", "1.34 against 2.23"),
            Claim("repa-guided-late", "repa-guided", "better on class-conditional ImageNet (arXiv 2404.13040)"),
            Claim("repa-head", "repa", "the second loss alone helps (2512.24176)"),
            Claim("repa-head-guided", "repa-head", "5.31 against 17.20, of loss and guidance together"),
        ),
        "All kinds of guidance clearly before none: after so few steps samples are blurred, and every one sharpens. "
        "Classifier-free guidance the best of them, because the judge looks at classes and few pictures leave little variety "
        "to lose. The half-way network is not much weaker, so autoguidance gains less than published. The head alone makes no "
        "difference that three seeds can tell: alignment at the same block does its work already. Added after the others, as "
        "autoguidance had made samples worse: a scale of 1.2. If 2 is too much for a weaker network so near, it is no "
        "worse than none.",
        measures=("fid", "fid_held_out", "label_accuracy", "velocity", "alignment"),
    ),
    "solvers": Table(
        "Solvers of higher order",
        "The same networks, sampled in 15 or 16 calls: 8 steps of Heun's method, as elsewhere, 16 of Euler's or of "
        "DPM-Solver++(2M); and by Dormand and Prince's method, with as many calls as a tolerance of 1e-3 takes. Published for "
        "other networks alone (arXiv 2211.01095): with guidance, second order is better than first in 15 to 20 calls.",
        {"repa": "", "repa-euler": "", "repa-dpmpp": "", "repa-dopri5": ""},
        (Claim("repa-dpmpp", "repa-euler", "second order better than first in 15 to 20 calls"),),
        "Undecided: one longer run had 6.7, 6.8 and 6.8 by Euler's, Heun's method and DPM-Solver++, and 6.5 "
        "by Dormand and Prince's. What the networks have not learned in so few steps is more than any solver's error.",
        measures=("fid", "fid_held_out", "label_accuracy"),
    ),
    "prediction": Table(
        "What the network predicts",
        "Latents without noise, or the velocity; the loss is the velocity's in both. Published: guided gFID on ImageNet 256 "
        "px, B/1 on FLUX.2's latents (JLT, arXiv 2605.27102), without REPA; nothing with it.",
        {"sit": "6.56", "sit-latents": "2.56", "repa": "", "repa-latents": "", "sit-latents-jit": "", "sit-jit": ""},
        (
            Claim("sit-latents", "sit", "2.56 against 6.56"),
            Claim("repa-latents", "repa", "JLT's finding; not published with REPA"),
            Claim("sit-latents-jit", "sit-jit", "JLT's finding, at JiT's times"),
        ),
        "Undecided: predicting latents helps where a token has more numbers than the network can carry, and here it has 32 or "
        "64, no more than the width. Errors near data weigh up to 400 times as much as at noise, which costs at a high rate. "
        "Added after the others, whose gradients had norms of 3 to 45 and were clipped in every step, where those of a "
        "velocity have 0.6: JiT's times, which are rarely near data. If that weight is the cause, better than without them. "
        "They were, by far, and better than SiT; so at last SiT at those times, too. If the times decide, it is as good.",
        measures=("fid", "label_accuracy", "alignment", "cknna"),
    ),
    "time-shift": Table(
        "Time shift by latent dimension",
        "Training and sampling with times of half and of twice the noise over the signal. RAE's formula (arXiv 2510.11690), "
        "the root of the latents' numbers over 4096, gives 0.35 for the digits, 0.5 for emoji of 32 and 0.71 for those of 64 "
        "pixels. Published: gFID on ImageNet 256 px of DiT-XL on DINOv2-B's latents, with the formula's shift of 6.93 there "
        "and without one.",
        {
            "sit-less-noise": "4.81", "sit": "23.08", "sit-more-noise": "", "sit-more-noise-trained": "",
            "sit-more-noise-sampled": "",
        },
        (
            Claim("sit-less-noise", "sit", "4.81 against 23.08: the formula's shift against none"),
            Claim("sit-less-noise", "sit-more-noise", "the formula's direction"),
        ),
        "More noise is the worst, as eight steps of Heun's method then leave the last details to one long step. Less noise is "
        "as good as no shift, within the noise of the seeds: the formula was found for latents of far more numbers. Added "
        "after the others, as more noise had come out best: its networks sampled without the shift, and SiT's with it. If "
        "training decides, the former are still before SiT.",
        # no losses: those of other times are others
        measures=("fid", "label_accuracy", "cknna"),
    ),
    "self-flow": Table(
        "Alignment without an encoder",
        "The SiT is aligned with later blocks of its own average, at the same time or, as Self-Flow does, with an image whose "
        "tokens are as clean as the cleanest one's; two times in an image also without alignment. Published: FID on ImageNet "
        "256 px, SiT-XL/2 without guidance, 4M steps, SiT 7M (arXiv 2603.06507, table 1). Of all rows only REPA needs an "
        "encoder.",
        {"sit": "8.3", "two-times": "", "self-align": "", "self-flow": "5.70", "repa": "5.89"},
        (
            Claim("self-flow", "sit", "5.70 against 8.3"),
            Claim("self-flow", "two-times", "over 4 better"),
            Claim("self-flow", "self-align", "over 1 better"),
            Claim("self-flow", "repa", "5.70 against 5.89, behind it until 3M steps"),
            Claim("two-times", "sit", "slightly better"),
        ),
        "Self-Flow no better than SiT by more than the seeds differ, and clearly behind REPA: the average is an average of "
        "few steps, and a teacher that knows nothing yet teaches nothing, where REPA's encoder has been trained before. Two "
        "times in an image alone cost a little: eight steps of a sampler see only one.",
        measures=("fid", "label_accuracy", "cknna"),  # the loss of two times is another one
    ),
    "vae-every": Table(
        "A VAE that is trained in some of the steps",
        "VAE and discriminator are trained in the first of every k steps, the SiT in all; k is 1, 2 and 4. At equal steps, and "
        "at equal compute, when all have cost what twice the steps of REPA-E cost. Published for another method, UNITE (arXiv "
        "2603.22283, figure 5), on ImageNet 256 px with guidance, base size: with 14 times as many flow steps per step of "
        "reconstruction, on top of the others, gFID falls from 3.33 to 2.12. Nothing is published for REPA-E.",
        {"repa": "", "repa-e": "", "vae-every-2": "", "vae-every-4": ""},
        (
            Claim("vae-every-2", "repa-e", "3.33 to 2.12 with more flow steps, at more compute", "fid_equal_compute"),
            Claim("vae-every-4", "repa-e", "3.33 to 2.12 with more flow steps, at more compute", "fid_equal_compute"),
        ),
        "At equal steps about equal: the SiT takes as many steps, on latents that move less, and the alignment has half or a "
        "quarter of the steps to shape them; so far from convergence the SiT's own steps decide. At equal compute better than "
        "REPA-E, and the more so with k = 4, because runs are so short that steps are worth more than better latents; REPA, "
        "with most steps, is still before all of them. Reconstructions change less than REPA-E's, whose VAE has more updates.",
        measures=(
            "fid_equal_compute", "fid", "fid_long", "fid_of_reconstructions", "label_accuracy", "velocity", "alignment", "psnr",
            "drift",
        ),
    ),
    "muon": Table(
        "Muon",
        "The SiT's matrices are updated by Muon, at AdamW's learning rate, to which its updates are matched. Published for "
        "language models alone (2502.16982): AdamW's loss with about half of the compute.",
        {"repa-e": "", "repa-e-muon": ""},
        (
            Claim("repa-e-muon", "repa-e", "half of the compute for the same loss", "velocity"),
            Claim("repa-e-muon", "repa-e", "no image model published"),
        ),
        "A lower velocity loss at equal steps. The Frechet distance is better by less than the seeds differ: so few steps "
        "are limited by how far the rate lets the weights go, which is matched.",
        measures=(*DEFAULT_MEASURES, "cknna_of_latents"),
        curve="sit/velocity",
    ),
    "cooled": Table(
        "A learning rate that falls at the end",
        "The SiT's rate is constant for four fifths of the steps and then falls to 0 as 1 - sqrt; elsewhere it is constant to "
        "the end. Published for language models alone (2405.18392): a cool-down lowers the loss, as much as a cosine.",
        {"repa-e": "", "repa-e-cooled": ""},
        (Claim("repa-e-cooled", "repa-e", "lower loss after the cool-down", "velocity"),),
        "A slightly lower velocity loss, and undecided in the Frechet distance: samples are drawn with averaged weights, which "
        "has most of the effect already, and the VAE goes on moving while the SiT slows down.",
        curve="sit/velocity",
    ),
    "one-step": Table(
        "Samples in one step",
        "MeanFlow and its improved form (2505.13447, 2512.02012) on the frozen E2E-VAE, in one step and in two, against SiT on "
        "the same VAE in eight steps of Heun's method, 15 calls of the network. No guidance. Published: FID on ImageNet 256 px "
        "with SD-VAE and guidance in training, of MF-XL/2 in one step and in two, iMF-XL/2 likewise, SiT-XL/2 in 250 steps.",
        {
            "e2e-sit": "2.06", "mean-flow-one": "3.43", "mean-flow-two": "2.93", "improved-mean-flow-one": "1.72",
            "improved-mean-flow-two": "1.54",
        },
        (
            Claim("mean-flow-two", "mean-flow-one", "2.93 against 3.43"),
            Claim("improved-mean-flow-one", "mean-flow-one", "1.72 against 3.43"),
            Claim("improved-mean-flow-two", "improved-mean-flow-one", "1.54 against 1.72"),
            Claim("e2e-sit", "mean-flow-one", "2.06 against 3.43"),
        ),
        "SiT in eight steps before all of them, and two steps before one, clearly: the average over the whole way is learned "
        "last, and the steps are few. The improved form before the first by less than the seeds differ: what it takes away is "
        "the noise of the target, which at this batch size and without guidance is a small part.",
        measures=("fid", "label_accuracy"),
    ),
}  # fmt: skip
