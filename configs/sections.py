"""The sections of the configs with REPA-E's published values; `repae.py`, `ldm.py` and `vae.py` say which of them a job has.

Names, types and ranges are in `repae_jax/job/sections.py`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections.config_dict import FieldReference, placeholder

from configs import common
from repae_jax import tokenizer_step, train_step
from repae_jax.data import option_types
from repae_jax.diffusion.mean_flow import MeanFlow

DISC = {"channels": 64, "num_layers": 3}
LPIPS = {
    "vgg16": "",  # torchvision's weights; 'random' for both files to measure speed
    "linear": "",  # weights of LPIPS v0.1
    "input_range": (-1.0, 1.0),  # (0., 1.): as the released weights were trained
}
PRECISION = {"compute": "bfloat16", "lpips": "float32"}  # where a VAE is trained


def run(job: str, ema_decay: float = 0.9999) -> dict[str, Any]:
    """Returns the fields that are in no section, and the sections that are the same in every job."""
    return {
        "job": job, "seed": 0, "steps": 400_000, "ema_decay": ema_decay,
        "ema_decays": (),  # further averages, to choose from with --ema when sampling: (0.999, 0.9995)
        "ema_sigmas": (),  # widths of averages by power functions, of which --ema sigma=S makes others: (0.05, 0.1), EDM2's
        "accumulation": 1,  # micro-batches per step
        "max_skipped_in_a_row": 20,  # consecutive updates with non-finite gradients before the run stops
        # devices that share one copy of parameters and optimizer state; TPU slices, or nodes of GPUs, that share none
        "mesh": {"fsdp": 1, "slices": 1},
        "attention": "xla",  # of the SiT and the encoders; 'cudnn': faster on NVIDIA GPUs, in bfloat16
        "compiler_options": "",  # XLA's, for the step: "name=value,name=value"; added to the defaults of job/compilation.py
        "deterministic": False,  # on GPUs: kernels that add in a fixed order, so that a run continues bit for bit
        "checkpoint": {"every": 10_000, "keep_last": 2, "keep_every": 50_000},
        # trackers: 'tensorboard', 'wandb', 'trackio', 'mlflow' (each with its extra), beside metrics.jsonl
        "log": {"every": 100, "trackers": ("tensorboard",), "project": "repae_jax"},
    }


def data(resolution: int) -> dict[str, Any]:
    """Returns `config.data`; sources are in repae_jax/data."""
    return {
        "source": "folder",
        # the options of every source; the chosen one takes those that are set, and refuses others
        "options": {name: placeholder(kind) for name, kind in option_types().items()},
        "image_size": FieldReference(resolution, field_type=object),  # a square's side, or (height, width)
        "num_classes": 1000,
        "batch_size": 256,  # global
        "workers": 8,  # processes that decode images
        "max_bad_fraction": 0.001,  # share of undecodable images above which the run fails
        "cache": "",  # latents of a frozen VAE, for configs/ldm.py
        "flip_probability": 0.0,  # share of mirrored images; REPA and REPA-E mirror none
    }


def vae(name: str) -> dict[str, Any]:
    """Returns `config.vae` of a name in common.VAES or common.OTHER_VAES."""
    architecture = common.choose("VAE", name, common.VAES | common.OTHER_VAES)
    convolutional = {"channels": 128, "num_res_blocks": 2, "norm_groups": 32} if name in common.VAES else {}
    return {**architecture, **convolutional, "remat": False}


def sit(name: str, *, learned_sigma: bool = False, learned_positions: bool) -> dict[str, Any]:
    """Returns `config.sit` of a published name, such as 'XL/2'."""
    return {
        **common.sit_fields(name),
        "projector": "mlp",  # or 'conv', iREPA's 3x3 convolution
        "projector_dim": 2048, "mlp_ratio": 4.0, "qk_norm": False,
        "learned_sigma": learned_sigma,  # True with diffusion.path='ddpm'
        "learned_positions": learned_positions,
        "remat": "dots",  # 'none', 'dots' (recompute all but matrix products) or 'full'
        "unroll": 1,  # blocks per iteration of the scanned stacks; all of them: faster on TPUs and GPUs, twice the compilation
    }


def encoders(names: str) -> dict[str, Any]:
    """Returns `config.encoders` of architectures joined by '+': 'target', 'target_2', …; empty for 'none'."""
    entries = {}
    for index, name in enumerate(() if names == "none" else names.split("+"), start=1):
        entries["target" if index == 1 else f"target_{index}"] = {
            "architecture": name,
            # a Hugging Face name or folder, MoCo v3's file, or 'random' to measure speed
            "weights": common.choose("encoder", name, common.ENCODERS),
            "image_size": placeholder(object),  # a square's side, or (height, width); by default in proportion to data's
            "spatial_gamma": placeholder(float),  # iREPA's normalization over positions; published: 0.6
        }
    return entries


def vae_loss(terms: Iterable[str], **weights: float) -> dict[str, Any]:
    """Returns `config.loss` where a VAE is trained, with a weight for each of the terms; one with weight 0 is not computed."""
    return {
        "vae": {**dict.fromkeys(terms, 0.0), "l1": 1.0, "lpips": 1.0, "kl": 1e-6, "gan": 0.1, **weights},
        "gan_start": 0,  # first step with the adversarial losses
        "gan_factor": 1.0,
        "lecam": 0.0,  # weight of LeCam's regularizer of the discriminator
    }


def tokenizer_loss() -> dict[str, Any]:
    """Returns `config.loss` of a tokenizer alone."""
    return {
        **vae_loss(tokenizer_step.TERMS),
        "pixel_reduction": "mean",  # reduction of l1, l2 and lpips; 'sum' over pixels, as LDM and VA-VAE do
        # largest factor by which a term's weight is adapted to the reconstruction's gradient; 0: the weight is fixed
        "adaptive": {"gan": 0.0, "vf": 0.0},
        "vf_margins": (0.0, 0.0),  # margins of cosines and of distances
        "se_factors": (2, 4),
        "eq_scales": (),  # EQ-VAE's transform: (1.0, 0.25, 0.5, 0.75)
        "eq_prior": 0.5,  # EQ-VAE's share of steps without a transform
    }


def sit_loss(*, align: float = 0.5, ddpm: bool = False, mean_flow: bool = False) -> dict[str, Any]:
    """Returns `config.loss` where a SiT, a DiT or MeanFlow's network is trained."""
    objective = {"velocity": 0.0, "noise": 1.0, "bound": 1.0} if ddpm else {"velocity": 1.0, "noise": 0.0, "bound": 0.0}
    if mean_flow:
        objective = {"mean_flow": 1.0, "velocity": 0.0, "noise": 0.0, "bound": 0.0}
    return {
        "sit": {**objective, **dict.fromkeys(train_step.SIT_TERMS, 0.0), "align": align},
        # the alignment's weights are multiplied by 1 until `align_end`, or decay to 0 until then ('linear', 'cosine')
        "align_shape": "constant",
        "align_end": placeholder(int),
        "self_depth": placeholder(int),  # block of the averaged SiT that the term 'self' aligns with, after sit.encoder_depth
    }


def diffusion(path: str = "linear", mean_flow: MeanFlow | None = None) -> dict[str, Any]:
    """Returns `config.diffusion` on a frozen VAE."""
    return {
        "path": path,  # 'linear', 'cosine', or 'ddpm': DiT's noise and bound in place of the velocity
        "predicts": "velocity",  # or 'data': JiT's, the latents themselves
        "time_distribution": "lognormal" if mean_flow else "uniform",
        "time_mean": 0.0, "time_std": 1.0,  # of log(sigma / alpha) where times are lognormal; mean_flow has its own
        "time_shift": 1.0,  # above 1, times are nearer to noise: sqrt(numbers of the latents / 4096), see docs/beyond.md
        "second_time_share": 0.0,  # share of an image's tokens with a second time; Self-Flow's is 0.25
        "label_dropout": 0.1,
        # MeanFlow's settings where an average velocity is learned; fields are described in repae_jax/diffusion/mean_flow.py
        "mean_flow": dataclasses.asdict(mean_flow) if mean_flow else placeholder(object),
    }


def adamw() -> dict[str, Any]:
    """Returns an entry of `config.optim` as in REPA-E: constant rate, no decay, gradient norm clipped to 1."""
    return {
        "learning_rate": 1e-4, "warmup_steps": 0, "final_learning_rate": 0.0,
        "schedule": "constant",  # 'linear', 'cosine' or '1-sqrt': falls until decay_steps
        "decay_start": placeholder(int),  # step until which the rate is constant (warmup-stable-decay); default warmup_steps
        "decay_steps": placeholder(int),
        "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0,
        "fixed": (),  # parts of the network that are not trained, such as ("encoder", "quant_conv") of a VAE
        "method": "adamw",  # 'muon': Muon for the matrices of a SiT's blocks, at the same rate
    }


def sit_init() -> dict[str, Any]:
    """Returns `config.init` where a SiT is trained: files of PyTorch, local, on the hub or gs://; '' is from scratch."""
    return {
        "checkpoint": "",  # a published training checkpoint with optimizers and steps, whose run is continued
        "vae": "",
        "latent_stats": "",  # without a file they are measured on the first `stats_images` images
        "stats_images": 4096,
    }


def sit_hooks() -> dict[str, Any]:
    """Returns `config.hooks` where a SiT is trained; 0 is never."""
    return {
        "images": 64,
        "samples_every": 10_000,
        # FID of a few samples against a reference (repae_jax/evaluation/reference_stats.py), with Inception's weights
        "fid_every": 0, "fid_samples": 5000, "fid_reference": "", "fid_inception": "",
    }


def sampling(sampler: str = "sde", steps: int = 250) -> dict[str, Any]:
    """Returns `config.sampling`: of pictures during training, and the defaults of repae_jax.sample."""
    return {
        # 'euler', 'heun', 'dpmpp', 'dopri5' or 'sde'; 'ancestral' with diffusion.path='ddpm', 'meanflow' with mean_flow
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0,
        "guidance_channels": placeholder(int),  # guide only the first ones, as published DiT samples do; default all
        "guidance_schedule": "constant",  # 'linear', 'cosine' or 'power_cosine': the scale grows toward data
        "guidance_power": 4.0,  # of 'power_cosine'
        # away from the output of the head that loss.sit.internal trains, at weaker_low <= t <= weaker_high; 1 is none
        "internal_scale": 1.0, "weaker_low": 0.0, "weaker_high": 1.0,
        "precision": "float32",  # of the SiT's matrix products; or 'bfloat16'
        "time_shift": 1.0,  # as diffusion.time_shift, of the steps' times
        "tolerance": 1e-3,  # of dopri5
    }
