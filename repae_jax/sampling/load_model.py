"""Trained networks, from here or from the published code, ready to be used: a whole model to sample from, or a VAE.

    model = load_model("runs/repae")
    run = jax.jit(make_generate(model.nets, model.objective, model.latent_shape, model.sampling))
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from checkpoints_tools import convert, identify, locate, pipeline_folder, published, runs
from checkpoints_tools import vae as vae_files
from checkpoints_tools.sit import check_time
from repae_jax.diffusion.samplers import SAMPLERS, NoiseObjective, Sampling, VelocityObjective
from repae_jax.distributed import sharding
from repae_jax.job import build, frozen_weights, initial_state
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.models.vae_families import VaeModule
from repae_jax.training import averages, checkpoint
from repae_jax.training.networks import Nets
from repae_jax.training.state import Ema


def jit_in_float32(function: Callable) -> Callable:
    """Compiles a function so that float32 means float32 on every platform, as in `generate`."""
    return jax.jit(jax.default_matmul_precision("high")(function))


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A VAE alone; numbers that are unknown are None."""

    module: VaeModule  # computes in float32
    params: Mapping[str, Any]
    latent_stats: ChannelStats | None
    config: Mapping[str, Any] | None = None  # the run's; None for a VAE from elsewhere
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Weaker:
    """A second network, which autoguidance guides away from."""

    sit: Any  # module
    params: Mapping[str, Any]  # averaged
    source: str
    step: int | None

    @functools.cached_property
    def weights(self) -> str:
        """Returns a hash of the parameters."""
        return checkpoint.fingerprint(self.params)

    def describe(self) -> dict[str, Any]:
        """Returns what tells it apart, for the files of samples and scores."""
        return {"source": self.source, "step": self.step, "weights": self.weights}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A SiT and its VAE, to sample from."""

    nets: Nets
    params: Mapping[str, Any]  # first argument of the function that `generate.make_generate` returns
    latent_shape: tuple[int, int, int]  # (h, w, C)
    objective: Any  # VelocityObjective, NoiseObjective or MeanFlow
    num_classes: int  # labels are 0..num_classes - 1
    sampling: Sampling  # the default settings
    mesh: jax.sharding.Mesh
    # decay of the averages in `params`, or 'sigma=S'; 0 means the weights themselves, None that it is unknown
    ema_decay: float | str | None
    step: int | None  # training steps taken, None if unknown
    weaker: Weaker | None = None

    def weaker_for(self, sampling: Sampling) -> Weaker | None:
        """Returns the network that autoguidance guides away from by these settings."""
        return self.weaker if sampling.autoguidance_scale > 1 else None

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what `params` holds: of billions of bytes, which take seconds."""
        return {name: checkpoint.fingerprint(tree) for name, tree in self.params.items()}

    @property
    def tokenizer(self) -> LoadedTokenizer:
        """The VAE alone."""
        vae = self.nets.vae.clone(dtype=jnp.float32)
        return LoadedTokenizer(vae, self.params["vae"], self.params["latent_stats"], step=self.step)


def load_model(
    path: str | PathLike, step: int | None = None, devices: Sequence[jax.Device] | None = None,
    vae_path: str | PathLike | None = None, sampler: str | None = None, ema: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Loads a training run, of ours or of the published code, to sample from: by default its newest step, on all devices.

    Args:
      path: folder of a run; or a published one (`args.json`, `checkpoints/`), or one of its checkpoints; or a pipeline that
        was exported here.
      vae_path: VAE of a run on a frozen VAE: of a published one, whose checkpoints hold none; of one of ours, where
        config.init.vae is not the place of it any more.
      sampler: the sampler that will be used, if known: 'ancestral' marks published weights as a DiT's, not a plain SiT's.
      ema: which average of a run of ours, see `averages.parse`; None for the one of config.ema_decay.
    """
    devices = jax.devices() if devices is None else devices
    if folder := locate.pipeline(path):
        _check_only_average(folder, ema)
        if step is not None:
            raise ValueError(f"{folder} is a pipeline, which has no step {step} to choose")
        with identify.naming(folder):
            return _load_pipeline(folder, devices, vae_path)
    is_file = str(path).endswith((".pt", ".safetensors"))
    if not epath.Path(path).exists():
        path = locate.resolve(path)  # a name on the hub
    if is_file or (epath.Path(path) / "args.json").exists():
        _check_only_average(path, ema)
        return _load_published(path, step, devices, vae_path, sampler)
    return _load_run(path, step, devices, vae_path, ema)


def _check_only_average(path, ema):
    """Raises ValueError if an average is chosen where there is one."""
    if ema is not None:
        raise ValueError(f"{path} is no run of ours, and holds one average: leave --ema {ema} out")


def load_weaker(model: LoadedModel, source: str, vae_path: str | PathLike | None = None) -> LoadedModel:
    """Returns the model with a second network to guide away from: 'RUN', or 'RUN@STEP', as `load_model` takes them.

    `vae_path` is as of `load_model`, for both. ValueError as of `add_weaker`.
    """
    sampler = "ancestral" if isinstance(model.objective, NoiseObjective) else None
    weaker = load_model(*split_step(source), list(model.mesh.devices.flat), vae_path, sampler)
    return add_weaker(model, weaker, source)


def split_step(text: str) -> tuple[str, int | None]:
    """Splits 'RUN@STEP' into its parts; returns (text, None) if it is no such text."""
    path, _, number = text.rpartition("@")
    return (path, int(number)) if path and number.isdigit() and not epath.Path(text).exists() else (text, None)


def add_weaker(model: LoadedModel, weaker: LoadedModel, source: str) -> LoadedModel:
    """Returns the model with the SiT of another one to guide away from; `source` is how messages call that.

    ValueError unless both are of the same VAE, latents, classes and kind of prediction, and of different weights. The VAE of a
    joint run is another one at each of its steps, so that its checkpoints cannot guide each other.
    """

    def facts(of):
        return {
            "latent shape": of.latent_shape, "number of classes": of.num_classes,
            "prediction": (of.objective.predicts, getattr(of.objective, "path", None)),
            "VAE": of.fingerprints["vae"], "statistics of the latents": of.fingerprints["latent_stats"],
        }  # fmt: skip

    ours, theirs = facts(model), facts(weaker)
    for name, value in theirs.items():
        if value != ours[name]:
            advice = "take an earlier checkpoint of a run on a frozen VAE, or a smaller SiT on that VAE"
            raise ValueError(f"autoguidance={source}: its {name} is {value}, the model's {ours[name]}; {advice}")
    if weaker.fingerprints["sit"] == model.fingerprints["sit"]:
        same = f"its weights, of step {weaker.step}, are the model's, of step {model.step}"
        raise ValueError(f"autoguidance={source}: {same}, which guides nothing; take a weaker network")
    params = jax.device_put(weaker.params["sit"], sharding.replicated(model.mesh))
    return dataclasses.replace(model, weaker=Weaker(weaker.nets.sit, params, source, weaker.step))


def for_sampling(config: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Returns the config without what only the training step needs: sharding, accumulation, what its compiler is told."""
    compiler = {"compiler_options": "", "deterministic": False, "attention": "xla"}
    data = {**config["data"], "batch_size": batch_size}
    return {**config, **compiler, "mesh": {"fsdp": 1, "slices": 1}, "accumulation": 1, "data": data}


def _load_run(workdir, step, devices, vae_path, ema):
    config = checkpoint.read_config(workdir, step)
    if config["job"] == "vae":
        raise ValueError(f"{workdir} is a run of a tokenizer: it has no SiT to sample from")
    if vae_path:
        if config["job"] != "ldm":
            raise ValueError(f"{workdir} is a run with a VAE of its own: leave {vae_path} out")
        config["init"]["vae"] = str(vae_path)
    job = build.build(for_sampling(config, len(devices)), devices, encoders=())  # without encoders, no projectors are read
    state = initial_state.abstract_state(job)
    if job.frozen_vae:  # first: its mistakes are found sooner
        vae_params = _load_frozen_vae(job, workdir, step)
    shapes = Ema(params=state.ema.params, latent_stats=state.ema.latent_stats)
    average, step = averages.read(workdir, shapes, step, ema)
    if not job.frozen_vae:
        vae_params = checkpoint.restore_subset(workdir, {"vae": {"params": state.vae.params}}, step)[0]["vae"]["params"]
    return LoadedModel(
        nets=job.nets, latent_shape=job.latent_shape, objective=job.recipe.objective, sampling=job.sampling, mesh=job.mesh,
        params={"sit": average.params, "vae": vae_params, "latent_stats": average.latent_stats},
        num_classes=config["data"]["num_classes"], ema_decay=averages.described(ema, config), step=step,
    )  # fmt: skip


def _load_frozen_vae(job, workdir, step):
    """Loads the frozen VAE; ValueError if it is not the one that the run was trained on."""
    path = job.config["init"]["vae"]
    try:
        params = frozen_weights.load_frozen_vae(job)
    except FileNotFoundError as error:
        raise runs.missing_frozen_vae(workdir, path, error) from error
    runs.check_frozen_vae(workdir, step, path, params)
    return params


def _load_pipeline(folder, devices, vae_path):
    if vae_path:
        raise ValueError(f"{folder} is a pipeline with a VAE of its own: leave {vae_path} out")
    trained, mesh = pipeline_folder.load(folder), sharding.make_mesh(1, devices)
    side = trained.grid * trained.sit.patch_size
    params = {"sit": trained.params, "vae": trained.vae.params, "latent_stats": ChannelStats(**trained.vae.latent_stats)}
    return LoadedModel(
        nets=Nets(vae=trained.vae.module, sit=trained.sit, disc=None, lpips=None), mesh=mesh,
        latent_shape=(side, side, trained.sit.latent_channels),
        objective=NoiseObjective() if trained.path == "ddpm" else VelocityObjective(trained.path),
        sampling=Sampling(**trained.sampling), params=jax.device_put(params, sharding.replicated(mesh)),
        num_classes=trained.sit.num_classes, ema_decay=None, step=trained.step,
    )  # fmt: skip


def _load_published(path, step, devices, vae_path, sampler):
    weights = published.read(path, step)
    args, networks, source = weights.args, weights.networks, weights.source
    if "ema" not in networks:
        raise ValueError(f"{source} holds {', '.join(networks)}, but no ema, the averaged weights that samples are made with")
    sit = weights.load_sit("ema")
    # nothing in the published DiTs' and plain SiTs' files tells them apart
    for_dit = sampler is not None and SAMPLERS[sampler].objective is NoiseObjective
    is_dit = args.get("path_type") == "ddpm" or (sit.layout == "sit-or-dit" and sit.module.learned_sigma and for_dit)
    if not is_dit:
        check_time(sit.layout, source)
    vae, vae_params, vae_stats = _published_vae(weights, vae_path)
    latent_stats = vae_files.stats_for_sit(sit.module, sit.variables.get("latent_stats"), vae, vae_stats, source)
    mesh = sharding.make_mesh(1, devices)
    params = {"sit": sit.variables["params"], "vae": vae_params, "latent_stats": ChannelStats(**latent_stats)}
    side = sit.grid * sit.module.patch_size
    return LoadedModel(
        nets=Nets(vae=vae, sit=sit.module, disc=None, lpips=None), latent_shape=(side, side, vae.latent_channels), mesh=mesh,
        objective=NoiseObjective() if is_dit else VelocityObjective(args.get("path_type", "linear")),
        sampling=Sampling(sampler="ancestral") if is_dit else Sampling(),
        params=jax.device_put(params, sharding.replicated(mesh)),
        num_classes=sit.module.num_classes, ema_decay=None, step=weights.steps,
    )  # fmt: skip


def _published_vae(weights, vae_path):
    """Returns (module, parameters, latent statistics or None) of the VAE in the weights or, if they hold none, of a file."""
    source = weights.source
    if "vae" in weights.networks:
        if vae_path:
            raise ValueError(f"{source} holds a VAE of its own: leave {vae_path} out")
        return *weights.load_vae(), None
    if not vae_path:
        trained_on = weights.args.get("vae_ckpt")
        raise ValueError(f"{source} holds no VAE: give --vae, the one that it was trained on ({trained_on})")
    loaded = vae_files.load_vae(vae_path)
    return loaded.module, loaded.params, loaded.latent_stats


def load_vae(source: str | PathLike, step: int | None = None) -> LoadedTokenizer:
    """Loads the VAE of a run, trained or frozen, of a published training checkpoint, or from a file or folder of its own.

    The source is a run's folder, of which the newest checkpoint is the default, or what `identify.identify` takes.
    """
    artefact = identify.identify(source, step)
    if artefact.kind == "vae":
        loaded = vae_files.read_file(artefact.path, artefact.arrays)
        return LoadedTokenizer(loaded.module, loaded.params, loaded.latent_stats and ChannelStats(**loaded.latent_stats))
    config = checkpoint.read_config(source, step) if artefact.kind == "run" else None
    if config and config["job"] == "ldm":
        return dataclasses.replace(load_model(source, step, jax.devices()[:1]).tokenizer, config=config)
    vae = convert.find_vae(artefact, step)
    return LoadedTokenizer(vae.module, vae.params, ChannelStats(**vae.latent_stats), config, vae.steps)
