"""SiT and VAE with the sizes and weights of the golden cases, and a tiny SiT."""

import jax
import jax.numpy as jnp
import numpy as np
import reference

from checkpoints_tools import mapping
from checkpoints_tools.sit import sit_table
from checkpoints_tools.vae_layouts import vae_table
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.channel_stats import ChannelStats
from repae_jax.models.layers import sincos_position_embedding
from repae_jax.models.sit import SiT

TINY = {
    "num_classes": 10, "latent_channels": 4, "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 2,
    "encoder_depth": 2, "feature_dims": (16,), "projector_dim": 32,
}  # fmt: skip


def golden_sit(config, remat="none"):
    """Returns a SiT with the sizes of a golden case."""
    return SiT(
        num_classes=config["num_classes"],
        latent_channels=config["in_channels"],
        patch_size=config["patch_size"],
        hidden_size=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        encoder_depth=config["encoder_depth"],
        feature_dims=tuple(config["z_dims"]),
        projector_dim=config["projector_dim"],
        qk_norm=config["qk_norm"],
        remat=remat,
    )


def abstract_tree(sit, size):
    """Returns the shapes of {'params', 'latent_stats'}."""
    args = jnp.zeros((1, size, size, sit.latent_channels)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(sit.init, jax.random.key(0), *args)["params"]
    channel = jax.ShapeDtypeStruct((sit.latent_channels,), jnp.float32)
    return {"params": params, "latent_stats": {"mean": channel, "var": channel}}


def draw(tree, seed=0):
    """Returns weights of realistic size for an abstract tree: N(0, 1 / fan-in), biases 0.1 N(0, 1); nothing is zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
        name, shape = path[-1].key, abstract.shape
        x = rng.standard_normal(shape, np.float32)
        if name in ("kernel", "embedding"):
            return x / np.float32(np.sqrt(shape[-2] if name == "kernel" else shape[-1]))
        return {"scale": 1 + 0.1 * x, "var": 0.5 + np.abs(x)}.get(name, 0.1 * x).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def load_sit(case, remat="none", weights=None):
    """Returns the SiT of a golden case, its conversion table, {'params'} and statistics of the latents."""
    config = case.meta["config"]
    sit = golden_sit(config, remat)
    table = sit_table(sit)
    grid = config["input_size"] // config["patch_size"]
    positions = sincos_position_embedding(sit.hidden_size, grid, grid)[None]  # the only weight that is not drawn
    state_dict = {"pos_embed": positions, **(weights or case.weights)}
    tree = mapping.to_flax(table, state_dict, abstract_tree(sit, config["input_size"]))
    return sit, table, {"params": tree["params"]}, ChannelStats(**tree["latent_stats"])


def golden_vae(meta, names):
    """Returns an AutoencoderKL with the sizes of a golden case; attention levels are read off the state-dict names."""
    levels = {int(name.split(".")[2]) for name in names if name.startswith("encoder.down.") and ".attn." in name}
    return AutoencoderKL(
        latent_channels=meta["z_channels"],
        channels=meta["ch"],
        channel_multipliers=tuple(meta["ch_mult"]),
        attention_levels=tuple(sorted(levels)),
    )


def abstract_params(vae, size=None):
    """Returns the shapes of the parameters of an AutoencoderKL."""
    size = size or 2 * vae.factor
    latents = jnp.zeros((1, size // vae.factor, size // vae.factor, vae.latent_channels))
    return jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), latents)["params"]


def drawn_params(vae):
    """Returns weights drawn by the rule of the golden files."""
    target, table = abstract_params(vae), vae_table(vae)
    shapes = mapping.to_torch(table, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), target))
    return mapping.to_flax(table, {name: reference.draw(name, x.shape, 0, "vae:") for name, x in shapes.items()}, target)
