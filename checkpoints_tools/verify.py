"""Runs the PyTorch module of an artefact and ours on the same input: what `verify` does."""

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import sit, sit_reference, vae, vit, vit_reference
from checkpoints_tools.identify import KINDS, identify
from repae_jax.models import encoders as features


class Difference(NamedTuple):
    """Largest differences of one output from PyTorch's in float32, relative to its largest entry.

    Attributes:
      what: the network and its output.
      float32: of our network in float32.
      bfloat16: of our network computing in bfloat16.
    """

    what: str
    float32: float
    bfloat16: float


def verify(path, size=256, seed=0):
    """Compares our network with an independent PyTorch implementation (diffusers' or transformers'), with these weights.

    Folders of diffusers and transformers are loaded by these libraries themselves, so that a config.json read wrongly shows;
    other files cannot be, and their weights are put into a module of the same sizes.

    Args:
      path: what `identify` takes: a SiT, a VAE, an encoder, or a training checkpoint, of which the averaged SiT and the VAE
        are compared.
      size: height and width in pixels of the images; encoders are compared at the size that they are stored for, too.
      seed: of the inputs.

    Returns:
      list of Difference.

    Raises:
      ValueError: if the file is damaged, there is no independent implementation to compare with, or `size` is no size.
      ImportError: if torch, diffusers or transformers is not installed.
    """
    if size < 1:
        raise ValueError(f"image_size is {size}; allowed: a positive number of pixels, such as 256")
    artefact = identify(path)
    rng = np.random.default_rng(seed)
    if artefact.kind == "training":
        taken = artefact.checkpoint
        networks, found = taken.networks, []
        if "vae" in networks:
            module, params = vae.from_state_dict(networks["vae"], f"{taken.source}: vae", taken.norm_groups)
            found += _vae(module, params, vae.torch_vae(module, params), size, rng)
        name = "ema" if "ema" in networks else "model"
        loaded = sit.from_state_dict(networks[name], f"{taken.source}: {name}", taken.encoder_depth, taken.num_heads)
        return found + _sit(loaded, rng)
    if artefact.kind == "vae":
        loaded = vae.load_vae(artefact.path)
        return _vae(loaded.module, loaded.params, _torch_vae(artefact, loaded), size, rng)
    if artefact.kind == "sit":
        return _sit(sit.from_state_dict(artefact.arrays, str(path)), rng)
    if artefact.kind in ("encoder", "mocov3"):
        return _encoder(artefact, size, rng)
    raise ValueError(
        f"{path} is a {KINDS[artefact.kind]}: verify compares SiT, VAEs and encoders with diffusers and transformers; the "
        "others are pinned by the tests"
    )


def _compare(what, expected, run):
    """Difference of `run(dtype)` from the PyTorch output."""
    expected = np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(), 1e-30)
    errors = (np.abs(np.asarray(run(dtype), np.float64) - expected).max() / scale for dtype in (jnp.float32, jnp.bfloat16))
    return Difference(what, *map(float, errors))


def _apply(module, params, *args, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(module.apply, **options))({"params": params}, *args)


def _torch_vae(artefact, loaded):
    """diffusers' own reading of its folders; of other files, its module of our sizes with our parameters."""
    if not artefact.path.is_dir():
        return vae.torch_vae(loaded.module, loaded.params)
    import diffusers

    return diffusers.AutoencoderKL.from_pretrained(artefact.path, local_files_only=True).float().eval()


def _vae(module, params, reference, size, rng):
    import torch

    side = max(size // module.factor, 1) * module.factor
    images = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)

    def moments(dtype):
        posterior = _apply(module.clone(dtype=dtype), params, images, method="encode")
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)

    with torch.inference_mode():
        distribution = reference.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        expected = torch.cat([distribution.mean, distribution.logvar], dim=1).permute(0, 2, 3, 1).numpy()
        latents = np.ascontiguousarray(expected[..., : module.latent_channels])
        recon = reference.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()
    return [
        _compare("VAE encoder, mean and log-variance", expected, moments),
        _compare("VAE decoder", recon, lambda dtype: _apply(module.clone(dtype=dtype), params, latents, method="decode")),
    ]


def _sit(loaded, rng):
    module, params = loaded.module, loaded.variables["params"]
    side = loaded.grid * module.patch_size
    z = rng.standard_normal((2, side, side, module.latent_channels)).astype(np.float32)
    # DiT's times would do as well: the network takes any number
    t, labels = np.asarray([0.3, 0.9], np.float32), np.asarray([0, module.null_label], np.int32)
    expected = sit_reference.torch_sit(module, params, loaded.grid)(z, t, labels)
    found = [_compare("SiT velocity", expected, lambda dtype: _apply(module.clone(dtype=dtype), params, z, t, labels)[0])]
    if module.feature_dims:
        tokens = _apply(module, params, z, t, labels, method="tap_tokens")

        def projections(dtype):
            made = _apply(module.clone(dtype=dtype), params, tokens, method="_project")
            return jnp.concatenate(made, axis=-1)

        expected = np.concatenate(sit_reference.torch_projections(module, params, tokens), axis=-1)
        found.append(_compare("SiT projections", expected, projections))
    return found


def _encoder(artefact, size, rng):
    """At the size in use, to which both sides resample the positions by themselves, and at the size of the stored ones."""
    stored, _ = vit.read_encoder(artefact.path)
    native = stored.grid[0] * stored.patch_size
    used = vit.load_encoder(artefact.path, size)
    encoders = [used] if used[0].image_size == native else [used, vit.load_encoder(artefact.path, size, image_size=native)]
    found = []
    for encoder, params in encoders:
        images = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        pixels = np.asarray(features.preprocess(encoder, jnp.asarray(images)))

        def tokens(dtype, module=encoder.module, params=params, pixels=pixels):
            return _apply(module.clone(dtype=dtype), params, pixels)[1]

        with contextlib.ExitStack() as stack:
            folder = artefact.path
            if artefact.kind == "mocov3":  # which transformers does not read; as a ViT of its own
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "encoder"
                vit.save_encoder(folder, encoder.module, params)
            expected = vit_reference.torch_tokens(folder, pixels.transpose(0, 3, 1, 2))
        found.append(_compare(f"encoder tokens at {encoder.image_size} px", expected, tokens))
    return found


def report(differences, tolerance):
    """The differences as text, and whether all of them are within the tolerance in float32."""
    lines = [f"{'largest difference / largest entry':40}  {'float32':>9}  {'bfloat16':>9}"]
    lines += [f"{d.what:40}  {d.float32:9.1e}  {d.bfloat16:9.1e}" for d in differences]
    passed = all(difference.float32 <= tolerance for difference in differences)
    verdict = "within" if passed else "NOT within"
    return "\n".join([*lines, f"{verdict} {tolerance:g} in float32"]), passed
