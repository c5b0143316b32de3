"""Eight fake CPU devices for every test, which must be set before jax is imported; programs compiled quickly, and once."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# most of the time goes into compiling: without most optimizations, and the older code for fusions, it takes a third;
# in one part, as the other core has tests of its own, another fifth less
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1 --xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402


def pytest_collection_finish():
    """Looking for garbage in what is imported, and as often as Python does, took an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Folder of compiled programs, shared by all tests and processes of one session."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a module has traced serves no other one, and fills the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder of a finished run of `small.tiny_run()`, for tests to read or to copy, not to change."""
    import small

    from repae_jax import train

    workdir = tmp_path_factory.mktemp("tiny") / "run"
    assert train.train(small.tiny_run(), workdir)[1]
    return workdir


@pytest.fixture(scope="session")
def object_store():
    """A real object-store server, `bucket.Bucket`; skips where there is none."""
    import bucket

    with bucket.serve() as served:
        yield served


@pytest.fixture
def gs(object_store):
    """That server, reached by this process and those it starts: gs://bucket, of which each test takes a folder of its own."""
    with object_store.reached():
        yield object_store
    object_store.answer()


@pytest.fixture
def optimized():
    """What the test compiles is optimized, for it computes for longer than it compiles."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def warnings(monkeypatch):
    """List that gets what absl's logging warns of."""
    messages = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: messages.append(message % values))
    return messages
