"""Caches of latents of small pictures, written with a stub for the VAE."""

import json
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
from processes import end_with_kills

from configs import ldm
from repae_jax import cache_latents
from repae_jax.data import latents, shard_writer, shards


class Pictures:
    """Noise of 4 x 4 pixels; those in `bad` cannot be decoded."""

    image_size = 4
    num_classes = 10

    def __init__(self, count, bad=(), label_shift=0, name="picture"):
        self.labels = ((np.arange(count) + label_shift) % 10).astype(np.int32)
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
        self.bad = set(bad)
        self._name = name

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"broken {i}")
        return {"image": self.pixels[i], "label": self.labels[i]}

    def name(self, i):
        return f"{self._name}-{i}"


def encode(pixels):
    """Stub for a VAE with 2 x 2 x 2 latents: uint8 [b, 4, 4, 3] -> float32 [b, 2, 2, 4]."""
    patches = (pixels / np.float32(255)).reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    return np.concatenate([patches[..., :2] - 0.5, 0.1 + patches[..., 1:]], axis=-1).astype(np.float32)


def encode_both(pixels):
    """Encodes the images and their mirror images."""
    return np.stack([encode(pixels), encode(pixels[:, :, ::-1])], axis=1)


SETTINGS = {
    "latent_shape": [2, 2, 2], "precision": "float32", "fingerprint": "0123456789abcdef", "vae": "vae.pt",
    "images": {"source": "pictures", "options": {}},
}  # fmt: skip


def make_cache(folder, source, flips=False, stopped=None, encode=None, changes=(), **options):
    """Makes the folder and runs a ShardWriter; returns the number of shards made."""
    folder.mkdir(exist_ok=True)
    encode = encode or (encode_both if flips else globals()["encode"])
    options = {"max_bad_fraction": len(source.bad) / len(source), "notes": cache_latents.NOTES} | options
    settings = SETTINGS | {"flips": flips} | dict(changes)
    shard_size = settings.pop("shard_size", 8)
    shape = latents.record_shape(settings["latent_shape"], settings["flips"])
    maker = cache_latents.Latents(source.image_size, encode, 3, shape)
    writer = shard_writer.ShardWriter(folder, source, maker, settings, shard_size=shard_size, **options)
    return writer.run(stopped or threading.Event())


def interrupted_trials(folder, trials, seed):
    """Kills the writing at random times until it is done, trial by trial, in a process of its own. Prints what happened."""
    source = Pictures(90, bad=[17, 40])
    folder = Path(folder)

    def slow_encode(pixels):
        time.sleep(0.002)
        return encode(pixels)

    def start(out):
        pid = os.fork()  # importing jax takes seconds: that is done once
        if not pid:
            try:
                make_cache(out, source, encode=slow_encode)
            finally:
                os._exit(0 if (out / shards.MANIFEST).exists() else 1)
        return pid

    began = time.perf_counter()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    whole_seconds = time.perf_counter() - began
    draw = random.Random(seed)
    for trial in range(trials):
        out = folder / f"cut-{trial}"
        kills = end_with_kills(lambda out=out: start(out), 4, lambda: draw.uniform(0, 0.6) * whole_seconds)
        print(json.dumps({"kills": kills, "files": sorted(path.name for path in out.iterdir())}))


def frozen_config(changes=None):
    """Returns the smallest run's config on a frozen VAE; `changes` maps dotted names to values."""
    config = ldm.get_config("tiny")
    config.data.image_size = 8
    config.vae.channel_multipliers = (1, 1)
    config.vae.norm_groups = 4
    config.init.vae = "random"
    config.unlock()
    config.data.options = {"split": "test"}
    config.update_from_flattened_dict(changes or {})
    return config
