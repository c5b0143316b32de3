"""Config -> networks, optimizers, frozen weights, step and initial state. No file below reads config names but entry points.

Everything that can be wrong with a config is found here and in `config_rules`, before anything is compiled.
"""

import dataclasses
import functools
import operator
import os
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
from repae_jax import data
from repae_jax.data.latents import CachedLatents, WithMoments, check_cache
from repae_jax.data.loader import Loader
from repae_jax.diffusion.samplers import Sampling, check_sampler
from repae_jax.distributed import multihost, sharding
from repae_jax.images import to_float
from repae_jax.job import validate as rules
from repae_jax.job.recipe import make_recipe
from repae_jax.models import encoders as features
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT
from repae_jax.training.networks import Nets, bind
from repae_jax.training.recipe import Optimizers, Recipe, TokenizerRecipe
from repae_jax.training.state import create_net, create_state

RANDOM = "random"  # instead of a weight file: to measure speed, or for tests
ENCODER_FIELDS = {"architecture", "weights", "image_size", "spatial_gamma"}
# of the step, by platform: on CPUs XLA takes YNNPACK's matrix products, sums and convolutions; its own convolutions are faster
_YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": _YNNPACK}}


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, built.

    Attributes:
      config: the config as nested plain values, as stored in checkpoints.
      nets: Nets.
      encoders: tuple of features.Encoder.
      tx: Optimizers.
      recipe: Recipe.
      sampling: Sampling of the training pictures; None without a SiT.
      latent_shape: (h, w, C).
      mesh: device mesh.
    """

    config: Mapping[str, Any]
    nets: Nets
    encoders: tuple[features.Encoder, ...]
    tx: Optimizers
    recipe: Recipe
    sampling: Sampling | None
    latent_shape: tuple[int, int, int]
    mesh: jax.sharding.Mesh

    @property
    def frozen_vae(self) -> bool:
        """Whether the VAE is an input, `frozen['vae']`, and no part of the state."""
        return self.tx.vae is None

    @property
    def step(self) -> Callable:
        """(state, batch, frozen, key) -> (state, metrics), not yet jitted."""
        fields = {"nets": bind(self.nets), "encoders": self.encoders, "tx": self.tx, "recipe": self.recipe}
        return functools.partial(rules.JOBS[self.config["job"]].step, **fields)


def plain_config(config):
    """Nested dict of plain values of a ConfigDict, tuples kept; placeholders are None. Raises, changes: `rules.checked`."""
    return rules.checked(config.to_dict() if hasattr(config, "to_dict") else dict(config))


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
    kind = rules.check_fields(config)
    recipe = make_recipe(config)
    mesh = sharding.make_mesh(config["mesh"]["fsdp"], devices, config["mesh"]["slices"])
    sharding.check_batch(config["data"]["batch_size"], config["accumulation"], mesh)
    dtype = rules.compute_dtype("compute", config)
    if encoders is None:
        encoders = tuple(_describe_encoder(name, config) for name in sorted(config["encoders"]))
    feature_dims = tuple(encoder.module.hidden_size for encoder in encoders)
    vf_dim = feature_dims[0] if "vf" in recipe.vae_weights and encoders else None
    vae = rules.construct("config.vae", AutoencoderKL, _tuples(config["vae"]), dtype=dtype, feature_dim=vf_dim)
    latent_shape = rules.latent_shape(config, vae)
    scales = ()
    if isinstance(recipe, TokenizerRecipe):
        rules.check_scales(config, recipe, latent_shape)
        scales = recipe.eq_scales
    sit = sampling = None
    if "sit" in kind.trains:
        for encoder in encoders:
            features.check_grid(encoder, latent_shape[0] // config["sit"]["patch_size"])
        sit = rules.construct(
            "config.sit", SiT, config["sit"], dtype=dtype, num_classes=config["data"]["num_classes"],
            latent_channels=vae.latent_channels, feature_dims=feature_dims,
        )  # fmt: skip
        rules.check_sigma(config, sit, recipe.objective)
        sampling = rules.construct("config.sampling", Sampling, config["sampling"])
        check_sampler(sampling, recipe.objective)
    if vf_dim is not None and encoders[0].grid != latent_shape[0]:
        raise ValueError(
            f"config.loss.vae.vf compares each of the {latent_shape[0]} x {latent_shape[0]} latent positions with a token, but "
            f"config.encoders.{min(config['encoders'])} gives {encoders[0].grid} x {encoders[0].grid}: set its image_size to "
            f"{latent_shape[0] * encoders[0].module.patch_size}"
        )
    trains = [name for name in kind.trains if name != "vae" or recipe.vae_weights]
    disc = lpips = None
    if "disc" in trains and "gan" not in recipe.vae_weights and recipe.vae_weights:
        trains.remove("disc")
        for name, value in (("loss.lecam", config["loss"]["lecam"]), ("init.disc", config["init"]["disc"])):
            if value:
                raise ValueError(
                    f"config.{name}={value!r} needs a discriminator, but config.loss.vae.gan is 0: change one of them"
                )
    if "disc" in trains:
        disc = rules.construct("config.disc", PatchDiscriminator, config["disc"], dtype=dtype)
        smallest = round(config["data"]["image_size"] * min(scales, default=1))
        if smallest < disc.min_image_size:
            raise ValueError(
                f"config.disc.num_layers={disc.num_layers} leaves no logit of config.data.image_size="
                f"{config['data']['image_size']} pixels{f' at the scale {min(scales)}' if scales else ''}; "
                f"lower num_layers, or use {disc.min_image_size} pixels or more"
            )
    if "lpips" in recipe.vae_weights:
        lpips = LPIPS(dtype=rules.compute_dtype("lpips", config))
    tx = dict.fromkeys(Optimizers._fields)
    for name in kind.trains:
        fields = config["optim"][name]
        if name == "sit" and not sit.learned_positions:
            fields = {**fields, "fixed": (*fields["fixed"], "pos_embed")}
        made = rules.construct(f"config.optim.{name}", rules.optimizer, fields)
        tx[name] = made if name in trains else None
    job = Job(
        config=config,
        nets=Nets(vae=vae, sit=sit, disc=disc, lpips=lpips),
        encoders=encoders,
        tx=Optimizers(**tx),
        recipe=recipe,
        sampling=sampling,
        latent_shape=latent_shape,
        mesh=mesh,
    )
    shapes = jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))  # checks of the networks, uncompiled
    for name in trains:
        parts = set(getattr(shapes, name).params)
        fixed = set(recipe.fixed[name])
        if fixed - parts or fixed >= parts:
            raise ValueError(f"config.optim.{name}.fixed={sorted(fixed)}; allowed: some, not all, of {sorted(parts)}")
    for term, part in (("gan", "decoder"), ("vf", "encoder")):
        if isinstance(recipe, TokenizerRecipe) and term in recipe.adaptive and part in recipe.fixed["vae"]:
            raise ValueError(
                f"config.loss.adaptive.{term}={recipe.adaptive[term]} compares gradients in the {part}, which "
                "config.optim.vae.fixed keeps as it is: change one of them"
            )
    rules.warn_of_ablations(config["job"], recipe)
    return job


def _tuples(section):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Frozen weights.
# ---------------------------------------------------------------------------------------------------------------------


def _describe_encoder(name, config):
    """features.Encoder of one entry, from its architecture or its folder's config.json."""
    fields = config["encoders"][name]
    rules.check_names(f"config.encoders.{name}", fields, ENCODER_FIELDS)
    where, path, resolution = f"config.encoders.{name}", fields["weights"], config["data"]["image_size"]
    if not path:
        raise ValueError(
            f"{where}.weights is empty: give a Hugging Face name or folder, or {RANDOM!r} for tests and benchmarks"
        )
    dtype = rules.compute_dtype("compute", config)
    if fields["architecture"]:
        described = features.make_encoder(fields["architecture"], resolution, image_size=fields["image_size"], dtype=dtype)
    elif path == RANDOM:
        raise ValueError(
            f"{where}.architecture must be set when the weights are {RANDOM!r}; allowed: {list(features.ARCHITECTURES)}"
        )
    else:
        described = load_encoder(path, resolution, fields["image_size"], dtype)[0]
    return dataclasses.replace(described, spatial_gamma=fields["spatial_gamma"])


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
    if set(files.values()) == {RANDOM}:
        logging.warning("LPIPS has RANDOM weights: for tests and benchmarks only")
        return jax.jit(functools.partial(_random_lpips, job))(jax.random.key(0))
    for name, path in files.items():
        if path == RANDOM or (not path and name == "vgg16"):  # one file may hold the whole module
            raise ValueError(
                f"config.lpips.{name}={path!r}: config.loss.vae.lpips needs torchvision's VGG16 weights (vgg16) and the linear "
                f"weights of LPIPS v0.1 (linear); give both files, or {RANDOM!r} for both, or set config.loss.vae.lpips=0"
            )
    return load_lpips(files["vgg16"], files["linear"])


def _random_lpips(job, key):
    return job.nets.lpips.init(key, *[jnp.zeros((1, 32, 32, 3))] * 2)["params"]


def load_frozen_vae(job):
    """Parameters of the frozen VAE, replicated on the mesh."""
    path, init = job.config["init"]["vae"], functools.partial(initial_vae, job)
    if path == RANDOM:
        logging.warning("the frozen VAE has RANDOM weights: for tests and benchmarks only")
        return jax.jit(init, out_shardings=sharding.replicated(job.mesh))(jax.random.key(0))
    if not path:
        raise ValueError(
            f"config.init.vae is empty, but the VAE is not trained (config.job={job.config['job']!r}): give its "
            f"file, such as REPA-E/e2e-vavae/e2e-vavae-400k.pt, or {RANDOM!r} for tests and benchmarks"
        )
    params = vae_files.read_vae_params(path, job.nets.vae, jax.eval_shape(init, jax.random.key(0)))
    return _put_weights(job, params, sharding.replicated(job.mesh))


def load_frozen(job):
    """Frozen parameters, on the mesh by the rule of `sharding`: {'encoders': tuple, 'lpips': tree or None, 'vae': or None}."""
    frozen = {
        "vae": load_frozen_vae(job) if job.frozen_vae else None,
        "encoders": tuple(
            _encoder_params(name, encoder, job.config) for name, encoder in zip(sorted(job.config["encoders"]), job.encoders)
        ),
        "lpips": None if job.nets.lpips is None else _lpips_params(job),
    }
    return _put_weights(job, frozen, sharding.tree_sharding(job.mesh, frozen))


def _put_weights(job, tree, shardings):
    """The tree on the mesh; ValueError if processes that share the mesh have read different weights."""
    if job.mesh.is_multi_process:
        multihost.assert_same(weights=sharding.local_checksums(tree))
    return sharding.put(tree, shardings)


# ---------------------------------------------------------------------------------------------------------------------
# State.
# ---------------------------------------------------------------------------------------------------------------------


def initial_vae(job, key):
    """Parameters of the VAE from scratch; a pure function of the key."""
    size = job.config["data"]["image_size"]
    return job.nets.vae.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, *job.latent_shape)))["params"]


def initial_state(job, key):
    """TrainState from scratch, latent statistics 0 and 1; a pure function of the key."""
    nets, tx, size, c = job.nets, job.tx, job.config["data"]["image_size"], job.latent_shape[-1]
    keys = dict(zip(("vae", "disc", "sit"), jax.random.split(key, 3)))
    vae = sit = disc = None
    if tx.vae is not None:
        vae = create_net(initial_vae(job, keys["vae"]), tx.vae)
    if tx.sit is not None:
        inputs = jnp.zeros((1, *job.latent_shape)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
        sit = create_net(nets.sit.init(keys["sit"], *inputs)["params"], tx.sit)
    if nets.disc is not None:
        variables = nets.disc.init(keys["disc"], jnp.zeros((1, size, size, 3)))
        disc = create_net(variables["params"], tx.disc, variables["batch_stats"])
    return create_state(
        vae=vae,
        disc=disc,
        sit=sit,
        latent_stats=ChannelStats(mean=jnp.zeros((c,)), var=jnp.ones((c,))),
    )


def abstract_state(job):
    """Shapes, dtypes and shardings of the TrainState; computes nothing."""
    shapes = jax.eval_shape(functools.partial(initial_state, job), jax.random.key(0))
    shardings = sharding.tree_sharding(job.mesh, shapes)
    return jax.tree.map(_abstract, shapes, shardings)


def check_compiler_options(job):
    """ValueError if the compiler for the mesh's devices does not take `compiler_options`."""
    options = compiler_options(job)
    if options is None:
        return
    try:
        jax.jit(lambda: 0, out_shardings=sharding.replicated(job.mesh), compiler_options=options).lower().compile()
    except (RuntimeError, TypeError) as error:  # of XLA, of JAX
        said = str(error).splitlines()[0]
        given = job.config["compiler_options"]
        raise ValueError(f"config.compiler_options={given!r}, which makes the compiler's {options}: {said}") from error


def compiler_options(job):
    """Options of XLA for the step or a part of it: config.compiler_options and, unless these or XLA_FLAGS name them, those that
    the platform's compiler should have; or None."""
    options = _COMPILER_OPTIONS.get(job.mesh.devices.flat[0].platform, {})
    flags = os.environ.get("XLA_FLAGS", "")
    own = {name: value for name, value in options.items() if name not in flags}
    return {**own, **rules.compiler_options(job.config)} or None


def jit_step(job, state):
    """The step as training, benchmark and plan compile it: the state is donated, the metrics are everywhere.

    Args:
      job: Job.
      state: TrainState, or its shapes, on the job's mesh; the new one is placed as it is.

    Returns:
      Jitted function of (state, batch, frozen, key).
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = sharding.with_mesh_context(job.mesh, job.step)
    outs = shardings, sharding.replicated(job.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=outs, compiler_options=compiler_options(job))


def abstract_inputs(job):
    """What a step takes besides the state: shapes, dtypes and shardings; reads and computes nothing.

    Args:
      job: Job.

    Returns:
      (batch, frozen, key), as the steps of `train_step` take them.
    """
    section, key = job.config["data"], jax.random.key(0)
    size, batch_size, rows = section["image_size"], section["batch_size"], sharding.batch_sharding(job.mesh)
    frozen = {
        "vae": jax.eval_shape(functools.partial(initial_vae, job), key) if job.frozen_vae else None,
        "encoders": tuple(jax.eval_shape(functools.partial(features.init_params, encoder), key) for encoder in job.encoders),
        "lpips": None if job.nets.lpips is None else jax.eval_shape(functools.partial(_random_lpips, job), key),
    }
    frozen = jax.tree.map(_abstract, frozen, sharding.tree_sharding(job.mesh, frozen))
    batch = {"label": ((), jnp.int32)}
    if job.encoders or not section["cache"]:
        batch["image"] = ((size, size, 3), jnp.uint8)
    if section["cache"]:
        *grid, c = job.latent_shape
        batch["moments"] = ((2,) * bool(section["flip_probability"]) + (*grid, 2 * c), jnp.float32)
    batch = {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows) for name, (shape, dtype) in batch.items()}
    return batch, frozen, jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(job.mesh))


def _abstract(leaf, placed):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


def create_initial_state(job, frozen, make_batches):
    """TrainState at step 0: random or from the files of config.init, created on the mesh.

    Args:
      job: Job.
      frozen: what `load_frozen` returns.
      make_batches: () -> iterator of global batches, whose first images give the latent statistics if no file does.

    Returns:
      TrainState.
    """
    abstract = abstract_state(job)
    places, opt_states, steps = _read_init(job, abstract)  # files first: a wrong one is found before anything is compiled

    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    state = jax.jit(functools.partial(initial_state, job), out_shardings=shardings)(jax.random.key(job.config["seed"]))
    if "vae.params" in places:  # VA-VAE's map from latents to tokens, which a file may lack, stays as it was drawn
        places["vae.params"] = {**state.vae.params, **places["vae.params"]}
    if "latent_stats" not in places and state.sit is not None:
        if "vae.params" in places:
            state = _fill(state, "vae.params", _put_weights(job, places.pop("vae.params"), shardings.vae.params))
        vae_params = frozen["vae"] if job.frozen_vae else state.vae.params
        places["latent_stats"] = _measure_latent_stats(job, vae_params, make_batches)
    averaged = "vae.params" if state.sit is None else "sit.params"
    for place, average in ((averaged, "ema.params"), ("latent_stats", "ema.latent_stats")):
        if place in places and average not in places and state.ema is not None:
            # donation refuses two leaves that share one buffer
            places[average] = jax.tree.map(operator.methodcaller("copy"), places[place])
    for place, tree in places.items():
        state = _fill(state, place, _put_weights(job, tree, operator.attrgetter(place)(shardings)))
    for place, (updates, mu, nu) in opt_states.items():
        filled = optax.tree.set(operator.attrgetter(place)(state), count=np.int32(updates), mu=mu, nu=nu)
        state = _fill(state, place, _put_weights(job, filled, operator.attrgetter(place)(shardings)))
    stats = state.latent_stats
    logging.info("latent statistics: mean %s, var %s", np.asarray(stats.mean), np.asarray(stats.var))
    return state.replace(step=sharding.put(np.int32(steps), shardings.step))


def _fill(state, place, tree):
    """The state with `tree` at a dotted place, such as 'sit.params'."""
    first, _, rest = place.partition(".")
    return state.replace(**{first: _fill(getattr(state, first), rest, tree) if rest else tree})


def _read_init(job, abstract):
    """What the files of config.init hold: (place in the state -> tree, place -> Adam's (updates, mu, nu), steps taken)."""
    init, places, opt_states, steps = job.config["init"], {}, {}, 0
    if init.get("checkpoint"):
        places, opt_states, steps = _read_checkpoint(job, abstract)
        for name, place in (("vae", "vae.params"), ("disc", "disc.params"), ("latent_stats", "latent_stats")):
            if init.get(name) and place in places:
                raise ValueError(f"config.init.{name}={init[name]!r}, but {init['checkpoint']} holds it too: empty one of them")
    if init["vae"] and not job.frozen_vae:
        places["vae.params"] = vae_files.read_vae_params(init["vae"], job.nets.vae, abstract.vae.params)
    if init.get("disc"):
        target = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
        state_dict = weights.read_state_dict(init["disc"])
        made = mapping.to_flax(discriminator_table(job.nets.disc), state_dict, target, source=init["disc"])
        places |= {f"disc.{name}": tree for name, tree in made.items()}
    if init.get("latent_stats"):
        stats = vae_files.read_latent_stats(init["latent_stats"])
        if len(stats["mean"]) != job.latent_shape[-1]:
            raise ValueError(
                f"{init['latent_stats']} has statistics of {len(stats['mean'])} channels; the VAE has {job.latent_shape[-1]}"
            )
        places["latent_stats"] = ChannelStats(**stats)
    elif job.config["data"]["cache"] and "latent_stats" not in places:
        places["latent_stats"] = ChannelStats(**CachedLatents(job.config["data"]["cache"]).latent_stats)
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
    stats = {"mean": abstract.latent_stats.mean, "var": abstract.latent_stats.var}
    targets = {"model": {"params": abstract.sit.params, "latent_stats": stats}}
    targets["ema"] = targets["model"]
    if abstract.vae is not None:
        targets["vae"] = {"params": abstract.vae.params}
    if abstract.disc is not None:
        targets["discriminator"] = {"params": abstract.disc.params, "batch_stats": abstract.disc.batch_stats}
    networks = Networks(sit=job.nets.sit, vae=None if job.frozen_vae else job.nets.vae, disc=job.nets.disc)
    trees, moments = to_trees(checkpoint, networks, targets)
    if layout_of(checkpoint.networks["model"]) != "repae" and not job.config["init"]["latent_stats"]:
        raise ValueError(
            f"{checkpoint.source} has no latent batch norm, as REPA and DiT have none: set config.init.latent_stats to the "
            "statistics its latents were normalised with, such as diffusers' folder of its VAE (for 0.18215, "
            "stabilityai/sd-vae-ft-ema)"
        )
    places = {PLACES[name][leaf]: tree for name, made in trees.items() for leaf, tree in made.items()}
    for place in ("latent_stats", "ema.latent_stats"):
        if place in places:
            places[place] = ChannelStats(**places[place])
    opt_states = {OPT_STATES[name]: adam for name, adam in moments.items()}
    logging.info("%s: %s after %s steps", checkpoint.source, sorted([*places, *opt_states]), checkpoint.steps)
    return places, opt_states, checkpoint.steps or 0


def _measure_latent_stats(job, vae_params, make_batches):
    """Statistics of the VAE's sampled latents over the first config.init.stats_images images."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(job.mesh))
    def moments(params, images, key):
        posterior = job.nets.vae.apply({"params": params}, to_float(images), method="encode")
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        return latents.mean((0, 1, 2)), jnp.square(latents).mean((0, 1, 2))

    count = -(-job.config["init"]["stats_images"] // job.config["data"]["batch_size"])
    keys = jax.random.split(jax.random.key(job.config["seed"]), count)
    sums = [jax.device_get(moments(vae_params, batch["image"], key)) for batch, key in zip(make_batches(), keys)]
    mean, square = (np.mean(np.asarray(column, np.float64), axis=0) for column in zip(*sums))
    return ChannelStats(mean=mean.astype(np.float32), var=(square - mean**2).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------------------------------


def make_images(config):
    """The images of config.data, their labels checked against num_classes."""
    section = plain_config(config)["data"]
    source = data.make_source(section["source"], section["image_size"], **section["options"])
    data.check_labels(source, section["num_classes"])
    return source


def make_cached_source(job, frozen_vae):
    """Latents from config.data.cache, with their images if there are encoders to show them to.

    Args:
      job: Job.
      frozen_vae: fingerprint of the frozen VAE, whose cache it must be.
    """
    section = job.config["data"]
    cache = CachedLatents(section["cache"])
    check_cache(cache, frozen_vae, job.latent_shape, section["image_size"])
    if bool(section["flip_probability"]) != cache.flips:
        raise ValueError(
            f"config.data.flip_probability={section['flip_probability']}, but {section['cache']} was made "
            f"{'with' if cache.flips else 'without'} mirrored images: change the probability, or make a cache "
            f"{'without' if cache.flips else 'with'} --flips"
        )
    data.check_labels(cache, section["num_classes"])
    return WithMoments(make_images(job.config), cache) if job.encoders else cache


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
