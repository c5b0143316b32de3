"""Training checkpoints of the published code: `args.json` beside `checkpoints/NNNNNNN.pt`, read and written.

A file holds `model`, `ema` (SiT state dicts with the latent batch norm), `vae`, `discriminator`, `opt`, `opt_vae`, `opt_disc`
(AdamW states), `args` (argparse.Namespace) and `steps`. Files of runs on a frozen VAE (`sit-ldm-*`), of REPA, SiT and DiT lack
some of them. The same content is kept in one .safetensors file under names such as `ema/pos_embed`, `opt/exp_avg/pos_embed`.
Reference: REPA-E `train_repae.py`, `generate.py`.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from checkpoints_tools import locate, sit, vae, weights
from checkpoints_tools.mapping import StateDict
from checkpoints_tools.torch_param_order import parameter_order, registration_order
from repae_jax import files
from repae_jax.models.autoencoder import AutoencoderKL

NETWORKS = ("model", "ema", "vae", "discriminator")
OPTIMIZERS = {"opt": "model", "opt_vae": "vae", "opt_disc": "discriminator"}  # name -> the network that it trains
POSITIONS = "pos_embed"  # an optimizer has a state of them only where they are trained
METADATA = "training_checkpoint"  # key in a .safetensors header: JSON of args, steps and the optimizers' steps
MOMENTS = ("exp_avg", "exp_avg_sq")
# The published discriminator is optimized together with a scalar before it and with LPIPS behind it, both without gradients.
_BEFORE_DISCRIMINATOR, _BEHIND_DISCRIMINATOR = 1, 31


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW's state of one network: updates so far, moments by parameter, and torch's settings ('lr', 'betas', …)."""

    steps: int
    exp_avg: StateDict
    exp_avg_sq: StateDict
    group: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainingCheckpoint:
    """Content of one file; the mappings have no entries for what it lacks."""

    source: str  # the file, for messages
    args: Mapping[str, Any]  # the command line
    steps: int | None  # training steps done; None if the file does not say
    networks: Mapping[str, StateDict]  # by names of NETWORKS
    optimizers: Mapping[str, Adam]  # by names of OPTIMIZERS

    def load_sit(self, name: str) -> sit.LoadedSiT:
        """Returns the SiT that is called `name`; numbers that `args` do not hold are the published ones of its size."""
        numbers = map(self.number, ("encoder_depth", "num_heads"))
        return sit.from_state_dict(self.networks[name], f"{self.source}: {name}", *numbers)

    def load_vae(self) -> tuple[AutoencoderKL, dict[str, Any]]:
        """Returns the VAE's module and parameters."""
        return vae.from_state_dict(self.networks["vae"], f"{self.source}: vae", self.number("norm_groups") or vae.NORM_GROUPS)

    def number(self, name: str) -> int | None:
        """Returns a number of `args` that no weight implies; None if they do not hold it."""
        value = self.args.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{self.source}: args.{name} is {value!r}; needed: a positive whole number")
        return value


def checkpoint_file(path: Path, step: int | None = None) -> Path:
    """Returns the file of a training checkpoint: itself, or one of a published run's folder, the newest by default."""
    if not path.is_dir():
        if step is not None:
            raise ValueError(f"{path} is one checkpoint: step {step} can be chosen in the folder of a run only")
        return path
    if not (by_step := locate.training_files(path)):
        raise FileNotFoundError(f"{path} has no checkpoints/NNNNNNN.pt or .safetensors; name the file itself")
    if step is not None and step not in by_step:
        raise FileNotFoundError(f"{path} has no checkpoint of step {step}; there are {', '.join(map(str, sorted(by_step)))}")
    return by_step[max(by_step) if step is None else step]


def is_training_checkpoint(content: Any) -> bool:
    """Returns True for a torch file's content with several networks, one beside its optimizer, or a SiT under 'model'."""
    if not isinstance(content, dict) or not weights.is_state_dict(content.get("model")):
        return False
    return bool({*weights.AVERAGED, "opt"} & set(content)) or _is_sit(content["model"])


def read(path: str | Path, step: int | None = None) -> TrainingCheckpoint:
    """Reads a training checkpoint; ValueError if it is none, or an optimizer state does not fit its network.

    The path or name to `resolve` is of a .pt or .safetensors file, or of a published run's folder. A SiT's weights alone count
    for both the model and its average. Where the file does not hold them, args are those of args.json.
    """
    return read_file(checkpoint_file(locate.resolve(path), step))


def read_file(path: Path) -> TrainingCheckpoint:
    """Reads a local file, see `read`."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else from_torch(weights.read_torch(path), path)


def from_torch(content: Any, path: Path) -> TrainingCheckpoint:
    """Converts the content of a PyTorch file, see `read`."""
    content = _unwrapped(content, path)
    if _is_sit(content):
        return _sit_alone(path, sit.rename_legacy(content))
    if not is_training_checkpoint(content):
        names = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no training checkpoint: expected model, ema, opt, … but it holds {names}"[:400])
    networks = {name: content[name] for name in NETWORKS if name in content}
    if unexpected := [name for name, arrays in networks.items() if not weights.is_state_dict(arrays)]:
        raise ValueError(f"{path}: {', '.join(unexpected)}: no state dict of arrays")
    optimizers = {name: network for name, network in OPTIMIZERS.items() if name in content and network in networks}
    if any(name.startswith("decoder_blocks.") for name in networks["model"]):
        networks |= {name: sit.rename_legacy(networks[name]) for name in ("model", "ema") if name in networks}
        if optimizers:
            logging.warning("%s has legacy names, of whose parameters the order is unknown: its optimizers are left out", path)
        optimizers = {}
    optimizers = {name: _adam(content[name], networks[network], f"{path}: {name}") for name, network in optimizers.items()}
    args = content.get("args") or _args_beside(path)
    if not isinstance(args, dict):
        raise ValueError(f"{path}: args is {type(args).__name__}; allowed: argparse.Namespace")
    steps = content.get("steps")
    if steps is not None and not isinstance(steps, int):
        raise ValueError(f"{path}: steps is {steps!r}; needed: a whole number")
    return TrainingCheckpoint(str(path), args, steps, networks, optimizers)


def _unwrapped(content, path):
    """The content under the names of the published code: without wrappers around networks, averages as 'ema'."""
    if weights.is_state_dict(content):
        return weights.without_wrappers(content, path)
    if not isinstance(content, dict):
        return content
    averaged = [name for name in weights.AVERAGED if name in content]
    if len(averaged) > 1:
        raise ValueError(f"{path} holds several averages, {', '.join(averaged)}: save it again with one of them, as 'ema'")
    content = {"ema" if name in averaged else name: value for name, value in content.items()}
    networks = {name: content[name] for name in NETWORKS if weights.is_state_dict(content.get(name))}
    return content | {name: weights.without_wrappers(arrays, f"{path}: {name}") for name, arrays in networks.items()}


def _is_sit(content):
    return weights.is_state_dict(content) and any(f".{name}".endswith(".x_embedder.proj.weight") for name in content)


def _sit_alone(path, arrays):
    return TrainingCheckpoint(str(path), _args_beside(path), None, {"model": arrays, "ema": arrays}, {})


def _args_beside(file):
    """Returns args.json of the published run that a file without args lies in; {} if there is none."""
    path = file.parent.parent / "args.json"
    return files.read_json(path) if file.parent.name == "checkpoints" and path.exists() else {}


def _adam(state, network, source):
    """Converts torch.optim.AdamW.state_dict() to Adam: entries are numbered in the order of the module's parameters."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(state.get("state"), dict):
        raise ValueError(f"{source} is no state of AdamW with one group of parameters, as torch's optimizers save it")
    names, (group,) = parameter_order(network), groups
    first = _BEFORE_DISCRIMINATOR if len(group["params"]) > len(names) else 0
    entries = {names[index - first]: entry for index, entry in state["state"].items() if 0 <= index - first < len(names)}
    problems = [f"{name}: no state" for name in names if name not in entries and name != POSITIONS]
    unexpected = [str(index) for index in state["state"] if not 0 <= index - first < len(names)]
    problems += [f"parameters {', '.join(unexpected)}: not of this network"] if unexpected else []
    for name, entry in entries.items():
        for kind in MOMENTS:
            shape = np.shape(entry.get(kind))
            if kind not in entry or shape != network[name].shape:
                problems.append(f"{name}: {kind} has shape {shape}, the parameter {network[name].shape}")
            elif not np.isfinite(entry[kind]).all():
                problems.append(f"{name}: {kind} is not finite")
    steps = {int(entry.get("step", -1)) for entry in entries.values()}
    if len(steps) > 1 or -1 in steps:
        problems.append(f"parameters were updated {sorted(steps)} times; one number is needed")
    if problems or not entries:
        raise ValueError(f"{source} does not fit its network: {len(problems)} problems\n  " + "\n  ".join(problems))
    moments = ({name: entry[kind] for name, entry in entries.items()} for kind in MOMENTS)
    return Adam(steps.pop(), *moments, {name: value for name, value in group.items() if name != "params"})


def _read_safetensors(path):
    metadata, flat = weights.read_metadata(path), weights.read_file(path)
    if _is_sit(flat):
        return _sit_alone(path, flat)
    if METADATA not in metadata:
        raise ValueError(f"{path} is no training checkpoint: its header has no {METADATA!r}, only {sorted(metadata)}")
    try:
        about = json.loads(metadata[METADATA])
        args, steps, groups, updates = (about[name] for name in ("args", "steps", "optimizer_groups", "optimizer_steps"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the header's {METADATA!r} is damaged ({error!r}); convert the original again") from error
    parts = traverse_util.unflatten_dict(flat, sep="/")
    optimizers = {}
    for name in [name for name in OPTIMIZERS if name in parts]:
        moments = {kind: {} for kind in MOMENTS} | parts.pop(name)
        optimizers[name] = Adam(updates[name], **moments, group=groups[name])
    networks = {name: parts.pop(name) for name in NETWORKS if name in parts}
    if parts or "model" not in networks:
        raise ValueError(f"{path} holds {', '.join([*networks, *parts])}; needed: model; allowed: {', '.join(NETWORKS)}")
    return TrainingCheckpoint(str(path), args, steps, networks, optimizers)


def writer(path: str | Path, checkpoint: TrainingCheckpoint) -> Callable[[Path], None]:
    """Returns a function for `files.write_all` that writes a training checkpoint, as .pt or as .safetensors."""
    networks, optimizers = checkpoint.networks, checkpoint.optimizers
    if str(path).endswith(".safetensors"):
        moments = {part: {kind: getattr(adam, kind) for kind in MOMENTS} for part, adam in optimizers.items()}
        flat = traverse_util.flatten_dict({**networks, **moments}, sep="/")
        about = {
            "args": dict(checkpoint.args), "steps": checkpoint.steps,
            "optimizer_steps": {part: adam.steps for part, adam in optimizers.items()},
            "optimizer_groups": {part: dict(adam.group) for part, adam in optimizers.items()},
        }
        # one value: safetensors writes several in any order, and the same content should give the same file
        return weights.safetensors_writer(flat, path, {METADATA: json.dumps(about)})
    if str(path).endswith(".pt"):
        content = {part: {name: arrays[name] for name in registration_order(arrays)} for part, arrays in networks.items()}
        content |= {part: _torch_adam(part, adam, networks[OPTIMIZERS[part]]) for part, adam in optimizers.items()}
        return weights.torch_writer({**content, "args": argparse.Namespace(**checkpoint.args), "steps": checkpoint.steps}, path)
    raise ValueError(f"{path}: a training checkpoint ends in .pt or .safetensors")


def _torch_adam(part, adam, network):
    """The argument of torch.optim.AdamW.load_state_dict."""
    names = parameter_order(network)
    before, behind = (_BEFORE_DISCRIMINATOR, _BEHIND_DISCRIMINATOR) if part == "opt_disc" else (0, 0)
    group = {
        "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": True, **adam.group, "params": list(range(before + len(names) + behind)),
    }
    group["betas"] = tuple(group["betas"])
    state = {
        index: {"step": np.asarray(adam.steps, np.float32)} | {kind: getattr(adam, kind)[name] for kind in MOMENTS}
        for index, name in enumerate(names, start=before)
        if name in adam.exp_avg
    }
    return {"state": state, "param_groups": [group]}
