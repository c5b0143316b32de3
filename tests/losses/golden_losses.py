"""The discriminator of the golden cases, and the settings of the code that computed them."""

import jax
import jax.numpy as jnp

from checkpoints_tools import mapping
from checkpoints_tools.discriminator import discriminator_table
from repae_jax.models.discriminator import PatchDiscriminator

APRIL_2025 = (0.0, 1.0)  # the range that the code of April 2025 took [-1, 1] images to have


def part(weights, prefix):
    """Returns the weights whose names begin with the prefix, without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def load_discriminator(weights):
    """Returns the discriminator of a golden case, its conversion table and variables."""
    disc = PatchDiscriminator()
    table = discriminator_table(disc)
    shapes = jax.eval_shape(disc.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return disc, table, mapping.to_flax(table, part(weights, "discriminator."), shapes)
