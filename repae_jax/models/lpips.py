"""LPIPS with VGG16 features: a learned perceptual distance between images.

Reference: Zhang et al. 2018 (arXiv 1801.03924), version 0.1, in the form vendored by taming-transformers.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

# channels of VGG16's convolutions; each tuple ends before a max pooling and gives one feature map
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs.

    Attributes:
      dtype: compute dtype of the convolutions; normalisation and distances are float32.
    """

    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.convolutions = [
            [nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv_{stage}_{i}") for i, width in enumerate(widths)]
            for stage, widths in enumerate(VGG16_STAGES)
        ]
        self.weights = [
            self.param(f"linear_{stage}", nn.initializers.uniform(1.0), (widths[-1],))
            for stage, widths in enumerate(VGG16_STAGES)
        ]

    def _features(self, images):
        """Unit-length feature maps of the five stages, float32."""
        x = ((images - SHIFT) / SCALE).astype(self.dtype)
        maps = []
        for stage, convolutions in enumerate(self.convolutions):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for convolution in convolutions:
                x = nn.relu(convolution(x))
            f = x.astype(jnp.float32)
            # 1e-20 keeps the root's gradient finite where every feature is zero
            maps.append(f / (jnp.sqrt(jnp.sum(jnp.square(f), axis=-1, keepdims=True) + 1e-20) + 1e-10))
        return maps

    def __call__(self, images, others):
        """Distance of each pair.

        The sides pass through the network one after the other: where one of them needs no gradient (real images), nothing is
        kept for it.

        Args:
          images: [B, H, W, 3] in [-1, 1], H and W at least 16.
          others: the same shape and range.

        Returns:
          float32 [B]: per stage the mean over positions of the weighted squared difference, summed over the five stages.
        """
        pairs = zip(self._features(images), self._features(others), self.weights)
        stages = [jnp.mean(jnp.sum(jnp.square(a - b) * weights, axis=-1), axis=(1, 2)) for a, b, weights in pairs]
        return sum(stages)
