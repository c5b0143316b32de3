"""What is measured of a built config, on random batches unless it is the input's speed."""

import copy
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.benchmark import parts
from repae_jax.benchmark.timing import spread, time_calls
from repae_jax.cost import flops, hlo_cost
from repae_jax.distributed import multihost, sharding
from repae_jax.job import build
from repae_jax.sampling import generate
from repae_jax.training.checkpoint import fingerprint
from repae_jax.training.metric_log import arithmetic_speed

AHEAD = 2  # steps that training dispatches before it waits for one
SAMPLED = 3  # batches that are sampled and timed
PROFILED = 3  # steps in a trace
NOISE = 0.02  # on initial parameters
OUT_OF_MEMORY = "out of memory"


def without_files(config):
    """The config with random weights in the place of frozen ones that are not given as a file or folder that is here.

    Args:
      config: nested dict, its fields checked.

    Returns:
      (config, names of the fields that became random).
    """
    config = copy.deepcopy(config)
    fields = [(f"encoders.{name}.weights", entry, ("weights",)) for name, entry in sorted(config["encoders"].items())]
    if config["loss"].get("vae", {}).get("lpips"):
        fields.append(("lpips", config["lpips"], ("vgg16", "linear")))
    if not any(config["loss"].get("vae", {}).values()):
        fields.append(("init.vae", config["init"], ("vae",)))
    random = []
    for name, section, where in fields:
        path = section[where[0]]
        if not path or not ("://" in path or Path(path).expanduser().exists()):  # a name on the hub is no file
            random.append(name)
            section.update(dict.fromkeys(where, build.RANDOM))
    return config, random


def random_state(job):
    """TrainState on the job's mesh, initial but for some noise on all parameters: multiplying by the zeros that a SiT begins
    with takes a device less power, and so less time, than what training soon multiplies by."""

    def noisy(params, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([x + NOISE * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)])

    def make(key):
        state = build.initial_state(job, key)
        for index, name in enumerate(("vae", "disc", "sit")):
            if (net := getattr(state, name)) is not None:
                state = state.replace(**{name: net.replace(params=noisy(net.params, jax.random.fold_in(key, index)))})
        if state.ema is not None:
            averaged = state.vae if state.sit is None else state.sit
            state = state.replace(ema=state.ema.replace(params=jax.tree.map(jnp.copy, averaged.params)))
        return state

    shardings = jax.tree.map(lambda x: x.sharding, build.abstract_state(job))
    return jax.jit(make, out_shardings=shardings)(jax.random.key(job.config["seed"]))


def random_batch(job):
    """A batch as the config's loader would give it, on the mesh."""
    highs, rng = {"image": 256, "label": job.config["data"]["num_classes"]}, np.random.default_rng(jax.process_index())

    def draw(name, array):
        shape = (array.shape[0] // jax.process_count(), *array.shape[1:])
        return rng.integers(0, highs[name], shape, array.dtype) if name in highs else rng.standard_normal(shape, array.dtype)

    abstract, _, _ = build.abstract_inputs(job)
    return sharding.put_batch(job.mesh, {name: draw(name, array) for name, array in abstract.items()})


def random_pixels(job, count):
    """uint8 [count, H, W, 3] on the mesh, `count` over all processes."""
    size = job.config["data"]["image_size"]
    rng = np.random.default_rng(jax.process_index())
    return sharding.put_batch(job.mesh, rng.integers(0, 256, (count // jax.process_count(), size, size, 3), np.uint8))


def compile_step(job, state, batch, frozen, key):
    """(the step as training compiles it, seconds that this took)."""
    return _compile(build.jit_step(job, state), state, batch, frozen, key)


def _compile(function, *arguments):
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - began


class Step:
    """The compiled step with the state that it carries on.

    Args:
      compiled: what `compile_step` returns.
      state: TrainState; donated by the first call.
      frozen, key: further arguments.
    """

    def __init__(self, compiled, state, frozen, key):
        self.state = state
        self._compiled, self._frozen, self._key = compiled, frozen, key

    def __call__(self, batch):
        """Dispatches one step; returns its metrics."""
        self.state, metrics = self._compiled(self.state, batch, self._frozen, self._key)
        return metrics


def speed_of(job, seconds, count, flop):
    """What follows from the time that something takes for some images.

    Args:
      job: Job.
      seconds: of the median.
      count: images, over all devices.
      flop: per image, without recomputation; None if unknown.

    Returns:
      dict: images_per_second, images_per_second_per_device; if `flop` is known, tflop_per_image, tflops_per_device; and mfu,
      None if the device's peak is not known.
    """
    devices, per_second = job.mesh.size, count / seconds
    speed = {"images_per_second": per_second, "images_per_second_per_device": per_second / devices}
    if flop is None:
        return speed
    arithmetic = arithmetic_speed(per_second, flop, devices, peak_of(job))
    return {**speed, "tflop_per_image": flop / 1e12, "mfu": None, **arithmetic}


def peak_of(job):
    """FLOP/s of one device in the config's precision; None if unknown."""
    return flops.peak(job.mesh.devices.flat[0].device_kind, job.config["precision"]["compute"])


def measure_step(job, step, batch, count, what):
    """Speed of the step: seconds_per_step, a spread, and what `speed_of` says of its median."""
    seconds = spread(time_calls(lambda: step(batch), count, ahead=AHEAD, what=what))
    flop = flops.per_image(job.config, job.encoders)
    return {"seconds_per_step": seconds, **speed_of(job, seconds["median"], job.config["data"]["batch_size"], flop)}


def memory_of(compiled):
    """Bytes of one device: the most that was in use so far, if the device tells, and what the compiler planned."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    stats = compiled.memory_analysis()
    return {
        "peak_bytes_in_use": max((stats.get("peak_bytes_in_use", 0) for stats in told), default=0) or None,
        "bytes_limit": told[0].get("bytes_limit"),
        "compiled": None if stats is None else hlo_cost.memory(stats),
    }


def measure_parts(job, state, frozen, count, step_seconds):
    """Seconds per step of every part, alone.

    Args:
      job: Job.
      state: TrainState; donated.
      frozen: what `build.load_frozen` returns.
      count: calls that are timed.
      step_seconds: of the whole step.

    Yields:
      (name, {'seconds_per_step': spread, 'share_of_step': …} and, of the networks, what `speed_of` says but images per second;
      or {'failed': …} if the part alone does not fit), as soon as each is measured.
    """
    config, accumulation = job.config, job.recipe.accumulation
    batch_size = config["data"]["batch_size"]
    make = jax.jit(functools.partial(parts.make_batch, job), out_shardings=sharding.batch_sharding(job.mesh))
    sizes, key = (batch_size, batch_size // accumulation), jax.random.key(config["seed"])
    batches = [make(random_pixels(job, size), key) for size in sizes]
    costs = flops.parts(config, job.encoders)
    if job.recipe.eq_scales:
        costs = {}  # are means over scales, of which only the first is measured here

    def result(name, repeated, time_it):
        try:
            seconds = spread(repeated * time_it())
        except jax.errors.JaxRuntimeError as error:
            if not only_this_failed(error):
                raise
            return {"failed": OUT_OF_MEMORY}
        found = {"seconds_per_step": seconds, "share_of_step": seconds["median"] / step_seconds}
        if name in costs:
            speed = speed_of(job, seconds["median"], batch_size, costs[name])
            found |= {field: value for field, value in speed.items() if not field.startswith("images")}
        return found

    for name, part in parts.make_parts(job, state, frozen, *batches).items():
        yield name, result(name, 1 if part.of_whole else accumulation, functools.partial(time_part, job, part, count))
    yield "update", result("update", 1, functools.partial(time_update, job, state, count))


def time_part(job, part, count):
    """Seconds per call of a Part, as `time_calls` returns them."""
    options = build.compiler_options(job)
    function = sharding.with_mesh_context(job.mesh, part.function)
    run = jax.jit(function, out_shardings=part.out_shardings, compiler_options=options)
    compiled, _ = _compile(run, *part.arguments)
    return time_calls(lambda: compiled(*part.arguments), count, ahead=1)


def time_update(job, state, count):
    """Seconds per call of optimizers and averages, which change the state: it is donated."""
    nets = {name: net.params for name in ("vae", "disc", "sit") if (net := getattr(state, name)) is not None}
    shardings = jax.tree.map(lambda x: x.sharding, (state, nets))
    grads = jax.jit(functools.partial(jax.tree.map, lambda x: NOISE * x), out_shardings=shardings[1])(nets)
    function = functools.partial(parts.update, tx=job.tx, recipe=job.recipe)
    outs = (shardings[0], sharding.replicated(job.mesh))
    options = build.compiler_options(job)
    compiled, _ = _compile(jax.jit(function, donate_argnums=0, out_shardings=outs, compiler_options=options), state, grads)
    holder = [state]

    def call():
        holder[0], metrics = compiled(holder[0], grads)
        return metrics

    return time_calls(call, count, ahead=1)


def is_out_of_memory(error):
    """Whether a JaxRuntimeError says that a program did not fit."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def only_this_failed(error):
    """Whether to go on with what needs less memory; other processes may not have run out of it, and would wait."""
    return jax.process_count() == 1 and is_out_of_memory(error)


def measure_sampling(job, state, frozen, batch_size):
    """Speed of the config's sampler: its settings, seconds_per_batch, a spread, and what `speed_of` says; or 'failed'."""
    sampling, rows = job.sampling, sharding.batch_sharding(job.mesh)
    run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, sampling)
    run = jax.jit(sharding.with_mesh_context(job.mesh, run), out_shardings=rows)
    labels = sharding.put(np.arange(batch_size, dtype=np.int32) % job.config["data"]["num_classes"], rows)
    ids = sharding.put(np.arange(batch_size), rows)
    arguments = (generate.sampling_params(state, frozen), labels, ids, jax.random.key(job.config["seed"]))
    settings = {"batch_size": batch_size, "sampler": sampling.sampler, "steps": sampling.steps}
    settings["guidance_scale"] = sampling.guidance_scale
    try:
        compiled, compile_seconds = _compile(run, *arguments)
        seconds = spread(time_calls(lambda: compiled(*arguments), SAMPLED, ahead=1, warm_up=1))
    except jax.errors.JaxRuntimeError as error:
        if not only_this_failed(error):
            raise
        return {**settings, "failed": OUT_OF_MEMORY}
    flop = sum(flops.sampling_parts(job.config, sampling).values())
    speed = speed_of(job, seconds["median"], batch_size, flop)
    del speed["mfu"]  # in float32, whatever the config's precision: its peak is another one
    return {**settings, "seconds_per_batch": seconds, **speed, "compile_seconds": compile_seconds}


def measure_input(job, step, frozen, count):
    """Speed of the config's loader alone, and of the step when it is fed by it.

    Args:
      job: Job.
      step: Step.
      frozen: what `build.load_frozen` returns.
      count: batches that are timed, each time.

    Returns:
      dict: images_per_second of the loader alone, over all processes; workers; with_step: {'images_per_second', 'input_wait'},
      the share of the time in which there was no batch. Or {'skipped': why}, if the data is not there.
    """
    source, problem = None, None
    try:
        source = _source(job, frozen)
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    problems = [problem for problem in multihost.gather(problem) if problem]
    if problems:
        return {"skipped": problems[0]}
    section = job.config["data"]
    with build.make_loader(job, source) as loader:
        for _ in range(max(8, 4 * section["workers"])):  # what is read ahead when timing begins
            next(loader)
        began = time.perf_counter()
        for _ in range(count):
            next(loader)
        seconds = time.perf_counter() - began
        alone = sum(multihost.gather(count * section["batch_size"] / jax.process_count() / seconds))
        began, waited = time.perf_counter(), loader.wait_seconds
        timed = spread(time_calls(lambda: step(sharding.put_batch(job.mesh, next(loader))), count, ahead=AHEAD))
        share = (loader.wait_seconds - waited) / (time.perf_counter() - began)
    fed = {"images_per_second": section["batch_size"] / timed["median"], "input_wait": max(multihost.gather(share))}
    return {"images_per_second": alone, "workers": section["workers"], "processes": jax.process_count(), "with_step": fed}


def _source(job, frozen):
    if not job.config["data"]["cache"]:
        return build.make_images(job.config)
    return build.make_cached_source(job, fingerprint(frozen["vae"]))


def write_profile(step, batch, folder):
    """Writes a trace of a few steps for TensorBoard, XProf or Perfetto."""
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED):
            metrics = step(batch)
        jax.block_until_ready(metrics)
