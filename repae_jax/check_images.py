"""Checks images before training on them: `python -m repae_jax.check_images /data/pictures --image_size 256`.

Reads every image as training would, and tells how many there are, of what sizes and classes, which cannot be decoded, which
come twice, which are turned, tiny or blank. Draws a contact sheet of what training sees, and writes all names to a JSON file
beside it. The exit code is 0 if training would work, and 1 if not: then the lines that begin with "problem" say why.
"""

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from repae_jax import cli, data, files, ranges
from repae_jax.data.inspection import Finding, Inspection, look_at_all
from repae_jax.data.source import EncodedImages
from repae_jax.evaluation import plots

COLUMNS = 12  # pictures in a row
MOST_CLASSES = 20  # rows of classes, evenly chosen from the largest to the smallest
SIDE = 96  # pixels of a picture


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0], formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    examples = "folder:path=/data/pictures,labels_file=labels.csv or parquet:path=/data"
    add("data", type=cli.path, help=f"folder of images; or a source and its fields, such as {examples}")
    add("--image_size", type=cli.image_size, default=256, help="side that training crops them to, in pixels, or HEIGHT,WIDTH")
    share = "of undecodable images, above which training ends: config.data.max_bad_fraction"
    add("--max_bad_fraction", type=cli.number(ranges.real(0, 1)), default=0.001, help=share)
    add("--out", type=cli.path, metavar="PNG", help="the contact sheet, a new file; default check-NAME.png, replaced each time")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Opened:
    """Images to check."""

    name: str  # of the source, in `data.SOURCES`
    fields: dict[str, Any]
    source: EncodedImages
    findings: list[Finding]  # what kept them from being opened as they were given


def open_source(text: str, image_size: ranges.Extent) -> Opened:
    """Opens a source of image files; a folder whose classes are in disorder is opened without classes, with a finding."""
    name, fields = data.parse_source(text)
    try:
        source, findings = data.make_source(name, image_size, **fields), []
    except ValueError as error:
        if name != "folder" or not fields.get("labelled", True) or not set(fields) <= {"path", "labels_file", "labelled"}:
            raise
        source = data.make_source(name, image_size, path=fields.get("path"), labelled=False)
        advice = "or train without classes, with labelled=False; what follows is without them"
        findings = [Finding(True, "", f"{error}; {advice}")]
        fields = {"path": fields["path"], "labelled": False}
    if not isinstance(source, EncodedImages):
        raise ValueError(f"{text}: the source {name!r} has no image files that could be wrong; allowed: the others")
    return Opened(name, fields, source, findings)


def class_names(opened: Opened) -> dict[int, str]:
    """Returns the subfolders' names of a folder with classes, else the labels."""
    names = {label: f"class {label}" for label in range(opened.source.num_classes)}
    if opened.name == "folder" and opened.fields.get("labelled", True) and "labels_file" not in opened.fields:
        first = {int(label): i for i, label in reversed(list(enumerate(opened.source.labels)))}
        names |= {label: opened.source.name(i).partition("/")[0] for label, i in first.items()}
    return names


def summary(inspection: Inspection) -> str:
    """Returns how many images there are, of what kinds and sizes, for people."""
    looks = [inspection.looks[i] for i in inspection.decoded()]
    counts, size = inspection.class_counts(), sum(seen.size for seen in inspection.looks)
    lines = [f"{len(inspection.looks)} images in {len(counts)} classes, {size / 1e6:.1f} MB"]
    if looks:
        shorter = np.array([min(seen.width, seen.height) for seen in looks])
        for title, values in (("kinds", [seen.kind for seen in looks]), ("pixels", [seen.mode for seen in looks])):
            ranked = collections.Counter(values).most_common()
            lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in ranked))
        lines.append(f"shorter side: {shorter.min()} to {shorter.max()} pixels, median {np.median(shorter):.0f}")
    sizes = [f"{inspection.class_names[label]} {count}" for label, count in counts.items()]
    shown = sizes if len(sizes) <= 2 * COLUMNS else [*sizes[:COLUMNS], "…", *sizes[-COLUMNS:]]
    return "\n".join([*lines, f"images by class: {', '.join(shown)}"])


def training_flags(opened: Opened) -> str:
    """Returns the flags that train on these images."""
    fields = {f"options.{name}": value for name, value in data.given(opened.fields).items()}
    if "options.path" in fields:
        fields["options.path"] = Path(fields["options.path"]).expanduser().absolute()
    size, classes = ranges.as_option(opened.source.image_size), opened.source.num_classes
    given = {"source": opened.name, **fields, "image_size": size, "num_classes": classes}
    return " ".join(f"--config.data.{name}={value}" for name, value in given.items())


def rows(inspection: Inspection, findings: list[Finding]) -> dict[str, list[int]]:
    """Returns the records of each row of the contact sheet by its label: classes first, then what was found."""
    by_class = collections.defaultdict(list)
    for i in inspection.decoded():
        by_class[int(inspection.source.labels[i])].append(i)
    counts = inspection.class_counts()
    labels = [label for label in counts if by_class[label]]
    chosen = [labels[at] for at in _evenly(len(labels), MOST_CLASSES)]
    shown = {f"{inspection.class_names[label]}, {counts[label]} images": by_class[label] for label in chosen}
    found = {f"{finding.title}: {len(finding.records)}": list(finding.records) for finding in findings if finding.title}
    some = {label: [records[at] for at in _evenly(len(records), COLUMNS)] for label, records in shown.items()}
    return some | {label: records[:COLUMNS] for label, records in found.items()}


def _evenly(count: int, most: int) -> list[int]:
    """Returns 0..count-1, or `most` of them at equal distances."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, most))}) if count else []


def draw(path, inspection: Inspection, findings: list[Finding]) -> None:
    """Draws the contact sheet, of the parts that training sees."""

    def pictures(records) -> UInt8[np.ndarray, "N H W 3"]:
        return np.stack([inspection.source[i]["image"] for i in records])

    plots.show_rows(path, {label: pictures(records) for label, records in rows(inspection, findings).items()}, size=SIDE)


def default_sheet(opened: Opened) -> Path:
    """Returns check-NAME.png, in the current folder; ValueError if it would be one of the pictures."""
    folder = Path(opened.fields.get("path", opened.name)).expanduser().resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"the contact sheet would be among the pictures of {folder}: give another place for it with --out")
    return Path(f"check-{folder.name}.png")


def run(args: argparse.Namespace) -> tuple[Inspection, list[Finding], str]:
    """Checks images as the command line says; returns what was found, and the flags to train on them."""
    if args.out and Path(args.out).suffix != ".png":
        raise ValueError(f"--out={args.out}: the contact sheet is a file ending in .png")
    if args.out:
        files.check_new("--out", str(files.check_new("--out", args.out).with_suffix(".json")))
    opened = open_source(args.data, args.image_size)
    out = Path(args.out).expanduser() if args.out else default_sheet(opened)
    bar = tqdm(look_at_all(opened.source), total=len(opened.source), unit="img", leave=False)
    inspection = Inspection(opened.source, list(bar), class_names(opened))
    findings = [*opened.findings, *inspection.findings(args.max_bad_fraction)]
    if inspection.decoded():
        draw(out, inspection, findings)
        print(f"contact sheet: {out}")
    content = {
        "data": args.data, "image_size": args.image_size, "images": len(opened.source), "classes": opened.source.num_classes,
        "findings": [
            {
                "kind": "problem" if finding.is_problem else "warning", "text": finding.text,
                "images": [opened.source.name(i) for i in finding.records],
            }
            for finding in findings
        ],
    }  # fmt: skip
    files.write_json(out.with_suffix(".json"), content, overwrite=True)
    print(f"all names: {out.with_suffix('.json')}")
    return inspection, findings, training_flags(opened)


@cli.command(parse_args)
def main(args):
    """Entry point; exit code 1 says that training would not work."""
    inspection, findings, flags = run(args)
    print(summary(inspection))
    for finding in findings:
        print(f"{'problem' if finding.is_problem else 'warning'}: {finding.text}")
    if any(finding.is_problem for finding in findings):
        sys.exit("training would not work: see the problems above")
    print(f"training would work, with {flags}")


if __name__ == "__main__":
    main()
