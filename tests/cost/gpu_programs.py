"""Small programs whose bytes and FLOP are known by hand, compiled for one or eight H200: real ones, or texts kept from earlier.

`python tests/cost/gpu_programs.py` compiles them all and renews the texts in tests/golden/gpu_hlo; it needs the CUDA plugin.
"""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repae_jax.cost import topologies
from repae_jax.cost.chips import CHIPS

TEXTS = Path(__file__).parents[1] / "golden" / "gpu_hlo"


def has_cuda_plugin():
    return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


needs_cuda_plugin = pytest.mark.skipif(not has_cuda_plugin(), reason="no CUDA plugin: pip install -e '.[gpu-plan]'")


def product(x, w):
    return x @ w


def chain(x, y):
    """One kernel reads both and writes one."""
    return jnp.tanh(x * y) + jnp.exp(x)


def scan(x, weights):
    """Twelve layers of stacked weights; each is cast, and multiplies."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, weights)[0]


def stacked(x, shifts):
    """Results of twelve turns, each written into its place of the stack."""
    return jax.lax.scan(lambda x, shift: (x + shift, x * 2), x, shifts)


def update(cache, row):
    """A row written into a donated array."""
    return jax.lax.dynamic_update_slice(cache, row, (5, 0))


def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution_gradients(x, w, y):
    return jax.vjp(convolve, x, w)[1](y)


def of_module(x, w):
    with jax.named_scope("vae"), jax.named_scope("Decoder.decode"):
        x = x @ w
    with jax.named_scope("update"):
        return x + 1


BF16, F32 = jnp.bfloat16, jnp.float32
# function, shapes, dtypes, number of GPUs, specs of arguments and of the result
PROGRAMS = {
    "product": (product, [(4096, 1024), (1024, 2048)], [BF16, BF16], {}),
    "float32_product": (product, [(512, 512), (512, 512)], [F32, F32], {}),
    "exact_product": (
        lambda x, w: jnp.matmul(x, w, precision="highest"), [(512, 512), (512, 512)], [F32, F32], {},
    ),
    "chain": (chain, [(8192, 4096)] * 2, [BF16, F32], {}),
    "scan": (scan, [(4096, 1024), (12, 1024, 1024)], [BF16, F32], {}),
    "stacked": (stacked, [(4096, 1024), (12, 1)], [F32, F32], {}),
    "update": (update, [(1024, 4096), (1, 4096)], [F32, F32], {"donated": (0,)}),
    "convolution": (convolve, [(8, 64, 64, 128), (3, 3, 128, 256)], [BF16, BF16], {}),
    "convolution_gradients": (
        convolution_gradients, [(8, 64, 64, 128), (3, 3, 128, 256), (8, 64, 64, 256)], [BF16] * 3, {},
    ),
    "scopes": (of_module, [(512, 512), (512, 512)], [BF16, BF16], {}),
    "all_gather": (lambda x: x * 2, [(4096, 1024)], [F32], {"gpus": "8", "specs": [P(("data", "fsdp"))], "result": P()}),
    "gradient_sum": (
        lambda w, x: jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(w), [(512, 256), (4096, 512)], [F32, F32],
        {"gpus": "2x8", "specs": [P(), P(("data", "fsdp"))], "result": P()},
    ),
    "fsdp": (
        lambda w, x: x @ w, [(1024, 1024), (4096, 1024)], [BF16, BF16],
        {"gpus": "2x8", "specs": [P("fsdp"), P(("data", "fsdp"))], "result": P(("data", "fsdp"))},
    ),
}  # fmt: skip


def compiled(name):
    """Compiles a program; on several GPUs for the mesh data x fsdp, of which fsdp are those of a host of eight or fewer."""
    function, shapes, dtypes, options = PROGRAMS[name]
    devices = np.array(topologies.topology_devices(f"h200:{options.get('gpus', '1')}"))
    grid = devices.reshape(2, -1) if len(devices) > 1 else devices[None]
    mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = options.get("specs", [P()] * len(shapes))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs)
    ]
    result = NamedSharding(mesh, options.get("result", P()))
    jitted = jax.jit(function, out_shardings=result, donate_argnums=options.get("donated", ()))
    return jitted.lower(*arguments).compile(dict(CHIPS["h200"].compiler_options))


def stored(name):
    return (TEXTS / f"{name}.txt").read_text()


def _renew():
    jax.config.update("jax_platforms", "cpu")
    TEXTS.mkdir(exist_ok=True)
    for name in PROGRAMS:
        text = re.sub(r"\n\nFileNames\n.*?(?=\n\n\n%|\n\n\nENTRY)", "", compiled(name).as_text(), flags=re.DOTALL)
        (TEXTS / f"{name}.txt").write_text(re.sub(r" stack_frame_id=\d+", "", text))


if __name__ == "__main__":
    _renew()
