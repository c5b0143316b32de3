"""Checkpoints of our training runs -> published training checkpoints, discriminators, VAEs."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from checkpoints_tools import discriminator, published, published_args, sit, torch_param_order, training_state, vae, vae_layouts
from checkpoints_tools.mapping import Tree
from repae_jax import ranges
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.sit import SiT
from repae_jax.models.vae_families import VaeModule, make_vae
from repae_jax.training import averages, checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run, whose arrays are read from disk when asked for."""

    workdir: Path
    config: Mapping[str, Any]  # nested
    step: int
    shapes: Tree  # the stored state, as ShapeDtypeStruct
    networks: training_state.Networks  # modules that the run trains
    vae: VaeModule  # trained or frozen
    ema: str | None = None  # which average is 'ema', see `averages.parse`

    @property
    def ema_decay(self) -> float | str:
        """Decay of the average, or 'sigma=S'."""
        return averages.described(self.ema, self.config)

    def read(self, path: str) -> Any:
        """Reads a part of the state, such as 'ema.params'."""
        names = path.split(".")
        if names[0] == "ema":
            part = {names[1]: self.shapes["ema"][names[1]]}
            return averages.read(self.workdir, part, self.step, self.ema)[0][names[1]]
        wanted = {path: functools.reduce(operator.getitem, names, self.shapes)}
        restored, _ = checkpoint.restore_subset(self.workdir, traverse_util.unflatten_dict(wanted, sep="."), self.step)
        return functools.reduce(operator.getitem, names, restored)


def open_run(workdir: Path, step: int | None = None, ema: str | None = None) -> Run:
    """Opens a checkpoint of a run, the newest by default, with one of its averages, by default that of config.ema_decay."""
    config = checkpoint.read_config(workdir, step)
    shapes, step = checkpoint.stored_shapes(workdir, step)
    trained = {name: shapes[name]["params"] for name in ("sit", "vae", "disc") if shapes.get(name)}
    to_tokens = trained.get("vae", {}).get("vf_projection")
    feature_dim = to_tokens and to_tokens["kernel"].shape[1]
    autoencoder, sit_module = make_vae(config["vae"], config["data"]["image_size"], feature_dim=feature_dim), None
    if "sit" in trained:
        projectors = [tree for name, tree in sorted(trained["sit"].items()) if name.startswith("projectors_")]
        lasts = [tree["conv"] if "conv" in tree else tree["fc3"] for tree in projectors]
        sit_module = SiT(
            num_classes=config["data"]["num_classes"], latent_channels=autoencoder.latent_channels,
            feature_dims=tuple(last["bias"].shape[0] for last in lasts), internal_head="internal_layer" in trained["sit"],
            conditions=sum(name.startswith("condition_embedders_") for name in trained["sit"]), **config["sit"],
        )
    disc = PatchDiscriminator(**config["disc"]) if "disc" in trained else None
    networks = training_state.Networks(sit_module, autoencoder if "vae" in trained else None, disc)
    return Run(workdir, config, step, shapes, networks, autoencoder, ema)


def read_frozen_vae(run: Run, path: str) -> Tree:
    """Returns the parameters of the frozen VAE at a path or name; errors as of `check_frozen_vae`."""
    try:
        params = vae.read_vae_params(path, run.vae)
    except FileNotFoundError as error:
        raise missing_frozen_vae(run.workdir, path, error) from error
    check_frozen_vae(run.workdir, run.step, path, params)
    return params


def missing_frozen_vae(workdir: Any, path: str, error: Exception) -> FileNotFoundError:
    """Returns the error for a frozen VAE that is not where the run's config says."""
    return FileNotFoundError(f"the run in {workdir} has a frozen VAE, {path}, which is not there: give --vae ({error})")


def check_frozen_vae(workdir: Any, step: int | None, path: str, params: Tree) -> None:
    """Raises ValueError if a VAE's parameters, from `path`, are not those that the run was trained on."""
    before, now = checkpoint.read_data_state(workdir, step)["inputs"]["frozen_vae"], checkpoint.fingerprint(params)
    if before != now:
        trained = f"the run in {workdir} was trained on the frozen VAE {before}, not on {path}, which is {now}"
        raise ValueError(f"{trained} (fingerprints of the weights): give the right one as --vae")


def discriminator_of(run: Run) -> dict[str, np.ndarray]:
    """Returns the published state dict of a run's discriminator."""
    tree = {"params": run.read("disc.params"), "batch_stats": run.read("disc.batch_stats")}
    return torch_param_order.to_ordered_torch(discriminator.discriminator_table(run.networks.disc, run.step), tree)


def check_square(run: Run, target: str) -> None:
    """Raises ValueError for a run on images that are no squares, if its SiT is to become `target`, which knows no others."""
    height, width = ranges.height_width(run.config["data"]["image_size"])
    if height != width:
        raise ValueError(
            f"{run.workdir} is a run on images of {height} x {width} pixels, but {target} is for squares alone: sample with "
            "`python -m repae_jax.sample`; extract-vae writes its VAE, which takes any size"
        )


def training_checkpoint_of(run: Run, optimizers: bool = True) -> published.TrainingCheckpoint:
    """Returns the published training checkpoint of a run that trains a SiT, with or without its optimizer states.

    ValueError if its VAE has no place there.
    """
    if not isinstance(run.vae, AutoencoderKL):
        family = f"config.vae.family={run.config['vae']['family']!r}"
        raise ValueError(f"{run.workdir} is of {family}, which the published code has not: no published training checkpoint")
    check_square(run, "a published training checkpoint")
    sit.check_conditions(run.networks.sit)
    groups = {}
    for optimizer, path in training_state.OPT_STATES.items() if optimizers else ():
        if fields := run.config["optim"].get(path.partition(".")[0]):
            if fields.get("method") == "muon":
                state = f"the state of config.optim.{path.partition('.')[0]}.method='muon'"
                raise ValueError(f"{run.workdir}: the published layout has no place for {state}: add --weights_only")
            settings = {"lr": fields["learning_rate"], "betas": (fields["b1"], fields["b2"])}
            groups[optimizer] = settings | {name: fields[name] for name in ("eps", "weight_decay")}
    return training_state.from_run(run.read, run.networks, run.step, _published_args(run), str(run.workdir), groups)


def _published_args(run):
    """The published command line of a run; warns of networks that the published code lacks."""
    config, networks = run.config, run.networks
    published_args.check_prediction(config, str(run.workdir))
    model, autoencoder = sit.model_name(networks.sit), vae_layouts.published_name(run.vae)
    fields = [entry for _, entry in sorted(config["encoders"].items())]
    architectures = [entry.get("architecture") or Path(entry["weights"]).name for entry in fields]
    encoders = [published_args.ENCODER_TYPES.get(str(architecture)) for architecture in architectures]
    is_unknown = {
        "SiT": model is None, "VAE": autoencoder is None, "encoders": None in encoders, "SiT without projectors": not encoders,
        "projector to SiT's own tokens": len(networks.sit.feature_dims) > len(fields),
        "projector": networks.sit.projector != "mlp", "DiT": networks.sit.learned_sigma,
        "map from the VAE's latents to tokens": run.vae.feature_dim,
    }
    if any(is_unknown.values()):
        logging.warning(
            "the published code has no such %s: its scripts will not build these networks, whose weights are written all the "
            "same", " and ".join(name for name, unknown in is_unknown.items() if unknown),
        )
    encoder_type = ",".join(name or "custom" for name in encoders) or "None"
    sizes = {"num_heads": networks.sit.num_heads, "norm_groups": run.vae.norm_groups}
    return published_args.args_from_config(config, model or "custom", autoencoder or "custom", encoder_type, **sizes)
