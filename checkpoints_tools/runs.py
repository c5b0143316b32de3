"""Checkpoints of our training runs -> published training checkpoints, discriminators, VAEs."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from checkpoints_tools import published_args, sit, training_state
from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.mapping import Tree
from checkpoints_tools.published import TrainingCheckpoint
from checkpoints_tools.torch_param_order import to_ordered_torch
from checkpoints_tools.training_state import Networks
from checkpoints_tools.vae_layouts import published_name
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.sit import SiT
from repae_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run, whose arrays are read from disk when asked for.

    Attributes:
      workdir: folder of the run.
      config: nested dict.
      step: step of the checkpoint.
      shapes: the stored state, as ShapeDtypeStruct.
      networks: the modules that the run trains.
      vae: trained or frozen.
    """

    workdir: Path
    config: Mapping[str, Any]
    step: int
    shapes: Tree
    networks: Networks
    vae: AutoencoderKL

    def read(self, path: str) -> Any:
        """Reads a part of the state, such as 'ema.params'."""
        names = path.split(".")
        wanted = functools.reduce(operator.getitem, names, self.shapes)
        for name in reversed(names):
            wanted = {name: wanted}
        restored, _ = checkpoint.restore_subset(self.workdir, wanted, self.step)
        return functools.reduce(operator.getitem, names, restored)


def open_run(workdir: Path, step: int | None = None) -> Run:
    """Opens a checkpoint of a run, the newest by default."""
    config = checkpoint.read_config(workdir, step)
    shapes, step = checkpoint.stored_shapes(workdir, step)
    trained = {name: shapes[name]["params"] for name in ("sit", "vae", "disc") if shapes.get(name)}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in config["vae"].items()}
    if "vf_projection" in trained.get("vae", {}):
        fields["feature_dim"] = trained["vae"]["vf_projection"]["kernel"].shape[1]
    vae, sit_module = AutoencoderKL(**fields), None
    if "sit" in trained:
        projectors = [tree for name, tree in sorted(trained["sit"].items()) if name.startswith("projectors_")]
        lasts = [tree["conv"] if "conv" in tree else tree["fc3"] for tree in projectors]
        sit_module = SiT(
            num_classes=config["data"]["num_classes"], latent_channels=vae.latent_channels,
            feature_dims=tuple(last["bias"].shape[0] for last in lasts), **config["sit"],
        )  # fmt: skip
    networks = Networks(
        sit=sit_module,
        vae=vae if "vae" in trained else None,
        disc=PatchDiscriminator(**config["disc"]) if "disc" in trained else None,
    )
    return Run(workdir, config, step, shapes, networks, vae)


def discriminator_of(run: Run) -> dict[str, np.ndarray]:
    """Returns the published state dict of a run's discriminator."""
    tree = {"params": run.read("disc.params"), "batch_stats": run.read("disc.batch_stats")}
    return to_ordered_torch(discriminator_table(run.networks.disc, run.step), tree)


def training_checkpoint_of(run: Run, optimizers: bool = True) -> TrainingCheckpoint:
    """Returns the published training checkpoint of a run that trains a SiT, with or without its optimizer states."""
    groups = {
        optimizer: {
            "lr": fields["learning_rate"], "betas": (fields["b1"], fields["b2"]), "eps": fields["eps"],
            "weight_decay": fields["weight_decay"],
        }
        for optimizer, path in training_state.OPT_STATES.items()
        for name, fields in run.config["optim"].items()
        if name == path.partition(".")[0]
    }  # fmt: skip
    args, groups = _published_args(run), groups if optimizers else {}
    return training_state.from_run(run.read, run.networks, run.step, args, str(run.workdir), groups)


def _published_args(run):
    """The published command line of a run; warns of networks that the published code lacks."""
    config, networks = run.config, run.networks
    model, vae = sit.model_name(networks.sit), published_name(run.vae)
    fields = [entry for _, entry in sorted(config["encoders"].items())]
    architectures = [entry.get("architecture") or Path(entry["weights"]).name for entry in fields]
    encoders = [published_args.ENCODER_TYPES.get(str(architecture)) for architecture in architectures]
    is_unknown = {
        "SiT": model is None,
        "VAE": vae is None,
        "encoders": None in encoders,
        "SiT without projectors": not encoders,
        "projector": networks.sit.projector != "mlp",
        "DiT": networks.sit.learned_sigma,
        "map from the VAE's latents to tokens": run.vae.feature_dim,
    }
    if any(is_unknown.values()):
        logging.warning(
            "the published code has no such %s: its scripts will not build these networks, whose weights are written all the "
            "same", " and ".join(name for name, unknown in is_unknown.items() if unknown),
        )  # fmt: skip
    return published_args.args_from_config(
        config,
        model=model or "custom",
        vae=vae or "custom",
        encoder_type=",".join(name or "custom" for name in encoders) or "None",
        num_heads=networks.sit.num_heads,
        norm_groups=run.vae.norm_groups,
    )
