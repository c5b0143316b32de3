"""REPA-E: VAE and SiT trained together, end to end.

    python -m repae_jax.train --config configs/repae.py --workdir runs/repae \
        --config.data.options.path=/data/imagenet/train \
        --config.init.vae=sdvae-f8d4.pt --config.init.latent_stats=sdvae-f8d4-latents-stats.pt \
        --config.init.disc=sdvae-f8d4-discriminator-ckpt.pt \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth

The default is the paper's main run (arXiv 2504.10483, table 2): SiT-XL/2, SD-VAE f8d4, DINOv2-B, ImageNet 256 px, batch 256,
400k steps (80 epochs). Published gFID without guidance, SDE-250: 12.83 at 100k, 7.17 at 200k, 4.07 at 400k steps; with guidance
2.2 in [0, 0.65]: 1.67. Its cost is 3.75 TFLOP an image (2.23 with f16d32): about 45 h on 8 H100 at 30 % of their peak.

After the colon, `--config configs/repae.py:sit=B/1,vae=f16d32`, choose
    sit         S, B, L or XL, slash, patch size 1, 2, 4 or 8
    vae         f8d4, f8d16 or f16d32
    encoder     dinov2-small, -base, -large, -giant, each also …-with-registers; clip-vit-large-patch14, ijepa_vith14_1k
                and the others of common.ENCODERS
    resolution  256 or 512
or a preset:
    digits      scikit-learn's handwritten digits, from scratch on a laptop's CPU in minutes (launch/quickstart.sh)
    tiny        the same code at toy size with a random encoder: a full step in seconds, for tests

Every field can be overridden: --config.optim.sit.learning_rate=2e-4. A loss term exists if its weight is not zero.
The paper's text says MSE where its code trains with L1; this config follows the code.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def _adamw(learning_rate):
    return {
        "learning_rate": learning_rate,
        "warmup_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }


def get_config(arg=""):
    """Config of a REPA-E run; see the module's docstring for `arg`."""
    preset, args = common.parse_arg(arg, ("", "digits", "tiny"), sit="XL/2", vae="f8d4", encoder="dinov2-base", resolution=256)
    config = ConfigDict()
    config.job = "repae"
    config.seed = 0
    config.steps = 400_000
    config.accumulation = 1  # micro-batches per step
    config.ema_decay = 0.9999
    config.max_skipped_in_a_row = 20  # stop after so many updates that were not finite

    config.data = {
        "source": "folder",  # see repae_jax/data
        "options": {"path": "", "labels_file": placeholder(str)},
        "image_size": args["resolution"],
        "num_classes": 1000,
        "batch_size": 256,  # global
        "workers": 8,  # processes that decode images
        "max_bad_fraction": 0.001,  # share of undecodable images above which the run fails
    }
    config.vae = {
        **common.choose("VAE", args["vae"], common.VAES),
        "channels": 128,
        "num_res_blocks": 2,
        "norm_groups": 32,
        "remat": False,
    }
    config.sit = {
        **common.sit_fields(args["sit"]),
        "projector_dim": 2048,
        "mlp_ratio": 4.0,
        "qk_norm": False,
        "learned_positions": True,  # as in the published loop; its frozen-VAE training and REPA's keep them fixed
        "remat": "dots",  # 'none', 'dots' (recompute all but matmuls) or 'full'
        "unroll": 1,  # blocks per iteration of the scanned stacks
    }
    config.disc = {"channels": 64, "num_layers": 3}
    config.encoders = {
        # weights: a Hugging Face name or folder, MoCo v3's file, or 'random' to measure speed without any
        "target": {
            "architecture": args["encoder"],
            "weights": common.choose("encoder", args["encoder"], common.ENCODERS),
            "image_size": placeholder(int),
        },
    }
    # vgg16: torchvision's weights; linear: those of LPIPS v0.1. 'random' for both to measure speed without any
    config.lpips = {"vgg16": "", "linear": "", "input_range": (-1.0, 1.0)}  # (0., 1.): as the released weights were trained

    config.loss = {
        "vae": {"l1": 1.0, "l2": 0.0, "lpips": 1.0, "kl": 1e-6, "gan": 0.1, "align": 1.5},
        "sit": {"velocity": 1.0, "align": 0.5},
        "gan_start": 0,
        "gan_factor": 1.0,
        "lecam": 0.0,
    }
    config.diffusion = {
        "path": "linear",  # or 'cosine'
        "time_distribution": "uniform",  # or 'lognormal'
        "label_dropout": 0.1,
        "norm_momentum": 0.1,  # of the latent batch norm
    }
    config.optim = {"vae": _adamw(1e-4), "disc": _adamw(1e-4), "sit": _adamw(1e-4)}
    config.init = {
        # PyTorch files to start from, local, on the hub or gs://; '' is from scratch, with latent statistics measured on the
        # first images
        "checkpoint": "",  # a published training checkpoint, with its optimizers and steps: its run is continued
        "vae": "",
        "latent_stats": "",
        "disc": "",
        "stats_images": 4096,
    }
    config.precision = {"compute": "bfloat16", "lpips": "float32"}
    config.mesh = {"fsdp": 1}  # devices that share one copy of parameters and optimizer state
    config.checkpoint = {"every": 10_000, "keep_last": 2, "keep_every": 50_000}
    config.log = {"every": 100}
    config.hooks = {"samples_every": 10_000, "reconstructions_every": 10_000, "images": 64}
    config.sampling = {  # of the pictures during training, and the defaults of repae_jax.sample
        "sampler": "sde",  # 'euler', 'heun' or 'sde'
        "steps": 250,
        "guidance_scale": 1.0,
        "guidance_low": 0.0,
        "guidance_high": 1.0,
    }
    if preset:
        _digits(config)
    if preset == "tiny":
        _tiny(config)
    return config.lock()


def _digits(config):
    """Digits at 16 x 16 pixels, a factor-4 VAE with 4 x 4 latents, 16 tokens; no LPIPS, whose weights need a download."""
    config.steps = 1000
    config.ema_decay = 0.99
    config.data = {
        "source": "digits",
        "options": {"split": "train"},
        "image_size": 16,
        "num_classes": 10,
        "batch_size": 64,
        "workers": 0,
        "max_bad_fraction": 0.0,
    }
    config.vae.update(latent_channels=8, channel_multipliers=(1, 2, 3), channels=16, norm_groups=8, num_res_blocks=1)
    config.sit.update(
        patch_size=1, hidden_size=128, depth=6, num_heads=4, encoder_depth=2, projector_dim=256, remat="none", unroll=6
    )
    config.disc.update(channels=32, num_layers=2)
    config.encoders = {"target": {"architecture": placeholder(object), "weights": "", "image_size": 16}}
    config.loss.vae.lpips = 0.0
    config.optim = {"vae": _adamw(1e-3), "disc": _adamw(2e-4), "sit": _adamw(1e-3)}
    config.init.stats_images = 512
    config.precision = {"compute": "float32", "lpips": "float32"}
    config.checkpoint.update(every=250, keep_last=1, keep_every=250)
    config.log.every = 25
    config.hooks.update(samples_every=250, reconstructions_every=250, images=40)
    config.sampling.update(steps=50, guidance_scale=1.5)


def _tiny(config):
    config.steps = 2
    config.data.batch_size = 8
    config.vae.update(latent_channels=4, channels=8, channel_multipliers=(1, 1, 2))
    config.sit.update(hidden_size=32, depth=2, num_heads=2, encoder_depth=1, projector_dim=32)
    config.disc.channels = 8
    config.encoders.target.architecture = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    config.encoders.target.weights = "random"
    config.init.stats_images = 16
    config.checkpoint.update(every=2, keep_last=1, keep_every=placeholder(int))
    config.log.every = 1
    config.hooks.update(samples_every=2, reconstructions_every=2, images=8)
    config.sampling.steps = 2
