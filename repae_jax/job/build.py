"""Config -> Job: networks, optimizers, recipe and mesh. Commands read names of config fields; no file below this one does."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repae_jax.diffusion.samplers import Sampling
from repae_jax.distributed import sharding
from repae_jax.job import validate
from repae_jax.job.config import JOBS, Config, read_config
from repae_jax.job.frozen_weights import describe_encoders
from repae_jax.job.initial_state import initial_state
from repae_jax.job.recipe import make_recipe
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.encoders import Encoder
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.training.networks import Nets, bind
from repae_jax.training.optimizer import make_optimizer
from repae_jax.training.recipe import Optimizers, Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, built.

    Attributes:
      config: the config as nested plain values, as stored in checkpoints.
      nets: the networks.
      encoders: frozen encoders, whose tokens the alignment and VF compare with.
      tx: the optimizers.
      recipe: losses, their weights, and the other numbers of a step.
      sampling: how pictures are sampled during training; None without a SiT.
      latent_shape: (h, w, C).
      mesh: device mesh.
    """

    config: Mapping[str, Any]
    nets: Nets
    encoders: tuple[Encoder, ...]
    tx: Optimizers
    recipe: Recipe
    sampling: Sampling | None
    latent_shape: tuple[int, int, int]
    mesh: jax.sharding.Mesh

    @property
    def frozen_vae(self) -> bool:
        """True if the VAE is an input, `frozen['vae']`, and no part of the state."""
        return self.tx.vae is None

    @property
    def step(self) -> Callable:
        """(state, batch, frozen, key) -> (state, metrics), not yet jitted."""
        fields = {"nets": bind(self.nets), "encoders": self.encoders, "tx": self.tx, "recipe": self.recipe}
        return functools.partial(JOBS[self.config["job"]].step, **fields)


def plain_config(config) -> dict[str, Any]:
    """Returns a checked config as nested plain values: lists are tuples, placeholders None, and ~ the user's folder."""
    return dataclasses.asdict(read_config(config))


def build(config, devices: Sequence[jax.Device] | None = None, encoders: tuple[Encoder, ...] | None = None) -> Job:
    """Builds a job.

    Args:
      config: ConfigDict or nested dict, see configs/.
      devices: devices of the mesh; default all.
      encoders: default those of the config. () leaves projectors and alignment out of the networks, for sampling.

    Returns:
      Job.

    Raises:
      ValueError: for anything in the config that cannot work, naming the field, the value and what is allowed.
    """
    sections = read_config(config)
    config = dataclasses.asdict(sections)
    recipe = make_recipe(config)
    mesh = sharding.make_mesh(sections.mesh.fsdp, devices, sections.mesh.slices)
    sharding.check_batch(sections.data.batch_size, sections.accumulation, mesh)
    if encoders is None:
        encoders = describe_encoders(config)
    nets = make_networks(sections, recipe, encoders)
    job = Job(
        config=config,
        nets=nets,
        encoders=encoders,
        tx=make_optimizers(sections, recipe, nets),
        recipe=recipe,
        sampling=sections.sampling if nets.sit is not None else None,
        latent_shape=validate.latent_shape(config, nets.vae),
        mesh=mesh,
    )
    shapes = functools.partial(jax.eval_shape, functools.partial(initial_state, job), jax.random.key(0))
    validate.check_job(job, shapes)
    return job


def make_networks(sections: Config, recipe: Recipe, encoders: Sequence[Encoder]) -> Nets:
    """Returns the networks of a job; a discriminator and LPIPS only where a loss needs them."""
    dtype = getattr(jnp, sections.precision.compute)
    trains, weights = JOBS[sections.job].trains, recipe.vae_weights
    feature_dims = tuple(encoder.module.hidden_size for encoder in encoders)
    vf_dim = feature_dims[0] if "vf" in weights and encoders else None
    sit = disc = lpips = None
    vae = AutoencoderKL(**vars(sections.vae), dtype=dtype, feature_dim=vf_dim)
    if "sit" in trains:
        sit = SiT(
            **vars(sections.sit), dtype=dtype, num_classes=sections.data.num_classes,
            latent_channels=vae.latent_channels, feature_dims=feature_dims,
        )  # fmt: skip
    if "disc" in trains and ("gan" in weights or not weights):  # without any weight, it alone is trained
        disc = PatchDiscriminator(**vars(sections.disc), dtype=dtype)
    if "lpips" in weights:
        lpips = LPIPS(dtype=getattr(jnp, sections.precision.lpips))
    return Nets(vae=vae, sit=sit, disc=disc, lpips=lpips)


def make_optimizers(sections: Config, recipe: Recipe, nets: Nets) -> Optimizers:
    """Returns the optimizers of the networks that are trained."""
    optim, vae, sit, disc = sections.optim, None, None, None
    if "vae" in JOBS[sections.job].trains and recipe.vae_weights:
        vae = make_optimizer(optim.vae)
    if nets.sit is not None:
        sit = make_optimizer(optim.sit, fixed=() if nets.sit.learned_positions else ("pos_embed",))
    if nets.disc is not None:
        disc = make_optimizer(optim.disc)
    return Optimizers(vae=vae, sit=sit, disc=disc)
