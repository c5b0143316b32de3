"""README.md of an exported model, as the Hugging Face hub shows it: made from the run's config, step and evaluations."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from huggingface_hub import EvalResult, ModelCardData

from checkpoints_tools import sit, vae_layouts, vae_stats
from checkpoints_tools.pipeline_folder import Trained
from repae_jax import files

PICTURE = "samples.png"
_TASK = "unconditional-image-generation"  # the hub's name, of classes too
_JOBS = {
    "repae": "trained together, end to end ([REPA-E](https://arxiv.org/abs/2504.10483))",
    "ldm": "of which the VAE was trained before, and kept",
}
_DATASETS = {"imagenet": "imagenet-1k", "imagenet_tar": "imagenet-1k"}  # sources of data -> names on the hub
_TAGS = ("repa-e", "sit", "jax", "flax")
_FOLDERS = re.compile(r"(?<![\w./:~-])(?:(?:gs|s3|file)://|~?/)(?:[^\s/,;:'\"()]+/)+")  # of a path within a text
# rows of the table of settings: title, dotted name in the config
_SETTINGS = {
    "Steps": "steps", "Images a step": "data.batch_size", "Average of the weights, decay": "ema_decay",
    "Learning rate of the transformer": "optim.sit.learning_rate", "Learning rate of the VAE": "optim.vae.learning_rate",
    "Weight of the alignment, transformer": "loss.sit.align", "Weight of the alignment, VAE": "loss.vae.align",
    "Path": "diffusion.path", "Label dropout": "diffusion.label_dropout", "Compute precision": "precision.compute",
}  # fmt: skip
_CODE = """\
```python
# diffusers, 0.36 or newer; its own classes lack this model's time embedding and positions, so the folder brings two short files
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({name}, trust_remote_code=True)
images = pipeline(class_labels={labels}, num_inference_steps=50, guidance_scale={scale}).images

# PyTorch: the networks alone; normalized latents are (latents - mean) / std with {stats} of the VAE's config
vae, transformer = pipeline.vae, pipeline.transformer

# JAX
import repae_jax
model = repae_jax.load({name})
images = model.sample({labels}, seed=0, steps=50, guidance_scale={scale})
latents = model.encode(images)
```"""
_MEANING = (
    "Labels are 0 to {last}; {classes} stands for no class. Time 0 is data and 1 is noise. In diffusers the sampler is "
    "{sampler}; with the same noise, its images are those of `model.sample` with `sampler='{ours}'`."
)


def without_folders(config: Any) -> Any:
    """Returns a config with absolute paths cut to their last part, as others need not know the folders of a machine."""
    if isinstance(config, Mapping):
        return {name: without_folders(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [without_folders(value) for value in config]
    if not isinstance(config, str):
        return config
    is_path = config.startswith(("/", "~")) or "://" in config
    return Path(config).name if is_path and not re.search(r"[\s,;=]", config) else _FOLDERS.sub("", config)


def read_evaluations(workdir: Any, step: int | None, ema_decay: float | str) -> list[dict[str, Any]]:
    """Returns the evaluations that a run's folder holds of one of its steps, and of an average, if they are of one."""
    folder = epath.Path(workdir) / "evaluations"
    found = [files.read_json(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    of_step = [{"kind": "generation", **result} for result in found if result.get("step") == step and result.get("metrics")]
    return [result for result in of_step if result.get("protocol", {}).get("ema_decay", ema_decay) == ema_decay]


def picture_of(workdir: Any, step: int | None) -> epath.Path | None:
    """Returns the picture of samples that training made at a step, if there is one."""
    path = epath.Path(workdir) / "samples" / f"{step:07d}.png"
    return path if path.is_file() else None


def write(
    trained: Trained, name: str, evaluations: Sequence[Mapping[str, Any]] = (), license: str | None = None,
    picture: bool = False,
) -> str:  # fmt: skip
    """Returns the text of a model card.

    Args:
      name: of the model, as it is loaded: its folder, or the hub's ORGANIZATION/NAME.
      evaluations: results of `read_evaluations`.
      license: of the weights, as the hub calls it, such as 'mit'.
      picture: whether PICTURE is beside the card.
    """
    config = trained.config or {}
    is_dit = trained.path == "ddpm"
    scale = trained.sampling["guidance_scale"] if trained.sampling["guidance_scale"] > 1 else 1.5
    has_vectors = "latents_std" in vae_stats.to_config(trained.vae.latent_stats, trained.sit.latent_channels)
    labels = [0, 1][: trained.sit.num_classes]
    stats = "latents_mean and latents_std" if has_vectors else "scaling_factor"
    code = _CODE.format(name=json.dumps(name, ensure_ascii=False), labels=labels, scale=scale, stats=stats)
    meaning = _MEANING.format(
        last=trained.sit.num_classes - 1, classes=trained.sit.num_classes, ours="ancestral" if is_dit else "euler",
        sampler="DDPM's with learned variances" if is_dit else "Euler's method",
    )
    title = " ".join(name.rpartition("/")[2].split())
    parts = [
        _metadata(title, trained, evaluations, license), f"# {title}", _about(trained),
        f"![Samples]({PICTURE})" if picture else "", "## Use", code, meaning,
        "## Metrics", _metrics(evaluations), "## Training", _training(config),
        "## License", license or "None is stated: ask whoever trained this model before you use it.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(title, trained, evaluations, license):
    """The block at the top, which the hub reads."""
    tags = [*_TAGS, *["class-conditional"] * (trained.sit.num_classes > 1)]
    source = _lookup(trained.config or {}, "data.source")
    dataset = _DATASETS.get(source, source or "unknown")
    results = [
        EvalResult(_TASK, dataset, dataset, metric, value, metric_args=without_folders(evaluation.get("protocol") or {}))
        for evaluation in evaluations if evaluation["kind"] == "generation"
        for metric, value in evaluation["metrics"].items() if _is_number(value)
    ]  # fmt: skip
    data = ModelCardData(
        license=license, library_name="diffusers", pipeline_tag=_TASK, tags=tags,
        datasets=[_DATASETS[source]] if source in _DATASETS else None, model_name=title if results else None,
        eval_results=results or None,
    )  # fmt: skip
    return f"---\n{data.to_yaml().strip()}\n---"


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lookup(config, name):
    """The value of a dotted name, None if there is none."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _about(trained):
    module, autoencoder = trained.sit, trained.vae.module
    kind = "DiT" if trained.path == "ddpm" else "SiT"
    size = f"{kind} of {module.depth} blocks, width {module.hidden_size}, patches of {module.patch_size}"
    size = (sit.model_name(module) or size).replace("SiT", kind)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(trained.params)) / 1e6
    pixels = trained.grid * module.patch_size * autoencoder.factor
    shape = vae_layouts.published_name(autoencoder) or f"f{autoencoder.factor}d{autoencoder.latent_channels}"
    config = trained.config or {}
    lines = [
        f"A {size} ({count:.1f} M parameters) and its VAE ({shape}), for images of {pixels} x {pixels} pixels of "
        f"{module.num_classes} classes, {_JOBS.get(config.get('job'), 'from a published checkpoint')}."
    ]
    if source := _lookup(config, "data.source"):
        options = {name: value for name, value in _lookup(config, "data.options").items() if value}
        lines.append(f"Data: {source}{' (' + ', '.join(f'{k}={v}' for k, v in options.items()) + ')' if options else ''}.")
    encoders = [entry.get("weights") or name for name, entry in (config.get("encoders") or {}).items()]
    if encoders:
        lines.append(f"Aligned with: {', '.join(map(str, encoders))}.")
    if trained.step is not None:
        lines.append(f"Training steps: {trained.step:,}.")
    return "\n".join([*lines, "Exported by repae_jax."])


def _metrics(evaluations):
    if not evaluations:
        return "None have been measured."
    rows = ["| metric | value | protocol |", "|---|---|---|"]
    for evaluation in evaluations:
        settings = {name: value for name, value in (evaluation.get("protocol") or {}).items() if value is not None}
        protocol = ", ".join(f"{name}: {_plain(value)}" for name, value in settings.items())
        for number, (metric, value) in enumerate(evaluation["metrics"].items()):
            shown = f"{value:.4g}" if _is_number(value) else _plain(value)
            rows.append(f"| {metric} ({evaluation['kind']}) | {shown} | {protocol if not number else 'the same'} |")
    warnings = [f"* {_plain(warning)}" for evaluation in evaluations for warning in evaluation.get("warnings") or ()]
    return "\n".join(rows + (["", *warnings] if warnings else []))


def _plain(value):
    """A value in a cell of a table."""
    text = value if isinstance(value, str) else json.dumps(without_folders(value), default=str)
    return without_folders(text).replace("|", "/").replace("\n", " ")


def _training(config):
    if not config:
        return "See the published checkpoint that this was made from."
    rows = [f"| {title} | {value} |" for title, name in _SETTINGS.items() if (value := _lookup(config, name)) is not None]
    whole = json.dumps(config, indent=1, default=str)
    details = f"<details><summary>The whole config</summary>\n\n```json\n{whole}\n```\n\n</details>"
    return "\n".join(["| | |", "|---|---|", *rows, "", details])
