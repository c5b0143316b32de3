"""The AutoencoderKL of diffusers with the weights of ours, to compare ours with."""

from typing import Any

import numpy as np

from checkpoints_tools.mapping import Tree, to_torch
from checkpoints_tools.vae import diffusers_config
from checkpoints_tools.vae_layouts import DIFFUSERS, vae_table, without_projection
from repae_jax.models.autoencoder import AutoencoderKL


def torch_vae(module: AutoencoderKL, params: Tree) -> Any:
    """Returns diffusers' AutoencoderKL with the same weights, in eval mode. NCHW; needs torch and diffusers."""
    import diffusers
    import torch
    module, params = without_projection(module, params)
    config = {name: value for name, value in diffusers_config(module).items() if name != "_class_name"}
    vae = diffusers.AutoencoderKL(**config)
    state_dict = to_torch(vae_table(module, DIFFUSERS), params)
    vae.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, strict=True)
    return vae.eval()
