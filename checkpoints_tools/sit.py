"""SiT and DiT: the published state dicts <-> {'params': …, 'latent_stats': …}.

Three kinds of files share their names:
    'repae'       with `bn.*`, the latent batch norm, and projectors. t = 0 is data.
    'repa'        projectors, no `bn.*`: latents are the VAE's times 0.18215. t = 0 is data.
    'sit-or-dit'  neither. Plain SiT: t = 0 is noise, see `reverse_time`. DiT: t in 0..999, 0 is data, predicts the noise.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from checkpoints_tools.mapping import CONV, COPY, LINEAR, Entry, Table, linear, norm, patch_embedding, stack, to_flax
from checkpoints_tools.weights import AVERAGED, read_state_dict
from repae_jax.models.sit import SiT

# (hidden size, depth) -> (name, heads, blocks before the alignment tap): a file tells none of them
_PUBLISHED = {(384, 12): ("S", 6, 4), (768, 12): ("B", 12, 4), (1024, 24): ("L", 16, 8), (1152, 28): ("XL", 16, 8)}

_CONV_PROJECTOR = "projection_layer"  # iREPA's, by public forks of its code; unconfirmed by a file of its authors


def sit_table(sit, updates=0, latent_norm=True):
    """Conversion table of a SiT and its latent batch norm.

    Args:
      sit: the SiT module (its sizes are read).
      updates: value written for the batch norm's `num_batches_tracked`.
      latent_norm: whether the file holds the latent batch norm; False for REPA, SiT and DiT.

    Returns:
      Table between the published names and {'params': SiT parameters, 'latent_stats': {'mean', 'var'}}; without
      'latent_stats' if not latent_norm.
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
        Entry(("pos_embed",), ("params/pos_embed/table",)),
        Entry(("y_embedder.embedding_table.weight",), ("params/y_embedder/embedding",)),
        *stack(
            block,
            {"early_blocks": range(sit.encoder_depth), "late_blocks": range(sit.encoder_depth, sit.depth)},
        ),
        *linear("final_layer.linear", "params/final_layer/linear"),
        *linear("final_layer.adaLN_modulation.1", "params/final_layer/adaLN_modulation"),
    ]
    for i in range(len(sit.feature_dims)):
        if sit.projector == "conv":
            entries += linear(f"projectors.{i}.{_CONV_PROJECTOR}", f"params/projectors_{i}/conv", CONV)
            continue
        for layer, torch in enumerate((0, 2, 4)):
            entries += linear(f"projectors.{i}.{torch}", f"params/projectors_{i}/fc{layer + 1}")
    constants = {}
    if latent_norm:
        entries.append(Entry(("bn.running_mean",), ("latent_stats/mean",)))
        entries.append(Entry(("bn.running_var",), ("latent_stats/var",)))
        constants["bn.num_batches_tracked"] = np.asarray(updates, np.int64)
    return Table(entries, constants)


def layout_of(state_dict):
    """'repae', 'repa' or 'sit-or-dit': which kind of file a state dict is from, by its names."""
    if any(name.startswith("bn.") for name in state_dict):
        return "repae"
    return "repa" if any(name.startswith("projectors.") for name in state_dict) else "sit-or-dit"


def check_time(layout, source):
    """ValueError for a plain SiT, or a DiT where none is asked for: their weights mean something else than ours."""
    if layout == "sit-or-dit":
        raise ValueError(
            f"{source} has neither a latent batch norm nor projectors: it is a plain SiT, whose t = 0 is noise, or a DiT, "
            "which predicts noise. Convert a SiT first: python -m checkpoints_tools convert --plain_sit. Of a DiT, which has "
            "sigma channels, ask for sampling with --sampler ancestral, for training with config.diffusion.path='ddpm'"
        )


def _count(state_dict, stem):
    """1 + the largest i of the names 'STEM.i.…'; 0 without any."""
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, state_dict) if match), default=-1)


def rename_legacy(state_dict, encoder_depth=None):
    """Today's names of a state dict whose blocks behind the alignment tap are called `decoder_blocks.i`, from 0.

    Args:
      state_dict: name -> array; one without such blocks comes back as it is.
      encoder_depth: blocks before the tap, to be checked; whatever the file has by default.

    Returns:
      dict name -> array.

    Raises:
      ValueError: if `blocks.*` does not end at encoder_depth.

    Reference: REPA's `load_legacy_checkpoints`.
    """
    if not _count(state_dict, "decoder_blocks"):
        return dict(state_dict)
    early = _count(state_dict, "blocks")
    if encoder_depth not in (None, early):
        raise ValueError(f"encoder_depth={encoder_depth}, but the file has {early} blocks before its decoder_blocks")

    def rename(match):
        return f"blocks.{int(match[1]) + early}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", rename, name): array for name, array in state_dict.items()}


def grid_of(state_dict):
    """Tokens per side, from `pos_embed` [1, grid * grid, D]; ValueError if it is missing or not square."""
    shape = np.shape(state_dict["pos_embed"]) if "pos_embed" in state_dict else None
    if shape is None or len(shape) != 3 or math.isqrt(shape[1]) ** 2 != shape[1]:
        raise ValueError(f"pos_embed has shape {shape}; needed: (1, grid * grid, D)")
    return math.isqrt(shape[1])


def describe_sit(state_dict, encoder_depth=None, num_heads=None):
    """Fields of the SiT that a state dict belongs to, from names and shapes.

    Args:
      state_dict: name -> array, of any of the three kinds.
      encoder_depth: blocks before the alignment tap. By default what legacy names tell; 4 for S and B, 8 for L and XL,
        as published, if there are projectors; otherwise all blocks.
      num_heads: by default what qk_norm's width tells, or the published number for S, B, L and XL.

    Returns:
      dict of SiT's fields: hidden_size, depth, num_heads, encoder_depth, patch_size, latent_channels, num_classes, mlp_ratio,
      qk_norm, learned_sigma, feature_dims and, with projectors, projector_dim, or projector if it is 'conv'.

    Raises:
      ValueError: if arrays are missing or of impossible shapes, or a number that the file does not tell is needed.
    """
    ranks = {
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    q_norm = "blocks.0.attn.q_norm.weight"
    if q_norm in state_dict:
        ranks[q_norm] = 1
    num_projectors = _count(state_dict, "projectors")
    is_conv = f"projectors.0.{_CONV_PROJECTOR}.weight" in state_dict
    last = _CONV_PROJECTOR if is_conv else "4"
    for i in range(num_projectors):
        ranks |= {f"projectors.{i}.{last}.weight": 4} if is_conv else {f"projectors.{i}.{layer}.weight": 2 for layer in (0, 4)}
    shapes = {name: np.shape(state_dict[name]) for name in ranks if name in state_dict}
    problems = [f"missing: {name}" for name in ranks if name not in shapes]
    problems += [
        f"{name} {shape}: expected {ranks[name]} axes, none empty"
        for name, shape in shapes.items()
        if len(shape) != ranks[name] or 0 in shape
    ]
    if problems:
        raise ValueError(f"no state dict of a SiT or DiT: {'; '.join(problems)}")

    width, channels, patch, patch_width = shapes["x_embedder.proj.weight"]
    ratio, rest = divmod(shapes["final_layer.linear.weight"][0], patch * patch * channels)
    if patch != patch_width or rest or ratio not in (1, 2):
        raise ValueError(
            f"x_embedder.proj.weight {shapes['x_embedder.proj.weight']} and final_layer.linear.weight "
            f"{shapes['final_layer.linear.weight']} do not fit: expected square patches and one or two times as many outputs"
        )
    early, late = _count(state_dict, "blocks"), _count(state_dict, "decoder_blocks")
    depth = early + late
    _, published_heads, published_tap = _PUBLISHED.get((width, depth), (None, None, None))

    if q_norm in shapes:
        told = width // shapes[q_norm][0]
        if num_heads not in (None, told):
            raise ValueError(f"num_heads={num_heads}, but {q_norm} {shapes[q_norm]} in width {width} makes {told} heads")
        num_heads = told
    num_heads = num_heads or published_heads
    if num_heads is None:
        raise ValueError(
            f"hidden size {width} and depth {depth} are none of S, B, L or XL, and the file does not tell the number of heads: "
            "give num_heads"
        )
    if encoder_depth is None:
        encoder_depth = early if late else published_tap if num_projectors else depth
    if encoder_depth is None:
        raise ValueError(
            f"hidden size {width} and depth {depth} are none of S, B, L or XL, and the file does not tell after which block "
            "its projectors stand: give encoder_depth"
        )
    fields = {
        "hidden_size": width,
        "depth": depth,
        "num_heads": num_heads,
        "encoder_depth": encoder_depth,
        "patch_size": patch,
        "latent_channels": channels,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,  # the last row is "no class"
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "qk_norm": q_norm in shapes,
        "learned_sigma": ratio == 2,
        "feature_dims": tuple(shapes[f"projectors.{i}.{last}.weight"][0] for i in range(num_projectors)),
    }
    if is_conv:
        return fields | {"projector": "conv"}
    return fields | ({"projector_dim": shapes["projectors.0.0.weight"][0]} if num_projectors else {})


def model_name(sit):
    """Published name of a SiT's size, such as 'SiT-XL/2'; None if it has none."""
    name, heads, _ = _PUBLISHED.get((sit.hidden_size, sit.depth), (None, None, None))
    return f"SiT-{name}/{sit.patch_size}" if name and heads == sit.num_heads and sit.mlp_ratio == 4 else None


@dataclass(frozen=True)
class LoadedSiT:
    """A SiT or DiT read from a file.

    Attributes:
      module: SiT.
      variables: {'params': …} of float32 numpy arrays, and of 'repae' files 'latent_stats': {'mean', 'var'}, each [C].
      layout: 'repae', 'repa' or 'sit-or-dit'.
      grid: tokens per side.
    """

    module: SiT
    variables: dict[str, Any]
    layout: str
    grid: int


def load_sit(path, entry=None, encoder_depth=None, num_heads=None, dtype=jnp.float32):
    """A SiT or DiT from a published file, its sizes inferred. Time runs as in the file, see `reverse_time`.

    Args:
      path: what `weights.read_state_dict` reads.
      entry: state dict to take from a file with several; by default the averaged one of those.
      encoder_depth: see `describe_sit`.
      num_heads: see `describe_sit`.
      dtype: compute dtype of the module.

    Returns:
      LoadedSiT.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, belongs to another network, or does not tell a number that is needed.
    """
    return from_state_dict(_read(path, entry), str(path), encoder_depth, num_heads, dtype)


def from_state_dict(state_dict, source, encoder_depth=None, num_heads=None, dtype=jnp.float32):
    """`load_sit` of a state dict alone, such as the one within a training checkpoint; `source` is its name, for errors."""
    try:
        fields = describe_sit(state_dict, encoder_depth, num_heads)
        state_dict = rename_legacy(state_dict, fields["encoder_depth"])
        grid, layout = grid_of(state_dict), layout_of(state_dict)
        module = SiT(**fields, dtype=dtype)
        has_norm = layout == "repae"
        target = _abstract_variables(module, grid, has_norm)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    variables = to_flax(sit_table(module, latent_norm=has_norm), state_dict, target, source=source)
    if has_norm and not (variables["latent_stats"]["var"] > 0).all():
        smallest = variables["latent_stats"]["var"].min()
        raise ValueError(f"{source}: bn.running_var must be positive; its smallest entry is {smallest}")
    return LoadedSiT(module, variables, layout, grid)


def _read(path, entry):
    try:
        return read_state_dict(path, entry=entry)
    except ValueError as error:
        if entry is not None:
            raise
        try:
            state_dict = read_state_dict(path, entry=AVERAGED)
        except ValueError:
            raise error from None
    logging.info("%s holds several state dicts: taking the averaged weights", path)
    return state_dict


def _abstract_variables(module, grid, latent_norm):
    """Shapes and dtypes of the variables of a SiT."""

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    side, channels = grid * module.patch_size, module.latent_channels
    latents, labels = shape(1, side, side, channels), shape(1, dtype=jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), latents, shape(1), labels)
    return variables | ({"latent_stats": {"mean": shape(channels), "var": shape(channels)}} if latent_norm else {})


def reverse_time(params):
    """Parameters of the same SiT with time running the other way: v'(z, t) = -v(z, 1 - t). Its own inverse.

    Plain SiT calls noise t = 0 and data t = 1; we, like REPA and REPA-E, the other way round. The first layer of the time
    embedder sees cos(f t) and sin(f t), of which cos(f (1 - t)) and sin(f (1 - t)) are linear combinations, so the change of
    time is a change of that layer's weights. For velocities only: DiT's noise prediction has no such symmetry.

    Args:
      params: SiT parameters, t in [0, 1].

    Returns:
      SiT parameters; what does not change is shared with `params`.
    """
    embedder, final = params["t_embedder"], params["final_layer"]
    kernel = np.asarray(embedder["fc1"]["kernel"])
    half = kernel.shape[0] // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / half)[:, None]  # of layers.timestep_embedding, in float64
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    of_cos, of_sin = kernel[:half].astype(np.float64), kernel[half:].astype(np.float64)
    reversed_kernel = np.concatenate([cos * of_cos + sin * of_sin, sin * of_cos - cos * of_sin]).astype(kernel.dtype)
    return {
        **params,
        "t_embedder": {**embedder, "fc1": {**embedder["fc1"], "kernel": reversed_kernel}},
        "final_layer": {**final, "linear": {name: -np.asarray(leaf) for name, leaf in final["linear"].items()}},
    }


def without_sigma(module, params):
    """The same velocity network without its unused sigma outputs: (module, params)."""
    if not module.learned_sigma:
        return module, params
    patch, channels = module.patch_size, module.latent_channels

    def velocity_half(leaf):  # outputs are (row, column, channel) within a patch, sigma's channels after the velocity's
        leaf = np.asarray(leaf)
        return leaf.reshape(*leaf.shape[:-1], patch**2, 2 * channels)[..., :channels].reshape(*leaf.shape[:-1], -1)

    final = params["final_layer"]
    linear = {name: velocity_half(leaf) for name, leaf in final["linear"].items()}
    return module.clone(learned_sigma=False), {**params, "final_layer": {**final, "linear": linear}}
