"""One task of the miniature paper, in a process of its own: a run with its evaluation, or an encoder or the classifier.

The task's folder says what to do, in task.json, and has result.json when it is done. Training continues where it stopped.
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
from repae_jax import files, sample
from repae_jax.analysis.smoothness import spatial_variance, total_variation
from repae_jax.data.digits import DigitsSource
from repae_jax.diffusion.samplers import Sampling
from repae_jax.evaluation import plots
from repae_jax.images import to_float
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import load_model, load_vae
from repae_jax.train import TrainingStopped, train

DONE, DIVERGED = "done", "diverged"
CLASSES = DigitsSource.num_classes
SHOWN = 4  # of each class, kept for pictures
_BATCH_SIZE = 250  # of sampling
_LAST_SHARE = 0.25  # of a run's steps, over which its losses are averaged


def perform(folder):
    """Does what the folder's task.json says.

    Args:
      folder: Path of the task.

    Returns:
      Whether it was finished; False if a signal ended the training, which was saved.
    """
    task, start = files.read_json(folder / "task.json"), time.monotonic()
    if task["kind"] == "encoder":
        result = _result(DONE, digits_models.train_encoder(folder, image_size=task["image_size"], steps=task["steps"]))
    elif task["kind"] == "classifier":
        result = _result(DONE, classifier_numbers(folder / "classifier.safetensors", task["image_size"]))
    else:
        result = _perform_run(folder, task)
    if result is None:
        return False
    result |= {"description": task["description"], "seconds": round(time.monotonic() - start, 1)}
    result["cpu_seconds"] = round(time.process_time(), 1)
    files.write_json(folder / "result.json", result, overwrite=True)
    return True


def _result(status, numbers, message=""):
    return {"status": status, "numbers": numbers, "message": message}


def _perform_run(folder, task):
    logging.set_verbosity(logging.WARNING)
    try:
        _, finished = train(ConfigDict(task["config"]), folder)
    except TrainingStopped as error:
        return _result(DIVERGED, {}, str(error))
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
    return _result(DONE, numbers)


def classifier_numbers(path, image_size):
    """Trains the classifier: its accuracy, and the Frechet distance of held-out real digits, to compare with."""
    accuracy = digits_models.train_classifier(path, image_size=image_size)
    classify = digits_models.load_classifier(path)
    splits = [digits_models.all_records(DigitsSource(image_size, split))[0] for split in ("test", "train")]
    held_out, train_digits = (gaussian_stats(classify(pixels)[0]) for pixels in splits)
    return {"accuracy": accuracy, "fid_of_held_out_digits": frechet_distance(*held_out, *train_digits)}


def sample_numbers(folder, sampling, classify, image_size, seed):
    """Frechet distances at the run's checkpoints and the label accuracy at the last; some digits go to samples.npy."""
    real, _ = digits_models.all_records(DigitsSource(image_size, "train"))
    real_stats = gaussian_stats(classify(real)[0])
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), tables.SAMPLES // CLASSES)
    fid = {}
    for step in quickstart.checkpoint_steps(folder):
        trained = load_model(folder, step, jax.devices()[:1])
        made = np.concatenate([batch for _, batch in sample.sample_batches(trained, sampling, labels, _BATCH_SIZE, seed)])
        found, logits = classify(made)
        fid[step] = frechet_distance(*gaussian_stats(found), *real_stats)
        print(f"step {step}: Frechet distance {fid[step]:.2f}", flush=True)
    recon = jax.jit(generate.make_reconstruct(trained.nets))(trained.params["vae"], to_float(real))
    np.save(folder / "samples.npy", made.reshape(CLASSES, -1, *made.shape[1:])[:, :SHOWN])
    return {
        "fid": fid[max(fid)],
        "fid_halfway": fid[min(fid)],
        "fid_steps": [min(fid), max(fid)],
        "fid_of_reconstructions": frechet_distance(*gaussian_stats(classify(np.asarray(recon))[0]), *real_stats),
        "label_accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
    }


def vae_numbers(folder, image_size):
    """Reconstruction and smoothness on the held-out digits; latents of one of each class go to latents.npy."""
    loaded = load_vae(folder)
    module, params = loaded.module, loaded.params
    pixels, labels = digits_models.all_records(DigitsSource(image_size, "test"))
    images = to_float(jnp.asarray(pixels))

    @jax.jit
    def measure(params, images):
        latents = module.apply({"params": params}, images, method="encode").mode()
        errors = module.apply({"params": params}, latents, method="decode").clip(-1, 1) - images
        mse = jnp.mean(jnp.square(errors))
        numbers = {
            "l1": jnp.mean(jnp.abs(errors)),
            "psnr": 10 * jnp.log10(4 / mse),  # the range of values is 2
            "spatial_variance": spatial_variance(latents),
            "total_variation": total_variation(latents),
        }
        return numbers, latents

    numbers, latents = jax.device_get(measure(params, images))
    np.save(folder / "latents.npy", latents[[int(np.argmax(labels == label)) for label in range(CLASSES)]])
    return {name: float(value) for name, value in numbers.items()}


def last_losses(metrics_jsonl):
    """Means of SiT's losses over the last part of the training; DiT's noise error counts as its velocity loss."""
    curves = plots.read_curves(metrics_jsonl)
    found = {}
    for name, metrics in (("velocity", ("sit/velocity", "sit/noise")), ("alignment", ("sit/align",))):
        for steps, values in (curves[metric] for metric in metrics if metric in curves):
            found[name] = float(values[steps > (1 - _LAST_SHARE) * steps[-1]].mean())
    return found
