"""Where weights are -> local paths: files and folders, the Hugging Face hub, and remote storage such as gs://."""

import contextlib
import fnmatch
import hashlib
import os
import re
import secrets
from pathlib import Path

from absl import logging
from etils import epath

HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w./-]*))?")  # organisation/name, and what is meant in it
_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".tar", ".ckpt", ".bin", ".npz", ".pb")
# what a Hugging Face folder may call its weights; the first that exists counts
SAFETENSORS = (
    "model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
PICKLED = (  # only where there is no safetensors file
    "pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"
)  # fmt: skip
# fnmatch's * crosses folders, so a pattern that begins with one would fetch a whole pipeline
_WEIGHTS = ("config.json", *SAFETENSORS, "model-*.safetensors", "diffusion_pytorch_model-*.safetensors")
_PICKLED = (*PICKLED, "pytorch_model-*.bin", "diffusion_pytorch_model-*.bin")
_TRAINING = ("args.json", "checkpoints/*.pt")  # a published training run, where there is neither


def resolve(name_or_path):
    """Local path of weights, fetched if need be.

    Args:
      name_or_path: a file or folder that exists; a model of the Hugging Face hub, 'organisation/name', or a folder or file
        in it, 'organisation/name/vae' or 'organisation/name/file.pt', with the hub's cache and HF_HUB_OFFLINE respected; or
        an address such as gs://bucket/file, copied to ~/.cache/repae_jax (XDG_CACHE_HOME) through etils.epath: a file, a
        model's folder, a diffusers pipeline (its `vae` alone) or a published training run (its newest checkpoint alone).

    Returns:
      Path. Of the workdir of a training run of ours in remote storage, its epath.Path: it is read where it is.

    Raises:
      FileNotFoundError: if there is neither such a path nor such a model, or it cannot be fetched.
      ValueError: for an address of a kind that cannot be read, such as https://.
    """
    name = str(name_or_path)
    if "://" in name:
        return _from_storage(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = HUB_NAME.fullmatch(name)
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


@contextlib.contextmanager
def _reaching(address):
    """What the many libraries behind epath raise, each with types of its own, as one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FileNotFoundError(
            f"{address} cannot be read ({reason}). Check the address, the network and your permission (`gcloud auth "
            "application-default login`), and that what reads it is installed (`pip install gcsfs`, or s3fs); or download it "
            "and give the local path"
        ) from error


def _from_storage(address):
    """A copy per version of the remote file or folder, so that a changed one is never taken for the old."""
    scheme = address.partition("://")[0]
    if scheme not in ("gs", "s3", "az"):
        raise ValueError(
            f"{address} cannot be read from {scheme}://; allowed: gs://, s3:// and az://, names on the Hugging Face hub and "
            "local paths. Download it (`curl -LO`) and give the local path"
        )
    with _reaching(address):
        remote = epath.Path(address)
        if not remote.exists():
            raise FileNotFoundError(f"{address} does not exist, or cannot be read with these credentials")
        if remote.is_file():
            folder, files = remote.parent, [remote]
        elif (remote / "checkpoints").is_dir() and not (remote / "args.json").exists():
            return remote  # a run of ours
        else:
            folder, files = remote, _files_of(remote)
        if not files:
            raise FileNotFoundError(
                f"{address} holds no weights: none of {', '.join((*_WEIGHTS, *PICKLED, *_TRAINING))}, nor checkpoints "
                "of a run; give the address of the file itself"
            )
        names = [str(file.relative_to(folder)) for file in files]
        stats = [(name, file.stat().length, file.stat().mtime) for name, file in zip(names, files)]
    version = hashlib.sha256(repr((address, stats)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repae_jax" / version
    for file, (name, length, _) in zip(files, stats):
        target = cache / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            logging.info("copying %s (%.2f GB) to %s", file, length / 1e9, cache)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            try:
                with _reaching(address):
                    file.copy(partial, overwrite=True)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
    return cache / names[0] if remote.is_file() else cache


def training_files(folder):
    """step -> file, of the checkpoints of a published training run; `folder` is local or an epath.Path."""
    files = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    return {int(file.stem): file for file in files if re.fullmatch(r"\d+\.(pt|safetensors)", file.name)}


def _files_of(remote):
    """The files of a remote folder that are read: a published run's, a pipeline's VAE's, or a model's."""
    if (remote / "args.json").exists() and (remote / "checkpoints").is_dir():
        saved = training_files(remote)
        return [remote / "args.json", *([saved[max(saved)]] if saved else [])]
    if not (remote / "config.json").exists() and (remote / "vae").is_dir():
        remote = remote / "vae"
    files = sorted(remote.iterdir())
    whole, pickled = (
        [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
        for patterns in (_WEIGHTS, _PICKLED)
    )
    return whole if any(".safetensors" in file.name for file in whole) else whole + pickled
