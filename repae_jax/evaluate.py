"""Evaluates generated images: `python -m repae_jax.evaluate runs/repae --reference VIRTUAL_imagenet256_labeled.npz
--inception pt_inception-2015-12-05-6726825d.pth`.

FID, sFID, inception score, precision and recall, as ADM's evaluator computes them, of a run, a published checkpoint, ADM's npz
or a folder of images. Models draw --num_samples images, which are measured as they are drawn and kept nowhere. Writes
WORKDIR/evaluations/NAME.json, or SOURCE.evaluation.json: the scores with everything they depend on.

The same command continues where it stopped: features of finished parts are kept beside the result, in NAME.parts/, until it is
there. Several processes on one file system, started as those of training, take turns with the parts, each on its own devices.
--make_reference writes the statistics of a dataset, for --reference.
"""

import argparse
import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
from etils import epath

from repae_jax import buckets, cli, files, sample
from repae_jax.distributed import multihost
from repae_jax.evaluation.generation import open_real_images, open_reference, score
from repae_jax.evaluation.image_sets import ImageSet, open_images, sampled_images
from repae_jax.evaluation.inception_features import FeatureParts, load_network
from repae_jax.evaluation.reference_stats import PUBLISHED_COUNT, check_on_disk, measure_reference, write_reference
from repae_jax.sampling.load_model import load_model
from repae_jax.training.checkpoint import fingerprint


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
    args = parser.parse_args(argv)
    sample.check_arguments(parser, args)
    names = [action.dest for action in sampling._group_actions]
    args.model_options = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
    for name in ("data", "image_size") if args.make_reference else ("source", "reference"):
        if getattr(args, name) is None:
            command = "--make_reference" if args.make_reference else "an evaluation"
            parser.error(f"{command} needs {'' if name == 'source' else '--'}{name}")
    return args


@dataclasses.dataclass(frozen=True)
class Source:
    """The images to evaluate."""

    images: ImageSet
    protocol: dict  # settings of the model that draws them; empty if they exist already
    labels: np.ndarray | None  # int32 [N] of the images that are drawn
    out: epath.Path | None  # default path of the result; None if there is no place for it


def _open_source(args):
    path = epath.Path(args.source)
    images = open_images(path)
    if images is None:
        return _open_model(args, path)
    if args.model_options:
        raise ValueError(f"{', '.join(args.model_options)}: for models only; the images of {path} are there already")
    name = path.with_suffix("").name if path.suffix == ".npz" else path.name
    return Source(images, {}, None, path.with_name(f"{name}.evaluation.json"))


def _open_model(args, path):
    devices = jax.local_devices()
    if args.batch_size % len(devices):
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {len(devices)} devices")
    trained = load_model(args.source, args.step, devices, vae_path=args.vae, sampler=args.sampler)
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


def run(args):
    """Evaluates as the command line says; returns the path of the result and its content (None in other processes)."""
    if args.out and not args.out.endswith(".json"):
        raise ValueError(f"--out={args.out}: the result is a file ending in .json")
    if args.reference.endswith(".npz"):
        check_on_disk(args.reference)
        if not Path(args.reference).is_file():
            raise FileNotFoundError(f"{args.reference} does not exist; check --reference")
    _check_new(args.out)  # before a model is loaded
    source = _open_source(args)
    images, out, is_first = source.images, epath.Path(args.out) if args.out else source.out, jax.process_index() == 0
    if is_first:
        _check_new(out, args.keep_samples)
        for path in filter(None, (out, args.keep_samples)):
            epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    folder = buckets.scratch(out.with_suffix(".parts"))
    multihost.check_shared(epath.Path(folder.parent))
    network = load_network(args.inception, args.batch_size)
    reference = open_reference(args.reference, images, network, folder / "reference", out.exists)
    kept = np.full(images.count, bool(args.keep_samples))
    parts = FeatureParts(folder / "samples", images, network, kept, is_done=out.exists)
    parts.make("samples")
    if not is_first:
        multihost.wait_for_files([out])
        return out, None
    metrics, warnings = score(parts.read(), reference)
    if args.inception == files.RANDOM:
        warnings.insert(0, "RANDOM Inception weights: the scores mean nothing")
    result = {
        "kind": "generation", "step": source.protocol.get("step"), "metrics": metrics,
        "protocol": {
            **source.protocol, "num_samples": images.count, "image_size": list(images.shape), "source": str(args.source),
            "images": images.description, "inception": {"weights": str(args.inception), "checksum": network.checksum},
            "reference": reference.description, "batch_size": args.batch_size,
        },
        "warnings": warnings + list(images.warnings),
    }  # fmt: skip
    writes = {out: files.json_writer(result, out)}
    if args.keep_samples:
        shape = (images.count, *images.shape, 3)
        archive = files.npz_writer({"arr_1": source.labels}, {"arr_0": (shape, parts.read_images())})
        writes = {epath.Path(args.keep_samples): archive, **writes}
    files.write_all(writes)
    shutil.rmtree(folder)  # everything in it is in the result now
    return out, result


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
    network = load_network(args.inception, args.batch_size)
    folder, images = out.with_suffix(".parts"), open_real_images(args.data, args.image_size)
    measured = measure_reference(images, network, folder, keep_images=True, is_done=out.exists)
    if jax.process_index():
        multihost.wait_for_files([out])
        return out
    write_reference(out, *measured)
    shutil.rmtree(folder)
    return out


def table(result):
    """Formats the scores and their settings for people."""
    names = {"fid": "FID", "sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall"}
    metrics, protocol = result["metrics"], result["protocol"]
    spread = {"inception_score": f"  ± {metrics['inception_score_std']:.4f} over splits"}
    lines = [f"{shown:<18}{metrics[name]:10.4f}{spread.get(name, '')}" for name, shown in names.items() if name in metrics]
    about = ("num_samples", "step", "sampler", "steps", "guidance_scale", "precision", "labels", "seed")
    shown = {"precision": "computed in"}  # the name of a score, too
    lines.append(", ".join(f"{shown.get(name, name)} {protocol[name]}" for name in about if name in protocol))
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])


@cli.command(parse_args, "interrupted: what is finished is kept; run the same command to continue")
def main(args):
    """Entry point."""
    own = ("coordinator", "process_id")
    multihost.assert_same_config({name: value for name, value in vars(args).items() if name not in own})
    if args.make_reference:
        path = make_reference(args)
        if jax.process_index() == 0:
            print(f"statistics of {args.data}: {path}\nuse them with --reference {path}")
    else:
        out, result = run(args)
        if result is not None:
            print(f"{table(result)}\n{out}")


if __name__ == "__main__":
    main()
