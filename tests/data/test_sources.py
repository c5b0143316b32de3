"""The table of sources: a new one is a class and an entry, which configs and commands then take by name."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import small
from pictures import encoded, picture

from repae_jax import data
from repae_jax.data import decoding, source
from repae_jax.data.loader import Loader
from repae_jax.data.source import EncodedImages, check_image_size
from repae_jax.job import training_data
from repae_jax.ranges import Extent

README = Path(__file__).parents[2] / "repae_jax/data/README.md"


@dataclasses.dataclass(eq=False)
class StripesSource:
    """Striped squares; record i is of class i % 3."""

    color: str
    image_size: int
    width: int = 1
    inverted: bool = False

    num_classes = 3

    def __post_init__(self):
        check_image_size(self.image_size)
        if self.width < 1:
            raise ValueError(f"width is {self.width}; allowed: 1 and above")
        self.labels = (np.arange(12) % 3).astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        columns = (np.arange(self.image_size) // self.width % 2 == self.inverted) * (self.labels[i] + 1)
        image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        image[:, :, "rgb".index(self.color)] = columns
        return {"image": image, "label": self.labels[i]}

    def name(self, i):
        return f"stripes #{i}"


@pytest.fixture(autouse=True)
def stripes(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "stripes", StripesSource)


@pytest.mark.parametrize(("workers", "start"), [(0, 0), pytest.param(1, 5, marks=pytest.mark.integration)])
def test_a_config_trains_from_a_new_source(workers, start):
    config = small.config(data__source="stripes", data__options={"color": "g", "width": 2, "path": None}, data__num_classes=3)
    images = training_data.make_images(config)
    assert isinstance(images, StripesSource) and (images.width, images.inverted) == (2, False)
    with Loader(images, batch_size=6, seed=0, workers=workers, start_batch=start) as loader:
        batch = next(loader)
    assert batch["image"].shape == (6, 8, 8, 3) and batch["image"].dtype == np.uint8
    expected = np.tile([1, 1, 0, 0, 1, 1, 0, 0], (6, 8, 1)) * (batch["label"] + 1)[:, None, None]
    np.testing.assert_array_equal(batch["image"][..., 1], expected)


def test_a_command_takes_a_new_source():
    name, fields = data.parse_source("stripes:color=r,width=3,inverted=True")
    assert (name, fields) == ("stripes", {"color": "r", "width": 3, "inverted": True})
    assert len(data.make_source(name, 8, **fields)) == 12
    assert data.parse_source("stripes:color=r", labelled=False) == ("stripes", {"color": "r"})


def test_options_are_the_arguments_of_the_constructor():
    options = data.options_of("stripes")
    assert {name: option.annotation for name, option in options.items()} == {"color": str, "width": int, "inverted": bool}
    assert options["width"].default == 1 and options["color"].default is options["color"].empty
    types = data.option_types()
    assert (types["path"], types["labelled"], types["width"], types["data_dir"]) == (str, bool, int, str)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stripes", "'stripes' needs the argument color: set config.data.options.color, or .* stripes:color=VALUE"),
        ("stripes:color=r,height=3,depth=1", "'stripes' has no argument depth, height; allowed: color, width, inverted"),
        ("stripes:color=r,width=0", "width is 0; allowed: 1 and above"),
        ("stripes:color=r,width=a", "width is 'a'; allowed: whole numbers"),
        ("stripes:color=r,inverted=1", "inverted is '1'; allowed: True or False"),
        ("stripes:color=gs://bucket/a", "'stripes' reads from disks, not from gs://bucket/a"),
        ("plaid:color=r", "allowed are .*'array_record', 'stripes', with fields behind"),
    ],
)
def test_mistakes_name_the_option(text, message):
    with pytest.raises(ValueError, match=message):
        name, fields = data.parse_source(text)
        data.make_source(name, 8, **fields)


def test_the_hash_of_records_is_that_of_their_names_and_labels():
    original = data.make_source("stripes", 8, color="r")
    same, other = (data.make_source("stripes", 8, color="r") for _ in range(2))
    other.labels = other.labels[::-1]
    assert data.records_hash(original) == data.records_hash(same) != data.records_hash(other)
    same.records_hash = "of the original"  # as prepared images and caches have it
    assert data.records_hash(same) == "of the original"


@pytest.mark.parametrize("name", [*data.SOURCES])
def test_every_source_is_a_dataclass_of_its_options(name):
    fields = {field.name: field.type for field in dataclasses.fields(data.SOURCES[name])}
    assert fields.pop("image_size") == Extent
    assert fields == {option: parameter.annotation for option, parameter in data.options_of(name).items()}


def test_the_source_of_the_readme(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = vars(source) | vars(decoding) | {"np": np, "Path": Path, "dataclasses": dataclasses}
    exec(code, names)
    monkeypatch.setitem(data.SOURCES, "mine", names["MySource"])
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
    name, fields = data.parse_source(f"mine:path={tmp_path},limit=4")
    mine = data.make_source(name, 8, **fields)
    assert [mine.name(i) for i in range(len(mine))] == [f"{i}.jpg" for i in range(4)]
    with Loader(mine, batch_size=4, seed=0) as loader:
        assert next(loader)["image"].shape == (4, 8, 8, 3)
    with pytest.raises(ValueError, match="limit is -1"):
        data.make_source("mine", 8, path=str(tmp_path), limit=-1)


def test_encoded_images_need_contents_and_names():
    with pytest.raises(TypeError, match="abstract"):
        EncodedImages()
