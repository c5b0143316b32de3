"""Where weights are -> local paths: files and folders, the Hugging Face hub, and remote storage such as gs://."""

import hashlib
import os
import re
from pathlib import Path

from absl import logging
from etils import epath

_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".pb")
# fnmatch's * crosses folders, so a pattern that begins with one would fetch a whole pipeline
_WEIGHTS = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*.safetensors",
)  # fmt: skip
_PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")  # only where there is no safetensors file
_TRAINING = ("args.json", "checkpoints/*.pt")  # a published training run, where there is neither


def resolve(name_or_path):
    """Local path of weights, fetched if need be.

    Args:
      name_or_path: a file or folder that exists; a model of the Hugging Face hub, 'organisation/name', or a folder or file
        in it, 'organisation/name/vae' or 'organisation/name/file.pt', with the hub's cache and HF_HUB_OFFLINE respected; or
        an address such as gs://bucket/file, copied to ~/.cache/repae_jax (XDG_CACHE_HOME) through etils.epath.

    Returns:
      Path.

    Raises:
      FileNotFoundError: if there is neither such a path nor such a model, or it cannot be fetched.
    """
    name = str(name_or_path)
    if "://" in name:
        return _from_storage(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w./-]*))?", name)
    if not match or match[1].endswith(_SUFFIXES):
        raise FileNotFoundError(f"{name} does not exist, and is no hub name of the form 'organisation/name[/file]'")
    return _from_hub(*match.groups())


def _from_hub(repository, inside):
    import huggingface_hub

    try:
        if inside and inside.endswith(_SUFFIXES):
            return Path(huggingface_hub.hf_hub_download(repository, inside))
        below = f"{inside}/" if inside else ""
        for patterns in (_WEIGHTS, _PICKLED, _TRAINING):
            wanted = [below + pattern for pattern in patterns]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted)) / below
            if any(file.suffix in (".safetensors", ".bin") for file in folder.glob("*")):
                break
        return folder
    except (OSError, ValueError) as error:
        name = f"{repository}/{inside}" if inside else repository
        raise FileNotFoundError(
            f"{name} is no local path and cannot be had from the Hugging Face hub ({error}). Check the name "
            f"and the network (is HF_HUB_OFFLINE set?), or run `hf download {repository}` on a machine that has one "
            "and give the path of a copy of that folder"
        ) from error


def _from_storage(address):
    """A copy per version of the remote file or folder, so that a changed one is never taken for the old."""
    remote = epath.Path(address)
    if not remote.exists():
        raise FileNotFoundError(f"{address} does not exist, or cannot be read with these credentials")
    files = [remote] if remote.is_file() else sorted(file for file in remote.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{address} holds no weights ({', '.join(_SUFFIXES)})")
    stats = [(file.name, file.stat().length, file.stat().mtime) for file in files]
    version = hashlib.sha256(repr((address, stats)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repae_jax" / version
    cache.mkdir(parents=True, exist_ok=True)
    for file, (name, length, _) in zip(files, stats):
        if not (cache / name).exists():
            logging.info("copying %s (%.2f GB) to %s", file, length / 1e9, cache)
            partial = cache / f".{name}.{os.getpid()}.tmp"
            try:
                file.copy(partial, overwrite=True)
                os.replace(partial, cache / name)
            finally:
                partial.unlink(missing_ok=True)
    return cache / files[0].name if remote.is_file() else cache
