"""Training checkpoints of the published code: `args.json` beside `checkpoints/NNNNNNN.pt` <-> trees of our networks.

A file holds `model`, `ema` (SiT state dicts with the latent batch norm), `vae`, `discriminator`, `opt`, `opt_vae`, `opt_disc`
(AdamW states), `args` (argparse.Namespace) and `steps`. Files of runs on a frozen VAE (`sit-ldm-*`), of REPA, SiT and DiT lack
some of them. The same content is kept in one .safetensors file under names such as `ema/pos_embed`, `opt/exp_avg/pos_embed`.
Reference: REPA-E `train_repae.py`, `generate.py`.
"""

import argparse
import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from checkpoints_tools import locate, weights
from checkpoints_tools.sit import rename_legacy
from checkpoints_tools.torch_param_order import parameter_order, registration_order
from repae_jax import files

NETWORKS = ("model", "ema", "vae", "discriminator")
OPTIMIZERS = {"opt": "model", "opt_vae": "vae", "opt_disc": "discriminator"}  # which network each one trains
POSITIONS = "pos_embed"  # of which an optimizer has a state only where they are trained
METADATA = "training_checkpoint"  # of a .safetensors file: JSON of args, steps and the optimizers' steps
# The published discriminator is optimised together with a scalar before it and with LPIPS behind it, both without gradients.
_BEFORE_DISCRIMINATOR, _BEHIND_DISCRIMINATOR = 1, 31

# Argument of the published scripts -> field of our config, where its job has it: what a run must share with the checkpoint it
# continues; what it had better share; what does not matter. The path_type of a DiT's run is 'ddpm', which they do not know.
MEANING = {
    "num_classes": "data.num_classes",
    "resolution": "data.image_size",
    "encoder_depth": "sit.encoder_depth",
    "qk_norm": "sit.qk_norm",
    "projection_layer_type": "sit.projector",  # iREPA's
    "path_type": "diffusion.path",
}
RECIPE = {
    "batch_size": "data.batch_size",
    "cfg_prob": "diffusion.label_dropout",
    "bn_momentum": "diffusion.norm_momentum",
    "weighting": "diffusion.time_distribution",
    "proj_coeff": "loss.sit.align",
    "vae_align_proj_coeff": "loss.vae.align",
    "learning_rate": "optim.sit.learning_rate",
    "vae_learning_rate": "optim.vae.learning_rate",
    "disc_learning_rate": "optim.disc.learning_rate",
    "adam_beta1": "optim.sit.b1",
    "adam_beta2": "optim.sit.b2",
    "adam_weight_decay": "optim.sit.weight_decay",
    "adam_epsilon": "optim.sit.eps",
    "max_grad_norm": "optim.sit.clip_norm",
    "gradient_accumulation_steps": "accumulation",
    "seed": "seed",
}
OPERATION = {
    "max_train_steps": "steps",
    "checkpointing_steps": "checkpoint.every",
    "sampling_steps": "hooks.samples_every",
    "num_workers": "data.workers",
}
# what the published scripts ask for besides, and what they do whatever our config says
_FIXED = {
    "fused_attn": True, "compile": True, "allow_tf32": True, "mixed_precision": "bf16", "report_to": "wandb",
    "output_dir": "exps", "logging_dir": "logs", "data_dir": "data", "epochs": 1400, "resume_step": 0,
    "continue_train_exp_dir": None, "wandb_history_path": None,
}  # fmt: skip
_TRAINED_VAE = {"vae_ckpt": None, "disc_pretrained_ckpt": None, "loss_cfg_path": "configs/l1_lpips_kl_gan.yaml"}
ENCODER_TYPES = {  # our architecture -> the published `enc_type`
    "dinov2-small": "dinov2-vit-s", "dinov2-base": "dinov2-vit-b", "dinov2-large": "dinov2-vit-l",
    "dinov2-giant": "dinov2-vit-g",
    "dinov2-small-with-registers": "dinov2reg-vit-s", "dinov2-base-with-registers": "dinov2reg-vit-b",
    "dinov2-large-with-registers": "dinov2reg-vit-l", "dinov2-giant-with-registers": "dinov2reg-vit-g",
    "dino-vitb16": "dinov1-vit-b", "clip-vit-large-patch14": "clip-vit-L", "ijepa_vith14_1k": "jepa-vit-h",
    "vit-mae-large": "mae-vit-l", "mocov3-small": "mocov3-vit-s", "mocov3-base": "mocov3-vit-b", "mocov3-large": "mocov3-vit-l",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW's state of one network.

    Attributes:
      steps: updates so far.
      exp_avg: parameter name -> first moment.
      exp_avg_sq: parameter name -> second moment.
      group: torch's 'lr', 'betas', 'eps', 'weight_decay' and other settings.
    """

    steps: int
    exp_avg: Mapping[str, np.ndarray]
    exp_avg_sq: Mapping[str, np.ndarray]
    group: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainingCheckpoint:
    """Content of one file; what a file lacks is left out of the mappings.

    Attributes:
      source: the file, for messages.
      args: the command line.
      steps: training steps taken; None if the file does not say.
      networks: name of NETWORKS -> state dict.
      optimizers: name of OPTIMIZERS -> Adam.
    """

    source: str
    args: Mapping[str, Any]
    steps: int | None
    networks: Mapping[str, Mapping[str, np.ndarray]]
    optimizers: Mapping[str, Adam]

    @property
    def encoder_depth(self):
        """Blocks before the alignment tap; None if `args` do not say."""
        return self._number("encoder_depth", None)

    @property
    def num_heads(self):
        """Attention heads of the SiT; None if `args` do not say: the published number of its size."""
        return self._number("num_heads", None)

    @property
    def norm_groups(self):
        """Group-norm groups of the VAE; 32 in the published code."""
        return self._number("norm_groups", 32)

    def _number(self, name, default):
        value = self.args.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.source}: args.{name} is {value!r}; needed: a positive whole number")
        return value


def find(path, step=None):
    """File of a training checkpoint: itself, or one of a published run's folder (`args.json`, `checkpoints/`).

    Args:
      path: file or folder.
      step: of the checkpoint in a folder; the newest by default.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if a step is asked of a file.
    """
    path = locate.resolve(path)
    if not path.is_dir():
        if step is not None:
            raise ValueError(f"{path} is one checkpoint: step {step} can be chosen in the folder of a run only")
        return path
    files = locate.training_files(path)
    if not files:
        raise FileNotFoundError(f"{path} has no checkpoints/NNNNNNN.pt or .safetensors; name the file itself")
    if step is not None and step not in files:
        raise FileNotFoundError(f"{path} has no checkpoint of step {step}; there are {', '.join(map(str, sorted(files)))}")
    return files[max(files) if step is None else step]


def is_training_checkpoint(content):
    """Whether what `weights.read_torch` returned is one: several networks, one beside its optimizer, or a SiT under 'model'."""
    if not isinstance(content, dict) or not weights.is_state_dict(content.get("model")):
        return False
    return bool({*weights.AVERAGED, "opt"} & set(content)) or _is_sit(content["model"])


def read(path, step=None):
    """Reads a training checkpoint.

    Args:
      path: .pt or .safetensors file, or the folder of a published run. A SiT's weights alone are taken for both the model and
        its average. Where the file does not hold them, args are those of args.json.
      step: of the checkpoint in a folder; the newest by default.

    Returns:
      TrainingCheckpoint.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is no training checkpoint, or an optimizer state does not fit its network.
    """
    path = find(path, step)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return from_torch(weights.read_torch(path), path)


def from_torch(content, path):
    """`read` of what `weights.read_torch` returned; `path` is the file it is from."""
    content = _bare(content, path)
    if _is_sit(content):
        content = rename_legacy(content)
        return TrainingCheckpoint(str(path), _args_beside(path), None, {"model": content, "ema": content}, {})
    if not is_training_checkpoint(content):
        names = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no training checkpoint: expected model, ema, opt, … but it holds {names}"[:400])
    networks = {name: content[name] for name in NETWORKS if name in content}
    if strangers := [name for name, arrays in networks.items() if not weights.is_state_dict(arrays)]:
        raise ValueError(f"{path}: {', '.join(strangers)}: no state dict of arrays")
    optimizers = {name: trained for name, trained in OPTIMIZERS.items() if name in content and trained in networks}
    if any(name.startswith("decoder_blocks.") for name in networks["model"]):
        networks |= {name: rename_legacy(networks[name]) for name in ("model", "ema") if name in networks}
        if optimizers:
            logging.warning("%s has legacy names, of whose parameters the order is unknown: its optimizers are left out", path)
        optimizers = {}
    optimizers = {name: _adam(content[name], networks[trained], f"{path}: {name}") for name, trained in optimizers.items()}
    args = content.get("args") or _args_beside(path)
    if not isinstance(args, dict):
        raise ValueError(f"{path}: args is {type(args).__name__}; allowed: argparse.Namespace")
    steps = content.get("steps")
    if steps is not None and not isinstance(steps, int):
        raise ValueError(f"{path}: steps is {steps!r}; needed: a whole number")
    return TrainingCheckpoint(str(path), args, steps, networks, optimizers)


def _bare(content, path):
    """Returns what a file holds under the names of the published code: without what wraps networks, averages as 'ema'."""
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


def _args_beside(file):
    """args.json of the published run that a file without args lies in; {} if there is none."""
    path = file.parent.parent / "args.json"
    return files.read_json(path) if file.parent.name == "checkpoints" and path.exists() else {}


def _adam(state, network, where):
    """torch.optim.AdamW.state_dict() -> Adam: entries are numbered in the order of the module's parameters."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(state.get("state"), dict):
        raise ValueError(f"{where} is no state of AdamW with one group of parameters, as torch's optimizers save it")
    names, (group,) = parameter_order(network), groups
    first = _BEFORE_DISCRIMINATOR if len(group["params"]) > len(names) else 0
    entries = {names[index - first]: entry for index, entry in state["state"].items() if 0 <= index - first < len(names)}
    problems = [f"{name}: no state" for name in names if name not in entries and name != POSITIONS]
    strangers = [str(index) for index in state["state"] if not 0 <= index - first < len(names)]
    problems += [f"parameters {', '.join(strangers)}: not of this network"] if strangers else []
    for name, entry in entries.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            shape = np.shape(entry.get(kind))
            if kind not in entry or shape != network[name].shape:
                problems.append(f"{name}: {kind} has shape {shape}, the parameter {network[name].shape}")
            elif not np.isfinite(entry[kind]).all():
                problems.append(f"{name}: {kind} is not finite")
    steps = {int(entry.get("step", -1)) for entry in entries.values()}
    if len(steps) > 1 or -1 in steps:
        problems.append(f"parameters were updated {sorted(steps)} times; one number is needed")
    if problems or not entries:
        raise ValueError(f"{where} does not fit its network: {len(problems)} problems\n  " + "\n  ".join(problems))
    moments = ({name: entry[kind] for name, entry in entries.items()} for kind in ("exp_avg", "exp_avg_sq"))
    return Adam(steps.pop(), *moments, {name: value for name, value in group.items() if name != "params"})


def _read_safetensors(path):
    metadata, flat = weights.read_metadata(path), weights.read_state_dict(path)
    if _is_sit(flat):
        return TrainingCheckpoint(str(path), _args_beside(path), None, {"model": flat, "ema": flat}, {})
    if METADATA not in metadata:
        raise ValueError(f"{path} is no training checkpoint: its header has no {METADATA!r}, only {sorted(metadata)}")
    try:
        about = json.loads(metadata[METADATA])
        args, steps, groups, updates = (about[name] for name in ("args", "steps", "optimizer_groups", "optimizer_steps"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the header's {METADATA!r} is damaged ({error!r}); convert the original again") from error
    parts = {}
    for name, array in flat.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = array
    optimizers = {}
    for name in OPTIMIZERS:
        if name in parts:
            moments = {kind: {} for kind in ("exp_avg", "exp_avg_sq")}
            for rest, array in parts.pop(name).items():
                kind, _, parameter = rest.partition("/")
                moments[kind][parameter] = array
            optimizers[name] = Adam(updates[name], **moments, group=groups[name])
    networks = {name: parts.pop(name) for name in NETWORKS if name in parts}
    if parts or "model" not in networks:
        raise ValueError(f"{path} holds {', '.join([*networks, *parts])}; needed: model; allowed: {', '.join(NETWORKS)}")
    return TrainingCheckpoint(str(path), args, steps, networks, optimizers)


def write(path, checkpoint, *, overwrite=False):
    """Writes a training checkpoint; the ending says how.

    Args:
      path: as `writer`.
      checkpoint: TrainingCheckpoint.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
      ValueError: as `writer`.
    """
    files.write_all({path: writer(path, checkpoint)}, overwrite=overwrite)


def writer(path, checkpoint):
    """Function for `files.write_all` that writes a training checkpoint.

    Args:
      path: its ending says how: .pt, as the published code saves it, or .safetensors.
      checkpoint: TrainingCheckpoint.

    Raises:
      ValueError: for another ending, or content that such a file cannot keep.
    """
    if str(path).endswith(".safetensors"):
        flat = {f"{part}/{name}": array for part, arrays in checkpoint.networks.items() for name, array in arrays.items()}
        for part, adam in checkpoint.optimizers.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                flat |= {f"{part}/{kind}/{name}": array for name, array in getattr(adam, kind).items()}
        steps = {part: adam.steps for part, adam in checkpoint.optimizers.items()}
        groups = {part: dict(adam.group) for part, adam in checkpoint.optimizers.items()}
        about = {
            "args": dict(checkpoint.args), "steps": checkpoint.steps, "optimizer_steps": steps, "optimizer_groups": groups,
        }  # fmt: skip
        # one value: safetensors writes several in any order, and the same content should give the same file
        return weights.safetensors_writer(flat, path, {METADATA: json.dumps(about)})
    if str(path).endswith(".pt"):
        content = {
            part: {name: arrays[name] for name in registration_order(arrays)} for part, arrays in checkpoint.networks.items()
        }
        for part, adam in checkpoint.optimizers.items():
            content[part] = _torch_adam(part, adam, checkpoint)
        content |= {"args": argparse.Namespace(**checkpoint.args), "steps": checkpoint.steps}
        return weights.torch_writer(content, path)
    raise ValueError(f"{path}: a training checkpoint ends in .pt or .safetensors")


def _torch_adam(part, adam, checkpoint):
    """What torch.optim.AdamW.load_state_dict takes."""
    names = parameter_order(checkpoint.networks[OPTIMIZERS[part]])
    before, behind = (_BEFORE_DISCRIMINATOR, _BEHIND_DISCRIMINATOR) if part == "opt_disc" else (0, 0)
    group = {
        "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": True, **adam.group, "params": list(range(before + len(names) + behind)),
    }  # fmt: skip
    group["betas"] = tuple(group["betas"])
    state = {
        before + index: {
            "step": np.asarray(adam.steps, np.float32),
            "exp_avg": adam.exp_avg[name],
            "exp_avg_sq": adam.exp_avg_sq[name],
        }
        for index, name in enumerate(names)
        if name in adam.exp_avg
    }
    return {"state": state, "param_groups": [group]}


def _values(table, config):
    """Argument -> value of its field, without the fields that this config's job lacks."""
    values = {}
    for argument, field in table.items():
        try:
            values[argument] = functools.reduce(operator.getitem, field.split("."), config)
        except KeyError:
            continue
    return values


def args_from_config(config, model, vae, encoder_type, num_heads, norm_groups):
    """The published command line that says what a config says.

    Args:
      config: nested dict of a run that trains a SiT or DiT.
      model: published name of the SiT, such as 'SiT-XL/2'.
      vae: published name of the VAE, 'f8d4' or 'f16d32'.
      encoder_type: published name of the encoders, such as 'dinov2-vit-b'.
      num_heads: attention heads of the SiT, which no weight tells.
      norm_groups: group-norm groups of the VAE, likewise.

    Returns:
      dict of JSON values.
    """
    frozen_vae = config["init"]["vae"]
    of_vae = {"vae_ckpt": frozen_vae, "vae_latents_name": Path(frozen_vae).stem} if config["job"] == "ldm" else _TRAINED_VAE
    return {
        "bn_momentum": 0.1,  # the published sampling asks for it, also where the statistics were fixed
        **_FIXED, **of_vae, **_values(MEANING | RECIPE | OPERATION, config), "exp_name": "repae_jax",
        "prediction": "eps" if config["diffusion"]["path"] == "ddpm" else "v",
        "model": model, "vae": vae, "enc_type": encoder_type, "num_heads": num_heads, "norm_groups": norm_groups,
    }  # fmt: skip


def check_args(args, config, source):
    """Compares a published command line with the config of the run that continues it.

    Args:
      args: TrainingCheckpoint.args.
      config: nested dict.
      source: the file's name, for the error.

    Returns:
      list of str, differences that change the recipe only.

    Raises:
      ValueError: if a field that gives the weights their meaning differs.
    """

    def differing(table):
        return [
            f"config.{table[argument]}={value!r}, but {argument}={args[argument]!r}"
            for argument, value in _values(table, config).items()
            if argument in args and args[argument] != value
        ]

    if different := differing(MEANING):
        raise ValueError(f"{source} was trained otherwise: {'; '.join(different)}. Change the config")
    return differing(RECIPE)
