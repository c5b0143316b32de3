"""A training step on given inputs, in the place of those that it would draw."""

from unittest import mock

from repae_jax import train_step
from repae_jax.training import inputs


def repae_step(job, state, x, frozen, recipe=None):
    """Returns `train_step.repae_step` of the job's networks and optimizers on inputs `x`, whose `images` are float32.

    Args:
      job: has .nets, .tx and .recipe.
      x: inputs.Inputs, traced or not.
      recipe: default the job's.
    """
    with mock.patch.object(train_step, "prepare", return_value=x):
        options = {"nets": job.nets, "tx": job.tx, "recipe": recipe or job.recipe}
        return train_step.repae_step(state, None, frozen, None, encoders=None, **options)


def sample(key, step, job, batch_size):
    """Returns the random fields of a step's inputs as `Inputs`, its other fields None."""
    noise = inputs.sample_noise(key, step, (batch_size, *job.latent_shape), job.recipe)
    return inputs.Inputs(images=None, labels=None, targets=(), **noise)
