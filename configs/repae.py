"""REPA-E: VAE and SiT trained together, end to end.

    python -m repae_jax.train --config configs/repae.py --workdir runs/repae \
        --config.data.options.path=/data/imagenet/train \
        --config.init.vae=sdvae-f8d4.pt --config.init.latent_stats=sdvae-f8d4-latents-stats.pt \
        --config.init.disc=sdvae-f8d4-discriminator-ckpt.pt \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth

The default is the paper's main run (arXiv 2504.10483v3, table 1): SiT-XL/2, SD-VAE f8d4, DINOv2-B, ImageNet 256 px, batch 256,
400k steps (80 epochs). Published gFID without guidance, SDE-250: 12.83 at 100k, 7.17 at 200k, 4.07 at 400k steps; with guidance
2.2 in [0, 0.65]: 1.67. Its cost is 3.77 TFLOP an image (2.26 with f16d32): 362 hours of an H100 at 30 % of its peak, 45 on 8.
The other runs of the paper are names of configs/paper.py.

After the colon, `--config configs/repae.py:sit=B/1,vae=f16d32`, choose
    sit         S, B, L or XL, slash, patch size 1, 2, 4 or 8
    vae         f8d4, f8d16 or f16d32
    encoder     dinov2-small, -base, -large, -giant, each also …-with-registers; clip-vit-large-patch14, ijepa_vith14_1k
                and the others of common.ENCODERS; several at once are joined by +
    resolution  256 or 512
or a preset:
    digits      scikit-learn's handwritten digits, from scratch on a laptop's CPU in minutes (launch/quickstart.sh)
    tiny        the same code at toy size with a random encoder: a full step in seconds, for tests

Every field can be overridden: --config.optim.sit.learning_rate=2e-4. A loss term exists if its weight is not zero.
`--config.vae_every=4` trains VAE and discriminator in the first of every 4 steps alone, at 46 % of the FLOP (docs/beyond.md).
The paper's text says MSE where its code trains with L1; this config follows the code.
"""

from ml_collections import ConfigDict

from configs import common, sections
from repae_jax import train_step


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a REPA-E run; see the module's docstring for `arg`."""
    preset, args = common.parse_arg(arg, common.SMALL, sit="XL/2", vae="f8d4", encoder="dinov2-base", resolution=256)
    config = ConfigDict(
        {
            **sections.run("repae"),
            "vae_every": 1,  # k: the VAE and the discriminator are trained in the first of every k steps, the SiT in all
            "data": sections.data(args["resolution"]),
            "vae": sections.vae(args["vae"]),
            # the published loop trains the position table; REPA and training on a frozen VAE keep it fixed
            "sit": sections.sit(args["sit"], learned_positions=True),
            "disc": sections.DISC,
            "encoders": sections.encoders(args["encoder"]),
            "lpips": sections.LPIPS,
            # vae.diffusion: the ablation without stop-gradient
            "loss": {**sections.vae_loss(train_step.VAE_TERMS, align=1.5), **sections.sit_loss()},
            # norm_momentum: of the latents' batch norm; 0: none, the initial statistics throughout
            "diffusion": {**sections.diffusion(), "norm_momentum": 0.1},
            "optim": {name: sections.adamw() for name in ("vae", "disc", "sit")},
            "init": {**sections.sit_init(), "disc": ""},
            "precision": sections.PRECISION,
            "hooks": {**sections.sit_hooks(), "reconstructions_every": 10_000},
            "sampling": sections.sampling(),
        }
    )
    common.shrink(config, preset)
    return config.lock()
