"""The digits, and building sources by name."""

import pickle

import numpy as np
import pytest

from repae_jax.data import check_labels, make_source
from repae_jax.data.digits import DigitsSource


@pytest.mark.parametrize("split, count", [("train", 1442), ("test", 355), ("all", 1797)])
def test_records(split, count):
    source = DigitsSource(32, split)
    assert len(source) == len(source.labels) == count
    assert source.labels.dtype == np.int32 and set(source.labels) == set(range(10))
    assert source.num_classes == 10 and source.image_size == 32
    record = source[count - 1]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    assert record["label"] == source.labels[count - 1] and record["label"].dtype == np.int32


def test_images_are_the_digits_stretched_to_255():
    from sklearn.datasets import load_digits

    expected = load_digits().images[3] * 255 / 16
    image = DigitsSource(8, "all")[3]["image"]
    np.testing.assert_allclose(image, np.repeat(expected[..., None], 3, axis=-1), atol=0.51)
    assert image.min() == 0 and image.max() == 239  # 15 of 16


def test_digits_are_stretched_to_what_is_no_square():
    image = DigitsSource((8, 16), "all")[3]["image"]
    assert image.shape == (8, 16, 3)
    halves = image.reshape(8, 8, 2, 3).mean(axis=2)
    np.testing.assert_allclose(halves, DigitsSource(8, "all")[3]["image"], atol=40)


def test_train_and_test_share_no_digit_and_make_up_all():
    train, test, everything = (DigitsSource(8, split) for split in ("train", "test", "all"))
    number = [{source.name(i).split()[2] for i in range(len(source))} for source in (train, test, everything)]
    assert not number[0] & number[1] and number[0] | number[1] == number[2]


def test_every_class_gives_a_fifth_to_the_test_split():
    train, test = (np.bincount(DigitsSource(8, split).labels) for split in ("train", "test"))
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)


def test_survives_pickling():
    source = DigitsSource(16, "test")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[5]["image"], source[5]["image"])
    assert copy.name(5) == source.name(5)


def test_errors():
    with pytest.raises(ValueError, match="split is 'val'; allowed: 'train', 'test', 'all'"):
        DigitsSource(32, "val")
    with pytest.raises(ValueError, match="image_size is 0"):
        DigitsSource(0)


def test_an_unknown_source():
    allowed = "'digits', 'folder', 'imagenet', 'imagenet_tar', 'parquet', 'array_record'"
    with pytest.raises(ValueError, match=f"source is 'imagenette'; allowed: {allowed}"):
        make_source("imagenette", 32)


def test_check_labels():
    source = DigitsSource(8)
    check_labels(source, 10)
    check_labels(source, 1000)
    with pytest.raises(ValueError, match=r"of 1442 labels are out of range, first digits .*: 9; allowed: 0\.\.8"):
        check_labels(source, 9)
