"""A diffusion transformer on a frozen VAE: SiT or DiT, with REPA or without.

    python -m repae_jax.train --config configs/ldm.py --workdir runs/ldm \
        --config.data.options.path=/data/imagenet/train --config.init.vae=REPA-E/e2e-vavae/e2e-vavae-400k.pt \
        --config.init.latent_stats=REPA-E/e2e-vavae/e2e-vavae-400k-latents-stats.pt

The default is REPA on REPA-E's VAE (arXiv 2504.10483v3, tables 8 and 9): SiT-XL/1, E2E-VAVAE f16d32, DINOv2-B, ImageNet 256 px,
batch 256, 400k steps (80 epochs). Published gFID without guidance, SDE-250: 3.46; with guidance: 1.67. After 4M steps
(`--config.steps=4000000`) and with as many images of every class: 1.69, with guidance 2.4 in [0, 0.73]: 1.12.
Its cost is 0.91 TFLOP an image, 87 hours of an H100 at 30 % of its peak; with latents cached by
`python -m repae_jax.cache_latents` (`config.data.cache`) 0.77 TFLOP, 74 hours. REPA's authors took 20.6 hours on 8 H100.

After the colon, `--config configs/ldm.py:model=DiT-XL/2,vae=f8d4,encoder=none`, choose
    model       SiT (learns a velocity) or DiT (noise and its variance), dash, S, B, L or XL, slash, patch size 1, 2, 4 or 8
    vae         f8d4, f8d16 or f16d32
    encoder     none, without REPA; or as in configs/repae.py, several joined by +
    resolution  256 or 512
or a preset:
    digits      on the VAE of a run of configs/repae.py:digits or configs/vae.py:digits, given as config.init.vae
    tiny        toy size, random VAE and encoder: a full step in seconds, for tests

The published runs that differ from this one in more than these arguments are names of configs/paper.py.
"""

from ml_collections import ConfigDict

from configs import common, sections

OBJECTIVES = {"SiT": False, "DiT": True}  # whether the network learns the noise's variance


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a run on a frozen VAE; see the module's docstring for `arg`."""
    preset, args = common.parse_arg(arg, common.SMALL, model="SiT-XL/1", vae="f16d32", encoder="dinov2-base", resolution=256)
    objective, _, size = args["model"].partition("-")
    sit = sections.sit(size, learned_positions=False)
    sit["learned_sigma"] = is_dit = common.choose("objective", objective, OBJECTIVES)
    encoders = sections.encoders(args["encoder"])
    config = ConfigDict(
        {
            **sections.run("ldm"),
            "data": sections.data(args["resolution"]),
            "vae": sections.vae(args["vae"]),
            "sit": sit,
            "encoders": encoders,
            "loss": sections.sit_loss(align=0.5 if encoders else 0.0, ddpm=is_dit),
            "diffusion": sections.diffusion("ddpm" if is_dit else "linear"),
            "optim": {"sit": sections.adamw()},
            "init": sections.sit_init(),
            "precision": {"compute": "bfloat16"},
            "hooks": sections.sit_hooks(),
            "sampling": sections.sampling("ancestral" if is_dit else "sde"),
        }
    )
    common.shrink(config, preset)
    return config.lock()
