"""TFDS data sets: a small one of ImageNet's name is written by TFDS itself."""

import io
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import small
from pictures import encoded, picture
from PIL import Image

from repae_jax.data import imagenet, make_source
from repae_jax.data.imagenet import ImagenetSource
from repae_jax.data.loader import Loader
from repae_jax.images import center_crop
from repae_jax.job import training_data

tfds = pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).parents[2]
LABELS_FILE = "repae_jax_labels_train.npy"


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """Record i of the training split has the label 7 * i, and is broken if i is 11."""

    VERSION = tfds.core.Version("5.1.0")
    pkg_dir_path = Path(__file__).parent

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(3, label=-1)}

    def _generate_examples(self, count, label=None):
        for i in range(count):
            content = encoded(picture(i, (30 + i, 24)))
            image = io.BytesIO(content[: len(content) // 2] if i == 11 else content)
            yield i, {"image": image, "label": 7 * i if label is None else label, "file_name": f"n{i}.JPEG"}


class Unlabeled(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": picture(0)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Imagenet2012, Unlabeled):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def labels_file(prepared):
    file = prepared / "imagenet2012/5.1.0" / LABELS_FILE
    file.unlink(missing_ok=True)
    return file


def test_records(prepared, labels_file):
    source = make_source("imagenet", 16, data_dir=str(prepared))
    assert len(source) == 20 and source.num_classes == 1000 and source.image_size == 16
    assert source.labels.dtype == np.int32 and sorted(source.labels) == [7 * i for i in range(20)]
    assert (source.labels != np.sort(source.labels)).any()  # TFDS has shuffled
    for i in (19, 0, 5):
        content = encoded(picture(source.labels[i] // 7, (30 + source.labels[i] // 7, 24)))
        np.testing.assert_array_equal(source[i]["image"], center_crop(Image.open(io.BytesIO(content)), 16))
        assert source[i]["label"] == source.labels[i]
    assert source.name(3) == "imagenet2012/5.1.0 train #3"
    with pytest.raises(IndexError):
        source[20]
    broken = source.labels.tolist().index(77)
    with pytest.raises(OSError):
        source[broken]


def test_training_takes_it_from_flags(prepared, tmp_path):
    flags = {
        "source": "imagenet", "options.data_dir": prepared, "options.split": "train[:50%]", "image_size": 16,
        "options.dataset": "imagenet2012:5.1.0", "options.labels_file": tmp_path / "labels.npy",
    }  # fmt: skip
    source = training_data.make_images(small.from_flags(*[f"--config.data.{name}={value}" for name, value in flags.items()]))
    assert isinstance(source, ImagenetSource) and len(source) == 10 and (tmp_path / "labels.npy").exists()


def test_labels_are_read_once(prepared, labels_file, monkeypatch):
    labels = ImagenetSource(16, data_dir=prepared).labels
    assert labels_file.exists() and not list(labels_file.parent.glob(".*.tmp"))
    monkeypatch.setattr(imagenet, "ThreadPool", None)  # nothing is read
    np.testing.assert_array_equal(ImagenetSource(16, data_dir=prepared).labels, labels)


def test_one_of_several_processes_reads_the_labels(prepared, labels_file, monkeypatch):
    labels = ImagenetSource(16, data_dir=prepared).labels
    labels_file.unlink()
    monkeypatch.setattr(imagenet.multihost, "is_multiprocess", lambda: True)
    monkeypatch.setattr(imagenet.jax, "process_index", lambda: 1)
    monkeypatch.setattr(imagenet, "ThreadPool", None)  # nothing is read
    monkeypatch.setattr(imagenet.multihost, "wait_for_files", lambda files, _: np.save(*files, labels) is None)
    np.testing.assert_array_equal(ImagenetSource(16, data_dir=prepared).labels, labels)
    labels_file.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(imagenet.multihost, "is_multiprocess", lambda: True)  # and process 0
    flags = []
    monkeypatch.setattr(imagenet.multihost, "set_flag", flags.append)
    np.testing.assert_array_equal(ImagenetSource(16, data_dir=prepared).labels, labels)
    assert flags == ["labels of imagenet2012/5.1.0 train"]


def test_labels_on_the_disk_of_another_host(prepared, labels_file, monkeypatch):
    monkeypatch.setattr(imagenet.multihost, "is_multiprocess", lambda: True)
    monkeypatch.setattr(imagenet.jax, "process_index", lambda: 1)
    monkeypatch.setattr(imagenet.multihost, "get_flag", {"labels of imagenet2012/5.1.0 train": "host-0"}.get)
    monkeypatch.setattr(imagenet.multihost, "SEEN_SECONDS", 0)
    with pytest.raises(
        ValueError, match=f"{LABELS_FILE} is not there on host .* process 0 has it, on host host-0: set labels_f"
    ):
        ImagenetSource(16, data_dir=prepared)


def test_processes_of_equal_number_may_read_the_labels_at_once(prepared, labels_file):
    """The first processes of containers all have the process id 1; these threads share the test's."""
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: ImagenetSource(16, data_dir=prepared), range(4)))
    for source in sources:
        np.testing.assert_array_equal(source.labels, np.load(labels_file))
    assert not list(labels_file.parent.glob(".*.tmp"))


def test_parts_of_splits_have_their_own_labels(prepared, labels_file):
    whole = ImagenetSource(16, data_dir=prepared).labels
    parts = [ImagenetSource(16, split, prepared).labels for split in ("train[:50%]", "train[50%:]")]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_worker_processes_open_it_for_themselves(prepared):
    source = ImagenetSource(16, data_dir=prepared)
    source[0]
    assert len(pickle.dumps(source)) < 5_000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1]["image"], source[1]["image"])


def test_batches(prepared):
    with Loader(ImagenetSource(16, data_dir=prepared), batch_size=20, seed=0, max_bad_fraction=0.05) as loader:
        batch = next(loader)
        assert loader.bad_records == 1 and 77 not in batch["label"] and batch["image"].shape == (20, 16, 16, 3)


def test_tensorflow_is_not_imported(prepared):
    script = f"""
import sys
from repae_jax import data
source = data.make_source("imagenet", 16, data_dir={str(prepared)!r})
print(len(source), source[0]["image"].shape, "tensorflow" in sys.modules, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert run.stdout == "20 (16, 16, 3) False False\n", run.stderr


def test_files_of_labels_for_other_images(prepared, labels_file):
    for wrong in (np.zeros(19, np.int32), np.zeros(20)):
        np.save(labels_file, wrong)
        with pytest.raises(ValueError, match=r"holds .* instead of the labels of 20 images: remove it"):
            ImagenetSource(16, data_dir=prepared)
    labels_file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read .*: remove it"):
        ImagenetSource(16, data_dir=prepared)
    np.save(labels_file, np.ones(20, np.int32))
    with pytest.raises(ValueError, match="its label is .*, that in the file of labels 1: remove that file"):
        ImagenetSource(16, data_dir=prepared)[0]


def test_a_place_for_labels(prepared, labels_file, tmp_path):
    with pytest.raises(ValueError, match="the labels cannot be kept in .*; set labels_file to a file that can be written"):
        ImagenetSource(16, data_dir=prepared, labels_file=tmp_path / "absent" / "labels.npy")
    ImagenetSource(16, data_dir=prepared, labels_file=tmp_path / "labels.npy")
    assert (tmp_path / "labels.npy").exists() and not labels_file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split is 'val'; splits of imagenet2012/5.1.0: 'train', 'test'"),
        ({"split": "test"}, "3 of 3 labels are out of range, first imagenet2012/5.1.0 test #0: -1; allowed: 0..999.*no labels"),
        ({"dataset": "imagenette_of_nobody"}, "'imagenette_of_nobody' cannot be opened in .*not found"),
        ({"dataset": "imagenet2012:3.0.0"}, "'imagenet2012:3.0.0' cannot be opened in .*3.0.0"),
        ({"dataset": "unlabeled"}, "unlabeled/1.0.0 has no label; its features: image"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_mistakes(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        ImagenetSource(**{"image_size": 16, "data_dir": prepared, **options})


def test_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="not prepared as ArrayRecords in .* its archives: `python -c .*imagenet2012'"):
        ImagenetSource(16, data_dir=tmp_path)


def test_prepared_in_another_format(tmp_path):
    Imagenet2012(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info = tmp_path / "imagenet2012/5.1.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="another format in .* anew, in another data_dir: `python -c .*imagenet2012'"):
        ImagenetSource(16, data_dir=tmp_path)


@pytest.mark.parametrize(("limits", "raised"), [((256, 4096), (1536, 4096)), ((8192, 8192), None), ((-1, -1), None)])
def test_a_thousand_shards_may_be_open(monkeypatch, limits, raised):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: calls.append(new))
    imagenet._allow_open_files(1024)
    assert calls == ([raised] if raised else [])


def test_a_machine_that_does_not_allow_it(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(ValueError, match="1024 shards need 1536 open files, this machine allows 1024"):
        imagenet._allow_open_files(1024)
