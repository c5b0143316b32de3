"""Config -> networks, optimizers, frozen weights, step and initial state. The only file that reads config names.

Everything that can be wrong with a config is found here, before anything is compiled.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from checkpoints_tools import mapping, published, weights
from checkpoints_tools import vae as vae_files
from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.lpips import load_lpips
from checkpoints_tools.sit import layout_of
from checkpoints_tools.training_state import OPT_STATES, PLACES, Networks, to_trees
from checkpoints_tools.vit import load_encoder
from repae_jax import data, features, sharding, train_step
from repae_jax.data.loader import Loader
from repae_jax.diffusion import interpolant
from repae_jax.generate import Sampling
from repae_jax.images import to_float
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.running_stats import ChannelStats
from repae_jax.train_state import create_net, create_state

JOBS = ("repae",)
RANDOM = "random"  # instead of a weight file: to measure speed, or for tests
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
SECTIONS = {
    "job", "seed", "steps", "accumulation", "ema_decay", "max_skipped_in_a_row", "data", "vae", "sit", "disc", "encoders",
    "lpips", "loss", "diffusion", "optim", "init", "precision", "mesh", "checkpoint", "log", "hooks", "sampling",
}  # fmt: skip
VAE_TERMS = ("l1", "l2", "lpips", "kl", "gan", "align")
SIT_TERMS = ("velocity", "align")
# options that no callable of ours takes whole
FIELDS = {
    "data": {"source", "options", "image_size", "num_classes", "batch_size", "workers", "max_bad_fraction"},
    "lpips": {"vgg16", "linear", "input_range"},
    "loss": {"vae", "sit", "gan_start", "gan_factor", "lecam"},
    "diffusion": {"path", "time_distribution", "label_dropout", "norm_momentum"},
    "optim": {"vae", "disc", "sit"},
    "init": {"checkpoint", "vae", "latent_stats", "disc", "stats_images"},
    "precision": {"compute", "lpips"},
    "mesh": {"fsdp"},
    "checkpoint": {"every", "keep_last", "keep_every"},
    "log": {"every"},
    "hooks": {"samples_every", "reconstructions_every", "images"},
}
AT_LEAST = (
    ("data", "image_size", 1), ("data", "num_classes", 1), ("data", "batch_size", 1), ("init", "stats_images", 1),
    ("checkpoint", "every", 1), ("checkpoint", "keep_last", 1), ("log", "every", 1),
    ("hooks", "images", 1), ("hooks", "samples_every", 0), ("hooks", "reconstructions_every", 0),
)  # fmt: skip
ENCODER_FIELDS = {"architecture", "weights", "image_size"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, built.

    Attributes:
      config: the config as nested plain values, as stored in checkpoints.
      nets: Nets.
      encoders: tuple of features.Encoder.
      tx: Optimizers.
      recipe: Recipe.
      sampling: Sampling of the training pictures.
      latent_shape: (h, w, C).
      mesh: device mesh.
    """

    config: Mapping[str, Any]
    nets: train_step.Nets
    encoders: tuple[features.Encoder, ...]
    tx: train_step.Optimizers
    recipe: train_step.Recipe
    sampling: Sampling
    latent_shape: tuple[int, int, int]
    mesh: jax.sharding.Mesh

    @property
    def step(self) -> Callable:
        """(state, batch, frozen, key) -> (state, metrics), not yet jitted."""
        fields = {"nets": self.nets, "encoders": self.encoders, "tx": self.tx, "recipe": self.recipe}
        return functools.partial(train_step.repae_step, **fields)


def check_names(where, given, allowed):
    """ValueError that names every field of `given` that is not allowed, and every allowed one it lacks."""
    unknown, missing = sorted(set(given) - set(allowed)), sorted(set(allowed) - set(given))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; it has {sorted(allowed)}")


def construct(where, function, section, **extra):
    """function(**section, **extra), with a readable error for a field it does not take or that it needs."""
    parameters = inspect.signature(function).parameters
    allowed = [name for name in parameters if name not in extra and name not in ("parent", "name")]
    unknown = sorted(set(section) - set(allowed))
    missing = [name for name in allowed if parameters[name].default is inspect.Parameter.empty and name not in section]
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; allowed: {sorted(allowed)}")
    return function(**section, **extra)


def _at_least(where, value, low):
    if value < low:
        raise ValueError(f"{where}={value} must be at least {low}")


def plain_config(config):
    """Nested dict of plain values of a ConfigDict, tuples kept; placeholders are None."""
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def build(config, devices=None, encoders=None):
    """Build a job.

    Args:
      config: ConfigDict or nested dict, see configs/.
      devices: devices of the mesh; default all.
      encoders: tuple of features.Encoder; default those that the config describes. () leaves projectors and
        alignment out of the networks, for sampling.

    Returns:
      Job.

    Raises:
      ValueError: for anything in the config that cannot work, naming the field, the value and what is allowed.
    """
    config = plain_config(config)
    check_names("config", config, SECTIONS)
    for section, names in FIELDS.items():
        check_names(f"config.{section}", config[section], names)
    if config["job"] not in JOBS:
        raise ValueError(f"config.job={config['job']!r} is unknown; allowed: {list(JOBS)}")
    for name in ("steps", "accumulation", "max_skipped_in_a_row"):
        _at_least(f"config.{name}", config[name], 1)
    for section, name, low in AT_LEAST:
        _at_least(f"config.{section}.{name}", config[section][name], low)
    if not 0 <= config["ema_decay"] < 1:
        raise ValueError(f"config.ema_decay={config['ema_decay']} must lie in [0, 1)")
    recipe = _recipe(config)
    mesh = sharding.make_mesh(config["mesh"]["fsdp"], devices)
    sharding.check_batch(config["data"]["batch_size"], config["accumulation"], mesh)
    dtype = _dtype("compute", config)
    vae = construct("config.vae", AutoencoderKL, _tuples(config["vae"]), dtype=dtype)
    latent_shape = _latent_shape(config, vae)
    if encoders is None:
        encoders = tuple(_describe_encoder(name, config) for name in sorted(config["encoders"]))
    for encoder in encoders:
        features.check_grid(encoder, latent_shape[0] // config["sit"]["patch_size"])
    sit = construct(
        "config.sit", SiT, config["sit"], dtype=dtype, num_classes=config["data"]["num_classes"],
        latent_channels=vae.latent_channels, feature_dims=tuple(encoder.module.hidden_size for encoder in encoders),
    )  # fmt: skip
    disc = lpips = None
    if "gan" not in recipe.vae_weights:
        for name, value in (("loss.lecam", config["loss"]["lecam"]), ("init.disc", config["init"]["disc"])):
            if value:
                raise ValueError(
                    f"config.{name}={value!r} needs a discriminator, but config.loss.vae.gan is 0: change one of them"
                )
    else:
        disc = construct("config.disc", PatchDiscriminator, config["disc"], dtype=dtype)
        if config["data"]["image_size"] < disc.min_image_size:
            raise ValueError(
                f"config.disc.num_layers={disc.num_layers} leaves no logit of config.data.image_size="
                f"{config['data']['image_size']} pixels; lower num_layers, or use {disc.min_image_size} pixels or more"
            )
    if "lpips" in recipe.vae_weights:
        lpips = LPIPS(dtype=_dtype("lpips", config))
    fixed = {"vae": (), "sit": () if sit.learned_positions else ("pos_embed",), "disc": ()}
    tx = {name: construct(f"config.optim.{name}", optimizer, config["optim"][name], fixed=fixed[name]) for name in fixed}
    job = Job(
        config=config,
        nets=train_step.Nets(vae=vae, sit=sit, disc=disc, lpips=lpips),
        encoders=encoders,
        tx=train_step.Optimizers(**tx),
        recipe=recipe,
        sampling=construct("config.sampling", Sampling, config["sampling"]),
        latent_shape=latent_shape,
        mesh=mesh,
    )
    jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))  # the networks' own checks, without compiling
    return job


def _tuples(section):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _dtype(name, config):
    value = config["precision"][name]
    if value not in DTYPES:
        raise ValueError(f"config.precision.{name}={value!r} is unknown; allowed: {list(DTYPES)}")
    return DTYPES[value]


def _latent_shape(config, vae):
    size, patch = config["data"]["image_size"], config["sit"]["patch_size"]
    if size % vae.factor:
        raise ValueError(
            f"config.data.image_size={size} is not a multiple of the VAE's factor {vae.factor} "
            f"(config.vae.channel_multipliers has {len(vae.channel_multipliers)} levels): "
            f"use {size // vae.factor * vae.factor or vae.factor}"
        )
    side = size // vae.factor
    if side % patch:
        raise ValueError(f"config.sit.patch_size={patch} does not divide the latents' {side} x {side} positions")
    return side, side, vae.latent_channels


def _recipe(config):
    loss, diffusion = config["loss"], config["diffusion"]
    for name, terms in (("vae", VAE_TERMS), ("sit", SIT_TERMS)):
        unknown = sorted(set(loss[name]) - set(terms))
        if unknown:
            raise ValueError(f"config.loss.{name} has unknown terms {unknown}; allowed: {list(terms)}")
    named = {name: {term: float(weight) for term, weight in loss[name].items() if weight} for name in ("vae", "sit")}
    if not {"l1", "l2"} & set(named["vae"]):
        raise ValueError("config.loss.vae needs a reconstruction term: give 'l1' or 'l2' a weight")
    if "velocity" not in named["sit"]:
        raise ValueError("config.loss.sit.velocity must not be 0: it is the diffusion loss")
    aligned = [f"config.loss.{name}.align" for name in ("vae", "sit") if "align" in named[name]]
    if aligned and not config["encoders"]:
        raise ValueError(
            f"{' and '.join(aligned)} need an encoder, but config.encoders is empty: add one or set the weights to 0"
        )
    if config["encoders"] and not aligned:
        raise ValueError(
            "config.encoders has an encoder, but both config.loss.vae.align and config.loss.sit.align are 0: remove one"
        )
    for name, allowed in (("path", interpolant.PATHS), ("time_distribution", interpolant.TIME_DISTRIBUTIONS)):
        if diffusion[name] not in allowed:
            raise ValueError(f"config.diffusion.{name}={diffusion[name]!r} is unknown; allowed: {sorted(allowed)}")
    if not 0 <= diffusion["label_dropout"] < 1:
        raise ValueError(f"config.diffusion.label_dropout={diffusion['label_dropout']} must lie in [0, 1)")
    if not 0 < diffusion["norm_momentum"] <= 1:
        raise ValueError(f"config.diffusion.norm_momentum={diffusion['norm_momentum']} must lie in (0, 1]")
    low, high = config["lpips"]["input_range"]
    if not low < high:
        raise ValueError(f"config.lpips.input_range={(low, high)} must be (low, high), low first")
    return train_step.Recipe(
        vae_weights=named["vae"],
        sit_weights=named["sit"],
        lpips_input_range=(low, high),
        gan_start=loss["gan_start"],
        gan_factor=loss["gan_factor"],
        lecam_weight=loss["lecam"],
        accumulation=config["accumulation"],
        ema_decay=config["ema_decay"],
        **diffusion,
    )


def optimizer(learning_rate, warmup_steps, b1, b2, eps, weight_decay, clip_norm, fixed):
    """AdamW behind clipping by the network's global gradient norm; the rate rises linearly over `warmup_steps`.

    Top-level names in `fixed`, which have no gradients, do not decay either.
    """
    _at_least("learning_rate", learning_rate, 0)
    _at_least("warmup_steps", warmup_steps, 0)
    if clip_norm <= 0:
        raise ValueError(f"clip_norm={clip_norm} must be positive; a large one never clips")
    schedule = optax.linear_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else learning_rate

    def decays(params):
        return {name: jax.tree.map(lambda _, decay=name not in fixed: decay, tree) for name, tree in params.items()}

    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays if fixed else None)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen weights.
# ---------------------------------------------------------------------------------------------------------------------


def _describe_encoder(name, config):
    """features.Encoder of one entry, from its architecture or its folder's config.json."""
    fields = config["encoders"][name]
    check_names(f"config.encoders.{name}", fields, ENCODER_FIELDS)
    where, path, resolution = f"config.encoders.{name}", fields["weights"], config["data"]["image_size"]
    if not path:
        raise ValueError(
            f"{where}.weights is empty: give a Hugging Face name or folder, or {RANDOM!r} for tests and benchmarks"
        )
    dtype = _dtype("compute", config)
    if fields["architecture"]:
        return features.make_encoder(fields["architecture"], resolution, image_size=fields["image_size"], dtype=dtype)
    if path == RANDOM:
        raise ValueError(
            f"{where}.architecture must be set when the weights are {RANDOM!r}; allowed: {list(features.ARCHITECTURES)}"
        )
    return load_encoder(path, resolution, fields["image_size"], dtype)[0]


def _encoder_params(name, described, config):
    fields = config["encoders"][name]
    if fields["weights"] == RANDOM:
        logging.warning("encoder %s has RANDOM weights: for tests and benchmarks only", name)
        return jax.jit(functools.partial(features.init_params, described))(jax.random.key(0))
    loaded, params = load_encoder(fields["weights"], config["data"]["image_size"], fields["image_size"], described.module.dtype)
    if loaded.module != described.module:
        raise ValueError(
            f"config.encoders.{name}: {fields['weights']} holds {loaded.module}, but architecture="
            f"{fields['architecture']!r} is {described.module}; correct one of the two"
        )
    return params


def _lpips_params(job):
    files = {name: job.config["lpips"][name] for name in ("vgg16", "linear")}
    sizes = [jnp.zeros((1, 32, 32, 3))] * 2
    init = functools.partial(job.nets.lpips.init, jax.random.key(0))
    if set(files.values()) == {RANDOM}:
        logging.warning("LPIPS has RANDOM weights: for tests and benchmarks only")
        return jax.jit(init)(*sizes)["params"]
    for name, path in files.items():
        if path == RANDOM or (not path and name == "vgg16"):  # one file may hold the whole module
            raise ValueError(
                f"config.lpips.{name}={path!r}: config.loss.vae.lpips needs torchvision's VGG16 weights (vgg16) and the linear "
                f"weights of LPIPS v0.1 (linear); give both files, or {RANDOM!r} for both, or set config.loss.vae.lpips=0"
            )
    return load_lpips(files["vgg16"], files["linear"])


def load_frozen(job):
    """Frozen parameters, on the mesh by the rule of `sharding`: {'encoders': tuple, 'lpips': tree or None}."""
    frozen = {
        "encoders": tuple(
            _encoder_params(name, encoder, job.config) for name, encoder in zip(sorted(job.config["encoders"]), job.encoders)
        ),
        "lpips": None if job.nets.lpips is None else _lpips_params(job),
    }
    return jax.device_put(frozen, sharding.tree_sharding(job.mesh, frozen))


# ---------------------------------------------------------------------------------------------------------------------
# State.
# ---------------------------------------------------------------------------------------------------------------------


def initial_state(job, key):
    """TrainState from scratch, latent statistics 0 and 1; a pure function of the key."""
    nets, size, (h, w, c) = job.nets, job.config["data"]["image_size"], job.latent_shape
    keys = dict(zip(("vae", "disc", "sit"), jax.random.split(key, 3)))
    images, latents = jnp.zeros((1, size, size, 3)), jnp.zeros((1, h, w, c))
    vae = nets.vae.init(keys["vae"], images, latents)["params"]
    sit = nets.sit.init(keys["sit"], latents, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]
    disc = None
    if nets.disc is not None:
        variables = nets.disc.init(keys["disc"], images)
        disc = create_net(variables["params"], job.tx.disc, variables["batch_stats"])
    return create_state(
        vae=create_net(vae, job.tx.vae),
        disc=disc,
        sit=create_net(sit, job.tx.sit),
        latent_stats=ChannelStats(mean=jnp.zeros((c,)), var=jnp.ones((c,))),
    )


def abstract_state(job):
    """Shapes, dtypes and shardings of the TrainState; computes nothing."""
    shapes = jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))
    shardings = sharding.tree_sharding(job.mesh, shapes)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def create_initial_state(job, make_batches):
    """TrainState at step 0: random or from the files of config.init, created on the mesh.

    Args:
      job: Job.
      make_batches: () -> iterator of global batches, whose first images give the latent statistics if no file does.

    Returns:
      TrainState.
    """
    abstract = abstract_state(job)
    places, opt_states, steps = _read_init(job, abstract)  # files first: a wrong one is found before anything is compiled

    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    state = jax.jit(functools.partial(initial_state, job), out_shardings=shardings)(jax.random.key(job.config["seed"]))
    if "latent_stats" not in places:
        if "vae.params" in places:
            state = _fill(state, "vae.params", jax.device_put(places.pop("vae.params"), shardings.vae.params))
        places["latent_stats"] = _measure_latent_stats(job, state, make_batches)
    for place, average in (("sit.params", "ema.params"), ("latent_stats", "ema.latent_stats")):
        if place in places and average not in places:
            places[average] = jax.tree.map(np.copy, places[place])  # donation refuses two leaves that share one buffer
    for place, tree in places.items():
        state = _fill(state, place, jax.device_put(tree, operator.attrgetter(place)(shardings)))
    for place, (updates, mu, nu) in opt_states.items():
        filled = optax.tree.set(operator.attrgetter(place)(state), count=np.int32(updates), mu=mu, nu=nu)
        state = _fill(state, place, jax.device_put(filled, operator.attrgetter(place)(shardings)))
    stats = state.latent_stats
    logging.info("latent statistics: mean %s, var %s", np.asarray(stats.mean), np.asarray(stats.var))
    return state.replace(step=jax.device_put(jnp.asarray(steps, jnp.int32), shardings.step))


def _fill(state, place, tree):
    """The state with `tree` at a dotted place, such as 'sit.params'."""
    first, _, rest = place.partition(".")
    return state.replace(**{first: _fill(getattr(state, first), rest, tree) if rest else tree})


def _read_init(job, abstract):
    """What the files of config.init hold: (place in the state -> tree, place -> Adam's (updates, mu, nu), steps taken)."""
    init, places, opt_states, steps = job.config["init"], {}, {}, 0
    if init["checkpoint"]:
        places, opt_states, steps = _read_checkpoint(job, abstract)
        for name, place in (("vae", "vae.params"), ("disc", "disc.params"), ("latent_stats", "latent_stats")):
            if init[name] and place in places:
                raise ValueError(f"config.init.{name}={init[name]!r}, but {init['checkpoint']} holds it too: empty one of them")
    if init["vae"]:
        places["vae.params"] = vae_files.read_vae_params(init["vae"], job.nets.vae, abstract.vae.params)
    if init["disc"]:
        target = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
        state_dict = weights.read_state_dict(init["disc"])
        made = mapping.to_flax(discriminator_table(job.nets.disc), state_dict, target, source=init["disc"])
        places |= {f"disc.{name}": tree for name, tree in made.items()}
    if init["latent_stats"]:
        stats = vae_files.read_latent_stats(init["latent_stats"])
        if len(stats["mean"]) != job.latent_shape[-1]:
            raise ValueError(
                f"{init['latent_stats']} has statistics of {len(stats['mean'])} channels; the VAE has {job.latent_shape[-1]}"
            )
        places["latent_stats"] = ChannelStats(**stats)
    return places, opt_states, steps


def _read_checkpoint(job, abstract):
    """As `_read_init`, of a published training checkpoint."""
    source = job.config["init"]["checkpoint"]
    checkpoint = published.read(source)
    for difference in published.check_args(checkpoint.args, job.config, checkpoint.source):
        logging.warning("differs from the run that made %s: %s", checkpoint.source, difference)
    if "vae" not in checkpoint.networks and not job.config["init"]["vae"]:
        asked = checkpoint.args.get("vae_ckpt")
        hint = f" ({asked})" if asked else ""
        raise ValueError(f"{checkpoint.source} holds no VAE: set config.init.vae to the one it was trained on{hint}")
    if job.config["steps"] <= (checkpoint.steps or 0):
        raise ValueError(
            f"{checkpoint.source} has taken {checkpoint.steps} steps already, config.steps is {job.config['steps']}: raise it"
        )
    if layout_of(checkpoint.networks["model"]) == "repa" and not job.config["init"]["latent_stats"]:
        raise ValueError(
            f"{checkpoint.source} has no latent batch norm, as REPA has none: set config.init.latent_stats to the statistics "
            "its latents were normalised with, such as diffusers' folder of its VAE (for 0.18215, stabilityai/sd-vae-ft-ema)"
        )
    stats = {"mean": abstract.latent_stats.mean, "var": abstract.latent_stats.var}
    targets = {"model": {"params": abstract.sit.params, "latent_stats": stats}, "vae": {"params": abstract.vae.params}}
    targets["ema"] = targets["model"]
    if abstract.disc is not None:
        targets["discriminator"] = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
    networks = Networks(sit=job.nets.sit, vae=job.nets.vae, disc=job.nets.disc)
    trees, moments = to_trees(checkpoint, networks, targets)
    places = {PLACES[name][leaf]: tree for name, made in trees.items() for leaf, tree in made.items()}
    for place in ("latent_stats", "ema.latent_stats"):
        if place in places:
            places[place] = ChannelStats(**places[place])
    opt_states = {OPT_STATES[name]: adam for name, adam in moments.items()}
    logging.info("%s: %s after %s steps", checkpoint.source, sorted([*places, *opt_states]), checkpoint.steps)
    return places, opt_states, checkpoint.steps or 0


def _measure_latent_stats(job, state, make_batches):
    """Statistics of the VAE's sampled latents over the first config.init.stats_images images."""

    @jax.jit
    def moments(params, images, key):
        posterior = job.nets.vae.apply({"params": params}, to_float(images), method="encode")
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return latents.mean((0, 1, 2)), jnp.square(latents).mean((0, 1, 2))

    count = -(-job.config["init"]["stats_images"] // job.config["data"]["batch_size"])
    keys = jax.random.split(jax.random.key(job.config["seed"]), count)
    sums = [jax.device_get(moments(state.vae.params, batch["image"], key)) for batch, key in zip(make_batches(), keys)]
    mean, square = (np.mean(np.asarray(column, np.float64), axis=0) for column in zip(*sums))
    return ChannelStats(mean=mean.astype(np.float32), var=(square - mean**2).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------------------------------


def make_source(config):
    """The images of config.data, their labels checked against num_classes."""
    section = plain_config(config)["data"]
    source = data.make_source(section["source"], section["image_size"], **section["options"])
    data.check_labels(source, section["num_classes"])
    return source


def make_loader(job, source, workers=None):
    """Loader of this process's share of every batch, with config.data.workers processes unless told otherwise."""
    section = job.config["data"]
    return Loader(
        source,
        batch_size=section["batch_size"],
        seed=job.config["seed"],
        workers=section["workers"] if workers is None else workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad_fraction=section["max_bad_fraction"],
    )
