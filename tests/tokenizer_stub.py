"""Stand-ins for tests of tokenizers: a VAE of random weights, a source of noise, quick feature networks."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.sampling.load_model import LoadedTokenizer

SIDE = 12


class Pictures:
    """Noise, except that record 0 has a black and a white half; those in `bad` cannot be decoded."""

    image_size = SIDE

    def __init__(self, count=20, bad=()):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
        self.pixels[0] = np.repeat([0, 255], SIDE // 2)[:, None, None]
        self.bad = set(bad)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"broken {i}")
        return {"image": self.pixels[i], "label": 0}

    def name(self, i):
        return f"picture-{i}"


def features_of(pixels):
    """Stub for Inception: means of the colors over each half, [N, 6]."""
    return pixels.reshape(len(pixels), 2, -1, 3).mean(axis=2).reshape(len(pixels), -1) / 255


class Network:
    """Stub for InceptionNetwork."""

    checksum = "0123"

    def __call__(self, pixels):
        return SimpleNamespace(pool=features_of(pixels))


class Extent:
    """Stub for LPIPS: largest minus smallest value of the originals."""

    def init(self, key, *inputs):
        return {"params": jnp.ones(())}

    def apply(self, variables, originals, recon):
        assert recon.shape == originals.shape
        return variables["params"] * (originals.max(axis=(1, 2, 3)) - originals.min(axis=(1, 2, 3)))


def random_vae():
    """A LoadedTokenizer of factor 2."""
    module = AutoencoderKL(latent_channels=2, channels=8, channel_multipliers=(1, 1), num_res_blocks=1, norm_groups=4)
    inputs = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1, SIDE // 2, SIDE // 2, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        spread = np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 2
        return (rng.standard_normal(leaf.shape) / spread + (len(leaf.shape) == 1)).astype(np.float32)

    return LoadedTokenizer(module, jax.tree.map(draw, shapes), None)
