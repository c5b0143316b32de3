"""Training: `python -m repae_jax.train --config configs/repae.py --workdir runs/repae`.

Only plumbing lives here; the algorithm is `repae_jax/train_step.py`. Runs resume by themselves: the same command with the same
workdir continues, bit for bit.
"""

import collections
import contextlib
import functools
import math
import signal
import sys
import threading

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from repae_jax import build, generate, images, inception_features, reference_stats, sharding
from repae_jax.checkpoint import Checkpointer, fingerprint, prepare_workdir
from repae_jax.data.latents import records_hash
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.run_log import Progress, make_writer

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/repae.py or configs/repae.py:digits.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, pictures. Continued if it exists.")


FID_BATCH = 64  # samples at a time at least, over all devices


class TrainingStopped(RuntimeError):
    """Too many updates in a row were not finite."""


@contextlib.contextmanager
def stop_signal():
    """Event that is set by SIGTERM and by the first Ctrl-C; the handlers before are restored afterwards."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _):
        event.set()
        signal.signal(number, before[number])  # a second one acts at once

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(step, metrics, limit):
    """Log a skipped update with its terms; TrainingStopped once `limit` of them came in a row."""
    in_a_row = int(metrics["skipped_in_a_row"])
    if not in_a_row:
        return
    bad = ", ".join(f"{name}={float(value)}" for name, value in sorted(metrics.items()) if not math.isfinite(value))
    logging.warning("step %d: update skipped, not finite: %s", step, bad)
    if in_a_row >= limit:
        raise TrainingStopped(
            f"stopped at step {step}: {in_a_row} updates in a row (from step {step - in_a_row + 1}) were skipped because "
            f"these were not finite: {bad}. Parameters are those of step {step - in_a_row}; the last checkpoint is intact. "
            f"Start a run in a new workdir with a lower learning rate for the network named, or with "
            f"config.precision.compute='float32'; a term that is infinite from the first step on points at the data or at "
            f"the weights of config.init"
        )


def check_inputs(before, now, workdir):
    """ValueError if a run would be continued on another frozen VAE or on other images than it began with.

    Args:
      before: {'frozen_vae': fingerprint of its weights or None, 'records': hash of the images' names and labels}.
      now: likewise.
      workdir: of the run.
    """
    for name, what in (("frozen_vae", "frozen VAE than config.init.vae"), ("records", "set of images than config.data")):
        if before[name] != now[name]:
            raise ValueError(
                f"the run in {workdir} was trained on another {what} gives now (hash {before[name]}, now {now[name]}): give "
                "the same, or another workdir"
            )


def load_scoring(job):
    """(InceptionNetwork, Reference) of the FID during training, None if none is wanted."""
    section = job.config["hooks"]
    if not section.get("fid_every"):
        return None
    batch_size = job.mesh.size * -(-FID_BATCH // job.mesh.size)
    network = inception_features.load_network(section["fid_inception"], batch_size, list(job.mesh.devices.flat))
    reference = reference_stats.read_reference(section["fid_reference"], network)
    reference_stats.check_shape([job.config["data"]["image_size"]] * 2, reference, section["fid_reference"])
    for warning in reference_stats.count_warnings(section["fid_samples"], reference):
        logging.warning("config.hooks.fid_samples: %s", warning)
    return network, reference


def make_hooks(job, frozen, source, workdir, writer, scoring, stopped):
    """Pictures and scores during training: list of (every, function of (step, state)); of what the job trains."""
    section = job.config["hooks"]
    count, num_classes = section["images"], job.config["data"]["num_classes"]
    columns, scale = math.ceil(math.sqrt(count)), images.viewing_scale(job.config["data"]["image_size"])
    placed = functools.partial(jax.device_put, device=sharding.replicated(job.mesh))

    def save(kind, step, picture):
        if jax.process_index() == 0:
            folder = workdir / kind
            folder.mkdir(exist_ok=True)
            images.save_png(folder / f"{step:07d}.png", picture)
            writer.write_images(step, {kind: picture[None]})

    def make_samples():
        run = jax.jit(generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling))
        labels, ids = placed(np.arange(count, dtype=np.int32) * num_classes // count), placed(np.arange(count))

        def samples(step, state):
            made, _ = run(generate.sampling_params(state, frozen), labels, ids, jax.random.key(job.config["seed"]))
            save("samples", step, images.grid(np.asarray(made), columns, scale=scale))

        return samples

    def make_reconstructions():
        run = jax.jit(generate.make_reconstruct(job.nets))
        with build.make_loader(job, source, workers=0) as first_batches:  # a loader passes over undecodable files
            originals = next(first_batches)["image"][:count]

        def reconstructions(step, state):
            params = state.ema.params if job.nets.sit is None else state.vae.params
            recon = np.asarray(run(params, placed(images.to_float(originals))))
            pairs = np.stack([originals, recon], axis=1).reshape(-1, *originals.shape[1:])
            save("reconstructions", step, images.grid(pairs, 2 * math.ceil(columns / 2), scale=scale))

        return reconstructions

    def make_fid():
        network, reference = scoring
        run = jax.jit(generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling))
        labels = np.arange(section["fid_samples"], dtype=np.int32) % num_classes
        put = functools.partial(jax.device_put, device=sharding.batch_sharding(job.mesh))

        def fid(step, state):
            params, key = generate.sampling_params(state, frozen), jax.random.key(job.config["seed"])
            made = generate.in_batches(run, params, labels, network.batch_size, key, put)
            shown = tqdm(made, f"step {step}: samples", -(-len(labels) // network.batch_size), unit="batch", leave=False)
            pool = RunningGaussian()
            try:
                for _, batch in shown:
                    if stopped.is_set():
                        return
                    pool.update(network(batch).pool)
            except generate.SamplesNotFinite as error:
                logging.warning("step %d: no FID: %s", step, error)
            else:
                distance = frechet_distance(*pool.stats(), *reference.pool)
                writer.write_scalars(step, {f"fid/{len(labels)}_samples": distance})

        return fid

    hooks = []
    if scoring:
        hooks.append((section["fid_every"], make_fid()))
    if section.get("samples_every"):
        hooks.append((section["samples_every"], make_samples()))
    if section.get("reconstructions_every") and not job.frozen_vae:
        hooks.append((section["reconstructions_every"], make_reconstructions()))
    return hooks


def train(config, workdir):
    """Train until config.steps, from the newest checkpoint of the workdir if it has one.

    Args:
      config: ConfigDict, see configs/.
      workdir: folder of the run.

    Returns:
      (state, finished): the TrainState; False if SIGTERM or Ctrl-C ended the run early, its state saved.

    Raises:
      ValueError: for anything wrong with config, data or workdir, before the first compilation.
      TrainingStopped: if too many updates in a row were not finite.
    """
    # ---- everything that can be wrong is found here -----------------------------------------------------------------
    if jax.process_count() > 1:
        raise ValueError(
            f"training runs in one process with all its devices; jax.distributed has {jax.process_count()} of them"
        )
    job = build.build(config)
    workdir = prepare_workdir(workdir)
    images_source = None if config.data.cache else build.make_images(config)  # a wrong path is found before anything is loaded
    scoring = load_scoring(job)
    steps, every = config.steps, config.checkpoint.every
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            Checkpointer(workdir, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
        )
        restored = checkpointer.restore(build.abstract_state(job), job.config)  # refuses another run's workdir
        frozen = build.load_frozen(job)
        frozen_vae = fingerprint(frozen["vae"]) if job.frozen_vae else None
        source = images_source or build.make_cached_source(job, frozen_vae)
        inputs = {"frozen_vae": frozen_vae, "records": records_hash(source)}

        # ---- state and data ---------------------------------------------------------------------------------------------
        loader = stack.enter_context(build.make_loader(job, source))
        put = functools.partial(sharding.put_batch, job.mesh)
        if restored is None:
            with build.make_loader(job, source) as first_batches:
                state = build.create_initial_state(job, frozen, lambda: map(put, first_batches))
            start = int(state.step)  # not 0 if config.init.checkpoint has taken steps
            loader.restore({"next_batch": start, "bad_records": [], "records": len(source)})
        else:
            state, data_state, start = restored
            loader.restore(data_state["loader"])
            check_inputs(data_state["inputs"], inputs, workdir)
            logging.info("continuing from step %d", start)
        logging.info("%s", summary(job, state, source))
        writer = make_writer(workdir, start)
        stack.callback(writer.close)
        stopped = stack.enter_context(stop_signal())
        hooks = make_hooks(job, frozen, source, workdir, writer, scoring, stopped)

        # ---- the loop ---------------------------------------------------------------------------------------------------
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step_fn = jax.jit(job.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(job.mesh)))
        key = jax.random.key(job.config["seed"])
        pending = collections.deque()  # metrics are read two steps late, so that the device never waits
        for step in range(start + 1, steps + 1):
            state, metrics = step_fn(state, put(next(loader)), frozen, key)
            pending.append((step, metrics))
            stopping = stopped.is_set()  # read once: a signal that comes later ends the next step
            last = step == steps or stopping
            while pending and (last or step % every == 0 or pending[0][0] <= step - 2):
                check_finite(*pending.popleft(), config.max_skipped_in_a_row)
            if step == start + 1:
                jax.block_until_ready(metrics)
                progress = Progress(steps, step, config.data.batch_size)  # compilation is not speed
            if step % config.log.every == 0 or last or step == 1:
                values = {name: float(value) for name, value in metrics.items()} | {"bad_records": loader.bad_records}
                speed = progress.update(step) if step > start + 1 else {}
                writer.write_scalars(step, values | speed)
                if jax.process_index() == 0:
                    print(progress.line(step, {name: values[name] for name in shown(values)}), flush=True)
            with progress.paused():
                if step % every == 0 or last:  # before the pictures: they may take long, or fail
                    writer.flush()
                    checkpointer.save(step, state, {"loader": loader.state(), "inputs": inputs}, job.config)
                for hook_every, hook in hooks:
                    if (step % hook_every == 0 and not stopping) or step == steps:
                        hook(step, state)
            if stopping and step < steps:
                checkpointer.wait()
                logging.warning("asked to stop: saved step %d; run the same command to continue", step)
                return state, False
        checkpointer.wait()
    return state, True


def shown(values):
    """Names of the metrics worth a place on the progress line; the files hold them all."""
    names = [name for name in values if name.startswith(("vae/", "sit/")) and not name.endswith("kl")]
    return names + [name for name in ("disc/loss", "skipped", "bad_records") if values.get(name)]


def summary(job, state, source):
    """One paragraph on what is about to run."""

    def count(net):
        return "-" if net is None else f"{sum(x.size for x in jax.tree.leaves(net.params)) / 1e6:.1f} M"

    return (
        f"{job.config['job']}: {len(source)} images in {source.num_classes} classes; VAE {count(state.vae)}, "
        f"SiT {count(state.sit)}, discriminator {count(state.disc)} parameters; latents {job.latent_shape}; encoders "
        f"{[encoder.name for encoder in job.encoders]}; mesh {dict(job.mesh.shape)} of {job.mesh.devices.flat[0].device_kind}"
    )


def parse_flags(arguments):
    """absl's, but a config file or field that does not exist ends in a message, not in a traceback."""
    try:
        rest = app.parse_flags_with_usage(arguments)
        _CONFIG.value.keys  # noqa: B018 (reading a config that could not be loaded raises)
    except AttributeError as error:
        if not isinstance(error.args[0], KeyError):  # ConfigDict's own
            raise
        sys.exit(f"error: the config has no field {' '.join(error.args[0].args[0].split())}")
    except OSError as error:
        sys.exit(f"error: {error}")
    return rest


def main(_):
    """Entry point: config mistakes end in one line, not in a traceback."""
    try:
        _, finished = train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, FileNotFoundError, ImportError, RuntimeError) as error:
        if is_internal(error):
            raise
        sys.exit(f"error: {error}")
    if finished:
        print(f"finished; everything is in {_WORKDIR.value}")


def is_internal(error):
    """Errors raised by our own checks are for the user; those from inside jax deserve their traceback."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package not in ("repae_jax", "checkpoints_tools", "configs", "__main__")  # this file is __main__


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    jax.config.config_with_absl()
    app.run(main, flags_parser=parse_flags)
