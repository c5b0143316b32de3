"""One task of the miniature paper, in a process of its own: a run with its evaluation, or an encoder or the classifier.

The task is described by task.json in its folder, and its result is result.json. Interrupted training is continued.
"""

import contextlib
import dataclasses
import functools
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, Int32, UInt8
from ml_collections import ConfigDict

from checkpoints_tools import convert, identify
from checkpoints_tools import vae as vae_files
from checkpoints_tools.vit import load_encoder
from launch import pictures, small_networks
from launch.miniature import experiments, tables
from launch.miniature.scales import BLOCK, CKNNA_TIME, SCALES, SDVAE_STD, SHOWN, Scale
from repae_jax import files, sample
from repae_jax.analysis import representation, smoothness, spectrum
from repae_jax.analyze_latents.hidden_states import make_hidden_states
from repae_jax.cost import flops
from repae_jax.diffusion.latent_norm import normalize
from repae_jax.diffusion.samplers import Sampling
from repae_jax.evaluation import plots
from repae_jax.images import to_float, to_uint8
from repae_jax.job import build
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.models import encoders
from repae_jax.sampling.load_model import LoadedModel, LoadedTokenizer, jit_in_float32, load_model, load_vae, load_weaker
from repae_jax.train import TrainingStopped, train
from repae_jax.training.checkpoint import saved_steps

DONE, DIVERGED = "done", "diverged"
BATCH_SIZE = 256
_LAST_SHARE = 0.25  # losses are averages over this last share of the steps


def perform(folder: Path) -> bool:
    """Does the task of a folder; returns False if a signal ended the training, which was saved."""
    task, start = files.read_json(folder / "task.json"), time.monotonic()
    scale = SCALES[task["description"]["scale"]]
    result = {"status": DONE, "message": "", "description": task["description"]}
    numbers: dict[str, Any] | None
    try:
        if task["kind"] == "encoder":
            numbers = train_encoder(folder, scale, task)
        elif task["kind"] == "classifier":
            shown = experiments.load_pictures(scale, task["pictures"])
            numbers = train_classifier(folder / "classifier.safetensors", scale, shown)
        else:
            numbers = run_numbers(folder, scale, task)
    except TrainingStopped as error:
        numbers, result["status"], result["message"] = {}, DIVERGED, str(error)
    seconds = add_seconds(folder / "seconds.json", time.monotonic() - start, time.process_time())
    if numbers is not None:
        files.write_json(folder / "result.json", {**result, "numbers": numbers, **seconds, **machine()}, overwrite=True)
    return numbers is not None


def add_seconds(path: Path, seconds: float, cpu_seconds: float) -> dict[str, float]:
    """Adds the time of this process to those before that worked on the same task; returns the sums."""
    before = files.read_json(path) if path.exists() else {"seconds": 0, "cpu_seconds": 0}
    now = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    total = {name: round(before[name] + value, 1) for name, value in now.items()}
    files.write_json(path, total, overwrite=True)
    return total


def machine() -> dict[str, Any]:
    """Returns what the task ran on."""
    processor = platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # there is no such file but on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "device": jax.devices()[0].device_kind, "processor": processor, "cores": os.cpu_count(), "jax": jax.__version__
    }  # fmt: skip


def train_encoder(folder: Path, scale: Scale, task: Mapping[str, Any]) -> dict[str, Any]:
    """Trains an encoder; returns its record, which says how much of the held-out pictures it tells apart."""
    recipe, shown = experiments.encoder_recipe(scale, task["quality"]), experiments.load_pictures(scale, task["pictures"])
    return small_networks.train_encoder(folder, shown, architecture=dict(scale.encoder), recipe=recipe)


def train_classifier(path: Path, scale: Scale, shown: pictures.Pictures) -> dict[str, Any]:
    """Trains the classifier; returns its record, and Frechet distances to the training pictures for comparison.

    They are of the held-out pictures, and of as many training pictures as there are samples: what perfect samples would have.
    """
    record = small_networks.train_classifier(path, shown)
    classify = small_networks.load_classifier(path)
    features, _ = classify(shown.train.images)
    chosen = np.random.default_rng(0).permutation(len(features))[: scale.samples]
    reference = gaussian_stats(features)
    return {
        **record, "fid_of_held_out": frechet_distance(*gaussian_stats(classify(shown.test.images)[0]), *reference),
        "fid_of_training_pictures": frechet_distance(*gaussian_stats(features[chosen]), *reference),
    }  # fmt: skip


def run_numbers(folder: Path, scale: Scale, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Trains a run, unless its checkpoints are another one's, and evaluates it.

    Returns its numbers, None if a signal ended the training. Writes arrays to be looked at: samples.npy is uint8
    [checkpoints, classes, SHOWN, H, W, 3].
    """
    logging.set_verbosity(logging.WARNING)
    config, setting = ConfigDict(task["config"]), experiments.SETTINGS[task["description"]["setting"]]
    trained = Path(task["trained"])
    if trained == folder and not train(config, folder)[1]:
        return None
    shown = experiments.load_pictures(scale, task["pictures"])
    classify = small_networks.load_classifier(task["classifier"])
    features = encoder_features(task["encoder"], shown.test.images)
    job = build.build(config, jax.devices()[:1])
    numbers: dict[str, Any] = {"flop_per_step": sum(flops.of_step(job).values()) * config.data.batch_size}
    steps = experiments.equal_steps(scale, setting)
    tokenizer = load_vae(trained, None if setting.headline else steps)
    if task["export"]:  # for others to start from
        target = experiments.vae_files(folder)["vae"]
        export_vae(folder, target, SDVAE_STD if setting.job == "vae" else None)
        tokenizer = load_vae(target)
    if setting.headline:  # this long run is compared with shorter ones, too
        numbers |= last_losses(trained, steps) | vae_numbers(folder, load_vae(trained, steps), shown.test, classify, features)
        long = last_losses(trained, steps * tables.LONG) | vae_numbers(folder, tokenizer, shown.test, classify, features)
        numbers |= {f"{name}_long": value for name, value in long.items()}
    else:
        numbers |= last_losses(trained, steps) | vae_numbers(folder, tokenizer, shown.test, classify, features)
    if setting.job == "repae":
        numbers["drift"] = drift(*(latents_of(load_vae(trained, step), shown.test.images) for step in (steps // 2, steps)))
    if setting.network:
        sampling = Sampling(**experiments.sampler_of(setting))
        evaluated, samples = curves(trained, scale, setting, sampling, shown, classify, features, config.seed)
        numbers |= evaluated
        np.save(folder / "samples.npy", samples)
    return numbers


def export_vae(folder: Path, target: Path, latent_std: float | None) -> None:
    """Writes a run's VAE with statistics and discriminator as a folder for diffusers; its latents scaled to `latent_std`."""
    vae = convert.find_vae(identify.identify(folder))
    params, stats = vae.params, vae.latent_stats
    if latent_std is not None:
        params, stats = scale_latents(params, stats, latent_std)
    vae_files.save_diffusers(target, vae.module, params, stats, vae.discriminator, overwrite=True)


def scale_latents(params: Mapping[str, Any], stats: Mapping[str, Any], std: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Multiplies latents so that their root mean square deviation is `std`; returns parameters and statistics of the same VAE.

    Means and deviations of the posterior grow by the same factor, and the decoder takes it back: its images stay the same.
    """
    factor = std / np.sqrt(np.mean(stats["var"]))
    channels = len(stats["mean"])
    quant, post_quant = params["quant_conv"], params["post_quant_conv"]
    means = np.arange(2 * channels) < channels  # the others are logarithms of variances
    scaled = {
        "quant_conv": {
            "kernel": quant["kernel"] * np.where(means, factor, 1),
            "bias": np.where(means, quant["bias"] * factor, quant["bias"] + 2 * np.log(factor)),
        },
        "post_quant_conv": {**post_quant, "kernel": post_quant["kernel"] / factor},
    }
    scaled = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), scaled)
    return {**params, **scaled}, {"mean": stats["mean"] * factor, "var": stats["var"] * factor**2}


def encoder_features(folder: str, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N F"]:
    """Computes the encoder's patch tokens, averaged over each picture: rows of length 1."""
    encoder, params = load_encoder(folder, images.shape[1], images.shape[1])
    run = jit_in_float32(lambda pixels: encoders.encode(encoder, params, pixels).mean(axis=1))
    return representation.unit_rows(small_networks.in_batches(run, images))


def curves(
    folder: Path,
    scale: Scale,
    setting: tables.Setting,
    sampling: Sampling,
    shown: pictures.Pictures,
    classify: small_networks.Classifier,
    features: Float[np.ndarray, "N F"],
    seed: int,
) -> tuple[dict[str, Any], UInt8[np.ndarray, "checkpoints classes SHOWN H W 3"]]:
    """Evaluates checkpoints: Frechet distance, label accuracy, and CKNNA with the encoder.

    The distance is to the training pictures, and to the held-out ones, to which copies of the former are not near. With
    autoguidance the weaker network is that of the first evaluated step, which itself is sampled without.

    Returns them as curves over the steps, and by name those at equal steps and, if the run goes on so long, at equal compute;
    and some of the samples.
    """
    references = {"fid": shown.train.images, "fid_held_out": shown.test.images}
    stats = {name: gaussian_stats(classify(images)[0]) for name, images in references.items()}
    labels = sample_labels(shown.train.labels, scale.samples)
    kept = np.concatenate([np.flatnonzero(labels == label)[:SHOWN] for label in range(shown.num_classes)])
    steps = experiments.evaluated_steps(scale, setting)
    if missing := set(steps) - set(saved_steps(folder)):
        raise ValueError(f"{folder} has no checkpoints of the steps {sorted(missing)}: they were removed; start the run again")
    found, pictured = {name: [] for name in (*stats, "label_accuracy", "cknna")}, []
    for step in steps:
        model, by = load_model(folder, step, jax.devices()[:1]), sampling
        if sampling.autoguidance_scale > 1 and step == steps[0]:
            by = dataclasses.replace(sampling, autoguidance_scale=1.0)
        elif sampling.autoguidance_scale > 1:
            model = load_weaker(model, f"{folder}@{steps[0]}")
        samples = np.concatenate([images for _, images in sample.sample_batches(model, by, labels, BATCH_SIZE, seed)])
        seen, logits = classify(samples)
        for name, reference in stats.items():
            found[name].append(frechet_distance(*gaussian_stats(seen), *reference))
        found["label_accuracy"].append(float(np.mean(logits.argmax(axis=-1) == labels)))
        found["cknna"].append(representation.cknna(hidden_states(model, shown.test), features))
        pictured.append(samples[kept].reshape(shown.num_classes, SHOWN, *samples.shape[1:]))
        print(f"step {step}: Frechet distance {found['fid'][-1]:.2f}", flush=True)
    at = experiments.equal_steps(scale, setting)
    numbers: dict[str, Any] = {name: curve[steps.index(at)] for name, curve in found.items()}
    if setting.headline:
        numbers |= {f"{name}_long": curve[steps.index(at * tables.LONG)] for name, curve in found.items()}
        numbers |= {f"{name}_equal_compute": curve[-1] for name, curve in found.items()}
    return {**numbers, "steps": steps, "curves": found}, np.stack(pictured)


def sample_labels(training_labels: Int32[np.ndarray, " N"], count: int) -> Int32[np.ndarray, " count"]:
    """Returns labels in their order, each as frequent as in training, by the method of largest remainders."""
    shares = np.bincount(training_labels) * count / len(training_labels)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def latents_of(tokenizer: LoadedTokenizer, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N h w C"]:
    """Encodes pictures: the means of their posteriors."""
    encode = functools.partial(tokenizer.module.apply, {"params": tokenizer.params}, method="encode")
    return small_networks.in_batches(jit_in_float32(lambda pixels: encode(to_float(pixels)).mean), images)


def drift(before: Float[np.ndarray, "N h w C"], after: Float[np.ndarray, "N h w C"]) -> float:
    """Computes the share of the variance of normalized latents that those before do not explain: 1 - r^2 over all channels."""
    return 1 - float(np.mean(standardized(before) * standardized(after))) ** 2


def standardized(latents: Float[np.ndarray, "N h w C"]) -> Float[np.ndarray, "N h w C"]:
    """Returns latents with mean 0 and standard deviation 1 in every channel."""
    return (latents - latents.mean(axis=(0, 1, 2))) / latents.std(axis=(0, 1, 2))


def hidden_states(model: LoadedModel, split: pictures.Split) -> Float[np.ndarray, "N D"]:
    """Computes SiT's hidden states after the aligned block at time CKNNA_TIME, averaged over each picture: rows of length 1."""
    run, key = make_hidden_states(model), jax.random.key(0)
    vae, block = model.nets.vae.clone(dtype=jnp.float32), model.nets.sit.encoder_depth

    @jit_in_float32
    def states(images, labels, ids):
        mean = vae.apply({"params": model.params["vae"]}, to_float(images), method="encode").mean
        z = normalize(mean, model.params["latent_stats"])
        return run(model.params, z, ids, CKNNA_TIME, labels, key)[block - 1]

    return representation.unit_rows(small_networks.in_batches(states, split.images, split.labels, np.arange(len(split))))


def vae_numbers(
    folder: Path,
    tokenizer: LoadedTokenizer,
    split: pictures.Split,
    classify: small_networks.Classifier,
    features: Float[np.ndarray, "N F"],
) -> dict[str, float]:
    """Measures reconstructions and latents of held-out pictures; writes some of them, and the spectrum, beside the run."""
    module, params = tokenizer.module, tokenizer.params

    @jit_in_float32
    def measure(images):
        latents = module.apply({"params": params}, to_float(images), method="encode").mode()
        return latents, module.apply({"params": params}, latents, method="decode").clip(-1, 1)

    latents, recon = small_networks.in_batches(measure, split.images)
    errors = recon - to_float(split.images)
    recon = np.asarray(to_uint8(recon))
    real, ours = (gaussian_stats(classify(images)[0]) for images in (split.images, recon))
    block = min(BLOCK, latents.shape[1])
    amplitudes = [spectrum.mean_amplitudes(x, block) for x in (to_float(split.images), latents)]
    shown = np.concatenate([np.flatnonzero(split.labels == label)[:SHOWN] for label in np.unique(split.labels)])
    for name, array in (("pictures", split.images), ("reconstructions", recon), ("latents", latents)):
        np.save(folder / f"{name}.npy", array[shown])
    np.save(folder / "spectrum.npy", np.stack([spectrum.relative_spectrum(rows) for rows in amplitudes]))
    rows = representation.unit_rows(standardized(latents).reshape(len(latents), -1))
    numbers = {
        "l1": np.mean(np.abs(errors)), "psnr": 10 * np.log10(4 / np.mean(np.square(errors))),  # the range of values is 2
        "fid_of_reconstructions": frechet_distance(*ours, *real),
        "spatial_variance": smoothness.spatial_variance(latents), "total_variation": smoothness.total_variation(latents),
        "std": latents.std(), "high_frequencies": spectrum.high_frequency_share(amplitudes[1]),
        "high_frequencies_of_pictures": spectrum.high_frequency_share(amplitudes[0]),
        "cknna_of_latents": representation.cknna(rows, features),
    }  # fmt: skip
    return {name: float(value) for name, value in numbers.items()}


def last_losses(folder: Path, steps: int) -> dict[str, float]:
    """Returns means of SiT's losses over the last quarter of `steps`; DiT's noise error counts as its velocity loss."""
    logged = plots.read_curves(folder / "metrics.jsonl")
    means = {}
    for name, metrics in (("velocity", ("sit/velocity", "sit/noise")), ("alignment", ("sit/align",))):
        for at, values in (logged[metric] for metric in metrics if metric in logged):
            means[name] = float(values[((1 - _LAST_SHARE) * steps < at) & (at <= steps)].mean())
    return means
