"""MeanFlow: a network of two times that predicts an average velocity, for samples in one step or a few.

u(z_t, r, t) = (z_t - z_r) / (t - r) is the mean of the velocity on the way from t to r <= t, and at r = t the velocity itself.
Its derivative along the way, du/dt = v dz u + dt u, makes it learnable without a simulation: u = v - (t - r) du/dt.

Reference: MeanFlow (arXiv 2505.13447) equations 6 to 11 and 19 to 22, and its code, Gsunshine/meanflow; improved MeanFlow
(2512.02012), Lyy-iiis/imeanflow.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from repae_jax.diffusion import guidance
from repae_jax.diffusion.interpolant import Objective, Tensor, Times, expand, interpolate, velocity_target
from repae_jax.ranges import Choice, FieldError, Section, Share, Weight, real

PATH = "linear"
TANGENTS = ("data", "network")


class Span(NamedTuple):
    """Numbers that the network is given in the place of a time, [B] each."""

    t: Times
    duration: Times  # t - r
    kappa: Times | None = None  # strength of guidance, 1 - 1 / scale; None for networks that are not told it


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(Section, Objective):
    """MeanFlow's objective, whose fields are `config.diffusion.mean_flow`; the defaults are those of the first paper's code.

    The loss of a sample is |e|^2 / sg(|e|^2 + c)^p, summed over positions and channels, with e = u + sg((t - r) du/dt - g). It
    has the value and the gradient of both papers' losses: they differ in the tangent of z_t and in g, the velocity to learn.

    * MeanFlow: g = omega v + (1 - omega - kappa) u(z_t, t, t | no class) + kappa u(z_t, t, t | class), v = noise - z, for t in
      an interval, else v. z_t moves by g.
    * Improved: z_t moves by the network's own velocity, u(z_t, t, t | class), without which the target depends on more than
      z_t. The scale of guidance is drawn, its density proportional to 1 / scale, and given to the network as
      kappa = 1 - 1 / scale; omega is 1, so that g is the same formula.

    Samples without a class have g = v, and move by their own velocity; in the public code of the improved form they move by
    that of the class that was dropped. Both codes drop the classes of the first samples, all of which have r = t, so that
    their networks learn no average velocity without a class; here any sample's class may be dropped, as guidance in sampling
    needs that velocity. Of the improved form there are here neither the second head, which predicts v in training, nor
    intervals of guidance as further inputs, nor tokens for the conditions; its networks are others, too.
    """

    time_mean: Annotated[float, real()] = -0.4  # times are sigmoid(N(mean, std)), t the later of two draws and r the other
    time_std: Annotated[float, real(above=0)] = 1.0
    velocity_share: Share = 0.75  # share of the samples with r = t
    weight_power: Weight = 1.0  # p of the adaptive weight; 0 weighs all samples alike
    weight_constant: Annotated[float, real(above=0)] = 0.01  # c
    tangent: Annotated[str, Choice(TANGENTS)] = "data"  # what z_t moves by: 'data', MeanFlow, or 'network', improved
    omega: Weight = 1.0  # guidance of a fixed scale, omega / (1 - kappa); 1 and 0 is none
    kappa: Annotated[float, real(0, below=1)] = 0.5
    guidance_low: Share = 0.0  # times in which it holds
    guidance_high: Share = 1.0
    largest_scale: Annotated[float, real(1)] = 1.0  # of guidance that is drawn and given to the network; 1 is none
    predicts: ClassVar[str] = "an average velocity"

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_low > self.guidance_high:
            raise FieldError(f"guidance_low={self.guidance_low} is above guidance_high={self.guidance_high}: low first")
        fixed = {"omega": 1.0, "kappa": 0.0, "guidance_low": 0.0, "guidance_high": 1.0}
        if self.is_told_guidance and (wrong := [name for name, value in fixed.items() if getattr(self, name) != value]):
            value = getattr(self, wrong[0])
            raise FieldError(
                f"largest_scale={self.largest_scale} draws the guidance, which {wrong[0]}={value} fixes: set largest_scale to "
                f"1, or {wrong[0]} to {fixed[wrong[0]]}"
            )

    @property
    def is_told_guidance(self) -> bool:
        """True if the scale of guidance is an input of the network."""
        return self.largest_scale > 1

    @property
    def fixes_guidance(self) -> bool:
        """True if a scale of guidance is trained into the network."""
        return (self.omega, self.kappa) != (1, 0)

    @property
    def trains_guidance(self) -> bool:
        """True if the velocity to learn is guided away from the network's own without a class."""
        return self.fixes_guidance or self.is_told_guidance

    @property
    def conditions(self) -> int:
        """Numbers that the network is given besides the time."""
        return 2 if self.is_told_guidance else 1

    def sample_time(self, key: Array, batch_size: int) -> Span:
        """Draws training times; those of the first samples are equal, as many as `velocity_share` says, as published."""
        time_key, guidance_key = jax.random.split(key)
        draws = self.time_mean + self.time_std * jax.random.normal(time_key, (2, batch_size))
        first, second = jax.nn.sigmoid(draws)
        is_instant = jnp.arange(batch_size) < int(batch_size * self.velocity_share)
        duration = jnp.where(is_instant, 0.0, jnp.abs(first - second))
        logs = jax.random.uniform(guidance_key, (batch_size,)) * jnp.log(self.largest_scale)  # of scales
        return Span(jnp.maximum(first, second), duration, 1 - jnp.exp(-logs) if self.is_told_guidance else None)

    def to_times(self, t: Times) -> Span:
        """Returns the network's times for its velocity at t, without guidance."""
        return self.span(t, jnp.zeros_like(t))

    def span(self, t: Times, duration: Times) -> Span:
        """Returns the network's times for its average velocity from t to t - duration, without guidance."""
        return Span(t, duration, jnp.zeros_like(t) if self.is_told_guidance else None)

    def add_noise(self, z: Tensor, noise: Tensor, t: Span) -> Tensor:
        """Returns z_t = (1 - t) z + t noise."""
        return interpolate(PATH, z, noise, t.t)

    def guide(
        self, output_fn: Callable, labels: Int[Array, " B"], null_label: int, scale: guidance.Scale, channels: int
    ) -> Callable:  # fmt: skip
        """Returns an output function (z_t, times) with guidance, as `guidance.guide`; a network that is told it is told."""
        if not self.is_told_guidance:
            return guidance.guide(output_fn, labels, null_label, scale, channels)

        def told(z_t, times):
            kappa = jnp.full_like(times.t, 1 - 1 / guidance.scale_at(scale, times))
            return output_fn(z_t, times._replace(kappa=kappa), labels)

        return told

    def check_guidance(self, scale: float, channels: int | None, schedule: str) -> None:
        """Raises ValueError for guidance, of a scale above 1, that samples of the network cannot have."""
        if self.fixes_guidance:
            trained = f"config.diffusion.mean_flow.omega={self.omega:g} and kappa={self.kappa:g}"
            raise ValueError(
                f"guidance_scale={scale:g}: guidance is trained into the network, by {trained}, and cannot be changed: use 1, "
                "or train with largest_scale above 1"
            )
        if self.is_told_guidance and scale > self.largest_scale:
            largest = f"config.diffusion.mean_flow.largest_scale={self.largest_scale:g}"
            raise ValueError(f"guidance_scale={scale:g} is above {largest}, the largest that the network has seen")
        if self.is_told_guidance and channels is not None:
            raise ValueError(f"guidance_channels={channels}: the network guides all of its channels; leave it out")
        if self.is_told_guidance and schedule != guidance.CONSTANT:
            trained = f"config.diffusion.mean_flow.largest_scale={self.largest_scale:g}"
            advice = f"which trains the network for one scale at all times: set it to {guidance.CONSTANT!r}"
            raise ValueError(f"guidance_schedule={schedule!r} does not go with {trained}, {advice}")

    def terms(
        self, network: Callable, z: Tensor, noise: Tensor, t: Span, labels: Int[Array, " B"], null_label: int
    ) -> tuple[dict[str, Float[Array, ""]], Any]:
        """Returns 'mean_flow', the loss, and 'velocity', the mean square of e; and the tap's. See `Objective.terms`."""
        z_t = self.add_noise(z, noise, t)
        target, tangent = self._velocities(network, z_t, velocity_target(PATH, z, noise, t.t), t, labels, null_label)
        rates = Span(jnp.ones_like(t.t), jnp.ones_like(t.t), None if t.kappa is None else jnp.zeros_like(t.t))
        average, derivative, tap = jax.jvp(
            lambda z_t, t: network(z_t, t, labels), (z_t, t), (tangent, rates), has_aux=True
        )
        error = average + stop_gradient(expand(t.duration, z) * derivative - target)
        squares = jnp.sum(jnp.square(error), axis=tuple(range(1, error.ndim)))
        weights = stop_gradient(squares + self.weight_constant) ** -self.weight_power
        return {"mean_flow": jnp.mean(weights * squares), "velocity": jnp.mean(jnp.square(error))}, tap

    def _velocities(self, network, z_t, velocity, t, labels, null_label):
        """Returns (velocity to learn, velocity that z_t moves by), both without gradient; `velocity` is that of the data."""

        def at_once(labels, kappa):
            return stop_gradient(network(z_t, Span(t.t, jnp.zeros_like(t.t), kappa), labels)[0])

        is_inside = (self.guidance_low <= t.t) & (t.t <= self.guidance_high)
        omega = expand(jnp.where(is_inside, self.omega, 1.0), z_t)
        kappa = expand(jnp.where(is_inside, self.kappa, 0.0) if t.kappa is None else t.kappa, z_t)
        own, target = velocity, velocity
        if self.tangent == "network" or self.kappa or self.is_told_guidance:
            own = at_once(labels, t.kappa)
        if self.trains_guidance:
            null = at_once(jnp.full_like(labels, null_label), None if t.kappa is None else jnp.zeros_like(t.kappa))
            guided = omega * velocity + (1 - omega - kappa) * null + kappa * own
            target = jnp.where(expand(labels == null_label, z_t), velocity, guided)
        return target, own if self.tangent == "network" else target
