"""Preparing images: `python -m repae_jax.prepare_images --data folder:path=/data/imagenet/train --out /data/imagenet256`.

Decodes and crops the images of any source once, as training would, and writes them to ArrayRecords that the source
'array_record' reads: no JPEG is decoded again, and reading is quick from any disk. The pixels are the same.

The same command continues where it stopped: a shard appears when it is whole and on disk, and is made again only if it is
damaged. Several machines on one file system share the shards, with --process_index and --process_count. The files are the same,
byte for byte, for any number of machines with one version of Pillow.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

from repae_jax import buckets, cli, data, ranges
from repae_jax.data import array_record, shard_writer, shards
from repae_jax.distributed import stopping

SHARD_SIZE = 4096  # records: about 500 MB of PNGs at 256 pixels
NOTES = ("images",)  # settings that may differ when the work is continued: files may move
_COMPRESSION = {"raw": 1.0, "png": 0.5, "webp": 0.4}  # approximate, for photographs


class _Images(shard_writer.RecordMaker):
    """Encodes images in the workers; there is nothing left to do in the main process."""

    format = array_record.FORMAT
    block_size = 64
    missing = b""

    def __init__(self, image_size, encoding):
        self.record_bytes = int(3 * math.prod(ranges.height_width(image_size)) * _COMPRESSION[encoding])
        self._encoding = encoding

    def read(self, fields: dict) -> bytes:
        """Returns the encoded image."""
        return array_record.encode(fields["image"], self._encoding)


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0], formatter_class=cli.HelpFormatter)
    examples = "folder:path=/data/train, imagenet:split=train or parquet:path=/data"
    add = parser.add_argument
    add("--data", type=cli.path, required=True, help=f"source of images and its fields, such as {examples}")
    add("--out", type=cli.path, required=True, help="folder for the prepared images, on a disk; continued if it exists")
    add("--image_size", type=cli.image_size, default=256, help="side of the prepared images in pixels, or HEIGHT,WIDTH")
    add("--format", choices=array_record.ENCODINGS, default="png", help="of the records; without loss, raw reads quickest")
    add("--shard_size", type=cli.whole(1), default=SHARD_SIZE, help="images in a shard, made as a whole or not at all")
    add("--workers", type=cli.whole(0, 4096), default=len(os.sched_getaffinity(0)), help="processes at work; 0: threads")
    too_many = "end when more than this share of the images is undecodable"
    add("--max_bad_fraction", type=cli.number(ranges.real(0, 1)), default=0.01, help=too_many)
    add("--process_index", type=cli.whole(0), default=0, help="which of several such commands this is, from 0")
    add("--process_count", type=cli.whole(1), default=1, help="how many there are, on machines that share a disk")
    args = parser.parse_args(argv)
    if args.process_index >= args.process_count:
        parser.error(f"--process_index is {args.process_index}; allowed: 0 to {args.process_count - 1}")
    return args


def _make_folder(out):
    """Creates the folder unless it exists; raises ValueError if it cannot be written to."""
    folder = Path(out).expanduser().absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:  # ArrayRecord's library needs UTF-8
        raise ValueError(f"{str(folder)!r} is not UTF-8: give another --out") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be written to ({error}): give another --out") from error
    return folder


def run(args: argparse.Namespace) -> int | None:
    """Prepares images by the arguments of the command line; for the returned number and errors see `ShardWriter.run`."""
    if buckets.is_address(args.out):
        raise ValueError(f"prepared images go to a local or mounted disk, not to {args.out}: give such an --out")
    name, fields = data.parse_source(args.data)
    with stopping.stop_signal() as stopped:
        source, maker = data.make_source(name, args.image_size, **fields), _Images(args.image_size, args.format)
        settings = {"encoding": args.format, "images": {"source": name, "options": fields}}
        writer = shard_writer.ShardWriter(
            _make_folder(args.out), source, maker, settings, shard_size=args.shard_size, notes=NOTES, workers=args.workers,
            max_bad_fraction=args.max_bad_fraction, process_index=args.process_index, process_count=args.process_count,
        )  # fmt: skip
        return writer.run(stopped)


def summary(folder: str | Path) -> str:
    """Returns a paragraph on finished prepared images, with the flags for training."""
    manifest = shards.read_manifest(folder, array_record.FORMAT)
    bad, size = manifest["bad_records"], manifest["image_size"]
    gigabytes = sum(shard["bytes"] for shard in manifest["shards"]) / 1e9
    first = f", first {', '.join(name for _, name in bad[:5])}" if bad else ""
    return (
        f"{folder}: {manifest['records']} images of {ranges.in_words(size)} pixels in {manifest['num_classes']} classes "
        f"({len(bad)} undecodable, their records are empty{first}), {len(manifest['shards'])} shards, {gigabytes:.2f} GB\n"
        f"train with --config.data.source=array_record --config.data.options.path={Path(folder).absolute()} "
        f"--config.data.image_size={ranges.as_option(size)} --config.data.num_classes={manifest['num_classes']}"
    )


@cli.command(parse_args)
def main(args):
    """Entry point."""
    shard_writer.print_outcome(run(args), args.process_index, lambda: summary(args.out))


if __name__ == "__main__":
    main()
