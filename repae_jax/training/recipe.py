"""What a training step is made of: networks, optimizers and the numbers of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optax

from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT


class Nets(NamedTuple):
    """The Linen modules of a job; None where a job has none."""

    vae: AutoencoderKL
    sit: SiT | None
    disc: PatchDiscriminator | None
    lpips: LPIPS | None


class Optimizers(NamedTuple):
    """optax transformations, clipping included; None for a network that is not trained."""

    vae: optax.GradientTransformation | None
    sit: optax.GradientTransformation | None
    disc: optax.GradientTransformation | None


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. A loss term exists only if its weight is named.

    Attributes:
      vae_weights: of 'l1', 'l2', 'lpips', 'kl', 'gan', and of the regularisers 'align', 'diffusion', 'vf', 'se'.
      sit_weights: of the objective's terms and 'align'.
      objective: what SiT learns: interpolant.VelocityObjective or ddpm.NoiseObjective.
      align_factor: step -> factor of both alignment weights; None is 1.
      pixel_reduction: 'mean' or 'sum' over an image's pixels and channels, of 'l1', 'l2' and 'lpips'; metrics show means.
      adaptive: term of the VAE's loss, 'gan' or 'vf' -> the largest factor by which its weight is adapted, so that its
        gradient is as large as the reconstruction's at the layer where both meet.
      lpips_input_range: see `reconstruction.perceptual`.
      gan_start: first step with an adversarial loss.
      gan_factor: multiplies both adversarial losses from then on.
      lecam_weight: of the LeCam term in the discriminator's loss.
      vf_margins: of cosines and of distances, see `regularizers.vf_loss`.
      se_factors: by which the latents are downscaled for 'se', see `regularizers.scale_equivariance_loss`.
      eq_scales: of EQ-VAE's transform, drawn every step; () is none.
      eq_prior: probability of a step without a transform.
      label_dropout: share of labels replaced by the null label in the SiT phase.
      flip_probability: of an image's being mirrored.
      norm_momentum: of the latent batch norm (torch's convention); 0 is none: the initial statistics for good.
      ema_decay: of the averages.
      accumulation: micro-batches per step.
      fixed: name of a network -> parts of it, top-level names of its parameters, that stay as they are.
    """

    vae_weights: Mapping[str, float]
    sit_weights: Mapping[str, float]
    objective: Any = VelocityObjective()
    align_factor: Any = None
    pixel_reduction: str = "mean"
    adaptive: Mapping[str, float] = field(default_factory=dict)
    lpips_input_range: tuple[float, float] = (-1.0, 1.0)
    gan_start: int = 0
    gan_factor: float = 1.0
    lecam_weight: float = 0.0
    vf_margins: tuple[float, float] = (0.0, 0.0)
    se_factors: tuple[int, ...] = ()
    eq_scales: tuple[float, ...] = ()
    eq_prior: float = 0.5
    label_dropout: float = 0.1
    flip_probability: float = 0.0
    norm_momentum: float = 0.1
    ema_decay: float = 0.9999
    accumulation: int = 1
    fixed: Mapping[str, Sequence[str]] = field(default_factory=dict)
