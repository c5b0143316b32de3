"""Pictures and scores during training.

All processes sample and reconstruct the same images, whole in each; process 0 writes and scores them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from tqdm import tqdm

from repae_jax import buckets, files, images
from repae_jax.distributed import multihost, sharding
from repae_jax.evaluation import inception_features, reference_stats
from repae_jax.job import build, training_data
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.metrics.kernel_distances import SUBSET_SIZE, kernel_inception_distance
from repae_jax.metrics.monge import monge_inception_distance
from repae_jax.metrics.resampling import GROUPS
from repae_jax.ranges import height_width
from repae_jax.sampling import generate
from repae_jax.training.metric_log import step_of

FID_BATCH = 64  # least number of samples at a time, over all devices


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something that is done every so many training steps."""

    every: int  # steps between two runs
    run: Callable[[int, Any], None]  # function of (step, state)
    is_done: Callable[[int], bool]  # function of a step: does its result exist?

    def is_due(self, step: int, steps: int) -> bool:
        """Returns whether to run after this step of so many."""
        return step % self.every == 0 or step == steps


def make_hooks(job: build.Job, frozen, source, workdir: epath.Path, writer, fid, stopped: Callable[[], bool]) -> list[Hook]:
    """Returns the hooks of a run, for what its job trains.

    `frozen` is from `frozen_weights.load_frozen`, `fid` from `load_fid`; scores are given up once `stopped` returns True.
    """
    section, hooks = job.config["hooks"], []
    if section.get("fid_every"):
        run = _make_fid(job, frozen, writer, *(fid or (None, None)), stopped)
        hooks.append(Hook(section["fid_every"], run, functools.partial(_has_fid, workdir)))
    if section.get("samples_every"):
        pictures = _Pictures("samples", job.config, workdir, writer)
        hooks.append(Hook(section["samples_every"], _make_samples(job, frozen, pictures), pictures.exist))
    if section.get("reconstructions_every") and not job.frozen_vae:
        pictures = _Pictures("reconstructions", job.config, workdir, writer)
        hooks.append(Hook(section["reconstructions_every"], _make_reconstructions(job, source, pictures), pictures.exist))
    return hooks


def pending_hooks(hooks: list[Hook], step: int, steps: int) -> list[Hook]:
    """Returns the hooks that were due after a step, but were interrupted; the same in all processes."""
    return [hook for hook in hooks if hook.is_due(step, steps) and not multihost.broadcast_from_process_0(hook.is_done(step))]


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """Pictures of one kind, WORKDIR/KIND/STEP.png and at the trackers: grids of about as many rows as columns."""

    kind: str
    config: Mapping[str, Any]
    workdir: epath.Path
    writer: Any

    def path(self, step: int) -> epath.Path:
        return self.workdir / self.kind / f"{step:07d}.png"

    def exist(self, step: int) -> bool:
        return self.path(step).exists()

    def save(self, step: int, shown: UInt8[np.ndarray, "N H W 3"], in_pairs: bool = False) -> None:
        if jax.process_index() == 0:
            columns = math.ceil(math.sqrt(self.config["hooks"]["images"]))
            columns += in_pairs and columns % 2
            picture = images.grid(shown, columns, scale=images.viewing_scale(self.config["data"]["image_size"]))
            with buckets.reached(self.workdir):
                self.path(step).parent.mkdir(exist_ok=True)
                files.save_png(self.path(step), picture)
            self.writer.write_images(step, {self.kind: picture})


def _jit_generate(job):
    """Returns the jitted sampler of a run; its images are whole on each device."""
    run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling)
    return jax.jit(sharding.with_mesh_context(job.mesh, run), out_shardings=sharding.replicated(job.mesh))


def _make_samples(job, frozen, pictures):
    """Returns the function of (step, state) that draws samples of all classes, always from the same noise."""
    count, num_classes = job.config["hooks"]["images"], job.config["data"]["num_classes"]
    labels = np.arange(count, dtype=np.int32) * num_classes // count
    labels, ids = sharding.put((labels, np.arange(count)), sharding.replicated(job.mesh))
    run = _jit_generate(job)

    def samples(step, state):
        drawn, _ = run(generate.sampling_params(state, frozen), labels, ids, jax.random.key(job.config["seed"]))
        pictures.save(step, np.asarray(drawn))

    return samples


def _make_reconstructions(job, source, pictures):
    """Returns the function of (step, state) that shows the first images beside their reconstructions."""
    reconstruct = sharding.with_mesh_context(job.mesh, generate.make_reconstruct(job.nets))
    run = jax.jit(reconstruct, out_shardings=sharding.replicated(job.mesh))
    with training_data.make_loader(job, source, workers=0) as first_batches:  # a loader passes over undecodable files
        batch = multihost_utils.process_allgather(next(first_batches)["image"], tiled=True)
    originals = batch[: job.config["hooks"]["images"]]

    def reconstructions(step, state):
        params = state.ema.params if job.nets.sit is None else state.vae.params
        recon = np.asarray(run(params, sharding.put(images.to_float(originals), sharding.replicated(job.mesh))))
        pairs = np.stack([originals, recon], axis=1).reshape(-1, *originals.shape[1:])
        pictures.save(step, pairs, in_pairs=True)

    return reconstructions


def fid_batch(job: build.Job) -> int:
    """Returns the number of samples at a time, a multiple of the devices."""
    return job.mesh.size * -(-FID_BATCH // job.mesh.size)


def load_fid(job: build.Job):
    """Returns (InceptionNetwork, Reference) of the FID during training; None without one, and in processes other than 0."""
    section = job.config["hooks"]
    if not section.get("fid_every") or jax.process_index() != 0:
        return None
    network = inception_features.load_network(section["fid_inception"], fid_batch(job))
    reference = reference_stats.read_reference(section["fid_reference"], network)
    size = height_width(job.config["data"]["image_size"])
    reference_stats.check_shape(list(size), reference, section["fid_reference"])
    for warning in reference_stats.count_warnings(section["fid_samples"], reference):
        logging.warning("config.hooks.fid_samples: %s", warning)
    return network, reference


def _make_fid(job, frozen, writer, network, reference, stopped):
    """Returns the function of (step, state) that scores samples; without a network it only helps to draw them."""
    section, batch_size, run = job.config["hooks"], fid_batch(job), _jit_generate(job)
    labels = np.arange(section["fid_samples"], dtype=np.int32) % job.config["data"]["num_classes"]
    put = functools.partial(sharding.put, shardings=sharding.batch_sharding(job.mesh))

    def fid(step, state):
        params, key = generate.sampling_params(state, frozen), jax.random.key(job.config["seed"])
        batches = generate.in_batches(run, params, labels, batch_size, key, put)
        total = -(-len(labels) // batch_size)
        pool = []
        try:
            for _, batch in tqdm(batches, f"step {step}: samples", total, unit="batch", leave=False, disable=not network):
                if stopped():
                    return
                if network:
                    pool.append(network(batch).pool)
        except generate.SamplesNotFinite as error:
            logging.warning("step %d: no FID: %s", step, error)
            return
        if network:
            writer.write_scalars(step, _scores(np.concatenate(pool), reference))

    return fid


def _scores(pool, reference):
    """Returns FID, and MIND and KID, if the reference has features of enough real images.

    No image is looked at twice: MIND takes a second or two, KID half a minute of a core.
    """
    scores = {"fid": frechet_distance(*gaussian_stats(pool), *reference.pool)}
    fewest = 0 if reference.features is None else min(len(pool), len(reference.features))
    if fewest >= 2 * GROUPS:
        scores["mind"] = monge_inception_distance(reference.features, pool)[0]
    if fewest >= SUBSET_SIZE:
        scores["kid"] = kernel_inception_distance(reference.features, pool)[0]
    return {f"{name}/{len(pool)}_samples": value for name, value in scores.items()}


def _has_fid(workdir, step):
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    return any(step_of(line) == step for line in lines if b'"fid/' in line)
