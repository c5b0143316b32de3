"""Quality of a tokenizer: `python -m repae_jax.evaluate_tokenizer runs/vae --data folder:path=/data/val --inception WEIGHTS`.

Compares the images of a validation set with their reconstructions: rFID, PSNR, SSIM and LPIPS. Writes NAME.json (the numbers,
how they were made, and the images that came out worst) and NAME.png (the first images beside their reconstructions).

Pixels are rounded to the nearest of 0..255 and latents sampled, as in LightningDiT's evaluate_tokenizer.py, which the numbers
in its paper and in REPA-E's come from. There SSIM is computed on images in [-1, 1]. That is another number than that of pixels
0..255, which has black at zero as the definition has; both are given.
"""

import argparse
import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from grain import MapDataset
from tqdm import tqdm

from checkpoints_tools.lpips import load_lpips
from repae_jax import cli, data, files, images
from repae_jax.data import loader, reading
from repae_jax.distributed import sharding
from repae_jax.evaluation import inception_features
from repae_jax.evaluation.reference_stats import PUBLISHED_COUNT
from repae_jax.job.build import RANDOM
from repae_jax.metrics import image_quality
from repae_jax.metrics.frechet import RunningGaussian, frechet_distance
from repae_jax.models.inception import pytorch_fid_input
from repae_jax.models.lpips import LPIPS
from repae_jax.sampling.load_model import load_vae
from repae_jax.training.checkpoint import fingerprint

LATENTS = ("sampled", "mode")
SHOWN = 16  # images in the picture, and in the list of the worst
COLUMNS = 8  # of the picture
LPIPS_SIDE = 16  # pixels that its poolings need
# JSON name -> (what the table calls it, unit or range)
NAMES = {
    "rfid": ("rFID", ""),
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", "of images in [-1, 1], as published"),
    "ssim_pixels": ("SSIM", "of pixels 0..255"),
    "lpips": ("LPIPS", ""),
}
PREPARED = {
    "folder": (
        "ADM's center crop (shorter side by box halving, then bicubic, in uint8); LightningDiT's: bilinear, antialiased, in "
        "float32, of the shorter side, then a center crop"
    ),
    "digits": "8 x 8 digits, enlarged by bicubic interpolation",
}
COMPUTED = {
    "rfid": "Frechet distance of Inception's pool features of originals and reconstructions; uint8, prepared as by pytorch-fid",
    "psnr": "mean over images of 20 log10(255 / root mean squared error), both uint8",
    "ssim": "mean over images; both in [-1, 1], reconstructions clipped; 11 x 11 Gaussian of 1.5 pixels, inside the image",
    "ssim_pixels": "the same, of both as uint8, data range 255",
    "lpips": "mean over images; VGG16, version 0.1; both in [-1, 1], reconstructions as decoded, not clipped",
}


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "source", type=cli.path,
        help="workdir of a run (its VAE, trained or frozen), published training checkpoint, or a VAE's file or folder"
    )
    parser.add_argument(
        "--data", type=cli.path,
        help="folder of images, or NAME:FIELD=VALUE,… as in folder:path=/data/val or digits:split=test; default, for a run: "
        "its training images",
    )
    parser.add_argument(
        "--image_size", type=cli.whole(1, 2**20), help="side of the images in pixels; default, for a run: that of training"
    )
    parser.add_argument("--num_images", type=cli.whole(1), help="so many images, evenly spread over all; default all")
    parser.add_argument(
        "--inception", type=cli.path, help=f"weights for rFID: TensorFlow's graph or a PyTorch port; {RANDOM!r} for tests"
    )
    parser.add_argument(
        "--lpips_vgg16", type=cli.path, help=f"torchvision's VGG16, or LPIPS as a whole; {RANDOM!r} (both) for tests"
    )
    parser.add_argument("--lpips_linear", type=cli.path, help="linear weights of LPIPS v0.1")
    parser.add_argument(
        "--latents", choices=LATENTS, default="sampled", help="of the posterior: a sample, as published, or its mean"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the samples; image i's depends on the seed and i alone")
    parser.add_argument("--batch_size", type=cli.whole(1), default=64, help="images at a time, over all devices")
    parser.add_argument(
        "--workers", type=cli.whole(0, 4096), default=0, help="processes that decode images; 0 decodes in threads"
    )
    parser.add_argument("--step", type=cli.whole(0), help="checkpoint of a run; default the newest")
    parser.add_argument(
        "--out", type=cli.path,
        help="path of the result without its ending; default, for a run: WORKDIR/evaluations/tokenizer-…",
    )
    return parser.parse_args(argv)


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Images against their reconstructions.

    Attributes:
      records: int [N], which records of the source were compared.
      values: name -> float64 [N], in the order of the records.
      rfid: float, None if no feature function was given.
      bad_records: [(record, error), ...], those that could not be decoded.
      pairs: uint8 [2n, H, W, 3], the first originals, each followed by its reconstruction.
    """

    records: np.ndarray
    values: Mapping[str, np.ndarray]
    rfid: float | None
    bad_records: list[tuple[int, str]]
    pairs: np.ndarray


class _Blocks:
    """Blocks of a source's images, without those that cannot be decoded.

    Item k is (uint8 [n, H, W, 3], int32 [n] records, [(record, error), ...]), n <= block_size.
    """

    def __init__(self, source, records, block_size):
        self._source = source
        self._blocks = [records[first : first + block_size] for first in range(0, len(records), block_size)]

    def __len__(self):
        return len(self._blocks)

    def __getitem__(self, k):
        side = self._source.image_size
        decoded, good, failures = np.zeros((len(self._blocks[k]), side, side, 3), np.uint8), [], []
        records = self._blocks[k].tolist()
        for record, (fields, wrong) in zip(records, reading.at_once(functools.partial(reading.attempt, self._source), records)):
            if wrong:
                failures.append((record, wrong))
            else:
                decoded[len(good)] = fields["image"]
                good.append(record)
        return decoded[: len(good)], np.asarray(good, np.int32), failures


def make_compare(vae, latents, side):
    """Function that reconstructs and compares, to be jitted.

    Everything runs in float32. Image i depends on (key, records[i]) alone, not on the batch it is in.

    Args:
      vae: AutoencoderKL.
      latents: 'sampled' or 'mode'.
      side: of the images in pixels; small ones have no SSIM or LPIPS.

    Returns:
      ({'vae': parameters, 'lpips': parameters or None}, pixels uint8 [B, side, side, 3], records int32 [B], key) ->
      (reconstructions uint8 [B, side, side, 3], {'psnr': float32 [B], …, 'finite': bool [B]}).
    """
    vae = vae.clone(dtype=jnp.float32)

    def compare(params, pixels, records, key):
        originals = images.to_float(pixels)
        posterior = vae.apply({"params": params["vae"]}, originals, method="encode")
        z = posterior.mode()
        if latents == "sampled":
            keys = jax.vmap(lambda record: jax.random.fold_in(key, record))(records)
            z = posterior.sample(jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys))
        recon = vae.apply({"params": params["vae"]}, z, method="decode")
        rounded = images.to_uint8(recon + 1 / 255)  # half a gray level up, where truncating is rounding
        values = {"finite": jnp.isfinite(recon).all(axis=(1, 2, 3)), "psnr": image_quality.psnr(pixels, rounded)}
        if side >= image_quality.WINDOW:
            values["ssim"] = image_quality.ssim(originals, recon.clip(-1, 1), 2)
            as_float = (array.astype(jnp.float32) for array in (pixels, rounded))
            values["ssim_pixels"] = image_quality.ssim(*as_float, 255)
        if params["lpips"] is not None:
            values["lpips"] = LPIPS().apply({"params": params["lpips"]}, originals, recon)
        return rounded, values

    def precise(*args):
        # at least three bfloat16 passes on TPUs, TF32 on GPUs as published
        with jax.default_matmul_precision("high"):
            return compare(*args)

    return precise


def compare_all(vae, source, records, *, mesh, batch_size, latents, seed, lpips=None, features_fn=None, workers=0):
    """Compares images with their reconstructions, one batch in memory at a time, over all devices of the mesh.

    Args:
      vae: trained.TrainedVae.
      source: of the images, see `repae_jax.data`.
      records: int [N], which of its records.
      mesh: device mesh.
      batch_size: images at a time; a multiple of the devices.
      latents: 'sampled' or 'mode'.
      seed: of the samples.
      lpips: parameters of LPIPS; None leaves it out.
      features_fn: uint8 numpy [b, H, W, 3] -> float numpy [b, F], for rFID; None leaves it out.
      workers: processes that decode.

    Returns:
      Comparison.

    Raises:
      ValueError: if no image can be decoded, or a reconstruction is not finite.
    """
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
    params = jax.device_put({"vae": vae.params, "lpips": lpips}, sharding.replicated(mesh))
    compare = jax.jit(make_compare(vae.module, latents, source.image_size))
    key = jax.random.key(seed)
    gaussians = RunningGaussian(), RunningGaussian()  # of originals and reconstructions
    seen, parts, failures, pairs = [], [], [], []
    blocks = loader.read_ahead(MapDataset.source(_Blocks(source, records, batch_size)), workers)
    with contextlib.closing(blocks), tqdm(total=len(records), unit="img", desc="reconstructing") as bar:
        for pixels, good, failed in blocks:
            failures += failed
            bar.update(len(failed))
            if not len(good):
                continue
            missing = batch_size - len(good)  # filled up, so that one program serves all batches
            filled, ids = put(np.pad(pixels, [(0, missing)] + [(0, 0)] * 3)), put(np.pad(good, (0, missing)))
            recon, values = _first(len(good), compare(params, filled, ids, key))
            _check_finite(values.pop("finite"), good, source)
            if features_fn is not None:
                for gaussian, side in zip(gaussians, (pixels, recon)):
                    gaussian.update(features_fn(side))
            wanted = SHOWN - sum(map(len, pairs))
            if wanted > 0:
                pairs.append(np.stack([pixels, recon], axis=1)[:wanted])
            seen.append(np.array(good))
            parts.append(values)
            bar.update(len(good))
    if not seen:
        raise ValueError(
            f"none of the {len(records)} images can be decoded, first {source.name(failures[0][0])}: {failures[0][1]}"
        )
    pairs = np.concatenate(pairs)
    return Comparison(
        records=np.concatenate(seen),
        values={name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]},
        rfid=None if features_fn is None else frechet_distance(*gaussians[0].stats(), *gaussians[1].stats()),
        bad_records=failures,
        pairs=pairs.reshape(-1, *pairs.shape[2:]),
    )


def _first(count, batch):
    """The first images of a batch, as numpy arrays."""
    return jax.tree.map(lambda array: np.asarray(array)[:count], batch)


def _check_finite(finite, records, source):
    if not finite.all():
        first = ", ".join(source.name(int(record)) for record in records[~finite][:5])
        raise ValueError(
            f"the reconstructions of {int((~finite).sum())} of {len(finite)} images hold nan or infinity, first {first}; the "
            "VAE's weights are damaged, or its training has diverged: take an earlier --step"
        )


# ---- reporting ------------------------------------------------------------------------------------------------------


def mean_values(values, warn):
    """Means over images; of PSNR without images that came out exactly, whose PSNR is infinite.

    Args:
      values: name -> float64 [N].
      warn: function of a text.

    Returns:
      dict name -> float; None for PSNR if every image came out exactly.
    """
    means = {name: float(column.mean()) for name, column in values.items()}
    exact = np.isinf(values["psnr"])
    if exact.any():
        warn(f"{exact.sum()} of {len(exact)} images came out exactly: their PSNR is infinite, and left out of the mean")
        means["psnr"] = None if exact.all() else float(values["psnr"][~exact].mean())
    return means


def worst(comparison, source):
    """The images of lowest PSNR: [{'image': name, 'record': int, 'psnr': dB}, ...], worst first."""
    decibels = comparison.values["psnr"]
    order = [i for i in np.argsort(decibels, kind="stable")[:SHOWN] if np.isfinite(decibels[i])]
    return [
        {"image": source.name(int(comparison.records[i])), "record": int(comparison.records[i]), "psnr": float(decibels[i])}
        for i in order
    ]


def table(metrics):
    """Lines 'name, value, unit' for people."""
    shown = [(*NAMES[name], value) for name, value in metrics.items()]
    return "\n".join(
        f"  {name:<6}{'-' if value is None else format(value, '.4f'):>10}  {unit}".rstrip() for name, unit, value in shown
    )


def _choose_images(args, config, warn):
    """The source to read, its name and fields."""
    size = args.image_size
    if config is not None:
        size = size or config["data"]["image_size"]
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


def _choose_records(count, available):
    """Records to compare: `count` of them, evenly spread, since folders are sorted by class."""
    if count is None:
        return np.arange(available)
    if count > available:
        raise ValueError(f"--num_images={count}: there are {available}")
    return np.arange(count) * available // count


def _choose_out(args, vae, name, fields, source, count):
    """Path of the result without its ending."""
    if args.out:
        out = epath.Path(args.out)
        return out.with_suffix("") if out.suffix == ".json" else out
    if vae.config is None or not epath.Path(args.source).is_dir():
        raise ValueError(f"{args.source} is no folder of a run to keep the result in: give --out")
    words = [name, *(Path(value).name for value in fields.values() if isinstance(value, str) and value)]
    drawn = f"sampled-seed{args.seed}" if args.latents == "sampled" else args.latents
    label = re.sub(r"[^\w.]+", "-", f"{'-'.join(words)}-{source.image_size}px-{count}-{drawn}")
    return epath.Path(args.source) / "evaluations" / f"tokenizer-{vae.step:07d}-{label}"


def _load_lpips(args, side, warn):
    """Parameters of LPIPS, or None if it is left out."""
    files = args.lpips_vgg16, args.lpips_linear
    if not any(files):
        warn("LPIPS is left out: no --lpips_vgg16 and --lpips_linear")
    elif side < LPIPS_SIDE:
        warn(f"LPIPS is left out: it needs images of at least {LPIPS_SIDE} pixels, these have {side}")
    elif set(files) == {RANDOM}:
        warn("LPIPS has RANDOM weights: for tests only, its value means nothing")
        sizes = [jnp.zeros((1, 32, 32, 3))] * 2
        return jax.jit(LPIPS().init)(jax.random.key(0), *sizes)["params"]
    elif RANDOM in files:
        raise ValueError(f"--lpips_vgg16={files[0]} --lpips_linear={files[1]}: give {RANDOM!r} for both, or two files")
    else:
        return load_lpips(*(path or "" for path in files))
    return None


def _load_inception(args, count, warn):
    """InceptionNetwork for rFID, or None if it is left out."""
    if not args.inception:
        warn("rFID is left out: no --inception")
    elif count < 2:
        warn("rFID is left out: it needs a covariance, and there is one image")
    else:
        if args.inception == RANDOM:
            warn("Inception has RANDOM weights: for tests only, the rFID means nothing")
        return inception_features.load_network(args.inception, args.batch_size, prepare=pytorch_fid_input)
    return None


def check_count(count, features, warn):
    """Warns of an rFID from too few images.

    Args:
      count: images.
      features: numbers per image.
      warn: function of a text.
    """
    if count <= features:
        warn(
            f"rFID from {count} images: the covariance of {features} features has rank {count - 1} at most, so the number "
            "says more about the number of images than about the tokenizer, and is too high; compare it with rFIDs of the same "
            f"images alone. Published ones are from {PUBLISHED_COUNT:,} images"
        )
    elif count < PUBLISHED_COUNT:
        warn(f"rFID from {count} images is higher than from {PUBLISHED_COUNT:,}, of which published ones are")


def _check_size(vae, source):
    factor = vae.module.factor
    if source.image_size % factor:
        raise ValueError(
            f"images of {source.image_size} pixels: this VAE makes one latent of {factor} x {factor} pixels; allowed as "
            f"--image_size: multiples of {factor}"
        )


def run(args):
    """Evaluates as the command line says; returns (path of the JSON, what is in it)."""
    warnings = []

    def warn(text):
        warnings.append(text)
        logging.warning("%s", text)

    mesh = sharding.make_mesh(1)
    if jax.process_count() > 1:
        raise ValueError("tokenizers are evaluated in one process; start it on one host")
    if args.batch_size % mesh.size:
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {mesh.size} devices")
    vae = load_vae(args.source, args.step)
    source, name, fields = _choose_images(args, vae.config, warn)
    _check_size(vae, source)
    records = _choose_records(args.num_images, len(source))
    out = _choose_out(args, vae, name, fields, source, len(records))
    path, picture = (out.with_name(out.name + ending) for ending in (".json", ".png"))
    taken = [str(file) for file in (path, picture) if file.exists()]
    if taken:
        raise ValueError(f"{', '.join(taken)} exists; choose another --out, or move it away")
    side = source.image_size
    if side < image_quality.WINDOW:
        warn(f"SSIM is left out: its window has {image_quality.WINDOW} pixels, the images {side}")
    lpips = _load_lpips(args, side, warn)
    inception = _load_inception(args, len(records), warn)
    comparison = compare_all(
        vae, source, records, mesh=mesh, batch_size=args.batch_size, latents=args.latents, seed=args.seed, lpips=lpips,
        features_fn=inception and (lambda pixels: inception(pixels).pool), workers=args.workers,
    )  # fmt: skip
    count, bad = len(comparison.records), comparison.bad_records
    if bad:
        names = ", ".join(f"{source.name(record)} ({error})" for record, error in bad[:5])
        warn(f"{len(bad)} of {len(records)} images cannot be decoded and do not count, first {names}")
    metrics = mean_values(comparison.values, warn)
    if comparison.rfid is not None:
        check_count(count, inception_features.InceptionNetwork.pool_features, warn)
        metrics["rfid"] = comparison.rfid
    metrics = {metric: metrics[metric] for metric in NAMES if metric in metrics}
    protocol = {
        "source": args.source,
        "vae_fingerprint": fingerprint(vae.params),
        "data": {"source": name, **fields},
        "image_size": side,
        "images": count,
        "images_of_the_source": len(source),
        "undecodable": len(bad),
        "preprocessing": PREPARED.get(name, f"as the source {name!r} prepares images"),
        "latents": args.latents,
        "seed": args.seed if args.latents == "sampled" else None,
        "rounding": "to the nearest of 0..255",
        "computed": {metric: COMPUTED[metric] for metric in metrics},
        "inception": inception and {"weights": args.inception, "fingerprint": inception.checksum},
        "lpips": lpips and {"vgg16": args.lpips_vgg16, "linear": args.lpips_linear, "fingerprint": fingerprint(lpips)},
    }
    result = {
        "kind": "tokenizer", "step": vae.step, "metrics": metrics, "protocol": protocol, "warnings": warnings,
        "worst": worst(comparison, source),
        "undecodable": [{"image": source.name(record), "error": error} for record, error in bad],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    files.save_png(picture, images.grid(comparison.pairs, COLUMNS, scale=images.viewing_scale(side)))
    files.write_json(path, result)
    return path, result


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
