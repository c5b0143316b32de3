"""Data in buckets, of a real object-store server: the same batches as from a disk, and errors."""

import itertools
import json
import threading
import time

import numpy as np
import pytest
import small
import tensorstore
from PIL import Image

from repae_jax import data, faults, prepare_images
from repae_jax.analyze_latents import encoding
from repae_jax.data import byte_ranges, reading, shards
from repae_jax.data.array_record import PreparedImages
from repae_jax.data.latents import CachedLatents
from repae_jax.data.loader import Loader
from repae_jax.evaluation import tokenizer
from repae_jax.job import training_data

pytestmark = pytest.mark.integration
COUNT, SIZE = 12, 8
_folders = itertools.count()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(root / f"class{i % 3}" / f"{i:02d}.png")
    out = tmp_path_factory.mktemp("prepared") / "images"
    options = "--image_size=8", "--shard_size=5", "--workers=0"
    prepare_images.run(prepare_images.parse_args([f"--data=folder:path={root}", f"--out={out}", *options]))
    return out


class Copy:
    """A folder's copy in the bucket, at `address`."""

    def __init__(self, folder):
        name = f"data-{next(_folders)}/images"
        self.address = f"gs://bucket/{name}"
        self._store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": f"{name}/"}).result()
        for path in folder.iterdir():
            self.write(path.name, path.read_bytes())

    def read(self, name):
        return self._store[name]

    def write(self, name, content):
        self._store[name] = content

    def remove(self, name):
        del self._store[name]


@pytest.fixture
def copied(gs, prepared):
    return Copy(prepared)


@pytest.fixture
def impatient(monkeypatch):
    """Shortens all pauses and waits."""
    monkeypatch.setattr(byte_ranges, "_RETRIES", {"max_retries": 0})
    monkeypatch.setattr(byte_ranges, "_SECONDS", 0.3)
    monkeypatch.setattr(byte_ranges, "_SECONDS_WHOLE", 0.3)
    monkeypatch.setattr(faults, "_PAUSES", (0.01, 0.01))
    byte_ranges._store.cache_clear()
    yield
    byte_ranges._store.cache_clear()


# ---- the same as from a disk ----------------------------------------------------------------------------------------


def test_prepared_images(copied, prepared):
    flags = {"source": "array_record", "options.path": f"{copied.address}/", "image_size": SIZE, "num_classes": 3}
    remote = training_data.make_images(small.from_flags(*[f"--config.data.{name}={value}" for name, value in flags.items()]))
    local = PreparedImages(prepared, SIZE)
    assert remote.labels.tolist() == local.labels.tolist() and remote.records_hash == local.records_hash
    assert remote.contents_hash == local.contents_hash and remote.name(3) == f"{copied.address} #3"
    with Loader(remote, batch_size=COUNT, seed=0) as batches, Loader(local, batch_size=COUNT, seed=0) as expected:
        np.testing.assert_array_equal(next(batches)["image"], next(expected)["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_is_one_request_for_its_bytes(gs, copied, prepared, workers):
    remote = PreparedImages(copied.address, SIZE)
    before = len(gs.requests())
    with (
        Loader(remote, batch_size=COUNT, seed=0, workers=workers) as batches,
        Loader(PreparedImages(prepared, SIZE), batch_size=COUNT, seed=0) as expected,
    ):
        np.testing.assert_array_equal(next(batches)["image"], next(expected)["image"])
    asked = gs.requests()[before:]
    assert len(asked) >= COUNT and {(request.method, request.status) for request in asked if request.status} == {("GET", 206)}
    places = np.load(prepared / shards.PLACES)
    ranges = {f"bytes={first}-{end - 1}" for first, end, _ in places.tolist()}
    assert {request.range for request in asked} == ranges
    assert {request.received for request in asked if request.status} <= set((places["end"] - places["first"]).tolist())


def test_no_record_is_begun_after_a_failure():
    begun = []

    def read_one(record):
        begun.append(record)
        if record == 1:
            raise OSError(5, "gone")
        time.sleep(0.3 if record == 0 else 0.01)

    with pytest.raises(OSError, match="gone"):
        reading.at_once(read_one, range(1000))
    assert len(begun) < 50  # those that were under way, but not all that the first would leave time for


def read_by_a_loader(source):
    with Loader(source, batch_size=8, seed=0) as loader:
        return next(loader)["image"]


READERS = {
    "training": read_by_a_loader,
    "evaluate_tokenizer": lambda source: tokenizer.read_images(source, range(8))[0],
    "analyze_latents": lambda source: next(encoding.read_batches(source, np.arange(8), 8))[0],
}


@pytest.mark.parametrize("reader", READERS)
def test_many_records_are_read_at_a_time(reader):
    together = threading.Barrier(8, timeout=20)

    class Slow:
        labels, num_classes, image_size = np.zeros(8, np.int32), 1, 2

        def __len__(self):
            return 8

        def __getitem__(self, i):
            together.wait()  # for all eight
            return {"image": np.full((2, 2, 3), i, np.uint8), "label": 0}

        def name(self, i):
            return str(i)

    assert sorted(READERS[reader](Slow())[:, 0, 0, 0].tolist()) == list(range(8))


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_what_is_missing(copied):
    with pytest.raises(ValueError, match="'gs://bucket/none' has no manifest.json: .*; make one on a disk .*copy it there"):
        PreparedImages("gs://bucket/none", SIZE)
    copied.remove("shard-00001.array_record")
    with pytest.raises(ValueError, match="1 of 3 shards, first shard-00001.array_record: missing; copy it there once more"):
        PreparedImages(copied.address, SIZE)
    content = copied.read("shard-00002.array_record")
    copied.write("shard-00002.array_record", content[:-1])
    with pytest.raises(ValueError, match=f"2 of 3 shards, .*shard-00002.array_record: fewer than {len(content)} bytes, or"):
        PreparedImages(copied.address, SIZE)
    copied.remove("labels.npy")
    with pytest.raises(ValueError, match="labels.npy is missing; copy it there once more"):
        PreparedImages(copied.address, SIZE)


def test_a_folder_of_an_older_version(copied):
    manifest = json.loads(copied.read("manifest.json"))
    del manifest["places_sha256"]
    copied.write("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ValueError, match="older version.*: mount the bucket .*or run `.*prepare_images --out FOLDER` again on"):
        PreparedImages(copied.address, SIZE)


def test_a_shard_that_vanishes(copied, prepared, impatient):
    remote = PreparedImages(copied.address, SIZE)
    copied.remove("shard-00001.array_record")
    message = rf"{copied.address} #\d cannot be read, tried 3 times .*shard-00001.array_record is not there any more; copy it"
    loader = Loader(remote, batch_size=COUNT, seed=0, max_bad_fraction=1)
    with pytest.raises(OSError, match=message) as caught:
        next(loader)
    assert caught.value.errno  # no damage, so the image is not bad
    copied.write("shard-00001.array_record", (prepared / "shard-00001.array_record").read_bytes())
    np.testing.assert_array_equal(remote[7]["image"], PreparedImages(prepared, SIZE)[7]["image"])


@pytest.mark.parametrize("change", ["a byte", "the end"])
def test_damaged_records(copied, change):
    remote, name = PreparedImages(copied.address, SIZE), "shard-00001.array_record"
    content = bytearray(copied.read(name))
    first = int(remote._places[7]["first"])
    content[first + 60] ^= 1
    copied.write(name, bytes(content if change == "a byte" else content[: first + 60]))
    reason = "another checksum than when it was written" if change == "a byte" else "it ends before byte .*"
    with pytest.raises(ValueError, match=f"record 2 of {copied.address}/{name} is damaged .{reason}.; copy it there once more"):
        reading.read(remote, 7)
    remote[6]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [(403, "PERMISSION_DENIED: answered by the test, HTTP 403"), (503, "ABORTED: .*, HTTP 503"), ("drop", "ABORTED: .*"),
     ("wait", "no answer within 0.3 s")],
)  # fmt: skip
def test_a_bucket_that_cannot_be_reached(gs, copied, prepared, impatient, rule, reason):
    remote = PreparedImages(copied.address, SIZE)
    gs.answer((".", rule))
    advice = "; check the address, the network and your permission .`gcloud auth application-default login`"
    with pytest.raises(OSError, match=f"{copied.address}/manifest.json cannot be read .{reason}.{advice}") as caught:
        CachedLatents(copied.address)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=f"images #7 cannot be read, tried 3 times .*{reason}.{advice}.*run the same command"):
        reading.read(remote, 7)
    gs.answer()
    np.testing.assert_array_equal(remote[7]["image"], PreparedImages(prepared, SIZE)[7]["image"])


def test_the_client_gives_up_in_time(monkeypatch):
    """By default it tries for a quarter of an hour."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")  # where nobody listens
    began = time.monotonic()
    byte_ranges._store.cache_clear()
    with pytest.raises(OSError, match="gs://bucket/a/manifest.json cannot be read .*onnect.*; check the address, the network"):
        PreparedImages("gs://bucket/a", SIZE)
    byte_ranges._store.cache_clear()
    assert time.monotonic() - began < byte_ranges._SECONDS


def test_no_bucket_has_such_a_name():
    with pytest.raises(ValueError, match="'gs://Bucket_' is no bucket .*; check the address"):
        PreparedImages("gs://Bucket_/a", SIZE)


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("folder", {"path": "gs://bucket/train"}),
        ("folder", {"path": "/data", "labels_file": "gs://bucket/train"}),
        ("parquet", {"path": "gs://bucket/train"}),
        ("imagenet_tar", {"path": "gs://bucket/train"}),
        ("imagenet", {"data_dir": "gs://bucket/train"}),
    ],
)
def test_other_sources_say_what_to_do(source, fields):
    message = (
        f"source '{source}' reads from disks, not from gs://bucket/train: mount the bucket .*`gcsfuse --implicit-dirs bucket "
        f"FOLDER`.*give the folder as {[*fields][-1]}"
    )
    with pytest.raises(ValueError, match=message):
        data.make_source(source, SIZE, **fields)


def test_a_folder_given_by_itself():
    with pytest.raises(ValueError, match="reads from disks, not from gs://bucket/val"):
        data.parse_source("gs://bucket/val")


@pytest.mark.parametrize("path", ["s3://bucket/a", "http://a/b"])
def test_other_kinds_of_storage(path):
    with pytest.raises(ValueError, match=f"'{path}' cannot be read: allowed are a folder, and gs://BUCKET/FOLDER"):
        PreparedImages(path, SIZE)


@pytest.mark.parametrize("source", ["folder", "imagenet_tar", "parquet", "array_record"])
def test_an_empty_path_is_none(source):
    with pytest.raises(ValueError, match=f"'{source}' needs the argument path"):
        data.make_source(source, SIZE, path="")
