"""REPA-E in JAX and Flax: a VAE and a latent diffusion transformer trained together, end to end.

`load`, `load_vae`, `load_model` and `load_encoder` are for notebooks and other programs (see `repae_jax.api`). They are
imported when they are first used, so that `import repae_jax` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Encoder", "Model", "Vae", "__version__", "load", "load_encoder", "load_model", "load_vae"]

if TYPE_CHECKING:
    from repae_jax.api import Encoder, Model, Vae, load, load_encoder, load_model, load_vae


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("repae_jax.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
