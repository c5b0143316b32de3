"""Command line of the published scripts, kept beside their checkpoints <-> our config."""

import contextlib
import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Argument of the published scripts -> field of our config, where its job has it. A run must share MEANING with the checkpoint
# that it continues, is warned about RECIPE, and may differ in OPERATION. The path_type of a DiT's run is 'ddpm', which they
# do not know.
MEANING = {
    "num_classes": "data.num_classes", "resolution": "data.image_size",
    "encoder_depth": "sit.encoder_depth", "qk_norm": "sit.qk_norm",
    "projection_layer_type": "sit.projector",  # iREPA's
    "path_type": "diffusion.path",
}
RECIPE = {
    "batch_size": "data.batch_size", "cfg_prob": "diffusion.label_dropout",
    "bn_momentum": "diffusion.norm_momentum", "weighting": "diffusion.time_distribution",
    "proj_coeff": "loss.sit.align", "vae_align_proj_coeff": "loss.vae.align",
    "learning_rate": "optim.sit.learning_rate", "vae_learning_rate": "optim.vae.learning_rate",
    "disc_learning_rate": "optim.disc.learning_rate",
    "adam_beta1": "optim.sit.b1", "adam_beta2": "optim.sit.b2",
    "adam_weight_decay": "optim.sit.weight_decay", "adam_epsilon": "optim.sit.eps",
    "max_grad_norm": "optim.sit.clip_norm", "gradient_accumulation_steps": "accumulation", "seed": "seed",
}
OPERATION = {
    "max_train_steps": "steps", "checkpointing_steps": "checkpoint.every",
    "sampling_steps": "hooks.samples_every", "num_workers": "data.workers",
}
# further arguments that the published scripts need, and what they do whatever our config says
_FIXED = {
    "fused_attn": True, "compile": True, "allow_tf32": True, "mixed_precision": "bf16", "report_to": "wandb",
    "output_dir": "exps", "logging_dir": "logs", "data_dir": "data", "epochs": 1400, "resume_step": 0,
    "continue_train_exp_dir": None, "wandb_history_path": None,
}
_TRAINED_VAE = {"vae_ckpt": None, "disc_pretrained_ckpt": None, "loss_cfg_path": "configs/l1_lpips_kl_gan.yaml"}
_DINOV2_SIZES = ("small", "base", "large", "giant")
ENCODER_TYPES = {  # our architecture -> the published `enc_type`
    **{f"dinov2-{size}": f"dinov2-vit-{size[0]}" for size in _DINOV2_SIZES},
    **{f"dinov2-{size}-with-registers": f"dinov2reg-vit-{size[0]}" for size in _DINOV2_SIZES},
    "dino-vitb16": "dinov1-vit-b", "clip-vit-large-patch14": "clip-vit-L", "ijepa_vith14_1k": "jepa-vit-h",
    "vit-mae-large": "mae-vit-l", "mocov3-small": "mocov3-vit-s", "mocov3-base": "mocov3-vit-b", "mocov3-large": "mocov3-vit-l",
}


def _values(table, config):
    """Argument -> value of its field, without the fields that this config's job lacks."""
    values = {}
    for argument, field in table.items():
        with contextlib.suppress(KeyError):
            values[argument] = functools.reduce(operator.getitem, field.split("."), config)
    return values


def check_prediction(config: Mapping[str, Any], source: str) -> None:
    """Raises ValueError, naming the source, if the network of a config predicts what others take for something else."""
    if config["diffusion"].get("predicts", "velocity") != "velocity":
        given = f"config.diffusion.predicts={config['diffusion']['predicts']!r}"
        raise ValueError(f"{source}: {given}, but the published code and our pipelines take the output for a velocity")


def args_from_config(
    config: Mapping[str, Any], model: str, vae: str, encoder_type: str, num_heads: int, norm_groups: int
) -> dict[str, Any]:
    """Returns the published command line that expresses the config of a run that trains a SiT or DiT, as JSON values.

    Names are the published ones, such as 'SiT-XL/2', 'f8d4' and 'dinov2-vit-b'; numbers are those that no weight implies.
    """
    frozen_vae = config["init"]["vae"] if config["job"] == "ldm" else None
    vae_args = {"vae_ckpt": frozen_vae, "vae_latents_name": Path(frozen_vae).stem} if frozen_vae else _TRAINED_VAE
    return {
        "bn_momentum": 0.1,  # the published sampling asks for it, also where the statistics were fixed
        **_FIXED, **vae_args, **_values(MEANING | RECIPE | OPERATION, config), "exp_name": "repae_jax",
        "prediction": "eps" if config["diffusion"]["path"] == "ddpm" else "v",
        "model": model, "vae": vae, "enc_type": encoder_type, "num_heads": num_heads, "norm_groups": norm_groups,
    }


def check_args(args: Mapping[str, Any], config: Mapping[str, Any], source: str) -> list[str]:
    """Returns, in words, where a config changes the recipe of the published command line that its run continues.

    Raises ValueError, naming the source, if a field that gives the weights their meaning differs.
    """

    def differing(table):
        return [
            f"config.{table[argument]}={value!r}, but {argument}={args[argument]!r}"
            for argument, value in _values(table, config).items()
            if argument in args and args[argument] != value
        ]

    check_prediction(config, source)
    if different := differing(MEANING):
        raise ValueError(f"{source} was trained otherwise: {'; '.join(different)}. Change the config")
    return differing(RECIPE)


def same_recipe(args: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compares two published command lines, their length and how often they save aside."""
    return {**args, **dict.fromkeys(OPERATION)} == {**other, **dict.fromkeys(OPERATION)}
