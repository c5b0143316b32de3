"""The public weights that this project reads: where they are, what they fill, and under which licence.

`python -m checkpoints_tools artefacts` prints the list. Names like ORG/NAME are on the Hugging Face hub and can be given
wherever a path can; the others are addresses to download from.
"""

from typing import NamedTuple


class Artefact(NamedTuple):
    """One public file, or a family of them.

    Attributes:
      name: hub name with the file, or a URL.
      what: what it is.
      fills: config field or command that takes it.
      licence: as its publisher states it; 'see its page' where it is not a standard one.
    """

    name: str
    what: str
    fills: str
    licence: str


_ENCODER = "config.encoders.NAME.weights"
ARTEFACTS = (
    Artefact("REPA-E/sdvae/sdvae-f8d4.pt", "SD-VAE to start REPA-E from", "config.init.vae", "MIT"),
    Artefact("REPA-E/sdvae/sdvae-f8d4-latents-stats.pt", "its latent statistics", "config.init.latent_stats", "MIT"),
    Artefact("REPA-E/sdvae/sdvae-f8d4-discriminator-ckpt.pt", "its discriminator", "config.init.disc", "MIT"),
    Artefact("REPA-E/invae", "IN-VAE f16d32: the same three files", "config.init.*", "MIT"),
    Artefact("REPA-E/vavae", "VA-VAE f16d32: the same three files", "config.init.*", "MIT"),
    Artefact("REPA-E/e2e-sdvae, e2e-invae, e2e-vavae", "VAEs tuned end to end: the same three files", "config.init.*", "MIT"),
    Artefact("REPA-E/e2e-sdvae-hf, e2e-invae-hf, e2e-vavae-hf", "the same as diffusers folders", "config.init.vae", "MIT"),
    Artefact("REPA-E/e2e-flux-vae, e2e-sd3.5-vae", "16-channel VAEs tuned end to end", "config.init.vae", "see its page"),
    Artefact("REPA-E/sit-repae-sdvae, -invae, -vavae", "joint training checkpoints", "config.init.checkpoint", "MIT"),
    Artefact("REPA-E/sit-ldm-e2e-vavae", "SiT-XL/1 on the frozen E2E-VAE", "config.init.checkpoint", "MIT"),
    Artefact("stabilityai/sd-vae-ft-mse, sd-vae-ft-ema", "SD-VAE, two decoders", "config.init.vae", "MIT"),
    Artefact("black-forest-labs/FLUX.1-schnell/vae", "FLUX VAE, 16 channels", "config.init.vae", "Apache-2.0"),
    Artefact(
        "stabilityai/stable-diffusion-3.5-large/vae", "SD3.5 VAE, 16 channels", "config.init.vae", "Stability Community"
    ),
    Artefact(
        "hustvl/vavae-imagenet256-f16d32-dinov2", "VA-VAE of LightningDiT, with latents_stats.pt", "config.init.vae", "MIT"
    ),
    Artefact("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", "DiT-XL/2", "convert, verify", "CC-BY-NC-4.0"),
    Artefact("https://github.com/willisma/SiT (README)", "SiT-XL-2-256.pt", "convert --plain_sit", "MIT"),
    Artefact("https://github.com/sihyun-yu/REPA (README)", "REPA SiT-XL/2, last.pt", "config.init.checkpoint", "MIT"),
    Artefact("facebook/dinov2-small, -base, -large, -giant", "DINOv2", _ENCODER, "Apache-2.0"),
    Artefact("facebook/dinov2-with-registers-small, … -giant", "DINOv2 with registers", _ENCODER, "Apache-2.0"),
    Artefact("facebook/dino-vitb16", "DINO", _ENCODER, "Apache-2.0"),
    Artefact("openai/clip-vit-large-patch14", "CLIP-L", _ENCODER, "MIT"),
    Artefact("facebook/ijepa_vith14_1k", "I-JEPA-H", _ENCODER, "CC-BY-NC-4.0"),
    Artefact("facebook/vit-mae-large", "MAE-L", _ENCODER, "Apache-2.0"),
    Artefact("facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3", _ENCODER, "DINOv3 licence"),
    Artefact("google/siglip2-base-patch16-256", "SigLIP2", _ENCODER, "Apache-2.0"),
    Artefact("https://github.com/LTH14/rcg (README)", "MoCo v3 ViT-S/B/L .pth", _ENCODER, "CC-BY-NC-4.0"),
    Artefact("https://download.pytorch.org/models/vgg16-397923af.pth", "VGG16", "config.lpips.vgg16", "BSD-3-Clause"),
    Artefact(
        "https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1/vgg.pth)", "LPIPS linear weights",
        "config.lpips.linear", "BSD-2-Clause",
    ),
    Artefact(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "FID Inception", "evaluation", "Apache-2.0",
    ),
    Artefact(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        "FID Inception, TensorFlow's graph", "evaluation", "Apache-2.0",
    ),
)  # fmt: skip


def table():
    """The list as text, one artefact a line."""
    widths = [max(len(row[i]) for row in ARTEFACTS) for i in range(3)]
    header = ("name", "what", "fills", "licence")
    rows = [header, *ARTEFACTS]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows)
