"""Sizes of a scale in words, and the page of a scale that has not run: what it would do, and what that takes."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from launch.miniature import experiments, markdown
from launch.miniature.scales import Scale


def in_short(scale: Scale, tasks: Sequence[Any]) -> str:
    """Returns pictures, network and training of the runs of a scale in half a sentence."""
    config = _joint(tasks)
    sit, pixels = config["sit"], config["data"]["image_size"]
    return (
        f"{scale.pictures} of {pixels} x {pixels} pixels with a SiT of width {sit['hidden_size']} and {sit['depth']} blocks, "
        f"{config['steps']:,} steps of batch {config['data']['batch_size']}"
    )


def size_lines(scale: Scale, tasks: Sequence[Any]) -> list[str]:
    """Returns sentences on pictures, networks and training of the runs of a scale."""
    config = _joint(tasks)
    vae, sit, pixels = config["vae"], config["sit"], config["data"]["image_size"]
    side = pixels // 2 ** (len(vae["channel_multipliers"]) - 1)
    fewer = pixels * pixels * 3 / (side * side * vae["latent_channels"])
    alone, trained = (
        {task.content["config"]["steps"] for task in tasks if (task.kind == "vae") == is_vae} for is_vae in (1, 0)
    )
    samplers = [f"{steps} steps of `{name}`" for name, steps in _samplers(tasks)]
    samples = max(task.content["description"]["evaluation"]["samples"] for task in tasks)
    return [
        f"**Pictures.** {scale.pictures.capitalize()} of {pixels} x {pixels} pixels.",
        f"**Networks.** A VAE of {vae['channels']} channels, with {vae['latent_channels']} latent ones at {side} x {side} "
        f"positions ({fewer:.1f} times fewer numbers than pixels have); SiT and DiT of width {sit['hidden_size']} with "
        f"{sit['depth']} blocks on {(side // sit['patch_size']) ** 2} tokens, aligned after block {sit['encoder_depth']}.",
        f"**Training.** {_range(alone)} steps of the VAE that is trained alone, {_range(trained)} of all else "
        f"(REPA-E has {config['steps']:,}), of batch {config['data']['batch_size']}; weights are averaged with decay "
        f"{config['ema_decay']}.",
        f"**Samples.** {samples:,} for every Frechet distance, with classes as frequent as among the training pictures, by "
        f"{' or '.join(samplers)}, without guidance.",
    ]


def _joint(tasks: Sequence[Any]) -> Mapping[str, Any]:
    """Returns the config of the first run that trains VAE and SiT together."""
    return next(task.content["config"] for task in tasks if task.kind == "repae")


def _range(numbers: Collection[int]) -> str:
    numbers = sorted(numbers)
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}" if numbers else "no"


def _samplers(tasks: Sequence[Any]) -> list[tuple[str, int]]:
    samplers = [task.content["description"]["evaluation"]["sampler"] for task in tasks]
    return list(dict.fromkeys((sampler["sampler"], sampler["steps"]) for sampler in samplers if sampler))


class Planned(NamedTuple):
    """A setting that has not run."""

    setting: str
    flop_per_step: float
    steps: int
    runs: int
    step_seconds: Mapping[str, float]  # estimates, by device
    sampling: Mapping[str, float]  # seconds for all samples of one run
    checkpoints: int  # that are sampled from
    disk: float  # bytes of all checkpoints of one run

    def training(self, device: str) -> float:
        """Returns the seconds that all runs train."""
        return self.step_seconds[device] * self.steps * self.runs


def plan_page(scale: Scale, tasks: Sequence[Any], rows: Sequence[Planned], summary: Sequence[str]) -> str:
    """Returns the page of a scale that has not run as Markdown: sizes, summary, then steps, FLOP and time of every setting."""
    devices = list(rows[0].step_seconds)
    header = ["setting", "runs", "steps", "GFLOP per step", "TFLOP of all runs"]
    header += [f"{what}, one {device}" for device in devices for what in ("ms per step", "hours")]
    content = []
    for row in rows:
        flop = row.flop_per_step * row.steps * row.runs
        times = [
            cell for device in devices for cell in (f"{1000 * row.step_seconds[device]:.1f}", _hours(row.training(device)))
        ]
        numbers = f"{row.runs}", f"{row.steps:,}", f"{row.flop_per_step / 1e9:,.1f}", f"{flop / 1e12:,.0f}"
        content.append([experiments.SETTINGS[row.setting].label, *numbers, *times])
    total = sum(row.flop_per_step * row.steps * row.runs for row in rows) / 1e12
    sums = [cell for device in devices for cell in ("", _hours(sum(row.training(device) for row in rows)))]
    content.append(["**all**", f"{sum(row.runs for row in rows)}", "", "", f"{total:,.0f}", *sums])
    lines = [f"# The miniature paper at scale `{scale.name}`: not run yet", ""]
    lines += [*(markdown.wrapped(f"* {line}") for line in size_lines(scale, tasks)), ""]
    lines += [*summary, "", "A row is the training of all runs of a setting, without samples and the rest.", ""]
    lines += [
        *markdown.table(header, content),
        "",
        f"`bash launch/miniature.sh --scale {scale.name}` runs it and writes such a page with its results;",
        f"`python -m launch.miniature.plan --scale {scale.name} --topology h200:1` renews the plan.",
    ]
    return "\n".join(lines) + "\n"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}" if seconds < 36000 else f"{seconds / 3600:,.0f}"
