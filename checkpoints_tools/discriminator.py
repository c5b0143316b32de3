"""PatchGAN: the published names <-> {'params': …, 'batch_stats': …}."""

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools.mapping import CONV, Entry, Table, linear, norm, to_flax
from repae_jax.models.discriminator import PatchDiscriminator


def discriminator_table(discriminator, updates=0):
    """Conversion table of a PatchDiscriminator.

    Args:
      discriminator: the module (its number of layers is read).
      updates: value written for every batch norm's `num_batches_tracked`.

    Returns:
      Table between the published names and {'params', 'batch_stats'}.
    """
    last = discriminator.num_layers + 1
    entries = linear("main.0", "params/conv_0", CONV)
    constants = {}
    for i in range(1, last):
        conv, bn = f"main.{3 * i - 1}", f"main.{3 * i}"
        entries.append(Entry((f"{conv}.weight",), (f"params/conv_{i}/kernel",), CONV))
        entries += norm(bn, f"params/norm_{i}")
        entries.append(Entry((f"{bn}.running_mean",), (f"batch_stats/norm_{i}/mean",)))
        entries.append(Entry((f"{bn}.running_var",), (f"batch_stats/norm_{i}/var",)))
        constants[f"{bn}.num_batches_tracked"] = np.asarray(updates, np.int64)
    entries += linear(f"main.{3 * last - 1}", f"params/conv_{last}", CONV)
    return Table(entries, constants)


def from_state_dict(state_dict, source):
    """The discriminator that a state dict belongs to, its sizes inferred.

    Args:
      state_dict: name -> array, with the published names.
      source: the file's name, for errors.

    Returns:
      (PatchDiscriminator, {'params', 'batch_stats'} of float32 numpy arrays).

    Raises:
      ValueError: listing all that does not fit.
    """
    shape = np.shape(state_dict.get("main.0.weight", 0))
    numbers = [int(part) for name in state_dict for part in name.split(".")[1:2] if part.isdigit()]
    module = PatchDiscriminator(channels=shape[0] if shape else 64, num_layers=max((max(numbers, default=11) + 1) // 3 - 1, 1))
    size = module.min_image_size
    target = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return module, to_flax(discriminator_table(module), state_dict, target, source=source)
