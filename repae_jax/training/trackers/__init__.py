"""Trackers: where a run's metrics and pictures go beside its `metrics.jsonl`, chosen by `config.log.trackers`.

A tracker's package is imported when the tracker is opened, in process 0 alone. Where it keeps its data is its own matter, as
are its environment variables: WANDB_MODE=offline, TRACKIO_SPACE_ID, MLFLOW_TRACKING_URI and others. A run has a name of its own
at all of them, kept in the workdir's `trackers.json`, by which a resumed run continues its record.

To add a tracker, write a subclass of `Tracker` and put it into `TRACKERS`.
"""

import functools
import importlib.util
import os
import uuid
from collections.abc import Sequence

from absl import logging
from etils import epath

from repae_jax import faults, files, waiting
from repae_jax.training.trackers.base import Record, Tracker, named, reason
from repae_jax.training.trackers.experiments import CLOSE_SECONDS, Mlflow, Trackio, Wandb
from repae_jax.training.trackers.tensorboard_files import Clu, TensorBoard

WARN_SECONDS = 20  # between two warnings while a tracker is opened
IDENTITY = "trackers.json"  # in the workdir, see `identify`
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "clu": Clu, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow
}  # fmt: skip
# The packages' own settings, unless the environment has them. By default wandb waits for ever for a server that does not
# answer, and MLflow for a quarter of an hour at every call, while a machine is paid for, or about to be taken away.
_PATIENCE = {
    "WANDB_FINISH_TIMEOUT": str(CLOSE_SECONDS), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}  # fmt: skip


def _be_impatient():
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)


def check(names: Sequence[str]) -> None:
    """Raises ImportError for a tracker whose package is not installed, ValueError for one without the key that it needs."""
    _be_impatient()
    for name in names:
        tracker = TRACKERS[name]
        if importlib.util.find_spec(tracker.package) is None:
            extra = f"-e .[{tracker.extra}]" if tracker.extra else tracker.package
            raise ImportError(f"{named(name)}, whose package {tracker.package} is not installed: pip install {extra}")
        if name in _KEYS:
            _KEYS[name]()


def _check_wandb_key():
    """Asks for the key, where somebody can be asked and wandb is not offline."""
    import wandb

    advice = "run `wandb login`, set WANDB_API_KEY, or keep the metrics on this machine with WANDB_MODE=offline"
    try:
        mode = wandb.setup().settings.mode
    except ValueError as error:  # a variable of the environment, in many lines
        raise ValueError(f"{named('wandb')}, whose settings are wrong: {' '.join(str(error).split())}") from error
    if mode in ("offline", "dryrun", "disabled"):
        return
    try:
        has_key = wandb.login()
    except wandb.Error as error:
        raise ValueError(f"{named('wandb')}: {faults.first_line(error)} Allowed: {advice}") from error
    if not has_key and mode == "online":
        raise ValueError(f"{named('wandb')}, but no key was given: {advice}")


def _check_trackio_token():
    from huggingface_hub import get_token

    if (space := os.environ.get("TRACKIO_SPACE_ID")) and not get_token():
        advice = "run `hf auth login`, set HF_TOKEN, or unset TRACKIO_SPACE_ID to keep the metrics on this machine"
        raise ValueError(f"{named('trackio')}, and TRACKIO_SPACE_ID={space} needs a token of the hub: {advice}")


_KEYS = {"wandb": _check_wandb_key, "trackio": _check_trackio_token}


def identify(workdir: epath.PathLike, is_new: bool) -> str:
    """Returns the name that trackers know a run by, of `trackers.json` in its workdir, written there where it is missing.

    A run `is_new` before its first checkpoint: then it gets another one, as `metrics.jsonl` begins anew. ValueError if the
    file is damaged.
    """
    path = epath.Path(workdir) / IDENTITY
    if is_new or not path.exists():
        files.write_json(path, {"run": uuid.uuid4().hex[:12]}, overwrite=True)
    try:
        return files.read_json(path)["run"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: remove it, and the trackers begin a new record") from error


def open_tracker(name: str, run: Record) -> Tracker:
    """Returns an open tracker of TRACKERS; OSError, with one line, if it cannot be opened."""
    _be_impatient()
    try:
        with waiting.reporting(functools.partial(logging.warning, "waiting for %s, for %.0f s so far", name), WARN_SECONDS):
            return TRACKERS[name](run)
    except Exception as error:  # the packages have errors of their own for a server that refuses or is not there
        advice = "leave it out, or run the command again"
        raise OSError(f"{named(name)}, which cannot be opened ({reason(error)}): {advice}") from error
