"""Guidance of a network's output away from a weaker one's, its schedules, and the segments of time in which it applies.

All of it is extrapolation: weak + scale * (strong - weak). The weak output is the network's own without a class in
classifier-free guidance (arXiv 2207.12598), that of a smaller or less trained network in autoguidance (2406.02507), and that of
a head in the middle of the network in internal guidance (2512.24176, 2605.18324).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Output = Float[Array, "B ..."]
LabelledFn = Callable[[Output, Array, Int[Array, " B"]], Output]  # (z_t, t, labels) -> the network's output
Scale = float | Array | Callable[[Array], Array]  # or a function of the network's times [B]

MDT_POWER = 4.0  # of its released sampling
CONSTANT = "constant"  # the schedule that is none
# name -> (share of the way from data, 0, to noise, 1; power) -> factor of scale - 1
_SCHEDULES: dict[str, Callable[[Any, float], Any]] = {
    "linear": lambda t, power: 2 * (1 - t),
    "cosine": lambda t, power: 1 + jnp.cos(math.pi * t),
    "power_cosine": lambda t, power: (1 - jnp.cos(math.pi * (1 - t) ** power)) / 2,
}
SCHEDULES = (CONSTANT, *_SCHEDULES)


def scheduled_scale(schedule: str, scale: float | Array, power: float, noise_time: float) -> Scale:
    """Returns the scale of guidance as a function of the network's times, or the scale itself if it is constant.

    It is 1 + (scale - 1) * f(t), where f is, with t from 0, data, to 1, noise:
      'linear'        2 (1 - t), and 'cosine' 1 + cos(pi t): both grow toward data and are 1 on average, so that all steps
                      together guide as much as a constant scale does (arXiv 2404.13040).
      'power_cosine'  (1 - cos(pi (1 - t)^power)) / 2, from 0 to 1 (MDT, arXiv 2303.14389, `forward_with_cfg`).

    Args:
      schedule: name in SCHEDULES.
      power: of 'power_cosine'; the larger, the later guidance sets in.
      noise_time: time of noise, at which t is 1: 1, or 999 for a DiT.
    """
    if schedule == CONSTANT:
        return scale
    return lambda t: 1 + (scale - 1) * _SCHEDULES[schedule](t / noise_time, power)


def extrapolate(weak: Output, strong: Output, scale: float | Array, channels: int) -> Output:
    """Returns weak + scale * (strong - weak) in the first channels, which both have, and `strong` in the others."""
    start = weak[..., :channels]
    return jnp.concatenate([start + scale * (strong[..., :channels] - start), strong[..., channels:]], axis=-1)


def guide(output_fn: LabelledFn, labels: Int[Array, " B"], null_label: int, scale: Scale, channels: int) -> Callable:
    """Returns an output function (z_t, t) with guidance, at the price of a doubled batch in each network call.

    It gives v_null + scale * (v_label - v_null) in the first channels, v_label in the others. This is exact for the SDE sampler
    too: its drift is affine in the velocity and the two weights sum to one. DiT's noise is guided alike, its variance not.

    Args:
      output_fn: (z_t [B, ...], t [B] or a tree of such times, labels [B]) -> output [B, ..., >= channels].
      labels: the classes to guide toward.
      null_label: label of "no class".
      scale: 1 is no guidance; or a function of t.
      channels: how many, the first ones, are guided.
    """
    doubled = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(z_t, t):
        doubled_z, times = jax.tree.map(lambda x: jnp.concatenate([x, x]), (z_t, t))
        output = output_fn(doubled_z, times, doubled)
        conditional, unconditional = jnp.split(output, 2)
        return extrapolate(unconditional, conditional, _per_sample(scale, t, z_t), channels)

    return guided


def _per_sample(scale, t, like):
    return scale_at(scale, t).reshape(-1, *[1] * (like.ndim - 1)) if callable(scale) else scale


def scale_at(scale: Scale, t: Any) -> Any:
    """Returns the scale at the network's times [B], or at the first leaf of a tree of such."""
    return scale(jax.tree.leaves(t)[0]) if callable(scale) else scale


def away_from(pair_fn: Callable, scale: float | Array, channels: int) -> LabelledFn:
    """Returns an output function (z_t, t, labels) that is guided away from a weaker output for the same arguments.

    This is autoguidance (arXiv 2406.02507; `generate_images.py` of EDM2) and internal guidance (2512.24176, `forward_with_ig`).
    As in RAEv2's `forward_with_ig_and_cfg` it comes before classifier-free guidance, which then extrapolates between two guided
    outputs, of the class and of none.

    Args:
      pair_fn: (z_t, t, labels) -> (strong output, weak output); one of them may have a variance beside the guided channels.
      scale: 1 is no guidance.
      channels: how many, the first ones, are guided.
    """

    def guided(z_t, t, labels):
        strong, weak = pair_fn(z_t, t, labels)
        return extrapolate(weak, strong, scale, channels)

    return guided


def segments(times: np.ndarray, interval: tuple[float, float], guided: Any, plain: Any) -> list[tuple[np.ndarray, Any]]:
    """Returns the segments of a decreasing time grid with and without guidance, each as (times, output function).

    Steps that start at low <= t <= high, the interval's ends, have the function `guided`, the others `plain`. A segment of k
    steps has k + 1 times.
    """
    low, high = interval
    inside = [low <= t <= high for t in times[:-1]]
    cuts = [0, *(i for i in range(1, len(inside)) if inside[i] != inside[i - 1]), len(inside)]
    pieces = itertools.pairwise(cuts)
    return [(np.asarray(times[start : stop + 1]), guided if inside[start] else plain) for start, stop in pieces]
