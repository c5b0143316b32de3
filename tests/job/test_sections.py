"""A config's sections are built from plain values, whatever holds them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated

import pytest
import small

from configs import ldm, repae, vae
from repae_jax import data
from repae_jax.job.build import plain_config
from repae_jax.job.config import JOBS, read_config
from repae_jax.ranges import Positive, Section, construct, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Section):
    size: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Section):
    pair: tuple[Positive, Positive]
    weights: Mapping[str, Annotated[int, whole(0)]]
    inner: Inner
    entries: Mapping[str, Inner]
    flag: bool | None = None
    shift: float = 0.0
    offset: int = 0


GOOD = {"pair": [1, 2], "weights": {"a": 0}, "inner": {"size": 3}, "entries": {"x": {"size": 4}}}


def test_types_are_rules():
    built = construct("config", Outer, GOOD)
    assert built == Outer(pair=(1, 2), weights={"a": 0}, inner=Inner(size=3), entries={"x": Inner(size=4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": (1, 2, 3)}, "config.pair=(1, 2, 3) must have 2 entries"),
        ({"weights": {"a": -1}}, "config.weights.a=-1 must be at least 0"),
        ({"weights": 3}, "config.weights=3 must be a section"),
        ({"inner": {"size": 0}}, "config.inner.size=0 must be at least 1"),
        ({"entries": {"x": {"sise": 1}}}, "config.entries.x: unknown fields ['sise'], missing fields ['size']"),
        ({"shift": float("inf")}, "config.shift=inf must be finite"),
        ({"offset": 1.5}, "config.offset=1.5 must be a whole number"),
        ({"flag": 1}, "config.flag=1 must be True or False, or None"),
    ],
)
def test_the_place_of_a_mistake_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        construct("config", Outer, {**GOOD, **changes})


@pytest.mark.parametrize("file", [repae, ldm, vae])
def test_plain_configs_are_read_again(file):
    plain = plain_config(file.get_config())
    assert plain_config(plain) == plain
    config = read_config(plain)
    assert type(config) is JOBS[config.job].config
    assert set(vars(config.optim)) == set(JOBS[config.job].trains)


def test_options_are_those_of_the_chosen_source():
    """Every option of every source is a flag; those that are not set do not come into the config of a run."""
    config = small.config()
    assert set(config.data.options) == set(data.option_types())
    assert plain_config(config)["data"]["options"] == {}
    config.data.options.split = "test"
    assert plain_config(config)["data"]["options"] == {"split": "test"}
    plain = plain_config(config)
    plain["data"]["options"] = {"labelled": "no"}
    with pytest.raises(ValueError, match="config.data.options.labelled='no' must be True or False"):
        plain_config(plain)
