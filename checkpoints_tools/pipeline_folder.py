"""Folders of diffusers' pipelines that hold a SiT or a DiT of ours with its VAE: written for diffusers, read again here.

The classes are in files of the folder itself, copies of those in `shipped/`: diffusers' own DiTTransformer2DModel has other
frequencies of the time embedding than the published networks, and no trained positions; its DiTPipeline knows 1000 classes
and a scaling factor alone. `repae_jax.json` holds what diffusers does not need: the run's config, its step and its alignment.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools import dit_names, mapping, sit, vae, weights
from checkpoints_tools.mapping import Tree
from repae_jax import files
from repae_jax.models.sit import SiT

SHIPPED = Path(__file__).with_name("shipped")
RECORD = "repae_jax.json"
_CLASSES = {"pipeline": "SiTPipeline", "sit_transformer": "SiTTransformer2DModel"}  # of the shipped files
_VERSION = "0.36.0"  # the oldest diffusers that reads the folder
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULERS = {
    False: {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    True: {
        "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
        "beta_schedule": "linear", "variance_type": "learned_range", "clip_sample": False, "prediction_type": "epsilon",
        "timestep_spacing": "linspace",
    },
}  # fmt: skip
# arguments of a call of the pipeline -> fields of `repae_jax.diffusion.samplers.Sampling`
_CALL = {"num_inference_steps": "steps"} | {
    name: name for name in ("guidance_scale", "guidance_low", "guidance_high", "guidance_channels")
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A diffusion transformer and its VAE."""

    sit: SiT
    params: Tree  # averaged, of `sit`
    grid: int  # tokens per side
    vae: vae.LoadedVAE  # with the statistics of its latents
    path: str  # 'linear', 'cosine', or 'ddpm', a DiT's
    sampling: Mapping[str, Any]  # fields of `repae_jax.diffusion.samplers.Sampling`, the defaults
    step: int | None  # training steps taken, None if unknown
    config: Mapping[str, Any] | None  # the run's; None if it is not one of ours


def save(folder: Path, trained: Trained) -> list[Path]:
    """Writes a folder that `diffusers.DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` loads; returns its files.

    Projectors are left out. The folder is new; `model_index.json`, without which it is no pipeline, is written last.
    """
    transformer = {folder / "transformer" / name: content for name, content in _transformer(trained).items()}
    scheduler = {**_SCHEDULERS[trained.path == "ddpm"], "_diffusers_version": _VERSION}
    if "shift" in scheduler:
        scheduler["shift"] = trained.sampling.get("time_shift", 1.0)
    record = {
        "step": trained.step, "path": trained.path, "encoder_depth": trained.sit.encoder_depth,
        "sampling": dict(trained.sampling), "config": trained.config,
    }  # fmt: skip
    index = {
        "_class_name": ["pipeline", _CLASSES["pipeline"]], "_diffusers_version": _VERSION,
        "vae": ["diffusers", "AutoencoderKL"], "transformer": ["sit_transformer", _CLASSES["sit_transformer"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{name: trained.sampling[field] for name, field in _CALL.items()},
    }  # fmt: skip
    as_json = {"scheduler/scheduler_config.json": scheduler, RECORD: record, "model_index.json": index}
    written = vae.save_diffusers(folder / "vae", trained.vae.module, trained.vae.params, trained.vae.latent_stats)
    writes = {**transformer, folder / "pipeline.py": _copy_of("pipeline.py")}
    writes |= {folder / name: files.json_writer(content, name) for name, content in as_json.items()}
    return written + weights.write_files(writes, overwrite=False)


def _transformer(trained):
    """Name -> writer of the files of the transformer's folder."""
    module = trained.sit
    config = {
        "_class_name": _CLASSES["sit_transformer"], "_diffusers_version": _VERSION,
        "num_attention_heads": module.num_heads, "attention_head_dim": module.hidden_size // module.num_heads,
        "in_channels": module.latent_channels, "out_channels": (2 if module.learned_sigma else 1) * module.latent_channels,
        "num_layers": module.depth, "sample_size": trained.grid * module.patch_size, "patch_size": module.patch_size,
        "num_embeds_ada_norm": module.num_classes, "norm_eps": 1e-6, "mlp_ratio": module.mlp_ratio, "qk_norm": module.qk_norm,
    }  # fmt: skip
    state_dict = mapping.to_torch(sit.sit_table(module, latent_norm=False), {"params": trained.params})
    arrays = weights.safetensors_writer(dit_names.to_diffusers(state_dict), _WEIGHTS, {"format": "pt"})
    name = "sit_transformer.py"
    return {_WEIGHTS: arrays, name: _copy_of(name), "config.json": files.json_writer(config, "config.json")}


def _copy_of(name):
    return lambda path: path.write_text((SHIPPED / name).read_text())


def load(folder: Path) -> Trained:
    """Returns what a folder of `save` holds; ValueError or FileNotFoundError if it is damaged."""
    record, config = files.read_json(folder / RECORD), files.read_json(folder / "transformer" / "config.json")
    try:
        heads, channels, patch_size = config["num_attention_heads"], config["in_channels"], config["patch_size"]
        module = SiT(
            num_classes=config["num_embeds_ada_norm"], latent_channels=channels, patch_size=patch_size,
            hidden_size=heads * config["attention_head_dim"], depth=config["num_layers"], num_heads=heads,
            encoder_depth=record["encoder_depth"], mlp_ratio=config["mlp_ratio"], qk_norm=config["qk_norm"],
            learned_sigma=config["out_channels"] == 2 * channels,
        )  # fmt: skip
        grid = config["sample_size"] // patch_size
        rest = {name: record[name] for name in ("path", "sampling", "step", "config")}
    except KeyError as error:
        raise ValueError(f"{folder} is no pipeline that was exported here: {error} is missing in its JSON files") from error
    source = folder / "transformer" / _WEIGHTS
    table = sit.sit_table(module, latent_norm=False)
    names = [name for entry in table.entries for name in entry.torch]
    arrays = dit_names.from_diffusers(weights.read_file(source), names, str(source))
    variables = mapping.to_flax(table, arrays, sit.abstract_sit(module, grid, latent_norm=False), source=str(source))
    return Trained(module, variables["params"], grid, vae.read_file(folder / "vae"), **rest)
