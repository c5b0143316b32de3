"""Networks of the feature spaces beside Inception's: which are asked for, and pixels in, features out."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from checkpoints_tools.feature_spaces import load_space
from repae_jax import files
from repae_jax.data import reading
from repae_jax.distributed import sharding
from repae_jax.evaluation.batches import run_padded
from repae_jax.models.feature_spaces import FDR6, SPACES, Space, image_features
from repae_jax.training.checkpoint import fingerprint

GROUP = "fdr6"  # in the place of its five spaces


def chosen_spaces(words: Sequence[str]) -> dict[str, str]:
    """Returns the weights of each space that words such as 'dinov2', 'mae=FILE' or 'fdr6' name; those published by default."""
    chosen: dict[str, str] = {}
    for word in words:
        name, has_weights, weights = word.partition("=")
        if name not in (*SPACES, GROUP):
            allowed = f"allowed: {', '.join(SPACES)}; {GROUP} for {', '.join(FDR6)}"
            raise ValueError(f"feature space {name!r} is unknown; {allowed}; each as NAME or NAME=WEIGHTS")
        if has_weights and (name == GROUP or not weights):
            raise ValueError(f"{word}: weights are those of one space, as in mae=vit_large_patch16_224.mae.safetensors")
        for one in FDR6 if name == GROUP else [name]:
            if has_weights or one not in chosen:
                chosen[one] = weights or SPACES[one].weights
    return chosen


class SpaceNetwork:
    """A network with weights: pixels in, features out, in float32 without reduced-precision products; on all devices."""

    def __init__(self, space: Space, params: Any, batch_size: int):
        mesh = sharding.make_mesh(1, jax.local_devices())
        self.batch_size, self.checksum, self.size, self.protocol = batch_size, fingerprint(params), space.size, space.protocol
        run = jax.jit(jax.default_matmul_precision("highest")(functools.partial(image_features, space)))
        self._run = functools.partial(run, jax.device_put(params, sharding.replicated(mesh)))
        self._sharding = sharding.batch_sharding(mesh)

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N F"]:
        """Returns features; those of an image do not depend on the others. ValueError if they are not finite."""
        batches = [images[first:end] for first, end in reading.cut(0, len(images), self.batch_size)]
        features = np.concatenate([run_padded(self._run, [batch], self.batch_size, self._sharding) for batch in batches])
        if not np.isfinite(features).all():
            raise ValueError(f"features are not finite ({self.protocol}): the weights are damaged; download them again")
        return features


def load_space_networks(spaces: Mapping[str, str], batch_size: int) -> dict[str, SpaceNetwork]:
    """Loads the networks of `chosen_spaces`; weights may be 'random', for tests and to measure speed."""
    networks = {}
    for name, path in spaces.items():
        if path == files.RANDOM:
            logging.warning("%s has RANDOM weights: for tests and benchmarks only; its scores mean nothing", name)
            space = SPACES[name]
            pixels = np.zeros((1, space.side, space.side, 3), np.float32)
            params = jax.tree.map(np.asarray, jax.jit(space.module.init)(jax.random.key(0), pixels)["params"])
        else:
            space, params = load_space(name, path)
        networks[name] = SpaceNetwork(space, params, batch_size)
    return networks
