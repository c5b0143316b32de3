"""Evaluates generated images: `python -m repae_jax.evaluate runs/repae --reference VIRTUAL_imagenet256_labeled.npz
--inception pt_inception-2015-12-05-6726825d.pth`.

FID, sFID, inception score, precision and recall, as ADM's evaluator computes them, KID and MIND, of a run, a published
checkpoint, ADM's npz or a folder of images. --features adds scores in other spaces from the same pass over the images. Models
draw --num_samples images, which are measured as they are drawn and kept nowhere. Writes WORKDIR/evaluations/NAME.json, or
SOURCE.evaluation.json: the scores with everything they depend on.

The same command continues where it stopped: features of finished parts are kept beside the result, in NAME.parts/, until it is
there. Several processes on one file system, started as those of training, take turns with the parts, each on its own devices.
--make_reference writes the statistics of a dataset, for --reference. --sweep evaluates a model at several guidance scales or
intervals, each as by a command of its own, and writes a table and curves of them to WORKDIR/sweeps/.
"""

import argparse
import dataclasses
import functools
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from repae_jax import buckets, cli, files, sample
from repae_jax import images as pictures
from repae_jax.diffusion.samplers import Sampling
from repae_jax.distributed import multihost
from repae_jax.evaluation import confusions, generation, space_scores, sweep
from repae_jax.evaluation.image_sets import ImageSet, open_images, sampled_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, load_network
from repae_jax.evaluation.reference_stats import (
    PUBLISHED_COUNT,
    check_on_disk,
    check_spaces,
    measure_reference,
    read_checksum,
    write_reference,
)
from repae_jax.evaluation.space_networks import GROUP, SpaceNetwork, chosen_spaces, load_space_networks
from repae_jax.metrics.frechet_confidence import NORMAL_95
from repae_jax.models.feature_spaces import SPACES
from repae_jax.sampling.load_model import load_model
from repae_jax.training.checkpoint import fingerprint

NAMES = {
    "fid": "FID", "sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall",
    "fid_infinity": "FID, infinite", "kid": "KID", "mind": "MIND", "cmmd": "CMMD", "fd_dinov2": "FD-DINOv2", "fdr6": "FDr6",
}  # fmt: skip
PAIR_COLUMNS = 8  # images in a row of the picture of closest pairs


def parse_args(argv=None):
    """Command line of this program."""
    description = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = cli.Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", type=cli.path, help="workdir, published run or checkpoint; ADM's npz; folder of images")
    add("--reference", type=cli.path,
        help="npz with statistics of real images, ADM's or made here; or real images, as folder:path=/data/train or "
        "digits:split=train, cropped to the samples' size")
    add("--inception", type=cli.path, required=True, help=f"weights of FID's Inception; {files.RANDOM!r}: for tests only")
    add("--features", nargs="+", default=[], metavar="NAME[=WEIGHTS]",
        help=f"further feature spaces: {', '.join(SPACES)}; {GROUP}: those of FDr6. Weights are published ones by default, by "
        "their names on the Hugging Face hub, or a local file or folder")
    add("--out", type=cli.path, help="path of the result, ending in .json")
    add("--batch_size", type=cli.whole(1), default=64, help="images at a time, over the devices of a process")
    cli.add_processes(parser)
    making = parser.add_argument_group("statistics of real images, for --reference")
    making.add_argument("--make_reference", type=cli.path, metavar="NPZ", help="write this file, and nothing else")
    making.add_argument("--data", type=cli.path, help="real images, see --reference; or an npz of images, key arr_0")
    making.add_argument("--image_size", type=cli.whole(1, 2**20), help="side to which they are cropped, in pixels")
    sampling = parser.add_argument_group("models only")
    sample.add_arguments(sampling, num_samples=PUBLISHED_COUNT)
    sampling.add_argument("--keep_samples", type=cli.path, metavar="NPZ", help="keep the images, too, in ADM's layout")
    sampling.add_argument("--vae", type=cli.path, help="the VAE of a run, or of published weights, that hold none")
    sampling.add_argument("--step", type=cli.whole(0), help="checkpoint to sample from; default the newest")
    values = f"evaluate at all of these values of {', '.join(sweep.SWEPT)}; --out is then a folder"
    sampling.add_argument("--sweep", type=sweep.parse_axis, nargs="+", metavar="NAME=FIRST:LAST:STEP", help=values)
    args = parser.parse_args(argv)
    try:
        args.spaces = chosen_spaces(args.features)
    except ValueError as error:
        parser.error(f"--features: {error}")
    sample.check_arguments(parser, args)
    names = [action.dest for action in sampling._group_actions]
    args.model_options = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
    for name in ("data", "image_size") if args.make_reference else ("source", "reference"):
        if getattr(args, name) is None:
            command = "--make_reference" if args.make_reference else "an evaluation"
            parser.error(f"{command} needs {'' if name == 'source' else '--'}{name}")
    if args.sweep:
        _check_sweep(parser, args)
    return args


def _check_sweep(parser, args):
    """Ends the program, before a model is loaded, for points that no model could be sampled at, and options without a sense."""
    swept = [axis.name for axis in args.sweep]
    given = [f"--{name}" for name in (*swept, "keep_samples", "make_reference") if getattr(args, name) is not None]
    if given:
        parser.error(f"--sweep {' '.join(map(str, args.sweep))} does not go with {', '.join(given)}: leave one of them out")
    if not args.reference.endswith(".npz"):
        making = f"--make_reference REAL.npz --data {args.reference} --image_size PIXELS"
        parser.error(f"--sweep would measure {args.reference} for every point: write its statistics once, with {making}")
    if args.out and args.out.endswith(".json"):
        parser.error(f"--out={args.out}: with --sweep it is a folder for the results, one file for each point")
    try:
        for point in sweep.points(args.sweep):
            Sampling(**{**sample.given(args), **point})
    except ValueError as error:
        parser.error(str(error))


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


def load_networks(args):
    """Loads the networks that the command line asks for."""
    return Networks(load_network(args.inception, args.batch_size), load_space_networks(args.spaces, args.batch_size))


def _load_trained(args):
    devices = jax.local_devices()
    if args.batch_size % len(devices):
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {len(devices)} devices")
    return load_model(args.source, args.step, devices, vae_path=args.vae, sampler=args.sampler)


def _open_source(args, trained):
    path = epath.Path(args.source)
    images = open_images(path)
    if images is None:
        return _open_model(args, path, trained or _load_trained(args))
    if args.model_options:
        raise ValueError(f"{', '.join(args.model_options)}: for models only; the images of {path} are there already")
    name = path.with_suffix("").name if path.suffix == ".npz" else path.name
    return Source(images, {}, None, path.with_name(f"{name}.evaluation.json"))


def _open_model(args, path, trained):
    sampling, classes = sample.choose_sampling(args, trained)
    labels = sample.draw_labels(args.labels, args.num_samples, classes, args.seed)
    protocol = {
        "model": str(args.source), "model_checksum": fingerprint(trained.params), "step": trained.step,
        "ema_decay": trained.ema_decay, **dataclasses.asdict(sampling), "labels": args.labels,
        "classes": classes if args.classes else "all", "seed": args.seed, "pixels": "truncated to uint8",
    }  # fmt: skip
    if args.out is None and not path.is_dir():
        raise ValueError(f"{path} is no folder to keep the result in: give --out")
    draw = functools.partial(sample.sample_batches, trained, sampling, labels, args.batch_size, args.seed)
    shape = [side * trained.nets.vae.factor for side in trained.latent_shape[:2]]
    description = {name: value for name, value in protocol.items() if name != "model"}
    images = sampled_images(draw, len(labels), shape, args.batch_size, description)
    name = sample.settings_name(trained.step, sampling, args)
    return Source(images, protocol, labels, path / "evaluations" / f"{name}.json" if path.is_dir() else None)


def _check_new(*paths):
    for path in filter(None, paths):
        if epath.Path(path).exists():
            raise ValueError(f"{path} exists; choose another name, or move it away")


def _check_reference(args):
    """Checks, before anything is loaded, that the reference exists and can be compared with in all spaces."""
    if args.reference.endswith(".npz"):
        check_on_disk(args.reference)
        if not Path(args.reference).is_file():
            raise FileNotFoundError(f"{args.reference} does not exist; check --reference")
        check_spaces(args.reference, args.spaces)


def run(args, trained=None, networks=None, opened=None):
    """Evaluates as the command line says; returns the path of the result and its content (None in other processes).

    `trained` is the model that draws, and `networks` what `load_networks` returns, if they are loaded already. `opened` is a
    dict that keeps the reference for further evaluations: it may take longer to measure than the samples.
    """
    if args.out and not args.out.endswith(".json"):
        raise ValueError(f"--out={args.out}: the result is a file ending in .json")
    _check_reference(args)
    is_first = jax.process_index() == 0
    if is_first:  # before a model is loaded; others may come when the result is there, and have had no share
        _check_new(args.out)
    source = _open_source(args, trained)
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
    shown = pictures.grid(pairs, PAIR_COLUMNS, scale=pictures.viewing_scale(pairs.shape[1]))
    return functools.partial(Image.fromarray(shown).save, format="PNG")


def run_sweep(args):
    """Evaluates every point of --sweep that has no result yet; returns the path of the sweep's result and the Sweep.

    Its content is None in processes other than the first.
    """
    if open_images(epath.Path(args.source)) is not None:
        raise ValueError(f"--sweep: for models only; the images of {args.source} are there already")
    _check_reference(args)
    trained, networks, opened = _load_trained(args), None, {}
    checksum = functools.cache(functools.partial(read_checksum, args.reference))
    commands = {}  # name of the result -> (point, command line): without guidance, all intervals are the same
    for point in sweep.points(args.sweep):
        command = argparse.Namespace(**{**vars(args), **point, "sweep": None, "model_options": []})
        sampling, _ = sample.choose_sampling(command, trained)
        name = sample.settings_name(trained.step, sampling, command)
        commands.setdefault(name, (point, command))
    home = epath.Path(args.out or args.source)
    folder = home if args.out else home / "evaluations"
    results = []
    for number, (name, (point, command)) in enumerate(commands.items(), start=1):
        command.out = str(folder / f"{name}.json") if args.out else None
        if jax.process_index() == 0:
            print(f"{number}/{len(commands)}: {', '.join(f'{key} {value:g}' for key, value in point.items())}", flush=True)
        existing = folder / f"{name}.json"
        if existing.exists():
            result = _read_same(existing, command, trained, checksum())
        else:
            networks = networks or load_networks(args)
            result = run(command, trained, networks, opened)[1]
        results.append((point, result))
    if jax.process_index():
        return None, None
    done = sweep.Sweep(args.sweep, results)
    axes = "-".join(str(axis).replace("=", "").replace(":", "_") for axis in args.sweep)
    out = (home if args.out else home / "sweeps") / f"{name}-sweep-{axes}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    done.draw(out.with_suffix(".png"), NAMES)
    files.write_json(out, done.content([f"{name}.json" for name in commands]), overwrite=True)
    return out, done


def _read_same(path, args, trained, checksum):
    """Returns a result that an earlier command has left; ValueError if it is of other settings than this command's."""
    result, protocol = files.read_json(path), _open_source(args, trained).protocol
    expected = {name: value for name, value in protocol.items() if name != "model"} | {"num_samples": args.num_samples}
    differing = sweep.differences(result, expected)
    for name, key, given in (("reference", "npz", args.reference), ("inception", "weights", args.inception)):
        there = Path(str(result["protocol"].get(name, {}).get(key))).name
        if there != Path(given).name:
            differing[name] = there, Path(given).name
    there = result["protocol"].get("reference", {}).get("checksum")
    if "reference" not in differing and there != checksum:
        differing["checksum of the reference"] = there, checksum
    spaces = {name: space["weights"] for name, space in result["protocol"].get("spaces", {}).items()}
    if spaces != args.spaces:
        differing["features"] = spaces, args.spaces
    if differing:
        raise ValueError(f"{path} is of other settings (there, here): {differing}; move it away, or give a folder as --out")
    return result


def make_reference(args):
    """Writes a reference as the command line says; returns its path."""
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


def _error(name, metrics):
    """Returns how a score scatters, in words."""
    over = {"inception_score": "splits", "kid": "subsets"}
    if (std := metrics.get(f"{name}_std")) is not None:
        return f"  ± {_digits(std)} over {over[name]}"
    stderr = metrics.get(f"{name}_stderr")
    return "" if stderr is None else f"  ± {_digits(NORMAL_95 * stderr)} (95 %)"


def _digits(value):
    """Formats a score, of which small ones, such as KID, keep three digits."""
    return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.3g}"


def table(result):
    """Formats the scores and their settings for people."""
    metrics, protocol = result["metrics"], result["protocol"]
    lines = [
        f"{NAMES.get(name, name):<18}{_digits(value):>10}{_error(name, metrics)}"
        for name, value in metrics.items() if not name.endswith(("_std", "_stderr"))
    ]  # fmt: skip
    about = ("num_samples", "step", "sampler", "steps", "guidance_scale", "precision", "labels", "seed")
    shown = {"precision": "computed in"}  # the name of a score, too
    lines.append(", ".join(f"{shown.get(name, name)} {protocol[name]}" for name in about if name in protocol))
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])


@cli.command(parse_args, "interrupted: what is finished is kept; run the same command to continue")
def main(args):
    """Entry point."""
    own = ("coordinator", "process_id")
    given = {**vars(args), "sweep": [str(axis) for axis in args.sweep or ()]}
    multihost.assert_same_config({name: value for name, value in given.items() if name not in own})
    if args.make_reference:
        path = make_reference(args)
        if jax.process_index() == 0:
            print(f"statistics of {args.data}: {path}\nuse them with --reference {path}")
    elif args.sweep:
        out, done = run_sweep(args)
        if done is not None:
            print(f"{done.table(NAMES)}\n{out}\ncurves: {out.with_suffix('.png')}")
    else:
        out, result = run(args)
        if result is not None:
            print(f"{table(result)}\n{out}")


if __name__ == "__main__":
    main()
