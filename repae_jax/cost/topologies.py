"""Topologies of TPUs and GPUs to compile for ahead of time, where there are none: sizes, devices."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from repae_jax.cost.chips import CHIPS, GPUS, TPUS, Gpu, Tpu
from repae_jax.distributed import multihost

MOST_CHIPS = 10_000
_CUDNN = "nvidia-cudnn-cu13"
_CUDA = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
# without these, libtpu looks for a TPU of this machine, complains, and lets one process in only
_TPU_VARIABLES = {
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
# without these, the CUDA plugin looks for CUDA's libraries and for GPUs of this machine
_GPU_VARIABLES = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def check_topology(name: str) -> Tpu | Gpu:
    """Returns the chip of a topology such as 'v5e:4x4' or 'h100:2x8'; ValueError for an unknown one, with the allowed ones."""
    chip_name, _, grid = name.partition(":")
    if chip_name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise ValueError(
            f"--topology={name}: expected CHIP:GRID, a TPU ({', '.join(TPUS)}) and its chips per side, such as v5e:4x4, "
            f"v6e:16x16 or v5p:4x4x8, or a GPU ({', '.join(GPUS)}) and HOSTSxGPUS, such as h200:1, h100:8 or a100-40g:2x8"
        )
    chip, sides = CHIPS[chip_name], [int(side) for side in grid.split("x")]
    allowed = _allowed_tpus(chip, chip_name, grid, sides) if isinstance(chip, Tpu) else _allowed_gpus(chip, chip_name, sides)
    if not allowed and math.prod(sides) > MOST_CHIPS:
        allowed = f"{math.prod(sides):,} {chip.noun}s; a plan may have up to {MOST_CHIPS:,}"
    if allowed:
        raise ValueError(f"--topology={name}: {allowed}")
    return chip


def _allowed_tpus(chip, name, grid, sides):
    if chip.sides == 2 and grid not in chip.grids:
        return f"allowed grids of {name} are {', '.join(chip.grids)}"
    if chip.sides == 3 and (len(sides) != 3 or sides[0] % 2 or sides[1] % 2):
        return f"a grid of {name} has three sides, in hosts of 2x2x1 chips: {', '.join(chip.grids)}, …"
    return None


def _allowed_gpus(chip, name, sides):
    if len(sides) > 2 or sides[-1] > chip.per_host:
        most = chip.per_host
        return f"a host has 1 to {most} of {name}: {name}:1 to {name}:{most}; several hosts {name}:2x{most}, {name}:4x{most}, …"
    return None


def connected(name: str) -> int:
    """Returns how many chips of a topology are connected by links, consecutive ones; the network connects these."""
    chip, sides = check_topology(name), [int(side) for side in name.partition(":")[2].split("x")]
    if isinstance(chip, Tpu):
        return math.prod(sides)
    return max(sides[-1], min(chip.connected, math.prod(sides)))


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """Returns the devices of a topology, to compile for; they run nothing.

    Args:
      name: such as 'v5e:4x4' or 'h100:2x8'.
      slices: how many such topologies of TPUs.
    """
    chip = check_topology(name)
    try:
        return _tpu_devices(name, slices) if isinstance(chip, Tpu) else _gpu_devices(name, chip, slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name}: the compiler refuses it: {str(error).splitlines()[0]}") from error


def _tpu_devices(name, slices):
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.loader is None:  # a folder of that name is no package
        remedy = "pip install -e '.[tpu]', the extra `tpu` of this package"
        raise ValueError(f"compiling for TPUs needs libtpu, which is not installed (no TPU is needed): {remedy}")
    _set_variables(_TPU_VARIABLES)
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # two cores are one device, as JAX has them on a v4
    if slices > 1:
        options["num_slices"] = slices
    return topologies.get_topology_desc(name, "tpu", **options).devices


def _gpu_devices(name, chip, slices):
    check_cuda_plugin()
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    if slices > 1:
        reason = "is planned for TPUs only, allowed here: 1; hosts of GPUs are part of the topology, as in h100:2x8"
        raise ValueError(f"--topology={name}: mesh.slices={slices} {reason}")
    _set_variables(_GPU_VARIABLES)
    shape = "x".join(map(str, [1] * (3 - len(sides)) + sides))  # slices, hosts, GPUs of a host
    return topologies.get_topology_desc("", "cuda", target_config=chip.target_config(), topology=shape).devices


def check_cuda_plugin() -> None:
    """Raises ValueError if JAX's CUDA plugin is not installed, or is of another version than jaxlib."""
    versions, wanted = multihost.versions(), jax.lib.__version__
    if all(versions[name] == wanted for name in _CUDA):
        return
    installed = ", ".join(f"{name} {versions[name] or 'missing'}" for name in _CUDA)
    packages = " ".join(f"{name}=={wanted}" for name in _CUDA)
    raise ValueError(
        f"compiling for GPUs needs JAX's CUDA plugin of jaxlib's version {wanted} (no GPU is needed): {installed}; "
        f"pip install -e '.[gpu-plan]', or pip install --no-deps {packages}"
    )


def check_cudnn() -> None:
    """Raises ValueError if cuDNN, which compiles its attention itself, is not installed."""
    if multihost.versions()[_CUDNN] is None:
        remedy = f"pip install --no-deps '{_CUDNN}<10', or set it to 'xla'"
        raise ValueError(f"config.attention='cudnn' is compiled by cuDNN, and {_CUDNN} is not installed: {remedy}")


def _set_variables(variables):
    for variable, value in variables.items():
        os.environ.setdefault(variable, value)
