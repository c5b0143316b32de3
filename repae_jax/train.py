"""Training: `python -m repae_jax.train --config configs/repae.py --workdir runs/repae`.

Only plumbing lives here; the algorithm is `repae_jax/train_step.py`. Runs resume by themselves: the same command with the same
workdir continues, bit for bit. In several processes, one per host or per GPU, it is the same command with --distributed; then
every process loads its share of every batch, all save, and process 0 writes metrics and pictures.

With --then, a run has two phases: joint training, and then a new SiT on its VAE, frozen (`repae_jax/job/two_phases.py`).
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath

from repae_jax import buckets, cache_latents, cli
from repae_jax.cost import flops
from repae_jax.data.latents import records_hash
from repae_jax.data.loader import Loader, too_many_bad
from repae_jax.distributed import multihost, sharding, stopping
from repae_jax.distributed.compilation_cache import reading_programs, use_compilation_cache
from repae_jax.evaluation.hooks import Hook, load_fid, make_hooks, pending_hooks
from repae_jax.evaluation.metrics_file import read_metrics
from repae_jax.job import build, compilation, frozen_weights, initial_state, training_data, two_phases
from repae_jax.training import health, ownership, trackers
from repae_jax.training.checkpoint import Checkpointer, fingerprint
from repae_jax.training.metric_log import Progress, arithmetic_speed, open_writer
from repae_jax.training.phases import PHASES
from repae_jax.training.state import TrainState
from repae_jax.training.workdir import check_name, prepare_workdir


class TrainingStopped(multihost.CollectiveError):
    """Too many updates in a row were not finite, or too many images undecodable."""


def check_finite(step, metrics, limit):
    """Logs a skipped update with its terms; raises TrainingStopped after `limit` of them in a row."""
    in_a_row = int(metrics["skipped_in_a_row"])
    if not in_a_row:
        return
    bad = ", ".join(f"{name}={float(value)}" for name, value in sorted(metrics.items()) if not math.isfinite(value))
    logging.warning("step %d: update skipped, not finite: %s", step, bad)
    if in_a_row >= limit:
        raise TrainingStopped(
            f"stopped at step {step}: {in_a_row} updates in a row (from step {step - in_a_row + 1}) were skipped because "
            f"these were not finite: {bad}. Parameters are those of step {step - in_a_row}; the last checkpoint is intact. "
            "Start a run in a new workdir with a lower learning rate for the network named, or with config.precision.compute="
            "'float32'; a term that is infinite from the first step on points at the data or at the weights of config.init"
        )


def input_so_far(loader, source, max_bad_fraction):
    """Returns (the loader's state with the bad records of all processes, seconds that each waited for input so far).

    TrainingStopped if the bad records are too many.
    """
    position = loader.state()
    gathered = multihost.all_gather([position["bad_records"], loader.wait_seconds])
    bad, allowed = sorted({record for records, _ in gathered for record in records}), int(max_bad_fraction * len(source))
    if len(bad) > allowed:
        raise TrainingStopped(too_many_bad(source, bad, allowed, "in the log of the process that met it"))
    return {**position, "bad_records": bad}, [waited for _, waited in gathered]


def check_inputs(before, now, workdir):
    """Raises ValueError if a run would be continued on another frozen VAE or on other images than it began with.

    `before` and `now`, of this start, are {'frozen_vae': fingerprint of its weights or None, 'records': hash of the images'
    names and labels}.
    """
    for name, part in (("frozen_vae", "frozen VAE than config.init.vae"), ("records", "set of images than config.data")):
        if before[name] != now[name]:
            raise ValueError(
                f"the run in {workdir} was trained on another {part} gives now (hash {before[name]}, now {now[name]}): give "
                "the same, or another workdir"
            )


class _StoppedEarly(Exception):
    """A signal came before the first step of this start: there is nothing to save."""


@dataclasses.dataclass
class Run:
    """A run that is ready for its next step."""

    job: build.Job
    state: TrainState
    start: int  # number of finished steps, after which `state` is
    frozen: dict[str, Any]
    source: Any
    loader: Loader
    inputs: dict[str, str | None]  # hashes of the frozen VAE and of the images, see `check_inputs`
    pending: dict[str, Any]  # metrics not logged yet, of which the next step may lack some; empty if it lacks none
    writer: Any
    watch: health.Watch
    hooks: list[Hook]
    checkpointer: Checkpointer
    arithmetic: Callable[[float], dict[str, float]]  # function of images per second, see `metric_log.arithmetic_speed`
    check_owner: Callable[[], None]  # raises WorkdirLost if the workdir has become another run's
    stopped: Callable[[], bool]  # see `stopping.stop_requests`
    end_if_stopped: Callable[[str], None]  # ends this start, which is busy with the activity named, if it was asked to stop
    _is_read_back: bool = False

    def log(self, step: int, values: dict[str, float], speed: dict[str, float], progress: Progress) -> None:
        """Writes the metrics of a step; process 0 prints a line, too, and warns of what is not healthy."""
        self.writer.write_scalars(step, values | speed)
        if jax.process_index() == 0:
            print(progress.line(step, {name: values[name] for name in shown(values)}), flush=True)
            for warning in self.watch.update(step, values):
                logging.warning("step %d: %s", step, warning)

    def save(self, step: int, position: dict[str, Any], is_stopping: bool) -> None:
        """Saves a checkpoint; the first one is read back, unless that would take the time left before a kill."""
        self.check_owner()  # first: in a bucket, another run's metrics would be replaced
        self.writer.flush()
        data_state = {"loader": position, "inputs": self.inputs}
        if self.pending:
            data_state["pending_metrics"] = {name: float(value) for name, value in self.pending.items()}
        saved = self.checkpointer.save(step, self.state, data_state, self.job.config)
        if saved and not self._is_read_back and not is_stopping:
            self.checkpointer.read_back(step, self.state)
            self._is_read_back = True


def prepare(config, workdir, stack: contextlib.ExitStack) -> Run:
    """Finds everything that can be wrong with a run, then loads or restores what it needs; `stack` closes what is opened."""
    began = time.monotonic()
    multihost.assert_same_config(build.plain_config(config))
    job = build.build(config)
    compilation.check_compiler_options(job)
    if jax.process_index() == 0:
        trackers.check(job.config["log"]["trackers"])
    workdir = prepare_workdir(workdir)
    multihost.check_shared(workdir)
    source = None if config.data.cache else training_data.make_images(config)  # a wrong path is found before anything is loaded
    stopped = stack.enter_context(stopping.stop_requests())
    end_if_stopped = functools.partial(_end_if_stopped, stopped, began)
    check_owner = stack.enter_context(ownership.owned(workdir))
    fid = load_fid(job)

    # ---- the newest checkpoint, frozen weights ----------------------------------------------------------------------
    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    checkpointer = stack.enter_context(Checkpointer(workdir, **keep))
    with buckets.reached(workdir):
        restored = checkpointer.restore(initial_state.abstract_state(job), job.config)  # refuses another run's workdir
    end_if_stopped("restoring")
    frozen = frozen_weights.load_frozen(job)
    frozen_vae = fingerprint(frozen["vae"]) if job.frozen_vae else None
    if source is None:
        source = training_data.make_cached_source(job, frozen_vae)
    inputs = {"frozen_vae": frozen_vae, "records": records_hash(source)}
    # processes must agree on the files' content, too, but files may be prepared anew before a run is continued
    multihost.assert_same(data=inputs, files=getattr(source, "contents_hash", None))
    end_if_stopped("loading weights")

    # ---- state and position in the data -----------------------------------------------------------------------------
    loader = stack.enter_context(training_data.make_loader(job, source))
    pending: dict[str, float] = {}
    if restored is None:
        state = _create_state(job, frozen, source)
        start = int(state.step)  # not 0 if config.init.checkpoint has taken steps
        loader.restore({"next_batch": start, "bad_records": [], "records": len(source)})
    else:
        state, data_state, start = restored
        loader.restore(data_state["loader"])
        check_inputs(data_state["inputs"], inputs, workdir)
        pending = data_state.get("pending_metrics", {})
        logging.info("continuing from step %d", start)

    # ---- reports ----------------------------------------------------------------------------------------------------
    peak = flops.peak(job.mesh.devices.flat[0].device_kind, config.precision.compute)
    cost = {"flop_per_image": sum(flops.of_step(job).values()), "peak": peak}
    logging.info("%s", summary(job, state, source, **cost))
    writer = stack.enter_context(open_writer(workdir, start, job.config))
    watch = _create_watch(config, workdir, start)
    hooks = make_hooks(job, frozen, source, workdir, writer, fid, stopped)
    end_if_stopped("preparing")
    for hook in pending_hooks(hooks, start, config.steps) if restored else ():  # the last start was stopped, or killed
        hook.run(start, state)
    return Run(
        job, state, start, frozen, source, loader, inputs, pending, writer, watch, hooks, checkpointer,
        functools.partial(arithmetic_speed, devices=job.mesh.size, **cost), check_owner, stopped, end_if_stopped,
    )  # fmt: skip


def _create_state(job, frozen, source):
    """Returns the state of a new run."""
    put = functools.partial(sharding.put_batch, job.mesh)
    with training_data.make_loader(job, source) as first_batches:
        return initial_state.create_initial_state(job, frozen, lambda: map(put, first_batches))


def _create_watch(config, workdir, start):
    """Returns what watches the run's metrics, in process 0 with those that earlier starts have logged."""
    watch, path = health.Watch(config.loss.get("align_end")), workdir / "metrics.jsonl"
    with buckets.reached(workdir):
        if start and jax.process_index() == 0 and path.exists():
            watch.replay(read_metrics(path).curves, last_step=start)
    return watch


def _end_if_stopped(stopped, began, activity):
    """Raises _StoppedEarly, with a warning, if this start was asked to stop."""
    if stopped():
        logging.warning(
            "asked to stop while %s, %.0f s after the start: nothing was trained since then, and nothing is lost. A time limit "
            "must be longer than the start; the next one is quicker by what is in the cache of compiled programs. Run the same "
            "command to continue", activity, time.monotonic() - began,
        )  # fmt: skip
        raise _StoppedEarly


def train(config, workdir):
    """Trains by a ConfigDict, see configs/, until config.steps, from the newest checkpoint of the workdir if it has one.

    Returns:
      (the TrainState, whether the run is finished): not if SIGTERM or Ctrl-C ended it early, its state saved. (None, False) if
        it ended before the first step of this start: there was nothing to save.

    Raises:
      ValueError: for anything wrong with config, data or workdir, or not the same in all processes, before the first
        compilation; if another run uses the workdir.
      CollectiveError: if too many updates in a row were not finite, too many images undecodable, or the state is not finite; if
        the first checkpoint cannot be read, or another run has taken the workdir.
    """
    with contextlib.ExitStack() as stack:
        try:
            return run_steps(prepare(config, workdir, stack))
        except _StoppedEarly:
            return None, False


def train_in_two_phases(config, then, workdir, cache: str | None = None) -> bool:
    """Trains jointly, then a new SiT by the ConfigDict `then` on the joint phase's VAE; continues in whichever phase it was.

    Args:
      config: ConfigDict of the joint phase.
      cache: folder for the latents that the second phase reads instead of encoding images at every step; None for none.

    Returns:
      False if a signal ended it early, to be continued.

    Raises:
      As `train`, for either phase before the first one begins.
    """
    two_phases.check_workdir(workdir, is_of_two=True)
    then = two_phases.second_config(config, then, workdir, cache)
    multihost.assert_same_config(build.plain_config(then))
    with two_phases.naming_second():
        job = two_phases.check_second(then)
        if jax.process_index() == 0:
            trackers.check(job.config["log"]["trackers"])
        load_fid(job)
    joint, frozen = (epath.Path(workdir) / name for name in PHASES)
    is_second = two_phases.is_handed_over(workdir)
    if cache:
        two_phases.check_cache(cache, is_second)
    if not is_second:
        logging.info("phase 1 of 2, joint training, in %s", joint)
        finished = train(config, joint)[1]  # with a name its state would stay on the devices through the second phase
        if not finished:
            return False
        two_phases.hand_over(workdir)
    two_phases.check_first(config, workdir)
    logging.info("phase 2 of 2, a SiT on the VAE of the first, %s, in %s", then.init.vae, frozen)
    if cache and cache_latents.cache_latents(then, cache, flips=bool(then.data.flip_probability)) is None:
        logging.warning("asked to stop while latents were cached: what is finished is kept; run the same command to continue")
        return False
    jax.clear_caches()  # programs of the first phase take memory of the devices
    return train(then, frozen)[1]


def run_steps(run: Run) -> tuple[TrainState, bool]:
    """Trains a run to its end; returns what `train` returns."""
    config, step_fns = run.job.config, None
    steps, key = config["steps"], jax.random.key(config["seed"])
    unchecked = collections.deque()  # metrics are read two steps late, so that the device never waits
    for step in range(run.start + 1, steps + 1):
        batch = sharding.put_batch(run.job.mesh, next(run.loader))
        if step_fns is None:
            step_fns = [compile_step(run, job, batch, key) for job, _ in run.job.variants]
            run.end_if_stopped("compiling")
        run.state, metrics = step_fns[run.job.kind_of(step)](run.state, batch, run.frozen, key)
        unchecked.append((step, metrics))

        # ---- what follows it ----------------------------------------------------------------------------------------
        is_first = step == run.start + 1
        is_stopping, asked = run.stopped(), time.monotonic()  # asked once: a signal that comes later ends the next step
        is_last = step == steps or is_stopping
        saves = is_last or step % config["checkpoint"]["every"] == 0
        logs = is_last or step % config["log"]["every"] == 0 or step == 1
        due = [hook for hook in run.hooks if hook.is_due(step, steps) and (not is_stopping or step == steps)]

        # ---- metrics ------------------------------------------------------------------------------------------------
        while unchecked and (saves or unchecked[0][0] <= step - 2):
            check_finite(*unchecked.popleft(), config["max_skipped_in_a_row"])
        if is_first:
            jax.block_until_ready(metrics)
        if saves or logs or is_first:
            position, waited = input_so_far(run.loader, run.source, config["data"]["max_bad_fraction"])
        if is_first:  # after compilation, which is not speed
            progress = Progress(steps, step, config["data"]["batch_size"], arithmetic=run.arithmetic, waited=waited)
        newest = run.pending | metrics  # with those that this step lacks, of the last one that had them, unless they are logged
        run.pending = newest if run.job.kind_of(step + 1) and not logs else {}
        if logs:
            values = {name: float(value) for name, value in newest.items()}  # waits for the step, before its time is taken
            values["bad_records"] = len(position["bad_records"])
            run.log(step, values, {} if is_first else progress.update(step, waited), progress)

        # ---- checkpoint, pictures and scores ------------------------------------------------------------------------
        if due:
            jax.block_until_ready(metrics)  # otherwise the pause would include the time of steps in flight
        with progress.paused():
            if saves:  # before the pictures: they may take long, or fail
                run.save(step, position, is_stopping)
            for hook in due:
                hook.run(step, run.state)
        if is_stopping and step < steps:
            run.checkpointer.wait()
            logging.warning(
                "asked to stop: saved step %d; run the same command to continue. Ending the step and saving took %.1f s, "
                "which the time between signal and kill must exceed", step, time.monotonic() - asked,
            )  # fmt: skip
            return run.state, False
    run.checkpointer.wait()
    return run.state, True


def compile_step(run: Run, job: build.Job, batch: dict[str, jax.Array], key: jax.Array) -> jax.stages.Compiled:
    """Returns the step of one of the run's `variants`; warns where it cannot be the program that computed those before."""
    lowered = compilation.jit_step(job, run.state).lower(run.state, batch, run.frozen, key)
    with reading_programs() as read:
        compiled = lowered.compile()
    if compilation.is_fixed(job) and run.checkpointer.steps() and not read:
        logging.warning(
            "config.deterministic: the program of the steps before is not in %s, and was compiled again: the same kernels may "
            "not have been chosen, so that this run may not continue bit for bit", jax.config.jax_compilation_cache_dir,
        )  # fmt: skip
    return compiled


def shown(values):
    """Returns the names of the metrics on the progress line; the files hold all."""
    names = [name for name in values if name.startswith(("vae/", "sit/")) and not name.endswith("kl")]
    return names + [name for name in ("disc/loss", "skipped", "bad_records") if values.get(name)]


def summary(job, state, source, flop_per_image, peak):
    """Returns one paragraph on the run; `peak` is None if unknown."""

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


def parse_args(argv=None):
    """Command line of this program."""
    then = "config of a second phase, a SiT on the VAE that the first has trained"
    parser = cli.ConfigParser(description=__doc__.split("\n\n")[0], then=then)
    workdir_help = "folder of the run: checkpoints, metrics, pictures; continued if it exists"
    parser.add_argument("--workdir", type=cli.path, required=True, help=workdir_help)
    cached = "with --then: folder on a disk for the latents of all images, encoded once between the phases"
    parser.add_argument("--cache_latents", type=cli.path, metavar="FOLDER", help=cached)
    cli.add_processes(parser)
    words = cli.words_of(argv)
    args = parser.parse_args(words)
    two_phases.check_words(words)
    if args.cache_latents and args.then is None:
        raise ValueError(f"--cache_latents={args.cache_latents} is for the second phase of a run: add --then")
    return args


@cli.command(parse_args)
def main(args):
    """Entry point; exit code 75 says that a signal ended the run early."""
    check_name(args.workdir)
    use_compilation_cache(args.workdir)  # creates a folder there
    if args.then is None:
        two_phases.check_workdir(args.workdir, is_of_two=False)
        _, finished = train(args.config, args.workdir)
    else:
        finished = train_in_two_phases(args.config, args.then, args.workdir, args.cache_latents)
    if not finished:
        sys.exit(os.EX_TEMPFAIL)
    if jax.process_index() == 0:
        print(f"finished; everything is in {args.workdir}")


if __name__ == "__main__":
    main()
