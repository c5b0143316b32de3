"""The scales of the miniature paper: pictures, networks, steps. Everything else of a run is the same at every scale."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from launch import small_networks

HORIZON = 1 / 15  # share of a run over which averages of weights reach back: their decay is 1 - 1 / (steps * HORIZON)
# Of a VAE that is trained alone: KL hardly counts, as in latent diffusion's code, where it stands beside sums over pixels.
TOKENIZER = {
    "loss.vae.kl": 1e-6, "optim.vae.learning_rate": 1e-3, "optim.vae.schedule": "cosine", "optim.vae.final_learning_rate": 1e-4,
}  # fmt: skip
# Standard deviation of SD-VAE's latents, 1 / 0.18215, to which those of a VAE that was trained alone are scaled.
SDVAE_STD = 5.5
CKNNA_TIME = 0.5  # at which SiT's hidden states are compared with the encoder, as REPA does
BLOCK = 8  # side of the blocks whose spectrum is measured, at most the latents' side
SHOWN = 4  # samples of each class, and held-out pictures of each class, that are kept to be looked at
SAMPLERS = {"sit": {"sampler": "heun", "steps": 8}, "dit": {"sampler": "ancestral", "steps": 25}}  # of every scale


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scale:
    """A size at which all of the miniature paper can be run."""

    name: str
    pictures: str  # 'digits', or 'emoji', which are prepared once
    image_size: int
    platform: str  # 'cpu', or '' for whatever JAX finds
    batch_size: int
    encoder: Mapping[str, Any]  # architecture
    # Dotted config fields -> values: of all runs, and of those whose settings name them.
    fields: Mapping[str, Any]
    other_vae: Mapping[str, Any]
    shallow: Mapping[str, Any]
    deep: Mapping[str, Any]
    smaller: Mapping[str, Any]
    larger: Mapping[str, Any]
    encoder_steps: Mapping[str, int]  # quality -> training steps
    vae_steps: int
    steps: int  # of every SiT, alone or together with a VAE; a multiple of 4
    # FLOP of a step of REPA-E over those of a setting's, rounded to quarters: for as many times the steps does a run of the
    # setting go on, so that they can be compared at equal compute, too.
    compute_ratio: Mapping[str, float]
    samples: int  # for a Frechet distance; their labels are as frequent as those of the training pictures
    seeds: int = 3
    main_seeds: int = 3  # of the settings of table `main`

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Fields of a VAE that is trained alone."""
        return {**TOKENIZER, "optim.vae.decay_steps": self.vae_steps}

    @property
    def cooled(self) -> dict[str, Any]:
        """Fields of a SiT whose learning rate falls in the last fifth of the steps."""
        start = self.steps * 4 // 5
        return {"optim.sit.schedule": "1-sqrt", "optim.sit.decay_start": start, "optim.sit.decay_steps": self.steps}

    @property
    def self_aligned(self) -> dict[str, Any]:
        """Fields of a SiT that aligns with its average after 0.7 of its blocks, as Self-Flow's does."""
        return {"loss.self_depth": round(0.7 * self.fields.get("sit.depth", 6))}

    @property
    def ema_decay(self) -> float:
        """Decay of the averages of the weights."""
        return round(1 - 1 / (self.steps * HORIZON), 4)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="digits", pictures="digits", image_size=16, platform="cpu", batch_size=32,
            fields={
                "vae.latent_channels": 32, "vae.channels": 8, "vae.channel_multipliers": (1, 2, 4), "vae.norm_groups": 4,
                "sit.hidden_size": 64, "sit.num_heads": 2, "sit.projector_dim": 128, "sit.unroll": 1, "disc.channels": 16,
                "loss.vae.kl": 8e-6, "optim.vae.learning_rate": 1e-4,
            },
            other_vae={"vae.latent_channels": 8, "loss.vae.kl": 3.2e-5},
            shallow={"sit.encoder_depth": 1}, deep={"sit.encoder_depth": 4},
            smaller={"sit.hidden_size": 32}, larger={"sit.hidden_size": 96}, encoder=small_networks.ENCODERS["digits"],
            encoder_steps={"weak": 40, "trained": 600}, vae_steps=1200, steps=800,
            compute_ratio={"sit": 2.75, "repa": 2.25, "vae-every-2": 1.25, "vae-every-4": 1.75}, samples=1000, main_seeds=6,
        ),
        Scale(
            name="small", pictures="emoji", image_size=32, platform="cpu", batch_size=32,
            fields={
                "vae.latent_channels": 16, "vae.channels": 16, "vae.channel_multipliers": (1, 2, 3), "vae.norm_groups": 4,
                "sit.patch_size": 2, "sit.hidden_size": 128, "sit.num_heads": 4, "sit.projector_dim": 256, "sit.unroll": 1,
                "disc.channels": 16, "loss.vae.kl": 4e-6, "optim.vae.learning_rate": 1e-4,
            },
            other_vae={"vae.latent_channels": 4, "loss.vae.kl": 1.6e-5},
            shallow={"sit.encoder_depth": 1}, deep={"sit.encoder_depth": 4},
            smaller={"sit.hidden_size": 64}, larger={"sit.hidden_size": 192}, encoder=small_networks.ENCODERS["emoji"],
            encoder_steps={"weak": 100, "trained": 2000}, vae_steps=3000, steps=1200,
            compute_ratio={"sit": 4, "repa": 3.5, "vae-every-2": 1.5, "vae-every-4": 2.25}, samples=1000,
        ),
        Scale(
            name="medium", pictures="emoji", image_size=64, platform="", batch_size=128,
            fields={
                "data.workers": 8,  # a core decodes 4,300 pictures a second; SiT alone takes three to five times as many
                "vae.latent_channels": 32, "vae.channels": 32, "vae.channel_multipliers": (1, 2, 4, 4), "vae.norm_groups": 8,
                "sit.patch_size": 1, "sit.hidden_size": 384, "sit.depth": 12, "sit.num_heads": 6, "sit.encoder_depth": 4,
                "sit.projector_dim": 1024, "sit.unroll": 12, "disc.channels": 32, "precision.compute": "bfloat16",
                "loss.vae.kl": 2e-6, "optim.sit.learning_rate": 5e-4, "optim.vae.learning_rate": 5e-5,
            },
            other_vae={"vae.latent_channels": 8, "loss.vae.kl": 8e-6},
            shallow={"sit.encoder_depth": 3}, deep={"sit.encoder_depth": 5},
            smaller={"sit.hidden_size": 192, "sit.num_heads": 3}, larger={"sit.hidden_size": 768, "sit.num_heads": 12},
            encoder={"patch_size": 8, "hidden_size": 192, "depth": 6, "num_heads": 6},
            encoder_steps={"weak": 500, "trained": 10_000}, vae_steps=10_000, steps=2000,
            compute_ratio={"sit": 2.25, "repa": 2, "vae-every-2": 1.25, "vae-every-4": 1.5}, samples=5000,
        ),
    )
}  # fmt: skip
