"""The compiler options of the step, and the cache of compiled programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repae_jax.distributed import sharding
from repae_jax.job import compilation

NAME, KIND = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_"


def test_the_step_is_compiled_with_the_options(tmp_path):
    def same(state):
        return state, {}

    mesh = sharding.make_mesh(1)
    state = jax.device_put(np.zeros(()), sharding.replicated(mesh))
    job = SimpleNamespace(mesh=mesh, step=same, config={"compiler_options": f"xla_dump_to={tmp_path}"})
    compilation.jit_step(job, state).lower(state).compile()
    assert list(tmp_path.glob("*jit_same*"))


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        ("", "", ["product", "sum"]),
        (f"{NAME}={KIND}INDIVIDUAL_CONVOLUTION,{KIND}REDUCE", "", ["sum", "convolution"]),
        ("", f"--{NAME}=", ["product", "sum", "convolution"]),  # XLA does this by itself
    ],
)
def test_what_ynnpack_computes_on_cpus(given, flags, expected, monkeypatch):
    """By itself XLA takes its products, sums and convolutions; its own convolutions are faster."""
    functions = {
        "product": lambda x: x[0, 0] @ x[0, 1],
        "sum": lambda x: x.sum((0, 2, 3)),
        "convolution": lambda x: jax.lax.conv(x, x[:, :, :3, :3], (1, 1), "SAME"),
    }
    monkeypatch.setenv("XLA_FLAGS", flags)
    mesh = sharding.make_mesh(1)
    x = jax.device_put(np.zeros((64, 64, 64, 64), np.float32), sharding.replicated(mesh))

    def is_of_ynnpack(function):
        job = SimpleNamespace(mesh=mesh, step=lambda x: (function(x), {}), config={"compiler_options": given})
        return "__ynn_fusion" in compilation.jit_step(job, x).lower(x).compile().as_text()

    assert [name for name, function in functions.items() if is_of_ynnpack(function)] == expected


@pytest.mark.parametrize("settings", ["users", "tests"])
def test_sums_on_cpus_are_right(settings, request):
    """Sums of the step, and of sampling and evaluation, which have no options; wrong in jax 0.10.2 (its issue 39103)."""
    if settings == "users":
        request.getfixturevalue("optimized")
    x = np.zeros((32_769, 3), np.float32)
    x[:, 0] = np.arange(len(x))
    mesh = sharding.make_mesh(1)

    def squared_norms(x):
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)

    job = SimpleNamespace(mesh=mesh, step=lambda x: (squared_norms(x), {}), config={"compiler_options": ""})
    placed = jax.device_put(x, sharding.replicated(mesh))
    for function in (squared_norms, jax.jit(squared_norms), lambda x: compilation.jit_step(job, x)(x)[0]):
        np.testing.assert_array_equal(function(placed), x[:, 0] ** 2)


def on(platform, **config):
    """A job on a device of a platform."""
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    return SimpleNamespace(mesh=mesh, config={"compiler_options": "", **config})


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_gpu_programs_that_compute_the_same_bits_every_time(platform, monkeypatch):
    fixed = {"xla_gpu_exclude_nondeterministic_ops": "True"}
    assert compilation.compiler_options(on(platform, deterministic=True)) == fixed
    assert compilation.compiler_options(on(platform, deterministic=True, compiler_options="xla_a=1")) == {"xla_a": "1", **fixed}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
    assert compilation.compiler_options(on(platform, deterministic=True)) == fixed, "not what the environment says"
    assert compilation.compiler_options(on(platform, deterministic=False)) is None


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_programs_of_cpus_and_tpus_do_by_themselves(platform):
    assert compilation.compiler_options(on(platform, deterministic=True)) == compilation.compiler_options(on(platform))


def test_what_the_compiler_of_a_deterministic_step_receives(compiled, monkeypatch, tmp_path):
    """XLA's dump has the options that differ from its defaults. What autotuning finds is kept with the compiled programs."""
    monkeypatch.setattr(compilation, "is_fixed", lambda job: job.config["deterministic"])
    mesh = sharding.make_mesh(1)
    state = jax.device_put(np.zeros(()), sharding.replicated(mesh))
    for deterministic in (True, False):
        folder = tmp_path / str(deterministic)
        config = {"compiler_options": f"xla_dump_to={folder}", "deterministic": deterministic}
        job = SimpleNamespace(mesh=mesh, step=lambda state: (state + 1, {}), config=config)
        compilation.check_compiler_options(job)
        compilation.jit_step(job, state).lower(state).compile()
        options = [path.read_text().splitlines() for path in folder.glob("*.debug_options")]
        assert options
        for received in options:
            assert ("xla_gpu_exclude_nondeterministic_ops: true" in received) == deterministic
            assert any(line.startswith(f'xla_gpu_per_fusion_autotune_cache_dir: "{compiled}/') for line in received)


def test_other_platforms_have_no_options_of_their_own():
    for platform in ("tpu", "gpu", "cuda"):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        for given, expected in (("", None), ("xla_a=1,xla_b=X,Y,", {"xla_a": "1", "xla_b": "X,Y"})):
            assert compilation.compiler_options(SimpleNamespace(mesh=mesh, config={"compiler_options": given})) == expected
