"""Reading sets of images: the right ones, in order, and clear words for what is no such set."""

import io
import zipfile

import numpy as np
import pytest
from feature_stub import save_images
from PIL import Image

from repae_jax.data import records_hash
from repae_jax.evaluation.image_sets import SORTED, dataset_images, folder_images, npz_images
from repae_jax.files import npz_writer

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 6, 4, 3), np.uint8)
RANGES = [(0, 3), (4, 5), (5, 11)]


def check_blocks(images, pixels=PIXELS):
    assert images.count == len(pixels) and list(images.shape) == list(pixels.shape[1:3])
    blocks = list(images.blocks(RANGES))
    for block, (first, end) in zip(blocks, RANGES, strict=True):
        np.testing.assert_array_equal(block, pixels[first:end])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "x.npz", PIXELS, np.arange(11))
    check_blocks(npz_images(tmp_path / "x.npz"))


def test_written_npz(tmp_path):
    labels = np.arange(11)
    npz_writer({"arr_1": labels}, {"arr_0": (PIXELS.shape, iter(np.split(PIXELS, [2, 2, 7])))})(tmp_path / "x.npz")
    check_blocks(npz_images(tmp_path / "x.npz"))
    with np.load(tmp_path / "x.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], PIXELS)
        np.testing.assert_array_equal(archive["arr_1"], labels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": PIXELS / np.float32(255)}, r"arr_0 of .*x.npz is float32 \[11, 6, 4, 3\]; needed: uint8.*truncates"),
        ({"arr_0": np.full((2, 4, 4, 3), np.nan)}, "is float64"),
        ({"arr_0": PIXELS[..., :1]}, r"uint8 \[11, 6, 4, 1\]"),
        ({"arr_0": PIXELS[:0]}, r"uint8 \[0, 6, 4, 3\]"),
        ({"arr_0": np.array([{}], object)}, "is object"),
        ({"mu": np.zeros(3), "sigma": np.zeros(3)}, "holds mu, sigma; needed: arr_0"),
    ],
)
def test_another_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        npz_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    with pytest.raises(FileNotFoundError, match="absent.npz does not exist"):
        npz_images(tmp_path / "absent.npz")
    buffer = io.BytesIO()
    save(buffer, PIXELS)
    content = buffer.getvalue()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.npz is no npz, or it is damaged"):
        npz_images(tmp_path / "cut.npz")
    (tmp_path / "changed.npz").write_bytes(content[:400] + bytes(300) + content[700:])
    with pytest.raises(ValueError, match="changed.npz is no npz, or it is damaged"):
        list(npz_images(tmp_path / "changed.npz").blocks([(0, 11)]))


def test_npz_that_ends_early(tmp_path):
    content = io.BytesIO()
    np.save(content, PIXELS)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-1])
    with pytest.raises(ValueError, match="short.npz.*ends before image 11"):
        list(npz_images(tmp_path / "short.npz").blocks(RANGES))


def test_folder(tmp_path):
    images = folder_images(save_images(tmp_path / "made", PIXELS))
    check_blocks(images)
    assert images.warnings == []
    assert images.description == folder_images(tmp_path / "made").description
    Image.fromarray(PIXELS[0]).save(tmp_path / "made" / "999.jpg")
    more = folder_images(tmp_path / "made")
    assert more.warnings == ["1 of 12 images are JPEG or WebP, whose losses change all scores"]
    assert more.description != images.description


def test_images_class_by_class(tmp_path):
    """Splits of the inception score are consecutive images."""
    (tmp_path / "made").mkdir()
    save_images(tmp_path / "made" / "a", PIXELS)
    assert folder_images(tmp_path / "made").warnings == []
    save_images(tmp_path / "made" / "b", PIXELS)
    assert folder_images(tmp_path / "made").warnings == [SORTED]
    names = np.array(list("aaaabbbbccc"))
    for labels, warnings in ((np.arange(11) // 4, [SORTED]), (np.arange(11) % 4, []), (np.zeros(11, int), []), (names, [])):
        np.savez(tmp_path / "made.npz", PIXELS, labels)
        assert npz_images(tmp_path / "made.npz").warnings == warnings


def test_gray_images(tmp_path):
    tmp_path.joinpath("gray").mkdir()
    Image.fromarray(PIXELS[0, :, :, 0]).save(tmp_path / "gray" / "0.png")
    block = next(folder_images(tmp_path / "gray").blocks([(0, 1)]))
    np.testing.assert_array_equal(block[0], np.repeat(PIXELS[0, :, :, :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("7.png", Image.new("RGB", (5, 6)), r"7.png has 6 x 5 pixels, 000.png 6 x 4; all must have one size"),
        ("7.png", Image.new("RGBA", (4, 6)), "7.png has PIL's mode RGBA; allowed: 8-bit gray or RGB"),
        ("7.png", Image.new("I;16", (4, 6)), "7.png has PIL's mode I;16"),
        ("7.png", None, "7.png cannot be read .*make it again"),
    ],
)
def test_images_that_do_not_belong(tmp_path, name, image, message):
    folder = save_images(tmp_path / "made", PIXELS)
    image.save(folder / name) if image else (folder / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=message):
        list(folder_images(folder).blocks([(0, 12)]))


def test_dataset():
    class Source:
        image_size = 4
        labels = np.zeros(11, np.int32)

        def __len__(self):
            return 11

        def __getitem__(self, i):
            if i == 10:
                raise OSError("broken")
            return {"image": PIXELS[i, :4]}

        def name(self, i):
            return f"picture-{i}"

    images = dataset_images(Source(), {"data": "here"})
    expected = {"data": "here", "images": 11, "image_size": 4, "records": records_hash(Source())}
    assert images.description == expected and images.shape == [4, 4]
    np.testing.assert_array_equal(next(images.blocks([(3, 5)])), PIXELS[3:5, :4])
    with pytest.raises(ValueError, match="picture-10 cannot be read .*OSError: broken.*; repair or remove it"):
        list(images.blocks([(8, 11)]))
