"""Names that JAX may move from one version to the next."""

import runpy

import jax
import pytest
from jax_internals import private

from repae_jax.distributed import private_jax


@pytest.mark.parametrize("name", ["compilation_cache.decompress_executable", "distributed.global_state"])
def test_a_version_that_lacks_a_name_is_named(name, monkeypatch):
    monkeypatch.delattr(f"jax._src.{name}")
    message = rf"needs jax 0.10, 0.11 or 0.12; this is {jax.__version__}, and differs \(.*{name.partition('.')[2]}"
    with pytest.raises(ImportError, match=message):
        runpy.run_path(private_jax.__file__)


def test_a_test_is_skipped_by_the_name_of_the_version():
    assert private("distributed", "global_state") is private_jax.distributed.global_state
    for module in ("distributed", "module_of_another_version"):
        with pytest.raises(pytest.skip.Exception, match=f"^jax {jax.__version__} is of a version that "):
            private(module, "name_of_another_version")
