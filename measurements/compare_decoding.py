"""Speed of decoding beside PyTorch: `python measurements/compare_decoding.py [--folder JPEGS]`.

A DataLoader that opens every file with Pillow and crops it as ADM does (its `center_crop_arr`, written out here), and the
loader of training on the source 'folder': the same files in the same shuffled order, batch size and number of worker processes;
both hand over uint8. They take turns: in every repeat each reads the same images, the next repeat in reverse order, and the
ratio is taken within each repeat. Starting, and the first batches, are not counted. Without --folder the JPEGs are made: smooth
colors and noise, 500 x 375 pixels. The files of a turn are read once before, so that the disk has no part in it.

Needs torch.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import side_by_side
from absl import logging
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PYTORCH, OURS = SIDES = ("PyTorch with Pillow", "ours")
MADE, WIDTH, HEIGHT, NOISE, QUALITY = 256, 500, 375, 12, 92


class Files:
    """What `torch.utils.data.DataLoader` takes: (uint8 [size, size, 3], label) of the files of a FolderSource."""

    def __init__(self, root, source):
        self._paths = [str(Path(root) / source.name(i)) for i in range(len(source))]
        self._labels, self._size = source.labels.tolist(), source.image_size

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, i):
        with Image.open(self._paths[i]) as image:
            return crop_as_published(image.convert("RGB"), self._size), self._labels[i]


def crop_as_published(image, size):
    """uint8 [size, size, 3] of a PIL image in RGB. Reference: ADM `guided_diffusion/image_datasets.py` `center_crop_arr`."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def make_jpegs(folder, count):
    """Writes `count` JPEGs into a subfolder of `folder`."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    for i in tqdm(range(count), desc="making JPEGs", unit="img"):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(smooth) + rng.normal(0, NOISE, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "class" / f"{i:05d}.jpg", quality=QUALITY)


class Numbers:
    """As a source for the loader: records that say which they are."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        return {"record": i}


def order_of(source, options):
    """List of the records that a side reads in a turn: the loader's order depends on their number, not on what is in them."""
    from repae_jax.data.loader import Loader

    count = options.batches + 4 * options.workers  # also those that are not counted, and what is read ahead at the end
    with Loader(Numbers(len(source)), batch_size=options.batch_size, seed=0) as loader:
        return np.concatenate([next(loader)["record"] for _ in range(count)]).tolist()


def batches_of(side, root, source, order, options):
    """(iterator over batches, function that ends it); `order` is what `order_of` returns."""
    if side == OURS:
        from repae_jax.data.loader import Loader

        loader = Loader(source, batch_size=options.batch_size, seed=0, workers=options.workers)
        return loader, loader.close
    from torch.utils import data

    loader = data.DataLoader(Files(root, source), options.batch_size, sampler=order, num_workers=options.workers)
    return iter(loader), lambda: None


def images_per_second(side, root, source, order, options):
    """One side's turn."""
    batches, close = batches_of(side, root, source, order, options)
    try:
        for _ in range(2 * options.workers):
            next(batches)
        began = time.perf_counter()
        for _ in range(options.batches):
            next(batches)
        return options.batches * options.batch_size / (time.perf_counter() - began)
    finally:
        close()


def summarize(found):
    """{'median', 'low', 'high'} of the ratio of ours to PyTorch's within each repeat; `found`: side -> [images/s, ...]."""
    return side_by_side.spread([ours / theirs for ours, theirs in zip(found[OURS], found[PYTORCH], strict=True)])


def parse_args(argv=None):
    """Command line of this program."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", help="of class subfolders with JPEGs; without it, some are made")
    parser.add_argument("--image_size", type=int, default=256, help="side of the crop in pixels")
    parser.add_argument("--workers", type=int, default=cores, help="processes of each side")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--batches", type=int, default=16, help="that each side reads in a repeat")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    options = parser.parse_args(argv)
    for name in ("image_size", "workers", "batch_size", "batches", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed: 1 and above")
    return options


def run(options, show):
    """Measures as the command line says.

    Args:
      options: of `parse_args`.
      show: function that is given each line of the result.

    Returns:
      What `summarize` returns.

    Raises:
      ValueError: if the folder holds fewer images than a batch, or none.
      ImportError: without torch.
    """
    import torch  # noqa: F401 (said before any JPEG is made)

    from repae_jax.data.folder import FolderSource

    with tempfile.TemporaryDirectory() as made:
        root = options.folder or made
        if not options.folder:
            make_jpegs(Path(made), max(MADE, options.batch_size))
        source = FolderSource(root, options.image_size)
        if len(source) < options.batch_size:
            raise ValueError(f"--batch_size={options.batch_size}: {root} holds {len(source)} images; give a smaller one")
        order = order_of(source, options)
        for i in tqdm(sorted(set(order)), desc="reading the files", unit="file"):
            (Path(root) / source.name(i)).read_bytes()
        found = {side: [] for side in SIDES}
        for repeat, sides in enumerate(side_by_side.orders(SIDES, options.repeats), 1):
            for side in sides:
                found[side].append(images_per_second(side, root, source, order, options))
                show(f"repeat {repeat}: {side:<20}{found[side][-1]:8.1f} images/s")
    ratio = summarize(found)
    show(f"ours / PyTorch: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), {options.workers} workers each")
    return ratio


def main():
    """Entry point: mistakes end in one line."""
    options = parse_args()
    logging.set_verbosity(logging.WARNING)
    side_by_side.end_in_one_line(run, options)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
