"""PatchGAN: the published names <-> {'params': …, 'batch_stats': …}."""

import numpy as np

from checkpoints_tools.mapping import CONV, Entry, Table, linear, norm


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
