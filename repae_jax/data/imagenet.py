"""ImageNet, and other labeled images, as TensorFlow Datasets (TFDS) prepares them; read without TensorFlow.

To prepare ImageNet, put the archives of training and validation images of the ILSVRC 2012 challenge into a folder, and give it
to TFDS as in this folder's README, once. TFDS' command line, `tfds build`, would need packages that nothing else here does.
"""

import dataclasses
import functools
import io
import os
import resource
import socket
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from repae_jax import faults, files
from repae_jax.data.source import EncodedImages, check_image_size, check_label_range
from repae_jax.distributed import multihost
from repae_jax.ranges import Extent

_READ_THREADS = 16  # labels: the threads mostly wait for the disk
_CHUNK = 256
_OTHER_FILES = 512  # files that a process may have open, besides the shards


@dataclasses.dataclass(eq=False)
class ImagenetSource(EncodedImages):
    """Random access to the images of a TFDS data set, center-cropped as they are read. Worker processes open it for themselves.

    TFDS keeps labels with the images. They are read once, which reads all images from the disk (for ImageNet some 140 GB), and
    kept in a file. Process 0 of a run reads them, and the others wait for the file: it has to be on a disk that they share,
    unless every host has its own already.

    The constructor raises ValueError if the data set is not prepared as ArrayRecords, has no such split or features, or labels
    out of range; and ImportError without tensorflow_datasets.
    """

    image_size: Extent
    split: str = "train"  # or 'validation', or any other that TFDS understands, such as 'train[:1%]'
    data_dir: str | os.PathLike = ""  # folder of TFDS' data sets; '' for its choice: $TFDS_DATA_DIR, or ~/tensorflow_datasets
    dataset: str = "imagenet2012"  # has `image` and `label`; with its version if it is not the newest: 'imagenet2012:5.1.0'
    labels_file: str | os.PathLike = ""  # .npy for the labels; '' for a file beside the images

    def __post_init__(self):
        check_image_size(self.image_size)
        info = self._opened.dataset_info
        self._name = f"{info.full_name} {self.split}"
        self._labels_key = f"labels of {self._name}"
        if missing := {"image", "label"} - set(info.features):
            absent, features = " and no ".join(sorted(missing)), ", ".join(info.features)
            raise ValueError(f"{info.full_name} has no {absent}; its features: {features}")
        self.num_classes = info.features["label"].num_classes
        part = "".join(letter if letter.isalnum() else "_" for letter in self.split)
        file = Path(self.labels_file) if self.labels_file else Path(info.data_dir) / f"repae_jax_labels_{part}.npy"
        self.labels = self._get_labels(file)
        if multihost.is_multiprocess() and not jax.process_index():
            multihost.set_flag(self._labels_key)  # ends the wait of processes that do not see the file
        advice = ". ImageNet's test split has no labels: choose another"
        check_label_range(self.labels, self.name, self.num_classes - 1, advice)

    def content(self, i: int) -> bytes:
        """Returns the encoded image; raises ValueError if its label is not that in the labels file."""
        fields = self._record(i)
        if fields["label"] != self.labels[i]:
            raise ValueError(f"its label is {fields['label']}, that in the file of labels {self.labels[i]}: remove that file")
        return fields["image"]

    def name(self, i: int) -> str:
        """Returns data set, split and number of record `i`."""
        return f"{self._name} #{i}"

    @functools.cached_property
    def _opened(self):
        return _open(self.dataset, self.split, self.data_dir)

    def _record(self, i):
        try:
            return self._opened[i]
        except Exception as error:
            if faults.is_of_the_system(error):
                self.__dict__.pop("_opened", None)  # a file that could not be read once gives the same error for ever
            raise

    def _get_labels(self, file):
        """Returns the labels, int32 `[N]`, from a file; process 0 writes it if it does not exist, the others wait for it."""
        if not file.exists():
            if multihost.is_multiprocess() and jax.process_index():
                self._wait_for(file)
            else:
                self._write_labels(file)
        count = len(self._opened)
        try:
            labels = faults.read(np.load, file, name=lambda: str(file))
        except (ValueError, OSError, EOFError) as error:
            if faults.is_of_the_system(error):
                raise
            raise ValueError(f"{file} cannot be read ({error}): remove it, and the labels are read again") from error
        if labels.shape != (count,) or labels.dtype != np.int32:
            found = f"{file} holds {labels.dtype} {list(labels.shape)} instead of the labels of {count} images"
            raise ValueError(f"{found}: remove it, and they are read again")
        return labels

    def _wait_for(self, file):
        if multihost.wait_for_files([file], lambda: multihost.get_flag(self._labels_key)) or multihost.is_seen(file):
            return
        hosts = f"on host {socket.gethostname()}, though process 0 has it, on host {multihost.get_flag(self._labels_key)}"
        raise ValueError(f"{file} is not there {hosts}: set labels_file to a file on a disk that all hosts share, or copy it")

    def _write_labels(self, file):
        try:
            tempfile.TemporaryFile(dir=file.parent).close()  # before the labels are read, which takes long
        except OSError as error:
            advice = "set labels_file to a file that can be written"
            raise ValueError(f"the labels cannot be kept in {file} ({error}); {advice}") from error
        count = len(self._opened)
        with ThreadPool(_READ_THREADS) as pool:
            labels = pool.imap(self._read_label, range(count), _CHUNK)
            labels = np.fromiter(tqdm(labels, total=count, unit="img", desc="reading labels, once"), np.int32)
        content = io.BytesIO()
        np.save(content, labels)
        files.write_all({file: lambda temporary: temporary.write_bytes(content.getbuffer())}, overwrite=True)

    def _read_label(self, i):
        return faults.read(self._record, i, name=functools.partial(self.name, i))["label"]


def _open(dataset, split, data_dir):
    """Returns the tfds data source of a split, with encoded images."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        needed = f"TFDS' data sets are read by tensorflow_datasets, which cannot be imported ({error})"
        raise ImportError(f"{needed}: pip install tensorflow-datasets") from error
    folder = str(Path(data_dir).expanduser()) if data_dir else None
    where = f"in {data_dir!r}" if data_dir else "where TFDS looks; set data_dir to the folder of TFDS' data sets"
    try:
        builder = tfds.builder(dataset, data_dir=folder, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:  # AssertionError: unknown version
        message = str(error).splitlines()[0]
        if "File format is already set" in message:
            found = f"{dataset!r} is prepared in another format {where}, but only ArrayRecords can be read at random"
            raise ValueError(f"{found}. Prepare it anew, in another data_dir: {_build(dataset, 'DATA_DIR')}") from error
        raise ValueError(f"dataset {dataset!r} cannot be opened {where} ({message})") from error
    if not builder.is_prepared():
        to_do = f"To do so, with the folder of its archives: {_build(dataset, folder)}"
        raise ValueError(f"{dataset!r} is not prepared as ArrayRecords {where}. {to_do}")
    info = builder.info
    _allow_open_files(sum(part.num_shards for part in info.splits.values()))
    try:
        return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise ValueError(f"split is {split!r}; splits of {info.full_name}: {', '.join(map(repr, info.splits))}") from error


def _build(dataset, data_dir):
    """Returns the command that prepares a data set; `tfds build` needs apache-beam, which conflicts with other packages."""
    place = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"`python -c \"import tensorflow_datasets as tfds; tfds.builder({dataset!r}{place}, file_format='array_record')"
        ".download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir='ARCHIVES'))\"`"
    )


def _allow_open_files(shards):
    """Raises this process' limit of open files: TFDS keeps all shards open, and ImageNet has more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        limit = f"the {shards} shards need {needed} open files, this machine allows {hard}"
        raise ValueError(f"{limit}: raise its limit (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
