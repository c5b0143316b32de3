"""Folders of images: classes and labels files, and what is refused."""

import json
import pickle

import numpy as np
import pytest
import small
from PIL import Image, features

from repae_jax import data
from repae_jax.data.folder import FolderSource
from repae_jax.job import training_data


def write_image(path, value=0, size=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def class_folders(tmp_path):
    for i, name in enumerate(["b/2.png", "b/deep/1.JPG", "a/1.webp", "c/x.bmp", "a/0.jpeg"]):
        write_image(tmp_path / name, value=40 * i)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not an image either")
    return tmp_path


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_class_subfolders_become_labels(class_folders):
    source = FolderSource(class_folders, 8)
    assert names(source) == ["a/0.jpeg", "a/1.webp", "b/2.png", "b/deep/1.JPG", "c/x.bmp"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2] and source.labels.dtype == np.int32
    assert source.num_classes == 3 and source.image_size == 8 and len(source) == 5


@pytest.mark.parametrize(
    ("folders", "warning"),
    [
        (["0", "1", "2", "10"], "are numbers, and labeled in the order of their names: 10 is class 2. If the numbers"),
        (["00", "01", "02", "10"], None),
        (["0", "1", "2", "3"], None),
        (["n1", "n10", "n2", "n3"], None),
    ],
)
def test_numbered_classes(tmp_path, warnings, folders, warning):
    """Names are sorted as texts, by which 10 comes before 2."""
    for name in folders:
        write_image(tmp_path / name / "a.png")
    FolderSource(tmp_path, 8)
    assert len(warnings) == bool(warning) and all(warning in line for line in warnings)


@pytest.mark.parametrize(
    "file", ["configs/repae.py", "configs/repae.py:tiny", "configs/ldm.py", "configs/vae.py", "configs/paper.py:repae-l"]
)
def test_training_takes_it_from_flags(class_folders, file):
    flags = {"source": "folder", "options.path": class_folders, "image_size": 8, "num_classes": 3}
    given = [f"--config.data.{name}={value}" for name, value in flags.items()]
    assert training_data.make_images(small.from_flags(*given, file=file)).labels.tolist() == [0, 0, 1, 1, 2]
    (class_folders / "labels.csv").write_text("a/0.jpeg,1\n")
    labels_file = "--config.data.options.labels_file=labels.csv"
    assert training_data.make_images(small.from_flags(*given, labels_file, file=file)).labels.tolist() == [1]
    unlabeled = "--config.data.options.labelled=false"
    assert training_data.make_images(small.from_flags(*given, unlabeled, file=file)).labels.tolist() == [0] * 5


def test_no_path_at_all():
    with pytest.raises(
        ValueError, match="'folder' needs the argument path: set config.data.options.path, or .* folder:path=VALUE"
    ):
        training_data.make_images(small.from_flags())


def test_the_config_names_the_arguments_of_all_sources():
    options = small.from_flags().data.options
    assert set(options) == set(data.option_types()) and set(options.values()) == {None}


def test_records_are_cropped_rgb(class_folders):
    record = FolderSource(class_folders, 8)[4]
    assert record["image"].shape == (8, 8, 3) and record["image"].dtype == np.uint8
    assert (record["image"] == 120).all()
    assert record["label"] == 2 and record["label"].dtype == np.int32


def test_other_modes_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "LA"):
        (tmp_path / mode).mkdir()
        Image.new(mode, (9, 9)).save(tmp_path / mode / "a.png")
    source = FolderSource(tmp_path, 8)
    assert {source[i]["image"].shape for i in range(4)} == {(8, 8, 3)}


@pytest.mark.parametrize("header", ["", "path,label\n"])
@pytest.mark.parametrize("kind", ["json", "csv", "tsv"])
def test_labels_file(class_folders, kind, header):
    entries = [["c/x.bmp", 7], ["b/2.png", 0], ["b/deep/1.JPG", 3]]
    file = class_folders / f"labels.{kind}"
    if kind == "json":
        file.write_text(json.dumps({"labels": entries}))
    else:
        table = header + "".join(f"{path},{label}\n" for path, label in entries)
        file.write_text(table.replace(",", "\t") if kind == "tsv" else table)
    for labels_file in (file.name, file):
        source = FolderSource(class_folders, 8, labels_file=labels_file)
        assert names(source) == ["b/2.png", "b/deep/1.JPG", "c/x.bmp"]
        assert source.labels.tolist() == [0, 3, 7] and source.num_classes == 8


def test_labels_file_makes_a_flat_folder_readable(tmp_path):
    write_image(tmp_path / "a, b.png")
    (tmp_path / "labels.csv").write_text('"a, b.png",1\n\n')
    assert names(FolderSource(tmp_path, 8, "labels.csv")) == ["a, b.png"]


def test_survives_pickling(class_folders):
    source = FolderSource(class_folders, 8)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[2]["image"], source[2]["image"])


@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_undecodable_files_raise_when_read(tmp_path, content):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.png"
    Image.fromarray(noise).save(file)
    file.write_bytes({"truncated": file.read_bytes()[:900], "text": b"hello", "empty": b""}[content])
    source = FolderSource(tmp_path, 8)
    with pytest.raises(OSError):
        source[0]


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        FolderSource(tmp_path / "nowhere", 8)


def test_empty_folder_names_the_extensions(tmp_path):
    with pytest.raises(ValueError, match=r"no images below .*\.png \.jpg .*\.webp"):
        FolderSource(tmp_path, 8)


def test_flat_folder_needs_labels(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images but no class subfolders; allowed: one subfolder per class, or"):
        FolderSource(tmp_path, 8)


def test_images_beside_class_subfolders(class_folders):
    write_image(class_folders / "stray.png")
    with pytest.raises(ValueError, match=r"outside the class subfolders .* stray.png \(1 in all\)"):
        FolderSource(class_folders, 8)


def test_empty_class(class_folders):
    (class_folders / "bb").mkdir()
    with pytest.raises(ValueError, match=r"without images .* bb \(1 in all\)"):
        FolderSource(class_folders, 8)


def test_bad_size(class_folders):
    with pytest.raises(ValueError, match="image_size is 0"):
        FolderSource(class_folders, 0)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.json", "{", "not valid JSON"),
        ("l.json", '{"labels": null}', 'no list "labels"'),
        ("l.json", "[]", 'no list "labels"'),
        ("l.json", '{"labels": []}', "lists no images"),
        ("l.json", '{"labels": [["a/0.jpeg", 1.5]]}', r"entry \['a/0.jpeg', 1.5\]"),
        ("l.json", '{"labels": [["a/0.jpeg", true]]}', "entry"),
        ("l.json", '{"labels": [["a/0.jpeg", -1]]}', "labels out of range: a/0.jpeg: -1"),
        ("l.json", '{"labels": [["a/0.jpeg", 1], ["a/0.jpeg", 2]]}', r"more than once: a/0.jpeg \(1 in all\)"),
        ("l.csv", "a/0.jpeg,1\na/1.webp\n", r"\['a/1.webp'\] in row 2"),
        ("l.csv", "a/0.jpeg,cat\n", "in row 1; allowed: two columns"),
        ("l.csv", "".join(f"gone{i}.png,0\n" for i in range(7)), r"gone0.png, .*gone4.png, \.\.\. \(7 in all\)"),
        ("l.txt", "a/0.jpeg 1", "allowed: a file ending in .json, .csv or .tsv"),
    ],
)
def test_labels_file_errors(class_folders, name, content, message):
    (class_folders / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        FolderSource(class_folders, 8, name)


def test_missing_labels_file(class_folders):
    with pytest.raises(ValueError, match="does not exist"):
        FolderSource(class_folders, 8, "labels.json")


def test_without_labels_images_lie_anywhere(class_folders):
    write_image(class_folders / "top.png")
    with pytest.raises(ValueError, match="top.png"):
        FolderSource(class_folders, 8)
    source = FolderSource(class_folders, 8, labelled=False)
    assert len(source) == 6 and set(source.labels) == {0} and source.num_classes == 1


def test_sources_as_commands_take_them(class_folders):
    assert data.parse_source("digits:split=test") == ("digits", {"split": "test"})
    assert data.parse_source("digits") == ("digits", {})
    for text in (str(class_folders), f"folder:path={class_folders}"):
        name, fields = data.parse_source(text)
        assert len(data.make_source(name, 8, **fields)) == 5 and fields == {"path": str(class_folders)}
        name, fields = data.parse_source(text, labelled=False)
        assert name == "folder" and fields == {"path": str(class_folders), "labelled": False}
    assert data.parse_source("folder:path=x,labelled=False") == ("folder", {"path": "x", "labelled": False})
    assert data.parse_source("folder:path=x,labelled=True", labelled=False) == ("folder", {"path": "x", "labelled": True})
    with pytest.raises(ValueError, match="labelled is 'no'; allowed: True or False"):
        data.parse_source("folder:path=x,labelled=no")
    labelled = data.parse_source("folder:path=x,labels_file=y.csv", labelled=False)
    assert labelled == ("folder", {"path": "x", "labels_file": "y.csv"})
    for text in ("imagenette", "digits:split", str(class_folders / "absent")):
        with pytest.raises(ValueError, match=text):
            data.parse_source(text)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json"])
def test_labels_file_with_a_byte_order_mark(class_folders, kind):
    content = {"csv": "path,label\na/0.jpeg,7\n", "tsv": "a/0.jpeg\t7\r\n", "json": '{"labels": [["a/0.jpeg", 7]]}'}[kind]
    (class_folders / f"l.{kind}").write_bytes(content.encode("utf-8-sig"))
    assert FolderSource(class_folders, 8, labels_file=f"l.{kind}").labels.tolist() == [7]
    for encoding, named in {"utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-32": "UTF-32"}.items():
        (class_folders / f"l.{kind}").write_bytes(content.encode(encoding))
        with pytest.raises(ValueError, match=rf"labels file .*l.{kind}' is in .*{named}.*; save it as UTF-8"):
            FolderSource(class_folders, 8, labels_file=f"l.{kind}")


@pytest.mark.parametrize("label", [2**31, 2**40, 10**30])
def test_labels_beyond_32_bits(class_folders, label):
    (class_folders / "l.json").write_text(json.dumps({"labels": [["a/0.jpeg", label]]}))
    with pytest.raises(ValueError, match=f"labels out of range: a/0.jpeg: {label} .*allowed: 0..2147483647"):
        FolderSource(class_folders, 8, labels_file="l.json")


KINDS_AS_SAVED = {"tif": "TIFF", "TIFF": "TIFF", "jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "gif": "GIF", "ppm": "PPM"}


@pytest.mark.parametrize("ending", KINDS_AS_SAVED)
def test_other_kinds_of_images(tmp_path, ending):
    (tmp_path / "a").mkdir()
    if not features.check("avif") and ending == "avif":
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (20, 14), (90, 90, 90)).save(tmp_path / f"a/0.{ending}", KINDS_AS_SAVED[ending])
    source = FolderSource(tmp_path, 8)
    assert names(source) == [f"a/0.{ending}"] and abs(int(source[0]["image"].mean()) - 90) < 3


def test_a_folder_at_home(class_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(class_folders))
    (class_folders / "l.csv").write_text("a/0.jpeg,3\n")
    source = data.make_source("folder", 8, path="~", labels_file="~/l.csv")
    assert source.labels.tolist() == [3]
    assert data.parse_source("~/a") == ("folder", {"path": "~/a"})
    assert len(data.make_source("folder", 8, path="~/a", labelled=False)) == 2
