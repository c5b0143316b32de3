"""Weights in, weights out: `python -m checkpoints_tools COMMAND`.

  inspect      what is this file: layout, sizes, parameter counts, statistics
  convert      a run, a training checkpoint or a network into another layout
  extract-vae  the VAE of a run or a training checkpoint, with its latent statistics and discriminator
  export       a run or a training checkpoint as a pipeline of diffusers
  verify       our network beside an independent PyTorch module, on the same input
  artefacts    the public weights that this project reads

Sources are local paths, hub names ('facebook/dinov2-base', 'REPA-E/sdvae/sdvae-f8d4.pt') or addresses such as gs://bucket/file.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from repae_jax import cli, ranges


def parse_args(argv=None):
    """Command line of this program."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="python -m checkpoints_tools", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, text):
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    inspect = add("inspect", "say what a file or folder is: layout, sizes, parameter counts, statistics")
    inspect.add_argument("source", nargs="+", type=cli.path)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    convert = add(
        "convert",
        "convert a training run (to the published layout), a published training checkpoint, a SiT, a VAE, an encoder or "
        "another network; the target's ending says into what",
    )
    convert.add_argument("source", type=cli.path)
    convert.add_argument(
        "target", type=cli.path, help="NAME.pt, NAME.safetensors, or a folder (a run, a diffusers or transformers model); of a "
        "run, NAME-discriminator-ckpt.pt is its discriminator alone, for config.init.disc",
    )
    convert.add_argument("--weights_only", action="store_true", help="leave the optimizer states out: a third of the size")
    convert.add_argument("--plain_sit", action="store_true", help="the source is a plain SiT, noise at t = 0: reverse its time")
    convert.add_argument("--latent_stats", type=cli.path, help="statistics of a VAE's latents, if its file has none beside it")

    extract = add("extract-vae", "extract the VAE of a run or of a published training checkpoint, with its latent statistics")
    extract.add_argument(
        "source", type=cli.path, help="a run that trains a VAE (configs/repae.py, configs/vae.py), or a published checkpoint"
    )
    extract.add_argument("target", type=cli.path, help="NAME.pt or NAME.safetensors (three files), or a folder for diffusers")
    export = add("export", "write a run or a published training checkpoint as a pipeline that diffusers loads and samples from")
    export.add_argument("source", type=cli.path)
    export.add_argument("target", type=cli.path, metavar="folder", help="folder to make")
    export.add_argument("--to", choices=("diffusers",), default="diffusers", help="library to write for")
    export.add_argument("--vae", type=cli.path, help="the VAE of a source that holds none")
    export.add_argument("--license", help="of the weights, for the model card, as the hub calls it: mit, cc-by-4.0, …")
    export.add_argument("--push", metavar="ORGANIZATION/NAME", help="upload the folder to the Hugging Face hub, too")
    export.add_argument("--private", action="store_true", help="where --push makes a repository, nobody else sees it")
    for command in (convert, extract, export):
        command.add_argument("--step", type=cli.whole(0), help="which checkpoint of a run; default the newest")
        averaged = "average of a run's weights: a decay that it has kept, or sigma=S, see repae_jax.sample --help"
        command.add_argument("--ema", metavar="DECAY|sigma=S", help=averaged)
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")

    verify = add("verify", "run the PyTorch module and ours on the same random input, and print the largest difference")
    verify.add_argument("source", nargs="+", type=cli.path)
    verify.add_argument("--image_size", type=cli.whole(1, 2**20), default=256, help="pixels; default %(default)s")
    verify.add_argument(
        "--tolerance", type=cli.number(ranges.real(0)), default=2e-5,
        help="of the largest entry, in float32; default %(default)s",
    )

    add("artefacts", "list the public weights that this project reads: name, file, what it is, what it fills, license")
    args = parser.parse_args(argv)
    if args.command == "export" and args.private and not args.push:
        export.error("--private is for a repository that --push makes: give --push ORGANIZATION/NAME, too")
    return args


def run(args):
    """Does what the command line says; returns the exit status."""
    if args.command == "artefacts":
        from checkpoints_tools import artefacts
        print(artefacts.table())
    elif args.command == "inspect":
        from checkpoints_tools.describe import describe, text
        from checkpoints_tools.identify import identify
        about = [describe(identify(source)) for source in args.source]
        print(json.dumps(about, indent=2, default=str) if args.json else "\n\n".join(map(text, about)))
    elif args.command == "verify":
        from checkpoints_tools.verify import report, verify
        status = 0
        for source in args.source:
            lines, passed = report(verify(source, args.image_size), args.tolerance)
            print(f"{source}\n{lines}")
            status |= not passed
        return int(status)
    else:
        from checkpoints_tools import convert
        start = time.time()
        options = {"step": args.step, "overwrite": args.overwrite, "ema": args.ema}
        if args.command == "convert":
            options |= {"optimizers": not args.weights_only, "plain_sit": args.plain_sit, "latent_stats": args.latent_stats}
            written = convert.convert(args.source, args.target, **options)
        elif args.command == "export":
            written = _export(args, options)
        else:
            written = convert.extract_vae(args.source, args.target, **options)
        for path in written:
            size = f" ({Path(path).stat().st_size / 1e6:.1f} MB)" if Path(path).is_file() else ""
            print(f"wrote {path}{size}")
        print(f"{time.time() - start:.0f} s")
    return 0


def _export(args, options):
    """Exports a model, and uploads it if it is asked for; returns the paths written."""
    from checkpoints_tools import hub
    from checkpoints_tools.export import export
    if args.push:
        hub.check(args.push, args.overwrite)
    written = export(args.source, args.target, vae_path=args.vae, license=args.license, name=args.push, **options)
    if args.push:
        print(f"uploaded to {hub.push(args.target, written, args.push, args.private)}")
    return written


@cli.command(parse_args)
def main(args):
    """Entry point."""
    sys.exit(run(args))


if __name__ == "__main__":
    main()
