"""How far each block of a SiT sees images as a vision encoder does: CKNNA, mutual nearest neighbors, CKA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from checkpoints_tools.vit import load_encoder
from repae_jax import data, images
from repae_jax.analysis import representation
from repae_jax.analyze_latents.encoding import check_bytes, check_finite, in_float32, posterior_mean, read_batches
from repae_jax.analyze_latents.sources import NEIGHBORS
from repae_jax.diffusion import ddpm, latent_norm
from repae_jax.distributed import sharding
from repae_jax.models import encoders as features
from repae_jax.training.checkpoint import fingerprint

MAX_BYTES = 2**33  # of one timestep's hidden states: SiT-XL's of 10,000 images, as published, take 1.2 GiB


def encoder_features(name, path, pixels, source, records, batch_size, mesh):
    """Patch tokens of a vision encoder, averaged over the image.

    Args:
      name: for the progress bar.
      path: as `load_encoder` takes it.
      pixels: image size of the encoder, None for its own.
      source: see `repae_jax.data`.
      records: positions in it.
      batch_size: images at a time.
      mesh: device mesh.

    Returns:
      (float32 numpy [N, F], rows of length 1; fingerprint of the weights).
    """
    try:
        encoder, params = load_encoder(path, source.image_size, pixels)
    except ValueError as error:
        raise ValueError(f"--cknna {path}: {error} (another image size of the encoder: {path}@PIXELS)") from error
    weights = fingerprint(params)
    params = jax.device_put(params, sharding.replicated(mesh))
    run = in_float32(lambda params, pixels: features.encode(encoder, params, pixels).mean(axis=1))
    found = []
    with tqdm(total=len(records), unit="img", desc=name) as bar:
        for batch, count in read_batches(source, records, batch_size):
            found.append(np.asarray(run(params, jax.device_put(batch, sharding.batch_sharding(mesh))))[:count])
            bar.update(count)
    return representation.unit_rows(np.concatenate(found)), weights


def make_hidden_states(trained):
    """Compiled function of (params as of a LoadedModel, z [B, h, w, C], ids [B], t in [0, 1], labels [B], key).

    Its result is float32 [depth, B, D]: the SiT's hidden states after every block, averaged over the tokens, of z noised to t
    along the path it was trained on (for a DiT, to the nearest of its timesteps). Image i's noise depends on key and ids[i].
    """
    sit = trained.nets.sit.clone(dtype=jnp.float32)

    def hidden_states(params, z, ids, t, labels, key):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), z.shape[1:]))(ids)
        times = jnp.full(len(z), t)
        if isinstance(trained.objective, ddpm.NoiseObjective):
            times = jnp.round((ddpm.NUM_TIMESTEPS - 1) * times).astype(jnp.int32)
        z_t = trained.objective.add_noise(z, noise, times)
        return sit.apply({"params": params["sit"]}, z_t, times, labels, method="mean_tokens")

    return in_float32(hidden_states)


def normalized_latents(trained, name, source, records, batch_size):
    """Posterior means as the SiT sees them: float32 numpy [N, h, w, C]."""
    vae = trained.nets.vae.clone(dtype=jnp.float32)
    grid = source.image_size // vae.factor
    if grid != trained.latent_shape[0] or source.image_size % vae.factor:
        raise ValueError(
            f"{name}: images have {source.image_size} pixels, the SiT is for {trained.latent_shape[0] * vae.factor}; give that "
            "as --image_size, or leave out --cknna"
        )

    def normalized(params, pixels):
        return latent_norm.normalize(posterior_mean(vae, params["vae"], images.to_float(pixels)), params["latent_stats"])

    run, found = in_float32(normalized), []
    with tqdm(total=len(records), unit="img", desc=f"{name}: latents") as bar:
        for batch, count in read_batches(source, records, batch_size):
            found.append(np.asarray(run(trained.params, jax.device_put(batch, sharding.batch_sharding(trained.mesh))))[:count])
            check_finite(found[-1], name, source, records[bar.n :])
            bar.update(count)
    return np.concatenate(found)


def measure_cknna(args, source, trained, images_source, records, encoders):
    """Agreement of a SiT's blocks with encoders.

    Args:
      args: the command line.
      source: Source.
      trained: LoadedModel.
      images_source: see `repae_jax.data`.
      records: positions in it.
      encoders: label -> (features float32 [N, F] of length 1, their Neighbors).

    Returns:
      [{'encoder', 'measure', 'timestep', 'blocks': values after block 1, 2, …}]; measures are CKNNA by both formulas,
      mutual kNN and linear CKA (biased).
    """
    sit, batch_size = trained.nets.sit, args.batch_size
    size = 4 * sit.depth * len(records) * sit.hidden_size
    check_bytes(size, f"{source.name}: hidden states of {len(records)} images", MAX_BYTES)
    z = normalized_latents(trained, source.name, images_source, records, batch_size)
    if args.labels == "own":
        data.check_labels(images_source, trained.num_classes)
        labels = images_source.labels[records]
    else:
        labels = np.full(len(records), sit.null_label, np.int32)
    run, key = make_hidden_states(trained), jax.random.key(args.seed)
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(trained.mesh))
    rows = []
    with tqdm(total=len(args.timesteps) * sit.depth, unit="block", desc=f"{source.name}: CKNNA") as bar:
        for t in args.timesteps:
            states = np.empty((sit.depth, len(records), sit.hidden_size), np.float32)
            for first in range(0, len(records), batch_size):
                ids = np.arange(first, first + batch_size)
                filled = np.minimum(ids, len(records) - 1)
                made = run(trained.params, put(z[filled]), put(ids), t, put(labels[filled]), key)
                states[:, first : first + batch_size] = np.asarray(made)[:, : len(records) - first]
            by_block = []
            for state in states:
                by_block.append(_agreement(state, encoders))
                bar.update()
            for encoder in encoders:
                for measure in by_block[0][encoder]:
                    values = [found[encoder][measure] for found in by_block]
                    rows.append({"encoder": encoder, "measure": measure, "timestep": t, "blocks": values})
    return rows


def _agreement(state, encoders):
    """encoder -> measure -> value, of one block's hidden states [N, D]."""
    state = representation.unit_rows(state)
    neighbors = representation.nearest(state, NEIGHBORS)
    return {
        encoder: {
            **{
                f"cknna_{formula}": representation.neighbor_alignment(neighbors, others, formula)
                for formula in representation.FORMULAS
            },
            "mutual_knn": representation.neighbor_overlap(neighbors, others),
            "cka": representation.cka(state, tokens),
        }
        for encoder, (tokens, others) in encoders.items()
    }
