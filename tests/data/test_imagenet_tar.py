"""ImageNet from the challenge's archives, directly and through TFDS: tiny ones, of the same structure."""

import gzip
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, picture
from PIL import Image

from repae_jax import data, prepare_images
from repae_jax.data import imagenet_tar
from repae_jax.data.folder import FolderSource
from repae_jax.data.imagenet import ImagenetSource
from repae_jax.data.imagenet_tar import ImagenetTarSource
from repae_jax.images import center_crop

tfds = pytest.importorskip("tensorflow_datasets")
REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "repae_jax/data/README.md").read_text()
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TABLES = Path(tfds.__file__).parent / "datasets/imagenet2012"
WNIDS = (TABLES / "labels.txt").read_text().split()
SIZE = 16
# as the real set has them: TFDS knows their names, and encodes them anew
CMYK, PNG = "n01739381/n01739381_1309.JPEG", "n02105855/n02105855_2933.JPEG"
VAL_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109, 286]  # labels of the first images, as is widely known


def special(name):
    image = Image.fromarray(picture(1, (40, 30), noise=0) // 2 + 64)
    content = io.BytesIO()
    if name == CMYK:
        image.convert("CMYK").save(content, "jpeg", quality=95)
    else:
        image.save(content, "png")
    return content.getvalue()


def tar(files, add=lambda archive: None, **options):
    """Bytes of an archive of name -> content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        add(archive)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def training(change=lambda classes: None):
    """Bytes of an archive with one image for each class, and the special ones; `change` is done to wnid -> bytes before."""
    content = encoded(picture(0, (24, 20)))
    classes = {wnid: {f"{wnid}_{i + 7}.JPEG": content} for i, wnid in enumerate(WNIDS)}
    for name in (CMYK, PNG):
        wnid, _, file = name.partition("/")
        classes[wnid] = {file: special(name)} | classes[wnid]
    for i in range(4):
        classes[WNIDS[i]][f"{WNIDS[i]}_{i + 7}.JPEG"] = encoded(picture(i, (30 + i, 22)))
    archives = {wnid: tar(files) for wnid, files in classes.items()}
    change(archives)
    return tar({f"{wnid}.tar": content for wnid, content in archives.items()})


def validation(numbers=range(1, 13)):
    return {f"ILSVRC2012_val_{number:08d}.JPEG": encoded(picture(number, (25, 20))) for number in numbers}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Folder of the two archives."""
    folder = tmp_path_factory.mktemp("archives")
    (folder / TRAIN).write_bytes(training())
    # not in the order of their numbers, as in the real one
    (folder / VAL).write_bytes(tar(validation([3, 1, 2, *range(4, 13)])))
    return folder


@pytest.fixture(scope="module")
def unpacked(archives, tmp_path_factory):
    """The training images, a folder for each class."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archives / TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(folder / member.name.removesuffix(".tar"), filter="data")
    return folder


def test_training_images_are_those_of_the_unpacked_folder(archives, unpacked):
    source, folder = ImagenetTarSource(archives / TRAIN, SIZE), FolderSource(unpacked, SIZE)
    assert len(source) == 1002 and source.num_classes == 1000 and source.image_size == SIZE and source.labels.dtype == np.int32
    names = [source.name(i) for i in range(len(source))]
    assert names == [folder.name(i) for i in range(len(folder))] and {CMYK, PNG} < set(names)
    np.testing.assert_array_equal(source.labels, folder.labels)
    assert data.records_hash(source) == data.records_hash(folder)
    for i in (0, 3, 1001, names.index(CMYK), names.index(PNG)):
        np.testing.assert_array_equal(source[i]["image"], folder[i]["image"])
        assert source[i]["label"] == folder.labels[i] == WNIDS.index(names[i].partition("/")[0])
    with pytest.raises(IndexError):
        source[1002]


def test_validation_images(archives):
    source = data.make_source("imagenet_tar", SIZE, path=str(archives / VAL))
    assert len(source) == 12 and source.num_classes == 1000 and sorted(source.labels) == sorted(VAL_LABELS)
    assert (np.diff(source.labels) >= 0).all()
    for i in range(12):
        wnid, number = re.fullmatch(r"(n\d{8})/ILSVRC2012_val_(\d{8})\.JPEG", source.name(i)).groups()
        assert WNIDS.index(wnid) == VAL_LABELS[int(number) - 1] == source.labels[i] == source[i]["label"]
        content = encoded(picture(int(number), (25, 20)))
        np.testing.assert_array_equal(source[i]["image"], center_crop(Image.open(io.BytesIO(content)), SIZE))


def test_the_tables(archives):
    """1000 classes in order, and 50 validation images of each."""
    labels = (TABLES / "validation_labels.txt").read_text().split()
    assert sorted(WNIDS) == WNIDS and len(set(WNIDS)) == 1000
    assert len(labels) == 50_000 and all(labels.count(wnid) == 50 for wnid in WNIDS[::100])


@pytest.mark.integration
def test_tfds_gives_the_same(archives, tmp_path):
    """TFDS prepares the archives by the README's command, with the builder that users have."""
    program, option, script = shlex.split(re.search(r"python -c \"\nimport tensorflow_datasets.*?\"\n", README, re.DOTALL)[0])
    assert (program, option) == ("python", "-c")
    script = script.replace("'/data/archives'", repr(str(archives))).replace("'/data/tfds'", repr(str(tmp_path)))
    assert str(archives) in script and str(tmp_path) in script
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert not run.returncode, run.stderr
    builder = tfds.builder_from_directory(tmp_path / "imagenet2012/5.1.0")
    for split, archive in (("train", TRAIN), ("validation", VAL)):
        there, here = ImagenetSource(SIZE, split, tmp_path), ImagenetTarSource(archives / archive, SIZE)
        files = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        assert len(there) == len(here) == len(files) and there.num_classes == here.num_classes
        place = {here.name(i): i for i in range(len(here))}
        for i in range(len(there)):
            name = f"{WNIDS[there.labels[i]]}/{files[i]['file_name'].decode()}"
            ours, theirs = here[place[name]], there[i]
            assert ours["label"] == theirs["label"]
            # encoded anew by TFDS: at quality 100, with half the resolution of colors
            most = 8 if name in (CMYK, PNG) else 0
            assert np.abs(ours["image"].astype(int) - theirs["image"]).max() <= most, name


def test_one_command_prepares_it(archives, tmp_path, monkeypatch):
    """The command of the README, with `~` in its path."""
    monkeypatch.setenv("HOME", str(archives))
    (line,) = re.findall("prepare_images (.*imagenet_tar:.*)", README)
    text = line.replace("/data/archives", "~").replace("/data/imagenet256", str(tmp_path / "out"))
    args = prepare_images.parse_args([*shlex.split(text.replace(TRAIN, VAL)), "--image_size=8", "--workers=0"])
    assert args.data == f"imagenet_tar:path=~/{VAL}"
    assert prepare_images.run(args) == 1
    prepared, source = data.make_source("array_record", 8, path=tmp_path / "out"), ImagenetTarSource(archives / VAL, 8)
    assert prepared.num_classes == 1000 and prepared.labels.tolist() == source.labels.tolist()
    for i in range(12):
        np.testing.assert_array_equal(prepared[i]["image"], source[i]["image"])


def test_archives_packed_again(archives, tmp_path):
    """Some programs also store folders, exact dates and hidden files."""

    def add_others(archive):
        folder = tarfile.TarInfo("./val")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        hidden = tarfile.TarInfo("./val/._ILSVRC2012_val_00000001.JPEG")
        archive.addfile(hidden)

    files = {f"./val/{name}": content for name, content in validation().items()}
    options = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "packed again"}}
    (tmp_path / "again.tar").write_bytes(tar(files, add_others, **options))
    source, again = (ImagenetTarSource(path, SIZE) for path in (archives / VAL, tmp_path / "again.tar"))
    assert data.records_hash(source) == data.records_hash(again)
    np.testing.assert_array_equal(source[5]["image"], again[5]["image"])


def test_worker_processes_open_it_for_themselves(archives):
    source = ImagenetTarSource(archives / TRAIN, SIZE)
    source[0]
    content = pickle.dumps(source)
    assert len(content) < 100_000
    np.testing.assert_array_equal(pickle.loads(content)[1]["image"], source[1]["image"])


def test_the_listing_is_compared_with_what_the_archive_should_hold(archives, warnings):
    ImagenetTarSource(archives / VAL, SIZE)
    assert warnings == [f"{archives / VAL} holds 12 images, the challenge's archive 50000"]


def test_a_disk_that_fails_is_no_bad_image(archives, tmp_path, monkeypatch):
    shutil.copy(archives / VAL, tmp_path)
    source = ImagenetTarSource(tmp_path / VAL, SIZE)
    os.truncate(tmp_path / VAL, 1000)
    with pytest.raises(OSError, match="ends within it") as raised:
        source[11]
    assert raised.value.errno
    shutil.copy(archives / VAL, tmp_path)
    assert source[11]["image"].shape == (SIZE, SIZE, 3)  # the file is opened again


def test_an_image_of_absurd_size_is_not_read(archives):
    source = ImagenetTarSource(archives / VAL, SIZE)
    source._sizes[3] = 3 * 2**30
    with pytest.raises(ValueError, match="the file has 3.0 GiB; allowed: 1"):
        source[3]


def test_a_file_is_open_until_it_is_read(archives):
    """Threads that open it at the same time replace each other's file; a file in use stays open."""

    class Starts(list):
        def __getitem__(self, i):  # between opening and reading
            source._file = None
            return super().__getitem__(i)

    source = ImagenetTarSource(archives / VAL, SIZE)
    before, source._starts = source[0]["image"], Starts(source._starts.tolist())
    np.testing.assert_array_equal(source[0]["image"], before)


def test_without_tfds(archives, monkeypatch):
    monkeypatch.setattr(imagenet_tar.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        ImagenetTarSource(archives / VAL, SIZE)


def linked(archive):
    link = tarfile.TarInfo("ILSVRC2012_val_00000002.JPEG")
    link.type, link.linkname = tarfile.LNKTYPE, "ILSVRC2012_val_00000001.JPEG"
    archive.addfile(link)


def without(wnid):
    return training(lambda archives: archives.pop(wnid))


def with_class(wnid, content):
    return training(lambda archives: archives.update({wnid: content(archives[WNIDS[2]])}))


FIRST, OTHER = WNIDS[0], encoded(picture(0))
ONE, ONE_END = tar({"ILSVRC2012_val_00000001.JPEG": OTHER}), 512 * (1 + -(-len(OTHER) // 512))
WRONG = {
    "empty": (lambda: b"", "is truncated: it ends after 0 bytes, without a mark of its end; is it whole"),
    "no images": (lambda: tar({}), "holds nothing; allowed are the challenge's archives"),
    "other images": (lambda: tar({"a.png": OTHER}), "holds a.png; allowed are .*read from a folder"),
    "test images": (lambda: tar({"ILSVRC2012_test_00000001.JPEG": OTHER}), "holds ILSVRC2012_test_00000001.JPEG; allowed are"),
    "no tar": (lambda: OTHER * 10, "is no tar archive, or damaged at byte 0 "),
    "compressed": (lambda: gzip.compress(tar(validation()), 0), "is no tar archive.*if it is compressed, unpack it once"),
    "cut": (lambda: tar(validation())[:3000], "is truncated: it ends after 3000 bytes, within ILSVRC2012_val_0000000"),
    "cut at a header": (lambda: ONE[:ONE_END], f"is truncated: it ends after {ONE_END} bytes, without a mark"),
    "damaged": (lambda: ONE[:ONE_END] + b"x" * 2048, f"is no tar archive, or damaged at byte {ONE_END} .invalid header.$"),
    "damaged a little": (lambda: ONE.replace(b"0001.JPEG", b"0002.JPEG"), "damaged at byte 0 .bad checksum."),
    "link": (lambda: tar(validation(range(1, 2)), linked), "holds ILSVRC2012_val_00000002.JPEG, which is a link"),
    "number": (lambda: tar(validation([1, 50_001])), "holds validation image 50001; they have the numbers 1..50000"),
    "validation and others": (lambda: tar(validation() | {"b.JPEG": OTHER}), "holds b.JPEG, which the challenge's archive"),
    "twice": (lambda: tar(validation(), lambda archive: archive.addfile(tarfile.TarInfo("ILSVRC2012_val_00000003.JPEG"))),
              "holds 1 names more than once, first ILSVRC2012_val_00000003.JPEG"),
    "class missing": (lambda: without(WNIDS[5]), f"lacks 1 of the 1000 classes, first {WNIDS[5]}.tar; is it whole"),
    "class unknown": (lambda: with_class("n99999999", lambda x: x), "holds 1 classes that are not .*first n99999999"),
    "class no tar": (lambda: with_class(FIRST, lambda _: OTHER * 10), rf"{FIRST}\.tar is no tar archive, or damaged at byte 0"),
    "class cut": (lambda: with_class(FIRST, lambda x: x[:1024]), rf"{FIRST}\.tar is truncated: it ends after 1024"),
    "class empty": (lambda: with_class(FIRST, lambda _: tar({})), rf"{FIRST}\.tar holds no images"),
    "of another class": (lambda: with_class(FIRST, lambda x: x), rf"{FIRST}\.tar holds {WNIDS[2]}_9.JPEG, which"),
    "training and others": (lambda: with_class("meta", lambda x: x), "holds meta.tar, which the challenge's archive has not"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_archives(tmp_path, case):
    make, message = WRONG[case]
    (tmp_path / "given.tar").write_bytes(make())
    with pytest.raises(ValueError, match=message) as raised:
        ImagenetTarSource(tmp_path / "given.tar", SIZE)
    assert "\n" not in str(raised.value) and str(tmp_path / "given.tar") in str(raised.value)


@pytest.mark.parametrize("path", ["absent.tar", "."])
def test_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"path is '{path}', which is no file; give ILSVRC2012_img_train.tar or"):
        ImagenetTarSource(path, SIZE)
    with pytest.raises(ValueError, match="image_size is 0"):
        ImagenetTarSource(path, 0)
