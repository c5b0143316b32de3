"""Early signs that a run goes wrong: the table of healthy ranges that the training log checks.

A check sees logged numbers alone, so that the report repeats it over metrics.jsonl, and costs no wait for a device. Numbers are
of single batches: a check takes several logs, or their median. What the thresholds rest on is said beside them; `docs/
reproducing.md` shows the table to users.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# A VAE that starts from trained weights keeps its latents' scale in the paper (spatial variance 17.06 before, 18.02 after joint
# training, appendix A); the naive run's falls to 0.02. A KL that is strong for the size brought 5.4 to 3.4 on emoji, unharmed.
SHRUNK = 0.3
# From random weights, whose latents have the posterior's standard deviation of about 1, SD-VAE's grow to 1/0.18215 = 5.5.
GROWN = 16
KL_JUMP = 10  # digits from random weights reach 1.6 times the median of the ten logs before, with a KL of weight 1e-6 2.8 times
ZERO_LOGS = 3  # a sum over 10^8 gradients is not exactly 0 by chance
SKIPPED_SHARE, SKIPPED_LEAST, SKIPPED_LOGS = 0.005, 3, 20
START_LOGS, START_STEPS = 20, 500  # a run is young before both
# Two random vectors of 768 numbers have a cosine of 0 +- 0.04, and the mean over a batch's tokens is nearer to 0. Runs on
# digits pass 0.4 within 50 steps.
UNALIGNED = 0.1
# Less than half of the ends that are known: 0.7 (icandle/GenDR, issue 2), 0.8 to 0.87 (digits). A plateau above may be the end.
ALIGNED, STALL_LOGS, STALL_GAIN = 0.3, 50, 0.005
# Of white noise in place of latents, normalized to variance 1, the best velocity has the error 1/(t^2 + (1 - t)^2) at time t:
# pi/2 in the mean over times, and 2 without looking. Noise is predicted with error 1 without looking.
WHITE_VELOCITY, TRIVIAL_SHARE = math.pi / 2, 0.9
# Joint training costs published VAEs 0.8 dB at most (table 14), a tenth of an error; digits with too fast a VAE double theirs.
ERROR_GROWN = 1.5
# Hinge 0.1 needs logits of 0.8 and -0.8 or more in the mean. On digits it stays between 0.7 and 1.5 in single logs.
WON_HINGE, WON_GAP = 0.1, 1.6
DEAD_GAP, DISC_LOGS = 1e-3, 20  # a tenth of the largest difference in any 20 logs of digits, in every one of the logs
CAME_BACK, REPEAT = 20, 500  # logs: well for so long, a fault that shows again is a new one; a lasting one is named again


class History:
    """The finite numbers that a run has logged so far, by metric."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the numbers of a step."""
        for name, value in values.items():
            if math.isfinite(value):
                self._steps.setdefault(name, []).append(step)
                self._values.setdefault(name, []).append(value)

    def first(self, name: str) -> float:
        """Returns the first number; NaN if there is none."""
        return self._values.get(name, [math.nan])[0]

    def newest(self, name: str, count: int) -> list[float]:
        """Returns the `count` newest numbers; [] if there are fewer."""
        values = self._values.get(name, [])
        return values[-count:] if len(values) >= count else []

    def median(self, name: str, count: int, before: int = 0) -> float:
        """Returns the median of `count` numbers before the `before` newest; NaN, which exceeds no limit, if there are fewer."""
        values = self.newest(name, count + before)[:count]
        return statistics.median(values) if values else math.nan

    def rise(self, name: str, logs: int) -> tuple[float, int]:
        """Returns by how much a number rose over the last `logs` logs, or as many as there are, and in how many steps."""
        steps, values = self._steps.get(name, [0])[-logs - 1 :], self._values.get(name, [0.0])[-logs - 1 :]
        return values[-1] - values[0], steps[-1] - steps[0]

    def is_young(self, name: str) -> bool:
        """Returns whether a metric has not been logged for long enough to be judged by its level."""
        steps = self._steps.get(name, [])
        return len(steps) <= START_LOGS or steps[-1] - steps[0] < START_STEPS


class Check(NamedTuple):
    """A row of the table."""

    name: str
    metrics: tuple[str, ...]  # all that it looks at
    healthy: str
    sees: Callable[[History], str]  # returns what is wrong; '' if nothing is
    means: str
    advice: str


def _shrunk(history: History) -> str:
    now, first = history.median("latents/std", 3), history.first("latents/std")
    return f"latents/std is {now:.3g}, and was {first:.3g} at the beginning" if now < SHRUNK * first else ""


def _grown(history: History) -> str:
    now, first = history.median("latents/std", 3), history.first("latents/std")
    return f"latents/std is {now:.3g}, and was {first:.3g} at the beginning" if now > GROWN * first else ""


def _kl_jump(history: History) -> str:
    now, before = history.median("vae/kl", 3), history.median("vae/kl", 10, before=3)
    return f"vae/kl is {now:.3g}, and was {before:.3g} in the ten logs before" if now > KL_JUMP * before else ""


def _zero_gradients(history: History) -> str:
    is_idle = history.newest("disc/hinge", 1) == [0.0]  # the GAN has not begun; a discriminator that has won has its own check
    names = GRADIENTS[:2] if is_idle else GRADIENTS
    zero = [name for name in names if history.newest(name, ZERO_LOGS) == [0.0] * ZERO_LOGS]
    return f"{' and '.join(zero)} exactly 0 in the last {ZERO_LOGS} logs" if zero else ""


def _skipped(history: History) -> str:
    skipped, steps = history.rise("skipped", SKIPPED_LOGS)
    is_often = skipped >= max(SKIPPED_LEAST, SKIPPED_SHARE * steps)
    return f"{skipped:.0f} of the last {steps} updates were skipped" if is_often else ""


def _unaligned(history: History) -> str:
    values = {name: history.median(name, 5) for name in ALIGNMENTS if not history.is_young(name)}
    return ", ".join(f"{name} is {value:.3g}" for name, value in values.items() if value > -UNALIGNED)


def _stalled(history: History) -> str:
    seen = []
    for name in ALIGNMENTS:
        now, before = history.median(name, STALL_LOGS), history.median(name, STALL_LOGS, before=STALL_LOGS)
        if -ALIGNED < now <= -UNALIGNED and now > before - STALL_GAIN:
            seen.append(f"{name} is {now:.3g} in the last {STALL_LOGS} logs, and was {before:.3g} in as many before")
    return ", ".join(seen)


def _trivial_velocity(history: History) -> str:
    limits = {"sit/velocity": max(WHITE_VELOCITY, TRIVIAL_SHARE * history.first("sit/velocity")), "sit/noise": TRIVIAL_SHARE}
    values = {name: history.median(name, 5) for name in limits if not history.is_young(name)}
    return ", ".join(f"{name} is {value:.3g}" for name, value in values.items() if value > limits[name])


def _worse_images(history: History) -> str:
    for name, limit in (("vae/l1", ERROR_GROWN), ("vae/l2", ERROR_GROWN**2)):
        now, first = history.median(name, 10), history.first(name)
        if now > limit * first:
            return f"{name} is {now:.3g}, and was {first:.3g} at the beginning"
    return ""


def _disc_won(history: History) -> str:
    hinge, real, fake = (history.median(name, DISC_LOGS) for name in DISCRIMINATOR)
    return f"disc/hinge is {hinge:.3g}, logits {real:.3g} and {fake:.3g}" if hinge < WON_HINGE and real - fake > WON_GAP else ""


def _disc_dead(history: History) -> str:
    hinge, real, fake = (history.newest(name, DISC_LOGS) for name in DISCRIMINATOR)
    if not all(hinge) or not hinge or max(abs(a - b) for a, b in zip(real, fake, strict=True)) > DEAD_GAP:
        return ""
    return f"disc/logits_real and disc/logits_fake are equal within {DEAD_GAP} in the last {DISC_LOGS} logs"


GRADIENTS = ("grad_norm/vae", "grad_norm/sit", "grad_norm/disc")
ALIGNMENTS = ("sit/align", "vae/align")  # not sit/self: its target moves, and no range is known
DISCRIMINATOR = ("disc/hinge", "disc/logits_real", "disc/logits_fake")

CHECKS = (
    Check(
        "collapsing latents", ("latents/std",), f"at least {SHRUNK} of its first value", _shrunk,
        "The latent space collapses, which makes denoising easy and images bad.",
        "Is loss.vae.diffusion 0, is loss.vae.align above 0, and loss.vae.kl not too large?",
    ),
    Check(
        "growing latents", ("latents/std",), f"at most {GROWN} times its first value", _grown,
        "Nothing holds the latents' scale, and the SiT follows a target that moves.",
        "Raise loss.vae.kl, or lower optim.vae.learning_rate.",
    ),
    Check(
        "exploding KL", ("vae/kl",), f"at most {KL_JUMP} times the ten logs before", _kl_jump,
        "Some posteriors have run away; latents that are not finite come next.",
        "Continue a checkpoint from before (checkpoints_tools convert --step, init.checkpoint); lower optim.vae.learning_rate.",
    ),
    Check(
        "zero gradients", (*GRADIENTS, "disc/hinge"),
        "gradients never exactly 0; the discriminator's may be while disc/hinge is", _zero_gradients,
        "The network has stopped learning, as in a float16 run of the published code at 90,000 steps; it does not recover.",
        "Continue a checkpoint from before (checkpoints_tools convert --step, init.checkpoint), in float32 if it comes back.",
    ),
    Check(
        "skipped updates", ("skipped",),
        f"below {SKIPPED_SHARE:.1%} of the last {SKIPPED_LOGS} logs' steps, or below {SKIPPED_LEAST}", _skipped,
        "Losses or gradients are often not finite, which precedes a stop.",
        "The lines 'update skipped' name the terms: lower that network's learning rate, or take precision.compute='float32'.",
    ),
    Check(
        "no alignment", ALIGNMENTS, f"below -{UNALIGNED} after {START_LOGS} logs and {START_STEPS} steps", _unaligned,
        "The SiT resembles the encoder no more than by chance.",
        "Are the encoder's weights and image size right, and do labels and images belong together?",
    ),
    Check(
        "stalled alignment", ALIGNMENTS,
        f"above -{ALIGNED}, it falls by {STALL_GAIN} from {STALL_LOGS} logs to the next {STALL_LOGS}", _stalled,
        "The alignment has stopped far from where runs end.",
        "Compare the encoder, sit.encoder_depth (4 for B, 8 for L and XL) and the weights of align with the row's.",
    ),
    Check(
        "trivial velocity", ("sit/velocity", "sit/noise"),
        f"after {START_LOGS} logs and {START_STEPS} steps, velocity below {WHITE_VELOCITY:.2f} or below {TRIVIAL_SHARE} of its "
        f"first value, noise below {TRIVIAL_SHARE}", _trivial_velocity,
        "The SiT does no better than on white noise: latents without structure, or of a scale that is not 1.",
        "Check init.latent_stats, and latents/std if the VAE is trained.",
    ),
    Check(
        "worse reconstructions", ("vae/l1", "vae/l2"),
        f"l1 at most {ERROR_GROWN} times, l2 {ERROR_GROWN**2} times its first value", _worse_images,
        "The VAE forgets how to reconstruct: it moves faster than decoder and SiT can follow.",
        "Lower optim.vae.learning_rate or loss.vae.align; published runs keep both at 1e-4 and 1.5.",
    ),
    Check(
        "discriminator has won", DISCRIMINATOR, f"hinge above {WON_HINGE}, or logits closer than {WON_GAP}", _disc_won,
        "It tells every reconstruction from its image, so its gradient teaches the VAE little but artifacts.",
        "Lower optim.disc.learning_rate or loss.vae.gan, set loss.lecam, or start the GAN later (loss.gan_start).",
    ),
    Check(
        "dead discriminator", DISCRIMINATOR, f"logits differ by more than {DEAD_GAP} in one of {DISC_LOGS} logs", _disc_dead,
        "It tells nothing apart, and the GAN's term teaches nothing.",
        "Start from the weights of init.disc, or raise optim.disc.learning_rate; on images this easy, do without loss.vae.gan.",
    ),
)  # fmt: skip
WATCHED = frozenset(name for check in CHECKS for name in check.metrics)


class Watch:
    """Checks a run at each of its logs, and names each fault once.

    It is named again if it comes back after CAME_BACK logs, or lasts for REPEAT.

    Args:
      align_end: step from which on the alignment has no weight, and may be lost; None if it always has.
    """

    def __init__(self, align_end: int | None = None):
        self._history, self._logs, self._align_end = History(), 0, math.inf if align_end is None else align_end
        self._named: dict[str, int] = {}  # number of the log by which a fault was named last
        self._seen: dict[str, int] = {}  # and by which it was there last

    def update(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns what is to be named after these numbers, a text for each fault: what is seen, what it means, what helps."""
        names = WATCHED.difference(ALIGNMENTS if step >= self._align_end else ())
        self._history.add(step, {name: value for name, value in values.items() if name in names})
        self._logs += 1
        sentences = []
        for name, _, _, sees, means, advice in CHECKS:
            if not (seen := sees(self._history)):
                continue
            is_new = self._logs - self._seen.get(name, -CAME_BACK) > CAME_BACK
            if is_new or self._logs - self._named[name] >= REPEAT:
                sentences.append(f"{name}: {seen}. {means} {advice}")
                self._named[name] = self._logs
            self._seen[name] = self._logs
        return sentences

    def replay(
        self, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], last_step: float = math.inf
    ) -> list[tuple[int, str]]:
        """Updates with what was logged until `last_step`; returns (step, sentence) of what was named.

        `curves` are name -> (steps, values), as `evaluation.metrics_file` reads them. A run that is continued so warns as if it
        had never stopped.
        """
        logs: dict[int, dict[str, float]] = {}
        for name in sorted(WATCHED & set(curves)):
            for step, value in zip(*curves[name], strict=True):
                if step <= last_step:
                    logs.setdefault(int(step), {})[name] = float(value)
        return [(step, sentence) for step, values in sorted(logs.items()) for sentence in self.update(step, values)]
