"""Small networks of the feature spaces, of the sizes of the golden values."""

import dataclasses

from repae_jax.models.convnext import ConvNextV2
from repae_jax.models.feature_spaces import SPACES

WIDTH, DEPTH, HEADS = 24, 2, 4


def small_space(name, pixels=64, **fields):
    """A space of SPACES with a small network, whose images have so many pixels."""
    space = SPACES[name]
    if isinstance(space.module, ConvNextV2):
        module = ConvNextV2((1, 1, 2, 1), (4, 8, 12, 16))
        return dataclasses.replace(space, module=module, size=16, pixels=pixels)
    side = -(-pixels // fields.get("patch_size", space.module.vit.patch_size))
    sizes = {"hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_dim": 4 * WIDTH, "grid": (side, side), **fields}
    projection = space.module.projection and 10
    module = space.module.clone(vit=space.module.vit.clone(**sizes), projection=projection)
    return dataclasses.replace(space, module=module, size=projection or WIDTH, pixels=pixels)
