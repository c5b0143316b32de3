"""Prepared images: decoded and cropped ahead of time, as `repae_jax.prepare_images` writes them."""

import io

import numpy as np
from PIL import Image

from repae_jax.data import shards

KIND = shards.Kind("set of prepared images", "python -m repae_jax.prepare_images", 1)
ENCODINGS = ("png", "webp", "raw")


def encode(pixels, encoding):
    """Bytes of an image, without loss.

    Args:
      pixels: uint8 `[H, W, 3]`.
      encoding: one of ENCODINGS.
    """
    if encoding == "raw":
        return pixels.tobytes()
    options = {"png": {}, "webp": {"lossless": True}}[encoding]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoding, **options)
    return buffer.getvalue()


def decode(content, encoding, size):
    """What `encode` was given: uint8 `[size, size, 3]`. ValueError or OSError if the content is another."""
    if encoding == "raw":
        return np.frombuffer(content, np.uint8).reshape(size, size, 3)
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    if pixels.shape != (size, size, 3):
        raise ValueError(f"the image is {list(pixels.shape)} instead of {[size, size, 3]}")
    return pixels


class PreparedImages:
    """Random access to prepared images; record i is image i of the source that they were made from.

    Attributes:
      labels: int32 `[N]`.
      num_classes: that of the images' source.
      image_size: side of the images in pixels.
      records_hash: of the images' source, see `repae_jax.data.latents.records_hash`.
      contents_hash: of the files.
    """

    def __init__(self, path, image_size):
        """Reads manifest and labels, and checks that the shards are there and whole.

        Args:
          path: folder.
          image_size: side in pixels that the images have to have.

        Raises:
          ValueError: if the folder is unfinished, damaged, of another version or image size.
        """
        manifest = shards.read_manifest(path, KIND)
        if manifest["image_size"] != image_size:
            raise ValueError(
                f"prepared images {str(path)!r} have {manifest['image_size']} pixels on a side, image_size is {image_size}: "
                f"set image_size to {manifest['image_size']}, or prepare them anew from the original images"
            )
        self._shards = shards.Shards(path, KIND)
        self._encoding = manifest["encoding"]
        self.labels = self._shards.labels
        self.num_classes = manifest["num_classes"]
        self.image_size = image_size
        self.records_hash = manifest["records_hash"]
        self.contents_hash = self._shards.contents_hash

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`.

        Raises:
          ValueError: if the image could not be decoded when it was prepared, or the record is damaged.
        """
        content = self._shards[i]
        try:
            pixels = decode(content, self._encoding, self.image_size)
        except (ValueError, OSError) as error:  # of Pillow
            raise self._shards.damaged(i, error) from error
        return {"image": pixels, "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: its number, and the name of its image if that was undecodable."""
        return self._shards.name(i)
