"""Artefacts -> files in other layouts: what `convert` and `extract-vae` do."""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from checkpoints_tools import (
    discriminator,
    inception,
    lpips,
    mapping,
    published,
    sit,
    torch_param_order,
    training_state,
    vae,
    vae_layouts,
    vit,
    weights,
)
from checkpoints_tools.identify import KINDS, identify
from checkpoints_tools.training_state import Networks
from repae_jax import files
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.sit import SiT
from repae_jax.training import checkpoint

DISCRIMINATOR = "-discriminator-ckpt"  # the end of a name, as `vae.save_published` gives it: a discriminator alone
SD_VAE_STD = 1 / 0.18215  # of the latents that plain SiT, REPA and DiT were trained on; their mean is taken to be 0


def convert(source, target, *, step=None, optimizers=True, plain_sit=False, latent_stats=None, overwrite=False):
    """Converts an artefact; the target's ending says into what.

    Args:
      source: what `identify` takes.
      target: file ending in .pt or .safetensors, or a folder (no ending): a published run for a run or a training checkpoint, a
        diffusers or transformers folder for a VAE or an encoder. Of a run, a file NAME-discriminator-ckpt.pt is its
        discriminator alone.
      step: of a run's checkpoint; the newest by default.
      optimizers: whether a training checkpoint takes the optimizer states along.
      plain_sit: the source is a plain SiT, whose t = 0 is noise: turn its time round, drop its unused sigma channels and add
        the statistics of the latents it was trained on, so that it is used as REPA's and ours are.
      latent_stats: file with the statistics of a VAE's latents, see `vae.read_latent_stats`, if the source does not tell them.
      overwrite: replace files that exist.

    Returns:
      list of paths written.

    Raises:
      FileExistsError: if a target exists and `overwrite` is False.
      ValueError: if the source is damaged or unknown, or cannot become what the target's ending says.
    """
    ending = _ending(target, overwrite)
    artefact = identify(source, step)
    if latent_stats is not None and artefact.kind != "vae":
        raise ValueError(f"{source} is a {KINDS[artefact.kind]}: latent_stats {latent_stats} are for a VAE")
    if plain_sit:
        if artefact.kind not in ("sit", "training"):
            raise ValueError(f"{source} is a {KINDS[artefact.kind]}: plain_sit is for the weights of a plain SiT alone")
        _need(ending, source, artefact, target, "a file ending in .pt or .safetensors")
        path = str(artefact.path)
        del artefact  # its arrays: the file is read again, so that no more than two copies are held at a time
        return _write_arrays(target, ending, _reversed_sit(path), overwrite)
    if artefact.kind == "run":
        run = _open_run(artefact.path, step)
        if ending and Path(target).stem.endswith(DISCRIMINATOR):
            if run.networks.disc is None:
                raise ValueError(f"{source} is a run without a discriminator, which {target} would be")
            return _write_arrays(target, ending, _discriminator(run), overwrite)
        if run.networks.sit is None:
            vae_too = "" if run.networks.vae is None else "; extract-vae writes its VAE"
            raise ValueError(
                f"{source} is a run without a SiT, which cannot become a published training checkpoint: convert it to "
                f"NAME{DISCRIMINATOR}.pt to have its discriminator{vae_too}"
            )
        return _write_training(_from_run(run, optimizers), target, ending, overwrite)
    if artefact.kind == "training":
        taken = artefact.checkpoint
        check_networks(taken)
        if not optimizers:
            taken = dataclasses.replace(taken, optimizers={})
        return _write_training(taken, target, ending, overwrite)
    if artefact.kind == "vae":
        loaded = vae.load_vae(source)
        stats = loaded.latent_stats if latent_stats is None else vae.read_latent_stats(latent_stats)
        if ending:
            return vae.save_published(target, loaded.module, loaded.params, stats, overwrite=overwrite)
        vae.save_diffusers(target, loaded.module, loaded.params, stats, overwrite=overwrite)
        return [target]
    if artefact.kind in ("encoder", "mocov3"):
        _need(not ending, source, artefact, target, "a folder, which transformers reads")
        module, params = vit.read_encoder(source)
        if not module.final_norm:
            logging.warning("%s: its final norm follows the tokens that are used here; it is written as the identity", source)
        vit.save_encoder(target, module, params, overwrite=overwrite)
        return [target]
    _need(ending, source, artefact, target, "a file ending in .pt or .safetensors")
    return _write_arrays(target, ending, _checked(artefact, source), overwrite)


def _write_arrays(target, ending, state_dict, overwrite):
    epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
    write = weights.write_torch if ending == ".pt" else weights.write_safetensors
    write(target, state_dict, overwrite=overwrite)
    return [target]


@dataclasses.dataclass(frozen=True)
class FoundVae:
    """The VAE of a run or of a training checkpoint.

    Attributes:
      module: AutoencoderKL.
      params: its parameters; of a run that trains the VAE without a SiT the averaged ones.
      latent_stats: {'mean', 'var'}, float32 [C].
      discriminator: published state dict, or None.
      steps: training steps taken, None if unknown.
    """

    module: AutoencoderKL
    params: Mapping[str, Any]
    latent_stats: Mapping[str, np.ndarray]
    discriminator: Mapping[str, np.ndarray] | None
    steps: int | None


def find_vae(source, step=None):
    """The VAE in a run or in a training checkpoint.

    Args:
      source: workdir of a run that trains a VAE, or a published training checkpoint.
      step: of a run's checkpoint; the newest by default.

    Returns:
      FoundVae.

    Raises:
      ValueError: if the source holds no VAE.
    """
    artefact = identify(source, step)
    if artefact.kind == "run":
        run = _open_run(artefact.path, step)
        if run.networks.vae is None:
            other = f"; convert it to NAME{DISCRIMINATOR}.pt to have its discriminator" if run.networks.sit is None else ""
            raise ValueError(
                f"{source} is a run on a frozen VAE and holds none: it is config.init.vae={run.config['init']['vae']!r}{other}"
            )
        places = ("ema.params", "latent_stats") if run.networks.sit is None else ("vae.params", "ema.latent_stats")
        params, stats = map(run.read, places)
        disc = None if run.networks.disc is None else _discriminator(run)
        return FoundVae(run.networks.vae, params, stats, disc, run.step)
    if artefact.kind == "training" and "vae" in artefact.checkpoint.networks:
        taken = artefact.checkpoint
        module, params = vae.from_state_dict(taken.networks["vae"], f"{source}: vae", taken.norm_groups)
        average = taken.networks.get("ema", {})
        if "bn.running_mean" not in average:
            raise ValueError(f"{taken.source} has no averaged latent statistics (ema: bn.running_mean), which its VAE needs")
        stats = {"mean": average["bn.running_mean"], "var": average["bn.running_var"]}
        return FoundVae(module, params, stats, taken.networks.get("discriminator"), taken.steps)
    raise ValueError(
        f"{source} is a {KINDS[artefact.kind]} without a VAE to extract; give the workdir of a run, or a published "
        "checkpoint with a VAE in it"
    )


def extract_vae(source, target, *, step=None, overwrite=False):
    """Writes the VAE of a run or of a training checkpoint, with its latent statistics and discriminator.

    Args:
      source: as `find_vae`.
      target: NAME.pt or NAME.safetensors, beside which NAME-latents-stats and NAME-discriminator-ckpt appear; or a folder (no
        ending), which diffusers reads, which carries the statistics as latents_mean and latents_std, and the discriminator
        as discriminator.safetensors.
      step: as `find_vae`.
      overwrite: replace files that exist.

    Returns:
      list of paths written.

    Raises:
      FileExistsError: if a target exists and `overwrite` is False.
      ValueError: if the source holds no VAE.
    """
    ending = _ending(target, overwrite)
    found = find_vae(source, step)
    write = vae.save_published if ending else vae.save_diffusers
    return write(target, found.module, found.params, found.latent_stats, found.discriminator, overwrite=overwrite)


def _ending(target, overwrite):
    """Of the target's name; checked, as is that nothing is in the way, before anything is read."""
    ending = Path(target).suffix
    if ending in (*weights.TORCH_SUFFIXES, ".npz", ".json", ".pb") and ending != ".pt":
        raise ValueError(f"{target} ends in {ending!r}; allowed: .pt, .safetensors, or the name of a folder")
    if ending not in (".pt", ".safetensors"):
        return ""  # a folder, whose name may hold dots
    if not overwrite:
        files.check_absent(target)
    return ending


def _need(condition, source, artefact, target, what):
    if not condition:
        raise ValueError(f"{source} is a {KINDS[artefact.kind]}, so the target {target} must be {what}")


def _reversed_sit(source):
    """State dict of a plain SiT as ours and REPA-E's are."""
    loaded = sit.load_sit(source)
    if loaded.layout != "sit-or-dit":
        raise ValueError(f"{source} is of layout {loaded.layout!r}, not a plain SiT: leave plain_sit out")
    module, params = sit.without_sigma(loaded.module, sit.reverse_time(loaded.variables["params"]))
    ones = np.ones(module.latent_channels, np.float32)
    variables = {"params": params, "latent_stats": {"mean": 0 * ones, "var": np.float32(SD_VAE_STD**2) * ones}}
    return torch_param_order.to_ordered_torch(sit.sit_table(module), variables)


def _checked(artefact, source):
    """State dict of one network, every name and shape checked against its table."""
    if artefact.kind == "sit":
        sit.from_state_dict(artefact.arrays, str(source))
        return artefact.arrays
    if artefact.kind == "latent_stats":
        return vae.published_stats(vae.read_latent_stats(source))
    if artefact.kind == "inception":
        return mapping.to_torch(inception.inception_table(), inception.load_inception(artefact.path))
    if artefact.kind == "discriminator":
        discriminator.from_state_dict(artefact.arrays, str(source))
    if artefact.kind in ("vgg16", "lpips"):
        lpips.check_files(artefact.arrays, artefact.kind, str(source))
    return artefact.arrays


def check_networks(taken):
    """ValueError listing all that is wrong with the networks of a training checkpoint."""
    problems, layouts = [], set()
    for name, arrays in taken.networks.items():
        source = f"{taken.source}: {name}"
        try:
            if name == "vae":
                vae.from_state_dict(arrays, source, taken.norm_groups)
            elif name == "discriminator":
                discriminator.from_state_dict(arrays, source)
            else:
                layouts.add(sit.from_state_dict(arrays, source, taken.encoder_depth, taken.num_heads).layout)
        except ValueError as error:
            problems.append(str(error))
    if len(layouts) > 1:
        problems.append(f"{taken.source}: model and ema are of different layouts, {' and '.join(sorted(layouts))}")
    if problems:
        raise ValueError("\n".join(problems))


class _Run(NamedTuple):
    """A run's checkpoint, open.

    Attributes:
      workdir: of the run.
      config: nested dict.
      step: of the checkpoint.
      networks: Networks that it trains.
      vae: AutoencoderKL, trained or frozen.
      read: place in the state, such as 'ema.params' -> that subtree.
    """

    workdir: Any
    config: Mapping[str, Any]
    step: int
    networks: Networks
    vae: AutoencoderKL
    read: Callable[[str], Any]


def _open_run(workdir, step):
    config = checkpoint.read_config(workdir, step)
    shapes, step = checkpoint.stored_shapes(workdir, step)
    trained = {name: shapes[name]["params"] for name in ("sit", "vae", "disc") if shapes.get(name)}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in config["vae"].items()}
    if "vf_projection" in trained.get("vae", {}):
        fields["feature_dim"] = trained["vae"]["vf_projection"]["kernel"].shape[1]
    module, sit_module = AutoencoderKL(**fields), None
    if "sit" in trained:
        projectors = [tree for name, tree in sorted(trained["sit"].items()) if name.startswith("projectors_")]
        lasts = [tree["conv"] if "conv" in tree else tree["fc3"] for tree in projectors]
        sit_module = SiT(
            num_classes=config["data"]["num_classes"], latent_channels=module.latent_channels,
            feature_dims=tuple(last["bias"].shape[0] for last in lasts), **config["sit"],
        )  # fmt: skip
    networks = Networks(
        sit=sit_module,
        vae=module if "vae" in trained else None,
        disc=PatchDiscriminator(**config["disc"]) if "disc" in trained else None,
    )

    def read(place):
        path = place.split(".")
        wanted = functools.reduce(operator.getitem, path, shapes)
        for name in reversed(path):
            wanted = {name: wanted}
        restored, _ = checkpoint.restore_subset(workdir, wanted, step)
        return functools.reduce(operator.getitem, path, restored)

    return _Run(workdir, config, step, networks, module, read)


def _discriminator(run):
    """Published state dict of a run's discriminator."""
    tree = {"params": run.read("disc.params"), "batch_stats": run.read("disc.batch_stats")}
    return torch_param_order.to_ordered_torch(discriminator.discriminator_table(run.networks.disc, run.step), tree)


def _from_run(run, optimizers):
    """TrainingCheckpoint of a run that trains a SiT."""
    config, networks = run.config, run.networks
    model, vae_name = sit.model_name(networks.sit), vae_layouts.published_name(run.vae)
    encoders = [entry.get("architecture") or Path(entry["weights"]).name for _, entry in sorted(config["encoders"].items())]
    kinds = [published.ENCODER_TYPES.get(str(encoder)) for encoder in encoders]
    unknown = [what for what, name in (("SiT", model), ("VAE", vae_name)) if name is None]
    unknown += ["encoders"] if None in kinds else ["SiT without projectors"] if not kinds else []
    unknown += ["projector"] if networks.sit.projector != "mlp" else []
    unknown += ["DiT"] if networks.sit.learned_sigma else []
    unknown += ["map from the VAE's latents to tokens"] if run.vae.feature_dim else []
    if unknown:
        logging.warning(
            "the published code has no such %s: its scripts will not build these networks, whose weights are written all the "
            "same", " and ".join(unknown),
        )  # fmt: skip
    args = published.args_from_config(
        config,
        model=model or "custom",
        vae=vae_name or "custom",
        encoder_type=",".join(kind or "custom" for kind in kinds) or "None",
        num_heads=networks.sit.num_heads,
        norm_groups=run.vae.norm_groups,
    )
    groups = {
        optimizer: {
            "lr": fields["learning_rate"], "betas": (fields["b1"], fields["b2"]), "eps": fields["eps"],
            "weight_decay": fields["weight_decay"],
        }
        for optimizer, place in training_state.OPT_STATES.items()
        for name, fields in config["optim"].items()
        if name == place.partition(".")[0]
    }  # fmt: skip
    return training_state.from_run(run.read, networks, run.step, args, str(run.workdir), groups if optimizers else {})


def _recipe(args):
    """What stays the same over a run: not its length, nor how often it saves."""
    return {name: value for name, value in args.items() if name not in published.OPERATION}


def _write_training(taken, target, ending, overwrite):
    """A single file, or the folder of a published run, where args.json lies beside the checkpoints."""
    if ending:
        epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
        published.write(target, taken, overwrite=overwrite)
        return [target]
    if taken.steps is None:
        raise ValueError(f"{taken.source} does not say how many steps it has taken: give a target that ends in .pt")
    folder = epath.Path(target)
    args, file = folder / "args.json", folder / "checkpoints" / f"{taken.steps:07d}.pt"
    if file.parent.exists() and not args.exists():
        raise FileExistsError(f"{folder} holds the checkpoints of a run of ours: choose another folder")
    if not overwrite:
        files.check_absent(file)
    if args.exists() and not overwrite and _recipe(files.read_json(args)) != _recipe(json.loads(json.dumps(taken.args))):
        raise FileExistsError(f"{args} is of another run; choose another folder, or ask to overwrite (--overwrite)")
    file.parent.mkdir(parents=True, exist_ok=True)
    # args.json last: what has one is a published run
    writes = {file: published.writer(file, taken), args: files.json_writer(dict(taken.args), args)}
    files.write_all(writes, overwrite=True)
    return [args, file]
