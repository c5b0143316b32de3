"""Runs and training checkpoints -> folders that others load, with a model card, here and on the Hugging Face hub: `export`."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from checkpoints_tools import convert, model_card, pipeline_folder, runs, vae
from checkpoints_tools.identify import KINDS, Identified, identify
from checkpoints_tools.pipeline_folder import Trained
from checkpoints_tools.published_args import check_prediction
from checkpoints_tools.sit import check_conditions, check_time
from checkpoints_tools.weights import write_files

_INDEX = "model_index.json"
# fields of `repae_jax.diffusion.samplers.Sampling` of a model whose run says nothing of it
_SAMPLING = {
    "steps": 250, "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "guidance_channels": None,
    "time_shift": 1.0,
}  # fmt: skip


def trained_of(
    source: Identified, step: int | None = None, vae_path: str | None = None, ema: str | None = None
) -> Trained:
    """Returns the averaged transformer and the VAE of a run, at a step, the newest by default, or of a training checkpoint.

    `ema` chooses one of a run's averages, see `repae_jax.training.averages.parse`.
    `vae_path` is that of a frozen VAE, if it is not where the run's config says, or none is named. ValueError if there is no
    transformer, or the VAE is missing or another than the one trained on.
    """
    if source.kind not in ("run", "training"):
        raise ValueError(f"{source.path} is a {KINDS[source.kind]}; a pipeline is made of a run or of a training checkpoint")
    convert.check_ema(source, ema)
    return _of_run(source, step, vae_path, ema) if source.kind == "run" else _of_checkpoint(source, vae_path)


def _of_run(source, step, vae_path, ema):
    run = runs.open_run(source.path, step, ema)
    module, config = run.networks.sit, {**run.config, "ema_decay": run.ema_decay}
    if module is None:
        raise ValueError(f"{source.path} is a run of a tokenizer: it has no transformer; extract-vae writes its VAE")
    check_conditions(module)
    if config["vae"].get("family"):
        raise ValueError(
            f"{source.path} has latents of config.vae.family={config['vae']['family']!r}; a pipeline is written for those of "
            "AutoencoderKL alone: sample with `python -m repae_jax.sample`"
        )
    check_prediction(config, str(source.path))
    runs.check_square(run, "a pipeline of diffusers")
    if run.networks.vae is None:
        params = runs.read_frozen_vae(run, vae_path or config["init"]["vae"])
        autoencoder = vae.LoadedVAE(run.vae, params, run.read("ema.latent_stats"))
    elif vae_path:
        raise ValueError(f"{source.path} is a run with a VAE of its own: leave {vae_path} out")
    else:
        autoencoder = convert.find_vae(source, step, ema)
    schedule = config["sampling"].get("guidance_schedule", "constant")
    if schedule != "constant":
        given = f"config.sampling.guidance_schedule={schedule!r}"
        raise ValueError(f"{source.path}: {given}, but a pipeline of diffusers guides by a constant scale; sample the run here")
    grid = config["data"]["image_size"] // run.vae.factor // module.patch_size
    given = _SAMPLING | config["sampling"]
    sampling = {field: given[field] for field in ("sampler", *_SAMPLING)}
    path, params = config["diffusion"]["path"], run.read("ema.params")
    return Trained(module, params, grid, autoencoder, path, sampling, run.step, dict(config))


def _of_checkpoint(source, vae_path):
    training = source.checkpoint
    if "ema" not in training.networks:
        raise ValueError(f"{training.source} holds no ema, the averaged weights that samples are made with")
    loaded, path = training.load_sit("ema"), training.args.get("path_type", "linear")
    if path != "ddpm":
        check_time(loaded.layout, training.source)
    if "vae" in training.networks and vae_path:
        raise ValueError(f"{training.source} holds a VAE of its own: leave {vae_path} out")
    if "vae" in training.networks:
        autoencoder = convert.find_vae(source)
    elif vae_path:
        autoencoder = vae.load_vae(vae_path)
    else:
        raise ValueError(f"{training.source} holds no VAE: give --vae, the one that it was trained on")
    known = loaded.variables.get("latent_stats"), autoencoder.module, autoencoder.latent_stats
    stats = vae.stats_for_sit(loaded.module, *known, training.source)
    sampling = {"sampler": "ancestral" if path == "ddpm" else "sde", **_SAMPLING}
    autoencoder = autoencoder._replace(latent_stats=stats)
    return Trained(loaded.module, loaded.variables["params"], loaded.grid, autoencoder, path, sampling, training.steps, None)


def export(
    source: str | Path, folder: str | Path, *, step: int | None = None, vae_path: str | None = None, license: str | None = None,
    name: str | None = None, overwrite: bool = False, ema: str | None = None,
) -> list[Any]:  # fmt: skip
    """Writes a pipeline of diffusers with VAE, transformer, scheduler and a model card; returns the paths.

    A new folder appears whole or not at all. FileExistsError if it is not empty, unless its files are to be replaced;
    ValueError if it is that of a run, which would be taken for the pipeline from then on.

    Args:
      source: path or name, as `identify` takes it.
      folder: a local folder.
      step, vae_path: as of `trained_of`.
      license: of the weights, for the card.
      name: by which the card says to load the model; default the folder's.
      overwrite: replace files that exist.
      ema: which of a run's averages, see `repae_jax.training.averages.parse`.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder}: a pipeline is written to a local folder; copy it from there")
    folder = Path(folder)
    if folder.is_file() or (not overwrite and folder.is_dir() and any(folder.iterdir())):
        advice = "choose another name, or ask to replace its files (--overwrite)"
        raise FileExistsError(f"{folder} exists and is {'a file' if folder.is_file() else 'not empty'}: {advice}")
    if (folder / "checkpoints").exists():
        raise ValueError(f"{folder} is the folder of a run, which is no place for a pipeline: choose another one")
    identified = identify(source, step)
    trained = trained_of(identified, step, vae_path, ema)
    autoencoder = trained.vae._replace(discriminator=None)
    trained = dataclasses.replace(trained, vae=autoencoder, config=model_card.without_folders(trained.config))
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.exists() else folder.parent  # of one disk with the folder, even if that is a mount
    with tempfile.TemporaryDirectory(prefix=".export.", dir=place) as temporary:
        made = Path(temporary) / "pipeline"
        written = pipeline_folder.save(made, trained)
        run = identified.path if identified.kind == "run" else None
        picture = model_card.picture_of(run, trained.step) if run and ema is None else None
        written += _write_card(made, trained, run, name or folder.resolve().name, license, picture)
        written = [path.relative_to(made) for path in written]
        _move(made, folder, written)
    return [folder / path for path in written]


def _write_card(folder, trained, run, name, license, picture):
    """Writes the model card of a run, or of no run of ours, None, and the picture of samples, or None; returns the paths."""
    evaluations = model_card.read_evaluations(run, trained.step, trained.config["ema_decay"]) if run else []
    text = model_card.write(trained, name, evaluations, license, picture is not None)
    writes = {folder / "README.md": lambda path: path.write_text(text)}
    if picture is not None:
        writes[folder / model_card.PICTURE] = lambda path: path.write_bytes(picture.read_bytes())
    return write_files(writes, overwrite=False)


def _move(made, folder, names):
    """Moves the files of one folder to another, the index last; a folder that is not there appears at once."""
    if not folder.exists():
        os.replace(made, folder)
        return
    (folder / _INDEX).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: str(name) == _INDEX):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
