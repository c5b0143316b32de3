"""Settings and tables of comparisons beyond the paper."""

import jax
import pytest

from launch.miniature import beyond, experiments, table_figures, tables
from launch.miniature.scales import SCALES
from repae_jax.job import build


def test_names_are_new_and_tables_consistent():
    for table in beyond.TABLES.values():
        assert set(table.rows) <= set(experiments.SETTINGS) and set(table.measures) <= set(tables.MEASURES) and table.expected
        for claim in table.claims:
            assert {claim.first, claim.second} <= set(table.rows) and claim.measure in table.measures
        assert not table.curve or table.curve in table_figures.CURVE_TITLES
    assert not tables.SETTINGS.keys() & beyond.SETTINGS.keys() and not tables.TABLES.keys() & beyond.TABLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("setting", beyond.SETTINGS)
def test_configs_build(setting):
    for scale in SCALES.values():
        run = experiments.Run(setting)
        config = experiments.config_of(scale, run)
        assert config.steps == experiments.evaluated_steps(scale, experiments.SETTINGS[run.trained.setting])[-1]
        evaluated = experiments.evaluated_steps(scale, beyond.SETTINGS[setting])
        assert not any(step % config.checkpoint.every for step in evaluated)
    job = build.build(experiments.config_of(SCALES["digits"], experiments.Run(setting)), jax.devices()[:1])
    every = job.vae_every
    assert [share for _, share in job.variants] == ([1 / every, 1 - 1 / every] if every > 1 else [1.0])


def test_fields_that_configs_have_gained_leave_runs_where_they_are():
    """A run's description has a new field only where its value is another one than before."""
    scale = SCALES["digits"]
    described = {name: experiments.description(scale, experiments.Run(name))["config"] for name in ("repa-e", "vae-every-2")}
    assert "vae_every" not in described["repa-e"] and described["vae-every-2"]["vae_every"] == 2
