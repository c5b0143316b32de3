"""SiT's published names <-> those of diffusers' DiTTransformer2DModel, of the same arrays but for one: q, k and v are apart.

The embedders of time and label are those of the first block there, whose copies in the other blocks are left out.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

from checkpoints_tools.mapping import StateDict

_PATTERNS = {
    r"^x_embedder\.": "pos_embed.", r"^pos_embed$": "pos_embed.pos_embed",
    r"^final_layer\.linear\.": "proj_out_2.", r"^final_layer\.adaLN_modulation\.1\.": "proj_out_1.",
    r"^t_embedder\.mlp\.0\.": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.",
    r"^t_embedder\.mlp\.2\.": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.",
    r"^y_embedder\.": "transformer_blocks.0.norm1.emb.class_embedder.",
    r"^blocks\.": "transformer_blocks.", r"\.attn\.proj\.": ".attn1.to_out.0.", r"\.attn\.qkv\.": ".attn1.to_qkv.",
    r"\.attn\.([qk])_norm\.": r".attn1.norm_\1.",
    r"\.mlp\.fc1\.": ".ff.net.0.proj.", r"\.mlp\.fc2\.": ".ff.net.2.", r"\.adaLN_modulation\.1\.": ".norm1.linear.",
}  # fmt: skip


def diffusers_names(name: str) -> tuple[str, ...]:
    """Returns diffusers' names of a published array: one, or three that it is split into; none of a projector's."""
    if name.startswith("projectors."):
        return ()
    name = functools.reduce(lambda name, pair: re.sub(*pair, name), _PATTERNS.items(), name)
    return tuple(name.replace("to_qkv", f"to_{part}") for part in "qkv") if ".to_qkv." in name else (name,)


def to_diffusers(state_dict: StateDict) -> dict[str, np.ndarray]:
    """Returns a published state dict under diffusers' names, without projectors."""
    renamed = {}
    for published, array in state_dict.items():
        if names := diffusers_names(published):
            renamed |= zip(names, np.split(array, len(names)) if len(names) > 1 else [array])
    return renamed


def from_diffusers(state_dict: StateDict, published: Iterable[str], source: str) -> dict[str, np.ndarray]:
    """Returns the arrays of these published names; ValueError lists names that are missing or left over."""
    needed = {name: diffusers_names(name) for name in published}
    known = {name for names in needed.values() for name in names}
    if differing := sorted(known ^ set(state_dict)):
        found = "; ".join(f"{'missing' if name in known else 'unexpected'}: {name}" for name in differing[:8])
        raise ValueError(f"{source} does not fit the transformer that its config.json describes: {found}")
    return {name: np.concatenate([state_dict[part] for part in parts]) for name, parts in needed.items()}
