"""TPU topologies to compile for ahead of time, without a TPU: sizes, memory, devices."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU."""

    kind: str  # JAX's name of its devices, for `flops.peak`
    hbm: float  # bytes of memory that the compiler uses
    clock: float  # Hz of the cycles that the compiler counts
    # share of the peak that the compiler expects, at this clock, of a product of bfloat16 matrices of side 8192 (libtpu
    # 0.0.42); real chips come close to the peak there: it shows how far estimates of large products can be trusted
    matmul: float
    grids: tuple[str, ...]  # allowed numbers of chips per side; examples where there are three sides

    @property
    def sides(self) -> int:
        """Number of dimensions of its torus."""
        return self.grids[0].count("x") + 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Memory is as reported by the compiler. With their matrix units, the clocks of v4, v5e and v5p give their peaks; v6e's clock is
# not published, and follows from its peak with four of them.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1.05e9, 0.93, _CUBES),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 1.5e9, 0.88, _FLAT),
    "v5p": Chip("TPU v5", 95.74 * GIB, 1.75e9, 0.90, _CUBES),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1.75e9, 0.70, _FLAT),
}

# without these, libtpu looks for a TPU of this machine, complains, and lets one process in only
_COMPILE_ONLY = {
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def check_topology(name: str) -> Chip:
    """Returns the Chip of a topology such as 'v5e:4x4'; ValueError for an unknown chip or grid, with the allowed ones."""
    chip_name, _, grid = name.partition(":")
    if chip_name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", grid):
        expected = f"CHIP:GRID with CHIP one of {', '.join(CHIPS)} and GRID its chips per side"
        raise ValueError(f"--topology={name}: expected {expected}, such as v5e:4x4, v6e:16x16 or v5p:4x4x8")
    chip, sides = CHIPS[chip_name], [int(side) for side in grid.split("x")]
    if chip.sides == 2 and grid not in chip.grids:
        raise ValueError(f"--topology={name}: allowed grids of {chip_name} are {', '.join(chip.grids)}")
    if chip.sides == 3 and (len(sides) != 3 or sides[0] % 2 or sides[1] % 2 or math.prod(sides) > 10_000):
        allowed = f"three sides, in hosts of 2x2x1 chips: {', '.join(chip.grids)}, …"
        raise ValueError(f"--topology={name}: a grid of {chip_name} has {allowed}")
    return chip


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """Returns the devices of a number of slices of a topology such as 'v5e:4x4', to compile for; they run nothing."""
    check_topology(name)
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.loader is None:  # a folder of that name is no package
        remedy = "pip install -e '.[tpu]', the extra `tpu` of this package"
        raise ValueError(f"compiling for TPUs needs libtpu, which is not installed (no TPU is needed): {remedy}")
    for variable, value in _COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # two cores are one device, as JAX has them on a v4
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
