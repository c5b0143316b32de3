"""Files and folders -> their kind and content, by the names in them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from checkpoints_tools import locate, published, rae, vtp, weights
from checkpoints_tools.mapping import StateDict
from repae_jax import files

# kind -> prefixes of names that only its files have; the first that fits decides
SIGNATURES = {
    "mocov3": ("base_encoder.",),
    "vae": ("decoder.conv_in.", "decoder.conv_out.", "first_stage_model.", rae.SIGNATURE, vtp.SIGNATURE),
    "sit": ("x_embedder.proj.",),
    "discriminator": ("main.0.",),
    "lpips": ("lin0.", "net.slice1."),
    "vgg16": ("features.0.",),
    "inception": ("Conv2d_1a_3x3.",),
}
KINDS = {
    "run": "workdir of a training run",
    "training": "published training checkpoint",
    "sit": "SiT, REPA or DiT weights",
    "vae": "VAE",
    "discriminator": "PatchGAN discriminator",
    "latent_stats": "latent statistics",
    "encoder": "vision encoder (Hugging Face folder)",
    "mocov3": "vision encoder (MoCo v3)",
    "lpips": "LPIPS linear weights or module",
    "vgg16": "torchvision's VGG16",
    "inception": "FID Inception",
}


@dataclasses.dataclass(frozen=True)
class Identified:
    """A file or folder of a known kind, read once."""

    path: Path  # the file with the weights, or the folder of an encoder, VAE or run; an epath.Path of a remote run
    kind: str  # key of KINDS
    arrays: StateDict | None = None  # but of a run, a training checkpoint, an encoder's folder and a TensorFlow graph
    checkpoint: published.TrainingCheckpoint | None = None  # content of a training checkpoint


def identify(path: str | Path, step: int | None = None) -> Identified:
    """Identifies a file or folder, given as `locate.resolve` takes it, by its content; ValueError if it is none of KINDS.

    `step` is the checkpoint to take of a published run, by default the newest; of a run of ours, the reader chooses.
    """
    path = locate.resolve(path)
    with naming(path):
        source = _identify(path, step)
        if step is not None and source.kind not in ("run", "training"):
            raise ValueError(f"{path} is a {KINDS[source.kind]}, which has no step {step} to choose")
        return source


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns any error that reading damaged content raises into a ValueError that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what it looks like, or it is damaged: {reason}") from error


def _identify(path, step):
    if path.is_dir():
        if (path / "args.json").exists():
            file = published.checkpoint_file(path, step)
            return Identified(file, "training", checkpoint=published.read_file(file))
        if (path / "checkpoints").is_dir():
            return Identified(path, "run")
        config = files.read_json(path / "config.json") if (path / "config.json").exists() else {}
        if config.get("model_type", vtp.MODEL_TYPE) != vtp.MODEL_TYPE:
            return Identified(path, "encoder")
    if path.suffix == ".pb":
        return Identified(path, "inception")
    file = weights.weight_file(path)
    if file.suffix in weights.TORCH_SUFFIXES:
        content = weights.read_torch(file)
        if published.is_training_checkpoint(content):
            published.checkpoint_file(file, step)  # one file has no steps to choose from
            return Identified(file, "training", checkpoint=published.from_torch(content, file))
        arrays = weights.unwrap(content, None, file)
    elif file.suffix == ".safetensors" and published.METADATA in weights.read_metadata(file):
        return Identified(file, "training", checkpoint=published.read_file(published.checkpoint_file(file, step)))
    else:
        arrays = weights.read_file(file)
    if set(arrays) in ({"latents_scale", "latents_bias"}, {"mean", "std"}):
        return Identified(file, "latent_stats", arrays)
    for kind, prefixes in SIGNATURES.items():
        if any(name.startswith(prefixes) for name in arrays):
            return Identified(path if path.is_dir() else file, kind, arrays)
    raise ValueError(f"{file} is nothing known here; it holds {', '.join(sorted(arrays)[:6])} …; known are {', '.join(KINDS)}")
