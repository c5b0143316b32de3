"""PyTorch's registration order of names: state dicts are written in it, and optimizer states are indexed by it. numpy only."""

from collections.abc import Iterable

import numpy as np

from checkpoints_tools.mapping import Table, Tree, to_torch

# In every module that knows two of these, the first is registered before the second. Numbers count up.
_ORDER = (
    # SiT
    "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final_layer", "bn",
    "linear", "block", "attn", "qkv", "q_norm", "k_norm", "mlp", "fc1", "fc2", "adaLN_modulation", "embedding_table",
    "projection_layer",
    # autoencoder, whose "attn" comes after "block"
    "encoder", "decoder", "quant_conv", "post_quant_conv", "linear_proj",
    "conv_in", "down", "mid", "up", "norm_out", "conv_out", "downsample", "upsample", "block_1", "attn_1", "block_2",
    "norm", "q", "k", "v", "norm1", "conv1", "norm2", "conv2", "nin_shortcut", "conv", "proj_out", "proj",
    # discriminator
    "main",
    # leaves: parameters, then buffers
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
)
_RANK = {name: rank for rank, name in enumerate(_ORDER)}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def registration_order(names: Iterable[str]) -> list[str]:
    """Sorts the names of a SiT's, an autoencoder's or a discriminator's state dict as PyTorch lists them."""
    names = list(names)
    if unknown := [name for name in names if not all(part.isdigit() or part in _RANK for part in name.split("."))]:
        raise ValueError(f"their place in PyTorch's order is unknown: {', '.join(sorted(unknown))}")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else _RANK[part] for part in name.split(".")])


def parameter_order(names: Iterable[str]) -> list[str]:
    """Sorts a state dict's names as `list(module.named_parameters())` has them: entry i is parameter i of its optimizer.

    A SiT's fixed positions are a parameter too, without gradient; a batch norm's statistics and counter are none.
    """
    return [name for name in registration_order(names) if name.rpartition(".")[2] not in _BUFFERS]


def to_ordered_torch(table: Table, tree: Tree) -> dict[str, np.ndarray]:
    """Returns the state dict, see `mapping.to_torch`, in registration order."""
    state_dict = to_torch(table, tree)
    return {name: state_dict[name] for name in registration_order(state_dict)}
