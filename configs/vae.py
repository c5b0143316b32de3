"""A tokenizer alone: a VAE with its discriminator, from scratch or fine-tuned, or the discriminator of a frozen VAE.

    python -m repae_jax.train --config configs/vae.py:vavae-stage1 --workdir runs/vavae-stage1 \
        --config.data.options.path=/data/imagenet/train \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth

After the colon, one of

    name           what it is; how its pixel terms are reduced                 published                 H100 hours
    (none)         REPA-E's loss of the VAE without alignment; mean            -                                274
    sdvae          SD-VAE f8d4 of latent diffusion; sum                        rFID 4.99, PSNR 23.4 (COCO)      127
    sdvae-ft-mse   sd-vae-ft-mse out of sd-vae-ft-ema; sum                     rFID 4.70, PSNR 24.5 (COCO)      233
    invae          IN-VAE f16d32; sum                                          rFID 0.26, PSNR 27.40            161
    vavae-stage1   VA-VAE f16d32, 100 epochs, VF weight 0.5; sum               -                                421
    vavae-stage2   15 more epochs, VF weight 0.1; sum                          -                                 63
    vavae-stage3   15 more epochs, VF with margins; sum                        rFID 0.28, PSNR 26.32             63
    eqvae          EQ-VAE out of SD-VAE, equivariance; sum                     rFID 0.82                         35
    se             scale equivariance out of FLUX' VAE; mean                   gFID 3.07 to 2.49 (DiT-XL/2)       8
    discriminator  the discriminator of a frozen VAE                           -                                 11

and, besides,
    vae         f8d4, f8d16 or f16d32, where no name above says which; f8d4
    encoder     for VF another one than DINOv2-L; as in configs/repae.py
    resolution  256 or 512
    digits      scikit-learn's handwritten digits, on a laptop's CPU in minutes
    tiny        toy size, random encoder: a full step in seconds, for tests

Reduction. Latent diffusion and VA-VAE sum L1 and LPIPS over the pixels, 196,608 times their mean at 256 px, and sum KL over the
latents; REPA-E averages the pixels but sums KL. KL, GAN and VF weigh differently under each, so every name sets
`loss.pixel_reduction` with them. Adaptive weights, clipped at 1e4 (GAN) and 1e8 (VF), belong to the summed loss.

Sources. rFID and PSNR: ImageNet's validation images (REPA-E, arXiv 2504.10483v3, table 14) unless it says otherwise.
    sdvae          latent diffusion's autoencoder_kl_32x32x4.yaml, sd-vae-ft-mse's model card. The rate is 4.5e-6 times the
                   batch, which is not published
    sdvae-ft-mse   the model card: the decoder alone, as the encoder stayed what it was
    invae          the paper says 'latent diffusion's code' on ImageNet; neither its config nor its code is public. Batch and
                   rate are VA-VAE's, the 50 epochs those of VA-VAE's comparisons
    vavae-stage*   LightningDiT's config in three stages, epochs of ImageNet. Its start of the GAN, 5001, counts the steps of
                   both optimizers. It crops at random and gives DINOv2 images in [-1, 1], bilinearly resized; here the crop is
                   central and DINOv2 gets what it was trained with
    eqvae          eqvae_config.yaml, 5 epochs of OpenImages. It names no number of GPUs: batch 160 is 8 of them. Four scales
                   stand for its 25
    se             arXiv 2502.14831, 10,000 to 20,000 steps; rate and other weights are REPA-E's
    discriminator  not published; REPA-E's rate

The stages of VA-VAE follow each other through files in the working folder, which `init` names:

    python -m checkpoints_tools extract-vae runs/vavae-stage1 vavae-stage1.pt
    python -m repae_jax.train --config configs/vae.py:vavae-stage2 --workdir runs/vavae-stage2 \
        --config.data.options.path=/data/imagenet/train \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth

The discriminator's VAE: `--config configs/vae.py:discriminator --config.init.vae=sdvae-f8d4.pt`.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import common, sections


class Recipe(NamedTuple):
    """A published way to train a tokenizer."""

    vae: str  # one of common.VAES
    changes: dict[str, Any]  # dotted fields -> values that differ from REPA-E's
    encoder: str = "none"  # VF's, one of common.ENCODERS


def _adam(learning_rate):
    """Returns changes to latent diffusion's Adam, without clipping, for both networks."""
    fields = {"learning_rate": learning_rate, "b1": 0.5, "b2": 0.9, "clip_norm": 1e9}
    return {f"optim.{name}.{field}": value for name in ("vae", "disc") for field, value in fields.items()}


# L1 + LPIPS, summed, KL 1e-6, and GAN 0.5 times an adaptive weight, in float32
_LDM = {"loss.pixel_reduction": "sum", "loss.vae.gan": 0.5, "loss.adaptive.gan": 1e4, "precision.compute": "float32"}
_VAVAE = {**_LDM, **_adam(1e-4), "loss.adaptive.vf": 1e8}


def _stage(before):
    """Returns changes that start from the files of the previous stage."""
    return {**_VAVAE, **common.vae_files(before, "vae", "disc"), "steps": 75_075, "loss.gan_start": 1, "loss.vae.vf": 0.1}


RECIPES = {
    "sdvae": Recipe("f8d4", {**_LDM, **_adam(4.32e-4), "steps": 246_803, "data.batch_size": 96, "loss.gan_start": 50_001}),
    "sdvae-ft-mse": Recipe(
        "f8d4",
        {
            **_LDM, **_adam(8.64e-4), "steps": 280_000, "data.batch_size": 192, "ema_decay": 0.9999,
            "loss.vae.l1": 0.0, "loss.vae.l2": 1.0, "loss.vae.lpips": 0.1,
            "init.vae": "stabilityai/sd-vae-ft-ema", "optim.vae.fixed": ("encoder", "quant_conv"),
        },
    ),
    "invae": Recipe("f16d32", {**_LDM, **_adam(1e-4), "steps": 250_250, "loss.gan_start": 2501}),
    "vavae-stage1": Recipe("f16d32", {**_VAVAE, "steps": 500_500, "loss.gan_start": 2501, "loss.vae.vf": 0.5}, "dinov2-large"),
    "vavae-stage2": Recipe("f16d32", _stage("vavae-stage1"), "dinov2-large"),
    "vavae-stage3": Recipe("f16d32", {**_stage("vavae-stage2"), "loss.vf_margins": (0.5, 0.25)}, "dinov2-large"),
    "eqvae": Recipe(
        "f8d4",
        {
            **_LDM, **_adam(7.2e-4), "steps": 55_000, "data.batch_size": 160, "loss.eq_scales": (1.0, 0.25, 0.5, 0.75),
            "init.vae": "stabilityai/sd-vae-ft-ema",
        },
    ),
    "se": Recipe("f8d16", {"steps": 10_000, "loss.vae.se": 0.25, "init.vae": "black-forest-labs/FLUX.1-schnell/vae"}),
    "discriminator": Recipe("f8d4", {"steps": 50_000, **{f"loss.vae.{term}": 0.0 for term in ("l1", "lpips", "kl", "gan")}}),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a tokenizer's run; see the module's docstring for `arg`."""
    name, preset, args = common.parse_arg(arg, tuple(RECIPES), common.SMALL, vae="", encoder="", resolution=256)
    recipe = RECIPES.get(name, Recipe(args["vae"] or "f8d4", {}))
    if args["vae"] not in ("", recipe.vae):
        raise ValueError(f"preset {name!r} is for vae={recipe.vae}, not vae={args['vae']}: leave one of them out")
    config = ConfigDict(
        {
            **sections.run("vae", ema_decay=0.0),  # no average: the VAE itself
            "data": sections.data(args["resolution"]),
            "vae": sections.vae(recipe.vae),
            "disc": sections.DISC,
            "encoders": sections.encoders(args["encoder"] or recipe.encoder),
            "lpips": sections.LPIPS,
            "loss": sections.tokenizer_loss(),
            "optim": {name: sections.adamw() for name in ("vae", "disc")},
            "init": {"vae": "", "disc": ""},
            "precision": sections.PRECISION,
            "hooks": {"images": 64, "reconstructions_every": 10_000},
        }
    )
    config.lock().update_from_flattened_dict(recipe.changes)  # refuses unknown fields
    common.shrink(config.unlock(), preset)
    return config.lock()
