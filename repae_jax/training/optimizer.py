"""The optimizer of one network, described by its section of `config.optim`."""

import dataclasses
from collections.abc import Collection
from typing import Annotated

import optax

from repae_jax.ranges import Choice, Count, Positive, Section, Weight, real

SCHEDULES = ("constant", "linear", "cosine")
_Beta = Annotated[float, real(0, below=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Section):
    """AdamW behind clipping by the network's global gradient norm; `b1` to `weight_decay` as in optax.adamw."""

    learning_rate: Weight  # after the warm-up, in which it rises linearly from 0
    warmup_steps: Count
    schedule: Annotated[str, Choice(SCHEDULES)]  # after the warm-up; "linear" and "cosine" fall
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


def learning_rate(section: AdamW) -> float | optax.Schedule:
    """Returns the learning rate: a number, or a function of the step."""
    rate, warmup, last = section.learning_rate, section.warmup_steps, section.final_learning_rate
    if section.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, section.decay_steps, last)
    if section.schedule == "linear":
        parts = optax.linear_schedule(0.0, rate, warmup), optax.linear_schedule(rate, last, section.decay_steps - warmup)
        return optax.join_schedules(parts, [warmup])
    return optax.warmup_constant_schedule(0.0, rate, warmup) if warmup else rate


def make_optimizer(section: AdamW, fixed: Collection[str] = ()) -> optax.GradientTransformation:
    """Returns the optimizer of a network; parts in `fixed`, too, are not trained."""
    adamw = optax.adamw(learning_rate(section), section.b1, section.b2, section.eps, weight_decay=section.weight_decay)
    trained = optax.chain(optax.clip_by_global_norm(section.clip_norm), adamw)
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
