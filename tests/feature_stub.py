"""A quick stand-in for Inception: a few numbers per image that depend on all of its pixels."""

import numpy as np
from PIL import Image

from repae_jax.metrics.frechet import gaussian_stats
from repae_jax.models.inception import InceptionFeatures


class StubNetwork:
    checksum = "stub"
    pool_features, spatial_features = 6, 5

    def __init__(self, batch_size=8):
        self.batch_size = batch_size
        self.images = 0  # how many it has seen

    def __call__(self, images):
        assert images.dtype == np.uint8 and len(images) <= self.batch_size
        self.images += len(images)
        pixels = images.reshape(len(images), -1) / 255 - 0.5
        weights = np.random.default_rng(0).normal(size=(pixels.shape[1], 21)) / np.sqrt(pixels.shape[1])
        features = np.stack([row @ weights for row in pixels]).astype(np.float32)  # one by one: batches change nothing
        return InceptionFeatures(pool=np.abs(features[:, :6]), spatial=features[:, 6:11], logits=20 * features[:, 11:])


class StubSpace:
    """A stand-in for the network of another feature space."""

    size, protocol = 4, "a few numbers"

    def __init__(self, name, checksum="stub"):
        self.checksum, self.images = checksum, 0
        self._seed = sum(name.encode())

    def __call__(self, images):
        self.images += len(images)
        pixels = images.reshape(len(images), -1) / 255 - 0.5
        weights = np.random.default_rng(self._seed).normal(size=(pixels.shape[1], self.size)) / np.sqrt(pixels.shape[1])
        return np.stack([row @ weights for row in pixels]).astype(np.float32)


def save_images(folder, pixels):
    """Saves images [N, H, W, 3] as PNG files, named by their number; returns the folder."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def write_adm(path, pixels, *left_out):
    """Writes a reference as ADM's, without the keys left out."""
    features = StubNetwork(len(pixels))(pixels)
    (mu, sigma), (mu_s, sigma_s) = gaussian_stats(features.pool), gaussian_stats(features.spatial)
    arrays = {"arr_0": pixels, "mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(path, **{name: array for name, array in arrays.items() if name not in left_out})


class Noise:
    """A source of square images."""

    num_classes = 1

    def __init__(self, count, image_size=4, seed=0):
        self.image_size = image_size
        self.pixels = np.random.default_rng(seed).integers(0, 256, (count, image_size, image_size, 3), np.uint8)
        self.labels = np.zeros(count, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.pixels[i], "label": self.labels[i]}

    def name(self, i):
        return f"noise-{i}"
