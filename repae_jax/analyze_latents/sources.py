"""What the command line of the latent analysis means: sources, images, encoders, and where results go."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
from etils import epath

from checkpoints_tools import identify
from repae_jax import data
from repae_jax.job import frozen_weights
from repae_jax.training import checkpoint

RESULT = "analysis.json"
PICTURES = ("pca.png", "spectrum.png", "channels.png", "equivariance.png", "cknna.png")
PUBLISHED_COUNT = 10_000  # images behind published CKNNA
NEIGHBORS = 10


@dataclasses.dataclass(frozen=True)
class Source:
    """What one SOURCE of the command line says.

    Attributes:
      name: for people.
      path: of the run, checkpoint or VAE.
      step: checkpoint of a run, None for the newest.
    """

    name: str
    path: str
    step: int | None


def _exists(path):
    return epath.Path(path).exists()


def _split_number(text):
    """('path', number) of 'path@number', or (text, None)."""
    path, _, number = text.rpartition("@")
    return (path, int(number)) if path and number.isdigit() and not _exists(text) else (text, None)


def parse_sources(texts, step=None):
    """Sources as the command line gives them.

    Args:
      texts: 'PATH', 'PATH@STEP', each perhaps after 'NAME='.
      step: of those without one.

    Returns:
      tuple of Source with different names: the given ones, or the last parts of the paths that tell them apart.

    Raises:
      ValueError: if two have the same name.
    """
    found = []
    for text in texts:
        name, equals, rest = text.partition("=")
        named = equals and name and not re.search(r"[/\\:]", name) and not _exists(text)
        path, own_step = _split_number(os.path.expanduser(rest if named else text))
        found.append((name if named else None, path, step if own_step is None else own_step))
    paths = {path: Path(path).parts for _, path, _ in found}
    depth = 1
    while len({parts[-depth:] for parts in paths.values()}) < len(paths) and depth < max(map(len, paths.values())):
        depth += 1
    several = len({(path, at) for _, path, at in found}) > len(paths)  # checkpoints of one run
    sources = [
        Source(name or "/".join(paths[path][-depth:]) + (f"@{at}" if several and at is not None else ""), path, at)
        for name, path, at in found
    ]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources have the same name: {', '.join(twice)}; tell them apart with NAME=SOURCE")
    return tuple(sources)


def run_config(source):
    """Config of a run of ours, None for anything else."""
    is_run = (epath.Path(source.path) / "checkpoints").is_dir() and not (epath.Path(source.path) / "args.json").exists()
    return checkpoint.read_config(source.path, source.step) if is_run else None


def open_images(args, configs):
    """(source of images, what it is in words)."""
    own = next((config["data"] for config in configs if config), None)
    if own is None and not (args.data and args.image_size):
        raise ValueError("no SOURCE is a run of ours, whose images would be the default: give --data and --image_size")
    labelled = args.labels == "own"
    name, fields = data.parse_source(args.data, labelled) if args.data else (own["source"], data.given(own["options"]))
    size = args.image_size or own["image_size"]
    described = ",".join(f"{field}={value}" for field, value in dict(fields).items())
    return data.make_source(name, size, **fields), f"{name}:{described}" if described else name


def draw_records(source, count, seed):
    """Positions of images drawn without repetition, in ascending order; all if there are not more: int64 [min(count, N)]."""
    if count >= len(source):
        return np.arange(len(source))
    return np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))


def out_folder(args, sources, configs):
    """Path of the folder for the results, which holds none yet."""
    out = args.out
    if not out and len({source.path for source in sources}) == 1 and configs[0]:
        out = f"{sources[0].path}/analysis"
    if not out:
        raise ValueError("give --out, the folder of the results; only those of one run have a default")
    taken = [name for name in (RESULT, *PICTURES) if (epath.Path(out) / name).exists()]
    if taken:
        raise ValueError(f"{out} holds {', '.join(taken)}: give another --out, or move it away")
    return epath.Path(out)


def choose_encoders(given, configs):
    """label -> (path, image size or None) of the encoders for CKNNA."""
    found = {}
    for text in given:
        path, pixels = _split_number(text)
        found[Path(path).name if Path(path).name not in found else path] = (path, pixels)
    if not given:
        for config in filter(None, configs):
            for fields in config["encoders"].values():
                if fields["weights"] and fields["weights"] != frozen_weights.RANDOM:
                    found[Path(fields["weights"]).name] = (fields["weights"], fields["image_size"])
    if not found:
        raise ValueError("no SOURCE is a run with a trained encoder: name one, --cknna ENCODER")
    return found


def check_cknna(args, sources, configs, count):
    """What can be known to be wrong before anything is computed."""
    if count < NEIGHBORS + 2:
        raise ValueError(
            f"{count} images are too few for CKNNA with k={NEIGHBORS} neighbors: allowed are at least {NEIGHBORS + 2}"
        )
    for source, config in zip(sources, configs):
        kind = identify.identify(source.path, source.step).kind if config is None else "run"
        if kind not in ("run", "training") or (config and config["job"] == "vae"):
            what = identify.KINDS[kind] if config is None else "run of a tokenizer"
            raise ValueError(f"{source.name} is a {what}: it has no SiT for --cknna to look into; leave it out, or --cknna")
        if args.labels == "null" and config and not config["diffusion"]["label_dropout"]:
            raise ValueError(
                f"{source.name} was trained with label_dropout 0 and does not know the null label: give --labels own"
            )
