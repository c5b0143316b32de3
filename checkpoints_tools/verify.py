"""Runs the PyTorch module of a file or folder and ours on the same input: `verify`."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import sit, torch_reference, vae, vit
from checkpoints_tools.identify import KINDS, identify
from repae_jax.models import encoders
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.models.vtp import VisualTokenizer


class Difference(NamedTuple):
    """Largest differences of one output, of our network in either dtype from PyTorch's in float32, over its largest entry."""

    output: str
    float32: float
    bfloat16: float


def verify(path: str | Path, size: int = 256, seed: int = 0) -> list[Difference]:
    """Compares our network with an independent PyTorch implementation (diffusers' or transformers'), with these weights.

    Folders of diffusers and transformers are loaded by these libraries themselves, so that a config.json read wrongly shows;
    other files cannot be, and their weights are put into a module of the same sizes. Of a training checkpoint, the averaged SiT
    and the VAE are compared; encoders both for images of `size` pixels and at the size that they are stored for. ValueError for
    other networks, which have no independent implementation to compare with.
    """
    if size < 1:
        raise ValueError(f"image_size is {size}; allowed: a positive number of pixels, such as 256")
    source = identify(path)
    rng = np.random.default_rng(seed)
    match source.kind:
        case "training":
            networks, differences = source.checkpoint.networks, []
            if "vae" in networks:
                module, params = source.checkpoint.load_vae()
                differences = _compare_vae(module, params, torch_reference.torch_vae(module, params), size, rng)
            return differences + _compare_sit(source.checkpoint.load_sit("ema" if "ema" in networks else "model"), rng)
        case "vae":
            module, params = vae.read_file(source.path, source.arrays)[:2]
            if isinstance(module, RepresentationAutoencoder):
                return _compare_rae(module, params, torch_reference.torch_rae(module, params), rng)
            if isinstance(module, VisualTokenizer):
                raise ValueError(f"{path} is VTP's, which neither diffusers nor transformers has: nothing to compare with")
            return _compare_vae(module, params, _torch_vae(source.path, module, params), size, rng)
        case "sit":
            return _compare_sit(sit.from_state_dict(source.arrays, str(path)), rng)
        case "encoder" | "mocov3":
            return _compare_encoder(source, size, rng)
    advice = "verify compares SiT, VAEs and encoders with diffusers and transformers; the others are pinned by the tests"
    raise ValueError(f"{path} is a {KINDS[source.kind]}: {advice}")


def _compare(name, expected, module, params, *inputs, pick=lambda output: output, **options):
    """Compares what `pick` takes from the module's output, in float32 and bfloat16, with the PyTorch output."""
    expected = np.asarray(expected, np.float64)
    scale, errors = max(np.abs(expected).max(), 1e-30), []
    for dtype in (jnp.float32, jnp.bfloat16):
        output = pick(_apply(module.clone(dtype=dtype), params, *inputs, **options))
        errors.append(float(np.abs(np.asarray(output, np.float64) - expected).max() / scale))
    return Difference(name, *errors)


def _apply(module, params, *args, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(module.apply, **options))({"params": params}, *args)


def _torch_vae(path, module, params):
    """Returns what diffusers reads from its folders; for other files, its module of our sizes with our parameters."""
    if not path.is_dir():
        return torch_reference.torch_vae(module, params)
    import diffusers
    return diffusers.AutoencoderKL.from_pretrained(path, local_files_only=True).float().eval()


def _compare_vae(module, params, reference, size, rng):
    import torch
    side = max(size // module.factor, 1) * module.factor
    images = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    with torch.inference_mode():
        distribution = reference.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        expected = torch.cat([distribution.mean, distribution.logvar], dim=1).permute(0, 2, 3, 1).numpy()
        latents = np.ascontiguousarray(expected[..., : module.latent_channels])
        recon = reference.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()

    def moments(posterior):
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)

    encoder = _compare("VAE encoder, mean and log-variance", expected, module, params, images, method="encode", pick=moments)
    return [encoder, _compare("VAE decoder", recon, module, params, latents, method="decode")]


def _compare_rae(module, params, reference, rng):
    """Compares at the one size that an RAE is for."""
    import torch
    side = module.grid * module.patch_size
    images = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    with torch.inference_mode():
        latents = reference.encode(torch.from_numpy((images + 1) / 2).permute(0, 3, 1, 2)).latent
        recon = 2 * reference.decode(latents).sample.permute(0, 2, 3, 1).numpy() - 1
    latents = latents.permute(0, 2, 3, 1).numpy()
    encoder = _compare("RAE encoder", latents, module, params, images, method="encode", pick=lambda posterior: posterior.mean)
    return [encoder, _compare("RAE decoder", recon, module, params, latents, method="decode")]


def _compare_sit(loaded, rng):
    module, params = loaded.module, loaded.variables["params"]
    side = loaded.grid * module.patch_size
    z = rng.standard_normal((2, side, side, module.latent_channels)).astype(np.float32)
    # DiT's times would do as well: the network takes any number
    t, labels = np.asarray([0.3, 0.9], np.float32), np.asarray([0, module.null_label], np.int32)
    expected = torch_reference.torch_sit(module, params, loaded.grid)(z, t, labels)
    differences = [_compare("SiT velocity", expected, module, params, z, t, labels, pick=lambda output: output[0])]
    if module.feature_dims:
        tokens = _apply(module, params, z, t, labels, method="tap_tokens")
        expected = np.concatenate(torch_reference.torch_projections(module, params, tokens), axis=-1)
        join = functools.partial(jnp.concatenate, axis=-1)
        differences.append(_compare("SiT projections", expected, module, params, tokens, z, method="_project", pick=join))
    return differences


def _compare_encoder(source, size, rng):
    """At the size in use, to which both sides resample the positions by themselves, and at the size of the stored ones."""
    stored = vit.read_file(source.path, source.arrays)
    native = stored.module.grid[0] * stored.module.patch_size
    used = vit.at_resolution(stored, size)
    at_sizes = [used] if used[0].image_size == native else [used, vit.at_resolution(stored, size, image_size=native)]
    differences = []
    for encoder, params in at_sizes:
        images = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        pixels = np.asarray(encoders.preprocess(encoder, jnp.asarray(images)))
        expected = _torch_tokens(source, encoder.module, params, pixels.transpose(0, 3, 1, 2))
        name = f"encoder tokens at {encoder.image_size} px"
        differences.append(_compare(name, expected, encoder.module, params, pixels, pick=lambda output: output[1]))
    return differences


def _torch_tokens(source, module, params, pixels: Any):
    """Tokens of transformers' module; MoCo v3, whose files it does not read, is saved as a ViT of its own."""
    if source.kind != "mocov3":
        return torch_reference.torch_tokens(source.path, pixels)
    with tempfile.TemporaryDirectory() as folder:
        vit.save_encoder(folder, module, params)
        return torch_reference.torch_tokens(Path(folder), pixels)


def report(differences: Sequence[Difference], tolerance: float) -> tuple[str, bool]:
    """Returns the differences as text, and whether all of them are within the tolerance in float32."""
    lines = [f"{'largest difference / largest entry':40}  {'float32':>9}  {'bfloat16':>9}"]
    lines += [f"{d.output:40}  {d.float32:9.1e}  {d.bfloat16:9.1e}" for d in differences]
    passed = all(difference.float32 <= tolerance for difference in differences)
    verdict = "within" if passed else "NOT within"
    return "\n".join([*lines, f"{verdict} {tolerance:g} in float32"]), passed
