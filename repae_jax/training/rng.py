"""Named random keys: every random number of a training step has its own name."""

import zlib

import jax


def named_keys(key: jax.Array, step, *names: str) -> dict[str, jax.Array]:
    """Returns one key per name, a pure function of (the run's key, step, name): adding a name changes no other number."""
    step_key = jax.random.fold_in(key, step)
    return {name: jax.random.fold_in(step_key, zlib.crc32(name.encode())) for name in names}
