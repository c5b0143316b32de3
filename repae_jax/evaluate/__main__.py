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


import jax

from repae_jax import cli, files, sample
from repae_jax.diffusion.samplers import Sampling
from repae_jax.distributed import multihost
from repae_jax.evaluate import measuring, sweeping
from repae_jax.evaluation import sweep
from repae_jax.evaluation.reference_stats import PUBLISHED_COUNT
from repae_jax.evaluation.space_networks import GROUP, chosen_spaces
from repae_jax.metrics.frechet_confidence import NORMAL_95
from repae_jax.models.feature_spaces import SPACES


def parse_args(argv=None):
    """Command line of this program."""
    description = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = cli.Parser(
        prog="python -m repae_jax.evaluate", description=description, formatter_class=cli.HelpFormatter
    )
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
    making.add_argument("--image_size", type=cli.image_size, help="side to which they are cropped, in pixels, or HEIGHT,WIDTH")
    sampling = parser.add_argument_group("models only")
    sampling.add_argument("--keep_samples", type=cli.path, metavar="NPZ", help="keep the images, too, in ADM's layout")
    sampling.add_argument("--vae", type=cli.path, help="the VAE of a run, or of published weights, that hold none")
    sampling.add_argument("--step", type=cli.whole(0), help="checkpoint to sample from; default the newest")
    sample.add_ema(sampling)
    values = f"evaluate at all of these values of {', '.join(sweep.SWEPT)}; --out is then a folder"
    sampling.add_argument("--sweep", type=sweep.parse_axis, nargs="+", metavar="NAME=FIRST:LAST:STEP", help=values)
    groups = [sampling, *sample.add_arguments(parser, num_samples=PUBLISHED_COUNT)]
    args = parser.parse_args(argv)
    try:
        args.spaces = chosen_spaces(args.features)
    except ValueError as error:
        parser.error(f"--features: {error}")
    sample.check_arguments(parser, args, swept=[axis.name for axis in args.sweep or ()])
    names = [action.dest for group in groups for action in group._group_actions]
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
        f"{sweep.NAMES.get(name, name):<18}{_digits(value):>10}{_error(name, metrics)}"
        for name, value in metrics.items() if not name.endswith(("_std", "_stderr"))
    ]  # fmt: skip
    unusual = ("autoguidance_scale", "internal_scale", "guidance_schedule", "time_shift")
    defaults = {name: getattr(Sampling, name) for name in unusual}
    about = ("num_samples", "step", "sampler", "steps", "guidance_scale", *unusual, "precision", "labels", "seed")
    shown = {"precision": "computed in"}  # the name of a score, too
    chosen = [name for name in about if name in protocol and protocol[name] != defaults.get(name)]
    lines.append(", ".join(f"{shown.get(name, name)} {protocol[name]}" for name in chosen))
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])


@cli.command(parse_args, "interrupted: what is finished is kept; run the same command to continue")
def main(args):
    """Entry point."""
    own = ("coordinator", "process_id")
    given = {**vars(args), "sweep": [str(axis) for axis in args.sweep or ()]}
    multihost.assert_same_config({name: value for name, value in given.items() if name not in own})
    if args.make_reference:
        path = measuring.make_reference(args)
        if jax.process_index() == 0:
            print(f"statistics of {args.data}: {path}\nuse them with --reference {path}")
    elif args.sweep:
        out, done = sweeping.run_sweep(args)
        if done is not None:
            print(f"{done.table()}\n{out}\ncurves: {out.with_suffix('.png')}")
    else:
        out, result = measuring.run(args)
        if result is not None:
            print(f"{table(result)}\n{out}")


if __name__ == "__main__":
    main()
