"""Eight fake CPU devices for every test, which must be set before jax is imported; programs compiled quickly, and once."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import small  # noqa: E402


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Folder of compiled programs, shared by the processes of one session."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


@pytest.fixture(scope="module")
def quick(compiled):
    """For tests of whole runs: no optimization by XLA."""
    with small.quick_compilation(compiled):
        yield
