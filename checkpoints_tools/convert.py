"""Files, folders and runs -> files in other layouts: `convert` and `extract-vae`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from checkpoints_tools import discriminator, inception, lpips, published, published_args, runs, sit, vae, vae_stats, vit
from checkpoints_tools.identify import KINDS, Identified, identify
from checkpoints_tools.mapping import StateDict, to_torch
from checkpoints_tools.plain_sit import convert_plain_sit
from checkpoints_tools.weights import TORCH_SUFFIXES, write_files, writer
from repae_jax import files

DISCRIMINATOR = "-discriminator-ckpt"  # end of a name, as `vae.save_published` gives it: a discriminator alone


@dataclasses.dataclass(frozen=True)
class Target:
    """Place to write to."""

    path: str
    ending: str  # '.pt' or '.safetensors', or '' for a folder, whose name may hold dots
    overwrite: bool

    def check_is_file(self, is_file: bool, source: Any, kind: str) -> None:
        """Raises ValueError unless the target is a file where the source's kind needs one, a folder where it does not."""
        if is_file != bool(self.ending):
            needed = "a file ending in .pt or .safetensors" if is_file else "a folder, which transformers reads"
            raise ValueError(f"{source} is a {KINDS[kind]}, so the target {self.path} must be {needed}")

    def write(self, state_dict: StateDict) -> list[str]:
        """Writes a single state dict; returns the path."""
        return write_files({self.path: writer(state_dict, self.path)}, overwrite=self.overwrite)


def _target(path, overwrite):
    """Target, checked before anything is read: its ending, and that nothing is in the way."""
    ending = Path(path).suffix
    if ending in (*TORCH_SUFFIXES, ".npz", ".json", ".pb") and ending != ".pt":
        raise ValueError(f"{path} ends in {ending!r}; allowed: .pt, .safetensors, or the name of a folder")
    ending = ending if ending in (".pt", ".safetensors") else ""
    if ending and not overwrite:
        files.check_absent(path)
    return Target(path, ending, overwrite)


def convert(
    source: str | Path, target: str | Path, *, step: int | None = None, optimizers: bool = True, plain_sit: bool = False,
    latent_stats: str | Path | None = None, overwrite: bool = False, ema: str | None = None,
) -> list[Any]:
    """Converts a file, folder or run to another layout; returns the paths written.

    Args:
      source: path or name, as `identify` takes it.
      target: file ending in .pt or .safetensors, or a folder (no ending): a published run for a run or a training checkpoint, a
        diffusers or transformers folder for a VAE or an encoder. For a run, a file NAME-discriminator-ckpt.pt is its
        discriminator alone.
      step: which of a run's checkpoints to take; the newest by default.
      optimizers: whether to write the optimizer states.
      plain_sit: the source is a plain SiT, whose t = 0 is noise: reverse its time, drop its unused sigma channels and add the
        statistics of the latents it was trained on, so that it is used as REPA's and ours are.
      latent_stats: file with the statistics of a VAE's latents, see `vae.read_latent_stats`, if the source does not say them.
      overwrite: replace the target if it exists.
      ema: which of a run's averages, see `repae_jax.training.averages.parse`; default that of config.ema_decay.
    """
    place = _target(target, overwrite)
    identified = identify(source, step)
    check_ema(identified, ema)
    if latent_stats is not None and identified.kind != "vae":
        raise ValueError(f"{source} is a {KINDS[identified.kind]}: latent_stats {latent_stats} are for a VAE")
    if plain_sit:
        if identified.kind not in ("sit", "training"):
            raise ValueError(f"{source} is a {KINDS[identified.kind]}: plain_sit is for the weights of a plain SiT alone")
        place.check_is_file(True, source, identified.kind)
        path = identified.path
        del identified  # frees its arrays: the file is read again, so that no more than two copies are held at a time
        return place.write(convert_plain_sit(path))
    match identified.kind:
        case "run":
            return _convert_run(source, runs.open_run(identified.path, step, ema), place, optimizers)
        case "training":
            check_networks(identified.checkpoint)
            kept = identified.checkpoint.optimizers if optimizers else {}
            return _write_training(dataclasses.replace(identified.checkpoint, optimizers=kept), place)
        case "vae":
            loaded = vae.read_file(identified.path, identified.arrays)
            if latent_stats is not None:
                loaded = vae.with_latent_stats(loaded, latent_stats)
            return _write_vae(place, loaded)
        case "encoder" | "mocov3":
            place.check_is_file(False, source, identified.kind)
            stored = vit.read_file(identified.path, identified.arrays)
            if not stored.module.final_norm:
                logging.warning("%s: its final norm follows the tokens used here; it is written as the identity", source)
            vit.save_encoder(place.path, stored.module, stored.params, overwrite=overwrite)
            return [place.path]
        case _:
            place.check_is_file(True, source, identified.kind)
            return place.write(_checked_arrays(identified, str(source)))


def _convert_run(source, run, target, optimizers):
    """The published training checkpoint of a run, or its discriminator alone."""
    if target.ending and Path(target.path).stem.endswith(DISCRIMINATOR):
        if run.networks.disc is None:
            raise ValueError(f"{source} is a run without a discriminator, which {target.path} would be")
        return target.write(runs.discriminator_of(run))
    if run.networks.sit is None:
        vae_too = "" if run.networks.vae is None else "; extract-vae writes its VAE"
        advice = f"convert it to NAME{DISCRIMINATOR}.pt to have its discriminator{vae_too}"
        raise ValueError(f"{source} is a run without a SiT, which cannot become a published training checkpoint: {advice}")
    return _write_training(runs.training_checkpoint_of(run, optimizers), target)


def _checked_arrays(identified, source):
    """State dict of one network, every name and shape checked against its table."""
    arrays = identified.arrays
    match identified.kind:
        case "sit":
            sit.from_state_dict(arrays, source)
        case "discriminator":
            discriminator.from_state_dict(arrays, source)
        case "vgg16" | "lpips":
            lpips.check_files(arrays, identified.kind, source)
        case "latent_stats":
            return vae_stats.to_arrays(vae_stats.from_arrays(arrays, source))
        case "inception":
            return to_torch(inception.inception_table(), inception.read_file(identified.path, arrays))
    return arrays


def check_networks(training: published.TrainingCheckpoint) -> None:
    """Raises ValueError listing all that is wrong with the networks of a training checkpoint."""
    problems, layouts = [], set()
    for name, arrays in training.networks.items():
        try:
            if name == "vae":
                training.load_vae()
            elif name == "discriminator":
                discriminator.from_state_dict(arrays, f"{training.source}: {name}")
            else:
                layouts.add(training.load_sit(name).layout)
        except ValueError as error:
            problems.append(str(error))
    if len(layouts) > 1:
        problems.append(f"{training.source}: model and ema are of different layouts, {' and '.join(sorted(layouts))}")
    if problems:
        raise ValueError("\n".join(problems))


def _write_training(training, target):
    """Writes a single file, or the folder of a published run, where args.json lies beside the checkpoints."""
    if target.ending:
        return write_files({target.path: published.writer(target.path, training)}, overwrite=target.overwrite)
    if training.steps is None:
        raise ValueError(f"{training.source} does not say how many steps it has taken: give a target that ends in .pt")
    folder = epath.Path(target.path)
    args, file = folder / "args.json", folder / "checkpoints" / f"{training.steps:07d}.pt"
    if file.parent.exists() and not args.exists():
        raise FileExistsError(f"{folder} holds the checkpoints of a run of ours: choose another folder")
    if not target.overwrite:
        files.check_absent(file)
        as_json = json.loads(json.dumps(training.args))
        if args.exists() and not published_args.same_recipe(files.read_json(args), as_json):
            raise FileExistsError(f"{args} is of another run; choose another folder, or ask to overwrite (--overwrite)")
    # args.json last: a folder that has one is a published run
    writes = {file: published.writer(file, training), args: files.json_writer(dict(training.args), args)}
    write_files(writes, overwrite=True)
    return [args, file]


def _write_vae(target, loaded):
    save = vae.save_published if target.ending else vae.save_diffusers
    contents = (loaded.module, loaded.params, loaded.latent_stats, loaded.discriminator)
    return save(target.path, *contents, overwrite=target.overwrite)


def check_ema(source: Identified, ema: str | None) -> None:
    """Raises ValueError if an average is chosen of something else than a run of ours."""
    if ema is not None and source.kind != "run":
        kind = KINDS[source.kind]
        raise ValueError(f"{source.path} is a {kind}, which has no averages to choose from: leave --ema {ema} out")


def find_vae(source: Identified, step: int | None = None, ema: str | None = None) -> vae.LoadedVAE:
    """Returns the VAE in a run (at a step, the newest by default) or in a training checkpoint; ValueError if it holds none.

    Of a run that trains the VAE without a SiT it is the averaged one, `ema` as of `convert`.
    """
    if source.kind == "run":
        run = runs.open_run(source.path, step, ema)
        if run.networks.vae is None:
            other = f"; convert it to NAME{DISCRIMINATOR}.pt to have its discriminator" if run.networks.sit is None else ""
            frozen = f"config.init.vae={run.config['init']['vae']!r}"
            raise ValueError(f"{run.workdir} is a run on a frozen VAE and holds none: it is {frozen}{other}")
        paths = ("ema.params", "latent_stats") if run.networks.sit is None else ("vae.params", "ema.latent_stats")
        disc = None if run.networks.disc is None else runs.discriminator_of(run)
        return vae.LoadedVAE(run.networks.vae, *map(run.read, paths), discriminator=disc, steps=run.step)
    if source.kind == "training" and "vae" in source.checkpoint.networks:
        training = source.checkpoint
        module, params = training.load_vae()
        average = training.networks.get("ema", {})
        if "bn.running_mean" not in average:
            raise ValueError(f"{training.source} has no averaged latent statistics (ema: bn.running_mean), which its VAE needs")
        stats = {"mean": average["bn.running_mean"], "var": average["bn.running_var"]}
        return vae.LoadedVAE(module, params, stats, discriminator=training.networks.get("discriminator"), steps=training.steps)
    advice = "give the workdir of a run, or a published checkpoint with a VAE in it"
    raise ValueError(f"{source.path} is a {KINDS[source.kind]} without a VAE to extract; {advice}")


def extract_vae(
    source: str | Path, target: str | Path, *, step: int | None = None, overwrite: bool = False, ema: str | None = None
) -> list[Any]:
    """Writes the VAE of a run or of a training checkpoint, its latent statistics and discriminator; returns the paths.

    The target is a file of `vae.save_published` or a folder of `vae.save_diffusers`; the other arguments are as of `convert`.
    """
    place = _target(target, overwrite)
    identified = identify(source, step)
    check_ema(identified, ema)
    return _write_vae(place, find_vae(identified, step, ema))
