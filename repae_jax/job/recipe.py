"""Config -> Recipe: the losses and their weights, the objective, and the other numbers that a step needs."""

import dataclasses
import functools

from repae_jax import tokenizer_step, train_step
from repae_jax.diffusion import ddpm, interpolant, mean_flow
from repae_jax.losses import alignment
from repae_jax.training.averages import weights_of_new
from repae_jax.training.recipe import Recipe, TokenizerRecipe

OBJECTIVE_TERMS = {  # the first is needed; the head of 'internal' predicts a velocity, too, and 'self' is for flows
    "velocity": ("velocity", "internal", "self"),
    "ddpm": ("noise", "bound"),
    "mean_flow": ("mean_flow",),
}


def make_recipe(config) -> Recipe:
    """Returns the Recipe of a config, a nested dict of checked fields; ValueError names fields that contradict each other."""
    loss, job, fields = config["loss"], config["job"], {}
    vae = _weights(loss, "vae", tokenizer_step.TERMS if job == "vae" else train_step.VAE_TERMS) if "vae" in loss else {}
    sit = _sit_weights(config) if "sit" in loss else {}
    if "vae" in loss:
        fields |= _vae_fields(config, vae)
    if job == "vae":
        fields |= _tokenizer_fields(loss, vae)
    _check_encoders(config, vae, sit)
    if "sit" in loss:
        fields |= _sit_fields(config, is_aligned="align" in {*vae, *sit}) | _self_fields(config, sit)
    fields |= {"flip_probability": config["data"]["flip_probability"], "vae_weights": vae, "sit_weights": sit}
    fields |= {name: config[name] for name in ("accumulation", "ema_decay")}
    fields["averages"] = weights_of_new(config.get("ema_decays", ()), config.get("ema_sigmas", ()))
    fixed = {name: tuple(section["fixed"]) for name, section in config["optim"].items()}
    return (TokenizerRecipe if job == "vae" else Recipe)(**fields, fixed=fixed)


def _weights(loss, network, allowed, others=()):
    """Returns the weights of a network's loss that are not 0; terms in `others` may be there with weight 0."""
    unknown = sorted(set(loss[network]) - {*allowed, *others})
    if unknown:
        raise ValueError(f"config.loss.{network} has unknown terms {unknown}; allowed: {list(allowed)}")
    return {term: float(weight) for term, weight in loss[network].items() if weight}


def _sit_weights(config):
    kind, path = _objective_kind(config["diffusion"]), config["diffusion"]["path"]
    own, others = OBJECTIVE_TERMS[kind], [term for name in OBJECTIVE_TERMS if name != kind for term in OBJECTIVE_TERMS[name]]
    allowed = [*own, *(term for term in train_step.SIT_TERMS if term not in (*own, *others))]
    named = _weights(config["loss"], "sit", allowed, others)
    if wrong := sorted(set(named) & set(others)):
        objective = "config.diffusion.mean_flow" if kind == "mean_flow" else f"config.diffusion.path={path!r}"
        raise ValueError(
            f"config.loss.sit.{wrong[0]}={named[wrong[0]]} does not go with {objective}, whose terms are {allowed}: DiT is "
            "path 'ddpm' with noise and bound, SiT another path with velocity, MeanFlow a section mean_flow with mean_flow"
        )
    if own[0] not in named:
        raise ValueError(f"config.loss.sit.{own[0]} must not be 0: it is the diffusion loss")
    return named


def _sit_fields(config, is_aligned):
    """Returns the fields that SiT's objective and its schedules need."""
    loss, diffusion = config["loss"], config["diffusion"]
    fields = {name: diffusion[name] for name in ("label_dropout", "norm_momentum") if name in diffusion}
    fields["objective"] = _objective(config)
    shape, end = loss["align_shape"], loss["align_end"]
    if end is None:
        return fields
    if not is_aligned:
        raise ValueError(
            f"config.loss.align_end={end} and align_shape={shape!r}, but no alignment has a weight: leave the end out, or give "
            "config.loss.sit.align one"
        )
    return fields | {"align_factor": functools.partial(alignment.schedule_factor, shape=shape, end=end)}


def _self_fields(config, named):
    """Returns the fields of the alignment with the averaged SiT."""
    depth = config["loss"].get("self_depth")
    if ("self" in named) != (depth is not None):
        raise ValueError(
            f"config.loss.sit.self={named.get('self', 0)} and config.loss.self_depth={depth}: the term aligns with the tokens "
            "of the averaged SiT after that block; give both, or weight 0 and None"
        )
    return {"self_depth": depth} if depth else {}


def _objective_kind(diffusion):
    """Returns a name in OBJECTIVE_TERMS."""
    return "mean_flow" if "mean_flow" in diffusion else "ddpm" if diffusion["path"] == "ddpm" else "velocity"


def _objective(config):
    diffusion = config["diffusion"]
    match _objective_kind(diffusion):
        case "mean_flow":
            return mean_flow.MeanFlow(**diffusion["mean_flow"])
        case "ddpm":
            return ddpm.NoiseObjective()
        case _:
            objective = interpolant.OBJECTIVES[diffusion.get("predicts", "velocity")]
            given = {field.name for field in dataclasses.fields(objective)} & set(diffusion)
            sizes = {"patch_size": config["sit"]["patch_size"]} if diffusion.get("second_time_share") else {}
            return objective(**{name: diffusion[name] for name in given}, **sizes)


def _vae_fields(config, named):
    """Returns the fields that the VAE's loss needs, besides its weights."""
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
    own = {name: loss[name] for name in ("gan_start", "gan_factor")}
    return {**own, "lecam_weight": loss["lecam"], "lpips_input_range": config["lpips"]["input_range"]}


def _tokenizer_fields(loss, named):
    """Returns the further fields of a TokenizerRecipe."""
    if named and not {"l1", "l2"} & set(named):
        raise ValueError(
            "config.loss.vae needs a reconstruction term: give 'l1' or 'l2' a weight; all weights 0 train the discriminator "
            "alone"
        )
    limits = {term: float(high) for term, high in loss["adaptive"].items() if high}
    for term in limits:
        if term not in named or not set(tokenizer_step.PIXEL_TERMS) & set(named):
            raise ValueError(
                f"config.loss.adaptive.{term}={limits[term]} compares the gradients of config.loss.vae.{term} and of a "
                "reconstruction term: give both a weight, or set it to 0"
            )
    if "se" in named and not loss["se_factors"]:
        raise ValueError("config.loss.vae.se needs factors, but config.loss.se_factors is empty: give integers, such as (2, 4)")
    scales = loss["eq_scales"]
    if scales and not named:
        raise ValueError(f"config.loss.eq_scales={scales} need a trained VAE, but all of config.loss.vae is 0: empty them")
    own = {name: loss[name] for name in ("vf_margins", "pixel_reduction", "eq_scales", "eq_prior")}
    return {**own, "adaptive": limits, "se_factors": loss["se_factors"] if "se" in named else ()}


def _check_encoders(config, vae, sit):
    users = [("vae", "align", vae), ("vae", "vf", vae), ("sit", "align", sit)]
    named = [f"config.loss.{name}.{term}" for name, term, weights in users if term in weights]
    if named and not config["encoders"]:
        verb, what = ("needs", "its weight") if len(named) == 1 else ("need", "the weights")
        raise ValueError(f"{' and '.join(named)} {verb} an encoder, but config.encoders is empty: add one or set {what} to 0")
    if config["encoders"] and not named:
        terms = [f"config.loss.{name}.{term}" for name, term, _ in users if term in config["loss"].get(name, ())]
        state = "are all 0" if len(terms) > 1 else "is 0"
        raise ValueError(f"config.encoders has an encoder, but {' and '.join(terms)} {state}: remove one")
    if "vf" in vae and len(config["encoders"]) > 1:
        names = sorted(config["encoders"])
        raise ValueError(f"config.loss.vae.vf takes one encoder, config.encoders has {names}: remove the others")
