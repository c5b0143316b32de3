"""The private names of JAX that this package uses, because no public ones serve.

`distributed.global_state` knows this process's number before devices exist, and has the client of the coordination service;
`compilation_cache.decompress_executable` reads a compiled program. Both were found in jax 0.10, 0.11 and 0.12.
"""

import jax

try:
    from jax._src import compilation_cache, distributed

    _ = compilation_cache.decompress_executable, distributed.global_state.client, distributed.global_state.process_id
except (ImportError, AttributeError) as error:
    raise ImportError(f"repae_jax needs jax 0.10, 0.11 or 0.12; this is {jax.__version__}, and differs ({error})") from error

__all__ = ["compilation_cache", "distributed"]
