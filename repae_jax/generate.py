"""Noise -> latents -> images, with the averaged SiT; shared by the training pictures and `repae_jax.sample`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from repae_jax.diffusion import guidance, latent_norm, samplers
from repae_jax.images import to_uint8

SAMPLERS = ("euler", "heun", "sde")


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
      sampler: 'euler' or 'heun' (ODE), or 'sde' (Euler-Maruyama, last step from t = 0.04), the paper's.
      steps: steps from noise to data; of Heun, two network calls each but the last.
      guidance_scale: 1 is no guidance.
      guidance_low: guidance applies to steps that start at guidance_low <= t <= guidance_high (t = 1 is noise).
      guidance_high: see above.

    Raises:
      ValueError: for an unknown sampler or values out of range.
    """

    sampler: str = "sde"
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}: a sampler needs at least 2")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise ValueError(f"guidance interval [{self.guidance_low}, {self.guidance_high}] must lie in [0, 1], low first")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be at least 1 (1 is no guidance)")


def make_generate(nets, path, latent_shape, sampling):
    """Sampling function, to be jitted.

    Everything runs in float32, as published, whatever the compute dtype of training.

    Args:
      nets: Nets.
      path: the interpolant's name.
      latent_shape: (h, w, C).
      sampling: Sampling.

    Returns:
      (params, labels int [B], ids int [B], key) -> uint8 images [B, H, W, 3]. `params` is {'sit': …, 'vae': …,
      'latent_stats': ChannelStats}: the averaged SiT and statistics, and the VAE. Image i depends on (key, ids[i], labels[i])
      alone, not on the batch it is in.
    """
    sit, vae = nets.sit.clone(dtype=jnp.float32), nets.vae.clone(dtype=jnp.float32)

    def generate(params, labels, ids, key):
        def velocity_fn(z_t, t, y):
            return sit.apply({"params": params["sit"]}, z_t, t, y)[0][..., : latent_shape[-1]]  # without a learned sigma

        def plain(z_t, t):
            return velocity_fn(z_t, t, labels)

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)

        def noise_fn(index):
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), latent_shape))(keys)

        is_sde = sampling.sampler == "sde"
        times = (samplers.sde_times if is_sde else samplers.ode_times)(sampling.steps)
        segments = [(times, plain)]
        if sampling.guidance_scale > 1:
            guided = guidance.guide(velocity_fn, labels, sit.null_label, sampling.guidance_scale)
            interval = sampling.guidance_low, sampling.guidance_high
            segments = guidance.segments(times, interval, guided, plain)
        z = noise_fn(sampling.steps)  # an index that no step uses
        if is_sde:
            z = samplers.euler_maruyama(segments, z, path, noise_fn)
        else:
            z = (samplers.heun if sampling.sampler == "heun" else samplers.euler)(segments, z)
        latents = latent_norm.denormalize(z, params["latent_stats"])
        return to_uint8(vae.apply({"params": params["vae"]}, latents, method="decode"))

    def precise(*args):
        # float32 means float32 on every platform: at least three bfloat16 passes on TPUs, TF32 on GPUs as published
        with jax.default_matmul_precision("high"):
            return generate(*args)

    return precise


def sampling_params(state):
    """What `make_generate` needs of a TrainState."""
    return {"sit": state.ema.params, "vae": state.vae.params, "latent_stats": state.ema.latent_stats}


def make_reconstruct(nets):
    """(VAE parameters, float images [B, H, W, 3] in [-1, 1]) -> uint8 reconstructions through the posterior's mean."""

    def reconstruct(vae_params, images):
        posterior = nets.vae.apply({"params": vae_params}, images, method="encode")
        return to_uint8(nets.vae.apply({"params": vae_params}, posterior.mode(), method="decode"))

    return reconstruct
