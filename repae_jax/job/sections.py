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
from repae_jax.diffusion.mean_flow import PATH, MeanFlow
from repae_jax.diffusion.samplers import TIME_SHIFT
from repae_jax.losses import alignment, regularizers
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.models.sit import SiT
from repae_jax.models.vae_families import RAE, VTP
from repae_jax.models.vtp import VisualTokenizer
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
        cls.__annotations__ |= hints | {name: Annotated[hints[name], rule] for name, rule in rules.items()}
        return section(cls)

    return make


@_fields_of(
    AutoencoderKL, "feature_dim", latent_channels=_SIZE, channels=_SIZE, channel_multipliers=Several(_SIZE, least=1),
    num_res_blocks=_BLOCKS, attention_levels=Several(whole(0)), norm_groups=_SIZE,
)
class Vae(Section):
    """Fields of `AutoencoderKL`."""


@_fields_of(
    RepresentationAutoencoder, "grid", latent_channels=_SIZE, patch_size=_SIZE, encoder_patch_size=_SIZE, encoder_depth=_BLOCKS,
    encoder_heads=_SIZE, encoder_table=_SIZE, decoder_hidden_size=_SIZE, decoder_depth=_BLOCKS, decoder_heads=_SIZE,
    decoder_mlp_dim=_SIZE,
)
class Rae(Section):
    """Fields of `RepresentationAutoencoder`, for images of `config.data.image_size`."""
    family: Annotated[str, Choice((RAE,))] = RAE

    def __post_init__(self):
        super().__post_init__()
        _check_heads(self, latent_channels="encoder_heads", decoder_hidden_size="decoder_heads")
        if self.decoder_hidden_size % 4:
            raise FieldError(f"decoder_hidden_size={self.decoder_hidden_size} must be divisible by 4, for 2D positions")


@_fields_of(
    VisualTokenizer, latent_channels=_SIZE, patch_size=_SIZE, encoder_hidden_size=_SIZE, encoder_depth=_BLOCKS,
    encoder_heads=_SIZE, decoder_hidden_size=_SIZE, decoder_depth=_BLOCKS, decoder_heads=_SIZE,
)
class Vtp(Section):
    """Fields of `VisualTokenizer`."""
    family: Annotated[str, Choice((VTP,))] = VTP

    def __post_init__(self):
        super().__post_init__()
        _check_heads(self, multiple=4, encoder_hidden_size="encoder_heads", decoder_hidden_size="decoder_heads")


def _check_heads(section, multiple=1, **heads_of):
    """Raises FieldError unless heads divide their width into multiples of channels, as rotations of 2D positions need."""
    for width, heads in heads_of.items():
        if getattr(section, width) % (multiple * getattr(section, heads)):
            rest = "" if multiple == 1 else f" into multiples of {multiple} channels"
            raise FieldError(f"{heads}={getattr(section, heads)} does not divide {width}={getattr(section, width)}{rest}")


@_fields_of(
    SiT, "num_classes", "latent_channels", "feature_dims", "attention", "internal_head", "conditions",
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
    image_size: ranges.ImageSize | None
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


_LATER_TERMS = ("internal", "self")  # the first runs had no such terms, which weight 0 is equal to


@section
class SitLoss(Section):
    """Terms of SiT's loss, and the schedule of the alignment's weights."""
    sit: Mapping[str, Weight]
    align_shape: str
    align_end: Positive | None
    self_depth: Positive | None = ranges.later(None)  # block of the averaged SiT that the term 'self' aligns with

    def __post_init__(self):
        super().__post_init__()
        kept = {term: weight for term, weight in self.sit.items() if weight or term not in _LATER_TERMS}
        object.__setattr__(self, "sit", kept)
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
    predicts: Annotated[str, Choice(tuple(interpolant.OBJECTIVES))] = ranges.later("velocity")
    time_mean: Annotated[float, real(-10, 10)] = ranges.later(0.0)
    time_std: Annotated[float, real(above=0, most=10)] = ranges.later(1.0)
    time_shift: Annotated[float, TIME_SHIFT] = ranges.later(1.0)
    second_time_share: Annotated[float, real(0, 0.5)] = ranges.later(0.0)
    mean_flow: MeanFlow | None = ranges.later(None)  # an average velocity in place of the velocity

    def __post_init__(self):
        super().__post_init__()
        if self.mean_flow is not None:
            self._refuse("path", PATH, f"mean_flow, which needs {PATH!r}")
            self._refuse("time_distribution", "lognormal", "mean_flow, which needs 'lognormal'")
            self._refuse("predicts", "velocity", "mean_flow, which predicts an average velocity")
            for name, default in (("time_mean", 0), ("time_std", 1)):
                self._refuse(name, default, f"mean_flow, which has its own: set mean_flow.{name}")
            self._refuse("second_time_share", 0, "mean_flow, whose networks have the same times in all tokens")
            self._refuse("time_shift", 1, "mean_flow: set mean_flow.time_mean, to the logarithm of the shift more")
            if self.mean_flow.trains_guidance and not self.label_dropout:
                raise FieldError(
                    f"label_dropout={self.label_dropout} trains no output without a class, which mean_flow guides away from: "
                    "set it above 0, or mean_flow.omega to 1, kappa to 0 and largest_scale to 1"
                )
        if self.path == "ddpm":
            self._refuse("time_distribution", "uniform", "path='ddpm', whose timesteps are uniform")
            self._refuse("time_shift", 1, "path='ddpm', whose timesteps are uniform")
            self._refuse("second_time_share", 0, "path='ddpm', whose timesteps are those of whole images")
            self._refuse("predicts", "velocity", "path='ddpm', whose network predicts noise")
        if self.path != "linear":
            self._refuse("predicts", "velocity", f"path={self.path!r}: it is for 'linear'")
        if self.time_distribution != "lognormal":
            for name, default in (("time_mean", 0), ("time_std", 1)):
                self._refuse(name, default, f"time_distribution={self.time_distribution!r}: it is of 'lognormal'")

    def _refuse(self, name, default, reason):
        if (value := getattr(self, name)) != default:
            raise FieldError(f"{name}={value!r} does not go with {reason}")


@section
class JointDiffusion(Diffusion):
    """The objective, and the momentum of the latents' batch norm."""
    norm_momentum: Share

    def __post_init__(self):
        if self.mean_flow is not None:
            advice = "take configs/ldm.py, or leave mean_flow out"
            raise FieldError(f"mean_flow learns on a frozen VAE, but config.job='repae' trains the VAE: {advice}")
        super().__post_init__()


# ---- training -------------------------------------------------------------------------------------------------------


@section
class Data(Section):
    """The images, and how they become batches."""
    source: str
    options: Mapping[str, Any]  # without those that are None: the chosen source refuses the others'
    image_size: ranges.ImageSize
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
