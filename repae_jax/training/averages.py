"""Averages of the weights besides `state.ema`: of other decays, and power functions, of which others are made afterwards.

A power function of exponent g averages the weights w(s) after steps s = 1..t in proportion to s^g. Unlike an exponential
average it forgets the beginning of training, and its width, the standard deviation of s over t, "sigma", is the same at every
t. From checkpoints with the averages of two widths, that of any other width is made as a linear combination: the one whose
profile over the steps comes closest, by least squares. Reference: Karras et al. (arXiv 2312.02696), section 3 and appendix C.

Ours: a run that continues a published checkpoint after N steps does not know the weights of these, and takes its average in
their place, which weighs (N / t)^(g + 1) at step t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from repae_jax.training import checkpoint

WIDEST = 1 / math.sqrt(12)  # sigma of the plain mean of all steps
LARGEST_MISFIT = 0.05  # of a reconstructed profile, as a share of the norm, above which there is a warning
_SIGMA = "sigma="


class Profile(NamedTuple):
    """A power function that ends at a step."""

    step: int
    sigma: float


# ---- while training -------------------------------------------------------------------------------------------------


def name_of(kind: str, value: float) -> str:
    """Returns the name of an average in the state, such as 'decay_0_999'; dots separate names of the state's parts."""
    return f"{kind}_{float(value)!r}".replace(".", "_")


def weights_of_new(decays: Sequence[float], sigmas: Sequence[float]) -> dict[str, Callable]:
    """Returns the name of every average -> (number of the step, from 1) -> weight of the parameters after that step."""

    def exponential(decay):
        return lambda step: 1 - decay

    def power(sigma):
        # 1 - (1 - 1 / step)^(exponent + 1), of which float32 would leave little late in training if it were written like that
        return lambda step: -jnp.expm1((exponent(sigma) + 1) * jnp.log1p(-1 / jnp.float32(step)))

    by_decay = {name_of("decay", decay): exponential(decay) for decay in decays}
    return by_decay | {name_of("sigma", sigma): power(sigma) for sigma in sigmas}


def exponent(sigma: float) -> float:
    """Returns the exponent g of the power function of a width: sigma^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
    inverse = sigma**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


# ---- afterwards -----------------------------------------------------------------------------------------------------


def coefficients(kept: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " K"], float]:
    """Returns (coefficients of kept averages, which add up to 1, whose sum comes closest to the wanted one, misfit).

    The misfit is the norm of the difference of the two profiles as a share of the wanted one's.
    """
    gram = np.array([[_product(a, b) for b in kept] for a in kept])
    target, norm = np.array([_product(a, wanted) for a in kept]), _product(wanted, wanted)
    found = np.linalg.solve(gram, target)
    found = found / found.sum()
    return found, math.sqrt(max(norm - 2 * found @ target + found @ gram @ found, 0.0) / norm)


def _product(a: Profile, b: Profile) -> float:
    """Returns the integral of the product of two profiles, each of which is (g + 1) s^g / t^(g + 1) up to its step t."""
    first, last = sorted((a, b))
    g, h = exponent(first.sigma), exponent(last.sigma)
    return (g + 1) * (h + 1) / (g + h + 1) * (first.step / last.step) ** h / last.step


def parse(choice: str) -> tuple[str, float]:
    """Returns (kind, value) of an average to choose, '0.999' or 'sigma=0.1'; ValueError for another text."""
    kind = "sigma" if choice.startswith(_SIGMA) else "decay"
    try:
        value = float(choice.removeprefix(_SIGMA))
    except ValueError:
        value = math.nan
    if not 0 <= value < 1 or (kind == "sigma" and not 0 < value < WIDEST):
        allowed = f"a decay in [0, 1), such as 0.999, or sigma=S with S above 0 and below {WIDEST:.3f}"
        raise ValueError(f"ema={choice}: expected {allowed}")
    return kind, value


def read(workdir: epath.PathLike, shapes: Any, step: int | None, choice: str | None) -> tuple[Any, int]:
    """Reads an average of a run's checkpoint; returns it and the step.

    Args:
      workdir: folder of the run.
      shapes: an Ema of `jax.ShapeDtypeStruct`, or a part of it as a dict, as of `checkpoint.restore_subset`.
      step: which checkpoint; None for the newest.
      choice: None for `state.ema`; or a decay that was kept, or a sigma, see `parse`.

    Raises:
      ValueError: if the run has not kept what this needs.
    """
    config = checkpoint.read_config(workdir, step)
    if choice is None or parse(choice) == ("decay", config["ema_decay"]):
        subset, step = checkpoint.restore_subset(workdir, {"ema": shapes}, step)
        return subset["ema"], step
    kind, value = parse(choice)
    if value in config.get(f"ema_{kind}s", ()):
        return _read_kept(workdir, shapes, step, name_of(kind, value))
    sigmas = config.get("ema_sigmas", ())
    if kind == "decay" or not sigmas:
        decays = [config["ema_decay"], *config.get("ema_decays", ())]
        made = "any sigma=S" if sigmas else "no sigma=S, for which config.ema_sigmas is empty"
        raise ValueError(f"ema={choice}: the run in {workdir} has kept averages of decay {decays}, and {made}")
    return _reconstruct(workdir, shapes, step, value, sigmas)


def described(choice: str | None, config: Mapping[str, Any]) -> float | str:
    """Returns what results and cards say of an average: its decay, or 'sigma=S'."""
    if choice is None:
        return config["ema_decay"]
    kind, value = parse(choice)
    return value if kind == "decay" else f"{_SIGMA}{value:g}"


def _read_kept(workdir, shapes, step, name):
    subset, step = checkpoint.restore_subset(workdir, {"averages": {name: shapes}}, step)
    return subset["averages"][name], step


def _reconstruct(workdir, shapes, step, sigma, sigmas):
    """Returns (the combination of the averages in a run's checkpoints, up to a step, whose width is sigma, the step)."""
    steps = checkpoint.saved_steps(workdir)
    step = steps[-1] if step is None else step
    kept = [Profile(at, one) for at in steps if at <= step for one in sigmas]
    factors, misfit = coefficients(kept, Profile(step, sigma))
    message = "sigma=%s at step %d from averages of sigma %s in %d checkpoints: the profile differs by %.1f %%"
    log = logging.warning if misfit > LARGEST_MISFIT else logging.info
    log(message, sigma, step, tuple(sigmas), len(kept) // len(sigmas), 100 * misfit)
    total = None
    for profile, factor in zip(kept, factors):
        average, _ = _read_kept(workdir, shapes, profile.step, name_of("sigma", profile.sigma))
        scaled = jax.tree.map(lambda leaf, factor=float(factor): factor * leaf, average)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
    return total, step
