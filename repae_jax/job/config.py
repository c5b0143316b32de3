"""The config of each job, one frozen dataclass made of sections, and the table of jobs."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from repae_jax import sit_step, tokenizer_step, train_step
from repae_jax.diffusion.samplers import Sampling
from repae_jax.job import sections
from repae_jax.job.sections import section
from repae_jax.ranges import SEED, Choice, FieldError, Positive, Section, Several, construct, later, real
from repae_jax.training.averages import WIDEST
from repae_jax.training.optimizer import SCHEDULED

# XLA's options for GPU programs that compute the same bits every time
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": "True"}


@section
class Config(Section):
    """The fields and sections of every job."""
    job: str
    seed: Annotated[int, SEED]
    steps: Positive
    accumulation: Positive
    ema_decay: Annotated[float, real(0, below=1)]
    ema_decays: Annotated[tuple[float, ...], Several(real(0, below=1))] = later(())
    ema_sigmas: Annotated[tuple[float, ...], Several(real(above=0, below=WIDEST))] = later(())
    max_skipped_in_a_row: Positive
    compiler_options: str
    deterministic: bool = False
    attention: Annotated[str, Choice(("xla", "cudnn"))] = "xla"  # as in configs of before this field
    data: sections.Data
    vae: sections.Vae | sections.Rae | sections.Vtp
    encoders: Mapping[str, sections.Encoder]
    mesh: sections.Mesh
    checkpoint: sections.Checkpoint
    log: sections.Log

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("ema_decays", (self.ema_decay, *self.ema_decays)), ("ema_sigmas", self.ema_sigmas)):
            if len(set(values)) < len(values):
                beside = f" beside ema_decay={self.ema_decay}" if name == "ema_decays" else ""
                raise FieldError(f"{name}={getattr(self, name)}{beside} names an average twice: leave one of the two out")
        both = DETERMINISTIC.keys() & parse_compiler_options(self.compiler_options).keys()
        if self.deterministic and both:
            raise FieldError(
                f"compiler_options={self.compiler_options!r} names {', '.join(both)}, which config.deterministic=True sets to "
                f"{', '.join(DETERMINISTIC[name] for name in both)}: leave one of the two out"
            )


@section
class VaeConfig(Config):
    """A tokenizer."""
    disc: sections.Disc
    lpips: sections.Lpips
    loss: sections.TokenizerLoss
    optim: sections.VaeOptim
    init: sections.VaeInit
    precision: sections.PrecisionWithLpips
    hooks: sections.VaeHooks


@section
class LdmConfig(Config):
    """A SiT or DiT on a frozen VAE."""
    sit: sections.Sit
    loss: sections.SitLoss
    diffusion: sections.Diffusion
    optim: sections.SitOptim
    init: sections.SitInit
    precision: sections.Precision
    hooks: sections.SitHooks
    sampling: Sampling


@section
class RepaeConfig(VaeConfig, LdmConfig):
    """Joint training."""
    vae_every: Positive = later(1)
    loss: sections.Loss
    diffusion: sections.JointDiffusion
    optim: sections.Optim
    init: sections.Init
    precision: sections.PrecisionWithLpips
    hooks: sections.Hooks

    def __post_init__(self):
        super().__post_init__()
        self._check_vae_every()

    def _check_vae_every(self):
        """Raises FieldError for a schedule shorter than `vae_every`, of rates that it does not divide, or that cannot go on."""
        every = self.vae_every
        ends = {"steps": self.steps, "loss.gan_start": self.loss.gan_start, "loss.align_end": self.loss.align_end}
        for name, value in ends.items():
            if value and value < every:
                raise FieldError(
                    f"vae_every={every} trains the VAE in the first of every {every} steps, but config.{name}={value} is less: "
                    f"set {name} to {every} or more, or vae_every to {value} or less"
                )
        for network, name in itertools.product(("vae", "disc"), SCHEDULED):
            value = getattr(getattr(self.optim, network), name)
            if value and every > 1 and self.init.checkpoint:
                raise FieldError(
                    f"vae_every={every} and config.optim.{network}.{name}={value}: a schedule of updates cannot go on from "
                    f"config.init.checkpoint={self.init.checkpoint!r}, which has one update a step: leave one of the three out"
                )
            if value and value % every:
                raise FieldError(
                    f"vae_every={every} does not divide config.optim.{network}.{name}={value}, which are steps, too: set it to "
                    f"{-(-value // every) * every}"
                )


class JobSpec(NamedTuple):
    """One of the three jobs."""

    step: Callable
    trains: tuple[str, ...]  # names of networks
    config: type[Config]
    between: Callable | None = None  # the step of those that leave the VAE as it is, see config.vae_every


JOBS = {
    "repae": JobSpec(train_step.repae_step, ("vae", "disc", "sit"), RepaeConfig, sit_step.sit_step),
    "ldm": JobSpec(sit_step.ldm_step, ("sit",), LdmConfig),
    "vae": JobSpec(tokenizer_step.vae_step, ("vae", "disc"), VaeConfig),
}


def read_config(config: Any) -> Any:
    """Builds the RepaeConfig, LdmConfig or VaeConfig of a ConfigDict or nested mapping of plain values, see configs/.

    Raises ValueError that names unknown or missing fields, or a field whose value its section does not allow.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    if config.get("job") not in JOBS:
        raise ValueError(f"config.job={config.get('job')!r} is unknown; allowed: {list(JOBS)}")
    return construct("config", JOBS[config["job"]].config, config)


def parse_compiler_options(text: str) -> dict[str, str]:
    """Returns options of XLA as name -> value, which may be empty or have commas; FieldError if they are not name=value."""
    options: dict[str, str] = {}
    for part in filter(None, re.split(r",(?=[^,]*=)", text)):
        name, equals, value = (word.strip(" ,") for word in part.partition("="))
        if not (name and equals) or name in options:
            raise FieldError(
                f"compiler_options={text!r}: {part!r} is not understood, or twice there; expected name=value,name=value, e.g. "
                "'xla_tpu_scoped_vmem_limit_kib=32768'"
            )
        options[name] = value
    return options
