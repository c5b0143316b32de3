"""Agreement of each block of a SiT with vision encoders on which images are alike: CKNNA, mutual nearest neighbors, CKA."""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from checkpoints_tools.vit import load_encoder
from repae_jax import data, images
from repae_jax.analysis import representation
from repae_jax.analyze_latents.encoding import check_bytes, check_finite, map_images, posterior_mean
from repae_jax.analyze_latents.sources import NEIGHBORS, Source
from repae_jax.diffusion import latent_norm
from repae_jax.distributed import sharding
from repae_jax.models import encoders as vision_encoders
from repae_jax.ranges import Extent, as_extent, as_option, in_words
from repae_jax.sampling.load_model import LoadedModel, jit_in_float32
from repae_jax.training.checkpoint import fingerprint

MAX_BYTES = 2**33  # most bytes of one timestep's hidden states; SiT-XL's of 10,000 images, as published, take 1.2 GiB

Encoded = tuple[Float[np.ndarray, "N F"], representation.Neighbors]  # features of length 1, and their neighbors


def encoder_features(
    name: str, path: str, image_size: Extent | None, source: Any, records, batch_size: int, mesh: jax.sharding.Mesh
) -> tuple[Float[np.ndarray, "N F"], str]:
    """Computes the patch tokens of a vision encoder, averaged over each image: float32 rows of length 1; and its fingerprint.

    The weights at `path` are as of `load_encoder`; `image_size` is that of the encoder's images, None for its own.
    """
    try:
        encoder, params = load_encoder(path, source.image_size, image_size)
    except ValueError as error:
        raise ValueError(f"--cknna {path}: {error} (another image size of the encoder: {path}@PIXELS)") from error
    checksum, params = fingerprint(params), jax.device_put(params, sharding.replicated(mesh))
    run = jit_in_float32(lambda params, pixels: vision_encoders.encode(encoder, params, pixels).mean(axis=1))
    batches = list(map_images(functools.partial(run, params), source, records, batch_size, mesh, name))
    return representation.unit_rows(np.concatenate(batches)), checksum


def make_hidden_states(trained: LoadedModel) -> Callable:
    """Makes the compiled function of (params as LoadedModel's, z [B, h, w, C], ids [B], t in [0, 1], labels [B], key).

    It returns float32 [depth, B, D]: the SiT's hidden states after every block, averaged over the tokens, of z noised to t
    along the path it was trained on (for a DiT, to the nearest of its timesteps). Image i's noise depends on key and ids[i].
    """
    sit = trained.nets.sit.clone(dtype=jnp.float32)

    def hidden_states(params, z, ids, t, labels, key):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), z.shape[1:]))(ids)
        times = trained.objective.to_times(jnp.full(len(z), t))
        z_t = trained.objective.add_noise(z, noise, times)
        return sit.apply({"params": params["sit"]}, z_t, times, labels, method="mean_tokens")

    return jit_in_float32(sharding.with_mesh_context(trained.mesh, hidden_states))


def normalized_latents(trained: LoadedModel, name: str, source: Any, records, batch_size: int) -> Float[np.ndarray, "N h w C"]:
    """Returns the posterior means as the SiT sees them."""
    vae = trained.nets.vae.clone(dtype=jnp.float32)
    size = as_extent([side * vae.factor for side in trained.latent_shape[:2]])
    if source.image_size != size:
        raise ValueError(
            f"{name}: images have {in_words(source.image_size)} pixels, the SiT is for {in_words(size)}; give "
            f"--image_size={as_option(size)}, or leave out --cknna"
        )

    def normalized(params, pixels):
        return latent_norm.normalize(posterior_mean(vae, params["vae"], images.to_float(pixels)), params["latent_stats"])

    run = functools.partial(jit_in_float32(normalized), trained.params)
    latents = np.concatenate(list(map_images(run, source, records, batch_size, trained.mesh, f"{name}: latents")))
    check_finite(latents, name, source, records)
    return latents


def measure_cknna(
    args: argparse.Namespace, source: Source, trained: LoadedModel, images_source: Any, records, encoders: Mapping[str, Encoded]
) -> list[dict[str, Any]]:
    """Measures the agreement of a SiT's blocks with encoders, given their features of the same images by label.

    Returns [{'encoder', 'measure', 'timestep', 'blocks': values after block 1, 2, …}], of CKNNA by both formulas, mutual kNN
    and linear CKA (biased).
    """
    sit = trained.nets.sit
    size = 4 * sit.depth * len(records) * sit.hidden_size
    check_bytes(size, f"{source.name}: hidden states of {len(records)} images", MAX_BYTES)
    z = normalized_latents(trained, source.name, images_source, records, args.batch_size)
    if args.labels == "own":
        data.check_labels(images_source, trained.num_classes)
        labels = images_source.labels[records]
    else:
        labels = np.full(len(records), sit.null_label, np.int32)
    run, rows = make_hidden_states(trained), []
    with tqdm(total=len(args.timesteps) * sit.depth, unit="block", desc=f"{source.name}: CKNNA") as bar:
        for t in args.timesteps:
            agreements = []
            for state in _states(run, trained, z, t, labels, args.batch_size, args.seed):
                agreements.append(_agreement(state, encoders))
                bar.update()
            for encoder, measure in agreements[0]:
                values = [agreement[encoder, measure] for agreement in agreements]
                rows.append({"encoder": encoder, "measure": measure, "timestep": t, "blocks": values})
    return rows


def _states(run, trained, z, t, labels, batch_size, seed) -> Float[np.ndarray, "depth N D"]:
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(trained.mesh))
    states = np.empty((trained.nets.sit.depth, len(z), trained.nets.sit.hidden_size), np.float32)
    for first in range(0, len(z), batch_size):
        ids = np.arange(first, first + batch_size)
        padded = np.minimum(ids, len(z) - 1)
        batch = run(trained.params, put(z[padded]), put(ids), t, put(labels[padded]), jax.random.key(seed))
        states[:, first : first + batch_size] = np.asarray(batch)[:, : len(z) - first]
    return states


def _agreement(state: Float[np.ndarray, "N D"], encoders: Mapping[str, Encoded]) -> dict[tuple[str, str], float]:
    state = representation.unit_rows(state)
    neighbors, values = representation.nearest(state, NEIGHBORS), {}
    for encoder, (features, others) in encoders.items():
        for formula in representation.FORMULAS:
            values[encoder, f"cknna_{formula}"] = representation.neighbor_alignment(neighbors, others, formula)
        values[encoder, "mutual_knn"] = representation.neighbor_overlap(neighbors, others)
        values[encoder, "cka"] = representation.cka(state, features)
    return values
