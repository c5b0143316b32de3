"""Sizes of images and grids: numbers for squares, pairs for others."""

import argparse
import dataclasses

import pytest

from repae_jax import cli, ranges


@pytest.mark.parametrize(
    ("extent", "sides", "form", "words", "option"),
    [
        (256, (256, 256), 256, "256", "256"),
        ((256, 256), (256, 256), 256, "256", "256"),
        ((256, 384), (256, 384), (256, 384), "256 x 384", "256,384"),
        ([384, 256], (384, 256), (384, 256), "384 x 256", "384,256"),  # as JSON gives it back
    ],
)
def test_extents(extent, sides, form, words, option):
    assert ranges.height_width(extent) == sides and ranges.as_extent(extent) == form
    assert (ranges.in_words(extent), ranges.as_option(extent)) == (words, option)
    assert cli.image_size(option) == form


@pytest.mark.parametrize("text", ["", "0", "-8", "8,0", "8,8,8", "8x8", "8,", "1e3", "2097152"])
def test_image_sizes_of_the_command_line(text):
    with pytest.raises(argparse.ArgumentTypeError):
        cli.image_size(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures(ranges.Section):
    size: ranges.ImageSize
    other: ranges.ImageSize | None = None


def test_sections_keep_the_one_form():
    assert Pictures(size=[8, 12], other=(4, 4)) == Pictures(size=(8, 12), other=4)
    assert type(Pictures(size=8).size) is int and Pictures(size=8).other is None


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8,), "size=(8,) must have 2 entries: (height, width)"),
        ((8, 0), "size=(8, 0) has an entry that must lie in [1, 1048576]: (height, width)"),
        ("8x12", "size='8x12' must be a whole number, or a pair (height, width)"),
        (None, "size=None must be a whole number, or a pair (height, width)"),
    ],
)
def test_sections_refuse_other_sizes(size, message):
    with pytest.raises(ranges.FieldError) as caught:
        Pictures(size=size)
    assert str(caught.value) == message
