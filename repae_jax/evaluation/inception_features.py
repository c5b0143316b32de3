"""Features of many images, Inception's and others: on all devices, kept part by part, so that interrupted work continues."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from checkpoints_tools.inception import load_inception
from repae_jax import files
from repae_jax.data import reading
from repae_jax.distributed import multihost, sharding
from repae_jax.evaluation.batches import run_padded
from repae_jax.evaluation.image_sets import ImageSet, naming_damage
from repae_jax.evaluation.space_networks import SpaceNetwork
from repae_jax.models.inception import SPATIAL_CHANNELS, InceptionFeatures, InceptionV3, graph_input
from repae_jax.training.checkpoint import fingerprint

PART_SIZE = 512  # fewest images in a part (10 MB): the most that a killed process loses
SETTINGS = "settings.json"
IMAGE_BYTES = 4 * (2048 + 2023 + 1008)  # Inception's features of an image in a part
FEATURES = ("pool", "spatial", "logits")
_SPACE = "space_"  # before the names of other spaces, in parts

Devices = list[jax.Device] | None
IsDone = Callable[[], bool]


class InceptionNetwork:
    """InceptionV3 with weights: pixels in, features out, in float32 without reduced-precision products.

    It takes `batch_size` images at a time, over all devices: by default, all of this process.
    """

    pool_features = 2048
    spatial_features = 17 * 17 * SPATIAL_CHANNELS  # 2023

    def __init__(self, params: Any, batch_size: int = 64, devices: Devices = None, prepare: Callable = graph_input):
        mesh = sharding.make_mesh(1, jax.local_devices() if devices is None else devices)
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {mesh.size} devices")
        self.batch_size, self.checksum = batch_size, fingerprint(params)
        apply = jax.jit(jax.default_matmul_precision("highest")(InceptionV3(prepare=prepare).apply))
        self._run = functools.partial(apply, {"params": jax.device_put(params, sharding.replicated(mesh))})
        self._sharding = sharding.batch_sharding(mesh)

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> InceptionFeatures:
        """Returns features as numpy arrays; those of an image do not depend on the others. ValueError for no such images."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            needed = "uint8 [N, H, W, 3] with values 0..255, N >= 1"
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; needed: {needed}")
        batches = [images[first:end] for first, end in reading.cut(0, len(images), self.batch_size)]
        features = [run_padded(self._run, [batch], self.batch_size, self._sharding) for batch in batches]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *features)


def load_network(path: str, batch_size: int = 64, devices: Devices = None, prepare: Callable = graph_input) -> InceptionNetwork:
    """Loads an InceptionNetwork from a file as `load_inception`; its path may be 'random', for tests and to measure speed."""
    if path != files.RANDOM:
        return InceptionNetwork(load_inception(path), batch_size, devices, prepare)
    logging.warning("Inception has RANDOM weights: for tests and benchmarks only; its scores mean nothing")
    params = jax.jit(InceptionV3().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return InceptionNetwork(jax.tree.map(np.asarray, params), batch_size, devices, prepare)


class FeatureParts:
    """A folder of features, one file per part of a set of images, made by one process or by several in turns.

    A part that exists is whole, and never made again. Parts are the same, bit for bit, however often the work was
    interrupted, and on any number of devices of one kind. Process p of n makes the parts p, p + n, ... `kept` marks the images
    that are kept beside their features; `is_done` tells whether process 0 has used the parts already and removed them. Each
    image is read or drawn once for all networks: Inception and those of `spaces`, by name.
    """

    def __init__(
        self, folder: Path, images: ImageSet, network: InceptionNetwork, kept: Bool[np.ndarray, " N"] | None = None,
        is_done: IsDone = lambda: False, spaces: Mapping[str, SpaceNetwork] | None = None,
    ):  # fmt: skip
        self._spaces = dict(spaces or {})
        self._folder, self._images, self._network, self._is_done = Path(folder), images, network, is_done
        self._kept = np.zeros(images.count, bool) if kept is None else kept
        batch = network.batch_size
        self._ranges = reading.cut(0, images.count, batch * -(-PART_SIZE // batch))
        self._paths = [self._folder / f"part-{part:05d}.npz" for part in range(len(self._ranges))]
        self._settings = {
            "images": images.description, "count": images.count, "shape": list(images.shape), "batch_size": batch,
            "inception": network.checksum, "kept": hashlib.sha256(np.packbits(self._kept)).hexdigest()[:16],
        }  # fmt: skip
        if self._spaces:
            self._settings["spaces"] = {name: space.checksum for name, space in self._spaces.items()}

    def make(self, description: str) -> bool:
        """Makes the missing parts of this process, and waits for those of the others; returns False if all work is done.

        ValueError if the folder holds parts made with other settings, or the disk has too little space.
        """
        if not self._agree():
            return False
        self._check_space(description)
        own = range(jax.process_index(), len(self._ranges), jax.process_count())
        todo = [part for part in own if not self._paths[part].exists()]
        batches = {part: reading.cut(*self._ranges[part], self._network.batch_size) for part in todo}
        blocks = self._images.blocks([batch for part in todo for batch in batches[part]])
        total, missing = (sum(end - first for first, end in (self._ranges[part] for part in parts)) for parts in (own, todo))
        bar = tqdm(total=total, initial=total - missing, unit="img", desc=description, disable=jax.process_index() != 0)
        with bar:
            for part in todo:
                features, kept = [], []
                for first, end in batches[part]:
                    pixels = next(blocks)
                    features.append(self._features(pixels))
                    kept.append(pixels[self._kept[first:end]])
                    bar.update(end - first)
                self._write(part, jax.tree.map(lambda *parts: np.concatenate(parts), *features), np.concatenate(kept))
        return multihost.wait_for_files(self._paths, self._is_done)

    def _features(self, pixels: UInt8[np.ndarray, "n H W 3"]) -> dict[str, np.ndarray]:
        """Returns the arrays of a part, by name, of one block of images."""
        inception = self._network(pixels)
        arrays = {name: getattr(inception, name) for name in FEATURES}
        return arrays | {_SPACE + name: space(pixels) for name, space in self._spaces.items()}

    def _agree(self) -> bool:
        """Lets process 0 write the settings if it is the first to come; all compare theirs. False if the work is done."""
        file = self._folder / SETTINGS
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                files.write_json(file, self._settings)
        if not multihost.wait_for_files([file], self._is_done):
            return False
        before, now = files.read_json(file), json.loads(json.dumps(self._settings))
        if differing := {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}:
            advice = "choose another --out, or the old settings, or remove the folder"
            raise ValueError(f"{self._folder} holds unfinished work with other settings (there, here): {differing}; {advice}")
        return True

    def _check_space(self, description: str) -> None:
        """Checks that the disk has room for the missing parts of all processes, which share it."""
        height, width = self._images.shape
        image_bytes = IMAGE_BYTES + 4 * sum(space.size for space in self._spaces.values())
        needed = sum(
            image_bytes * (end - first) + 3 * height * width * int(self._kept[first:end].sum())
            for path, (first, end) in zip(self._paths, self._ranges)
            if not path.exists()
        )
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            found = f"take {needed / 1e9:.1f} GB in {self._folder}, which has {free / 1e9:.1f} GB free"
            raise ValueError(f"the features of the {description} {found}: make space, or choose another place for the result")

    def _write(self, part: int, features: dict[str, np.ndarray], images: UInt8[np.ndarray, "n H W 3"]) -> None:
        for leftover in self._folder.glob(f".{self._paths[part].name}.*.tmp"):  # a killed process left it
            leftover.unlink(missing_ok=True)
        files.write_all({self._paths[part]: files.npz_writer({**features, "images": images})}, overwrite=True)

    def read(self) -> Iterator[InceptionFeatures]:
        """Yields the features as numpy arrays, part by part in order."""
        return (InceptionFeatures(**arrays) for arrays in self._read(*FEATURES))

    def read_space(self, name: str) -> Iterator[Float[np.ndarray, "n F"]]:
        """Yields the features in another space, part by part in order."""
        return (arrays[_SPACE + name] for arrays in self._read(_SPACE + name))

    def read_images(self) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yields the images that were kept, part by part in order."""
        return (arrays["images"] for arrays in self._read("images"))

    def _read(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        for path in self._paths:
            advice = "remove it, and run the same command to make it again"
            with naming_damage(path, advice), np.load(path, allow_pickle=False) as arrays:
                part = {name: arrays[name] for name in names}
            yield part
