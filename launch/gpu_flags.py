"""Prints, for a shell, the settings of XLA and CUDA for several GPUs: eval "$(python -m launch.gpu_flags)".

multi_gpu.sh and slurm.sh do so; by hand, do it before any command that is to have them, such as sampling or the benchmark. What
the environment sets already stays as it is, each flag of XLA_FLAGS by itself. docs/performance.md says what each is for.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version

from repae_jax import cli
from repae_jax.distributed import xla_flags

FLAGS = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # more than the weights of a block of SiT-XL, 24 M, in float32
    "xla_gpu_all_gather_combine_threshold_bytes": "134217728",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "134217728",
    "xla_gpu_all_reduce_combine_threshold_bytes": "134217728",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
}
BLACKWELL_FLAGS = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}
HOPPER_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
MEMORY_FRACTION = ".9"
_HOPPER, _BLACKWELL = {9}, {10}  # major compute capabilities


def capabilities() -> set[int]:
    """Returns the major compute capabilities of this machine's GPUs; none without NVIDIA's driver."""
    if not shutil.which("nvidia-smi"):
        return set()
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    majors = {int(major) for major in re.findall(r"^(\d+)\.\d", answer.stdout, re.MULTILINE)}
    if answer.returncode or not majors:
        output = " ".join(f"{answer.stdout} {answer.stderr}".split())
        raise RuntimeError(f"the GPUs of this machine cannot be listed: {' '.join(command)}: {output}")
    return majors


def settings(environment: Mapping[str, str], cards: set[int]) -> dict[str, str]:
    """Returns variables to set: XLA_FLAGS with what jaxlib knows of the table, followed by what it holds already, and others.

    Args:
      environment: of this process.
      cards: the major compute capabilities of the GPUs; what only some kinds of card need is set if all are of that kind.

    Raises:
      ValueError: if jaxlib knows a flag of the table, but not its value.
    """
    user_flags = environment.get("XLA_FLAGS", "").split()
    table = FLAGS | (BLACKWELL_FLAGS if cards == _BLACKWELL else {})
    named = {flag.partition("=")[0] for flag in user_flags}
    flags = [f"--{name}={value}" for name, value in table.items() if f"--{name}" not in named]
    missing = xla_flags.unknown(flags)
    if missing:
        print(f"jaxlib {version('jaxlib')} does not know {' '.join(missing)}: not set", file=sys.stderr)
    known = [flag for flag in flags if flag not in missing]
    _check_values(known)
    result = {"XLA_FLAGS": " ".join([*known, *user_flags])}
    if cards == _HOPPER:
        result |= HOPPER_VARIABLES
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # the older name of the next one; JAX takes one of them only
        result["XLA_CLIENT_MEM_FRACTION"] = MEMORY_FRACTION
    return {name: value for name, value in result.items() if name == "XLA_FLAGS" or name not in environment}


def _check_values(flags):
    """Raises ValueError if jaxlib refuses the value of one of these flags, which would end every command without a word."""
    if xla_flags.complaint(" ".join(flags)) is None:
        return
    refused = next((flag for flag in flags if xla_flags.complaint(flag)), " ".join(flags))
    remedy = "put it into XLA_FLAGS with a value that this version takes"
    raise ValueError(f"jaxlib {version('jaxlib')} refuses {refused}: {xla_flags.complaint(refused)}; {remedy}")


@cli.ending()
def main() -> None:
    """Prints a line for each variable; ends with one line if jaxlib refuses XLA_FLAGS as it is."""
    xla_flags.check()
    for name, value in settings(os.environ, capabilities()).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
