"""The numbers that a training step needs, which `repae_jax/job/recipe.py` makes from a config, and the run's optimizers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax

from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.losses.adversarial import gan_factor


class Optimizers(NamedTuple):
    """Transformations of optax, clipping included; None for a network that is not trained."""

    vae: optax.GradientTransformation | None
    sit: optax.GradientTransformation | None
    disc: optax.GradientTransformation | None


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. A loss term exists only if its weight is named."""

    vae_weights: Mapping[str, float]  # names as in `train_step.VAE_TERMS`, for tokenizers those of `tokenizer_step`, too
    sit_weights: Mapping[str, float]  # names of the objective's own terms, or as in `train_step.SIT_TERMS`
    objective: Any = VelocityObjective()  # or a ddpm.NoiseObjective, or a mean_flow.MeanFlow
    self_depth: int = 0  # block of the averaged SiT that the term 'self' aligns with; 0 without it
    align_factor: Callable | None = None  # step -> factor of both alignment weights; None is 1
    lpips_input_range: tuple[float, float] = (-1.0, 1.0)  # see `reconstruction.perceptual`
    gan_start: int = 0  # first step with an adversarial loss; the discriminator's hinge loss starts then, too
    gan_factor: float = 1.0  # multiplies both from then on, besides the weight 'gan' of the VAE's
    lecam_weight: float = 0.0  # of LeCam in the discriminator's loss
    label_dropout: float = 0.1  # share of labels replaced by the null label in the SiT phase
    flip_probability: float = 0.0
    # of the latent batch norm, in torch's convention (the weight of the batch); 0 keeps the initial statistics, which then
    # normalize every pass
    norm_momentum: float = 0.1
    ema_decay: float = 0.9999
    # further averages of the weights: name -> number of the step -> weight of the new ones, see `averages.weights_of_new`
    averages: Mapping[str, Callable] = field(default_factory=dict)
    accumulation: int = 1  # micro-batches per step
    fixed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # network -> top-level names of what is not trained in it

    def factors(self, step) -> dict[str, jax.Array | float]:
        """Returns the factors, after `step` steps, of the terms 'gan', which may start late, and 'align', which may end."""
        align = 1.0 if self.align_factor is None else self.align_factor(step)
        return {"gan": gan_factor(step, self.gan_start, self.gan_factor), "align": align}


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """The numbers of a tokenizer's run."""

    pixel_reduction: str = "mean"  # or 'sum', over an image's pixels and channels, of 'l1', 'l2' and 'lpips'; metrics are means
    # 'gan' or 'vf' -> largest factor of its weight, which is adapted so that the term's gradient is as large as the
    # reconstruction's at the last layer they share
    adaptive: Mapping[str, float] = field(default_factory=dict)
    vf_margins: tuple[float, float] = (0.0, 0.0)  # of cosines and of distances, see `regularizers.vf_loss`
    se_factors: tuple[int, ...] = ()  # by which latents are downscaled for 'se', see `regularizers.scale_equivariance_loss`
    eq_scales: tuple[float, ...] = ()  # of EQ-VAE's transform, one drawn every step; () is no transform
    eq_prior: float = 0.5  # probability of a step without a transform
