"""Measures a job: the step, its parts and sampling on random batches, and the input on the config's data."""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt8

from repae_jax import faults, files
from repae_jax.benchmark import parts
from repae_jax.benchmark.timing import spread, time_calls
from repae_jax.cost import flops, hlo_cost
from repae_jax.distributed import multihost, sharding
from repae_jax.job import build, compilation, initial_state, training_data
from repae_jax.ranges import height_width
from repae_jax.sampling import generate
from repae_jax.training.checkpoint import fingerprint
from repae_jax.training.metric_log import arithmetic_speed

AHEAD = 2  # steps that training dispatches before it waits for one
SAMPLED = 3  # batches that are sampled and timed
PROFILED = 3  # steps in a trace
NOISE = 0.02  # standard deviation of the noise on initial parameters
NETWORKS = ("vae", "disc", "sit")  # fields of a TrainState
OUT_OF_MEMORY = "out of memory"


def without_files(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Puts random weights in the place of frozen ones that are no file or folder of this machine; returns their fields, too."""
    config = copy.deepcopy(dict(config))
    fields = [(f"encoders.{name}.weights", entry, ("weights",)) for name, entry in sorted(config["encoders"].items())]
    if config["loss"].get("vae", {}).get("lpips"):
        fields.append(("lpips", config["lpips"], ("vgg16", "linear")))
    if not any(config["loss"].get("vae", {}).values()):
        fields.append(("init.vae", config["init"], ("vae",)))
    random = []
    for name, section, keys in fields:
        path = section[keys[0]]
        if not path or not ("://" in path or Path(path).expanduser().exists()):  # a name on the hub is no file
            random.append(name)
            section.update(dict.fromkeys(keys, files.RANDOM))
    return config, random


def random_state(job: build.Job) -> Any:
    """Returns a TrainState on the job's mesh: the initial one with some noise on all parameters.

    Multiplying by the zeros that a SiT begins with takes a device less power, and so less time, than later in training.
    """

    def make(key):
        state = initial_state.initial_state(job, key)
        nets = _params(state)
        noisy = optax.tree.add_scale(nets, NOISE, optax.tree.random_like(key, nets))
        state = state.replace(**{name: getattr(state, name).replace(params=params) for name, params in noisy.items()})
        if state.ema is not None:
            averaged = state.vae if state.sit is None else state.sit
            state = state.replace(ema=state.ema.replace(params=jax.tree.map(jnp.copy, averaged.params)))
        return state

    shardings = jax.tree.map(lambda x: x.sharding, initial_state.abstract_state(job))
    return jax.jit(make, out_shardings=shardings)(jax.random.key(job.config["seed"]))


def _params(state):
    return {name: net.params for name in NETWORKS if (net := getattr(state, name)) is not None}


def random_batch(job: build.Job) -> dict[str, Array]:
    """Draws a batch as the config's loader would give it, on the mesh."""
    highs, rng = {"image": 256, "label": job.config["data"]["num_classes"]}, np.random.default_rng(jax.process_index())

    def draw(name, array):
        shape = (array.shape[0] // jax.process_count(), *array.shape[1:])
        return rng.integers(0, highs[name], shape, array.dtype) if name in highs else rng.standard_normal(shape, array.dtype)

    abstract, _, _ = compilation.abstract_inputs(job)
    return sharding.put_batch(job.mesh, {name: draw(name, array) for name, array in abstract.items()})


def random_pixels(job: build.Job, count: int) -> UInt8[Array, "B H W 3"]:
    """Draws `count` images over all processes, on the mesh."""
    shape = (count // jax.process_count(), *height_width(job.config["data"]["image_size"]), 3)
    rng = np.random.default_rng(jax.process_index())
    return sharding.put_batch(job.mesh, rng.integers(0, 256, shape, np.uint8))


def compile_step(job: build.Job, state: Any, batch: Mapping[str, Array], frozen: Mapping[str, Any], key: Array) -> tuple:
    """Returns the step as training compiles it, and the seconds that this took."""
    return _compile(compilation.jit_step(job, state), state, batch, frozen, key)


def _compile(function, *arguments):
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def in_turn(job: build.Job, programs: Sequence[Callable]) -> Callable:
    """Returns a function that calls the programs of a job's `variants` in the order in which training does."""
    steps = itertools.count(1)
    return lambda *arguments: programs[job.kind_of(next(steps))](*arguments)


class Step:
    """A compiled step with the state that it carries on, which the first call donates, and what is the same at every step."""

    def __init__(self, compiled: Callable, state: Any, *constants: Any):
        self.state, self._compiled, self._constants = state, compiled, constants

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Dispatches one step; returns its metrics."""
        self.state, metrics = self._compiled(self.state, batch, *self._constants)
        return metrics


def speed_of(job: build.Job, seconds: float, count: int, flop: float) -> dict[str, float | None]:
    """Returns the speeds, None if unknown, of `count` images in some seconds over all devices, with some FLOP per image."""
    devices, per_second = job.mesh.size, count / seconds
    speed = {"images_per_second": per_second, "images_per_second_per_device": per_second / devices}
    arithmetic = arithmetic_speed(per_second, flop, devices, peak_of(job))
    return {**speed, "tflop_per_image": flop / 1e12, "mfu": None, **arithmetic}


def peak_of(job: build.Job) -> float | None:
    """Returns the FLOP/s of one device in the config's precision; None if unknown."""
    return flops.peak(job.mesh.devices.flat[0].device_kind, job.config["precision"]["compute"])


def measure_step(job: build.Job, step: Step, batch: Mapping[str, Array], count: int, title: str | None) -> dict[str, Any]:
    """Times the step: its seconds_per_step, a spread, and `speed_of` the median; `title` is that of a progress bar."""
    seconds = spread(time_calls(lambda: step(batch), count, ahead=AHEAD, title=title, period=job.vae_every))
    flop = sum(flops.of_step(job).values())
    return {"seconds_per_step": seconds, **speed_of(job, seconds["median"], job.config["data"]["batch_size"], flop)}


def memory_of(compiled: Any) -> dict[str, Any]:
    """Returns bytes of one device: the most in use so far, if the device counts them, and what the compiler planned."""
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    stats = compiled.memory_analysis()
    return {
        "peak_bytes_in_use": max((stats.get("peak_bytes_in_use", 0) for stats in counted), default=0) or None,
        "bytes_limit": counted[0].get("bytes_limit"),
        "compiled": None if stats is None else hlo_cost.memory(stats),
    }


def measure_parts(
    job: build.Job, state: Any, frozen: Mapping[str, Any], count: int, step_seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Times `count` calls of every part of the step alone, of a joint one with config.vae_every; the state is donated.

    Yields (name, {'seconds_per_step': spread, 'share_of_step': …} and, of all but the update, `speed_of` without images per
    second; or {'failed': …} if the part alone does not fit), as soon as each is measured.
    """
    accumulation, batch_size = job.recipe.accumulation, job.config["data"]["batch_size"]
    make = jax.jit(functools.partial(parts.make_batch, job), out_shardings=sharding.batch_sharding(job.mesh))
    sizes, key = (batch_size, batch_size // accumulation), jax.random.key(job.config["seed"])
    batches = [make(random_pixels(job, size), key) for size in sizes]

    def compared(seconds, runs=1.0):
        seconds = spread(seconds)
        return {"seconds_per_step": seconds, "share_of_step": runs * seconds["median"] / step_seconds}

    for name, part in parts.make_parts(job, state, frozen, *batches).items():
        repeated = 1 if part.of_whole else accumulation
        runs = 1.0 if part.of_whole or name == "sit" else job.variants[0][1]  # share of the steps that have the part
        result = _or_failed(
            lambda part=part, repeated=repeated, runs=runs: compared(repeated * time_part(job, part, count), runs)
        )
        if "failed" not in result:
            flop = repeated * sum(flops.count(part.function, *part.arguments).values()) / batch_size
            speed = speed_of(job, result["seconds_per_step"]["median"], batch_size, flop)
            result |= {field: value for field, value in speed.items() if not field.startswith("images")}
        yield name, result
    yield "update", _or_failed(lambda: compared(time_update(job, state, count)))


def _or_failed(measure):
    """Returns measure(), or {'failed': …} if it ran out of memory: what needs less may go on.

    Not so in several processes: others may not have run out of it, and would wait.
    """
    try:
        return measure()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 or not faults.is_out_of_memory(str(error)):
            raise
        return {"failed": OUT_OF_MEMORY}


def time_part(job: build.Job, part: parts.Part, count: int) -> np.ndarray:
    """Returns seconds per call of a Part, see `time_calls`."""
    options = compilation.compiler_options(job)
    function = sharding.with_mesh_context(job.mesh, part.function)
    run = jax.jit(function, out_shardings=part.out_shardings, compiler_options=options)
    compiled, _ = _compile(run, *part.arguments)
    return time_calls(lambda: compiled(*part.arguments), count, ahead=1)


def time_update(job: build.Job, state: Any, count: int) -> np.ndarray:
    """Returns seconds per call of optimizers and averages, which change the state: it is donated."""
    nets = _params(state)
    shardings = jax.tree.map(lambda x: x.sharding, (state, nets))
    grads = jax.jit(functools.partial(jax.tree.map, lambda x: NOISE * x), out_shardings=shardings[1])(nets)
    function = functools.partial(parts.update, tx=job.tx, recipe=job.recipe)
    outs = (shardings[0], sharding.replicated(job.mesh))
    options = compilation.compiler_options(job)
    run = jax.jit(function, donate_argnums=0, out_shardings=outs, compiler_options=options)
    step = Step(_compile(run, state, grads)[0], state)
    return time_calls(lambda: step(grads), count, ahead=1)


def measure_sampling(job: build.Job, state: Any, frozen: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Times the config's sampler: its settings, seconds_per_batch, a spread, and `speed_of` the median; or 'failed'."""
    sampling, rows = job.sampling, sharding.batch_sharding(job.mesh)
    run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, sampling)
    run = jax.jit(sharding.with_mesh_context(job.mesh, run), out_shardings=rows)
    labels = sharding.put(np.arange(batch_size, dtype=np.int32) % job.config["data"]["num_classes"], rows)
    ids = sharding.put(np.arange(batch_size), rows)
    arguments = (generate.sampling_params(state, frozen), labels, ids, jax.random.key(job.config["seed"]))
    chosen = {name: getattr(sampling, name) for name in ("sampler", "steps", "guidance_scale", "precision")}

    def time_batches():
        compiled, compile_seconds = _compile(run, *arguments)
        seconds = spread(time_calls(lambda: compiled(*arguments), SAMPLED, ahead=1, warm_up=1))
        speed = speed_of(job, seconds["median"], batch_size, sum(flops.of_sampling(job).values()))
        del speed["mfu"]  # the decoder is in float32, the SiT in the sampling's precision: they have different peaks
        return {"seconds_per_batch": seconds, **speed, "compile_seconds": compile_seconds}

    return {"batch_size": batch_size, **chosen, **_or_failed(time_batches)}


def measure_input(job: build.Job, step: Step, frozen: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Times `count` batches of the config's loader alone, and of the step when it is fed by it.

    Returns images_per_second of the loader alone, over all processes; workers; with_step: {'images_per_second', 'input_wait'},
    the share of the time in which there was no batch. Or {'skipped': why}, if the data is not there.
    """
    source, problem = None, None
    try:
        source = _source(job, frozen)
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    if problem := next(filter(None, multihost.all_gather(problem)), None):
        return {"skipped": problem}
    section = job.config["data"]
    with training_data.make_loader(job, source) as loader:
        for _ in range(max(8, 4 * section["workers"])):  # read-ahead batches must not count
            next(loader)
        began = time.perf_counter()
        for _ in range(count):
            next(loader)
        seconds = time.perf_counter() - began
        alone = sum(multihost.all_gather(count * section["batch_size"] / jax.process_count() / seconds))
        began, waited = time.perf_counter(), loader.wait_seconds
        call = functools.partial(_fed_step, job, step, loader)
        timed = spread(time_calls(call, count, ahead=AHEAD, period=job.vae_every))
        share = (loader.wait_seconds - waited) / (time.perf_counter() - began)
    fed = {"images_per_second": section["batch_size"] / timed["median"], "input_wait": max(multihost.all_gather(share))}
    return {"images_per_second": alone, "workers": section["workers"], "processes": jax.process_count(), "with_step": fed}


def _fed_step(job, step, loader):
    return step(sharding.put_batch(job.mesh, next(loader)))


def _source(job, frozen):
    if not job.config["data"]["cache"]:
        return training_data.make_images(job.config)
    return training_data.make_cached_source(job, fingerprint(frozen["vae"]))


def write_profile(step: Step, batch: Mapping[str, Array], folder: Path | str) -> None:
    """Writes a trace of a few steps for TensorBoard, XProf or Perfetto."""
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED):
            metrics = step(batch)
        jax.block_until_ready(metrics)
