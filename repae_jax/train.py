"""Training: `python -m repae_jax.train --config configs/repae.py --workdir runs/repae`.

Only plumbing lives here; the algorithm is `repae_jax/train_step.py`. Runs resume by themselves: the same command with the same
workdir continues, bit for bit. In several processes, one per host or per GPU, it is the same command with --distributed; then
every process loads its share of every batch, all save, and process 0 writes metrics and pictures.
"""

import collections
import contextlib
import functools
import math
import os
import sys
import time

import jax
from absl import flags, logging

from repae_jax import buckets, cli
from repae_jax.cost import flops
from repae_jax.data.latents import records_hash
from repae_jax.data.loader import too_many_bad
from repae_jax.distributed import multihost, sharding
from repae_jax.evaluation.hooks import load_fid, make_hooks, pending_hooks
from repae_jax.job import build, compilation, frozen_weights, initial_state, training_data
from repae_jax.training import ownership
from repae_jax.training.checkpoint import Checkpointer, check_name, fingerprint, prepare_workdir
from repae_jax.training.metric_log import Progress, open_writer


class TrainingStopped(multihost.CollectiveError):
    """Too many updates in a row were not finite, or too many images undecodable."""


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


def input_so_far(loader, source, max_bad_fraction):
    """What the loaders of all processes tell, in one exchange.

    Returns:
      (the loader's state with the bad records of all processes, seconds that each process waited for input so far).

    Raises:
      TrainingStopped: if the bad records are too many, as in one loader.
    """
    position = loader.state()
    found = multihost.gather([position["bad_records"], loader.wait_seconds])
    bad, allowed = sorted({record for records, _ in found for record in records}), int(max_bad_fraction * len(source))
    if len(bad) > allowed:
        raise TrainingStopped(too_many_bad(source, bad, allowed, "in the log of the process that met it"))
    return {**position, "bad_records": bad}, [waited for _, waited in found]


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


def train(config, workdir):
    """Train until config.steps, from the newest checkpoint of the workdir if it has one.

    Args:
      config: ConfigDict, see configs/.
      workdir: folder of the run.

    Returns:
      (state, finished): the TrainState; False if SIGTERM or Ctrl-C ended the run early, its state saved. Both None and False if
        it ended before the first step of this start: there was nothing to save.

    Raises:
      ValueError: for anything wrong with config, data or workdir, or not the same in all processes, before the first
        compilation; if another run uses the workdir.
      CollectiveError: if too many updates in a row were not finite, too many images undecodable, or the state is not finite; if
        the first checkpoint cannot be read, or another run has taken the workdir.
    """
    began = time.monotonic()

    def is_to_end(what):
        """Returns whether to end before the first step; says so."""
        if not stopped():
            return False
        logging.warning(
            "asked to stop while %s, %.0f s after the start: nothing was trained since then, and nothing is lost. A time limit "
            "must be longer than the start; the next one is quicker by what is in the cache of compiled programs. Run the same "
            "command to continue", what, time.monotonic() - began,
        )  # fmt: skip
        return True

    # ---- everything that can be wrong is found here -----------------------------------------------------------------
    multihost.assert_same_config(build.plain_config(config))
    job = build.build(config)
    compilation.check_compiler_options(job)
    workdir = prepare_workdir(workdir)
    multihost.check_shared(workdir)
    # a wrong path is found before anything is loaded
    images_source = None if config.data.cache else training_data.make_images(config)
    steps, every = config.steps, config.checkpoint.every
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(multihost.stop_requests())
        check_owner = stack.enter_context(ownership.owned(workdir))
        scoring = load_fid(job)
        checkpointer = stack.enter_context(
            Checkpointer(workdir, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
        )
        with buckets.reached(workdir):
            restored = checkpointer.restore(initial_state.abstract_state(job), job.config)  # refuses another run's workdir
        if is_to_end("restoring"):
            return None, False
        frozen = frozen_weights.load_frozen(job)
        frozen_vae = fingerprint(frozen["vae"]) if job.frozen_vae else None
        source = images_source or training_data.make_cached_source(job, frozen_vae)
        inputs = {"frozen_vae": frozen_vae, "records": records_hash(source)}
        # what hosts must agree on, but may be made anew before a run is continued
        multihost.assert_same(data=inputs, files=getattr(source, "contents_hash", None))

        if is_to_end("loading weights"):
            return None, False
        # ---- state and data ---------------------------------------------------------------------------------------------
        loader = stack.enter_context(training_data.make_loader(job, source))
        put = functools.partial(sharding.put_batch, job.mesh)
        if restored is None:
            with training_data.make_loader(job, source) as first_batches:
                state = initial_state.create_initial_state(job, frozen, lambda: map(put, first_batches))
            start = int(state.step)  # not 0 if config.init.checkpoint has taken steps
            loader.restore({"next_batch": start, "bad_records": [], "records": len(source)})
        else:
            state, data_state, start = restored
            loader.restore(data_state["loader"])
            check_inputs(data_state["inputs"], inputs, workdir)
            logging.info("continuing from step %d", start)
        flop_per_image = sum(flops.of_step(job).values())
        peak = flops.peak(job.mesh.devices.flat[0].device_kind, config.precision.compute)
        logging.info("%s", summary(job, state, source, flop_per_image, peak))
        writer = stack.enter_context(open_writer(workdir, start))
        hooks = make_hooks(job, frozen, source, workdir, writer, scoring, stopped)
        if is_to_end("preparing"):
            return None, False
        for hook in pending_hooks(hooks, start, steps) if restored else ():  # it was asked to stop, or killed
            hook.run(start, state)

        # ---- the loop ---------------------------------------------------------------------------------------------------
        key, step_fn, is_read_back = jax.random.key(job.config["seed"]), None, False
        pending = collections.deque()  # metrics are read two steps late, so that the device never waits
        for step in range(start + 1, steps + 1):
            batch = put(next(loader))
            if step_fn is None:
                step_fn = compilation.jit_step(job, state).lower(state, batch, frozen, key).compile()
                if is_to_end("compiling"):
                    return None, False
            state, metrics = step_fn(state, batch, frozen, key)
            pending.append((step, metrics))
            stopping, asked = stopped(), time.monotonic()  # asked once: a signal that comes later ends the next step
            last = step == steps or stopping
            saving, logged = step % every == 0 or last, step % config.log.every == 0 or last or step == 1
            while pending and (saving or pending[0][0] <= step - 2):
                check_finite(*pending.popleft(), config.max_skipped_in_a_row)
            first = step == start + 1
            if first:
                jax.block_until_ready(metrics)
            if saving or logged or first:
                position, waited = input_so_far(loader, source, config.data.max_bad_fraction)
            if first:
                progress = Progress(  # compilation is not speed
                    steps, step, config.data.batch_size, flop_per_image=flop_per_image, devices=job.mesh.size, peak=peak,
                    waited=waited,
                )  # fmt: skip
            if logged:
                values = {name: float(value) for name, value in metrics.items()}
                values["bad_records"] = len(position["bad_records"])
                speed = {} if first else progress.update(step, waited)
                writer.write_scalars(step, values | speed)
                if jax.process_index() == 0:
                    print(progress.line(step, {name: values[name] for name in shown(values)}), flush=True)
            due = [hook for hook in hooks if hook.is_due(step, steps) and (not stopping or step == steps)]
            if due:
                jax.block_until_ready(metrics)  # else the pause would count the time of steps in flight as theirs
            with progress.paused():
                if saving:  # before the pictures: they may take long, or fail
                    check_owner()  # first: in a bucket, another run's metrics would be replaced
                    writer.flush()
                    saved = checkpointer.save(step, state, {"loader": position, "inputs": inputs}, job.config)
                    if saved and not is_read_back and not stopping:  # which would take the time that is left
                        checkpointer.read_back(step, state)
                        is_read_back = True
                for hook in due:
                    hook.run(step, state)
            if stopping and step < steps:
                checkpointer.wait()
                logging.warning(
                    "asked to stop: saved step %d; run the same command to continue. Ending the step and saving took %.1f s, "
                    "which the time between signal and kill must exceed", step, time.monotonic() - asked,
                )  # fmt: skip
                return state, False
        checkpointer.wait()
    return state, True


def shown(values):
    """Names of the metrics worth a place on the progress line; the files hold them all."""
    names = [name for name in values if name.startswith(("vae/", "sit/")) and not name.endswith("kl")]
    return names + [name for name in ("disc/loss", "skipped", "bad_records") if values.get(name)]


def summary(job, state, source, flop_per_image, peak):
    """One paragraph on what is about to run; `peak` is None if unknown."""

    def count(net):
        return "-" if net is None else f"{sum(x.size for x in jax.tree.leaves(net.params)) / 1e6:.1f} M"

    kind = job.mesh.devices.flat[0].device_kind
    share = f"of {kind}'s {peak / 1e12:.0f} TFLOP/s: MFU" if peak else f"the peak of {kind} is not known: no MFU"
    return (
        f"{job.config['job']}: {len(source)} images in {source.num_classes} classes; VAE {count(state.vae)}, "
        f"SiT {count(state.sit)}, discriminator {count(state.disc)} parameters; latents {job.latent_shape}; encoders "
        f"{[encoder.name for encoder in job.encoders]}; mesh {dict(job.mesh.shape)} of {kind}; "
        f"{flop_per_image / 1e12:.3g} TFLOP per image ({share})"
    )


def define_flags():
    """Defines the flags of this program."""
    cli.define_config()
    cli.define_path("workdir", "Folder of the run: checkpoints, metrics, pictures. Continued if it exists.")
    cli.define_processes()
    flags.mark_flag_as_required("workdir")


def main(_):
    """Entry point; exit code 75 says that a signal ended the run early."""
    options = flags.FLAGS
    with multihost.abort_all_on_error(), cli.ending():
        cli.start_processes()
        check_name(options.workdir)
        compilation.use_compilation_cache(options.workdir)  # creates a folder there
        _, finished = train(options.config, options.workdir)
    if not finished:
        sys.exit(os.EX_TEMPFAIL)
    if jax.process_index() == 0:
        print(f"finished; everything is in {options.workdir}")


if __name__ == "__main__":
    jax.config.config_with_absl()
    cli.run(main, define_flags)
