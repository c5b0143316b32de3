"""Inception's features of many images: on all devices, kept in files part by part, so that interrupted work continues."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from checkpoints_tools.inception import load_inception
from repae_jax import files
from repae_jax.distributed import multihost, sharding
from repae_jax.evaluation import image_sets
from repae_jax.job import frozen_weights
from repae_jax.models.inception import SPATIAL_CHANNELS, InceptionFeatures, InceptionV3, graph_input
from repae_jax.training.checkpoint import fingerprint

PART_SIZE = 512  # images at least in a file, 10 MB; what a killed run loses
SETTINGS = "settings.json"
IMAGE_BYTES = 4 * (2048 + 2023 + 1008)  # in a part


class InceptionNetwork:
    """InceptionV3 with weights: uint8 images in, features out, in float32 without reduced-precision products.

    Args:
      params: of InceptionV3.
      batch_size: images at a time, over all devices; a multiple of these.
      devices: default all of this process.
      prepare: InceptionV3's.

    Attributes:
      batch_size: see above.
      checksum: tells these weights from others.
      pool_features, spatial_features: sizes, 2048 and 2023.

    Raises:
      ValueError: if the batch cannot be shared by the devices.
    """

    pool_features = 2048
    spatial_features = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self, params, batch_size=64, devices=None, prepare=graph_input):
        mesh = sharding.make_mesh(1, jax.local_devices() if devices is None else devices)
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {mesh.size} devices")
        self.batch_size = batch_size
        self.checksum = fingerprint(params)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._sharding = sharding.batch_sharding(mesh)

        @jax.jit
        def run(params, images):
            with jax.default_matmul_precision("highest"):
                return InceptionV3(prepare=prepare).apply({"params": params}, images)

        self._run = run

    def __call__(self, images):
        """Features.

        Args:
          images: uint8 [N, H, W, 3], 0..255.

        Returns:
          InceptionFeatures of numpy arrays; those of an image do not depend on the others.

        Raises:
          ValueError: for another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; needed: uint8 [N, H, W, 3] with values 0..255, N >= 1"
            )
        made = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            # the last batch is filled up, so that one program serves all
            filled = np.pad(batch, ((0, self.batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
            made.append(self._run(self._params, jax.device_put(filled, self._sharding)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *made)


def load_network(path, batch_size=64, devices=None, prepare=graph_input):
    """InceptionNetwork with the weights of a file.

    Args:
      path: what `checkpoints_tools.inception.load_inception` takes; or 'random', for tests and to measure speed.
      batch_size: images at a time, over all devices.
      devices: default all of this process.
      prepare: InceptionV3's.

    Returns:
      InceptionNetwork.

    Raises:
      FileNotFoundError, ValueError: as `load_inception` and InceptionNetwork.
    """
    if path == frozen_weights.RANDOM:
        logging.warning("Inception has RANDOM weights: for tests and benchmarks only; its scores mean nothing")
        params = jax.jit(InceptionV3().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        return InceptionNetwork(jax.tree.map(np.asarray, params), batch_size, devices, prepare)
    return InceptionNetwork(load_inception(path), batch_size, devices, prepare)


class FeatureParts:
    """A folder of features, one file per part of a set of images, made by one process or by several in turns.

    A part is there when it is whole, and then never made again. Parts are the same, bit for bit, however often the work was
    interrupted, and on as many devices of a kind.

    Args:
      folder: made if need be.
      images: set of images, see `repae_jax.evaluation.image_sets`.
      network: InceptionNetwork, or what has its call and attributes.
      kept: bool [count]: which images themselves are kept beside their features; default none.
      process_index, process_count: process p makes the parts p, p + process_count, ...

    Raises:
      ValueError: if the folder holds parts of other images, or made in another way.
    """

    def __init__(self, folder, images, network, kept=None, process_index=0, process_count=1):
        self._folder, self._images, self._network = Path(folder), images, network
        self._kept = np.zeros(images.count, bool) if kept is None else kept
        self._process_index, self._process_count = process_index, process_count
        batch = network.batch_size
        size = batch * -(-PART_SIZE // batch)
        self._ranges = [(first, min(first + size, images.count)) for first in range(0, images.count, size)]
        self._settings = {
            "images": images.description,
            "count": images.count,
            "shape": list(images.shape),
            "batch_size": batch,
            "inception": network.checksum,
            "kept": hashlib.sha256(np.packbits(self._kept)).hexdigest()[:16],
        }

    def _path(self, part):
        return self._folder / f"part-{part:05d}.npz"

    def make(self, description, is_done=lambda: False):
        """Makes the missing parts of this process, and waits for those of the others.

        Args:
          description: what the progress bar calls it.
          is_done: whether process 0 has used the parts already and removed them.

        Returns:
          Whether all parts are there; False if is_done.
        """
        if not self._agree(is_done):
            return False
        own = range(self._process_index, len(self._ranges), self._process_count)
        todo = [part for part in own if not self._path(part).exists()]
        counts = {part: self._ranges[part][1] - self._ranges[part][0] for part in own}
        batch = self._network.batch_size
        cut = {part: _cut(*self._ranges[part], batch) for part in todo}
        blocks = self._images.blocks([block for part in todo for block in cut[part]])
        total = sum(counts.values())
        height, width = self._images.shape
        needed = sum(
            IMAGE_BYTES * (end - first) + 3 * height * width * int(self._kept[first:end].sum())
            for part, (first, end) in enumerate(self._ranges)
            if not self._path(part).exists()  # of the other processes, too: they share the disk
        )
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"the features of the {description} take {needed / 1e9:.1f} GB in {self._folder}, which has {free / 1e9:.1f} "
                "GB free: make space, or choose another place for the result"
            )
        with tqdm(
            total=total, initial=total - sum(counts[part] for part in todo), unit="img", desc=description,
            disable=self._process_index != 0,
        ) as bar:  # fmt: skip
            for part in todo:
                for left in self._folder.glob(f".{self._path(part).name}.*.tmp"):  # of a killed process
                    left.unlink(missing_ok=True)
                features, kept = [], []
                for first, end in cut[part]:
                    pixels = next(blocks)
                    features.append(self._network(pixels))
                    kept.append(pixels[self._kept[first:end]])
                    bar.update(end - first)
                together = jax.tree.map(lambda *parts: np.concatenate(parts), *features)
                arrays = {name: getattr(together, name) for name in ("pool", "spatial", "logits")}
                files.write_all(
                    {self._path(part): files.npz_writer({**arrays, "images": np.concatenate(kept)})}, overwrite=True
                )
        return multihost.wait_for_files([self._path(part) for part in range(len(self._ranges))], is_done)

    def _agree(self, is_done):
        """Process 0 writes the settings if it is the first to come; all compare theirs."""
        file = self._folder / SETTINGS
        if self._process_index == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                files.write_json(file, self._settings)
        if not multihost.wait_for_files([file], is_done):
            return False
        before, now = files.read_json(file), json.loads(json.dumps(self._settings))
        differing = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
        if differing:
            raise ValueError(
                f"{self._folder} holds unfinished work with other settings (there, here): {differing}; choose another --out, "
                "or the old settings, or remove the folder"
            )
        return True

    def read(self):
        """InceptionFeatures of numpy arrays, part by part in order."""
        for part in range(len(self._ranges)):
            with self._opened(part) as arrays:
                yield InceptionFeatures(**{name: arrays[name] for name in ("pool", "spatial", "logits")})

    def read_images(self):
        """The images kept, uint8 [n, H, W, 3], part by part in order."""
        for part in range(len(self._ranges)):
            with self._opened(part) as arrays:
                yield arrays["images"]

    @contextlib.contextmanager
    def _opened(self, part):
        path = self._path(part)
        advice = "remove it, and run the same command to make it again"
        with image_sets.naming_damage(path, advice), np.load(path, allow_pickle=False) as arrays:
            yield arrays


def _cut(first, end, size):
    """[(first, end), ...] of at most `size` each."""
    return [(at, min(at + size, end)) for at in range(first, end, size)]
