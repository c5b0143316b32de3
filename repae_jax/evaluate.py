"""Scores of generated images: `python -m repae_jax.evaluate runs/repae --reference VIRTUAL_imagenet256_labeled.npz
--inception pt_inception-2015-12-05-6726825d.pth`.

FID, sFID, inception score, precision and recall, as ADM's evaluator computes them, of a run, a published checkpoint, ADM's npz
or a folder of images. Models draw --num_samples images, which are measured as they are made and kept nowhere. Writes
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
import jax.numpy as jnp
import numpy as np
from etils import epath

from repae_jax import buckets, cli, data, files, sample
from repae_jax.distributed import multihost
from repae_jax.evaluation.image_sets import DatasetImages, FolderImages, NpzImages
from repae_jax.evaluation.inception_features import FeatureParts, load_network
from repae_jax.evaluation.reference_stats import (
    KEPT_IMAGES,
    PUBLISHED_COUNT,
    check_on_disk,
    check_shape,
    count_warnings,
    measure_reference,
    read_reference,
    write_reference,
)
from repae_jax.job import build
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.metrics.inception_score import SPLIT_SIZE, RunningInceptionScore
from repae_jax.metrics.precision_recall import NEIGHBORS, precision_recall
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import load_model
from repae_jax.training.checkpoint import fingerprint


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(
        description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="?", type=cli.path, help="workdir, published run or checkpoint; ADM's npz; folder of images"
    )
    parser.add_argument(
        "--reference", type=cli.path,
        help="npz with statistics of real images, ADM's or made here; or real images, as folder:path=/data/train or "
        "digits:split=train, cropped to the samples' size",
    )
    parser.add_argument(
        "--inception", type=cli.path, required=True, help=f"weights of FID's Inception; {build.RANDOM!r}: for tests only"
    )
    parser.add_argument("--out", type=cli.path, help="path of the result, ending in .json")
    parser.add_argument("--batch_size", type=cli.whole(1), default=64, help="images at a time, over the devices of a process")
    cli.add_processes(parser)
    making = parser.add_argument_group("statistics of real images, for --reference")
    making.add_argument("--make_reference", type=cli.path, metavar="NPZ", help="write this file, and nothing else")
    making.add_argument("--data", type=cli.path, help="real images, see --reference; or an npz of images, key arr_0")
    making.add_argument("--image_size", type=cli.whole(1, 2**20), help="side to which they are cropped, in pixels")
    sampling = parser.add_argument_group("models only")
    sample.add_arguments(sampling, num_samples=PUBLISHED_COUNT)
    sampling.add_argument("--keep_samples", type=cli.path, metavar="NPZ", help="keep the images, too, in ADM's layout")
    sampling.add_argument(
        "--vae", type=cli.path, help="the VAE of a run that holds none, or of published weights that hold none"
    )
    sampling.add_argument("--step", type=cli.whole(0), help="checkpoint to sample from; default the newest")
    args = parser.parse_args(argv)
    sample.check_arguments(parser, args)
    names = [action.dest for action in sampling._group_actions]
    args.model_options = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
    needed = ("data", "image_size") if args.make_reference else ("source", "reference")
    for name in needed:
        if getattr(args, name) is None:
            what = "--make_reference" if args.make_reference else "an evaluation"
            parser.error(f"{what} needs {'' if name == 'source' else '--'}{name}")
    return args


class SampledImages:
    """What a model draws, as a set of images of `repae_jax.evaluation.image_sets`.

    Args:
      trained: Trained, on devices of this process.
      sampling: Sampling.
      labels: int32 [N], one per image.
      batch_size: images at a time: the size of all blocks but the last.
      seed: of the noise.
      description: plain values that tell model and settings from others.
    """

    warnings = ()

    def __init__(self, trained, sampling, labels, batch_size, seed, description):
        self._make = functools.partial(sample.sample_batches, trained, sampling, labels, batch_size, seed)
        self._batch_size = batch_size
        self.count = len(labels)
        run = generate.make_generate(trained.nets, trained.objective, trained.latent_shape, sampling)
        ids = jax.ShapeDtypeStruct((1,), jnp.int32)
        self.shape = list(jax.eval_shape(run, trained.params, ids, ids, jax.random.key(seed))[0].shape[1:3])
        self.description = description

    def blocks(self, ranges):
        """See `repae_jax.evaluation.image_sets`."""
        wanted = {first // self._batch_size for first, _ in ranges}
        skip = set(range(-(-self.count // self._batch_size))) - wanted
        for _, made in self._make(skip=skip):
            yield made


def _open_model(args):
    """(set of images, protocol, default name of the result)."""
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
    description = {name: value for name, value in protocol.items() if name != "model"}
    source = SampledImages(trained, sampling, labels, args.batch_size, args.seed, description)
    return source, protocol, sample.settings_name(trained.step, sampling, args), labels


def _check_finished(path):
    """ValueError if samples are not finished there."""
    parts = [path] if path.suffix == ".parts" else []
    if path.suffix == ".npz" and not path.exists():
        parts = [path.with_suffix(".parts")] * path.with_suffix(".parts").is_dir()
    if path.is_dir():
        parts += sorted(path.glob("*.parts"))
    if parts and not _is_model(path):
        raise ValueError(
            f"{parts[0]} holds unfinished samples: finish them with the same `python -m repae_jax.sample` command, and "
            "evaluate the npz it writes"
        )
    archives = sorted(path.glob("*.npz")) if path.is_dir() and not _is_model(path) else []
    if archives:
        raise ValueError(f"{path} holds {archives[0].name}, not only images: give the npz, or a folder of nothing but samples")


def _is_model(path):
    """Whether a folder is a workdir of ours or a published one."""
    return (path / "checkpoints").is_dir() or (path / "args.json").exists()


def _open_source(args):
    """(set of images, protocol, path of the result, labels); labels None if nothing is drawn."""
    path = epath.Path(args.source)
    _check_finished(path)
    labels, name = None, None
    if path.suffix == ".npz":
        images, protocol, beside = NpzImages(path), {}, path.with_suffix("")
    elif path.is_dir() and not _is_model(path):
        images, protocol, beside = FolderImages(path), {}, path
    else:
        images, protocol, name, labels = _open_model(args)
        beside = path / "evaluations" / name if path.is_dir() else None
    if labels is None and args.model_options:
        raise ValueError(f"{', '.join(args.model_options)}: for models only; the images of {path} are there already")
    if args.out is None and beside is None:
        raise ValueError(f"{path} is no folder to keep the result in: give --out")
    default = beside and beside.with_name(beside.name + (".json" if name else ".evaluation.json"))
    return images, protocol, epath.Path(args.out) if args.out else default, labels


def _open_reference(args, images, network, folder, **share):
    """Reference, whose features are there if they can be; None in processes other than the first, once it is there."""
    if args.reference.endswith(".npz"):
        reference = read_reference(args.reference, network)
        check_shape(images.shape, reference, args.reference)
        if reference.images is None:
            return reference
        parts = FeatureParts(folder, reference.images, network, None, share["process_index"], share["process_count"])
        if not parts.make("reference", share["is_done"]) or share["process_index"]:
            return None
        return dataclasses.replace(reference, features=np.concatenate([part.pool for part in parts.read()]))
    if images.shape[0] != images.shape[1]:
        raise ValueError(f"the samples have {images.shape[0]} x {images.shape[1]} pixels; datasets are cropped to squares")
    measured = measure_reference(_open_dataset(args.reference, images.shape[0]), network, folder, **share)
    return measured and measured[0]


def _open_dataset(text, image_size):
    if text.endswith(".npz"):
        images = NpzImages(text)
        if images.shape != [image_size] * 2:
            raise ValueError(f"the images of {text} have {images.shape[0]} x {images.shape[1]} pixels, not {image_size}")
        return images
    name, fields = data.parse_source(text, labelled=False)
    return DatasetImages(data.make_source(name, image_size, **fields), {"data": text})


def measure(features, reference):
    """Scores.

    Args:
      features: iterable of InceptionFeatures, numpy, in the samples' order.
      reference: Reference.

    Returns:
      (name -> float, list of warnings: what is missing or not to be compared, and why). Names: 'fid', 'sfid',
      'inception_score', 'inception_score_std', 'precision', 'recall'.

    Raises:
      ValueError: for features of fewer than two images, or not finite ones.
    """
    pool, spatial, inception, kept = RunningGaussian(), RunningGaussian(), RunningInceptionScore(), []
    for part in features:
        pool.update(part.pool)
        inception.update(part.logits)
        if reference.spatial is not None:
            spatial.update(part.spatial)
        if reference.features is not None:
            kept.append(part.pool)
    metrics, warnings = {"fid": frechet_distance(*pool.stats(), *reference.pool)}, count_warnings(pool.count, reference)
    if pool.count < SPLIT_SIZE:
        warnings.append(
            f"inception_score: of {pool.count} samples; splits have {SPLIT_SIZE}, and shorter ones give lower scores"
        )
    if reference.spatial is None:
        warnings.append("no sfid: the reference has no mu_s and sigma_s")
    else:
        metrics["sfid"] = frechet_distance(*spatial.stats(), *reference.spatial)
    metrics["inception_score"], metrics["inception_score_std"] = inception.result()
    found = None if reference.features is None else len(reference.features)
    if found is None:
        warnings.append("no precision and recall: the reference has no images (arr_0)")
    elif min(found, pool.count) <= NEIGHBORS:
        warnings.append(
            f"no precision and recall: {pool.count} samples and {found} reference images; needed: more than {NEIGHBORS} of each"
        )
    else:
        metrics["precision"], metrics["recall"] = precision_recall(reference.features, np.concatenate(kept))
        if found != KEPT_IMAGES:
            warnings.append(f"precision and recall: against {found} reference images, {KEPT_IMAGES} in published scores")
    return metrics, warnings


def run(args):
    """Evaluates as the command line says; returns the path of the result, and what it says (None in other processes)."""
    if args.out and not args.out.endswith(".json"):
        raise ValueError(f"--out={args.out}: the result is a file ending in .json")
    if args.reference.endswith(".npz"):
        check_on_disk(args.reference)
        if not Path(args.reference).is_file():
            raise FileNotFoundError(f"{args.reference} does not exist; check --reference")
    if args.out and epath.Path(args.out).exists():  # before a model is loaded
        raise ValueError(f"{args.out} exists; choose another name, or move it away")
    images, protocol, out, labels = _open_source(args)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count(), "is_done": out.exists}
    if share["process_index"] == 0:
        for path in [out, *([epath.Path(args.keep_samples)] if args.keep_samples else [])]:
            if path.exists():
                raise ValueError(f"{path} exists; choose another name, or move it away")
            path.parent.mkdir(parents=True, exist_ok=True)
    folder = buckets.scratch(out.with_suffix(".parts"))
    multihost.check_shared(epath.Path(folder.parent))
    network = load_network(args.inception, args.batch_size)
    reference = _open_reference(args, images, network, folder / "reference", **share)
    kept = np.full(images.count, bool(args.keep_samples))
    parts = FeatureParts(folder / "samples", images, network, kept, share["process_index"], share["process_count"])
    parts.make("samples", out.exists)
    if share["process_index"]:
        multihost.wait_for_files([out])
        return out, None
    metrics, warnings = measure(parts.read(), reference)
    if args.inception == build.RANDOM:
        warnings.insert(0, "RANDOM Inception weights: the scores mean nothing")
    result = {
        "kind": "generation",
        "step": protocol.get("step"),
        "metrics": metrics,
        "protocol": {
            **protocol, "num_samples": images.count, "image_size": list(images.shape), "source": str(args.source),
            "images": images.description, "inception": {"weights": str(args.inception), "checksum": network.checksum},
            "reference": reference.description, "batch_size": args.batch_size,
        },
        "warnings": warnings + list(images.warnings),
    }  # fmt: skip
    writes = {out: files.json_writer(result, out)}
    if args.keep_samples:
        shape = (images.count, *images.shape, 3)
        archive = files.npz_writer({"arr_1": labels}, {"arr_0": (shape, parts.read_images())})
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
        if out.exists():
            raise ValueError(f"{out} exists; choose another name, or move it away")
        out.parent.mkdir(parents=True, exist_ok=True)
    multihost.check_shared(out.parent)
    network = load_network(args.inception, args.batch_size)
    folder = out.with_suffix(".parts")
    measured = measure_reference(
        _open_dataset(args.data, args.image_size), network, folder, keep_images=True,
        process_index=jax.process_index(), process_count=jax.process_count(), is_done=out.exists,
    )  # fmt: skip
    if jax.process_index():
        multihost.wait_for_files([out])
        return out
    write_reference(out, *measured)
    shutil.rmtree(folder)
    return out


def table(result):
    """The scores and what they depend on, for people."""
    names = {"fid": "FID", "sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall"}
    metrics, protocol = result["metrics"], result["protocol"]
    spread = {"inception_score": f"  ± {metrics['inception_score_std']:.4f} over splits"}
    lines = [f"{shown:<18}{metrics[name]:10.4f}{spread.get(name, '')}" for name, shown in names.items() if name in metrics]
    about = ("num_samples", "step", "sampler", "steps", "guidance_scale", "labels", "seed")
    lines.append(", ".join(f"{name} {protocol[name]}" for name in about if name in protocol))
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
