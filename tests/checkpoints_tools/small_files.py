"""Tiny files as the published code, diffusers and transformers write them, and files of ours."""

import jax
import numpy as np

from checkpoints_tools import sit, vae, vae_layouts, vit, weights
from checkpoints_tools.mapping import abstract_variables
from repae_jax.models import encoders
from repae_jax.models.autoencoder import AutoencoderKL

STATS = {"mean": np.asarray([0.5, -1.0, 0.0, 2.0], np.float32), "var": np.asarray([1.7, 0.3, 1.0, 30.0], np.float32)}
# configuration of transformers
TINY_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7, "image_size": 28}
TOKENS = ("token", "tokens", "class_embedding", "position_embeddings", "position_embedding.weight")


def save_vae(folder):
    """(module, parameters) of a tiny VAE, written as diffusers' folder."""
    module = AutoencoderKL(
        latent_channels=4, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_levels=(), norm_groups=8,
        quant_convs=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), vae_layouts.abstract_params(module))
    vae.save_diffusers(folder, module, params, STATS)
    return module, params


def save_encoder(folder, **fields):
    """A tiny encoder of ours, DINOv2's kind by default, all ones."""
    architecture = {"patch_size": 7, "hidden_size": 8, "depth": 1, "num_heads": 2, **fields}
    module = encoders.make_encoder(architecture, 28, image_size=28).module
    shapes = abstract_variables(module, (1, 28, 28, 3))["params"]
    vit.save_encoder(folder, module, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))


def torch_model(class_name, fields):
    """A module of transformers with random weights, none of which is trivially 0 or 1."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(TOKENS):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (not name.endswith("bias")))
    return model.eval()


def moco_weights(width, depth, mlp_dim, side):
    """State dict of timm's VisionTransformer of 16 pixels a patch, for side * side patches."""
    import torch

    layers, norms = {"patch_embed.proj": (width, 3, 16, 16)}, ["norm"]
    for block in (f"blocks.{i}" for i in range(depth)):
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": (mlp_dim, width), f"{block}.mlp.fc2": (width, mlp_dim)}
        norms += [f"{block}.norm1", f"{block}.norm2"]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    arrays = {"cls_token": normal(1, 1, width), "pos_embed": normal(1, 1 + side**2, width)}
    for name, (rows, *rest) in layers.items():
        arrays[f"{name}.weight"] = normal(rows, *rest) / np.prod(rest) ** 0.5
        arrays[f"{name}.bias"] = 0.1 * normal(rows)
    for name in norms:
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = 1 + 0.1 * normal(width), 0.1 * normal(width)
    return {name: array.numpy() for name, array in arrays.items()}


def published_shapes(
    hidden_size, depth, patch_size, channels=4, rows=1001, tokens=256, outputs=1, features=(), head=None, norm=False,
    projector=2048, conv=False,
):  # fmt: skip
    """The names of a published SiT's file, written out anew, with their shapes."""
    width, pixels = hidden_size, patch_size**2
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch_size, patch_size), "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (rows, width),
    }  # fmt: skip
    for i in range(depth):
        block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                 "mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width)}  # fmt: skip
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("q_norm", "k_norm") if head else ():
            shapes |= {f"blocks.{i}.attn.{name}.{kind}": (head,) for kind in ("weight", "bias")}
    for i, dim in enumerate(features):
        mlp = {"0": (projector, width), "2": (projector, projector), "4": (dim, projector)}
        for layer, shape in ({"projection_layer": (dim, width, 3, 3)} if conv else mlp).items():
            shapes |= {f"projectors.{i}.{layer}.weight": shape, f"projectors.{i}.{layer}.bias": shape[:1]}
    for name, size in (("linear", outputs * channels * pixels), ("adaLN_modulation.1", 2 * width)):
        shapes |= {f"final_layer.{name}.weight": (size, width), f"final_layer.{name}.bias": (size,)}
    if norm:
        shapes |= {"bn.running_mean": (channels,), "bn.running_var": (channels,), "bn.num_batches_tracked": ()}
    return shapes


def load_sit(path, entry=None, **numbers):
    """LoadedSiT of a file."""
    return sit.from_state_dict(weights.read_file(path, entry or weights.AVERAGED), str(path), **numbers)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
