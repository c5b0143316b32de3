"""The compiled step: its abstract inputs, XLA's options, and the cache of compiled programs."""

import os

import jax
import jax.numpy as jnp

from repae_jax.distributed import sharding
from repae_jax.job.config import DETERMINISTIC, parse_compiler_options
from repae_jax.job.frozen_weights import frozen_shapes
from repae_jax.job.initial_state import abstract_arrays
from repae_jax.ranges import height_width

# XLA's options for the step, by platform. On CPUs YNNPACK computes matrix products and reductions; XLA's own convolutions are
# faster than its.
_YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": _YNNPACK}}


def jit_step(job, state):
    """Returns the step, (state, batch, frozen, key) -> (state, metrics), as training, benchmark and plan compile it.

    The state is donated, and the new one has the shardings of `state`, a TrainState or its shapes; metrics are replicated.
    """
    outs = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(job.mesh)
    step = sharding.with_mesh_context(job.mesh, job.step)
    return jax.jit(step, donate_argnums=0, out_shardings=outs, compiler_options=compiler_options(job))


def abstract_inputs(job):
    """Returns shapes, dtypes and shardings of a step's (batch, frozen, key); reads and computes nothing."""
    section, key = job.config["data"], jax.random.key(0)
    rows = sharding.batch_sharding(job.mesh)
    batch = {"label": ((), jnp.int32)}
    if job.encoders or not section["cache"]:
        batch["image"] = ((*height_width(section["image_size"]), 3), jnp.uint8)
    if section["cache"]:
        *grid, channels = job.latent_shape
        batch["moments"] = ((2,) * bool(section["flip_probability"]) + (*grid, 2 * channels), jnp.float32)
    batch = {
        name: jax.ShapeDtypeStruct((section["batch_size"], *shape), dtype, sharding=rows)
        for name, (shape, dtype) in batch.items()
    }
    frozen = abstract_arrays(job, frozen_shapes(job))
    return batch, frozen, jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(job.mesh))


def compiler_options(job) -> dict[str, str] | None:
    """Returns XLA's options for the step: the platform's own, unless XLA_FLAGS names them, overridden by the config's."""
    defaults = _COMPILER_OPTIONS.get(job.mesh.devices.flat[0].platform, {})
    flags = os.environ.get("XLA_FLAGS", "")
    defaults = {name: value for name, value in defaults.items() if name not in flags}
    fixed = DETERMINISTIC if is_fixed(job) else {}
    return {**defaults, **parse_compiler_options(job.config["compiler_options"]), **fixed} or None


def is_fixed(job) -> bool:
    """Returns whether options have to make the step compute the same bits every time: on CPUs and TPUs it does by itself."""
    return bool(job.config.get("deterministic")) and job.mesh.devices.flat[0].platform not in ("cpu", "tpu")


def check_compiler_options(job) -> None:
    """Raises ValueError if the compiler of the mesh's devices does not know `compiler_options`."""
    options = compiler_options(job)
    if options is None:
        return
    try:
        jax.jit(lambda: 0, out_shardings=sharding.replicated(job.mesh), compiler_options=options).lower().compile()
    except (RuntimeError, TypeError, ValueError) as error:  # XLA's, JAX's, JAX's
        reason, given = str(error).splitlines()[0], job.config["compiler_options"]
        raise ValueError(f"config.compiler_options={given!r}, which makes the compiler's {options}: {reason}") from error
