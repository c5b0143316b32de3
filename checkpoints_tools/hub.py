"""Folders -> the Hugging Face hub, by its own client, which finds the token where `hf auth login` or HF_TOKEN have put it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from checkpoints_tools.locate import HUB_NAME


@contextlib.contextmanager
def _reaching(name: str, problem: str, advice: str = "") -> Iterator[None]:
    """Turns the errors of the client, and of the library that it reaches the network by, into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        hints = f"check the name, the token's rights and the network{advice}"
        raise OSError(f"{name} {problem} {constants.ENDPOINT} ({reason}): {hints}") from error


def check(name: str, overwrite: bool) -> None:
    """Raises an error in one line if a model could not be uploaded under this name, before work that would be in vain."""
    match = HUB_NAME.fullmatch(name)
    if not match or match[2]:
        raise ValueError(f"--push {name}: allowed: ORGANIZATION/NAME of the Hugging Face hub")
    if constants.is_offline_mode():
        raise ValueError(f"--push {name}: HF_HUB_OFFLINE is set, which forbids it; unset it")
    if huggingface_hub.get_token() is None:
        raise ValueError(f"--push {name}: there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    with _reaching(name, "cannot be reached on"):
        exists = huggingface_hub.HfApi().repo_exists(name)
    if exists and not overwrite:
        raise FileExistsError(f"{name} exists on {constants.ENDPOINT}: choose another name, or ask to overwrite (--overwrite)")


def push(folder: str | Path, files: Sequence[Path], name: str, private: bool = False) -> str:
    """Uploads files of a folder as one commit, to a repository that is made if there is none; returns its address."""
    api = huggingface_hub.HfApi()
    names = [str(Path(file).relative_to(folder)) for file in files]
    advice = f"; {folder} is complete: to upload it, run the same command again with --overwrite"
    with _reaching(name, "cannot be written on", advice):
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=names, commit_message="Model of repae_jax")
    return str(url)
