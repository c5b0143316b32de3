"""Data in buckets: a server that speaks as much of Cloud Storage as reading takes."""

import http.server
import json
import re
import shutil
import threading
from pathlib import PosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import small
from PIL import Image

from repae_jax import build, data, prepare_images
from repae_jax.data import shards
from repae_jax.data.array_record import PreparedImages
from repae_jax.data.latents import CachedLatents
from repae_jax.data.loader import Loader

COUNT, SIZE = 12, 8


class Server(http.server.BaseHTTPRequestHandler):
    """Objects of `folder`, whole or from some byte on."""

    protocol_version = "HTTP/1.1"
    folder = None

    def do_GET(self):
        file = self.folder / self.path.partition("?")[0].rpartition("/o/")[2].replace("%2F", "/")
        content = (
            file.read_bytes() if file.is_file() else json.dumps({"error": {"code": 404, "message": "No such object"}}).encode()
        )
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        first = 0
        if file.is_file() and wanted:
            first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        part = content[first:]
        self.send_response((206 if wanted else 200) if file.is_file() else 404)
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


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


@pytest.fixture
def bucket(prepared, tmp_path, monkeypatch):
    """The folder behind gs://bucket, with prepared images at gs://bucket/images."""
    folder = tmp_path / "bucket"
    shutil.copytree(prepared, folder / "images")

    class Remote(PosixPath):
        """What etils.epath gives for an address, of a local folder."""

        def __new__(cls, path):
            return super().__new__(cls, str(path).replace("gs://bucket", str(folder)))

        def stat(self):
            return SimpleNamespace(length=super().stat().st_size, st_mode=super().stat().st_mode)

    monkeypatch.setattr(shards, "epath", SimpleNamespace(Path=Remote))
    monkeypatch.setattr(Server, "folder", folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder
        server.shutdown()


def test_prepared_images(bucket, prepared):
    flags = {"source": "array_record", "options.path": "gs://bucket/images/", "image_size": SIZE, "num_classes": 3}
    remote = build.make_images(small.from_flags(*[f"--config.data.{name}={value}" for name, value in flags.items()]))
    local = PreparedImages(prepared, SIZE)
    assert remote.labels.tolist() == local.labels.tolist() and remote.records_hash == local.records_hash
    assert remote.name(3) == "gs://bucket/images #3"
    with Loader(remote, batch_size=COUNT, seed=0) as one, Loader(local, batch_size=COUNT, seed=0) as other:
        np.testing.assert_array_equal(next(one)["image"], next(other)["image"])


def test_worker_processes_ask_for_images_only(bucket, prepared):
    remote, local = PreparedImages("gs://bucket/images", SIZE), PreparedImages(prepared, SIZE)
    shutil.move(bucket / "images/labels.npy", bucket)  # which only the main process has read
    with Loader(remote, batch_size=4, seed=0, workers=1) as one, Loader(local, batch_size=4, seed=0) as other:
        np.testing.assert_array_equal(next(one)["image"], next(other)["image"])


def test_what_is_wrong_in_a_bucket(bucket):
    with pytest.raises(ValueError, match="no set of prepared images at 'gs://bucket/none': make one on a disk .*copy it there"):
        PreparedImages("gs://bucket/none", SIZE)
    (bucket / "images/shard-00001.array_record").unlink()
    with pytest.raises(ValueError, match="1 of 3 shards, first shard-00001.array_record: missing; copy it there once more"):
        PreparedImages("gs://bucket/images", SIZE)


def test_a_record_that_cannot_be_reached(bucket, prepared):
    remote = PreparedImages("gs://bucket/images", SIZE)
    (bucket / "images/shard-00001.array_record").unlink()
    with pytest.raises(OSError, match="gs://bucket/images/shard-00001.array_record cannot be read: ") as caught:
        remote[7]
    assert caught.value.errno  # no damage, so the image is not bad
    shutil.copy(prepared / "shard-00001.array_record", bucket / "images")
    np.testing.assert_array_equal(remote[7]["image"], PreparedImages(prepared, SIZE)[7]["image"])


def test_a_damaged_record_in_a_bucket(bucket):
    remote, file = PreparedImages("gs://bucket/images", SIZE), bucket / "images/shard-00001.array_record"
    content = bytearray(file.read_bytes())
    content[65536 + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="record . of gs://bucket/images/shard-00001.array_record is damaged"):
        for i in range(5, 10):
            remote[i]


def test_a_bucket_that_cannot_be_reached(monkeypatch):
    class PermissionDeniedError(Exception):
        pass

    class Denied:
        def __init__(self, path):
            pass

        def __truediv__(self, name):
            return self

        def is_dir(self):
            raise PermissionDeniedError("no such luck\nand more")

    monkeypatch.setattr(shards, "epath", SimpleNamespace(Path=Denied))
    with pytest.raises(OSError, match="^gs://bucket/a cannot be reached .PermissionDeniedError: no such luck.; check"):
        CachedLatents("gs://bucket/a")


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
