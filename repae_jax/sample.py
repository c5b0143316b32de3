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
from repae_jax.diffusion.guidance import CONSTANT, SCHEDULES
from repae_jax.diffusion.samplers import PRECISIONS, SAMPLERS, Sampling, check_channels, check_sampler, check_weaker
from repae_jax.distributed import sharding
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import LoadedModel, Weaker, load_model, load_weaker
from repae_jax.training import averages
from repae_jax.training.checkpoint import fingerprint

LABELS = ("random", "balanced")
_ODE = "euler, heun, dpmpp, adaptive dopri5"
Labels = Int[np.ndarray, " N"]


def add_arguments(parser: argparse.ArgumentParser, num_samples: int) -> list[Any]:
    """Adds the settings of sampling to a parser, in groups, which it returns; `num_samples` is a default."""
    samples = parser.add_argument_group("which samples a model draws")
    add = samples.add_argument
    add("--num_samples", type=cli.whole(1), default=num_samples, help="exactly so many images")
    add("--labels", choices=LABELS, default="balanced", help="balanced: equal counts per class, in shuffled order")
    add("--classes", type=cli.whole(0), nargs="+", help="draw labels from these classes only")
    add("--seed", type=cli.seed, default=0, help="image i depends on the seed, i and its label alone")

    of_run = "what is left out is as in the run's config.sampling"
    method = parser.add_argument_group("how they are drawn", of_run)
    add = method.add_argument
    add("--sampler", choices=tuple(SAMPLERS), help=f"ODE ({_ODE}) or SDE; DiT's is ancestral, MeanFlow's meanflow")
    add("--steps", type=int, help="sampling steps")
    shifted = "above 1, steps are nearer to noise; sqrt(numbers of the latents / 4096) for a network trained so"
    add("--time_shift", type=float, metavar="SHIFT", help=shifted)
    add("--tolerance", type=float, help="of dopri5's steps, relative to the latents")
    products = "of the SiT's matrix products; float32 as published. The sampler and the decoder stay in float32"
    add("--precision", choices=PRECISIONS, help=products)

    guided = parser.add_argument_group("guidance away from no class", of_run)
    add = guided.add_argument
    add("--guidance_scale", type=float, metavar="SCALE", help="how far; 1 is no guidance")
    add("--guidance_low", type=float, metavar="T", help="from this t (0 is data) …")
    add("--guidance_high", type=float, metavar="T", help="… up to this t (1 is noise)")
    some = "so many channels; 3 as in DiT's, SiT's and LightningDiT's samples. Of all kinds of guidance"
    add("--guidance_channels", type=int, metavar="COUNT", help=some)
    add("--guidance_schedule", choices=SCHEDULES, help="how the scale grows toward data")
    add("--guidance_power", type=float, metavar="POWER", help="of power_cosine: the larger, the later guidance sets in")

    away = parser.add_argument_group("guidance away from a weaker output", f"one of the two scales; {of_run}")
    add = away.add_argument
    weaker = "a network of the same VAE and classes: a run, at its newest step or another"
    add("--autoguidance", type=cli.path, metavar="RUN[@STEP]", help=weaker)
    add("--autoguidance_scale", type=float, metavar="SCALE", help="how far away from that network; 1 is not at all")
    head = "how far away from the model's own head at the tap, trained by config.loss.sit.internal"
    add("--internal_scale", type=float, metavar="SCALE", help=head)
    add("--weaker_low", type=float, metavar="T", help="either of them from this t …")
    add("--weaker_high", type=float, metavar="T", help="… up to this t")
    return [samples, method, guided, away]


def add_ema(parser: Any) -> None:
    """Adds --ema, the choice of a run's average."""
    text = "average of the weights: a decay that the run has kept, or sigma=S, which is made from config.ema_sigmas'"
    parser.add_argument("--ema", metavar="DECAY|sigma=S", help=text + "; default config.ema_decay's")


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0], formatter_class=cli.HelpFormatter)
    workdir = "folder of a run; or a published one, or its checkpoint"
    parser.add_argument("--workdir", type=cli.path, required=True, help=workdir)
    parser.add_argument("--vae", type=cli.path, help="the VAE of a run that holds none, or of published weights that hold none")
    out = "path of the result without its ending; default WORKDIR/generated/STEP-SETTINGS"
    parser.add_argument("--out", type=cli.path, help=out)
    parser.add_argument("--step", type=cli.whole(0), help="checkpoint to sample from; default the newest")
    add_ema(parser)
    parser.add_argument("--batch_size", type=cli.whole(1), default=64, help="images at a time, over all devices")
    parser.add_argument("--grid", type=cli.whole(1), default=64, help="how many samples the picture shows")
    add_arguments(parser, num_samples=64)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, swept: Collection[str] = ()) -> None:
    """Ends the program, before a model is loaded, if no model could be sampled with the settings of `add_arguments`.

    `swept` names fields of Sampling that get values later.
    """
    try:
        sampling = Sampling(**given(args))
        if "autoguidance_scale" not in swept:
            check_weaker(sampling, has_head=True, has_network=args.autoguidance is not None)
        elif args.autoguidance is None:
            raise ValueError("sweep of autoguidance_scale, but --autoguidance names no weaker network: name one")
        if args.ema is not None:
            averages.parse(args.ema)
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
    check_weaker(sampling, model.nets.sit.internal_head, model.weaker_for(sampling) is not None)
    check_channels(sampling, model.latent_shape[-1])
    classes = args.classes or list(range(model.num_classes))
    if max(classes) >= model.num_classes:
        raise ValueError(f"--classes {classes}: allowed are 0..{model.num_classes - 1}")
    return sampling, classes


def settings_name(step: int | None, sampling: Sampling, args: argparse.Namespace, weaker: Weaker | None = None) -> str:
    """Returns the name of samples from a checkpoint with these settings; `weaker` is the network that autoguidance takes."""
    between = "-" if sampling.sampler[-1].isdigit() else ""
    method = f"{sampling.sampler}{between}{sampling.steps}-cfg{sampling.guidance_scale:g}"
    channels = f"on{sampling.guidance_channels}" if sampling.guidance_channels else ""
    if sampling.guidance_scale > 1:
        method += f"in{sampling.guidance_low:g}to{sampling.guidance_high:g}{channels}"
        method += "" if sampling.guidance_schedule == CONSTANT else f"by{sampling.guidance_schedule}"
        method += f"{sampling.guidance_power:g}" if sampling.guidance_schedule == "power_cosine" else ""
    for kind, scale in (("auto", sampling.autoguidance_scale), ("internal", sampling.internal_scale)):
        method += f"-{kind}{scale:g}in{sampling.weaker_low:g}to{sampling.weaker_high:g}{channels}" if scale > 1 else ""
    method += "" if weaker is None else f"of{_step_name(weaker.step)}-{weaker.weights[:8]}"
    method += f"-{sampling.precision}" if sampling.precision != Sampling.precision else ""
    method += f"-shift{sampling.time_shift:g}" if sampling.time_shift != Sampling.time_shift else ""
    method += f"-tolerance{sampling.tolerance:g}" if sampling.tolerance != Sampling.tolerance else ""
    labels = args.labels + ("" if args.classes is None else "-of-" + "-".join(map(str, args.classes)))
    average = f"-ema-{args.ema.replace('=', '')}" if args.ema is not None else ""
    return f"{_step_name(step)}{average}-{method}-{labels}-{args.num_samples}-seed{args.seed}"


def _step_name(step):
    return "unknown-step" if step is None else f"{step:07d}"


def describe(sampling: Sampling, model: LoadedModel) -> dict[str, Any]:
    """Returns the settings of sampling as plain values, with the weaker network, if they need one, for files of results."""
    weaker = model.weaker_for(sampling)
    return {**dataclasses.asdict(sampling), **({} if weaker is None else {"autoguidance": weaker.describe()})}


def sample_batches(
    model: LoadedModel, sampling: Sampling, labels: Labels, batch_size: int, seed: int, skip: Collection[int] = ()
) -> Iterator[tuple[int, UInt8[np.ndarray, "b H W 3"]]]:
    """Samples a model batch by batch; arguments and batches as in `generate.in_batches`."""
    weaker, params = model.weaker_for(sampling), model.params
    if weaker is not None:
        params = {**params, "weaker": weaker.params}
    run = generate.make_generate(model.nets, model.objective, model.latent_shape, sampling, weaker and weaker.sit)
    run = jax.jit(sharding.with_mesh_context(model.mesh, run))
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(model.mesh))
    yield from generate.in_batches(run, params, labels, batch_size, jax.random.key(seed), put, skip)


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
    before = {**dataclasses.asdict(Sampling()), **files.read_json(manifest)}  # settings that came later were so before
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
    model = load_model(args.workdir, args.step, vae_path=args.vae, sampler=args.sampler, ema=args.ema)
    if args.autoguidance:
        model = load_weaker(model, args.autoguidance, args.vae)
    sampling, classes = choose_sampling(args, model)
    labels = draw_labels(args.labels, args.num_samples, classes, args.seed)
    out = _choose_out(args, settings_name(model.step, sampling, args, model.weaker_for(sampling)))
    settings = {
        "step": model.step, "weights": fingerprint(model.params), "num_samples": args.num_samples,
        "batch_size": args.batch_size, "labels": args.labels, "classes": classes, "seed": args.seed,
        **describe(sampling, model),
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
    picture = images.grid(shown, int(np.ceil(np.sqrt(len(shown)))), scale=images.viewing_scale(shown.shape[1:3]))
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
