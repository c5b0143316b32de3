"""Samplers, from noise to data: a table of methods, and the settings of a run of one.

A sampler integrates an output function over segments of time; it knows no labels and no guidance. State and times are float32.
The published code keeps the state in float64 between float32 network calls, a difference below 2e-5 of the largest entry in the
parity tests. Reference: REPA-E's `samplers.py`; for DiT's, `ddpm.py`.

To add a sampler, write a subclass of `Sampler` with a `step` and put it into `SAMPLERS`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import ode

from repae_jax.diffusion import ddpm, interpolant
from repae_jax.diffusion.ddpm import NoiseObjective
from repae_jax.diffusion.guidance import CONSTANT, MDT_POWER, SCHEDULES
from repae_jax.diffusion.interpolant import Objective, Tensor, VelocityObjective, shift_times
from repae_jax.diffusion.mean_flow import MeanFlow
from repae_jax.ranges import Choice, OrNone, check, later, real, whole

OutputFn = Callable[[Tensor, Any], Tensor]  # (z, times [B], or MeanFlow's Span of them) -> the network's output
NoiseFn = Callable[[Any], Tensor]  # step index -> N(0, 1) noise of z's shape
_VELOCITY = VelocityObjective()
Segments = Sequence[tuple[np.ndarray, OutputFn]]  # (times [k + 1], output function that holds for their k steps), in order


class Interval(NamedTuple):
    """One step of a sampler."""

    t: Any  # start of the step, a scalar: float32, or int32 for DiT's timesteps
    t_next: Any  # end of the step, nearer to data
    index: Any  # number of the step, from 0; names its noise
    coefficients: Any  # entry of `Sampler.coefficients`


@dataclass(frozen=True)
class Sampler:
    """A sampling method; subclasses define `step`, and whatever else differs from these defaults.

    What depends on its fields is in `times` and `coefficients`, so that programs of steps serve all their values.
    """

    time_shift: float = 1.0  # of the times at which steps start and end, see `interpolant.shift_times`

    objective: ClassVar[type[Objective]] = VelocityObjective  # objective of the networks it samples from
    fewest_steps: ClassVar[int] = 2
    last_step: ClassVar[Callable | None] = None  # a method like `step` for the very last one, if that is an exception
    adaptive: ClassVar[bool] = False  # it takes as many steps as it needs, not `steps`

    def times(self, steps: int) -> np.ndarray:
        """Decreasing times [steps + 1], float64; here equal steps from 1 to 0, shifted."""
        return shift_times(np.linspace(1.0, 0.0, steps + 1), self.time_shift)

    def coefficients(self, t: np.ndarray, t_next: np.ndarray, objective: Any) -> Any:
        """Tree of arrays [k]: what a segment's steps t -> t_next need and float32 is too coarse to compute; here nothing."""
        del t, t_next, objective
        return ()

    def start(self, z: Tensor) -> Any:
        """Returns the state that a segment starts with: z, in multistep methods with what they remember."""
        return z

    def position(self, state: Any) -> Tensor:
        """Returns the z in a state."""
        return state

    def step(self, z: Any, interval: Interval, output_fn: OutputFn, noise_fn: NoiseFn, objective: Any) -> Any:
        """Returns z, or the state with it, at interval.t_next."""
        raise NotImplementedError

    def integrate(self, segments: Segments, z: Tensor, noise_fn: NoiseFn | None = None, objective: Any = _VELOCITY) -> Tensor:
        """Takes all steps from z, N(0, 1) at the first time, to the last; the segments' times are `self.times(steps)`.

        ODE samplers need no noise_fn; MeanFlow's needs the objective, which has the times of its network.
        """
        first = 0
        for number, (times, output_fn) in enumerate(segments, 1):
            given = {"output_fn": output_fn, "noise_fn": noise_fn, "objective": objective}
            t, t_next = times[:-1], times[1:]
            index = first + np.arange(len(t))
            intervals = jax.tree.map(jnp.asarray, Interval(t, t_next, index, self.coefficients(t, t_next, objective)))
            last_step = self.last_step if number == len(segments) else None
            looped = intervals if last_step is None else jax.tree.map(lambda x: x[:-1], intervals)
            state, _ = jax.lax.scan(partial(_step_in_scan, partial(self.step, **given)), self.start(z), looped)
            z = self.position(state)
            if last_step is not None:
                z = last_step(z, jax.tree.map(lambda x: x[-1], intervals), **given)
            first += len(t)
        return z


def _step_in_scan(step, z, interval):
    return step(z, interval), None


def _at_time(output_fn, z, t):
    return output_fn(z, jnp.full((z.shape[0],), t))


def _in_channels(output_fn, z, t):
    return _at_time(output_fn, z, t)[..., : z.shape[-1]]  # a learned sigma, if there is one, is unused


def _velocity(output_fn, z, t, objective):
    return objective.velocity(_in_channels(output_fn, z, t), z, t)


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on dz/dt = v(z, t)."""

    def step(self, z, interval, output_fn, noise_fn, objective):
        return z + (interval.t_next - interval.t) * _velocity(output_fn, z, interval.t, objective)


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method, two network calls a step; the last step is Euler's. A step's guidance holds for both its calls."""

    last_step: ClassVar[Callable] = Euler.step

    def step(self, z, interval, output_fn, noise_fn, objective):
        dt = interval.t_next - interval.t
        v = _velocity(output_fn, z, interval.t, objective)
        corrected = _velocity(output_fn, z + dt * v, interval.t_next, objective)
        return z + dt * 0.5 * (v + corrected)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = 2t; the last step is deterministic.

    That one starts at last_time whatever the shift is, as it leaves as much noise as it is long.
    """

    last_time: float = 0.04  # start of the last step; all others are equal steps from 1 to there, shifted

    def times(self, steps):
        last = shift_times(self.last_time, 1 / self.time_shift)  # which the shift moves to last_time
        return np.append(shift_times(np.linspace(1.0, last, steps), self.time_shift), 0.0)

    def step(self, z, interval, output_fn, noise_fn, objective):
        variance = 2 * interval.t * jnp.abs(interval.t_next - interval.t)
        drifted = self.last_step(z, interval, output_fn, noise_fn, objective)
        return drifted + jnp.sqrt(variance) * noise_fn(interval.index)

    def last_step(self, z, interval, output_fn, noise_fn, objective):
        v = _velocity(output_fn, z, interval.t, objective)
        drift = v - 0.5 * (2 * interval.t) * interpolant.score(objective.path, v, z, interval.t)
        return z + (interval.t_next - interval.t) * drift


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM sampling: each step draws from the network's Gaussian, the one that ends at ddpm.DATA takes its mean.

    The output is (eps, v) [B, ..., 2C]; the published guidance is that of eps and keeps the conditional v.
    """

    objective: ClassVar[type[Objective]] = NoiseObjective

    def times(self, steps):
        return ddpm.timesteps(steps)

    def coefficients(self, t, t_next, objective):
        return ddpm.step_coefficients(t, t_next)

    def step(self, z, interval, output_fn, noise_fn, objective):
        c = interval.coefficients
        eps, v = ddpm.split_output(_at_time(output_fn, z, interval.t), z)
        std = jnp.exp(0.5 * (c.log_low + c.excess(v)))
        mean = c.z_scale * z - c.eps_scale * eps
        return mean + jnp.where(interval.t_next == ddpm.DATA, 0.0, std * noise_fn(interval.index))


class DataSteps(NamedTuple):
    """Steps z -> z_scale z + data_scale x + change_scale (x - x_before), x predicted at the start of a step. float32."""

    z_scale: np.ndarray
    data_scale: np.ndarray
    change_scale: np.ndarray


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M), of second order with one network call a step: it extrapolates the latents x that the network predicts.

    With the log-SNR l = log(alpha / sigma), h = l_next - l, h_before that of the step before, and x of the last two steps:
    z_next = sigma_next / sigma z + alpha_next (1 - exp(-h)) (x + h / (2 h_before) (x - x_before)).

    A step is of first order, with x alone, if it is the last one, to infinite l, as in public code; or the first one of a
    segment, as other guidance predicts other latents, whose difference is no change over time. So is the second step, in
    effect: its h_before, from t = 1, is infinite.

    Reference: arXiv 2211.01095, algorithm 2; diffusers' DPMSolverMultistepScheduler with use_flow_sigmas, whose times start at
    0.999, not at 1.
    """

    def coefficients(self, t, t_next, objective):
        here, there = (interpolant.coefficients(objective.path, time) for time in (t, t_next))
        z_scale = there.sigma / here.sigma
        data_scale = there.alpha - here.alpha * z_scale
        with np.errstate(divide="ignore", invalid="ignore"):  # logarithms of 0, and what is replaced here
            h = np.log(there.alpha / there.sigma) - np.log(here.alpha / here.sigma)
            ratio = np.where(there.sigma == 0, 0.0, h / np.append(np.inf, h[:-1]))
        ratio[0] = 0.0
        return DataSteps(*(x.astype(np.float32) for x in (z_scale, data_scale, data_scale * ratio / 2)))

    def start(self, z):
        return z, jnp.zeros_like(z)  # of the first step, whose change_scale is 0

    def position(self, state):
        return state[0]

    def step(self, state, interval, output_fn, noise_fn, objective):
        (z, before), c = state, interval.coefficients
        data = objective.data(_in_channels(output_fn, z, interval.t), z, interval.t)
        return c.z_scale * z + c.data_scale * data + c.change_scale * (data - before), data


class Tolerances(NamedTuple):
    """Bounds of the estimated error of each step of an adaptive method, float32."""

    relative: np.ndarray  # to z
    absolute: np.ndarray


class Progress(NamedTuple):
    """State of an adaptive method."""

    z: Any  # flat
    slope: Any  # dz/ds there, flat
    s: Any  # minus the time, which grows
    ds: Any  # step to try next


@dataclass(frozen=True)
class Dopri5(Sampler):
    """Dormand and Prince's method of fifth order with adaptive steps, of the whole batch together, as published for SiT.

    A segment is integrated as a whole: `steps` says only at which times guidance may begin and end. Unlike torchdiffeq's, the
    published sampler's library, and `odeint` of JAX, from which the formulas are, the last step ends where the segment does: no
    network is asked for times beyond data, from which z at the end would be interpolated.

    Reference: SiT's `transport/integrators.py`, with tolerances 1e-3 and 1e-6; jax.experimental.ode.
    """

    tolerance: float = 1e-3  # of the estimated error of a step, relative to z; the absolute one is a thousandth of it
    adaptive: ClassVar[bool] = True

    def coefficients(self, t, t_next, objective):
        return Tolerances(*(np.full(len(t), x, np.float32) for x in (self.tolerance, self.tolerance / 1000)))

    def step(self, z, interval, output_fn, noise_fn, objective):
        tolerances, end = interval.coefficients, -interval.t_next

        def slope(flat, s):
            return -_velocity(output_fn, flat.reshape(z.shape), -s, objective).ravel()

        def goes_on(now):
            return (now.s < end) & (now.s + now.ds > now.s)  # False for NaN, too

        def attempt(now):
            ds = jnp.minimum(now.ds, end - now.s)
            there, slope_there, error, _ = ode.runge_kutta_step(slope, now.z, now.slope, now.s, ds)
            ratio = ode.mean_error_ratio(error, *tolerances, now.z, there)
            taken = jax.tree.map(partial(jnp.where, ratio <= 1), (there, slope_there, now.s + ds), now[:3])
            return Progress(*taken, ode.optimal_step_size(ds, ratio))

        flat, s = z.ravel(), -interval.t
        first = slope(flat, s)
        ds = ode.initial_step_size(slope, s, flat, 4, *tolerances, first)
        last = jax.lax.while_loop(goes_on, attempt, Progress(flat, first, s, ds))
        return jnp.where(last.s < end, jnp.nan, last.z).reshape(z.shape)  # NaN where it could not go on

    def integrate(self, segments, z, noise_fn=None, objective=_VELOCITY):
        single_steps = [(times[[0, -1]], output_fn) for times, output_fn in segments]
        return super().integrate(single_steps, z, noise_fn, objective)


@dataclass(frozen=True)
class AverageVelocity(Sampler):
    """MeanFlow's sampling: z_r = z_t - (t - r) u(z_t, r, t) is the end of the way, not a step along it; one step may do."""

    objective: ClassVar[type[Objective]] = MeanFlow
    fewest_steps: ClassVar[int] = 1

    def step(self, z, interval, output_fn, noise_fn, objective):
        t, duration = (jnp.full((z.shape[0],), x) for x in (interval.t, interval.t - interval.t_next))
        return z - (interval.t - interval.t_next) * output_fn(z, objective.span(t, duration))


PRECISIONS = ("float32", "bfloat16")
TIME_SHIFT = real(above=0, most=100)  # the range of shifts, in training, too
SAMPLERS: dict[str, Sampler] = {
    "euler": Euler(), "heun": Heun(), "sde": EulerMaruyama(), "ancestral": Ancestral(),
    "dpmpp": DPMSolver(), "dopri5": Dopri5(), "meanflow": AverageVelocity(),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Guidance applies to steps that start at guidance_low <= t <= guidance_high (1 is noise; DiT's timesteps count as t / 999).
    DiT's, SiT's and LightningDiT's published sampling guides the first 3 channels only.

    Two further kinds guide away from a weaker output for the same class, at weaker_low <= t <= weaker_high: autoguidance from
    that of another network, which a caller gives, internal guidance from that of the model's own head at the alignment tap.
    """

    # name in SAMPLERS: 'euler', 'heun', 'dpmpp' or 'dopri5' (ODE), 'sde' (the paper's), 'ancestral' (DiT's), 'meanflow'
    sampler: str = "sde"
    steps: int = 250
    guidance_scale: float = 1.0  # 1 is no guidance
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int | None = None  # so many, the first ones; None is all
    guidance_schedule: str = later(CONSTANT)  # name in guidance.SCHEDULES: how guidance_scale - 1 changes over t
    guidance_power: float = later(MDT_POWER)  # of 'power_cosine'
    autoguidance_scale: float = later(1.0)  # 1 is none
    internal_scale: float = later(1.0)  # 1 is none
    weaker_low: float = later(0.0)
    weaker_high: float = later(1.0)
    precision: str = "float32"  # of the network's matrix products: 'float32' as published, or 'bfloat16'
    time_shift: float = later(1.0)  # above 1 steps are nearer to noise, see `interpolant.shift_times`
    tolerance: float = later(Dopri5.tolerance)  # of 'dopri5'

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
        check("steps", whole(1), self.steps)
        check("guidance_scale", real(1), self.guidance_scale)
        check("guidance_low", real(0, 1), self.guidance_low)
        check("guidance_high", real(0, 1), self.guidance_high)
        check("guidance_channels", OrNone(whole(1)), self.guidance_channels)
        check("guidance_schedule", Choice(SCHEDULES), self.guidance_schedule)
        check("guidance_power", real(above=0, most=100), self.guidance_power)
        check("autoguidance_scale", real(1), self.autoguidance_scale)
        check("internal_scale", real(1), self.internal_scale)
        check("weaker_low", real(0, 1), self.weaker_low)
        check("weaker_high", real(0, 1), self.weaker_high)
        check("precision", Choice(PRECISIONS), self.precision)
        check("time_shift", TIME_SHIFT, self.time_shift)
        check("tolerance", real(above=1e-6, most=1), self.tolerance)  # float32 itself errs by about 1e-6
        if self.guidance_low > self.guidance_high:
            raise ValueError(f"guidance interval [{self.guidance_low}, {self.guidance_high}] must lie in [0, 1], low first")
        if self.weaker_low > self.weaker_high:
            raise ValueError(f"weaker_low={self.weaker_low} and weaker_high={self.weaker_high} must be an interval, low first")
        if self.autoguidance_scale > 1 and self.internal_scale > 1:
            given = f"autoguidance_scale={self.autoguidance_scale} and internal_scale={self.internal_scale}"
            raise ValueError(f"{given}: guide away from one weaker output; set one of them to 1")

    @property
    def method(self) -> Sampler:
        """The sampler, with those of the settings that are fields of it."""
        sampler = SAMPLERS[self.sampler]
        names = {field.name for field in dataclasses.fields(sampler)} & {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(sampler, **{name: getattr(self, name) for name in names})


def check_sampler(sampling: Sampling, objective: Any) -> None:
    """ValueError unless the sampler is for networks of this objective, which have these settings, steps and guidance."""
    sampler = sampling.method
    if not isinstance(objective, sampler.objective):
        allowed = [name for name, other in SAMPLERS.items() if isinstance(objective, other.objective)]
        predicts = f"the network predicts {objective.predicts}"
        raise ValueError(f"sampler {sampling.sampler!r}: {predicts}; allowed: {', '.join(allowed)}")
    if sampling.time_shift != 1 and isinstance(sampler, Ancestral):
        given = f"time_shift={sampling.time_shift} does not go with sampler 'ancestral'"
        raise ValueError(f"{given}, whose timesteps are DiT's: set it to 1")
    if sampling.tolerance != Dopri5.tolerance and not sampler.adaptive:
        adaptive = ", ".join(name for name, other in SAMPLERS.items() if other.adaptive)
        given = f"tolerance={sampling.tolerance} does not go with sampler {sampling.sampler!r}"
        raise ValueError(f"{given}: it is of {adaptive}; set it to {Dopri5.tolerance}, or choose another sampler")
    if sampling.guidance_power != MDT_POWER and sampling.guidance_schedule != "power_cosine":
        given = f"guidance_power={sampling.guidance_power} and guidance_schedule={sampling.guidance_schedule!r}"
        raise ValueError(f"{given}: only 'power_cosine' has a power; set it to {MDT_POWER}, or choose that schedule")
    check(f"sampler {sampling.sampler!r}: steps", whole(sampler.fewest_steps), sampling.steps)
    sampler.times(sampling.steps)
    _check_guidance(sampling, objective)


def _check_guidance(sampling, objective):
    """Raises ValueError for guidance that the networks of the objective cannot have."""
    for name in ("autoguidance_scale", "internal_scale"):
        if getattr(sampling, name) > 1 and isinstance(objective, MeanFlow):
            given = f"{name}={getattr(sampling, name)} does not go with sampler {sampling.sampler!r}"
            raise ValueError(f"{given}: nothing is known of guidance of average velocities away from a weaker one; set it to 1")
    if sampling.guidance_scale > 1:
        objective.check_guidance(sampling.guidance_scale, sampling.guidance_channels, sampling.guidance_schedule)


def check_channels(sampling: Sampling, channels: int) -> None:
    """ValueError for guidance of more channels than the latents have."""
    if sampling.guidance_channels is not None and sampling.guidance_channels > channels:
        raise ValueError(f"guidance_channels={sampling.guidance_channels}: the latents have {channels}")


def check_weaker(sampling: Sampling, has_head: bool, has_network: bool) -> None:
    """ValueError for guidance away from a weaker output that is not there, the model's own head's or another network's."""
    if sampling.internal_scale > 1 and not has_head:
        missing = "the model has no head at its tap, which config.loss.sit.internal trains"
        raise ValueError(f"internal_scale={sampling.internal_scale}: {missing}; set internal_scale to 1")
    if sampling.autoguidance_scale > 1 and not has_network:
        missing = "autoguidance names no weaker network; name one, or set autoguidance_scale to 1"
        raise ValueError(f"autoguidance_scale={sampling.autoguidance_scale}, but {missing}")
    if sampling.autoguidance_scale == 1 and has_network:
        raise ValueError("autoguidance is given, but autoguidance_scale=1.0 is no guidance: set it above 1, or leave both out")
