"""Sampling: `python -m repae_jax.sample --workdir runs/repae --num_samples 50000`.

Writes NAME.npz (key arr_0, uint8 [N, H, W, 3]; labels in arr_1, as ADM's evaluator reads it) and NAME.png, a picture of the
first samples. Interrupted runs continue where they stopped: finished batches are kept in NAME.parts/ until the npz is whole.
"""

import argparse
import dataclasses
import functools
import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from tqdm import tqdm

from repae_jax import cli, files, images
from repae_jax.diffusion.samplers import PRECISIONS, SAMPLERS, Sampling, check_sampler
from repae_jax.distributed import sharding
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import LoadedModel, load_model
from repae_jax.training.checkpoint import fingerprint

LABELS = ("random", "balanced")
Labels = Int[np.ndarray, " N"]


def add_arguments(parser: Any, num_samples: int) -> None:
    """Adds the settings of sampling to a parser or a group of arguments; `num_samples` is a default."""
    parser.add_argument("--num_samples", type=cli.whole(1), default=num_samples, help="exactly so many images")
    equal = "balanced: equal counts per class, in shuffled order"
    parser.add_argument("--labels", choices=LABELS, default="balanced", help=equal)
    parser.add_argument("--classes", type=cli.whole(0), nargs="+", help="draw labels from these classes only")
    parser.add_argument("--seed", type=cli.seed, default=0, help="image i depends on the seed, i and its label alone")
    unset = "; default: the run's config.sampling"
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), help="ODE (euler, heun) or SDE; DiT's is ancestral" + unset)
    parser.add_argument("--steps", type=int, help="sampling steps" + unset)
    parser.add_argument("--guidance_scale", type=float, help="1 is no guidance" + unset)
    parser.add_argument("--guidance_low", type=float, help="guidance from this t (0 is data) …" + unset)
    parser.add_argument("--guidance_high", type=float, help="… up to this t (1 is noise)" + unset)
    some = "guide so many channels; 3 as DiT's, SiT's and LightningDiT's samples"
    parser.add_argument("--guidance_channels", type=int, help=some + unset)
    products = "of the SiT's matrix products; float32 as published. The sampler and the decoder stay in float32"
    parser.add_argument("--precision", choices=PRECISIONS, help=products + unset)


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    workdir = "folder of a run; or a published one, or its checkpoint"
    parser.add_argument("--workdir", type=cli.path, required=True, help=workdir)
    parser.add_argument("--vae", type=cli.path, help="the VAE of a run that holds none, or of published weights that hold none")
    out = "path of the result without its ending; default WORKDIR/generated/STEP-SETTINGS"
    parser.add_argument("--out", type=cli.path, help=out)
    parser.add_argument("--step", type=cli.whole(0), help="checkpoint to sample from; default the newest")
    parser.add_argument("--batch_size", type=cli.whole(1), default=64, help="images at a time, over all devices")
    add_arguments(parser, num_samples=64)
    parser.add_argument("--grid", type=cli.whole(1), default=64, help="how many samples the picture shows")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program, before a model is loaded, if no model could be sampled with the settings of `add_arguments`."""
    try:
        Sampling(**given(args))
    except ValueError as error:
        parser.error(f"--{error}")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of Sampling that the command line sets."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)}
    return {name: value for name, value in fields.items() if value is not None}


def draw_labels(kind: str, count: int, classes: Sequence[int], seed: int) -> Labels:
    """Draws the labels of `count` samples from some classes: 'random', or 'balanced', whose counts differ by at most one."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.choice(np.asarray(classes, np.int32), count)
    return rng.permutation(np.resize(np.asarray(classes, np.int32), count))


def choose_sampling(args: argparse.Namespace, model: LoadedModel) -> tuple[Sampling, list[int]]:
    """Returns the settings of the command line and the classes to sample; ValueError if they do not fit the model."""
    sampling = dataclasses.replace(model.sampling, **given(args))
    check_sampler(sampling, model.objective)
    channels = model.latent_shape[-1]
    if sampling.guidance_channels is not None and sampling.guidance_channels > channels:
        raise ValueError(f"--guidance_channels={sampling.guidance_channels}: the latents have {channels}")
    classes = args.classes or list(range(model.num_classes))
    if max(classes) >= model.num_classes:
        raise ValueError(f"--classes {classes}: allowed are 0..{model.num_classes - 1}")
    return sampling, classes


def settings_name(step: int | None, sampling: Sampling, args: argparse.Namespace) -> str:
    """Returns the name of samples from a checkpoint with these settings."""
    method = f"{sampling.sampler}{sampling.steps}-cfg{sampling.guidance_scale:g}"
    if sampling.guidance_scale > 1:
        method += f"in{sampling.guidance_low:g}to{sampling.guidance_high:g}"
        method += f"on{sampling.guidance_channels}" if sampling.guidance_channels else ""
    method += f"-{sampling.precision}" if sampling.precision != Sampling.precision else ""
    labels = args.labels + ("" if args.classes is None else "-of-" + "-".join(map(str, args.classes)))
    checkpoint = "unknown-step" if step is None else f"{step:07d}"
    return f"{checkpoint}-{method}-{labels}-{args.num_samples}-seed{args.seed}"


def sample_batches(
    model: LoadedModel, sampling: Sampling, labels: Labels, batch_size: int, seed: int, skip: Collection[int] = ()
) -> Iterator[tuple[int, UInt8[np.ndarray, "b H W 3"]]]:
    """Samples a model batch by batch; arguments and batches as in `generate.in_batches`."""
    run = generate.make_generate(model.nets, model.objective, model.latent_shape, sampling)
    run = jax.jit(sharding.with_mesh_context(model.mesh, run))
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(model.mesh))
    yield from generate.in_batches(run, model.params, labels, batch_size, jax.random.key(seed), put, skip)


def write_npz(path: epath.Path, parts: Sequence[epath.Path], labels: Labels) -> None:
    """Writes ADM's npz from the .npy files of batches, in order, one batch in memory at a time; atomic."""
    shape = (len(labels), *_load_part(parts[0]).shape[1:])
    files.write_all({path: files.npz_writer({"arr_1": labels}, {"arr_0": (shape, map(_load_part, parts))})})


def _load_part(path):
    try:
        return np.load(io.BytesIO(path.read_bytes()))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: remove it, and run the same command to make it again") from error


def _save_part(path, array):
    def write(temporary):
        with temporary.open("wb") as file:
            np.save(file, array)

    files.write_all({path: write})


def _open_parts(folder, settings):
    """Makes and returns the folder of finished batches; ValueError if it holds some of other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "settings.json"
    if not manifest.exists():
        files.write_json(manifest, settings)
    before = {"precision": Sampling.precision, **files.read_json(manifest)}  # once there was no other
    differing = {name: (before.get(name), settings[name]) for name in settings if before.get(name) != settings[name]}
    if differing:
        made = f"{folder} holds batches made with other settings (there, here): {differing}"
        raise ValueError(f"{made}; choose another --out, or the old settings")
    return folder


def run(args: argparse.Namespace) -> epath.Path:
    """Samples as the command line says; returns the path of the npz."""
    if jax.process_count() > 1:
        raise ValueError("sampling runs in one process; start it on one host")
    if args.batch_size % jax.device_count():
        raise ValueError(f"--batch_size={args.batch_size} is not a multiple of the {jax.device_count()} devices")
    model = load_model(args.workdir, args.step, vae_path=args.vae, sampler=args.sampler)
    sampling, classes = choose_sampling(args, model)
    labels = draw_labels(args.labels, args.num_samples, classes, args.seed)
    out = _choose_out(args, settings_name(model.step, sampling, args))
    settings = {
        "step": model.step, "weights": fingerprint(model.params), "num_samples": args.num_samples,
        "batch_size": args.batch_size, "labels": args.labels, "classes": classes, "seed": args.seed,
        **dataclasses.asdict(sampling),
    }  # fmt: skip
    folder = _open_parts(out.with_name(out.name + ".parts"), settings)
    parts = [folder / f"{index:06d}.npy" for index in range(-(-args.num_samples // args.batch_size))]
    _sample_parts(parts, model, sampling, labels, args)
    return _join_parts(parts, out, labels, args)


def _choose_out(args, name):
    """Returns the path of the result without its ending; ValueError if it exists."""
    if not args.out and not epath.Path(args.workdir).is_dir():
        raise ValueError(f"{args.workdir} is no folder to keep samples in: give --out")
    out = epath.Path(args.out or f"{args.workdir}/generated/{name}")
    npz = out.with_name(out.name + ".npz")
    if npz.exists():
        raise ValueError(f"{npz} exists; choose another --out, or move it away")
    return out


def _sample_parts(parts, model, sampling, labels, args):
    """Samples the batches that are not finished yet."""
    done = {index for index, path in enumerate(parts) if path.exists() and len(_load_part(path))}
    initial = min(len(done) * args.batch_size, args.num_samples)
    with tqdm(total=args.num_samples, initial=initial, unit="img", desc=f"step {model.step}") as bar:
        for index, batch in sample_batches(model, sampling, labels, args.batch_size, args.seed, skip=done):
            _save_part(parts[index], batch)
            bar.update(len(batch))


def _join_parts(parts, out, labels, args):
    """Writes npz, picture and settings from finished batches, and removes these; returns the path of the npz."""
    npz, folder = out.with_name(out.name + ".npz"), parts[0].parent
    write_npz(npz, parts, labels)
    shown = np.concatenate([_load_part(path) for path in parts[: -(-args.grid // args.batch_size)]])[: args.grid]
    picture = images.grid(shown, int(np.ceil(np.sqrt(len(shown)))), scale=images.viewing_scale(shown.shape[1]))
    files.save_png(out.with_name(out.name + ".png"), picture)
    (folder / "settings.json").copy(out.with_name(out.name + ".json"), overwrite=True)
    folder.rmtree()  # everything in it is in the npz now
    return npz


@cli.command(parse_args, "interrupted: what is finished is kept; run the same command to continue")
def main(args):
    """Entry point."""
    npz = run(args)
    print(f"{args.num_samples} samples: {npz}\npicture: {npz.with_suffix('.png')}")


if __name__ == "__main__":
    main()
