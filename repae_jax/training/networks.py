"""Networks as the losses see them: functions of parameters and arrays, which hide shards and Flax collections.

They hold no parameters. A loss differentiates with respect to one network's parameters and passes the others' as constants.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from repae_jax.distributed.sharding import unsharded
from repae_jax.models.autoencoder import DiagonalGaussian
from repae_jax.models.discriminator import PatchDiscriminator
from repae_jax.models.lpips import LPIPS
from repae_jax.models.sit import SiT, with_tap
from repae_jax.models.vae_families import VaeModule


class Nets(NamedTuple):
    """The Linen modules of a job; None where a job has none."""

    vae: VaeModule
    sit: SiT | None
    disc: PatchDiscriminator | None
    lpips: LPIPS | None


@dataclass(frozen=True)
class _Bound:
    module: Any  # of Nets

    def _apply(self, params, *arrays, **options):
        return self.module.apply({"params": unsharded(params)}, *arrays, **options)


class BoundVAE(_Bound):
    """The VAE; images are in [-1, 1], latents un-normalized."""

    def latent_shape(self, images: Any) -> tuple[int, ...]:
        """Returns the shape [B, h, w, C] of the latents of images [B, H, W, 3]."""
        batch, height, width, _ = images.shape
        return batch, height // self.module.factor, width // self.module.factor, self.module.latent_channels

    def encode(self, params: Any, images: Float[Array, "B H W 3"]) -> DiagonalGaussian:
        """Returns the posterior q(z|x)."""
        return self._apply(params, images, method="encode")

    def decode(self, params: Any, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Returns the reconstruction, not clipped."""
        return self._apply(params, latents, method="decode")

    def project(self, params: Any, latents: Float[Array, "B h w C"]) -> Float[Array, "B h w F"]:
        """Returns VA-VAE's linear map of the latents to the encoder's features."""
        return self._apply(params, latents, method="project")


class BoundSiT(_Bound):
    """The diffusion transformer."""

    @property
    def null_label(self) -> int:
        """Returns the label that stands for no class."""
        return self.module.null_label

    def __call__(self, params: Any, z_t: Float[Array, "B h w C"], t: Array, labels: Int[Array, " B"]):
        """Returns the network's output [B, h, w, C], or [B, h, w, 2C] with a variance, and what the tap gives, a `sit.Tap`."""
        return with_tap(self.module, unsharded(params), z_t, t, labels)

    def align(self, params: Any, z_t: Float[Array, "B h w C"], t: Array, labels: Int[Array, " B"]):
        """Returns the projections of `__call__` alone; no block beyond the one that they are taken from is computed."""
        return self._apply(params, z_t, t, labels, method="align")

    def tokens_after(self, params: Any, z_t: Float[Array, "B h w C"], t: Array, labels: Int[Array, " B"], blocks: int):
        """Returns the hidden states [B, T, D] after so many blocks, past the tap."""
        return self._apply(params, z_t, t, labels, blocks, method="tokens_after")


class BoundDiscriminator(_Bound):
    """The discriminator; its batch norms normalize with the batch's own statistics; the running ones are for export."""

    def __call__(self, params: Any, batch_stats: Any, images: Float[Array, "B H W 3"]):
        """Returns logits, positive for real, and the running statistics after these images."""
        variables = {"params": unsharded(params), "batch_stats": batch_stats}
        logits, updates = self.module.apply(variables, images, mutable=["batch_stats"])
        return logits, updates["batch_stats"]


class BoundLPIPS(_Bound):
    """The perceptual distance."""

    def __call__(self, params: Any, images: Float[Array, "B H W 3"], others: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Returns the distance of each pair."""
        return self._apply(params, images, others)


class BoundNets(NamedTuple):
    """The networks of a job; None where a job has none."""

    vae: BoundVAE
    sit: BoundSiT | None
    disc: BoundDiscriminator | None
    lpips: BoundLPIPS | None


def bind(nets: Nets) -> BoundNets:
    """Returns the modules as functions of their parameters, which are gathered from their shards where they are used."""
    kinds = BoundVAE, BoundSiT, BoundDiscriminator, BoundLPIPS
    return BoundNets(*(None if net is None else kind(net) for kind, net in zip(kinds, nets)))
