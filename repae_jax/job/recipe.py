"""Config -> Recipe: the losses and their weights, the objective, and the other numbers that a step needs."""

import functools

from repae_jax import tokenizer_step, train_step
from repae_jax.diffusion import ddpm, interpolant
from repae_jax.job.validate import JOBS, check_names
from repae_jax.losses import adaptive, alignment, regularizers
from repae_jax.training.recipe import Recipe, TokenizerRecipe

OBJECTIVES = (*sorted(interpolant.PATHS), "ddpm")
REDUCTIONS = ("mean", "sum")


def make_recipe(config):
    """The Recipe: losses and their weights, the objective, and what else a step needs to know.

    Args:
      config: nested dict, its fields checked.

    Returns:
      Recipe.

    Raises:
      ValueError: for values out of range or that contradict each other, naming the fields.
    """
    kind, loss, diffusion = JOBS[config["job"]], config["loss"], config.get("diffusion")
    fields, terms = {"vae_weights": {}, "sit_weights": {}}, {}
    if "vae" in loss:
        terms["vae"] = tuple(train_step.VAE_TERMS if "sit" in kind.trains else tokenizer_step.TERMS)
    if diffusion is not None:
        fields["objective"] = _objective(diffusion)
        is_ddpm = diffusion["path"] == "ddpm"
        terms["sit"] = (("noise", "bound") if is_ddpm else ("velocity",)) + tuple(train_step.SIT_TERMS)
        fields["label_dropout"] = diffusion["label_dropout"]
        if "norm_momentum" in diffusion:
            fields["norm_momentum"] = diffusion["norm_momentum"]
    for name, allowed in terms.items():
        named = {term: float(weight) for term, weight in loss[name].items() if weight}
        other = sorted(set(named) & {"velocity", "noise", "bound"} - set(allowed)) if name == "sit" else ()
        if other:
            raise ValueError(
                f"config.loss.sit.{other[0]}={named[other[0]]} does not go with config.diffusion.path={diffusion['path']!r}, "
                f"whose terms are {list(allowed)}: DiT is path 'ddpm' with noise and bound, SiT another path with velocity"
            )
        known = (*allowed, "velocity", "noise", "bound") if name == "sit" else allowed
        unknown = sorted(set(loss[name]) - set(known))
        if unknown:
            raise ValueError(f"config.loss.{name} has unknown terms {unknown}; allowed: {list(allowed)}")
        fields[f"{name}_weights"] = named
    if "sit" in terms and terms["sit"][0] not in fields["sit_weights"]:
        raise ValueError(f"config.loss.sit.{terms['sit'][0]} must not be 0: it is the diffusion loss")
    if "vae" in terms:
        fields |= _vae_recipe(config, fields["vae_weights"])
    if config["job"] == "vae":
        fields |= _tokenizer_recipe(loss, fields["vae_weights"])
    _check_encoders(config, fields)
    if "sit" in terms:
        _check_align_schedule(config, fields)
    if "sit" in terms and loss["align_end"] is not None:
        factor = functools.partial(alignment.schedule_factor, shape=loss["align_shape"], end=loss["align_end"])
        fields["align_factor"] = factor
    kind_of_recipe = TokenizerRecipe if config["job"] == "vae" else Recipe
    return kind_of_recipe(
        **fields,
        flip_probability=config["data"]["flip_probability"],
        accumulation=config["accumulation"],
        ema_decay=config["ema_decay"],
        fixed={name: tuple(section["fixed"]) for name, section in config["optim"].items()},
    )


def _check_align_schedule(config, fields):
    loss = config["loss"]
    where = f"config.loss.align_end={loss['align_end']} and align_shape={loss['align_shape']!r}"
    if loss["align_shape"] not in alignment.SCHEDULES:
        raise ValueError(f"{where}: allowed shapes are {list(alignment.SCHEDULES)}")
    if loss["align_end"] is None and loss["align_shape"] != "constant":
        raise ValueError(f"{where}: a decay needs the step where it ends")
    if loss["align_end"] is not None and not any("align" in fields[f"{name}_weights"] for name in ("vae", "sit")):
        raise ValueError(f"{where}, but no alignment has a weight: leave the end out, or give config.loss.sit.align one")


def _objective(diffusion):
    for name, allowed in (("path", OBJECTIVES), ("time_distribution", interpolant.TIME_DISTRIBUTIONS)):
        if diffusion[name] not in allowed:
            raise ValueError(f"config.diffusion.{name}={diffusion[name]!r} is unknown; allowed: {sorted(allowed)}")
    if diffusion["path"] == "ddpm":
        if diffusion["time_distribution"] != "uniform":
            raise ValueError(
                f"config.diffusion.time_distribution={diffusion['time_distribution']!r} does not go with path='ddpm', whose "
                "timesteps are uniform"
            )
        return ddpm.NoiseObjective()
    return interpolant.VelocityObjective(diffusion["path"], diffusion["time_distribution"])


def _vae_recipe(config, named):
    """Fields of the Recipe that the VAE's loss needs, besides its weights."""
    loss = config["loss"]
    if config["job"] == "repae" and not named:
        raise ValueError("all of config.loss.vae is 0, so config.job='repae' would not train its VAE: take configs/ldm.py")
    if not named and loss["gan_start"] > 0:
        raise ValueError(
            f"config.loss.gan_start={loss['gan_start']}, but all of config.loss.vae is 0: there is nothing to train before it"
        )
    if "diffusion" in named and config["accumulation"] > 1 and config["diffusion"]["norm_momentum"]:
        raise ValueError(
            f"config.loss.vae.diffusion={named['diffusion']} goes through the statistics of the whole batch, which "
            f"config.accumulation={config['accumulation']} divides: set one of them to 0 or 1"
        )
    low, high = config["lpips"]["input_range"]
    if not low < high:
        raise ValueError(f"config.lpips.input_range={(low, high)} must be (low, high), low first")
    return {
        "lpips_input_range": (low, high),
        "gan_start": loss["gan_start"],
        "gan_factor": loss["gan_factor"],
        "lecam_weight": loss["lecam"],
    }


def _tokenizer_recipe(loss, named):
    """Returns the further fields of a TokenizerRecipe."""
    if named and not {"l1", "l2"} & set(named):
        raise ValueError(
            "config.loss.vae needs a reconstruction term: give 'l1' or 'l2' a weight; all weights 0 train the discriminator "
            "alone"
        )
    if loss["pixel_reduction"] not in REDUCTIONS:
        raise ValueError(f"config.loss.pixel_reduction={loss['pixel_reduction']!r} is unknown; allowed: {list(REDUCTIONS)}")
    check_names("config.loss.adaptive", loss["adaptive"], adaptive.ADAPTIVE)
    limits = {term: float(high) for term, high in loss["adaptive"].items() if high}
    for term in limits:
        if term not in named or not set(tokenizer_step.PIXEL_TERMS) & set(named):
            raise ValueError(
                f"config.loss.adaptive.{term}={limits[term]} compares the gradients of config.loss.vae.{term} and of a "
                "reconstruction term: give both a weight, or set it to 0"
            )
    margins = tuple(loss["vf_margins"])
    if "se" in named and not loss["se_factors"]:
        raise ValueError("config.loss.vae.se needs factors, but config.loss.se_factors is empty: give integers, such as (2, 4)")
    factors = tuple(loss["se_factors"])
    scales = tuple(loss["eq_scales"])
    if scales:
        try:
            regularizers.check_scales(scales, loss["eq_prior"])
        except ValueError as error:
            raise ValueError(f"config.loss.eq_scales, eq_prior: {error}") from error
        if not named:
            raise ValueError(f"config.loss.eq_scales={scales} need a trained VAE, but all of config.loss.vae is 0: empty them")
    return {
        "adaptive": limits,
        "vf_margins": margins,
        "se_factors": factors if "se" in named else (),
        "pixel_reduction": loss["pixel_reduction"],
        "eq_scales": scales,
        "eq_prior": loss["eq_prior"],
    }


def _check_encoders(config, fields):
    users = [("vae", "align"), ("vae", "vf"), ("sit", "align")]
    named = [f"config.loss.{name}.{term}" for name, term in users if term in fields[f"{name}_weights"]]
    if named and not config["encoders"]:
        verb, what = ("needs", "its weight") if len(named) == 1 else ("need", "the weights")
        raise ValueError(
            f"{' and '.join(named)} {verb} an encoder, but config.encoders is empty: add one or set {what} to 0"
        )
    if config["encoders"] and not named:
        terms = [f"config.loss.{name}.{term}" for name, term in users if term in config["loss"].get(name, ())]
        state = "are all 0" if len(terms) > 1 else "is 0"
        raise ValueError(f"config.encoders has an encoder, but {' and '.join(terms)} {state}: remove one")
    if "vf" in fields["vae_weights"] and len(config["encoders"]) > 1:
        raise ValueError(
            f"config.loss.vae.vf takes one encoder, config.encoders has {sorted(config['encoders'])}: remove the others"
        )
