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
The paper's text says MSE where its code trains with L1; this config follows the code.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg=""):
    """Config of a REPA-E run; see the module's docstring for `arg`."""
    preset, args = common.parse_arg(arg, common.SMALL, sit="XL/2", vae="f8d4", encoder="dinov2-base", resolution=256)
    config = ConfigDict()
    config.job = "repae"
    config.seed = 0
    config.steps = 400_000
    config.accumulation = 1  # micro-batches per step
    config.ema_decay = 0.9999
    config.max_skipped_in_a_row = 20  # stop after so many updates that were not finite

    config.data = {
        "source": "folder",  # see repae_jax/data
        "options": common.source_options(),
        "image_size": args["resolution"],
        "num_classes": 1000,
        "batch_size": 256,  # global
        "workers": 8,  # processes that decode images
        "max_bad_fraction": 0.001,  # share of undecodable images above which the run fails
        "cache": "",  # of a frozen VAE's latents: for configs/ldm.py
        "flip_probability": 0.0,  # of mirrored images; REPA and REPA-E mirror none
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
        "projector": "mlp",  # or 'conv', iREPA's 3x3 convolution
        "projector_dim": 2048,
        "mlp_ratio": 4.0,
        "qk_norm": False,
        "learned_sigma": False,  # True with diffusion.path='ddpm'
        "learned_positions": True,  # as in the published loop; its frozen-VAE training and REPA's keep them fixed
        "remat": "dots",  # 'none', 'dots' (recompute all but matmuls) or 'full'
        "unroll": 1,  # blocks per iteration of the scanned stacks; all of them: faster on TPUs, twice the compilation
    }
    config.disc = {"channels": 64, "num_layers": 3}
    # weights: a Hugging Face name or folder, MoCo v3's file, or 'random' to measure speed without any
    config.encoders = common.encoder_fields(args["encoder"])
    # vgg16: torchvision's weights; linear: those of LPIPS v0.1. 'random' for both to measure speed without any
    config.lpips = {"vgg16": "", "linear": "", "input_range": (-1.0, 1.0)}  # (0., 1.): as the released weights were trained

    config.loss = {
        # diffusion: the ablation without stop-gradient
        "vae": {"l1": 1.0, "l2": 0.0, "lpips": 1.0, "kl": 1e-6, "gan": 0.1, "align": 1.5, "diffusion": 0.0},
        "sit": {"velocity": 1.0, "noise": 0.0, "bound": 0.0, "align": 0.5},
        **common.gan_options(),
        **common.align_schedule(),
    }
    config.diffusion = {
        "path": "linear",  # 'cosine', or 'ddpm': DiT's noise and bound in the place of velocity
        "time_distribution": "uniform",  # or 'lognormal'
        "label_dropout": 0.1,
        "norm_momentum": 0.1,  # of the latent batch norm; 0: none, the initial statistics for good
    }
    config.optim = {name: common.adamw(1e-4) for name in ("vae", "disc", "sit")}
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
    # devices that share one copy of parameters and optimizer state; TPU slices, or nodes of GPUs, among which none is shared
    config.mesh = {"fsdp": 1, "slices": 1}
    config.compiler_options = ""  # of XLA, for the step: "name=value,name=value"; on CPUs beside build.py's own
    config.checkpoint = {"every": 10_000, "keep_last": 2, "keep_every": 50_000}
    config.log = {"every": 100}
    config.hooks = {
        "samples_every": 10_000, "reconstructions_every": 10_000, "images": 64,
        # FID of a few samples against a reference (repae_jax/evaluation/reference_stats.py), with Inception's weights
        "fid_every": 0, "fid_samples": 5000, "fid_reference": "", "fid_inception": "",
    }  # fmt: skip
    config.sampling = {  # of the pictures during training, and the defaults of repae_jax.sample
        "sampler": "sde",  # 'euler', 'heun' or 'sde'; 'ancestral' with diffusion.path='ddpm'
        "steps": 250,
        "guidance_scale": 1.0,
        "guidance_low": 0.0,
        "guidance_high": 1.0,
        "guidance_channels": placeholder(int),  # guide the first ones only, for parity with published DiT samples; default all
    }
    common.shrink(config, preset)
    return config.lock()
