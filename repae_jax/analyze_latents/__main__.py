"""Analyzes latents of VAEs side by side: `python -m repae_jax.analyze_latents runs/repae REPA-E/e2e-sdvae-hf --data /data/val`.

Every SOURCE is a run of ours, a published training checkpoint, or a VAE's file, folder or hub name. Written are analysis.json,
with all numbers, and pca.png (latents in colors), spectrum.png (frequencies against the images'), channels.png (histograms) and
equivariance.png; with --cknna also cknna.png, on how far each block of the SiT sees images as a vision encoder does.
"""

import argparse
import json
import math
import os

import jax
import numpy as np

from repae_jax import cli, files, ranges
from repae_jax.analysis import representation
from repae_jax.analyze_latents import sources as choosing
from repae_jax.analyze_latents.encoding import check_bytes, encode_images
from repae_jax.analyze_latents.hidden_states import encoder_features, measure_cknna
from repae_jax.analyze_latents.numbers import describe, plain, spectrum_of_images
from repae_jax.analyze_latents.pictures import draw
from repae_jax.analyze_latents.sources import NEIGHBORS, PUBLISHED_COUNT, RESULT
from repae_jax.data import reading
from repae_jax.distributed import sharding
from repae_jax.sampling.load_model import load_model, load_vae
from repae_jax.training.checkpoint import fingerprint

LABELS = ("null", "own")
BLOCK = 8  # pixels of a DCT block's side
SHOWN = 10  # images in pca.png


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE",
        help="run, published checkpoint, or VAE; NAME=SOURCE names it in the results, SOURCE@STEP takes that checkpoint")
    add("--step", type=cli.whole(0), help="checkpoint of all runs without @STEP; default the newest of each")
    add("--vae", type=cli.path, help="the VAE of a SOURCE that holds none; for one SOURCE")
    add("--data", type=cli.path,
        help="images: a folder, or SOURCE:FIELD=VALUE,… such as digits:split=test; default: the first run's own")
    add("--image_size", type=cli.image_size, help="pixels of the images' sides, or HEIGHT,WIDTH; default: the first run's")
    add("--num_images", type=cli.whole(1), default=256, help="drawn from the data without repetition (default: 256)")
    add("--batch_size", type=cli.whole(1), default=32, help="images at a time, over all devices (default: 32)")
    add("--seed", type=cli.seed, default=0, help="of the images drawn, and of the noise (default: 0)")
    add("--out", type=cli.path, help="folder of the results; default WORKDIR/analysis for one run")
    add("--cknna", nargs="*", metavar="ENCODER",
        help="compare the SiT of every SOURCE, block by block, with these encoders: Hugging Face names or folders, "
        "ENCODER@PIXELS for another image size; none: those that the runs were aligned with")
    add("--timesteps", type=cli.number(ranges.real(0, 1)), nargs="+", default=[0.1, 0.5, 0.9],
        help="for --cknna: 0 is data, 1 is noise (default: 0.1 0.5 0.9)")
    add("--cknna_images", type=cli.whole(1), default=10_000, help="for --cknna, at most (default: 10000, as published)")
    add("--labels", choices=LABELS, default="null",
        help="for --cknna: what the SiT is told. null (default), no class, so that nothing but the noisy latent tells what the "
        "image shows; own, the image's class")
    return parser.parse_args(argv)


def _encode_by_encoders(args, configs, images_source, records, mesh):
    """Returns features and neighbors of the images by each encoder for CKNNA, and the protocol of the encoders."""
    encoders, protocol = {}, {}
    for label, (path, image_size) in choosing.choose_encoders(args.cknna, configs).items():
        features, checksum = encoder_features(label, path, image_size, images_source, records, args.batch_size, mesh)
        encoders[label] = features, representation.nearest(features, NEIGHBORS)
        protocol[label] = {"weights": path, "image_size": image_size, "fingerprint": checksum}
    return encoders, protocol


def _encode_by_vaes(args, sources, images_source, records, mesh):
    models = []
    for source in sources:
        if args.vae:
            vae = load_model(source.path, source.step, jax.devices()[:1], args.vae).tokenizer
        else:
            vae = load_vae(source.path, source.step)
        positions = math.prod(side // vae.module.factor for side in ranges.height_width(images_source.image_size))
        count = sum(model.latents.nbytes for model in models) + 4 * len(records) * positions * vae.module.latent_channels
        check_bytes(count, f"the latents of {len(records)} images by {len(models) + 1} VAEs")
        models.append(encode_images(source, vae, images_source, records, args.batch_size, mesh))
    return models


def run(args):
    """Analyzes as the command line says; returns the path of analysis.json."""
    if jax.process_count() > 1:
        raise ValueError("the analysis runs in one process; start it on one host")
    mesh = sharding.make_mesh(1)
    if args.batch_size % mesh.size:
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {mesh.size} devices")
    sources = choosing.parse_sources(args.sources, args.step)
    if args.vae and len(sources) > 1:
        raise ValueError("--vae is for one SOURCE; give a SiT's VAE as a SOURCE of its own")
    configs = [choosing.run_config(source) for source in sources]
    folder = choosing.out_folder(args, sources, configs)
    images_source, data_description = choosing.open_images(args, configs)
    records = choosing.draw_records(images_source, args.num_images, args.seed)
    cknna_records, encoders = None, {}
    if args.cknna is not None:
        cknna_records = choosing.draw_records(images_source, args.cknna_images, args.seed)
        choosing.check_cknna(args, sources, configs, len(cknna_records))
        encoders, encoder_protocol = _encode_by_encoders(args, configs, images_source, cknna_records, mesh)
    models = _encode_by_vaes(args, sources, images_source, records, mesh)
    block = min(BLOCK, *(side for model in models for side in model.latents.shape[1:3]))
    rgb_spectrum, rgb_ratios = spectrum_of_images(images_source, records, args.batch_size, block)
    compared = set.intersection(*({row["transform"] for row in model.equivariance} for model in models))
    descriptions = [describe(model, block, compared) for model in models]
    protocol = {
        "data": data_description, "image_size": images_source.image_size, "num_images": len(records), "seed": args.seed,
        "latents": "posterior mean, not normalized", "precision": "float32", "dct_block": block, "pixels": "in [-1, 1]",
        "resampling": "bilinear, not antialiased", "mean_errors_over": sorted(compared - {"none"}),
    }  # fmt: skip
    if encoders:
        for source, description in zip(sources, descriptions):
            trained = load_model(source.path, source.step, vae_path=args.vae)
            description["sit_fingerprint"] = fingerprint(trained.params["sit"])
            description["cknna"] = measure_cknna(args, source, trained, images_source, cknna_records, encoders)
        protocol["cknna"] = {
            "num_images": len(cknna_records), "k": NEIGHBORS, "labels": args.labels, "timesteps": list(args.timesteps),
            "encoders": encoder_protocol,
            "features": "tokens averaged per image, rows of length 1, outliers not clipped; latents normalized, then noised",
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    originals = np.stack([reading.read(images_source, i)["image"] for i in records[:SHOWN]])
    draw(folder, models, descriptions, originals, rgb_spectrum)
    content = {
        "kind": "analysis", "models": descriptions, "rgb_spectrum": rgb_spectrum, "rgb_spectrum_of_ratios": rgb_ratios,
        "protocol": protocol, "warnings": _warnings(args, cknna_records),
    }  # fmt: skip
    files.write_json(folder / RESULT, plain(content))  # last: its presence means that the pictures are whole
    return folder / RESULT


def _warnings(args, cknna_records):
    warnings = []
    if not args.data:
        warnings.append("no --data: these are the images that the first run trained on")
    if cknna_records is not None and (count := len(cknna_records)) < PUBLISHED_COUNT:
        warnings.append(
            f"CKNNA of {count} images: it is the higher the fewer they are, published values are of {PUBLISHED_COUNT}; "
            f"mutual_knn is {NEIGHBORS / (count - 1):.2g} by chance"
        )
    return warnings


def summary(path):
    """Formats the main numbers of an analysis.json as a table for people, and its warnings."""
    content = json.loads(path.read_text())
    models = content["models"]
    names = [
        "spatial_variance", "total_variation", "effective_rank", "collapsed_channels", "high_frequency_share", "scale_error",
        "rotation_error", "psnr",
    ]  # fmt: skip
    width = max(len(model["name"]) for model in models)
    lines = [" " * width + "  " + "  ".join(names)]
    for model in models:
        values = ("-" if model["numbers"][name] is None else f"{model['numbers'][name]:.4g}" for name in names)
        lines.append(f"{model['name']:<{width}}  " + "  ".join(f"{value:>{len(name)}}" for name, value in zip(names, values)))
    return "\n".join(lines + [f"warning: {text}" for text in content["warnings"]])


@cli.command(parse_args, "interrupted: nothing was written; the same command starts again")
def main(args):
    """Entry point."""
    path = run(args)
    print(f"{summary(path)}\nnumbers: {path}\npictures: {os.path.join(path.parent, '*.png')}")


if __name__ == "__main__":
    main()
