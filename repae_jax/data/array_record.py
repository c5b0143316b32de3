"""Prepared images: decoded and cropped ahead of time, as `repae_jax.prepare_images` writes them."""

import dataclasses
import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from repae_jax.data import shards
from repae_jax.ranges import Extent, as_option, height_width, in_words

FORMAT = shards.ShardFormat("set of prepared images", "python -m repae_jax.prepare_images", 1)
ENCODINGS = ("png", "webp", "raw")


def encode(pixels: UInt8[np.ndarray, "H W 3"], encoding: str) -> bytes:
    """Encodes an image without loss, in one of ENCODINGS."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoding, lossless=True)  # PNG always is
    return buffer.getvalue()


def decode(content: bytes, encoding: str, size: Extent) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes what `encode` returned; raises ValueError or OSError for other content."""
    shape = (*height_width(size), 3)
    if encoding == "raw":
        return np.frombuffer(content, np.uint8).reshape(shape)
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    if pixels.shape != shape:
        raise ValueError(f"the image is {list(pixels.shape)} instead of {list(shape)}")
    return pixels


@dataclasses.dataclass(eq=False)
class PreparedImages(shards.Shards):
    """Random access to prepared images; record i is image i of the source that they were made from.

    The constructor raises ValueError if the folder is unfinished, damaged, of another version or image size.
    """

    path: str | os.PathLike  # folder, or its address in a bucket
    image_size: Extent  # in pixels, that of the prepared images
    reads_addresses = True

    def __post_init__(self):
        image_size = self.image_size
        super().__init__(self.path, FORMAT)
        if self.image_size != image_size:
            sizes = f"have {in_words(self.image_size)} pixels on a side, image_size is {in_words(image_size)}"
            advice = f"set image_size to {as_option(self.image_size)}, or prepare them anew from the original images"
            raise ValueError(f"prepared images {str(self.path)!r} {sizes}: {advice}")

    def __getitem__(self, i: int) -> dict:
        content = self.content(i)
        try:
            pixels = decode(content, self.manifest["encoding"], self.image_size)
        except (ValueError, OSError) as error:  # Pillow raises both
            raise self.damaged(i, error) from error
        return {"image": pixels, "label": self.labels[i]}
