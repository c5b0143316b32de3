"""One task of the miniature paper, in a process of its own: a run with its evaluation, or an encoder or the classifier.

The task is described by task.json in its folder, and its result is result.json. Interrupted training is continued.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from checkpoints_tools import convert
from launch.miniature import tables
from launch.quickstart import digits_models, quickstart
from repae_jax import files
from repae_jax.analysis.smoothness import spatial_variance, total_variation
from repae_jax.diffusion.samplers import Sampling
from repae_jax.evaluation import plots
from repae_jax.images import to_float
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import load_model, load_vae
from repae_jax.train import TrainingStopped, train
from repae_jax.training.checkpoint import saved_steps

DONE, DIVERGED = "done", "diverged"
CLASSES = digits_models.NUM_CLASSES
SHOWN = 4  # samples of each class that are kept for pictures
_LAST_SHARE = 0.25  # losses are averages over this last share of the steps


def perform(folder):
    """Does the task of a folder; returns False if a signal ended the training, which was saved."""
    task, start = files.read_json(folder / "task.json"), time.monotonic()
    result = {"status": DONE, "message": "", "description": task["description"]}
    try:
        if task["kind"] == "encoder":
            numbers = digits_models.train_encoder(folder, image_size=task["image_size"], steps=task["steps"])
        elif task["kind"] == "classifier":
            numbers = classifier_numbers(folder / "classifier.safetensors", task["image_size"])
        else:
            numbers = _run_numbers(folder, task)
    except TrainingStopped as error:
        numbers, result["status"], result["message"] = {}, DIVERGED, str(error)
    if numbers is None:
        return False
    seconds = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time(), 1)}
    files.write_json(folder / "result.json", {**result, "numbers": numbers, **seconds}, overwrite=True)
    return True


def _run_numbers(folder, task):
    """Trains and evaluates a run; returns its numbers, None if a signal ended the training."""
    logging.set_verbosity(logging.WARNING)
    _, finished = train(ConfigDict(task["config"]), folder)
    if not finished:
        return None
    sampler = task["description"]["evaluation"]["sampler"]
    image_size = task["config"]["data"]["image_size"]
    numbers = vae_numbers(folder, image_size) | last_losses(folder / "metrics.jsonl")
    if sampler:
        classify = digits_models.load_classifier(task["classifier"])
        numbers |= sample_numbers(folder, Sampling(**sampler), classify, image_size, task["config"]["seed"])
    if task["export"]:
        convert.extract_vae(folder, tables.vae_files(folder)["vae"], overwrite=True)  # for others to start from
    return numbers


def classifier_numbers(path, image_size):
    """Trains the classifier; returns its accuracy and the Frechet distance of held-out digits, for comparison."""
    accuracy = digits_models.train_classifier(path, image_size=image_size)
    classify = digits_models.load_classifier(path)
    test, train = (gaussian_stats(classify(digits_models.all_records(image_size, split)[0])[0]) for split in ("test", "train"))
    return {"accuracy": accuracy, "fid_of_held_out_digits": frechet_distance(*test, *train)}


def sample_numbers(folder, sampling, classify, image_size, seed):
    """Computes Frechet distances of the run's checkpoints and the label accuracy of the last; writes samples.npy."""
    real, _ = digits_models.all_records(image_size, "train")
    real_stats = gaussian_stats(classify(real)[0])
    fid = {}
    for step in saved_steps(folder):
        samples, labels = quickstart.generated(folder, step, sampling, tables.SAMPLES // CLASSES, batch_size=250, seed=seed)
        features, logits = classify(samples)
        fid[step] = frechet_distance(*gaussian_stats(features), *real_stats)
        print(f"step {step}: Frechet distance {fid[step]:.2f}", flush=True)
    model = load_model(folder, step, jax.devices()[:1])
    recon = jax.jit(generate.make_reconstruct(model.nets))(model.params["vae"], to_float(real))
    np.save(folder / "samples.npy", samples.reshape(CLASSES, -1, *samples.shape[1:])[:, :SHOWN])
    return {
        "fid": fid[max(fid)], "fid_halfway": fid[min(fid)], "fid_steps": [min(fid), max(fid)],
        "fid_of_reconstructions": frechet_distance(*gaussian_stats(classify(np.asarray(recon))[0]), *real_stats),
        "label_accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
    }  # fmt: skip


def vae_numbers(folder, image_size):
    """Measures reconstruction and smoothness on the held-out digits; writes latents of one digit per class to latents.npy."""
    loaded = load_vae(folder)
    pixels, labels = digits_models.all_records(image_size, "test")
    images = to_float(jnp.asarray(pixels))

    @jax.jit
    def measure(params, images):
        latents = loaded.module.apply({"params": params}, images, method="encode").mode()
        errors = loaded.module.apply({"params": params}, latents, method="decode").clip(-1, 1) - images
        numbers = {
            "l1": jnp.mean(jnp.abs(errors)),
            "psnr": 10 * jnp.log10(4 / jnp.mean(jnp.square(errors))),  # the range of values is 2
            "spatial_variance": spatial_variance(latents), "total_variation": total_variation(latents),
        }  # fmt: skip
        return numbers, latents

    numbers, latents = jax.device_get(measure(loaded.params, images))
    np.save(folder / "latents.npy", latents[[int(np.argmax(labels == label)) for label in range(CLASSES)]])
    return {name: float(value) for name, value in numbers.items()}


def last_losses(metrics_jsonl):
    """Returns means of SiT's losses over the last steps; DiT's noise error counts as its velocity loss."""
    curves = plots.read_curves(metrics_jsonl)
    means = {}
    for name, metrics in (("velocity", ("sit/velocity", "sit/noise")), ("alignment", ("sit/align",))):
        for steps, values in (curves[metric] for metric in metrics if metric in curves):
            means[name] = float(values[steps > (1 - _LAST_SHARE) * steps[-1]].mean())
    return means
