"""Pictures and scores during training."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from repae_jax import buckets, files, images
from repae_jax.distributed import multihost, sharding
from repae_jax.evaluation import inception_features, reference_stats
from repae_jax.job import build
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.sampling import generate
from repae_jax.training.metric_log import step_of

FID_BATCH = 64  # samples at a time at least, over all devices


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something that is done during training.

    Attributes:
      every: steps between.
      run: function of (step, state).
      is_done: function of a step: whether its result is there.
    """

    every: int
    run: Callable
    is_done: Callable[[int], bool]

    def is_due(self, step, steps):
        """Whether it is to be done after this step of so many."""
        return step % self.every == 0 or step == steps


def fid_batch(job):
    """Samples at a time, a multiple of the devices."""
    return job.mesh.size * -(-FID_BATCH // job.mesh.size)


def load_fid(job):
    """(InceptionNetwork, Reference) of the FID during training; None if none is wanted, and in all processes but the first."""
    section = job.config["hooks"]
    if not section.get("fid_every") or jax.process_index() != 0:
        return None
    network = inception_features.load_network(section["fid_inception"], fid_batch(job))
    reference = reference_stats.read_reference(section["fid_reference"], network)
    reference_stats.check_shape([job.config["data"]["image_size"]] * 2, reference, section["fid_reference"])
    for warning in reference_stats.count_warnings(section["fid_samples"], reference):
        logging.warning("config.hooks.fid_samples: %s", warning)
    return network, reference


def make_hooks(job, frozen, source, workdir, writer, scoring, stopped):
    """What is looked at during training.

    All processes sample and reconstruct the same images, whole in each; process 0 writes and scores them.

    Args:
      job: Job.
      frozen: what `build.load_frozen` returns.
      source: of the images.
      workdir: of the run.
      writer: of its metrics.
      scoring: what `load_fid` returns.
      stopped: what `multihost.stop_requests` yields; scores are given up when it says so.

    Returns:
      List of Hook, of what the job trains.
    """
    section = job.config["hooks"]
    count, num_classes = section["images"], job.config["data"]["num_classes"]
    columns, scale = math.ceil(math.sqrt(count)), images.viewing_scale(job.config["data"]["image_size"])
    everywhere = sharding.replicated(job.mesh)
    placed = functools.partial(sharding.put, shardings=everywhere)

    def picture_of(kind, step):
        return workdir / kind / f"{step:07d}.png"

    def save(kind, step, picture):
        if jax.process_index() == 0:
            with buckets.reached(workdir):
                (workdir / kind).mkdir(exist_ok=True)
                files.save_png(picture_of(kind, step), picture)
            writer.write_images(step, {kind: picture[None]})

    def make_generate():
        run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling)
        return jax.jit(sharding.with_mesh_context(job.mesh, run), out_shardings=everywhere)

    def make_samples():
        run = make_generate()
        labels, ids = placed(np.arange(count, dtype=np.int32) * num_classes // count), placed(np.arange(count))

        def samples(step, state):
            made, _ = run(generate.sampling_params(state, frozen), labels, ids, jax.random.key(job.config["seed"]))
            save("samples", step, images.grid(np.asarray(made), columns, scale=scale))

        return samples

    def make_reconstructions():
        run = jax.jit(sharding.with_mesh_context(job.mesh, generate.make_reconstruct(job.nets)), out_shardings=everywhere)
        with build.make_loader(job, source, workers=0) as first_batches:  # a loader passes over undecodable files
            originals = multihost_utils.process_allgather(next(first_batches)["image"], tiled=True)[:count]

        def reconstructions(step, state):
            params = state.ema.params if job.nets.sit is None else state.vae.params
            recon = np.asarray(run(params, placed(images.to_float(originals))))
            pairs = np.stack([originals, recon], axis=1).reshape(-1, *originals.shape[1:])
            save("reconstructions", step, images.grid(pairs, 2 * math.ceil(columns / 2), scale=scale))

        return reconstructions

    def make_fid():
        network, reference = scoring or (None, None)
        run, batch_size = make_generate(), fid_batch(job)
        labels = np.arange(section["fid_samples"], dtype=np.int32) % num_classes
        put = functools.partial(sharding.put, shardings=sharding.batch_sharding(job.mesh))

        def fid(step, state):
            params, key = generate.sampling_params(state, frozen), jax.random.key(job.config["seed"])
            made = generate.in_batches(run, params, labels, batch_size, key, put)
            shown = tqdm(
                made, f"step {step}: samples", -(-len(labels) // batch_size), unit="batch", leave=False, disable=not network
            )
            pool = RunningGaussian()
            try:
                for _, batch in shown:
                    if stopped():
                        return
                    if network:
                        pool.update(network(batch).pool)
            except generate.SamplesNotFinite as error:
                logging.warning("step %d: no FID: %s", step, error)
                return
            if network:
                distance = frechet_distance(*pool.stats(), *reference.pool)
                writer.write_scalars(step, {f"fid/{len(labels)}_samples": distance})

        return fid

    def is_scored(step):
        metrics = workdir / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return any(step_of(line) == step for line in lines if b'"fid/' in line)

    def is_drawn(kind):
        return lambda step: picture_of(kind, step).exists()

    hooks = []
    if section.get("fid_every"):
        hooks.append(Hook(section["fid_every"], make_fid(), is_scored))
    if section.get("samples_every"):
        hooks.append(Hook(section["samples_every"], make_samples(), is_drawn("samples")))
    if section.get("reconstructions_every") and not job.frozen_vae:
        hooks.append(Hook(section["reconstructions_every"], make_reconstructions(), is_drawn("reconstructions")))
    return hooks


def pending_hooks(hooks, step, steps):
    """Those that were due after a step, but were interrupted; the same in all processes."""
    return [hook for hook in hooks if hook.is_due(step, steps) and not multihost.from_first(hook.is_done(step))]
