"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repae_jax.losses.adversarial import LeCamEma
from repae_jax.models.channel_stats import ChannelStats


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
    """Exponential moving averages: of the latent statistics and of a network's parameters, SiT's; the VAE's in the job that
    trains it alone. REPA-E's VAE has none, as published."""

    params: Any
    latent_stats: ChannelStats


@struct.dataclass
class TrainState:
    """The whole state; a network a job does not train is None.

    Attributes:
      step: int32, steps taken, skipped ones included.
      vae, disc, sit: the networks.
      latent_stats: running statistics of the un-normalised latents, [C].
      lecam: averages of the discriminator's logits.
      ema: what sampling uses.
      skipped: int32, updates skipped so far because a loss or gradient was not finite.
      skipped_in_a_row: int32, how many of them came last, without a good one since.
    """

    step: jax.Array
    vae: Net | None
    disc: Net | None
    sit: Net | None
    latent_stats: ChannelStats
    lecam: LeCamEma | None
    ema: Ema | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def create_net(params, tx, batch_stats=None):
    """Net with a fresh optimizer state."""
    return Net(params=params, opt_state=tx.init(params), batch_stats=batch_stats)


def create_state(*, vae, disc, sit, latent_stats):
    """TrainState at step 0.

    Args:
      vae: Net or None.
      disc: Net or None.
      sit: Net or None.
      latent_stats: ChannelStats the VAE starts with.

    Returns:
      TrainState. The averages start as copies: donation refuses two leaves that share one buffer.
    """

    def copy(tree):
        return jax.tree.map(jnp.copy, tree)

    def zero():
        return jnp.zeros((), jnp.int32)

    lecam = None if disc is None else LeCamEma(real=jnp.zeros(()), fake=jnp.zeros(()))
    averaged = vae if sit is None else sit
    ema = None if averaged is None else Ema(params=copy(averaged.params), latent_stats=copy(latent_stats))
    return TrainState(
        step=zero(), vae=vae, disc=disc, sit=sit, latent_stats=latent_stats, lecam=lecam,
        ema=ema, skipped=zero(), skipped_in_a_row=zero(),
    )  # fmt: skip


def apply_update(net, grads, tx):
    """One optimizer step; returns the Net with new parameters and optimizer state."""
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    return net.replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)


def update_ema(ema, params, latent_stats, decay):
    """decay * ema + (1 - decay) * new, over parameters and latent statistics; these are None where they are fixed."""

    def average(old, new):
        return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, old, new)

    # an average of equal numbers would drift: in float32, 0.9999 and 0.0001 do not make 1
    stats = ema.latent_stats if latent_stats is None else average(ema.latent_stats, latent_stats)
    return Ema(params=average(ema.params, params), latent_stats=stats)


def keep_if_finite(finite, new, old):
    """`new` where `finite` (bool scalar) holds, otherwise `old` unchanged, with the step and the counters advanced.

    Args:
      finite: whether every loss and gradient of the step was finite.
      new: TrainState after the updates.
      old: TrainState before.

    Returns:
      TrainState.
    """
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    bad = 1 - finite.astype(jnp.int32)
    return kept.replace(step=old.step + 1, skipped=old.skipped + bad, skipped_in_a_row=(old.skipped_in_a_row + 1) * bad)
