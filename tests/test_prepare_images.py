"""Preparing images: the pixels of the source, and the same files after any interruption and from any number of processes."""

import contextlib
import errno
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image
from processes import contents, end_with_kills, in_threads, run_script

from repae_jax import data, faults, prepare_images
from repae_jax.data import array_record, shards
from repae_jax.data.array_record import PreparedImages
from repae_jax.data.folder import FolderSource
from repae_jax.data.loader import Loader
from repae_jax.distributed import multihost, stopping
from repae_jax.job import training_data

REPOSITORY = Path(__file__).parents[1]
COUNT, SIZE = 20, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of 20 noisy pictures in 4 classes; number 6 is truncated."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = root / f"class{i // 5}" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10 + i, 17, 3), np.uint8)).save(file)
    broken = root / "class1/06.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return root


def arguments(pictures, out, *more):
    settings = {"--image_size": SIZE, "--shard_size": 8, "--workers": 0, "--max_bad_fraction": 0.05}
    options = [f"{name}={value}" for name, value in settings.items()]
    return [f"--data=folder:path={pictures}", f"--out={out}", *options, *map(str, more)]


def prepare(pictures, out, *more):
    return prepare_images.run(prepare_images.parse_args(arguments(pictures, out, *more)))


@pytest.fixture(scope="module")
def prepared_folder(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    assert prepare(pictures, out) == 3
    return out


# ---- the files, and reading them ------------------------------------------------------------------------------------


def test_files(pictures, prepared_folder):
    named = [f"shard-{i:05d}{ending}" for i in range(3) for ending in (".array_record", ".json")]
    assert sorted(contents(prepared_folder)) == sorted([*named, "labels.npy", "manifest.json", "places.npy", "settings.json"])
    manifest = shards.read_manifest(prepared_folder, array_record.FORMAT)
    assert manifest["records"] == COUNT and [shard["records"] for shard in manifest["shards"]] == [8, 8, 4]
    assert manifest["bad_records"] == [[6, "class1/06.png"]] and manifest["images"]["source"] == "folder"
    for shard in manifest["shards"]:
        assert shards.shard_damage(prepared_folder, shard, check_content=True) is None


@pytest.mark.parametrize("encoding", array_record.ENCODINGS)
def test_pixels_and_labels_are_those_of_the_source(pictures, tmp_path, encoding):
    prepare(pictures, tmp_path / "out", "--format", encoding)
    source, prepared = FolderSource(pictures, SIZE), data.make_source("array_record", SIZE, path=str(tmp_path / "out"))
    assert len(prepared) == COUNT and prepared.num_classes == 4 and prepared.image_size == SIZE
    assert prepared.labels.dtype == np.int32 and prepared.labels.tolist() == source.labels.tolist()
    assert prepared.records_hash == data.records_hash(source)
    for i in (7, 8, 0, 19, 3):
        np.testing.assert_array_equal(prepared[i]["image"], source[i]["image"])
        assert prepared[i]["label"] == source.labels[i]
    with pytest.raises(ValueError, match="could not be decoded when the set of prepared images"):
        prepared[6]
    assert prepared.name(5).endswith(" #5") and prepared.name(6).endswith(" #6 (class1/06.png)")
    with pytest.raises(IndexError):
        prepared[COUNT]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_batches_are_those_of_the_source(pictures, prepared_folder, workers):
    prepared = PreparedImages(prepared_folder, SIZE)
    prepared[0]  # a file is open
    assert pickle.loads(pickle.dumps(prepared)).name(3) == prepared.name(3)
    options = {"batch_size": 6, "seed": 3, "max_bad_fraction": 0.05}
    with Loader(FolderSource(pictures, SIZE), **options) as batches, Loader(prepared, workers=workers, **options) as others:
        for expected, batch in itertools.islice(zip(batches, others), 8):
            for field in expected:
                np.testing.assert_array_equal(batch[field], expected[field])


def test_training_takes_the_flags_that_are_printed(prepared_folder):
    text = prepare_images.summary(prepared_folder)
    assert "20 images of 8 pixels in 4 classes (1 undecodable, their records are empty, first class1/06.png), 3 shards" in text
    config = small.from_flags(*[word for word in text.split() if word.startswith("--config.")])
    source = training_data.make_images(config)
    assert isinstance(source, PreparedImages) and len(source) == COUNT
    assert (config.data.image_size, config.data.num_classes) == (SIZE, 4)


@pytest.mark.parametrize("encoding", array_record.ENCODINGS)
def test_images_that_are_no_squares(pictures, tmp_path, encoding):
    made = [prepare(pictures, tmp_path / "out", "--format", encoding, "--image_size=8,12") for _ in range(2)]
    assert made == [3, 0]  # the second one finds the settings of the first
    text = prepare_images.summary(tmp_path / "out")
    assert "20 images of 8 x 12 pixels" in text
    source = training_data.make_images(small.from_flags(*[word for word in text.split() if word.startswith("--config.")]))
    assert source.image_size == (8, 12) and source[3]["image"].shape == (8, 12, 3)
    np.testing.assert_array_equal(source[3]["image"], FolderSource(pictures, (8, 12))[3]["image"])
    with pytest.raises(ValueError, match="have 8 x 12 pixels on a side, image_size is 8: set image_size to 8,12, or"):
        PreparedImages(tmp_path / "out", 8)


# ---- interruptions --------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(pictures, prepared_folder):
    before = {path: path.stat().st_mtime_ns for path in prepared_folder.iterdir()}
    assert prepare(pictures, prepared_folder) == 0
    assert {path: path.stat().st_mtime_ns for path in prepared_folder.iterdir()} == before


def test_a_folder_of_an_older_version_gets_the_places_of_its_records(pictures, prepared_folder, tmp_path):
    old = shutil.copytree(prepared_folder, tmp_path / "old")
    (old / shards.PLACES).unlink()
    for file in (old / shards.MANIFEST, *old.glob("shard-*.json")):
        fields = json.loads(file.read_text())
        fields.pop("places", None), fields.pop("places_sha256", None)
        file.write_text(json.dumps(fields, indent=2) + "\n")
    assert prepare(pictures, old) == 0
    named = (shards.MANIFEST, shards.PLACES, shards.LABELS)
    assert [contents(old)[name] for name in named] == [contents(prepared_folder)[name] for name in named]


def killed_trials(pictures, folder, trials):
    """Kills the work at random times until it is done, in a process of its own. Prints how often."""
    folder, draw = Path(folder), random.Random(0)
    encode = array_record.encode
    array_record.encode = lambda *given: time.sleep(0.05) or encode(*given)
    for trial in range(trials):
        out = folder / f"cut-{trial}"

        def start(out=out):
            pid = os.fork()  # importing takes seconds: that is done once
            if not pid:
                try:
                    prepare(pictures, out)
                finally:
                    os._exit(0 if (out / shards.MANIFEST).exists() else 1)
            return pid

        kills = end_with_kills(start, 3, lambda: draw.uniform(0.01, 0.15))
        print(json.dumps({"kills": kills}))


@pytest.mark.integration
def test_killed_at_random_times_the_files_are_the_same(pictures, prepared_folder, tmp_path):
    run = run_script(f"import test_prepare_images as t; t.killed_trials({str(pictures)!r}, {str(tmp_path)!r}, 4)")
    assert run.returncode == 0, run.stderr
    assert sum(json.loads(line)["kills"] for line in run.stdout.splitlines()) >= 1  # how many depends on the machine
    for trial in range(4):
        assert contents(tmp_path / f"cut-{trial}") == contents(prepared_folder)


@pytest.mark.parametrize("damage", ["cut", "byte", "gone"])
@pytest.mark.parametrize("name", ["shard-00001.array_record", "labels.npy", "manifest.json"])
def test_damaged_files_are_found_and_made_again(pictures, prepared_folder, tmp_path, warnings, name, damage):
    shutil.copytree(prepared_folder, tmp_path / "out")
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    at = len(whole) // 2
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:at] + (b"" if damage == "cut" else bytes([whole[at] ^ 1]) + whole[at + 1 :]))
    if name.startswith("shard") and damage == "byte":  # found when its record is read
        prepared = PreparedImages(tmp_path / "out", SIZE)
        with pytest.raises(ValueError, match=r"record \d of .*shard-00001.array_record is damaged .*prepare_images --out"):
            [prepared[i] for i in range(8, 16)]
    elif (name, damage) != ("manifest.json", "byte"):  # that byte may be anywhere
        with pytest.raises(ValueError, match=name):
            PreparedImages(tmp_path / "out", SIZE)
    prepare(pictures, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared_folder)


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_worker_processes_change_nothing(pictures, prepared_folder, tmp_path):
    command = [sys.executable, "-m", "repae_jax.prepare_images", *arguments(pictures, tmp_path / "out", "--workers=1")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.startswith(f"{tmp_path / 'out'}: 20 images"), run.stderr
    assert "100%" in run.stderr and "Leaving out undecodable record class1/06.png" in run.stderr
    assert contents(tmp_path / "out") == contents(prepared_folder)


def test_processes_share_the_work(pictures, prepared_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    results = {}

    def work(process):
        results[process] = prepare(pictures, tmp_path / "out", f"--process_index={process}", "--process_count=2")

    in_threads(work, (1, 0))
    assert results == {0: 2, 1: 1}
    assert contents(tmp_path / "out") == contents(prepared_folder)


def test_asked_to_stop_it_keeps_what_is_finished(pictures, prepared_folder, tmp_path, monkeypatch):
    encode, asked = array_record.encode, threading.Lock()

    def slow_encode(pixels, encoding):
        time.sleep(0.05)
        if (tmp_path / "out/shard-00000.json").exists() and asked.acquire(blocking=False):  # a second one acts at once
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(pixels, encoding)

    monkeypatch.setattr(prepare_images._Images, "block_size", 1)
    monkeypatch.setattr(array_record, "encode", slow_encode)
    monkeypatch.setattr(prepare_images.shard_writer.loader, "_READ_THREADS", 1)  # encodes just ahead of what is written
    assert prepare(pictures, tmp_path / "out") is None
    kept = sorted((tmp_path / "out").glob("shard-*.json"))
    assert kept and len(kept) < 3
    with pytest.raises(ValueError, match="has no manifest.json.*unfinished.*continues where it stopped"):
        PreparedImages(tmp_path / "out", SIZE)
    monkeypatch.undo()
    assert prepare(pictures, tmp_path / "out") == 3 - len(kept)
    assert contents(tmp_path / "out") == contents(prepared_folder)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format=raw"], "holds a set of prepared images made with other settings(.|\n)*encoding: 'png' there, 'raw' here"),
        (["--image_size=16"], "image_size: 8 there, 16 here"),
        (["--shard_size=5"], "shard_size: 8 there, 5 here"),
        (["--out=gs://bucket/a"], "go to a local or mounted disk, not to gs://bucket/a"),
        (["--out=/proc/a"], "'/proc/a' cannot be written to"),
        (["--data=imagenette"], "'imagenette' is no folder, and no source"),
        (["--data=folder:split=train"], "'folder' has no argument split"),
        (["--data=folder:path=nowhere"], "'nowhere', which is not a folder"),
    ],
)
def test_wrong_arguments(pictures, prepared_folder, more, message):
    before = contents(prepared_folder)
    with pytest.raises(ValueError, match=message):
        prepare(pictures, prepared_folder, *more)
    assert contents(prepared_folder) == before


def test_mistakes_end_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_images", "--data=nonsense", "--out=a"])
    with pytest.raises(SystemExit) as caught:
        prepare_images.main()
    assert str(caught.value.code).startswith("error: 'nonsense' is no folder") and "\n" not in caught.value.code


@pytest.mark.parametrize(
    "argument", ["--image_size=0", "--workers=-1", "--process_index=1", "--max_bad_fraction=2", "--format=jpeg"]
)
def test_numbers_out_of_range(argument, capsys):
    with pytest.raises(SystemExit):
        prepare_images.parse_args(["--data=digits", "--out=a", argument])
    name, value = argument.split("=")
    assert name in capsys.readouterr().err and value


def test_too_many_bad_images(pictures, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"1 of 20 records \(5.00%\) cannot be decoded, 0 are allowed: class1/06.png"):
            prepare(pictures, tmp_path / "out", "--max_bad_fraction=0")


@pytest.mark.parametrize("finishing", [0, 1])
def test_the_bad_images_of_all_processes_are_too_many(pictures, prepared_folder, tmp_path, finishing, monkeypatch):
    """Process 0 has the broken image's shard 0, process 1 another one; each alone stays within the limit."""
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    shutil.copytree(pictures, tmp_path / "pictures")
    broken = tmp_path / "pictures/class1/09.png"
    broken.write_bytes(broken.read_bytes()[:200])
    out, errors = tmp_path / "out", {}

    def work(process):
        try:
            prepare(tmp_path / "pictures", out, f"--process_index={process}", "--process_count=2")
        except RuntimeError as error:
            errors[process] = str(error)

    in_threads(work, (finishing, 1 - finishing))
    assert sorted(errors) == [0, 1] and not (out / shards.MANIFEST).exists()
    for message in errors.values():
        assert message.startswith("2 of 20 records (10.00%) cannot be decoded, 1 are allowed: class1/06.png, class1/09.png")
    assert prepare(tmp_path / "pictures", out, "--max_bad_fraction=0.1") == 0
    assert len(shards.read_manifest(out, array_record.FORMAT)["bad_records"]) == 2


@pytest.mark.parametrize("fails", [2, 3])
def test_an_image_is_not_left_out_because_the_disk_fails(pictures, prepared_folder, tmp_path, monkeypatch, fails):
    read, failed = FolderSource.__getitem__, []

    def flaky(source, i):
        if i == 11 and len(failed) < fails:
            failed.append(i)
            raise OSError(errno.EIO, "Input/output error")
        return read(source, i)

    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    monkeypatch.setattr(FolderSource, "__getitem__", flaky)
    if fails == 3:
        with pytest.raises(OSError, match="class2/11.png cannot be read, tried 3 times .*Input/output error"):
            prepare(pictures, tmp_path / "out")
    prepare(pictures, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared_folder)


SLOW = """
import time
from repae_jax import prepare_images

class Slow(prepare_images._Images):
    block_size = 1

    def read(self, fields):
        time.sleep(0.2)
        return super().read(fields)

if __name__ == "__main__":
    prepare_images._Images = Slow
    prepare_images.main()
"""


@pytest.mark.slow
def test_a_signal_to_all_of_its_processes_is_no_error(pictures, prepared_folder, tmp_path):
    """Terminals (Ctrl-C) and schedulers send signals to all processes."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "slow", *arguments(pictures, tmp_path / "out", "--workers=1")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **options) as process:
        while not (tmp_path / "out/shard-00000.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and output.startswith("asked to stop: what is finished is kept"), errors
    assert "Traceback" not in errors
    assert prepare(pictures, tmp_path / "out") and contents(tmp_path / "out") == contents(prepared_folder)


def test_what_could_not_be_written_is_told_when_stopped(pictures, tmp_path, monkeypatch):
    stopped = threading.Event()

    def fail(self, shard, encoded, bad):
        stopped.set()
        raise OSError("the disk is full")

    monkeypatch.setattr(stopping, "stop_signal", lambda: contextlib.nullcontext(stopped))
    monkeypatch.setattr(prepare_images.shard_writer.ShardWriter, "_write_shard", fail)
    with pytest.raises(OSError, match="the disk is full"):
        prepare(pictures, tmp_path / "out")


def test_images_that_changed(pictures, prepared_folder, tmp_path):
    shutil.copytree(pictures, tmp_path / "others")
    (tmp_path / "others/class0/00.png").rename(tmp_path / "others/class0/000.png")
    with pytest.raises(ValueError, match="records_hash"):
        prepare(tmp_path / "others", prepared_folder)


def test_images_that_moved(pictures, prepared_folder, tmp_path):
    shutil.copytree(pictures, tmp_path / "elsewhere")
    before = contents(prepared_folder)
    assert prepare(tmp_path / "elsewhere", prepared_folder) == 0
    assert contents(prepared_folder) == before


def test_another_size_than_prepared(prepared_folder):
    with pytest.raises(ValueError, match="have 8 pixels on a side, image_size is 16: set image_size to 8, or"):
        PreparedImages(prepared_folder, 16)


def test_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="no set of prepared images at .*nowhere': make one with `python -m repae_jax.pre"):
        PreparedImages(tmp_path / "nowhere", SIZE)


def test_a_disk_too_small_is_noticed_first(pictures, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ValueError, match="the set of prepared images needs 0.0 GB more, the disk of .* has 0.0 GB free"):
        prepare(pictures, tmp_path / "out")
