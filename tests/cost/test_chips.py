"""Chips: their peaks against published ones, and that XLA compiles for every card."""

import jax
import jax.numpy as jnp
import pytest
from gpu_programs import needs_cuda_plugin

from repae_jax.cost.chips import CHIPS, GPUS, TPUS
from repae_jax.cost.topologies import topology_devices


@pytest.mark.parametrize(
    ("name", "published"),
    [("h100", 67), ("h200", 67), ("h100-pcie", 51), ("a100-40g", 19.5), ("a100-80g", 19.5), ("l40s", 91.6), ("rtx4090", 82.6),
     ("a6000", 38.7), ("rtx6000-ada", 91.1)],
)  # fmt: skip
def test_cores_and_clocks_give_the_published_float32_peaks(name, published):
    assert GPUS[name].peak("exact") == pytest.approx(published * 1e12, rel=0.01)


@pytest.mark.parametrize(
    ("name", "per_clock", "clock"), [("h100", 512, 1.8295201e9), ("h200", 512, 1.8295201e9), ("b200", 1024, 1.8353101e9)]
)
def test_matrix_units_give_the_bfloat16_peaks(name, per_clock, clock):
    """A core has four units; numbers are those of openxla/xla's target configs."""
    assert GPUS[name].peak() == pytest.approx(2 * GPUS[name].cores * 4 * per_clock * clock, rel=0.02)


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_all_speeds(name):
    chip = CHIPS[name]
    assert chip.peak() >= chip.peak("float32") >= chip.peak("high") > chip.peak("exact") > 0
    passes = {"float32": 1, "high": 3, "exact": 6} if name in TPUS else {"float32": 2, "high": 2}
    assert all(chip.peak(precision) == chip.peak() / each for precision, each in passes.items())
    assert chip.memory > 2**33 and chip.network < chip.link < chip.bandwidth < 1e13


@pytest.mark.integration
@needs_cuda_plugin
@pytest.mark.parametrize("name", GPUS)
def test_xla_compiles_for_every_card(name):
    [device] = topology_devices(f"{name}:1")
    assert device.device_kind == GPUS[name].kind
    array = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    text = jax.jit(lambda x: jnp.tanh(x @ x)).lower(array).compile(dict(GPUS[name].compiler_options)).as_text()
    assert "__cublas" in text and "__triton_gemm" not in text
