"""Config -> Job: networks, optimizers, recipe and mesh. Commands read names of config fields; no file below this one does."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repae_jax import ranges
from repae_jax.diffusion.samplers import Sampling
from repae_jax.distributed import sharding
from repae_jax.job import validate
from repae_jax.job.config import JOBS, Config, read_config
from repae_jax.job.frozen_weights import describe_encoders
from repae_jax.job.initial_state import initial_state
from repae_jax.job.recipe import make_recipe
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.encoders import Encoder
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.models.vae_families import make_vae
from repae_jax.training.networks import Nets, bind
from repae_jax.training.optimizer import in_updates, make_optimizer
from repae_jax.training.recipe import Optimizers, Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, built."""

    config: Mapping[str, Any]  # nested plain values, as stored in checkpoints
    nets: Nets
    encoders: tuple[Encoder, ...]  # frozen; the alignment and VF compare with their tokens
    tx: Optimizers
    recipe: Recipe
    sampling: Sampling | None  # settings of pictures during training; None without a SiT
    latent_shape: tuple[int, int, int]  # (h, w, C)
    mesh: jax.sharding.Mesh
    is_between: bool = False  # its step is one of those that leave the VAE as it is, see `variants`

    @property
    def frozen_vae(self) -> bool:
        """True if the VAE is an input, `frozen['vae']`, and no part of the state."""
        return self.tx.vae is None

    @property
    def step(self) -> Callable:
        """(state, batch, frozen, key) -> (state, metrics), not yet jitted."""
        fields = {"nets": bind(self.nets), "encoders": self.encoders, "tx": self.tx, "recipe": self.recipe}
        spec = JOBS[self.config["job"]]
        return functools.partial(spec.between if self.is_between else spec.step, **fields)

    @property
    def vae_every(self) -> int:
        """Returns the number of steps of which the first trains the VAE; 1 in jobs whose steps are all alike."""
        return self.config.get("vae_every", 1)

    @property
    def variants(self) -> "tuple[tuple[Job, float], ...]":
        """Returns (job, share of the steps) of each kind of step that a run takes: that of this job first.

        With config.vae_every = k, the first of every k steps is of this job, and the others leave the VAE as it is.
        """
        between = (dataclasses.replace(self, is_between=True), 1 - 1 / self.vae_every)
        return ((self, 1 / self.vae_every), between) if self.vae_every > 1 else ((self, 1.0),)

    def kind_of(self, step: int) -> int:
        """Returns the index in `variants` of a step; steps count from 1."""
        return 0 if (step - 1) % self.vae_every == 0 else 1


def plain_config(config) -> dict[str, Any]:
    """Returns a checked config as nested plain values: lists are tuples, placeholders None, and ~ the user's folder.

    Fields that came later than the first runs are absent at their defaults, so that such a config equals those of these runs.
    """
    return ranges.plain(read_config(config))


def build(config, devices: Sequence[jax.Device] | None = None, encoders: tuple[Encoder, ...] | None = None) -> Job:
    """Builds the job of a ConfigDict or nested dict, on all devices by default; ValueError for anything that cannot work.

    The encoders are by default those of the config. () leaves projectors and alignment out of the networks, for sampling, also
    that with the averaged SiT.
    """
    sections = read_config(config)
    config = ranges.plain(sections)
    recipe = make_recipe(config)
    mesh = sharding.make_mesh(sections.mesh.fsdp, devices, sections.mesh.slices)
    sharding.check_batch(sections.data.batch_size, sections.accumulation, mesh)
    with_projectors = encoders != ()
    encoders = describe_encoders(config) if encoders is None else encoders
    nets = make_networks(sections, recipe, encoders, with_projectors)
    job = Job(
        config=config, nets=nets, encoders=encoders, recipe=recipe, mesh=mesh,
        tx=make_optimizers(sections, recipe, nets),
        sampling=sections.sampling if nets.sit is not None else None,
        latent_shape=validate.latent_shape(config, nets.vae),
    )  # fmt: skip
    shapes = functools.partial(jax.eval_shape, functools.partial(initial_state, job), jax.random.key(0))
    validate.check_job(job, shapes)
    return job


def make_networks(sections: Config, recipe: Recipe, encoders: Sequence[Encoder], with_projectors: bool) -> Nets:
    """Returns the networks of a job; discriminator, LPIPS and a projector to SiT's own tokens only where a loss needs them."""
    dtype, trains, weights = getattr(jnp, sections.precision.compute), JOBS[sections.job].trains, recipe.vae_weights
    feature_dims = tuple(encoder.module.hidden_size for encoder in encoders)
    sit = disc = lpips = None
    vf_dim = feature_dims[0] if "vf" in weights and encoders else None
    vae = make_vae(vars(sections.vae), sections.data.image_size, dtype=dtype, feature_dim=vf_dim)
    if "sit" in trains:
        own = (sections.sit.hidden_size,) if recipe.self_depth and with_projectors else ()
        sit = SiT(
            **vars(sections.sit), dtype=dtype, num_classes=sections.data.num_classes,
            latent_channels=vae.latent_channels, feature_dims=feature_dims + own, attention=sections.attention,
            internal_head="internal" in recipe.sit_weights, conditions=recipe.objective.conditions,
        )  # fmt: skip
    if "disc" in trains and ("gan" in weights or not weights):  # without any weight, it alone is trained
        disc = PatchDiscriminator(**vars(sections.disc), dtype=dtype)
    if "lpips" in weights:
        lpips = LPIPS(dtype=getattr(jnp, sections.precision.lpips))
    return Nets(vae=vae, sit=sit, disc=disc, lpips=lpips)


def make_optimizers(sections: Config, recipe: Recipe, nets: Nets) -> Optimizers:
    """Returns the optimizers of the networks that are trained."""
    optim, every = sections.optim, getattr(sections, "vae_every", 1)
    fixed = () if nets.sit is None or nets.sit.learned_positions else ("pos_embed",)
    return Optimizers(
        vae=make_optimizer(in_updates(optim.vae, every)) if recipe.vae_weights else None,
        sit=None if nets.sit is None else make_optimizer(optim.sit, fixed),
        disc=None if nets.disc is None else make_optimizer(in_updates(optim.disc, every)),
    )
