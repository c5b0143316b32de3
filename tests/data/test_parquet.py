import errno
import io
import itertools
import json
import os
import pickle
import resource
import time

import numpy as np
import pytest
import small
from pictures import encoded, picture
from PIL import Image

from repae_jax import faults
from repae_jax.data import make_source, reading
from repae_jax.data import parquet as parquet_source
from repae_jax.data.loader import Loader
from repae_jax.data.parquet import ParquetSource
from repae_jax.images import center_crop
from repae_jax.job import training_data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path, images, labels, names=None, image_type=None, group_size=3):
    """One parquet file as Hugging Face writes it; `images` are bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_type = image_type or pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    if pyarrow.types.is_struct(image_type):
        images = [image and {"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    columns = {"image": pyarrow.array(images, image_type)}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    table = pyarrow.table(columns)
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, path, row_group_size=group_size)


@pytest.fixture
def folder(tmp_path):
    """Files of 7, 4 and 5 rows in row groups of 3; record i has label i % 4."""
    first = 0
    for number, count in enumerate((7, 4, 5)):
        records = range(first, first + count)
        images = [encoded(picture(i, (24 + i, 20))) for i in records]
        write(tmp_path / f"data/train-{number:05d}-of-00003.parquet", images, [i % 4 for i in records], names=list("abcde"))
        first += count
    write(tmp_path / "data/validation-00000-of-00001.parquet", [encoded(picture(99))], [3])
    return tmp_path


def expected(i):
    return center_crop(Image.open(io.BytesIO(encoded(picture(i, (24 + i, 20))))), 16)


def test_records(folder):
    source = make_source("parquet", 16, path=str(folder))
    assert len(source) == 16 and source.num_classes == 5 and source.image_size == 16
    assert source.labels.dtype == np.int32 and source.labels.tolist() == [i % 4 for i in range(16)]
    for i in (15, 0, 6, 7, 10, 11, 3, 3):  # any order, all files
        np.testing.assert_array_equal(source[i]["image"], expected(i))
        assert source[i]["label"] == i % 4
    assert source.name(0) == "data/train-00000-of-00003.parquet row 0"
    assert source.name(10) == "data/train-00001-of-00003.parquet row 3"
    assert source.name(11) == "data/train-00002-of-00003.parquet row 0"
    with pytest.raises(IndexError):
        source[16]


def test_training_takes_it_from_flags(folder):
    write(folder / "other/test.parquet", [encoded(picture(1))] * 2, [0, 999])
    flags = {"source": "parquet", "options.path": folder / "other", "options.split": "test", "image_size": 16}
    given = [f"--config.data.{name}={value}" for name, value in flags.items()]
    source = training_data.make_images(small.from_flags(*given))
    assert isinstance(source, ParquetSource) and source.labels.tolist() == [0, 999]
    columns = "--config.data.options.image_column=image", "--config.data.options.label_column="  # empty is a choice
    assert training_data.make_images(small.from_flags(*given, *columns)).labels.tolist() == [0, 0]


@pytest.mark.parametrize("layout", ["validation.parquet", "validation/0000.parquet", "x/validation-00000-of-00001-ab.parquet"])
def test_splits_as_they_are_named(tmp_path, layout):
    write(tmp_path / layout, [encoded(picture(1))], [3])
    write(tmp_path / "train.parquet", [encoded(picture(2))] * 2, [3, 1])
    source = ParquetSource(tmp_path, 16, split="validation")
    assert len(source) == 1 and source.num_classes == 4


def test_columns_of_plain_bytes_and_other_names(tmp_path):
    table = pyarrow.table({"jpg": [encoded(picture(1))], "cls": pyarrow.array([7], pyarrow.int16())})
    parquet.write_table(table, tmp_path / "train.parquet")
    source = ParquetSource(tmp_path, 16, image_column="jpg", label_column="cls")
    assert source.labels.tolist() == [7] and source.num_classes == 8 and source[0]["image"].shape == (16, 16, 3)


def test_without_labels(tmp_path):
    write(tmp_path / "test.parquet", [encoded(picture(1))] * 2, [-1, -1])
    source = ParquetSource(tmp_path, 16, split="test", label_column="")
    assert source.labels.tolist() == [0, 0] and source.num_classes == 1


def test_memory_holds_few_row_groups(folder, monkeypatch):
    monkeypatch.setattr("repae_jax.data.parquet._KEPT_GROUPS", 1)
    source = ParquetSource(folder, 16)
    reads = []
    read_group = source._read_group
    monkeypatch.setattr(source, "_read_group", lambda number: reads.append(number) or read_group(number))
    source._start()
    for i in range(16):
        source[i]
    assert reads == list(range(7))  # in order, every row group is read once: of 3, 3, 1; 3, 1; 3, 2 rows
    assert source._read.cache_info().currsize == 1


def test_threads_that_read_in_order_read_a_row_group_once(folder, monkeypatch):
    source, reads = ParquetSource(folder, 16), []
    read_group = source._read_group

    def slow(number):
        reads.append(number)
        time.sleep(0.05)  # in which the other threads come for the same
        return read_group(number)

    monkeypatch.setattr(source, "_read_group", slow)
    source._start()
    reading.at_once(source.__getitem__, range(16))
    assert sorted(reads) == list(range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(folder, workers):
    source = ParquetSource(folder, 16)
    source[0]
    assert len(pickle.dumps(source)) < 10_000  # no images
    with Loader(source, batch_size=8, seed=0, workers=workers) as loader:
        batches = list(itertools.islice(loader, 2))
    images, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label"))
    wanted = {expected(i).tobytes(): i % 4 for i in range(16)}
    assert {image.tobytes(): label for image, label in zip(images, labels)} == wanted


def test_undecodable_rows_raise_when_read(tmp_path):
    whole = encoded(picture(0, (60, 40)))
    write(tmp_path / "train.parquet", [whole, whole[: len(whole) // 2], b"text", None], [0, 1, 2, 3])
    source = ParquetSource(tmp_path, 16)
    assert source[0]["label"] == 0
    for i in (1, 2):
        with pytest.raises(OSError):
            source[i]
    with pytest.raises(ValueError, match="is empty"):
        source[3]


def test_a_damaged_file(folder):
    file = folder / "data/train-00001-of-00003.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet cannot be read as parquet .*is it whole"):
        ParquetSource(folder, 16)


@pytest.fixture
def few_open_files():
    """Twenty more than there are."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_files_than_may_be_open(tmp_path, few_open_files):
    for number in range(50):
        write(tmp_path / f"train-{number:05d}-of-00050.parquet", [encoded(picture(1))], [number])
    source = ParquetSource(tmp_path, 16)
    assert source.labels.tolist() == list(range(50)) and all(source[i]["label"] == i for i in range(50))


def test_too_many_open_files_are_not_called_damage(folder, monkeypatch):
    def fail(file):
        raise OSError(errno.EMFILE, "Too many open files", str(file))

    monkeypatch.setattr(faults, "_PAUSES", (0,))
    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with pytest.raises(OSError, match="Too many open files: .*train-00000-of-00003.parquet") as caught:
        ParquetSource(folder, 16)
    assert "download" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "'nowhere', which is not a folder"),
        ({"split": "test"}, "split is 'test'; splits in .*: 'train', 'validation'"),
        ({"image_column": "img"}, "has no column 'img'; its columns: image, label"),
        ({"label_column": "class"}, "has no column 'class'; its columns: image, label"),
        ({"label_column": "image"}, "column 'image' of .* is of type struct.*allowed: whole numbers"),
        ({"image_column": "label"}, "column 'label' of .* is of type int64; allowed: bytes, or a struct"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_mistakes(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ParquetSource(**{"path": folder, "image_size": 16, **options})


def test_files_missing_of_a_numbered_set(folder):
    (folder / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 3 files of split 'train' are missing in .*data', first number 1"):
        ParquetSource(folder, 16)


def test_files_of_two_downloads(folder):
    write(folder / "data/train-00000-of-00002.parquet", [encoded(picture(1))], [0])
    with pytest.raises(ValueError, match=r"numbered up to \[2, 3\]: keep those of one download"):
        ParquetSource(folder, 16)


def test_no_parquet_files(tmp_path):
    with pytest.raises(ValueError, match="splits in .*: none: no parquet files"):
        ParquetSource(tmp_path, 16)


def test_no_rows(tmp_path):
    write(tmp_path / "train.parquet", [], pyarrow.array([], pyarrow.int64()))
    with pytest.raises(ValueError, match="hold no rows"):
        ParquetSource(tmp_path, 16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], "1 of 2 labels are out of range, first train.parquet row 1: -1.*label_column=''"),
        ([0, 2**40], "1 of 2 labels are out of range"),
        ([0, None], "has 1 rows without 'label'"),
    ],
)
def test_labels_out_of_range(tmp_path, labels, message):
    write(tmp_path / "train.parquet", [encoded(picture(1))] * 2, labels)
    with pytest.raises(ValueError, match=message):
        ParquetSource(tmp_path, 16)


# ---- files that the datasets library writes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Function that writes record `first` and those that follow it with `datasets`, as its `push_to_hub` names files."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def write_records(root, name, first, count, classes="abcde", batch_size=2):
        labels = datasets.ClassLabel(names=list(classes))
        columns = {
            "image": [Image.fromarray(picture(i, (24 + i, 20))) for i in range(first, first + count)],
            "label": [i % 4 for i in range(first, first + count)],
        }
        features = datasets.Features({"image": datasets.Image(), "label": labels})
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / name, batch_size=batch_size)

    return write_records


def test_shards_of_the_datasets_library(tmp_path, written):
    written(tmp_path, "data/train-00000-of-00002.parquet", 0, 3)
    written(tmp_path, "data/train-00001-of-00002.parquet", 3, 2)
    written(tmp_path, "data/train_extra-00000-of-00001.parquet", 9, 1)
    written(tmp_path, "data/train2017-00000-of-00001.parquet", 9, 1)
    written(tmp_path, "data/validation_matched-00000-of-00001.parquet", 9, 1)
    written(tmp_path, ".cache/huggingface/download/data/train-00000-of-00002.parquet", 0, 3)
    source = ParquetSource(tmp_path, 16)
    assert source.labels.tolist() == [0, 1, 2, 3, 0] and source.num_classes == 5
    for i in range(5):
        np.testing.assert_array_equal(source[i]["image"], center_crop(Image.fromarray(picture(i, (24 + i, 20))), 16))
    assert len(ParquetSource(tmp_path, 16, split="train_extra")) == 1
    with pytest.raises(ValueError, match="splits in .*: 'train', 'train2017', 'train_extra', 'validation_matched'"):
        ParquetSource(tmp_path, 16, split="validation")


@pytest.mark.parametrize(
    "layout", ["{}/train-00000-of-00001.parquet", "{}/train.parquet", "{}/train/0000.parquet", "en/{}/train.parquet"]
)
def test_one_configuration_at_a_time(tmp_path, written, layout):
    for place, name in enumerate(("default", "large", "small")):
        written(tmp_path, layout.format(name), place, 1)
    with pytest.raises(ValueError, match=r"split 'train' is in several folders .*default.*', '.*large.*', '.*small.*give one"):
        ParquetSource(tmp_path, 16)
    (chosen,) = tmp_path.rglob("large")
    assert ParquetSource(chosen, 16).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train-00000-of-00001.parquet", "train.parquet"), "numbered up to 1, and in others, such as train.parquet: keep"),
        (("train-00000-of-00001-aa.parquet", "train-00000-of-00001-bb.parquet"), "file 0 of split 'train' is in .*more than"),
        (("train.parquet", "train/0000.parquet"), "split 'train' is in several folders .*'.', 'train'"),
    ],
)
def test_the_same_records_in_two_ways(tmp_path, written, names, message):
    for name in names:
        written(tmp_path, name, 0, 1)
    with pytest.raises(ValueError, match=message):
        ParquetSource(tmp_path, 16)


@pytest.mark.parametrize("classes", ["abced", "abcd"])
def test_classes_in_another_order(tmp_path, written, classes):
    written(tmp_path, "train-00000-of-00002.parquet", 0, 1)
    written(tmp_path, "train-00001-of-00002.parquet", 1, 1, classes=classes)
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has images in .* and classes a, b, c, "):
        ParquetSource(tmp_path, 16)


def test_row_groups_that_are_too_large(folder, monkeypatch):
    monkeypatch.setattr(parquet_source, "_MOST_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="row group 0 of .*train-00000-of-00003.parquet holds .*row_group_size=100"):
        ParquetSource(folder, 16)
