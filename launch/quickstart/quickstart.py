"""REPA-E from scratch on scikit-learn's handwritten digits, on a CPU, without downloads.

1. Encoder: a small network of DINOv2's architecture learns the digits and is saved in Hugging Face layout.
2. Classifier: a separate small network, whose features give the Frechet distance and whose labels the label accuracy.
3. REPA-E: `configs/repae.py:digits` trains VAE and SiT together, the encoder loaded as facebook/dinov2-base would be.
4. Evaluation: pictures, summary.json, the tokenizer's scores and latents, and report.html, which shows all of it.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from configs import repae
from launch import pictures, small_networks
from repae_jax import cli, evaluate_tokenizer, files, sample
from repae_jax.analyze_latents import __main__ as analyze_latents
from repae_jax.diffusion.samplers import Sampling
from repae_jax.evaluation import plots
from repae_jax.files import save_png
from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.report import __main__ as report
from repae_jax.sampling.load_model import load_model
from repae_jax.train import train
from repae_jax.training.checkpoint import saved_steps

CURVES = {
    "VAE": ["vae/l1", "vae/align"],
    "SiT": ["sit/velocity", "sit/align"],
    "discriminator": ["disc/hinge", "disc/logits_real", "disc/logits_fake"],
    "gradient norms": ["grad_norm/vae", "grad_norm/sit", "grad_norm/disc"],
}
SAMPLER = {"sampler": "heun", "steps": 16}
GUIDANCE = 1.5
PER_CLASS = 50  # generated digits of each class, for every number


def parse_args(argv=None):
    """Parses the command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=cli.path, default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--steps", type=cli.whole(1), help="training steps; default: the config's")
    return parser.parse_args(argv)


def generated(workdir, step, sampling, per_class, batch_size=100, seed=0):
    """Samples `per_class` digits of each class, in their order, from a checkpoint; returns (uint8 [N, H, W, 3], labels [N])."""
    model = load_model(workdir, step, jax.devices()[:1])
    labels = np.repeat(np.arange(10, dtype=np.int32), per_class)
    batches = sample.sample_batches(model, sampling, labels, batch_size, seed)
    return np.concatenate([images for _, images in batches]), labels


def evaluate(workdir, classify):
    """Returns numbers for the summary; `classify` maps images to (features, logits)."""
    digits = pictures.digits()
    real = {name: gaussian_stats(classify(split.images)[0]) for name, split in (("train", digits.train), ("test", digits.test))}
    fid = {}
    (workdir / "evaluations").mkdir(exist_ok=True)
    for step in saved_steps(workdir):
        samples, _ = generated(workdir, step, Sampling(**SAMPLER, guidance_scale=1.0), PER_CLASS)
        fid[step] = frechet_distance(*gaussian_stats(classify(samples)[0]), *real["train"])
        print(f"step {step}: Frechet distance {fid[step]:.3f}", flush=True)
        result = {
            "kind": "generation", "step": step, "metrics": {"fid": fid[step]},
            "protocol": {
                **SAMPLER, "guidance_scale": 1.0, "labels": "balanced", "seed": 0, "num_samples": len(samples),
                "features": "the classifier's", "reference": "training digits",
            },
            "warnings": ["not Inception's features: comparable among these runs only"],
        }  # fmt: skip
        files.write_json(workdir / "evaluations" / f"{step:07d}.json", result, overwrite=True)
    samples, labels = generated(workdir, max(fid), Sampling(**SAMPLER, guidance_scale=GUIDANCE), PER_CLASS)
    rows = samples.reshape(10, PER_CLASS, *samples.shape[1:])[:, :16].reshape(-1, *samples.shape[1:])
    save_png(workdir / "samples.png", plots.label_rows(rows, np.repeat(np.arange(10), 16), scale=3))
    return {
        "fid": fid, "fid_of_held_out_digits": frechet_distance(*real["test"], *real["train"]),
        "label_accuracy": float(np.mean(np.argmax(classify(samples)[1], axis=-1) == labels)),
        "guidance_scale": GUIDANCE, "generated_digits": len(labels),
    }  # fmt: skip


def score_tokenizer(workdir):
    """Evaluates the tokenizer and analyzes its latents on held-out digits, unless the results exist."""
    data = ["--data", "digits:split=test"]
    if not list((workdir / "evaluations").glob(f"tokenizer-{saved_steps(workdir)[-1]:07d}-*.json")):
        evaluate_tokenizer.run(evaluate_tokenizer.parse_args([str(workdir), *data]))
    if not (workdir / "analysis").exists():
        analyze_latents.run(analyze_latents.parse_args([str(workdir), *data, "--cknna", f"{workdir / 'encoder'}@16"]))


def training_numbers(workdir):
    """Summarizes the run's metrics.jsonl; seconds are those of training steps, without compilation and pictures."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    timed = [line for line in lines if "seconds_per_step" in line]
    return {
        "steps": lines[-1]["step"],
        "training_seconds": float(np.median([line["seconds_per_step"] for line in timed])) * lines[-1]["step"],
        "images_per_second": float(np.median([line["images_per_second"] for line in timed])),
        "recon_l1": {"first": lines[0]["vae/l1"], "last": lines[-1]["vae/l1"]},
        "alignment": {"first": lines[0]["vae/align"], "last": lines[-1]["vae/align"]},
        "skipped_updates": lines[-1]["skipped"],
    }


@cli.command(parse_args, "interrupted; run the same command to continue")
def main(args):
    """Runs the four parts; every one is skipped or continued if it was done before."""
    start, workdir = time.monotonic(), Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(logging.WARNING)
    print("1/4 encoder: a small network of DINOv2's architecture", flush=True)
    digits = pictures.digits()
    encoder = small_networks.train_encoder(workdir / "encoder", digits)
    print("2/4 classifier: a separate small network", flush=True)
    classifier = small_networks.train_classifier(workdir / "classifier.safetensors", digits)
    config = repae.get_config("digits")
    config.encoders.target.weights = str(workdir / "encoder")
    if args.steps:
        config.steps = args.steps
    print(f"3/4 REPA-E: {config.steps} steps", flush=True)
    _, finished = train(config, workdir)
    if not finished:
        sys.exit("interrupted; run the same command to continue")
    print("4/4 evaluation and pictures", flush=True)
    numbers = training_numbers(workdir) | evaluate(workdir, small_networks.load_classifier(workdir / "classifier.safetensors"))
    plots.plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", CURVES)
    shutil.copy(max((workdir / "reconstructions").glob("*.png")), workdir / "reconstructions.png")
    summary = {
        **numbers, "seconds": time.monotonic() - start, "classifier_accuracy": classifier["accuracy"],
        "encoder_accuracy": encoder["accuracy"], "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip
    files.write_json(workdir / "summary.json", summary, overwrite=True)
    print(json.dumps(summary, indent=2))
    score_tokenizer(workdir)
    page = report.run(report.parse_args([str(workdir)]))
    for path in [*(workdir / name for name in ("samples.png", "reconstructions.png", "curves.png", "summary.json")), page]:
        print(path)
    print("what every curve should look like: docs/miniature/README.md#what-you-should-see")


if __name__ == "__main__":
    main()
