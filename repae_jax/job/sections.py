"""The sections of a config, each one frozen dataclass: names, types and ranges.

The options' meaning is described in configs/. A section that depends on the job has a class for each half, VAE and SiT, and one
for joint training. Rules across sections are in `validate.py`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from repae_jax import data, ranges
from repae_jax.diffusion import interpolant
from repae_jax.losses import alignment, regularizers
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.sit import SiT
from repae_jax.ranges import Choice, Count, FieldError, PathText, Positive, Section, Several, Share, Size, Weight, real, whole
from repae_jax.training.optimizer import AdamW
from repae_jax.training.trackers import TRACKERS

section = dataclasses.dataclass(frozen=True, kw_only=True)
_Precision = Annotated[str, Choice(("bfloat16", "float32"))]
_SIZE, _BLOCKS = whole(1, 2**20), whole(1, 1000)


# ---- networks -------------------------------------------------------------------------------------------------------


def _fields_of(module: type, *given: str, **rules: Any) -> Callable[[type], type]:
    """Makes a class the section of a network's fields, without those that the job gives; numbers have rules besides types."""
    given += ("dtype", "parent", "name")

    def make(cls):
        hints = {name: hint for name, hint in module.__annotations__.items() if name not in given}
        cls.__annotations__ = hints | {name: Annotated[hints[name], rule] for name, rule in rules.items()}
        return section(cls)

    return make


@_fields_of(
    AutoencoderKL, "feature_dim", latent_channels=_SIZE, channels=_SIZE, channel_multipliers=Several(_SIZE, least=1),
    num_res_blocks=_BLOCKS, attention_levels=Several(whole(0)), norm_groups=_SIZE,
)
class Vae(Section):
    """Fields of `AutoencoderKL`."""


@_fields_of(
    SiT, "num_classes", "latent_channels", "feature_dims", "attention",
    patch_size=_SIZE, hidden_size=_SIZE, depth=_BLOCKS, num_heads=_SIZE, encoder_depth=_BLOCKS, projector_dim=_SIZE,
    mlp_ratio=real(above=0, most=1000), unroll=_BLOCKS,
)
class Sit(Section):
    """Fields of `SiT`."""


@_fields_of(PatchDiscriminator, channels=_SIZE, num_layers=whole(1, 16))
class Disc(Section):
    """Fields of `PatchDiscriminator`."""


@section
class Encoder(Section):
    """A frozen encoder: the architecture, where its weights are, and what `models.encoders` does with it."""
    architecture: Any  # checked by `make_encoder`
    weights: str
    image_size: Size | None
    spatial_gamma: Share | None


@section
class Lpips(Section):
    """Weight files of LPIPS, and the range of pixel values that it is given."""
    vgg16: str
    linear: str
    input_range: tuple[float, float]

    def __post_init__(self):
        super().__post_init__()
        if not self.input_range[0] < self.input_range[1]:
            raise FieldError(f"input_range={self.input_range} must be (low, high), low first")


@section
class Precision(Section):
    """Compute dtype of the networks."""
    compute: _Precision


@section
class PrecisionWithLpips(Precision):
    """Compute dtypes where a VAE is trained."""
    lpips: _Precision


# ---- losses ---------------------------------------------------------------------------------------------------------


@section
class Adaptive(Section):
    """Largest factors of adaptive weights; 0 for a weight that is not adapted."""
    gan: Weight
    vf: Weight


@section
class VaeLoss(Section):
    """Terms of the VAE's loss and settings of the adversarial losses."""
    vae: Mapping[str, Weight]
    gan_start: Count
    gan_factor: Annotated[float, real(above=0)]
    lecam: Weight


@section
class TokenizerLoss(VaeLoss):
    """Further settings of a tokenizer's losses."""
    pixel_reduction: Annotated[str, Choice(("mean", "sum"))]
    adaptive: Adaptive
    vf_margins: Annotated[tuple[float, float], Several(real(0, below=2), count=2)]
    se_factors: Annotated[tuple[int, ...], Several(whole(2))]
    eq_scales: Annotated[tuple[float, ...], Several(real(above=0, most=1))]
    eq_prior: Share

    def __post_init__(self):
        super().__post_init__()
        if self.eq_scales:
            try:
                regularizers.check_scales(self.eq_scales, self.eq_prior)
            except ValueError as error:
                raise FieldError(f"eq_scales, eq_prior: {error}") from error


@section
class SitLoss(Section):
    """Terms of SiT's loss, and the schedule of the alignment's weights."""
    sit: Mapping[str, Weight]
    align_shape: str
    align_end: Positive | None

    def __post_init__(self):
        super().__post_init__()
        where = f"align_end={self.align_end} and align_shape={self.align_shape!r}"
        if self.align_shape not in alignment.SCHEDULES:
            raise FieldError(f"{where}: allowed shapes are {list(alignment.SCHEDULES)}")
        if self.align_end is None and self.align_shape != "constant":
            raise FieldError(f"{where}: a decay needs the step where it ends")


@section
class Loss(VaeLoss, SitLoss):
    """The losses of joint training."""


@section
class Diffusion(Section):
    """The objective of the SiT or DiT."""
    path: Annotated[str, Choice(tuple(sorted((*interpolant.PATHS, "ddpm"))))]
    time_distribution: Annotated[str, Choice(tuple(sorted(interpolant.TIME_DISTRIBUTIONS)))]
    label_dropout: Annotated[float, real(0, below=1)]

    def __post_init__(self):
        super().__post_init__()
        if self.path == "ddpm" and self.time_distribution != "uniform":
            given = f"time_distribution={self.time_distribution!r}"
            raise FieldError(f"{given} does not go with path='ddpm', whose timesteps are uniform")


@section
class JointDiffusion(Diffusion):
    """The objective, and the momentum of the latents' batch norm."""
    norm_momentum: Share


# ---- training -------------------------------------------------------------------------------------------------------


@section
class Data(Section):
    """The images, and how they become batches."""
    source: str
    options: Mapping[str, Any]  # without those that are None: the chosen source refuses the others'
    image_size: Size
    num_classes: Size
    batch_size: Positive
    workers: Annotated[int, whole(0, 4096)]
    max_bad_fraction: Share
    cache: PathText
    flip_probability: Share

    def __post_init__(self):
        super().__post_init__()
        types, options = data.option_types(), data.given(self.options)
        for name in set(options) & set(types):
            ranges.check(f"options.{name}", ranges.OrNone(types[name]), options[name])
            if isinstance(options[name], str) and options[name].startswith("~/"):
                options[name] = os.path.expanduser(options[name])
        object.__setattr__(self, "options", options)


@section
class VaeOptim(Section):
    """Optimizers of the VAE and the discriminator."""
    vae: AdamW
    disc: AdamW


@section
class SitOptim(Section):
    """Optimizer of the SiT."""
    sit: AdamW


@section
class Optim(VaeOptim, SitOptim):
    """Optimizers of joint training."""


@section
class VaeInit(Section):
    """Files that the VAE and the discriminator start from."""
    vae: PathText
    disc: PathText


@section
class SitInit(Section):
    """Files that a SiT and its latents' statistics start from, or the number of images that these are measured on."""
    checkpoint: PathText
    vae: PathText
    latent_stats: PathText
    stats_images: Positive


@section
class Init(VaeInit, SitInit):
    """Files that joint training starts from."""


@section
class Mesh(Section):
    """Devices that share one copy of the parameters; slices, or nodes, among which none is shared."""
    fsdp: Positive
    slices: Positive


@section
class Checkpoint(Section):
    """Steps between checkpoints, and which of them are kept."""
    every: Positive
    keep_last: Positive
    keep_every: Positive | None


@section
class Log(Section):
    """Steps between lines of metrics, and where these go beside `metrics.jsonl`."""
    every: Positive
    trackers: Annotated[tuple[str, ...], Several(Choice(tuple(TRACKERS)))] = ("tensorboard",)  # as before this field
    project: str = "repae_jax"

    def __post_init__(self):
        super().__post_init__()
        names = self.trackers
        if len(set(names)) < len(names) or {"tensorboard", "clu"} <= set(names):
            raise FieldError(f"trackers={names} name one twice; 'clu' writes the same files as 'tensorboard', with TensorFlow")
        if names and not self.project:
            raise FieldError("project='' must be the name of a project, for the trackers that have projects")


@section
class VaeHooks(Section):
    """Pictures of reconstructions; 0 for none."""
    images: Size
    reconstructions_every: Count


@section
class SitHooks(Section):
    """Pictures of samples, and the FID of a few; 0 for none."""
    images: Size
    samples_every: Count
    fid_every: Count
    fid_samples: Annotated[int, whole(2)]
    fid_reference: PathText
    fid_inception: PathText

    def __post_init__(self):
        super().__post_init__()
        for name in ("fid_reference", "fid_inception"):
            if self.fid_every and not getattr(self, name):
                empty = f"config.hooks.{name} is empty"
                raise FieldError(f"fid_every={self.fid_every}, but {empty}: give its file, or set fid_every=0")


@section
class Hooks(VaeHooks, SitHooks):
    """Pictures and numbers of joint training."""
