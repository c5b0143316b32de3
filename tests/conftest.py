"""Eight fake CPU devices for every test, set before jax is imported; programs are compiled quickly, and once.

REPAE_TEST_PLATFORM=cuda runs tests on a GPU, those that do not need eight devices. Tolerances are those of the CPU: products of
float32 are computed exactly, not in TF32, whose rounding of 5e-4 is above them.
"""

import gc
import os
import sys

if "REPAE_TEST_PLATFORM" in os.environ:
    os.environ["JAX_PLATFORMS"] = f"{os.environ['REPAE_TEST_PLATFORM']},cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["triton"] = None  # a part of PyTorch's CUDA build; its LLVM and TensorFlow's abort a process that has both

import compiler_flags  # noqa: E402

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the flags
    flags = compiler_flags.accepted(tuple(dict.fromkeys([*os.environ.get("XLA_FLAGS", "").split(), *compiler_flags.FLAGS])))
    os.environ["XLA_FLAGS"] = " ".join(flags)
COMPILED = compiler_flags.folder_for(tuple(os.environ["XLA_FLAGS"].split()))

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402


def pytest_configure(config):
    """The folder of compiled programs, made or cleaned up once per session."""
    if not hasattr(config, "workerinput"):
        COMPILED.mkdir(parents=True, exist_ok=True)
        compiler_flags.prune(COMPILED)


def pytest_collection_modifyitems(items):
    """Files with long tests come first: a long file at the end would leave the other processes without work."""
    long = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish():
    """Collecting garbage among what was imported, and as often as Python does by default, took an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """Folder of compiled programs, shared by all tests and processes, and kept for the next session."""
    jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    return COMPILED


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Frees what a module has traced: no other module uses it, and it fills the memory."""
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
    """The server as gs://bucket, for this process and those that it starts; each test uses a folder of its own."""
    with object_store.reached():
        yield object_store
    object_store.answer()


@pytest.fixture
def optimized():
    """Compiles with all optimizations, for a test that computes for longer than it compiles."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def warnings(monkeypatch):
    """List of the warnings that absl logs."""
    messages = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: messages.append(message % values))
    return messages
