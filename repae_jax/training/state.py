"""The state that training carries from step to step, and its update at the end of a step."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from repae_jax.losses.adversarial import LeCamEma
from repae_jax.models.channel_stats import ChannelStats, batch_stats, update_running


@struct.dataclass
class Net:
    """One trained network.

    Attributes:
      params: parameter tree, float32.
      opt_state: optax state.
      batch_stats: the discriminator's running statistics; None for the others.
    """

    params: Any
    opt_state: Any
    batch_stats: Any = None


@struct.dataclass
class Ema:
    """Exponential moving averages of the latent statistics and of SiT's parameters.

    In the job that trains a VAE alone, they are of its parameters. REPA-E's VAE has none, as published.
    """

    params: Any
    latent_stats: ChannelStats


@struct.dataclass
class TrainState:
    """The whole state; a network that a job does not train is None.

    Attributes:
      step: steps taken, skipped ones included.
      vae, disc, sit: the networks.
      latent_stats: running statistics of the un-normalized latents.
      lecam: averages of the discriminator's logits.
      ema: averages, which sampling uses; None if only a discriminator is trained.
      averages: further ones by their names, see `averages`; None if there are none.
      skipped: number of updates skipped so far because a loss or gradient was not finite.
      skipped_in_a_row: number of these since the last good update.
    """

    step: Int[Array, ""]
    vae: Net | None
    disc: Net | None
    sit: Net | None
    latent_stats: ChannelStats
    lecam: LeCamEma | None
    ema: Ema | None
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    averages: dict[str, Ema] | None = None


def create_net(params, tx, batch_stats=None) -> Net:
    """Returns a Net with a fresh optimizer state."""
    return Net(params=params, opt_state=tx.init(params), batch_stats=batch_stats)


def create_state(
    *, vae: Net | None, disc: Net | None, sit: Net | None, latent_stats: ChannelStats, averages: Iterable[str] = ()
) -> TrainState:
    """Returns the state at step 0; the averages start as copies, because donation refuses two leaves that share one buffer."""

    def copy(tree):
        return jax.tree.map(jnp.copy, tree)

    def zero():
        return jnp.zeros((), jnp.int32)

    lecam = None if disc is None else LeCamEma(real=jnp.zeros(()), fake=jnp.zeros(()))
    averaged = vae if sit is None else sit
    ema = None if averaged is None else Ema(params=copy(averaged.params), latent_stats=copy(latent_stats))
    return TrainState(
        step=zero(), vae=vae, disc=disc, sit=sit, latent_stats=latent_stats, lecam=lecam,
        ema=ema, skipped=zero(), skipped_in_a_row=zero(), averages={name: copy(ema) for name in averages} or None,
    )  # fmt: skip


def apply_update(net: Net, grads, tx) -> Net:
    """Returns the network after one optimizer step."""
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    return net.replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)


def update_latent_stats(
    running: ChannelStats, latents: Float[Array, "B h w C"], momentum: float
) -> tuple[ChannelStats, ChannelStats | None, dict[str, jax.Array]]:
    """Returns the statistics that normalize this batch in SiT's own loss, the running ones after it, and their metrics.

    Args:
      running: statistics before this batch.
      latents: of the whole batch, un-normalized.
      momentum: weight of the batch; 0 is no batch norm: the initial statistics normalize, and None says that they stay.
    """
    of_batch = batch_stats(latents)
    metrics = {"latents/mean": jnp.mean(of_batch.mean), "latents/std": jnp.mean(jnp.sqrt(of_batch.var))}
    if not momentum:
        return running, None, metrics
    running = update_running(running, of_batch, latents.size // latents.shape[-1], momentum)
    return of_batch, running, metrics | {"latents/running_std": jnp.mean(jnp.sqrt(running.var))}


def update_ema(ema: Ema, params, latent_stats: ChannelStats, decay: float) -> Ema:
    """Returns decay * ema + (1 - decay) * new, over parameters and latent statistics.

    Fixed statistics are averages of themselves, which in float32 would drift: 0.9999 and 0.0001 do not add up to 1.
    """

    def average(old, new):
        return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, old, new)

    stats = ema.latent_stats if latent_stats is None else average(ema.latent_stats, latent_stats)
    return Ema(params=average(ema.params, params), latent_stats=stats)


def update_average(average: Ema, params, latent_stats: ChannelStats | None, weight) -> Ema:
    """Returns average + weight * (new - average), over parameters and latent statistics; None says that these are fixed."""

    def move(old, new):
        return jax.tree.map(lambda old, x: old + weight * (x - old), old, new)

    stats = average.latent_stats if latent_stats is None else move(average.latent_stats, latent_stats)
    return Ema(params=move(average.params, params), latent_stats=stats)


def keep_if_finite(finite, new: TrainState, old: TrainState) -> TrainState:
    """Returns `new` if `finite` (bool scalar) holds, else `old`; step and counters advance in any case."""
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    bad = 1 - finite.astype(jnp.int32)
    return kept.replace(step=old.step + 1, skipped=old.skipped + bad, skipped_in_a_row=(old.skipped_in_a_row + 1) * bad)


def finish_step(state: TrainState, grads, metrics, *, tx, recipe, latent_stats=None, disc_carry=None):
    """Ends a step: optimizers, running statistics, averages. A loss or gradient that is not finite skips all of it.

    Args:
      state: state at which all gradients were taken.
      grads: name of a network -> its gradients; networks that are not named stay.
      metrics: name -> scalar; those that end in '/loss' have to be finite.
      tx: Optimizers.
      recipe: Recipe.
      latent_stats: running statistics after the step; None if they are fixed.
      disc_carry: the discriminator's running statistics and LeCam's averages after the step, if there is one.

    Returns:
      state after the step, metrics with gradient norms (of trained parts, before clipping) and the counters of skipped updates.
    """
    for name, tree in grads.items():
        metrics |= {f"grad_norm/{name}": optax.tree.norm(trained_parts(tree, recipe.fixed.get(name, ())))}
    watched = [value for name, value in metrics.items() if name.startswith("grad_norm/") or name.endswith("/loss")]
    finite = jnp.all(jnp.isfinite(jnp.stack(watched)))
    new = state.replace(**{name: apply_update(getattr(state, name), tree, getattr(tx, name)) for name, tree in grads.items()})
    if latent_stats is not None:
        new = new.replace(latent_stats=latent_stats)
    if disc_carry is not None:
        batch_stats, lecam = disc_carry
        new = new.replace(disc=new.disc.replace(batch_stats=batch_stats), lecam=lecam)
    if state.ema is not None:
        averaged = new.vae if new.sit is None else new.sit
        new = new.replace(ema=update_ema(state.ema, averaged.params, latent_stats, recipe.ema_decay))
        for name, weight in recipe.averages.items():
            average = update_average(state.averages[name], averaged.params, latent_stats, weight(state.step + 1))
            new = new.replace(averages={**new.averages, name: average})
    new = keep_if_finite(finite, new, state)
    counters = {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new, metrics | {name: value.astype(jnp.float32) for name, value in counters.items()}


def trained_parts(tree, fixed):
    """Returns the parts of a parameter tree whose top-level names are not `fixed`."""
    return {name: part for name, part in tree.items() if name not in fixed}
