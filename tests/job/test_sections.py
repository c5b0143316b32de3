"""A config's sections are built from plain values, whatever holds them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated

import pytest
import small

from configs import ldm, repae, vae
from repae_jax import data, ranges
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.diffusion.samplers import Sampling
from repae_jax.job.build import plain_config
from repae_jax.job.config import JOBS, read_config
from repae_jax.job.recipe import make_recipe
from repae_jax.ranges import Positive, Section, construct, later, whole


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
    extra: Inner | None = later(None)
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
        ({"extra": {"size": 0}}, "config.extra.size=0 must be at least 1"),
        ({"extra": 3}, "config.extra=3 must be a section"),
    ],
)
def test_the_place_of_a_mistake_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        construct("config", Outer, {**GOOD, **changes})


def test_optional_sections_are_left_out_where_they_are_absent():
    """So that the config of a run of before they existed is that of now."""
    without, given = construct("config", Outer, GOOD), construct("config", Outer, {**GOOD, "extra": {"size": 5}})
    assert without.extra is None and given.extra == Inner(size=5)
    assert "extra" not in ranges.plain(without) and ranges.plain(without)["flag"] is None
    assert ranges.plain(given)["extra"] == {"size": 5} and construct("config", Outer, ranges.plain(given)) == given
    assert "mean_flow" not in plain_config(ldm.get_config())["diffusion"]


@pytest.mark.parametrize("file", [repae, ldm, vae])
def test_plain_configs_are_read_again(file):
    plain = plain_config(file.get_config())
    assert plain_config(plain) == plain
    config = read_config(plain)
    assert type(config) is JOBS[config.job].config
    assert set(vars(config.optim)) == set(JOBS[config.job].trains)


def test_configs_of_before_a_field_are_read():
    """The objective and the sampler are then what they were."""
    plain = plain_config(repae.get_config())
    later = {"diffusion": ("predicts", "time_mean", "time_std", "time_shift"), "sampling": ("time_shift", "tolerance")}
    old = {**plain, **{name: {k: v for k, v in plain[name].items() if k not in fields} for name, fields in later.items()}}
    assert make_recipe(plain_config(old)).objective == VelocityObjective("linear", "uniform")
    assert read_config(old).sampling == Sampling() and plain_config(old) == plain


def test_fields_that_came_later_are_absent_at_their_defaults():
    """Otherwise a run of before them would belong to another config, and could not be continued."""
    plain = plain_config(small.config())
    assert not {"method", "decay_start"} & set(plain["optim"]["sit"])
    assert read_config(plain) == read_config(small.config())
    changed = plain_config(small.config({"optim.sit.method": "muon"}))
    assert changed["optim"]["sit"].pop("method") == "muon" and changed == plain


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


@pytest.mark.parametrize("file", [repae, ldm])
def test_a_loss_that_came_later_leaves_configs_without_it_as_they_were(file):
    """So runs of before it go on, and have the name that they had."""
    plain = plain_config(file.get_config())
    assert "internal" in file.get_config().loss.sit and "internal" not in plain["loss"]["sit"]
    older = {**plain, "sampling": {name: plain["sampling"][name] for name in ("sampler", "steps", "guidance_scale")}}
    assert plain_config(older) == plain
    weighted = {**plain, "loss": {**plain["loss"], "sit": {**plain["loss"]["sit"], "internal": 0.5}}}
    assert plain_config(weighted)["loss"]["sit"]["internal"] == 0.5
    assert "self" in file.get_config().loss.sit and "self" not in plain["loss"]["sit"]
    assert "self_depth" not in plain["loss"] and "second_time_share" not in plain["diffusion"]
