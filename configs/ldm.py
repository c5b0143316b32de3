"""A diffusion transformer on a frozen VAE: SiT, DiT or MeanFlow's, with REPA or without.

    python -m repae_jax.train --config configs/ldm.py --workdir runs/ldm \
        --config.data.options.path=/data/imagenet/train --config.init.vae=REPA-E/e2e-vavae/e2e-vavae-400k.pt \
        --config.init.latent_stats=REPA-E/e2e-vavae/e2e-vavae-400k-latents-stats.pt

The default is REPA on REPA-E's VAE (arXiv 2504.10483v3, tables 8 and 9): SiT-XL/1, E2E-VAVAE f16d32, DINOv2-B, ImageNet 256 px,
batch 256, 400k steps (80 epochs). Published gFID without guidance, SDE-250: 3.46; with guidance: 1.67. After 4M steps
(`--config.steps=4000000`) and with as many images of every class: 1.69, with guidance 2.4 in [0, 0.73]: 1.12.
Its cost is 0.91 TFLOP an image, 87 hours of an H100 at 30 % of its peak; with latents cached by
`python -m repae_jax.cache_latents` (`config.data.cache`) 0.77 TFLOP, 74 hours. REPA's authors took 20.6 hours on 8 H100.

After the colon, `--config configs/ldm.py:model=DiT-XL/2,vae=f8d4,encoder=none`, choose
    model       SiT (learns a velocity), DiT (noise and its variance), MF or iMF (MeanFlow and its improved form: an average
                velocity, for samples in one step), dash, S, B, L or XL, slash, patch size 1, 2, 4 or 8
    vae         f8d4, f8d16 or f16d32; see docs/beyond.md for rae-dinov2-small, -base, -large, vtp-base, vtp-large; the times of
                a SiT on an RAE are shifted as in RAE (arXiv 2510.11690), by sqrt(numbers of the latents / 4096), in training
                and in sampling: 6.93 for rae-dinov2-base at 256 px
    encoder     none, without REPA; or as in configs/repae.py, several joined by +
    resolution  256 or 512
or a preset:
    digits      on the VAE of a run of configs/repae.py:digits or configs/vae.py:digits, given as config.init.vae
    tiny        toy size, random VAE and encoder: a full step in seconds, for tests

The published runs that differ from this one in more than these arguments are names of configs/paper.py.
"""

import math

from ml_collections import ConfigDict

from configs import common, sections
from repae_jax.diffusion.mean_flow import MeanFlow
from repae_jax.models.vae_families import RAE

OBJECTIVES = {  # path of config.diffusion, and MeanFlow's settings
    "SiT": ("linear", None),
    "DiT": ("ddpm", None),
    "MF": ("linear", MeanFlow()),
    "iMF": ("linear", MeanFlow(velocity_share=0.5, tangent="network", kappa=0.0, largest_scale=8.0)),
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a run on a frozen VAE; see the module's docstring for `arg`."""
    preset, args = common.parse_arg(arg, common.SMALL, model="SiT-XL/1", vae="f16d32", encoder="dinov2-base", resolution=256)
    objective, _, size = args["model"].partition("-")
    path, mean_flow = common.choose("objective", objective, OBJECTIVES)
    is_dit, is_average = path == "ddpm", mean_flow is not None
    sit = sections.sit(size, learned_sigma=is_dit, learned_positions=False)
    encoders = sections.encoders(args["encoder"])
    config = ConfigDict(
        {
            **sections.run("ldm"),
            "data": sections.data(args["resolution"]),
            "vae": sections.vae(args["vae"]),
            "sit": sit,
            "encoders": encoders,
            "loss": sections.sit_loss(align=0.5 if encoders else 0.0, ddpm=is_dit, mean_flow=is_average),
            "diffusion": sections.diffusion(path, mean_flow),
            "optim": {"sit": sections.adamw()},
            "init": sections.sit_init(),
            "precision": {"compute": "bfloat16"},
            "hooks": sections.sit_hooks(),
            "sampling": sections.sampling("meanflow", 1) if is_average else sections.sampling("ancestral" if is_dit else "sde"),
        }
    )
    if config.vae.get("family") == RAE and not (is_dit or is_average):
        config.diffusion.time_shift = config.sampling.time_shift = math.sqrt(common.latents(config) / 4096)
    common.shrink(config, preset)
    return config.lock()
