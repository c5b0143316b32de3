"""Checking images before training: what is found in a folder, what is said of it, and that training then works."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
import small
from pictures import picture
from PIL import Image, ImageDraw

from configs import ldm
from repae_jax import check_images
from repae_jax.data import decoding, inspection
from repae_jax.data.folder import FolderSource
from repae_jax.images import center_crop
from repae_jax.job import training_data

SIZE = 16


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def many(root, classes=("cats", "dogs"), count=25, first_seed=0):
    """A folder in order: pictures of 30 x 20 pixels."""
    for label, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i:02d}.png", picture(first_seed + 100 * label + i))
    return root


def check(root, *more, text=None):
    """(inspection, findings by title or first words, flags) of the command."""
    out = root.parent / f"{root.name}-sheet.png"
    for file in (out, out.with_suffix(".json")):
        file.unlink(missing_ok=True)
    given = [text or str(root), "--image_size", str(SIZE), "--out", str(out), *map(str, more)]
    found, findings, flags = check_images.run(check_images.parse_args(given))
    return found, findings, flags


def texts(findings):
    return [finding.text for finding in findings]


# ---- what is found --------------------------------------------------------------------------------------------------


def test_pictures_that_training_sees_on_their_side(tmp_path):
    """Long is what is long beside the size of training; the pictures are 30 pixels wide and 20 high."""
    root = many(tmp_path / "pictures")
    assert texts(check(root, "--image_size=16,24")[1]) == []
    assert len(texts(check(root, "--image_size=20,12")[1])) == 1
    _, findings, flags = check(root, "--image_size=32,16")
    assert [finding.title for finding in findings] == ["Enlarged", "Long and narrow"]
    assert "50 images are smaller than 32 x 16 pixels (the smallest 30 x 20)" in findings[0].text
    assert "50 images are more than 2 times as long or as wide as 32 x 16 pixels" in findings[1].text
    assert "--config.data.image_size=32,16" in flags
    assert training_data.make_images(small.from_flags(*flags.split()))[0]["image"].shape == (32, 16, 3)


def test_a_folder_in_order(tmp_path, capsys, monkeypatch):
    root = many(tmp_path / "pictures")
    found, findings, flags = check(root)
    assert findings == []
    assert check_images.summary(found).splitlines()[0].startswith("50 images in 2 classes, 0.")
    lines = check_images.summary(found).splitlines()
    assert lines[1:] == [
        "kinds: PNG 50", "pixels: RGB 50", "shorter side: 20 to 20 pixels, median 20", "images by class: cats 25, dogs 25"
    ]  # fmt: skip
    config = small.from_flags(*flags.split())
    source = training_data.make_images(config)
    assert len(source) == 50 and source.image_size == SIZE and config.data.num_classes == 2
    assert np.asarray(Image.open(tmp_path / "pictures-sheet.png")).std() > 10
    kept = json.loads((tmp_path / "pictures-sheet.json").read_text())
    assert kept["images"] == 50 and kept["findings"] == []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_images", str(root), "--image_size", "16"])
    check_images.main()
    assert f"training would work, with --config.data.source=folder --config.data.options.path={root}" in capsys.readouterr().out
    assert (tmp_path / "check-pictures.png").exists() and (tmp_path / "check-pictures.json").exists()


def test_images_that_cannot_be_decoded(tmp_path, capsys, monkeypatch):
    root = many(tmp_path / "pictures")
    (root / "cats" / "03.png").write_bytes((root / "cats" / "03.png").read_bytes()[:100])
    (root / "dogs" / "04.png").write_bytes(b"no picture")
    _, (problem,), _ = check(root)
    assert problem.is_problem and problem.records == [3, 29]
    start = "2 of 50 images cannot be decoded, max_bad_fraction=0.001 allows 0: cats/03.png ("
    assert problem.text.startswith(start) and problem.text.endswith(
        "dogs/04.png (UnidentifiedImageError: cannot identify image file); repair or remove them"
    )
    _, (warning,), _ = check(root, "--max_bad_fraction", "0.04")
    assert not warning.is_problem and "allows 2" in warning.text
    monkeypatch.setattr(sys, "argv", ["check_images", str(root), "--image_size", "16", "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as caught:
        check_images.main()
    assert caught.value.code == "training would not work: see the problems above"
    assert f"problem: {problem.text}" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["findings"][0]["images"] == ["cats/03.png", "dogs/04.png"]


def test_the_loader_allows_as_many_bad_images_as_the_check_says(tmp_path):
    from repae_jax.data.loader import Loader

    root = many(tmp_path / "pictures")
    for i in (3, 4):
        (root / "cats" / f"{i:02d}.png").write_bytes(b"no picture")
    for fraction, works in ((0.04, True), (0.039, False)):
        _, (finding,), _ = check(root, "--max_bad_fraction", fraction)
        assert finding.is_problem != works
        with Loader(FolderSource(root, SIZE), batch_size=50, seed=0, max_bad_fraction=fraction) as batches:
            if works:
                assert next(batches)["image"].shape == (50, SIZE, SIZE, 3)
            else:
                with pytest.raises(RuntimeError, match="undecodable|cannot be decoded"):
                    next(batches)


def test_pictures_that_come_twice(tmp_path):
    root = many(tmp_path / "pictures")
    twin = picture(0)
    save(root / "cats" / "copy.bmp", twin)  # other bytes, the same pixels
    save(root / "dogs" / "copy.png", twin)
    photo = picture(500, size=(200, 160), noise=2)
    save(root / "dogs" / "photo.png", photo)
    save(root / "dogs" / "photo-again.jpg", photo, quality=70)
    _, findings, _ = check(root)
    equal, torn, alike = findings
    assert equal.text == "2 images repeat others, pixel by pixel: cats/00.png, cats/copy.bmp, dogs/copy.png; keep one of each"
    assert torn.text.startswith("1 pictures are in several classes: cats/00.png, cats/copy.bmp, dogs/copy.png")
    assert alike.text == "2 images look nearly the same as others: dogs/photo-again.jpg, dogs/photo.png"
    assert not any(finding.is_problem for finding in findings)


def test_shapes_and_content(tmp_path):
    root = many(tmp_path / "pictures")
    save(root / "cats" / "tiny.png", picture(50, size=(12, 10)))
    save(root / "cats" / "narrow.png", picture(51, size=(90, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(root / "cats" / "turned.jpg", picture(52), exif=exif)
    save(root / "dogs" / "white.png", np.full((20, 20, 3), 255, np.uint8))
    for name, alpha in (("alpha", 128), ("opaque", 255)):
        save(root / "dogs" / f"{name}.png", np.dstack([picture(53 + alpha), np.full((20, 30), alpha, np.uint8)]))
    _, findings, _ = check(root)
    titles = [finding.title for finding in findings]
    assert titles == ["Enlarged", "Long and narrow", "Lying or upside down", "Blank", "Transparent"]
    small_text, narrow, turned, blank, alpha = texts(findings)
    assert small_text.startswith("1 images are smaller than 16 pixels (the smallest 12 x 10), and enlarged")
    assert "cats/tiny.png" in small_text
    assert narrow.endswith("training sees their middle alone: cats/narrow.png")
    assert "turned by their EXIF data, which training does not heed: cats/turned.jpg" in turned
    assert blank == "1 images show one color, or hardly more: dogs/white.png"
    assert alpha.startswith("1 images have transparent parts") and "dogs/alpha.png" in alpha


def test_training_does_not_turn_pictures(tmp_path):
    """The reason for the warning: the pixels are those that the file holds."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = 200
    save(tmp_path / "a" / "a.png", pixels, exif=exif)
    source = FolderSource(tmp_path, 20)
    assert inspection.look(source, 0).is_turned
    np.testing.assert_array_equal(source[0]["image"], pixels)


def test_class_balance(tmp_path):
    root = many(tmp_path / "pictures", classes=("cats",), count=45)
    many(root, classes=("dogs",), count=4, first_seed=500)
    found, findings, _ = check(root)
    assert texts(findings) == [
        "the classes are of very different sizes: cats 45 and dogs 4 images; small ones are learned late",
        "1 classes have fewer than 20 images (dogs 4), which samples may repeat",
    ]
    assert list(found.class_counts().items()) == [(0, 45), (1, 4)]


def test_labels_without_images(tmp_path):
    root = many(tmp_path / "pictures", classes=("all",))
    entries = [[f"all/{i:02d}.png", 3 * (i % 2)] for i in range(25)]
    (root / "labels.json").write_text(json.dumps({"labels": entries}))
    found, findings, flags = check(root, text=f"folder:path={root},labels_file=labels.json")
    assert texts(findings)[0] == "2 labels have no images: 1, 2, …"
    assert "images by class: class 0 13, class 3 12" in check_images.summary(found)
    assert "--config.data.options.labels_file=labels.json" in flags and "num_classes=4" in flags


# ---- folders without classes ----------------------------------------------------------------------------------------


def test_a_folder_without_classes_says_how_to_train(tmp_path):
    root = many(tmp_path / "pictures", classes=(".",))
    _, (problem,), flags = check(root)
    assert problem.is_problem and "holds 25 images but no class subfolders" in problem.text
    assert "or train without classes, with labelled=False" in problem.text
    assert "--config.data.options.labelled=False" in flags and "--config.data.num_classes=1" in flags
    _, findings, same = check(root, text=f"folder:path={root},labelled=False")
    assert findings == [] and same == flags


@pytest.mark.slow
def test_unlabelled_pictures_train_and_sample(tmp_path):
    """One class: a step of training with the flags that the check prints, and guided samples from the checkpoint."""
    from repae_jax import api
    from repae_jax.train import train

    root = many(tmp_path / "pictures", classes=(".",))
    _, findings, flags = check(root, text=f"folder:path={root},labelled=False")
    assert findings == []
    config = small.config({**small.SIT_ALONE, "steps": 1, "hooks.samples_every": 1, "checkpoint.every": 1}, ldm)
    given = small.from_flags(*flags.split(), file="configs/ldm.py").data
    config.data.update(source=given.source, num_classes=given.num_classes)
    config.data.options = given.options
    state, finished = train(config, tmp_path / "run")
    assert finished and int(state.step) == 1 and (tmp_path / "run" / "samples" / "0000001.png").exists()
    model = api.load_model(tmp_path / "run")
    plain, guided = (model.sample([0, 0], seed=0, steps=2, guidance_scale=scale) for scale in (1.0, 3.0))
    assert plain.shape == (2, 8, 8, 3) and plain.dtype == np.uint8


# ---- single looks ---------------------------------------------------------------------------------------------------


def test_a_look_sees_what_training_sees(tmp_path):
    save(tmp_path / "a" / "a.png", picture(3))
    source = FolderSource(tmp_path, SIZE)
    seen = inspection.look(source, 0)
    assert (seen.kind, seen.mode, seen.width, seen.height, seen.error) == ("PNG", "RGB", 30, 20, "")
    assert seen.size == len(source.content(0))
    square = center_crop(decoding.open_image(source.content(0)), SIZE)
    np.testing.assert_array_equal(square, source[0]["image"])
    save(tmp_path / "a" / "b.png", square)
    other = inspection.look(FolderSource(tmp_path, SIZE), 1)
    assert other.pixels == seen.pixels and other.outline == seen.outline


def test_the_outline_is_the_difference_hash():
    """By hand: a ramp to the right is brighter than its left neighbor everywhere, one to the left nowhere."""
    ramp = Image.fromarray(np.tile(np.arange(0, 180, 20, np.uint8), (8, 1)))
    assert inspection.outline(ramp) == 2**64 - 1
    assert inspection.outline(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    one = Image.fromarray(np.zeros((8, 9), np.uint8))
    ImageDraw.Draw(one).point((8, 7), 255)  # the last position alone
    assert inspection.outline(one) == 1


def test_pictures_that_look_nearly_the_same():
    """By hand: 0 and 7 differ in three bits, 7 and 15 in one, 0 and 15 in four; the highest bit counts like the others."""
    assert inspection.near([0, 15, 7, 2**63], "abcd") == [0, 2, 3, 1]
    assert inspection.near([0, 15, 2**64 - 1], "abc") == []
    assert inspection.near([9, 1, 9, 9], "abaa") == [0, 1, 2, 3]
    assert inspection.near([9, 9, 2**64 - 1], "aab") == [], "equal ones are told elsewhere"
    assert inspection.near([5], "a") == [] == inspection.near([], "")


def test_many_pictures_that_look_nearly_the_same_take_little_memory():
    """Of n such pictures there are n²/2 pairs: of 3,000 as tuples 0.4 GB, of 20,000 more than most machines have."""
    outlines = [0, 1, 3, 2] * 750
    tracemalloc.start()
    assert inspection.near(outlines, [str(i) for i in range(len(outlines))]) == list(range(len(outlines)))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_not_too_many_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_COMPARED", 49)
    _, (finding,), _ = check(many(tmp_path / "pictures"))
    assert finding.text == "images that look nearly the same are not sought among more than 49" and not finding.is_problem


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nothing"], "'nothing' is no folder, and no source"),
        (["digits:split=test"], "the source 'digits' has no image files that could be wrong"),
        (["FOLDER", "--out", "sheet.jpg"], "--out=sheet.jpg: the contact sheet is a file ending in .png"),
        (["FOLDER", "--out", "no/sheet.png"], "--out=no/sheet.png: there is no folder no; make it first"),
        (["FOLDER", "--out", "mine.png"], "--out=mine.png exists: choose another name"),
        (["FOLDER", "--out", "names.png"], "--out=names.json exists: choose another name"),
        (["folder:path=heic,labeled=False"], "source 'folder' has no argument labeled; allowed: path, labels_file, labelled$"),
        (["EMPTY"], "no images below"),
        (["HEIC"], "images of kinds that are not read"),
    ],
)
def test_mistakes(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "names.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    many(tmp_path / "heic", count=1)
    (tmp_path / "heic" / "cats" / "phone.heic").write_text("x")
    places = {"FOLDER": str(tmp_path), "EMPTY": str(tmp_path / "empty"), "HEIC": str(tmp_path / "heic")}
    with pytest.raises(ValueError, match=message):
        check_images.run(check_images.parse_args([places.get(word, word) for word in given]))
    assert (tmp_path / "mine.png").read_text() == (tmp_path / "names.json").read_text() == "mine"


def test_the_sheet_does_not_become_one_of_the_pictures(tmp_path, monkeypatch):
    root = many(tmp_path / "pictures", count=1)
    for place in (root, root / "cats"):
        monkeypatch.chdir(place)
        with pytest.raises(ValueError, match="the contact sheet would be among the pictures of .*pictures: give .* --out"):
            check_images.run(check_images.parse_args([str(root), "--image_size", str(SIZE)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_images, "draw", lambda *_: None)
    check_images.run(check_images.parse_args(["./pictures/../pictures/", "--image_size", str(SIZE)]))
    assert (tmp_path / "check-pictures.json").exists()
