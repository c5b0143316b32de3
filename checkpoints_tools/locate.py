"""Names of weights -> local paths: files and folders, the Hugging Face hub, and remote storage such as gs://."""

import contextlib
import fnmatch
import hashlib
import os
import re
import secrets
from pathlib import Path

from absl import logging
from etils import epath

HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w./-]*))?")  # organization/name, and perhaps a path inside it
_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".tar", ".ckpt", ".bin", ".npz", ".pb")
# names of the weights in a Hugging Face folder; the first that exists counts
SAFETENSORS = (
    "model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
)
PICKLED = (  # only where there is no safetensors file
    "pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"
)
# fnmatch's * crosses folders, so a pattern that begins with one would fetch a whole pipeline
_WEIGHTS = ("config.json", *SAFETENSORS, "model-*.safetensors", "diffusion_pytorch_model-*.safetensors")
_PICKLED = (*PICKLED, "pytorch_model-*.bin", "diffusion_pytorch_model-*.bin")
_PIPELINE = ("model_index.json", "repae_jax.json")  # what marks a pipeline of ours
_PIPELINE_FILES = (*_PIPELINE, "*/config.json", "*/diffusion_pytorch_model.safetensors")
_STORES = ("gs", "s3", "az")
_TRAINING = ("args.json", "checkpoints/*.pt")  # a published training run, where there is neither


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Returns the local path of weights, fetched if need be. Called once, where a name enters; the rest takes its paths.

    A name is a file or folder that exists; a model of the Hugging Face hub, 'organization/name', or a folder or file in it,
    'organization/name/vae' or 'organization/name/file.pt', with the hub's cache and HF_HUB_OFFLINE respected; or an address
    such as gs://bucket/file, copied to ~/.cache/repae_jax (XDG_CACHE_HOME) through etils.epath: a file, a model's folder, a
    diffusers pipeline (its `vae` alone; `pipeline` gives all of it) or a published training run (its newest checkpoint alone).

    Of a diffusers pipeline, the path is that of its `vae`; of a training run of ours in remote storage, its epath.Path, as it
    is read where it is. Raises FileNotFoundError if there is no such thing, or it cannot be fetched.
    """
    name = str(name_or_path)
    if "://" in name:
        return _model_folder(_from_storage(name))
    path = Path(name).expanduser()
    if path.exists():
        return _model_folder(path)
    match = HUB_NAME.fullmatch(name)
    if not match or match[1].endswith(_SUFFIXES):
        raise FileNotFoundError(f"{name} does not exist, and is no hub name of the form 'organization/name[/file]'")
    return _from_hub(*match.groups())


def pipeline(name: str | os.PathLike) -> Path | None:
    """Returns the local path of a diffusers pipeline that was exported here, fetched if need be; None if it is another thing.

    The name is that of a folder, 'organization/name' on the Hugging Face hub, or an address such as gs://bucket/folder.
    """
    if "://" in str(name):
        return _stored_pipeline(str(name))
    folder = Path(name).expanduser()
    if folder.exists() or not (match := HUB_NAME.fullmatch(str(name))) or match[2] or match[1].endswith(_SUFFIXES):
        return folder if all((folder / file).is_file() for file in _PIPELINE) else None
    import huggingface_hub
    try:
        for file in _PIPELINE:  # small: a model of another kind is not fetched
            huggingface_hub.hf_hub_download(str(name), file)
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(_PIPELINE_FILES)))
    except (OSError, ValueError):
        return None  # `resolve` says why, if it is nothing else


def _stored_pipeline(address):
    """A copy of a pipeline in remote storage; None if there is none."""
    if address.partition("://")[0] not in _STORES:
        return None  # `resolve` says what is allowed
    with _reaching(address):
        remote = epath.Path(address)
        if not all((remote / file).exists() for file in _PIPELINE):
            return None
        found = [file for pattern in _PIPELINE_FILES for file in sorted(remote.glob(pattern))]
    return _copies(address, remote, found)


def _model_folder(path):
    """The path itself, or the `vae` of a diffusers pipeline, which has nothing else that is read."""
    if any((path / name).exists() for name in ("config.json", "args.json", "checkpoints", *SAFETENSORS, *PICKLED)):
        return path
    return path / "vae" if (path / "vae").is_dir() else path


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
    """Turns the many error types of the libraries behind epath into one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FileNotFoundError(
            f"{address} cannot be read ({reason}). Check the address, the network and your permission (`gcloud auth "
            "application-default login`), and that what reads it is installed (gs://: `pip install -e .[gcs]`, s3://: "
            "`pip install s3fs`); or download it and give the local path"
        ) from error


def _from_storage(address):
    """A copy of what a remote file or folder holds; the address itself if that is a run of ours."""
    scheme = address.partition("://")[0]
    if scheme not in _STORES:
        raise ValueError(
            f"{address} cannot be read from {scheme}://; allowed: gs://, s3:// and az://, names on the Hugging Face hub and "
            "local paths. Download it (`curl -LO`) and give the local path"
        )
    with _reaching(address):
        remote = epath.Path(address)
        if not remote.exists():
            raise FileNotFoundError(f"{address} does not exist, or cannot be read with these credentials")
        is_file = remote.is_file()
        if is_file:
            folder, files = remote.parent, [remote]
        elif (remote / "checkpoints").is_dir() and not (remote / "args.json").exists():
            return remote  # a run of ours
        else:
            folder, files = remote, _weight_files(remote)
        if not files:
            sought = f"none of {', '.join((*_WEIGHTS, *PICKLED, *_TRAINING))}, nor checkpoints of a run"
            raise FileNotFoundError(f"{address} holds no weights: {sought}; give the address of the file itself")
    copies = _copies(address, folder, files)
    return copies / remote.name if is_file else copies


def _copies(address, folder, files):
    """The local folder with copies of remote files: one per version, so that a changed one is never taken for the old."""
    with _reaching(address):
        names = [str(file.relative_to(folder)) for file in files]
        stats = [(name, file.stat().length, file.stat().mtime) for name, file in zip(names, files)]
    version = hashlib.sha256(repr((address, stats)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repae_jax" / version
    for file, (name, length, _) in zip(files, stats):
        if not (cache / name).exists():
            logging.info("copying %s (%.2f GB) to %s", file, length / 1e9, cache)
            with _reaching(address):
                _copy(file, cache / name)
    return cache


def _copy(file, target):
    """Copies a remote file to a local one that is either complete or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        file.copy(partial, overwrite=True)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def training_files(folder: Path) -> dict[int, Path]:
    """Returns step -> file of the checkpoints of a published training run, whose folder is local or an epath.Path."""
    files = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    return {int(file.stem): file for file in files if re.fullmatch(r"\d+\.(pt|safetensors)", file.name)}


def _weight_files(remote):
    """The files to copy of a remote folder: those of a published run, of a pipeline's VAE, or of a model."""
    if (remote / "args.json").exists() and (remote / "checkpoints").is_dir():
        saved = training_files(remote)
        return [remote / "args.json", *([saved[max(saved)]] if saved else [])]
    present = sorted(_model_folder(remote).iterdir())
    whole, pickled = (
        [file for file in present if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
        for patterns in (_WEIGHTS, _PICKLED)
    )
    return whole if any(".safetensors" in file.name for file in whole) else whole + pickled
