"""PatchGAN: the published names <-> {'params': …, 'batch_stats': …}."""

from typing import Any

import numpy as np

from checkpoints_tools import mapping
from checkpoints_tools.mapping import CONV, Entry, StateDict, Table, counter, linear, norm, running_stats
from repae_jax.models.discriminator import PatchDiscriminator


def discriminator_table(discriminator: PatchDiscriminator, updates: int = 0) -> Table:
    """Table between the published names and {'params', 'batch_stats'}; `updates` goes to all `num_batches_tracked`."""
    last = discriminator.num_layers + 1
    entries, constants = linear("main.0", "params/conv_0", CONV), {}
    for i in range(1, last):
        conv, bn = f"main.{3 * i - 1}", f"main.{3 * i}"
        entries.append(Entry((f"{conv}.weight",), (f"params/conv_{i}/kernel",), CONV))
        entries += [*norm(bn, f"params/norm_{i}"), *running_stats(bn, f"batch_stats/norm_{i}")]
        constants |= counter(bn, updates)
    entries += linear(f"main.{3 * last - 1}", f"params/conv_{last}", CONV)
    return Table(entries, constants)


def from_state_dict(state_dict: StateDict, source: str) -> tuple[PatchDiscriminator, dict[str, Any]]:
    """Returns the discriminator of a published state dict, its sizes inferred, and its float32 variables."""
    shape = np.shape(state_dict.get("main.0.weight", 0))
    convolutions = mapping.count_layers(state_dict, "main") or 12
    module = PatchDiscriminator(channels=shape[0] if shape else 64, num_layers=max(convolutions // 3 - 1, 1))
    target = mapping.abstract_variables(module, (1, module.min_image_size, module.min_image_size, 3))
    return module, mapping.to_flax(discriminator_table(module), state_dict, target, source=source)
