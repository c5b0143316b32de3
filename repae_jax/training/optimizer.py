"""The optimizer of one network, described by its section of `config.optim`."""

import dataclasses
from collections.abc import Collection
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from repae_jax.ranges import Choice, Count, Positive, Section, Weight, later, real
from repae_jax.training.muon import is_matrix, muon

METHODS = ("adamw", "muon")
SCHEDULED = ("warmup_steps", "decay_start", "decay_steps")  # fields that are numbers of steps
SCHEDULES = ("constant", "linear", "cosine", "1-sqrt")
_Beta = Annotated[float, real(0, below=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Section):
    """AdamW behind clipping by the network's global gradient norm; `b1` to `weight_decay` as in optax.adamw.

    With the method 'muon', the matrices of a transformer's blocks are updated by Muon, at the same rate and weight decay.
    """

    method: Annotated[str, Choice(METHODS)] = later("adamw")
    learning_rate: Weight  # after the warm-up, in which it rises linearly from 0
    warmup_steps: Count
    schedule: Annotated[str, Choice(SCHEDULES)]  # after the warm-up and until `decay_steps`; all but "constant" fall
    decay_start: Positive | None = later(None)  # step until which the rate is constant; None is the end of the warm-up
    decay_steps: Positive | None  # step at which the rate reaches `final_learning_rate`; None with a constant rate
    final_learning_rate: Weight
    b1: _Beta
    b2: _Beta
    eps: Annotated[float, real(above=0)]
    weight_decay: Weight
    clip_norm: Annotated[float, real(above=0)]  # largest norm of the gradient of the trained parts
    fixed: tuple[str, ...]  # top-level names of parameters that are not trained: they have no moments and do not decay

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "constant" and self.decay_steps is not None:
            raise ValueError(f"schedule='constant' does not decay, but decay_steps={self.decay_steps}: change one of them")
        if self.schedule != "constant" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule={self.schedule!r} needs decay_steps above warmup_steps={self.warmup_steps}; it is {self.decay_steps}"
            )
        self._check_decay_start()

    def _check_decay_start(self):
        if self.decay_start is None:
            return
        if self.schedule == "constant":
            start = f"decay_start={self.decay_start}"
            raise ValueError(f"schedule='constant' does not decay, but {start}: choose another of {SCHEDULES}, or leave it out")
        if not self.warmup_steps <= self.decay_start < self.decay_steps:
            raise ValueError(
                f"decay_start={self.decay_start} must lie between warmup_steps={self.warmup_steps} and "
                f"decay_steps={self.decay_steps}, where the decay ends"
            )


def learning_rate(section: AdamW) -> float | optax.Schedule:
    """Returns the learning rate: a number, or a function of the step.

    With `decay_start` it is warmup-stable-decay (WSD, arXiv 2404.06395), whose decay 1 - sqrt is the best of arXiv 2405.18392.
    """
    rate, warmup, last = section.learning_rate, section.warmup_steps, section.final_learning_rate
    if section.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, rate, warmup) if warmup else rate
    start = warmup if section.decay_start is None else section.decay_start
    parts, ends = [optax.linear_schedule(0.0, rate, warmup)], [warmup]
    if start > warmup:
        parts, ends = [*parts, optax.constant_schedule(rate)], [*ends, start]
    return optax.join_schedules([*parts, _DECAYS[section.schedule](rate, last, section.decay_steps - start)], ends)


def _cosine(rate, last, steps):
    return optax.cosine_decay_schedule(rate, steps, alpha=last / rate if rate else 0.0)


def _one_minus_sqrt(rate, last, steps):
    return lambda step: last + (rate - last) * (1 - jnp.sqrt(jnp.clip(step / steps, 0, 1)))


_DECAYS = {"linear": optax.linear_schedule, "cosine": _cosine, "1-sqrt": _one_minus_sqrt}


def in_updates(section: AdamW, every: int) -> AdamW:
    """Returns the section with its schedule, which is in steps, in updates of a network that has one every so many steps."""
    steps = {name: getattr(section, name) for name in SCHEDULED}
    return dataclasses.replace(section, **{name: value and value // every for name, value in steps.items()})


def make_optimizer(section: AdamW, fixed: Collection[str] = ()) -> optax.GradientTransformation:
    """Returns the optimizer of a network; parts in `fixed`, too, are not trained."""
    rate = learning_rate(section)
    method = optax.adamw(rate, section.b1, section.b2, section.eps, weight_decay=section.weight_decay)
    if section.method == "muon":
        parts = {"muon": muon(rate, section.weight_decay), "adamw": method}
        method = optax.partition(parts, lambda params: jax.tree.map(lambda x: "muon" if x else "adamw", is_matrix(params)))
    trained = optax.chain(optax.clip_by_global_norm(section.clip_norm), method)
    fixed = {*section.fixed, *fixed}
    if not fixed:
        return trained

    def labels(params):
        return {name: "fixed" if name in fixed else "trained" for name in params}

    return optax.partition({"trained": trained, "fixed": optax.set_to_zero()}, labels)


def without_fixed(opt_state, moments):
    """Returns moments of all parameters without those of parts that the optimizer keeps fixed."""
    mu = optax.tree.get(opt_state, "mu")
    return {name: mu[name] if isinstance(mu[name], optax.MaskedNode) else tree for name, tree in moments.items()}
