"""Named random keys: every draw of a training step has its own name."""

import zlib

import jax


def named_keys(key, step, *names):
    """One key per name, a pure function of (key, step, name): adding a name changes no other draw.

    Args:
      key: base PRNG key of the run.
      step: int or int32 scalar (may be traced).
      *names: what the keys are for.

    Returns:
      dict name -> PRNG key.
    """
    step_key = jax.random.fold_in(key, step)
    return {name: jax.random.fold_in(step_key, zlib.crc32(name.encode())) for name in names}
