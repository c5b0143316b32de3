"""Interpretation of the command line of the latent analysis: sources, images, encoders, folder of the results."""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from checkpoints_tools import identify
from repae_jax import data
from repae_jax.evaluation.short_names import short_names
from repae_jax.files import RANDOM
from repae_jax.sampling.load_model import split_step
from repae_jax.training import checkpoint

RESULT = "analysis.json"
PICTURES = ("pca.png", "spectrum.png", "channels.png", "equivariance.png", "cknna.png")
PUBLISHED_COUNT = 10_000  # images behind published CKNNA
NEIGHBORS = 10

Configs = Sequence[Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Source:
    """A SOURCE of the command line."""

    name: str  # for people
    path: str  # run, checkpoint or VAE
    step: int | None  # checkpoint of a run, None for the newest


def parse_sources(texts: Sequence[str], step: int | None = None) -> tuple[Source, ...]:
    """Parses sources 'PATH' or 'PATH@STEP', each perhaps after 'NAME='; `step` is that of those without one.

    Names that are not given are the last parts of the paths that tell them apart. ValueError if two are the same.
    """
    parsed = []
    for text in texts:
        name, equals, rest = text.partition("=")
        is_named = equals and name and not re.search(r"[/\\:]", name) and not epath.Path(text).exists()
        path, own_step = split_step(os.path.expanduser(rest if is_named else text))
        parsed.append((name if is_named else None, path, step if own_step is None else own_step))
    short = short_names([path for _, path, _ in parsed])
    show_steps = len({(path, at) for _, path, at in parsed}) > len(short)  # several checkpoints of a run
    names = [name or short[path] + (f"@{at}" if show_steps and at is not None else "") for name, path, at in parsed]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources have the same name: {', '.join(repeated)}; tell them apart with NAME=SOURCE")
    return tuple(Source(name, path, at) for name, (_, path, at) in zip(names, parsed))


def run_config(source: Source) -> Mapping[str, Any] | None:
    """Returns the config of a run of ours, None for anything else."""
    is_run = (epath.Path(source.path) / "checkpoints").is_dir() and not (epath.Path(source.path) / "args.json").exists()
    return checkpoint.read_config(source.path, source.step) if is_run else None


def open_images(args: argparse.Namespace, configs: Configs) -> tuple[Any, str]:
    """Opens the source of images of --data, by default that of the first run; returns it with its description."""
    own = next((config["data"] for config in configs if config), None)
    if own is None and not (args.data and args.image_size):
        raise ValueError("no SOURCE is a run of ours, whose images would be the default: give --data and --image_size")
    labeled = args.labels == "own"
    name, fields = data.parse_source(args.data, labeled) if args.data else (own["source"], data.given(own["options"]))
    size = args.image_size or own["image_size"]
    description = ",".join(f"{field}={value}" for field, value in fields.items())
    return data.make_source(name, size, **fields), f"{name}:{description}" if description else name


def draw_records(source: Any, count: int, seed: int) -> Int[np.ndarray, " n"]:
    """Draws records without repetition, in ascending order; returns all if there are not more than `count`."""
    if count >= len(source):
        return np.arange(len(source))
    return np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))


def out_folder(args: argparse.Namespace, sources: Sequence[Source], configs: Configs) -> epath.Path:
    """Returns the folder for the results; raises ValueError if it holds some, or has no default."""
    out = args.out
    if not out and len({source.path for source in sources}) == 1 and configs[0]:
        out = f"{sources[0].path}/analysis"
    if not out:
        raise ValueError("give --out, the folder of the results; only those of one run have a default")
    if existing := [name for name in (RESULT, *PICTURES) if (epath.Path(out) / name).exists()]:
        raise ValueError(f"{out} holds {', '.join(existing)}: give another --out, or move it away")
    return epath.Path(out)


def choose_encoders(given: Sequence[str], configs: Configs) -> dict[str, tuple[str, int | None]]:
    """Returns path and image size of the encoders for CKNNA by label: the given ones, or those of the runs."""
    encoders = {}
    for text in given:
        path, image_size = split_step(text)
        encoders[Path(path).name if Path(path).name not in encoders else path] = (path, image_size)
    if not given:
        for config in filter(None, configs):
            for fields in config["encoders"].values():
                if fields["weights"] and fields["weights"] != RANDOM:
                    encoders[Path(fields["weights"]).name] = (fields["weights"], fields["image_size"])
    if not encoders:
        raise ValueError("no SOURCE is a run with a trained encoder: name one, --cknna ENCODER")
    return encoders


def check_cknna(args: argparse.Namespace, sources: Sequence[Source], configs: Configs, count: int) -> None:
    """Raises ValueError for mistakes that can be found before anything is computed."""
    if count < NEIGHBORS + 2:
        allowed = f"allowed are at least {NEIGHBORS + 2}"
        raise ValueError(f"{count} images are too few for CKNNA with k={NEIGHBORS} neighbors: {allowed}")
    for source, config in zip(sources, configs):
        kind = identify.identify(source.path, source.step).kind if config is None else "run"
        if kind not in ("run", "training") or (config and config["job"] == "vae"):
            name = identify.KINDS[kind] if config is None else "run of a tokenizer"
            raise ValueError(f"{source.name} is a {name}: it has no SiT for --cknna to look into; leave it out, or --cknna")
        if args.labels == "null" and config and not config["diffusion"]["label_dropout"]:
            unknown = f"{source.name} was trained with label_dropout 0 and does not know the null label"
            raise ValueError(f"{unknown}: give --labels own")
