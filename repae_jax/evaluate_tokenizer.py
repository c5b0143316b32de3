"""Evaluates a tokenizer: `python -m repae_jax.evaluate_tokenizer runs/vae --data folder:path=/data/val --inception WEIGHTS`.

Compares the images of a validation set with their reconstructions: rFID, PSNR, SSIM and LPIPS, see
`repae_jax.evaluation.tokenizer`. Writes NAME.json (the numbers, their protocol, and the worst images) and NAME.png (the first
images beside their reconstructions).
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from checkpoints_tools.lpips import load_lpips
from repae_jax import cli, data, files, images
from repae_jax.distributed import sharding
from repae_jax.evaluation import inception_features
from repae_jax.evaluation.tokenizer import LATENTS, METRICS, check_count, compare_all, mean_values, worst_images
from repae_jax.files import RANDOM
from repae_jax.metrics import image_quality
from repae_jax.models.inception import pytorch_fid_input
from repae_jax.models.lpips import LPIPS
from repae_jax.ranges import as_option, height_width, in_words
from repae_jax.sampling.load_model import load_vae
from repae_jax.training.checkpoint import fingerprint

COLUMNS = 8  # images in a row of the picture
LPIPS_SIDE = 16  # least pixels for its poolings
PREPROCESSING = {
    "folder": (
        "ADM's center crop (shorter side by box halving, then bicubic, in uint8); LightningDiT's: bilinear, antialiased, in "
        "float32, of the shorter side, then a center crop"
    ),
    "digits": "8 x 8 digits, enlarged by bicubic interpolation",
}


def parse_args(argv=None):
    """Command line of this program."""
    description = __doc__.split("\n\n")[0]
    parser = cli.Parser(description=description, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("source", type=cli.path,
        help="workdir of a run (its VAE, trained or frozen), published training checkpoint, or a VAE's file or folder")
    add("--data", type=cli.path,
        help="folder of images, or NAME:FIELD=VALUE,… as in folder:path=/data/val or digits:split=test; default, for a run: "
        "its training images")
    add("--image_size", type=cli.image_size,
        help="side of the images in pixels, or HEIGHT,WIDTH; default, for a run: that of training")
    add("--num_images", type=cli.whole(1), help="so many images, evenly spread over all; default all")
    add("--inception", type=cli.path, help=f"weights for rFID: TensorFlow's graph or a PyTorch port; {RANDOM!r} for tests")
    add("--lpips_vgg16", type=cli.path, help=f"torchvision's VGG16, or LPIPS as a whole; {RANDOM!r} (both) for tests")
    add("--lpips_linear", type=cli.path, help="linear weights of LPIPS v0.1")
    add("--latents", choices=LATENTS, default="sampled", help="of the posterior: a sample, as published, or its mean")
    add("--seed", type=cli.seed, default=0, help="of the samples; image i's depends on the seed and i alone")
    add("--batch_size", type=cli.whole(1), default=64, help="images at a time, over all devices")
    add("--workers", type=cli.whole(0, 4096), default=0, help="processes that decode images; 0 decodes in threads")
    add("--step", type=cli.whole(0), help="checkpoint of a run; default the newest")
    add("--out", type=cli.path,
        help="path of the result without its ending; default, for a run: WORKDIR/evaluations/tokenizer-…")
    return parser.parse_args(argv)


def _choose_images(args, config, warn):
    """Returns the source to read, its name and its fields."""
    size = args.image_size or (config and config["data"]["image_size"])
    if size is None:
        raise ValueError(f"{args.source} is no run of ours, whose config tells the size of its images: give --image_size")
    if args.data:
        name, fields = data.parse_source(args.data, labelled=False)
    elif config is not None:
        name, fields = config["data"]["source"], data.given(config["data"]["options"])
        warn(f"no --data: these are the images that the run trained on, {name} {dict(fields)}; held-out images come out worse")
    else:
        raise ValueError(f"{args.source} is no run of ours, whose config tells its images: give --data")
    return data.make_source(name, size, **fields), name, dict(fields)


def _preprocessing(name, size):
    if name in PREPROCESSING and isinstance(size, int):
        return PREPROCESSING[name]
    return f"as the source {name!r} prepares images of {in_words(size)} pixels"


def _choose_records(count, available):
    """Returns `count` records, evenly spread, since folders are sorted by class; all if it is None."""
    if count is None:
        return np.arange(available)
    if count > available:
        raise ValueError(f"--num_images={count}: there are {available}")
    return np.arange(count) * available // count


def _choose_out(args, vae, name, fields, source, count):
    """Returns the path of the result without its ending."""
    if args.out:
        out = epath.Path(args.out)
        return out.with_suffix("") if out.suffix == ".json" else out
    if vae.config is None or not epath.Path(args.source).is_dir():
        raise ValueError(f"{args.source} is no folder of a run to keep the result in: give --out")
    words = [name, *(Path(value).name for value in fields.values() if isinstance(value, str) and value)]
    drawn = f"sampled-seed{args.seed}" if args.latents == "sampled" else args.latents
    label = re.sub(r"[^\w.]+", "-", f"{'-'.join(words)}-{as_option(source.image_size)}px-{count}-{drawn}")
    return epath.Path(args.source) / "evaluations" / f"tokenizer-{vae.step:07d}-{label}"


def _load_lpips(args, size, warn):
    paths = args.lpips_vgg16, args.lpips_linear
    if not any(paths):
        warn("LPIPS is left out: no --lpips_vgg16 and --lpips_linear")
    elif min(height_width(size)) < LPIPS_SIDE:
        warn(f"LPIPS is left out: it needs images of at least {LPIPS_SIDE} pixels, these have {in_words(size)}")
    elif set(paths) == {RANDOM}:
        warn("LPIPS has RANDOM weights: for tests only, its value means nothing")
        sizes = [jnp.zeros((1, 32, 32, 3))] * 2
        return jax.jit(LPIPS().init)(jax.random.key(0), *sizes)["params"]
    elif RANDOM in paths:
        raise ValueError(f"--lpips_vgg16={paths[0]} --lpips_linear={paths[1]}: give {RANDOM!r} for both, or two files")
    else:
        return load_lpips(*(path or "" for path in paths))
    return None


def _load_inception(args, count, warn):
    if not args.inception:
        warn("rFID is left out: no --inception")
    elif count < 2:
        warn("rFID is left out: it needs a covariance, and there is one image")
    else:
        if args.inception == RANDOM:
            warn("Inception has RANDOM weights: for tests only, the rFID means nothing")
        return inception_features.load_network(args.inception, args.batch_size, prepare=pytorch_fid_input)
    return None


def _measure(args, vae, source, records, lpips, inception, warn):
    comparison = compare_all(
        vae.module, vae.params, source, records, mesh=sharding.make_mesh(1), batch_size=args.batch_size, latents=args.latents,
        seed=args.seed, lpips=lpips, features_fn=inception and (lambda pixels: inception(pixels).pool), workers=args.workers,
    )  # fmt: skip
    if bad := comparison.bad_records:
        names = ", ".join(f"{source.name(record)} ({error})" for record, error in bad[:5])
        warn(f"{len(bad)} of {len(records)} images cannot be decoded and do not count, first {names}")
    metrics = mean_values(comparison.values, warn)
    if comparison.rfid is not None:
        check_count(len(comparison.records), inception_features.InceptionNetwork.pool_features, warn)
        metrics["rfid"] = comparison.rfid
    return comparison, {name: metrics[name] for name in METRICS if name in metrics}


def run(args):
    """Evaluates as the command line says; returns the path of the JSON and its content."""
    warnings = []

    def warn(text):
        warnings.append(text)
        logging.warning("%s", text)

    if jax.process_count() > 1:
        raise ValueError("tokenizers are evaluated in one process; start it on one host")
    if args.batch_size % jax.device_count():
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {jax.device_count()} devices")
    vae = load_vae(args.source, args.step)
    source, name, fields = _choose_images(args, vae.config, warn)
    size, factor = source.image_size, vae.module.factor
    if any(side % factor for side in height_width(size)):
        makes = f"this VAE makes one latent of {factor} x {factor} pixels"
        raise ValueError(f"images of {in_words(size)} pixels: {makes}; allowed as --image_size: multiples of {factor}")
    records = _choose_records(args.num_images, len(source))
    out = _choose_out(args, vae, name, fields, source, len(records))
    path, picture = (out.with_name(out.name + ending) for ending in (".json", ".png"))
    if existing := [str(file) for file in (path, picture) if file.exists()]:
        raise ValueError(f"{', '.join(existing)} exists; choose another --out, or move it away")
    if min(height_width(size)) < image_quality.WINDOW:
        warn(f"SSIM is left out: its window has {image_quality.WINDOW} pixels, the images {in_words(size)}")
    lpips, inception = _load_lpips(args, size, warn), _load_inception(args, len(records), warn)
    comparison, metrics = _measure(args, vae, source, records, lpips, inception, warn)
    bad = comparison.bad_records
    protocol = {
        "source": args.source, "vae_fingerprint": fingerprint(vae.params), "data": {"source": name, **fields},
        "image_size": size, "images": len(comparison.records), "images_of_the_source": len(source), "undecodable": len(bad),
        "preprocessing": _preprocessing(name, size),
        "latents": args.latents, "seed": args.seed if args.latents == "sampled" else None,
        "rounding": "to the nearest of 0..255", "computed": {metric: METRICS[metric].computed for metric in metrics},
        "inception": inception and {"weights": args.inception, "fingerprint": inception.checksum},
        "lpips": lpips and {"vgg16": args.lpips_vgg16, "linear": args.lpips_linear, "fingerprint": fingerprint(lpips)},
    }  # fmt: skip
    result = {
        "kind": "tokenizer", "step": vae.step, "metrics": metrics, "protocol": protocol, "warnings": warnings,
        "worst": worst_images(comparison, source),
        "undecodable": [{"image": source.name(record), "error": error} for record, error in bad],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    files.save_png(picture, images.grid(comparison.pairs, COLUMNS, scale=images.viewing_scale(size)))
    files.write_json(path, result)
    return path, result


def table(metrics):
    """Formats the metrics for people, one line each."""
    return "\n".join(
        f"  {METRICS[name].name:<6}{'-' if value is None else format(value, '.4f'):>10}  {METRICS[name].unit}".rstrip()
        for name, value in metrics.items()
    )


@cli.command(parse_args, "interrupted: nothing was written; the same command starts again")
def main(args):
    """Entry point."""
    path, result = run(args)
    protocol = result["protocol"]
    print(f"{args.source}: {protocol['images']} images, latents: {protocol['latents']}\n{table(result['metrics'])}")
    for text in result["warnings"]:
        print(f"warning: {text}")
    print(f"{path}\npicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
