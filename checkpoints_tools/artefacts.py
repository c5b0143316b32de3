"""List of the public weights that this project reads: name, use, license; `python -m checkpoints_tools artefacts` prints it.

Names like ORG/REPO and ORG/REPO/FILE are on the Hugging Face hub and can be given wherever a path can; the others are addresses
to download from.
"""

from typing import NamedTuple

GATED = "gated: accept the license on its page and log in (`hf auth login`) before it can be fetched"


class Artefact(NamedTuple):
    """One row of the list."""

    name: str  # on the hub, or a URL
    file: str  # the files that are read; for a URL, the best name for the download
    what: str
    fills: str  # config field, command or function that takes it
    license: str  # as its publisher states it, with '(gated)' where the hub asks for consent; 'see its page' where it is unsure


_CHECKPOINT, _LINEAR = "config.init.checkpoint", "config.lpips.linear"
_INCEPTION = "checkpoints_tools.inception.load_inception"
# a folder's weights may also be in shards, or in .bin files in older ones
_MODEL = "config.json, model.safetensors"
_DIFFUSERS = "config.json, diffusion_pytorch_model.safetensors"
_VAVAE = "hustvl/vavae-imagenet256-f16d32-dinov2"
_MOCO = "https://dl.fbaipublicfiles.com/moco-v3"


def _vae_files(repository, stem, what):
    parts = {
        "vae": (f"{stem}.pt", what),
        "latent_stats": (f"{stem}-latents-stats.pt", f"{what}: latent statistics"),
        "disc": (f"{stem}-discriminator-ckpt.pt", f"{what}: discriminator"),
    }
    return [_file(f"{repository}/{file}", text, f"config.init.{field}", "MIT") for field, (file, text) in parts.items()]


def _file(name, what, fills, license):
    return Artefact(name, name.rpartition("/")[2], what, fills, license)


def _run(name, steps, what):
    return Artefact(f"REPA-E/{name}", f"args.json, checkpoints/{steps}.pt", what, _CHECKPOINT, "MIT")


def _vae_folder(name, what, license):
    return Artefact(name, _DIFFUSERS, what, "config.init.vae", license)


def _encoder(name, what, license, file=_MODEL):
    return Artefact(name, file, what, "config.encoders.NAME.weights", license)


def _dinov2(prefix, kind):
    sizes = {"small": "S", "base": "B", "large": "L", "giant": "g"}
    return [_encoder(prefix + size, f"DINOv2-{letter}{kind}", "Apache-2.0") for size, letter in sizes.items()]


ARTEFACTS = (
    *_vae_files("REPA-E/sdvae", "sdvae-f8d4", "SD-VAE f8d4 to start from"),
    # file names of these two repositories by the pattern of the first, unconfirmed
    *_vae_files("REPA-E/invae", "invae-f16d32", "IN-VAE f16d32 to start from"),
    *_vae_files("REPA-E/vavae", "vavae-f16d32", "VA-VAE f16d32 to start from"),
    *_vae_files("REPA-E/e2e-vavae", "e2e-vavae-400k", "E2E-VAVAE"),
    # and of these two by that of e2e-vavae
    *_vae_files("REPA-E/e2e-sdvae", "e2e-sdvae-400k", "E2E-SDVAE"),
    *_vae_files("REPA-E/e2e-invae", "e2e-invae-400k", "E2E-INVAE"),
    _vae_folder("REPA-E/e2e-sdvae-hf", "E2E-SDVAE, statistics in config.json", "MIT"),
    _vae_folder("REPA-E/e2e-invae-hf", "E2E-INVAE, statistics in config.json", "MIT"),
    _vae_folder("REPA-E/e2e-vavae-hf", "E2E-VAVAE, statistics in config.json", "MIT"),
    _vae_folder("REPA-E/e2e-flux-vae", "FLUX VAE tuned end to end, 16 channels", "see its page"),
    _vae_folder("REPA-E/e2e-sd3.5-vae", "SD3.5 VAE tuned end to end, 16 channels", "see its page"),
    _run("sit-repae-sdvae", "0400000", "REPA-E, SD-VAE, 400k"),
    _run("sit-repae-invae", "0400000", "REPA-E, IN-VAE, 400k"),
    _run("sit-repae-vavae", "0400000", "REPA-E, VA-VAE, 400k"),
    _run("sit-ldm-e2e-vavae", "4000000", "SiT-XL/1 on the frozen E2E-VAVAE"),
    _vae_folder("stabilityai/sd-vae-ft-mse", "SD-VAE f8d4", "MIT"),
    _vae_folder("stabilityai/sd-vae-ft-ema", "SD-VAE f8d4, the same encoder", "MIT"),
    _vae_folder("black-forest-labs/FLUX.1-schnell/vae", "FLUX VAE, 16 channels", "Apache-2.0"),
    _vae_folder("black-forest-labs/FLUX.1-dev/vae", "FLUX VAE, 16 channels", "FLUX.1 [dev] Non-Commercial (gated)"),
    _vae_folder("stabilityai/stable-diffusion-3.5-large/vae", "SD3.5 VAE, 16 channels", "Stability Community (gated)"),
    _vae_folder("stabilityai/stable-diffusion-3.5-medium/vae", "SD3.5 VAE, 16 channels", "Stability Community (gated)"),
    _file(f"{_VAVAE}/vavae-imagenet256-f16d32-dinov2.pt", "VA-VAE of LightningDiT", "config.init.vae", "MIT"),
    _file(f"{_VAVAE}/latents_stats.pt", "VA-VAE of LightningDiT: latent statistics", "config.init.latent_stats", "MIT"),
    _file("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", "DiT-XL/2", _CHECKPOINT, "CC-BY-NC-4.0"),
    _file("nyu-visionx/SiT-collections/SiT-XL-2-256.pt", "SiT-XL/2", "convert --plain_sit", "see its page"),
    Artefact(
        "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
        "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
        "last.pt", "REPA SiT-XL/2", _CHECKPOINT, "MIT",
    ),
    *_dinov2("facebook/dinov2-", ""),
    *_dinov2("facebook/dinov2-with-registers-", " with registers"),
    *(_encoder(f"facebook/dinov3-vit{s}16-pretrain-lvd1689m", f"DINOv3-{s.upper()}", "DINOv3 License (gated)") for s in "sbl"),
    _encoder("facebook/dino-vitb16", "DINO-B", "Apache-2.0"),
    _encoder("openai/clip-vit-large-patch14", "CLIP-L", "see its page"),
    _encoder("facebook/ijepa_vith14_1k", "I-JEPA-H", "CC-BY-NC-4.0"),
    _encoder("facebook/vit-mae-large", "MAE-L", "Apache-2.0"),
    _encoder("google/siglip2-base-patch16-256", "SigLIP2-B", "Apache-2.0"),
    _encoder("google/siglip2-so400m-patch16-256", "SigLIP2-So400m", "Apache-2.0"),
    _encoder(f"{_MOCO}/vit-s-300ep/vit-s-300ep.pth.tar", "MoCo v3 ViT-S", "CC-BY-NC-4.0", "mocov3_vits.pth"),
    _encoder(f"{_MOCO}/vit-b-300ep/vit-b-300ep.pth.tar", "MoCo v3 ViT-B", "CC-BY-NC-4.0", "mocov3_vitb.pth"),
    _encoder(
        "https://drive.google.com/file/d/1Foa2-FqhwIFYjcAAbY9sXyO-1Vwwx-_9/view", "MoCo v3 ViT-L, of RCG",
        "see its page", "mocov3_vitl.pth",
    ),
    _file("https://download.pytorch.org/models/vgg16-397923af.pth", "VGG16", "config.lpips.vgg16", "BSD-3-Clause"),
    _file(
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        "LPIPS v0.1 linear weights", _LINEAR, "BSD-2-Clause",
    ),
    Artefact(
        "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1", "vgg.pth", "the same, of taming-transformers", _LINEAR,
        "see its page",
    ),
    _file(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "FID Inception of pytorch-fid", _INCEPTION, "Apache-2.0",
    ),
    _file(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "FID Inception of torch-fidelity", _INCEPTION, "Apache-2.0",
    ),
    _file(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
        "FID Inception, TensorFlow's graph", _INCEPTION, "Apache-2.0",
    ),
)


def table() -> str:
    """Returns the list as text, one artefact a line, and the meaning of 'gated'."""
    rows = [Artefact._fields, *ARTEFACTS]
    widths = [min(max(map(len, column)), 76) for column in zip(*rows)]  # long URLs push the rest of their line aside
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", GATED])
