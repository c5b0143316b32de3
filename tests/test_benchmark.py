"""The benchmark of tiny configs: what it says, and that its numbers agree with each other."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from configs import ldm, vae
from repae_jax import cli
from repae_jax.benchmark import __main__ as command
from repae_jax.benchmark import measure, timing
from repae_jax.cost import flops
from repae_jax.job import build, compilation, frozen_weights, initial_state

ROOT = Path(__file__).parents[1]
QUIET = {"hooks.samples_every": 0, "hooks.reconstructions_every": 0}
NO_ENCODER = {"hooks.samples_every": 0, "encoders": {}, "loss.sit.align": 0.0}  # quickest to compile: SiT on a frozen VAE


def step_flop(job):
    return sum(flops.of_step(job).values())


def benchmark(config, steps=4, **options):
    lines = []
    result = command.benchmark(config, steps, say=lines.append, **options)
    return json.loads(json.dumps(result, allow_nan=False)), lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(result, lines, folder of its trace) of a benchmark of everything."""
    folder = tmp_path_factory.mktemp("profile")
    return *benchmark(small.config(NO_ENCODER, ldm), with_input=True, sample_batch=8, profile=folder), folder


@pytest.mark.integration
def test_numbers_agree(whole):
    result, _, _ = whole
    step = result["step"]
    seconds = step["seconds_per_step"]
    assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"] and seconds["windows"] == 4
    assert step["images_per_second"] == pytest.approx(result["batch_size"] / seconds["median"])
    assert step["images_per_second_per_device"] == pytest.approx(step["images_per_second"] / 8)
    assert result["batch_size_per_device"] * result["devices"]["count"] == result["batch_size"] == 8
    assert step["tflop_per_image"] * 1e12 == pytest.approx(step_flop(build.build(result["config"])))
    assert step["tflops_per_device"] == pytest.approx(step["tflop_per_image"] * step["images_per_second_per_device"])
    assert step["mfu"] is None and result["devices"]["peak_tflops"] is None
    planned = step["memory"]["compiled"]
    assert planned["total"] == sum(planned[kind] for kind in ("arguments", "outputs", "temporaries", "code")) > 0
    assert planned["aliased"] > 0, "the state is donated"
    assert step["compile_seconds"] > 0
    sampling = result["sampling"]
    assert sampling["images_per_second"] == pytest.approx(8 / sampling["seconds_per_batch"]["median"])
    assert (sampling["sampler"], sampling["steps"], sampling["batch_size"]) == ("sde", 2, 8)


@pytest.mark.integration
def test_everything_is_there_to_do_it_again(whole):
    result, _, _ = whole
    assert result["config"] == json.loads(json.dumps(build.plain_config(small.config(NO_ENCODER, ldm))))
    assert result["random_weights"] == ["init.vae"]
    assert {"jax", "jaxlib", "python", "platform"} <= set(result["versions"])
    assert result["environment"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert result["devices"]["kind"] == "cpu" and result["devices"]["mesh"] == {"data": 8, "fsdp": 1}
    assert result["precision"] == {"compute": "float32"} and result["compilation_cache"]


def check_parts(result, lines):
    timed = {name: part for name, part in result["parts"].items() if name != "update"}
    total = sum(part["tflop_per_image"] for part in timed.values())
    assert total == pytest.approx(result["step"]["tflop_per_image"], rel=0.01)
    for name, part in timed.items():
        assert part["tflop_per_image"] > 0
        assert part["share_of_step"] == pytest.approx(
            part["seconds_per_step"]["median"] / result["step"]["seconds_per_step"]["median"]
        )
        assert any(line.startswith(f"  {name} ") for line in lines)


@pytest.mark.integration
def test_parts_make_up_the_step(whole):
    check_parts(*whole[:2])
    assert set(whole[0]["parts"]) == {"vae_encoder", "sit", "update"}


@pytest.mark.slow
def test_parts_of_repae():
    result, lines = benchmark(small.config({**QUIET, "accumulation": 2, "data.batch_size": 16}), sample_batch=0)
    check_parts(result, lines)
    assert {"vae_encoder", "vae_decoder", "sit", "align", "discriminator", "encoder_target"} <= set(result["parts"])


@pytest.mark.integration
def test_a_part_counts_as_often_as_a_step_runs_it(monkeypatch):
    monkeypatch.setattr(measure, "time_part", lambda *_: np.ones(3))
    monkeypatch.setattr(measure, "time_update", lambda *_: np.ones(3))
    job = build.build(small.config({**NO_ENCODER, "init.vae": "random", "accumulation": 2, "data.batch_size": 16}, ldm))
    parts = measure.measure_parts(job, small.random_state(job), frozen_weights.load_frozen(job), 3, 1.0)
    seconds = {name: part["seconds_per_step"]["median"] for name, part in parts}
    assert seconds == {"vae_encoder": 1, "sit": 2, "update": 1}, "the step encodes the whole batch at once"


@pytest.mark.integration
def test_a_trace_is_written(whole):
    _, lines, folder = whole
    assert list(folder.rglob("*.xplane.pb"))
    assert any(f"xprof --logdir {folder}" in line for line in lines)


@pytest.mark.integration
def test_input(whole):
    speed = whole[0]["input"]
    assert speed["images_per_second"] > 0 and speed["with_step"]["images_per_second"] > 0
    assert 0 <= speed["with_step"]["input_wait"] <= 1 and speed["workers"] == 0


def test_data_that_is_not_there_is_skipped(tmp_path):
    config = small.config({"data.source": "folder", "data.options": {"path": str(tmp_path / "no"), "labels_file": None}})
    result = measure.measure_input(build.build(config), None, {}, 1)
    assert list(result) == ["skipped"] and str(tmp_path / "no") in result["skipped"]
    assert command.input_line(result).startswith("input skipped: ")


# ---- parts of other jobs, uncompiled --------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    "config",
    [
        lambda: small.config(small.SIT_ALONE, ldm),
        lambda: small.config({**small.SIT_ALONE, **small.SELF_FLOW}, ldm),
        lambda: small.config({"init.vae": "", "accumulation": 2, "data.batch_size": 16}, ldm),
        lambda: small.config({"loss.vae.diffusion": 0.1, "diffusion.norm_momentum": 0.0}),
        lambda: small.config({"loss.vae.lpips": 1.0, "lpips.vgg16": "", "accumulation": 2, "data.batch_size": 16}, arg="tiny"),
        pytest.param(lambda: small.config({"loss.vae.gan": 0.0}), marks=pytest.mark.slow),
        pytest.param(lambda: small.config({"optim.vae.fixed": ("encoder", "quant_conv")}), marks=pytest.mark.slow),
        lambda: small.config({}, vae),
        pytest.param(lambda: small.config({}, vae, "vavae-stage2,tiny"), marks=pytest.mark.slow),
        lambda: small.config({}, vae, "discriminator,tiny"),
    ],
)
def test_the_parts_of_every_job_cost_what_the_step_does(config):
    """Gradients have their shapes and places, too: outputs of a part are as its shardings say."""
    config, _ = measure.without_files(config().to_dict())
    job = build.build(config)
    state, (_, frozen, _) = initial_state.abstract_state(job), compilation.abstract_inputs(job)
    whole, micro = config["data"]["batch_size"], config["data"]["batch_size"] // config["accumulation"]

    def batch_of(count):
        pixels = jax.ShapeDtypeStruct((count, *[config["data"]["image_size"]] * 2, 3), np.uint8)
        return jax.eval_shape(lambda pixels: measure.parts.make_batch(job, pixels, jax.random.key(0)), pixels)

    parts = measure.parts.make_parts(job, state, frozen, batch_of(whole), batch_of(micro))
    counts = {name: whole if part.of_whole else micro for name, part in parts.items()}
    costs = {name: sum(flops.count(part.function, *part.arguments).values()) / counts[name] for name, part in parts.items()}
    assert sum(costs.values()) == pytest.approx(step_flop(job), rel=0.02) and all(costs.values())
    for name, part in parts.items():
        lowered = jax.jit(part.function, out_shardings=part.out_shardings).lower(*part.arguments)
        assert part.of_whole == (name.startswith("encoder_") or (name == "vae_encoder" and config["job"] == "ldm"))
        if name.startswith("encoder_") or name in ("vae_encoder", "vae_decoder"):
            assert jax.tree.leaves(lowered.out_info)[0].shape[0] == (whole if part.of_whole else micro)
    grads = {name: net.params for name in ("vae", "disc", "sit") if (net := getattr(state, name)) is not None}
    new, _ = jax.eval_shape(lambda *given: measure.parts.update(*given, tx=job.tx, recipe=job.recipe), state, grads)
    assert jax.tree.map(lambda x: x.shape, new) == jax.tree.map(lambda x: x.shape, state)


# ---- timing, weights, mistakes --------------------------------------------------------------------------------------


def test_windows_follow_each_other_without_a_break(monkeypatch):
    """A device that takes a second per call, three for the first: only dispatched calls are waited for, in order."""
    now, dispatched, waited = [0.0], [], []

    def wait(call):
        assert len(dispatched) - len(waited) <= 3
        now[0] += 3.0 if call == 0 else 1.0
        waited.append(call)

    monkeypatch.setattr(timing.jax, "block_until_ready", wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        dispatched.append(len(dispatched))
        return dispatched[-1]

    seconds = timing.time_calls(call, 45, ahead=2)
    assert seconds.tolist() == [1.0] * 11  # each window has four calls
    assert dispatched == waited == list(range(48))


def test_spread():
    assert timing.spread(np.arange(11.0)) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "windows": 11}


def test_frozen_weights_that_are_not_here_become_random(tmp_path):
    (tmp_path / "encoder").mkdir()
    changes = {"loss.vae.lpips": 1.0, "encoders.target.weights": "facebook/dinov2-base", "lpips.vgg16": "vgg16.pth"}
    given = small.config(changes).to_dict()
    config, random = measure.without_files(given)
    assert random == ["encoders.target.weights", "lpips"] and config["lpips"]["linear"] == frozen_weights.RANDOM
    assert config["encoders"]["target"]["weights"] == frozen_weights.RANDOM
    assert given["encoders"]["target"]["weights"] == "facebook/dinov2-base"  # untouched
    given["encoders"]["target"]["weights"] = str(tmp_path / "encoder")
    given["lpips"]["vgg16"] = "gs://bucket/vgg16.pth"
    assert measure.without_files(given) == (given, [])
    config, random = measure.without_files(small.config({"init.vae": ""}, ldm).to_dict())
    assert random == ["encoders.target.weights", "init.vae"] and config["init"]["vae"] == frozen_weights.RANDOM


@pytest.mark.integration
def test_nothing_starts_at_zero():
    """A SiT's gates do, and its head: their products would cost less power than later ones."""
    state = measure.random_state(build.build(small.config(NO_ENCODER, ldm)))
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.sit.params))
    assert small.differing(state.ema.params, state.sit.params) == []


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (lambda: small.config({"data.batch_size": 9}), {}, "data.batch_size=9 is not divisible by 8 devices"),
        (lambda: small.config({}), {"sample_batch": 9}, "--sample_batch=9 is not a multiple of the 8 devices"),
        (lambda: small.config({}, vae), {"sample_batch": 8}, "config.job='vae' has no SiT to sample with"),
        (lambda: small.config({"sampling.sampler": "dopri5"}), {}, "config.sampling.sampler='dopri5' .* or --sample_batch=0"),
        (lambda: {"job": "none"}, {}, "config.job='none' is unknown"),
    ],
)
def test_mistakes(config, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        command.benchmark(config(), say=lambda line: None, **options)
    assert cli.line_of(caught.value)


@pytest.mark.integration
def test_a_step_that_does_not_fit(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore")

    monkeypatch.setattr(measure, "compile_step", fail)
    message = r"batch_size=8 on 8 devices \(RESOURCE_EXHAUSTED: .* 99 bytes\.\): lower it"
    with pytest.raises(ValueError, match=message) as caught:
        command.benchmark(small.config(NO_ENCODER, ldm), say=lambda line: None)
    assert cli.line_of(caught.value)


def test_a_state_that_does_not_fit(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(measure, "random_state", fail)
    with pytest.raises(ValueError, match="the step does not fit into memory"):
        command.benchmark(small.config(NO_ENCODER, ldm), say=lambda line: None)


@pytest.mark.integration
def test_what_was_measured_before_a_failure_is_kept(monkeypatch, tmp_path):
    speed = {"seconds_per_step": {"median": 1.0, "p10": 1.0, "p90": 1.0}, "tflops_per_device": 1.0}
    speed |= {"images_per_second": 8.0, "images_per_second_per_device": 1.0}

    def fail_after_one(*_):
        yield "sit", {"failed": "out of memory"}
        raise jax.errors.JaxRuntimeError("INTERNAL: lost")

    monkeypatch.setattr(measure, "compile_step", lambda *_: (None, 1.0))
    monkeypatch.setattr(measure, "measure_step", lambda *_: speed)
    monkeypatch.setattr(measure, "memory_of", lambda _: {"peak_bytes_in_use": None, "compiled": None})
    monkeypatch.setattr(measure, "measure_parts", fail_after_one)
    out = tmp_path / "x.json"
    with pytest.raises(jax.errors.JaxRuntimeError, match="lost"):
        command.benchmark(small.config(NO_ENCODER, ldm), sample_batch=0, say=lambda line: None, keep=command.keeper(out))
    numbers = json.loads(out.read_text())
    assert numbers["step"]["images_per_second"] == 8.0 and numbers["parts"] == {"sit": {"failed": "out of memory"}}
    with pytest.raises(FileExistsError):
        command.keeper(out)({})


@pytest.mark.integration
def test_parts_that_alone_do_not_fit_are_left_out(monkeypatch):
    """The update, too."""

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(measure, "_compile", fail)
    job = build.build(small.config(NO_ENCODER, ldm))
    results = dict(measure.measure_parts(job, small.random_state(job), frozen_weights.load_frozen(job), 1, 1.0))
    assert results == dict.fromkeys(("vae_encoder", "sit", "update"), {"failed": "out of memory"})


@pytest.mark.integration
def test_what_alone_does_not_fit_is_left_out(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(measure, "_compile", fail)
    job = build.build(small.config(NO_ENCODER, ldm))
    state, frozen = initial_state.abstract_state(job), compilation.abstract_inputs(job)[1]
    result = measure.measure_sampling(job, state, frozen, 8)
    chosen = {"sampler": "sde", "steps": 2, "guidance_scale": 1.5, "precision": "float32"}
    assert result == {"batch_size": 8, **chosen, "failed": "out of memory"}
    assert command.sampling_line(result) == "sampling out of memory: lower --sample_batch=8"
    with pytest.raises(jax.errors.JaxRuntimeError):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        measure.measure_sampling(job, state, frozen, 8)


def test_a_result_is_not_overwritten(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="a.json exists: choose another name"):
        command.check_places(str(tmp_path / "a.json"), None)
    with pytest.raises(ValueError, match="there is no folder"):
        command.check_places(str(tmp_path / "none" / "a.json"), None)
    with pytest.raises(FileExistsError, match="a.json"):
        command.check_places(None, tmp_path / "a.json")
    assert command.check_places(None, None) is None


# ---- the command ----------------------------------------------------------------------------------------------------


def start(*arguments, compiled):
    """Popen of the command on one device."""
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled), "XLA_FLAGS": one_device}
    program = [sys.executable, "-m", "repae_jax.benchmark", *map(str, arguments)]
    return subprocess.Popen(program, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, compiled):
    process = start(*arguments, compiled=compiled)
    output, error = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


SMALL = ["data.image_size=8", "vae.channel_multipliers=(1,1)", "vae.norm_groups=4"]


@pytest.mark.integration
def test_the_command(compiled, tmp_path):
    out, flags = tmp_path / "result.json", [f"--config.{change}" for change in SMALL]
    done = run("--config", "configs/ldm.py:tiny,encoder=none", *flags, "--steps=3", "--sample_batch=0", "--out", out,
               compiled=compiled)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["config"]["data"]["image_size"] == 8 and result["devices"]["count"] == 1
    assert f"--out={out}" in result["arguments"] or str(out) in result["arguments"]
    assert "sampling" not in result and "input" not in result and set(result["parts"]) == {"vae_encoder", "sit", "update"}
    shown = f"{result['step']['images_per_second']:.4g} img/s on 1 devices"
    assert shown in done.stdout and "the peak of 'cpu' is not known: no MFU" in done.stdout
    assert re.search(rf"^all numbers: {out}$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_two_processes(compiled, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    given = ["--config", "configs/ldm.py:tiny,encoder=none", *(f"--config.{change}" for change in SMALL), "--steps=3"]
    given += ["--sample_batch=4", "--input", "--out", tmp_path / "x.json", "--coordinator", address, "--num_processes=2"]
    started = [start(*given, f"--process_id={index}", compiled=compiled) for index in range(2)]
    (first, error), (second, other) = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], (error[-3000:], other[-3000:])
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["devices"]["count"] == result["devices"]["processes"] == 2
    assert result["input"]["processes"] == 2 and result["sampling"]["batch_size"] == 4
    assert set(result["parts"]) == {"vae_encoder", "sit", "update"}
    printed = [line for line in second.splitlines() if not line.startswith("[Gloo]")]  # lines of the backend
    assert "img/s on 2 devices" in first and not printed, "process 0 alone prints"


@pytest.mark.integration
def test_a_mistake_on_the_command_line(compiled):
    done = run("--config", "configs/repae.py:tiny", "--config.sit.dpeth=2", compiled=compiled)
    assert done.returncode == 1 and re.match("error: .*dpeth", done.stderr), done.stderr[-2000:]


@pytest.mark.integration
def test_help(compiled):
    done = run("--help", compiled=compiled)
    assert {"--config", "--steps", "--out", "--input", "--profile", "--sample_batch", "--distributed"} <= set(
        re.findall(r"--\w+", done.stdout)
    )
