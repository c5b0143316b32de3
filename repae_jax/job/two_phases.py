"""A run of two phases: REPA-E, then a new SiT on its VAE, frozen. The paper's best result is of such a run (table 9).

The phases are runs of their own, in WORKDIR/joint and WORKDIR/frozen. Between them WORKDIR/e2e-vae is written, the VAE of the
first with the statistics of its latents, as diffusers reads it. Its config.json is written last: where that is, the joint phase
is over.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from checkpoints_tools import convert, identify, vae
from repae_jax import buckets
from repae_jax.data import shards
from repae_jax.distributed import multihost
from repae_jax.job import build, compilation, frozen_weights
from repae_jax.models.vae_families import RAE
from repae_jax.training import checkpoint
from repae_jax.training.phases import PHASES, phases_of
from repae_jax.training.workdir import prepare_workdir

VAE = "e2e-vae"  # in the workdir
# fields of the second phase that the first one gives
GIVEN = ("init.vae", "init.latent_stats", "init.checkpoint", "data.source", "data.options", "data.cache")
_SAME = ("image_size", "num_classes")  # fields of data


def check_words(words: Sequence[str]) -> None:
    """Raises ValueError for a word of the command line that sets one of the fields GIVEN, or a section with some of them."""
    for word in words:
        if not (match := re.match(r"--?then\.([\w.]+)", word)):
            continue
        for name in GIVEN:
            if f"{match[1]}.".startswith(f"{name}."):
                raise ValueError(f"{word}: {_given(name)}")
            if name.startswith(f"{match[1]}."):
                raise ValueError(f"{word}: {_given(name)}, and set the other fields of {match[1]} one by one")


def _given(name):
    remedy = "give --cache_latents=FOLDER instead" if name == "data.cache" else "leave it out"
    return f"the first phase gives config.{name} of the second: {remedy}"


def _check_given(config, then):
    """Raises ValueError for fields of GIVEN in the file of `then` that would be lost; its VAE may be, as rows name one."""
    values = {"init.checkpoint": then["init"]["checkpoint"], "data.cache": then["data"]["cache"]}
    given = config["data"]["options"]
    values |= {f"data.options.{name}": value for name, value in then["data"]["options"].items() if value != given.get(name)}
    for name, value in values.items():
        if value:
            raise ValueError(f"--then has config.{name}={value!r}, but {_given(name)}")


def second_config(config: ConfigDict, then: ConfigDict, workdir: epath.PathLike, cache: str | None = None) -> ConfigDict:
    """Returns the config of the second phase: `then`, on the VAE and the images of the first.

    Args:
      cache: folder for the latents of all images, which the second phase reads then; None for none.

    Raises:
      ValueError: for two configs that are no joint training and a SiT on the same VAE, or a VAE with latents that stay.
    """
    for flag, job, given in (("--config", "repae", config.job), ("--then", "ldm", then.job)):
        if given != job:
            kind = "trains VAE and SiT together" if job == "repae" else "trains a SiT on a frozen VAE"
            raise ValueError(f"{flag} has config.job={given!r}; with --then it has to be {job!r}, which {kind}")
    first = build.plain_config(config)
    with naming_second():
        second = build.plain_config(then)
    fields = [name for name in dict.fromkeys(("family", *first["vae"], *second["vae"])) if name != "remat"]
    pairs = [(f"vae.{name}", first["vae"].get(name), second["vae"].get(name)) for name in fields]
    pairs += [(f"data.{name}", first["data"][name], second["data"][name]) for name in _SAME]
    for name, before, after in pairs:
        if before != after:
            raise ValueError(
                f"--then has config.{name}={after!r}, but --config has {before!r}: the second phase is on VAE and images of "
                "the first; choose the same in both, as in --config configs/repae.py:sit=XL/1,vae=f16d32 --then "
                "configs/ldm.py:model=SiT-XL/1,vae=f16d32"
            )
    if first["vae"].get("family") == RAE:
        raise ValueError(
            f"--config has config.vae.family={RAE!r}, whose encoder is never trained: its latents are the same after the joint "
            "phase; leave out --then, or train with configs/ldm.py alone"
        )
    _check_given(first, second)
    if cache and buckets.is_address(cache):
        raise ValueError(f"--cache_latents={cache}: latents are cached on a local or mounted disk; give a folder there")
    folder = str(epath.Path(workdir) / VAE)
    fields = then.to_dict()
    fields["init"] |= {"vae": folder, "latent_stats": folder, "checkpoint": ""}
    fields["data"] |= {"source": first["data"]["source"], "options": dict(config.data.options), "cache": cache or ""}
    return ConfigDict(fields)


@contextlib.contextmanager
def naming_second() -> Iterator[None]:
    """Context whose ValueErrors say that they are of the second phase, as both configs have the same fields."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--then: {error}") from error


def check_second(config: ConfigDict) -> build.Job:
    """Returns the job of the second phase; raises whatever is wrong with it that can be found before its VAE is there."""
    job = build.build(config)
    compilation.check_compiler_options(job)
    frozen_weights.load_encoders(job)
    return job


def check_cache(folder: str, is_second: bool) -> None:
    """Raises ValueError if the folder cannot be written to or, before the second phase, holds latents, of whatever VAE."""
    try:
        prepare_workdir(folder)
    except ValueError as error:
        raise ValueError(f"--cache_latents={folder}: {error}") from error
    if not is_second and (epath.Path(folder) / shards.SETTINGS).exists():
        raise ValueError(
            f"--cache_latents={folder} holds latents already, but the VAE of this run is not trained yet: give another folder"
        )


def check_workdir(workdir: epath.PathLike, is_of_two: bool) -> None:
    """Raises ValueError if the folder holds a run of one phase where one of two is continued, or the other way round."""
    buckets.check(workdir)
    with buckets.reached(workdir):
        is_of_one, phases = (epath.Path(workdir) / "checkpoints").is_dir(), phases_of(workdir)
    if is_of_two and is_of_one:
        raise ValueError(f"{workdir} is a run of one phase, and --then is for one of two: give another --workdir")
    if not is_of_two and phases:
        folders = " and ".join(PHASES)
        raise ValueError(f"{workdir} is a run of two phases, in its folders {folders}: add --then, or give another --workdir")


def is_handed_over(workdir: epath.PathLike) -> bool:
    """Returns whether the VAE of the joint phase is there, as process 0 sees it."""
    with buckets.reached(workdir):
        return multihost.broadcast_from_process_0((epath.Path(workdir) / VAE / "config.json").exists())


def hand_over(workdir: epath.PathLike) -> None:
    """Writes the VAE of the joint phase, which has ended, for the second one; all processes read it, and process 0 writes."""
    loaded = convert.find_vae(identify.identify(str(epath.Path(workdir) / PHASES[0])))
    if jax.process_index() == 0:
        with buckets.reached(workdir):
            folder = epath.Path(workdir) / VAE
            vae.save_diffusers(folder, loaded.module, loaded.params, loaded.latent_stats, overwrite=True)
    multihost.all_gather(None)


def check_first(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ValueError if the joint phase, which has ended, was another one than the config describes."""
    folder = epath.Path(workdir) / PHASES[0]
    checkpoint.check_config(folder, build.plain_config(config))
    steps = checkpoint.saved_steps(folder)[-1]
    if steps != config.steps:
        raise ValueError(
            f"--config.steps={config.steps}, but the joint phase in {folder} has ended after {steps}, and the second one is on "
            f"its VAE: give {steps}, or another --workdir"
        )
