"""A run with Muon, warmup-stable-decay and several averages, on eight devices: it continues bit for bit, and is sampled."""

import jax
import numpy as np
import pytest
import small

from checkpoints_tools.convert import convert
from configs import ldm
from repae_jax import train
from repae_jax.sampling.load_model import load_model

pytestmark = pytest.mark.slow
CHANGES = {
    **small.SIT_ALONE, "checkpoint.every": 1, "checkpoint.keep_last": 4, "hooks.samples_every": 0, "mesh.fsdp": 2,
    "optim.sit.method": "muon", "optim.sit.schedule": "1-sqrt", "optim.sit.decay_start": 2, "optim.sit.decay_steps": 4,
    "ema_decays": (0.5,), "ema_sigmas": (0.05, 0.1),
}  # fmt: skip


def config(steps):
    return small.config({**CHANGES, "steps": steps}, ldm)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, state) of three steps, the last of which was made by another start."""
    workdir = tmp_path_factory.mktemp("muon") / "run"
    train.train(config(2), workdir)
    state, finished = train.train(config(3), workdir)
    assert finished
    return workdir, jax.device_get(state)


def test_it_continues_bit_for_bit(run, tmp_path):
    state, _ = train.train(config(3), tmp_path / "run")
    assert small.differing(state, run[1]) == []
    trace = [leaf for name, leaf in small.leaves(run[1].sit.opt_state).items() if ".trace.early_blocks." in name]
    assert len(trace) == 7 and all(leaf.any() for leaf in trace)


def test_its_averages_can_be_sampled(run):
    workdir, state = run
    kept = load_model(workdir, ema="0.5")
    assert small.differing(kept.params["sit"], state.averages["decay_0_5"].params) == []
    between = load_model(workdir, ema="sigma=0.08").params["sit"]
    assert small.differing(between, state.averages["sigma_0_1"].params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(between))


def test_its_optimizer_has_no_published_layout(run, tmp_path):
    with pytest.raises(ValueError, match="no place for the state of config.optim.sit.method='muon': add --weights_only"):
        convert(run[0], tmp_path / "out")
    assert convert(run[0], tmp_path / "out", optimizers=False, ema="0.5")
