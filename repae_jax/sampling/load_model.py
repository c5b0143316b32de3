"""Networks that were trained, here or with the published code, ready to be used: a whole model to sample from, or a VAE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from checkpoints_tools import convert, identify, locate, published
from checkpoints_tools import vae as vae_files
from checkpoints_tools.sit import check_time, from_state_dict
from repae_jax.diffusion.ddpm import NoiseObjective
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.distributed import sharding
from repae_jax.job import build
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.sampling import generate
from repae_jax.training import checkpoint
from repae_jax.training.networks import Nets
from repae_jax.training.state import Ema


@dataclasses.dataclass(frozen=True)
class Trained:
    """What sampling needs of a trained model.

    Attributes:
      nets: Nets, without discriminator and LPIPS.
      params: for `generate.make_generate`.
      latent_shape: (h, w, C).
      objective: what the SiT has learned.
      num_classes: labels are 0..num_classes - 1.
      sampling: Sampling, the default.
      mesh: device mesh.
      ema_decay: of the averages in `params`; 0 means the weights themselves, None that it is unknown.
      step: training steps taken, None if unknown.
    """

    nets: Nets
    params: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    objective: Any
    num_classes: int
    sampling: generate.Sampling
    mesh: jax.sharding.Mesh
    ema_decay: float | None
    step: int | None


def load_model(workdir, step=None, devices=None, vae_path=None, sampler=None):
    """What sampling needs of a training run, of ours or of the published code.

    Args:
      workdir: folder of a run; or a published one (`args.json`, `checkpoints/`), or one of its checkpoints.
      step: checkpoint; default the newest.
      devices: default all.
      vae_path: VAE of a run on a frozen VAE: of a published one, whose checkpoints hold none; of one of ours, where
        config.init.vae is not the place of it any more.
      sampler: that will be used, if known: 'ancestral' says that published weights are a DiT's, not a plain SiT's.

    Returns:
      Trained.

    Raises:
      FileNotFoundError, ValueError: if there is no such checkpoint, it is damaged, or there is no SiT in it; or its VAE is not
        there or is another.
    """
    devices = jax.devices() if devices is None else devices
    is_file = str(workdir).endswith((".pt", ".safetensors"))
    if not epath.Path(workdir).exists():
        workdir = locate.resolve(workdir)  # a name on the hub
    if is_file or (epath.Path(workdir) / "args.json").exists():
        return _load_published(workdir, step, devices, vae_path, sampler)
    config = checkpoint.read_config(workdir, step)
    if config["job"] == "vae":
        raise ValueError(f"{workdir} is a run of a tokenizer: it has no SiT to sample from")
    if vae_path:
        if config["job"] != "ldm":
            raise ValueError(f"{workdir} is a run with a VAE of its own: leave {vae_path} out")
        config["init"]["vae"] = str(vae_path)
    # the training batch does not matter here, nor do encoders and projectors, nor how the step was compiled
    data = {**config["data"], "batch_size": len(devices)}
    config = {**config, "mesh": {"fsdp": 1, "slices": 1}, "compiler_options": "", "accumulation": 1, "data": data}
    job = build.build(config, devices, encoders=())
    state = build.abstract_state(job)
    subset = {"ema": Ema(params=state.ema.params, latent_stats=state.ema.latent_stats)}
    if job.frozen_vae:
        try:
            vae_params = build.load_frozen_vae(job)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the run in {workdir} has a frozen VAE, {config['init']['vae']}, which is not there: give --vae ({error})"
            ) from error
        before, now = checkpoint.read_data_state(workdir, step)["inputs"]["frozen_vae"], checkpoint.fingerprint(vae_params)
        if before != now:
            raise ValueError(
                f"the run in {workdir} was trained on the frozen VAE {before}, not on {config['init']['vae']}, which is {now} "
                "(fingerprints of the weights): give the right one as --vae"
            )
    else:
        subset["vae"] = {"params": state.vae.params}
    loaded, step = checkpoint.restore_subset(workdir, subset, step)
    if not job.frozen_vae:
        vae_params = loaded["vae"]["params"]
    params = {"sit": loaded["ema"].params, "vae": vae_params, "latent_stats": loaded["ema"].latent_stats}
    return Trained(
        nets=job.nets, params=params, latent_shape=job.latent_shape, objective=job.recipe.objective,
        num_classes=config["data"]["num_classes"], sampling=job.sampling, mesh=job.mesh,
        ema_decay=config["ema_decay"], step=step,
    )  # fmt: skip


def _load_published(path, step, devices, vae_path, sampler):
    taken = published.read(path, step)
    args, networks, source = taken.args, taken.networks, taken.source
    if "ema" not in networks:
        raise ValueError(f"{source} holds {', '.join(networks)}, but no ema, the averaged weights that samples are made with")
    sit = from_state_dict(networks["ema"], f"{source}: ema", taken.encoder_depth, taken.num_heads)
    # nothing in the published DiTs' and plain SiTs' files tells them apart
    is_dit = args.get("path_type") == "ddpm" or (
        sit.layout == "sit-or-dit" and sit.module.learned_sigma and sampler == "ancestral"
    )
    if not is_dit:
        check_time(sit.layout, source)
    latent_stats = sit.variables.get("latent_stats")
    if "vae" in networks and vae_path:
        raise ValueError(f"{source} holds a VAE of its own: leave {vae_path} out")
    if "vae" in networks:
        vae, vae_params = vae_files.from_state_dict(networks["vae"], f"{source}: vae", taken.norm_groups)
    else:
        if not vae_path:
            raise ValueError(f"{source} holds no VAE: give --vae, the one that it was trained on ({args.get('vae_ckpt')})")
        loaded = vae_files.load_vae(vae_path)
        vae, vae_params = loaded.module, loaded.params
        latent_stats = latent_stats or loaded.latent_stats
    if latent_stats is None:
        raise ValueError(
            f"{source} has no latent batch norm, as REPA and DiT have none: give --vae as diffusers' folder, whose config.json "
            "tells the statistics of its latents"
        )
    if vae.latent_channels != sit.module.latent_channels:
        raise ValueError(f"the VAE has {vae.latent_channels} latent channels, the SiT of {source} {sit.module.latent_channels}")
    mesh = sharding.make_mesh(1, devices)
    stats = ChannelStats(**latent_stats)
    side = sit.grid * sit.module.patch_size
    return Trained(
        nets=Nets(vae=vae, sit=sit.module, disc=None, lpips=None),
        params=jax.device_put(
            {"sit": sit.variables["params"], "vae": vae_params, "latent_stats": stats}, sharding.replicated(mesh)
        ),
        latent_shape=(side, side, vae.latent_channels),
        objective=NoiseObjective() if is_dit else VelocityObjective(args.get("path_type", "linear")),
        num_classes=sit.module.num_classes,
        sampling=generate.Sampling(sampler="ancestral") if is_dit else generate.Sampling(),
        mesh=mesh,
        ema_decay=None,
        step=taken.steps,
    )


@dataclasses.dataclass(frozen=True)
class TrainedVae:
    """A VAE to be looked at.

    Attributes:
      module: AutoencoderKL, which computes in float32.
      params: its parameters.
      latent_stats: ChannelStats of its latents, None if nothing there tells them.
      config: of the run it is from, None if it is from elsewhere.
      step: training steps taken, None if unknown.
    """

    module: AutoencoderKL
    params: Mapping[str, Any]
    latent_stats: ChannelStats | None
    config: Mapping[str, Any] | None = None
    step: int | None = None


def load_vae(source, step=None):
    """The VAE of a run, trained there or frozen, of a published training checkpoint, or in a file or folder of its own.

    Args:
      source: workdir, or what `checkpoints_tools.vae.load_vae` or `checkpoints_tools.convert.find_vae` take.
      step: checkpoint of a run; default the newest.

    Returns:
      TrainedVae.

    Raises:
      FileNotFoundError, ValueError: if there is no such thing, it is damaged, or there is no VAE in it.
    """
    artefact = identify.identify(source, step)
    if artefact.kind == "vae":
        loaded = vae_files.load_vae(artefact.path)
        stats = loaded.latent_stats and ChannelStats(**loaded.latent_stats)
        return TrainedVae(loaded.module, loaded.params, stats)
    config = checkpoint.read_config(source, step) if artefact.kind == "run" else None
    if config and config["job"] == "ldm":
        whole = load_model(source, step, jax.devices()[:1])
        module = whole.nets.vae.clone(dtype=jnp.float32)
        return TrainedVae(module, whole.params["vae"], whole.params["latent_stats"], config, whole.step)
    found = convert.find_vae(source, step)
    return TrainedVae(found.module, found.params, ChannelStats(**found.latent_stats), config, found.steps)
