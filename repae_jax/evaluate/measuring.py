"""One evaluation: images of a model, or that are there already, measured against a reference; and the writing of references.

The settings, `args`, are those that the command line of `repae_jax.evaluate` has read.
"""

import argparse
import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from repae_jax import buckets, files, sample
from repae_jax import images as pictures
from repae_jax.distributed import multihost
from repae_jax.evaluation import confusions, generation, space_scores
from repae_jax.evaluation.image_sets import ImageSet, open_images, sampled_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, load_network
from repae_jax.evaluation.reference_stats import Reference, check_on_disk, check_spaces, measure_reference, write_reference
from repae_jax.evaluation.space_networks import SpaceNetwork, load_space_networks
from repae_jax.sampling.load_model import LoadedModel, load_model, load_weaker
from repae_jax.training.checkpoint import fingerprint

PAIR_COLUMNS = 8  # images in a row of the picture of closest pairs


@dataclasses.dataclass(frozen=True)
class Source:
    """The images to evaluate."""

    images: ImageSet
    protocol: dict  # settings of the model that draws them; empty if they exist already
    labels: np.ndarray | None  # int32 [N] of the images that are drawn
    out: epath.Path | None  # default path of the result; None if there is no place for it


class Networks(NamedTuple):
    """The networks that measure images."""

    inception: InceptionNetwork
    spaces: dict[str, SpaceNetwork]  # by name


def load_networks(args: argparse.Namespace) -> Networks:
    """Loads the networks that an evaluation asks for."""
    return Networks(load_network(args.inception, args.batch_size), load_space_networks(args.spaces, args.batch_size))


def load_trained(args: argparse.Namespace) -> LoadedModel:
    """Loads the model that draws, on this process's devices; ValueError if these cannot share a batch."""
    devices = jax.local_devices()
    if args.batch_size % len(devices):
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {len(devices)} devices")
    model = load_model(args.source, args.step, devices, vae_path=args.vae, sampler=args.sampler, ema=args.ema)
    return load_weaker(model, args.autoguidance, args.vae) if args.autoguidance else model


def open_source(args: argparse.Namespace, trained: LoadedModel | None) -> Source:
    """Opens the images to evaluate; a model that draws them is loaded unless it is given."""
    path = epath.Path(args.source)
    images = open_images(path)
    if images is None:
        return _open_model(args, path, trained or load_trained(args))
    if args.model_options:
        raise ValueError(f"{', '.join(args.model_options)}: for models only; the images of {path} are there already")
    name = path.with_suffix("").name if path.suffix == ".npz" else path.name
    return Source(images, {}, None, path.with_name(f"{name}.evaluation.json"))


def _open_model(args, path, trained):
    sampling, classes = sample.choose_sampling(args, trained)
    labels = sample.draw_labels(args.labels, args.num_samples, classes, args.seed)
    protocol = {
        "model": str(args.source), "model_checksum": fingerprint(trained.params), "step": trained.step,
        "ema_decay": trained.ema_decay, **sample.describe(sampling, trained), "labels": args.labels,
        "classes": classes if args.classes else "all", "seed": args.seed, "pixels": "truncated to uint8",
    }  # fmt: skip
    if args.out is None and not path.is_dir():
        raise ValueError(f"{path} is no folder to keep the result in: give --out")
    draw = functools.partial(sample.sample_batches, trained, sampling, labels, args.batch_size, args.seed)
    shape = [side * trained.nets.vae.factor for side in trained.latent_shape[:2]]
    description = {name: value for name, value in protocol.items() if name != "model"}
    images = sampled_images(draw, len(labels), shape, args.batch_size, description)
    name = sample.settings_name(trained.step, sampling, args, trained.weaker_for(sampling))
    return Source(images, protocol, labels, path / "evaluations" / f"{name}.json" if path.is_dir() else None)


def _check_new(*paths):
    for path in filter(None, paths):
        if epath.Path(path).exists():
            raise ValueError(f"{path} exists; choose another name, or move it away")


def check_reference(args: argparse.Namespace) -> None:
    """Checks, before anything is loaded, that the reference exists and can be compared with in all spaces."""
    if args.reference.endswith(".npz"):
        check_on_disk(args.reference)
        if not Path(args.reference).is_file():
            raise FileNotFoundError(f"{args.reference} does not exist; check --reference")
        check_spaces(args.reference, args.spaces)


def run(
    args: argparse.Namespace,
    trained: LoadedModel | None = None,
    networks: Networks | None = None,
    opened: dict[str, Reference] | None = None,
) -> tuple[epath.Path, dict[str, Any] | None]:
    """Evaluates as the settings say; returns the path of the result and its content (None in other processes).

    `trained` is the model that draws, and `networks` what `load_networks` returns, if they are loaded already. `opened` is a
    dict that keeps the reference for further evaluations: it may take longer to measure than the samples.
    """
    if args.out and not args.out.endswith(".json"):
        raise ValueError(f"--out={args.out}: the result is a file ending in .json")
    check_reference(args)
    is_first = jax.process_index() == 0
    if is_first:  # before a model is loaded; others may come when the result is there, and have had no share
        _check_new(args.out)
    source = open_source(args, trained)
    images, out = source.images, epath.Path(args.out) if args.out else source.out
    if is_first:
        _check_new(out, out.with_suffix(".png") if "dinov2" in args.spaces else None, args.keep_samples)
        for path in filter(None, (out, args.keep_samples)):
            epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    folder = buckets.scratch(out.with_suffix(".parts"))
    multihost.check_shared(epath.Path(folder.parent))
    inception, spaces = networks or load_networks(args)
    opened = {} if opened is None else opened
    if "reference" not in opened:
        unfinished = folder / "reference"
        opened["reference"] = generation.open_reference(args.reference, images, inception, unfinished, out.exists, spaces)
    reference = opened["reference"]
    kept = np.full(images.count, bool(args.keep_samples))
    parts = FeatureParts(folder / "samples", images, inception, kept, out.exists, spaces)
    parts.make("samples")
    if not is_first:
        multihost.wait_for_files([out])
        return out, None
    result = _measure(args, source, parts, reference)
    result["protocol"] |= {
        "inception": {"weights": str(args.inception), "checksum": inception.checksum}, **_describe_spaces(args.spaces, spaces),
    }  # fmt: skip
    writes = {out: files.json_writer(result, out)}
    if result["memorization"] and reference.pictures is not None:
        writes = {out.with_suffix(".png"): _pairs_writer(result["memorization"], images, reference, args.batch_size), **writes}
    if args.keep_samples:
        shape = (images.count, *images.shape, 3)
        archive = files.npz_writer({"arr_1": source.labels}, {"arr_0": (shape, parts.read_images())})
        writes = {epath.Path(args.keep_samples): archive, **writes}
    files.write_all(writes)
    shutil.rmtree(folder)  # everything in it is in the result now
    return out, result


def _measure(args, source, parts, reference):
    """Returns the result file's content from finished parts, without the networks' description."""
    images = source.images
    metrics, warnings = generation.score(parts.read(), reference)
    of_spaces = space_scores.score_spaces(parts, reference, metrics["fid"], list(images.shape))
    if files.RANDOM in (args.inception, *args.spaces.values()):
        warnings.insert(0, "RANDOM weights of a feature network: its scores mean nothing")
    metrics |= of_spaces.metrics
    computed = {**generation.COMPUTED, **space_scores.COMPUTED}
    return {
        "kind": "generation", "step": source.protocol.get("step"), "metrics": metrics,
        "protocol": {
            **source.protocol, "num_samples": images.count, "image_size": list(images.shape), "source": str(args.source),
            "images": images.description, "reference": reference.description, "batch_size": args.batch_size,
            "computed": {name: text for name, text in computed.items() if name in metrics},
        },
        "warnings": [*warnings, *of_spaces.warnings, *_confusions(source, metrics["fid"], reference), *images.warnings],
        "memorization": of_spaces.memorization,
    }  # fmt: skip


def _confusions(source, fid, reference):
    """Returns warnings of comparisons that people make with such numbers, and should not."""
    of_source = confusions.of_reconstructions(fid) if not source.protocol else []
    random = source.protocol.get("labels") == "random"
    of_reference = [f"reference: {warning}" for warning in reference.description.get("warnings", ())]
    return [*of_source, *[confusions.RANDOM_LABELS] * random, *of_reference]


def _describe_spaces(weights, networks):
    """Returns the entry of the protocol about further feature spaces, if there are any."""
    described = {
        name: {"weights": weights[name], "checksum": network.checksum, "features": network.protocol}
        for name, network in networks.items()
    }  # fmt: skip
    return {"spaces": described} if described else {}


def _pairs_writer(memorization, samples, reference, batch_size):
    """Returns the function for `write_all` that writes the picture of the closest pairs."""
    pairs = space_scores.closest_pairs(memorization, samples, reference.pictures, batch_size)
    shown = pictures.grid(pairs, PAIR_COLUMNS, scale=pictures.viewing_scale(pairs.shape[1:3]))
    return functools.partial(Image.fromarray(shown).save, format="PNG")


def make_reference(args: argparse.Namespace) -> Path:
    """Writes a reference as the settings say; returns its path."""
    check_on_disk(args.make_reference)
    out = Path(args.make_reference)
    if out.suffix != ".npz":
        raise ValueError(f"--make_reference={out}: the result is a file ending in .npz")
    if jax.process_index() == 0:
        _check_new(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    multihost.check_shared(out.parent)
    inception, spaces = load_networks(args)
    folder, images = out.with_suffix(".parts"), generation.open_real_images(args.data, args.image_size)
    measured = measure_reference(images, inception, folder, keep_images=True, is_done=out.exists, spaces=spaces)
    if jax.process_index():
        multihost.wait_for_files([out])
        return out
    write_reference(out, *measured)
    shutil.rmtree(folder)
    return out
