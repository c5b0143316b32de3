"""ImageNet, and other labelled images, as TensorFlow Datasets (TFDS) prepares them; TensorFlow has no part in reading.

To prepare ImageNet, put the archives of training and validation images of the ILSVRC 2012 challenge into a folder, and give it
to TFDS as in README, once. TFDS' command line, `tfds build`, would need packages that nothing else here does.
"""

import functools
import os
import resource
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from repae_jax import faults
from repae_jax.data.decoding import decode_crop
from repae_jax.distributed import multihost

_READ_THREADS = 16  # for labels: waits for the disk, mostly
_CHUNK = 256
_OTHER_FILES = 512  # that a process may have open, besides the shards


class ImagenetSource:
    """Random access to the images of a TFDS data set, centre-cropped as they are read. Worker processes open it for themselves.

    TFDS keeps labels with the images. They are read once, which reads all images from the disk (for ImageNet some 140 GB), and
    kept in the file `labels_file`. Of the processes of one run the first reads them, and the others wait for the file: it has
    to be on a disk that they share, unless every host has its own already.

    Attributes:
      labels: int32 `[N]`, 0 and above.
      num_classes: as the data set has it.
      image_size: side of the images in pixels.
    """

    def __init__(self, image_size, split="train", data_dir="", dataset="imagenet2012", labels_file=""):
        """Opens the data set; reads its labels unless that was done before.

        Args:
          image_size: side of the images in pixels.
          split: 'train', 'validation' or any other that TFDS understands, such as 'train[:1%]'.
          data_dir: folder of TFDS' data sets; '' for its own choice: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
          dataset: name of a data set with the features `image` and `label`, with its version if it is not the newest:
            'imagenet2012:5.1.0'.
          labels_file: .npy for the labels; '' for a file beside the images.

        Raises:
          ValueError: if the data set is not prepared as ArrayRecords, has no such split or features, or labels out of range.
          ImportError: without tensorflow_datasets.
        """
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; allowed: a positive number of pixels")
        self._arguments = (dataset, split, data_dir)
        self._opened = _open(*self._arguments)
        info = self._opened.dataset_info
        self._name = f"{info.full_name} {split}"
        missing = {"image", "label"} - set(info.features)
        if missing:
            absent, features = " and no ".join(sorted(missing)), ", ".join(info.features)
            raise ValueError(f"{info.full_name} has no {absent}; its features: {features}")
        self.num_classes = info.features["label"].num_classes
        self.image_size = image_size
        place = "".join(letter if letter.isalnum() else "_" for letter in split)
        file = Path(labels_file) if labels_file else Path(info.data_dir) / f"repae_jax_labels_{place}.npy"
        self.labels = self._read_labels(file)
        if multihost.is_multiprocess() and not jax.process_index():
            multihost.set_flag(self._labels_key)  # those who wait for the file look no further
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(self)} labels are out of range, first {self.name(wrong[0])}: {self.labels[wrong[0]]}; "
                f"allowed: 0..{self.num_classes - 1}. ImageNet's test split has no labels: choose another"
            )

    def __getstate__(self):
        return self.__dict__ | {"_opened": None}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns `{'image': uint8 [image_size, image_size, 3], 'label': int32}` of record `i`.

        Raises:
          Exception: whatever Pillow, or ArrayRecord, raise for what they cannot decode.
        """
        i = range(len(self))[i]
        fields = self._record(i)
        if fields["label"] != self.labels[i]:
            raise ValueError(f"its label is {fields['label']}, that in the file of labels {self.labels[i]}: remove that file")
        return {"image": decode_crop(fields["image"], self.image_size), "label": self.labels[i]}

    def name(self, i):
        """Names record `i`: data set, split and number."""
        return f"{self._name} #{i}"

    def _record(self, i):
        """Returns {'image': bytes, 'label': int, ...} of record `i`."""
        opened = self._opened
        if opened is None:  # in a worker
            opened = self._opened = _open(*self._arguments)
        try:
            return opened[i]
        except Exception as error:
            if faults.is_of_the_system(error):
                self._opened = None  # a file that could not be read once gives the same error for ever
            raise

    def _read_labels(self, file):
        """int32 [N] from a file, which is made if it is not there."""
        count = len(self._opened)
        if file.exists():
            try:
                labels = faults.read(np.load, file, name=lambda: str(file))
            except (ValueError, OSError, EOFError) as error:
                if faults.is_of_the_system(error):
                    raise
                raise ValueError(f"{file} cannot be read ({error}): remove it, and the labels are read again") from error
            if labels.shape != (count,) or labels.dtype != np.int32:
                raise ValueError(
                    f"{file} holds {labels.dtype} {list(labels.shape)} instead of the labels of {count} images: remove it, and "
                    "they are read again"
                )
            return labels
        if multihost.is_multiprocess() and jax.process_index():
            found = multihost.wait_for_files([file], lambda: multihost.get_flag(self._labels_key)) or multihost.is_seen(file)
            if not found:
                raise ValueError(
                    f"{file} is not there on host {socket.gethostname()}, though process 0 has it, on host "
                    f"{multihost.get_flag(self._labels_key)}: set labels_file to a file on a disk that all hosts share, or "
                    "copy it"
                )
            return self._read_labels(file)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.touch()
        except OSError as error:
            raise ValueError(
                f"the labels cannot be kept in {file} ({error}); set labels_file to a file that can be written"
            ) from error
        try:
            labels = np.empty(count, np.int32)

            def read(first):
                for i in range(first, min(first + _CHUNK, count)):
                    labels[i] = faults.read(self._record, i, name=functools.partial(self.name, i))["label"]
                return min(_CHUNK, count - first)

            with ThreadPoolExecutor(_READ_THREADS) as pool, tqdm(total=count, unit="img", desc="reading labels, once") as bar:
                for done in pool.map(read, range(0, count, _CHUNK)):
                    bar.update(done)
            with temporary.open("wb") as opened:
                np.save(opened, labels)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return labels

    @property
    def _labels_key(self):
        return f"labels of {self._name}"


def _open(dataset, split, data_dir):
    """tfds.data_source of encoded images."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"TFDS' data sets are read by tensorflow_datasets, which cannot be imported ({error}): pip install "
            "tensorflow-datasets"
        ) from error
    folder = str(Path(data_dir).expanduser()) if data_dir else None
    where = f"in {data_dir!r}" if data_dir else "where TFDS looks; set data_dir to the folder of TFDS' data sets"
    try:
        builder = tfds.builder(dataset, data_dir=folder, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:  # the last for a version
        message = str(error).splitlines()[0]
        if "File format is already set" in message:
            raise ValueError(
                f"{dataset!r} is prepared in another format {where}, but only ArrayRecords can be read at random. Prepare it "
                f"anew, in another data_dir: {_build(dataset, 'DATA_DIR')}"
            ) from error
        raise ValueError(f"dataset {dataset!r} cannot be opened {where} ({message})") from error
    if not builder.is_prepared():
        raise ValueError(
            f"{dataset!r} is not prepared as ArrayRecords {where}. To do so, with the folder of its archives: "
            + _build(dataset, folder)
        )
    info = builder.info
    _allow_open_files(sum(one.num_shards for one in info.splits.values()))
    try:
        return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise ValueError(f"split is {split!r}; splits of {info.full_name}: {', '.join(map(repr, info.splits))}") from error


def _build(dataset, data_dir):
    """Returns the command that prepares a data set; `tfds build` needs apache-beam, which does not go with the rest."""
    place = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"`python -c \"import tensorflow_datasets as tfds; tfds.builder({dataset!r}{place}, file_format='array_record')"
        ".download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir='ARCHIVES'))\"`"
    )


def _allow_open_files(shards):
    """TFDS keeps all shards open: more than a thousand of ImageNet, where a process may open 1024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"the {shards} shards need {needed} open files, this machine allows {hard}: raise its limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
