"""SiT: the published REPA-E state dict <-> {'params': …, 'latent_stats': …}."""

import numpy as np

from checkpoints_tools.mapping import COPY, LINEAR, Entry, Table, linear, norm, patch_embedding, stack
from repae_jax.models.layers import sincos_position_embedding


def sit_table(sit, grid, updates=0):
    """Conversion table of a SiT and its latent batch norm.

    Args:
      sit: the SiT module (its sizes are read).
      grid: tokens per side.
      updates: value written for the batch norm's `num_batches_tracked`.

    Returns:
      Table between the published names and {'params': SiT parameters, 'latent_stats': {'mean', 'var'}}.
    """
    block = []
    for kind, layout in (("weight", LINEAR), ("bias", COPY)):
        leaf = "kernel" if kind == "weight" else "bias"
        paths = tuple(f"params/{{stack}}/attn/{part}/{leaf}" for part in ("query", "key", "value"))
        block.append(Entry((f"blocks.{{i}}.attn.qkv.{kind}",), paths, layout))
    for torch, flax in (
        ("attn.proj", "attn/out"),
        ("mlp.fc1", "mlp/fc1"),
        ("mlp.fc2", "mlp/fc2"),
        ("adaLN_modulation.1", "adaLN_modulation"),
    ):
        block += linear(f"blocks.{{i}}.{torch}", f"params/{{stack}}/{flax}")
    if sit.qk_norm:
        block += norm("blocks.{i}.attn.q_norm", "params/{stack}/attn/query_norm")
        block += norm("blocks.{i}.attn.k_norm", "params/{stack}/attn/key_norm")
    entries = [
        *linear("x_embedder.proj", "params/x_embedder", patch_embedding(sit.patch_size)),
        *linear("t_embedder.mlp.0", "params/t_embedder/fc1"),
        *linear("t_embedder.mlp.2", "params/t_embedder/fc2"),
        Entry(("y_embedder.embedding_table.weight",), ("params/y_embedder/embedding",)),
        *stack(
            block,
            {"early_blocks": range(sit.encoder_depth), "late_blocks": range(sit.encoder_depth, sit.depth)},
        ),
        *linear("final_layer.linear", "params/final_layer/linear"),
        *linear("final_layer.adaLN_modulation.1", "params/final_layer/adaLN_modulation"),
        Entry(("bn.running_mean",), ("latent_stats/mean",)),
        Entry(("bn.running_var",), ("latent_stats/var",)),
    ]
    for i in range(len(sit.feature_dims)):
        for layer, torch in enumerate((0, 2, 4)):
            entries += linear(f"projectors.{i}.{torch}", f"params/projectors_{i}/fc{layer + 1}")
    constants = {
        "pos_embed": sincos_position_embedding(sit.hidden_size, grid, grid)[None],
        "bn.num_batches_tracked": np.asarray(updates, np.int64),
    }
    return Table(entries, constants, checked=("pos_embed",))
