"""Private names of JAX that tests use, because it has no public ones."""

import importlib

import jax
import pytest


def private(module, name):
    """Returns `jax._src.MODULE.NAME`; skips the test, by the name of the version, where JAX has it no more."""
    try:
        return getattr(importlib.import_module(f"jax._src.{module}"), name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"jax {jax.__version__} is of a version that this test does not know: {error}")
