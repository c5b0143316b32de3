"""What a config costs: an estimate from the sizes of its networks, before anything is built.

Counted are the multiplications of convolutions, matrices and attention, 2 FLOP each; a backward pass is twice the forward one,
or as much as it if only the inputs need gradients. Not counted: norms, activations, optimizers, recomputation (`remat`),
adaptive weights, EQ-VAE's smaller scales, pictures and data.
"""

from repae_jax.features import ARCHITECTURES, FAMILIES

H100 = {"bfloat16": 989e12, "float32": 494e12}  # dense peak in FLOP/s; float32 as TF32
UTILISATION = 0.3
VGG16 = ((1, 64, 2), (2, 128, 2), (4, 256, 3), (8, 512, 3), (16, 512, 3))  # downsampling, width, convolutions


def _conv(inputs, outputs, kernel, side):
    return 2 * kernel**2 * inputs * outputs * side**2


def _block(inputs, outputs, side):
    shortcut = _conv(inputs, outputs, 1, side) if inputs != outputs else 0
    return _conv(inputs, outputs, 3, side) + _conv(outputs, outputs, 3, side) + shortcut


def _attention(width, side):
    return 4 * _conv(width, width, 1, side) + 4 * side**4 * width


def vae(config):
    """Forward passes of one image: (encoder, decoder) in FLOP."""
    fields, size = config.vae, config.data.image_size
    widths = [fields.channels * multiplier for multiplier in fields.channel_multipliers]
    sides = [size // 2**level for level in range(len(widths))]
    middle = 2 * _block(widths[-1], widths[-1], sides[-1]) + _attention(widths[-1], sides[-1])

    def levels(order, blocks, width):
        total = 0
        for place, level in enumerate(order):
            for _ in range(blocks):
                total += _block(width, widths[level], sides[level])
                width = widths[level]
                total += _attention(width, sides[level]) if level in fields.attention_levels else 0
            if place + 1 < len(widths):  # a convolution at the side of the next level
                total += _conv(width, width, 3, sides[order[place + 1]])
        return total

    down, up = list(range(len(widths))), list(reversed(range(len(widths))))
    c, blocks, deepest = fields.latent_channels, fields.num_res_blocks, sides[-1]
    encoder = _conv(3, fields.channels, 3, size) + levels(down, blocks, fields.channels) + _conv(widths[-1], 2 * c, 3, deepest)
    decoder = _conv(c, widths[-1], 3, deepest) + levels(up, blocks + 1, widths[-1]) + _conv(widths[0], 3, 3, size)
    return encoder + middle, decoder + middle


def transformer(width, depth, tokens, mlp_ratio=4):
    """Forward pass of the blocks of a transformer, in FLOP."""
    return depth * ((8 + 4 * mlp_ratio) * width**2 * tokens + 4 * tokens**2 * width)


def sit(config, depth):
    """Forward pass of the first `depth` blocks of the SiT on one image, in FLOP, its modulations included."""
    fields = config.sit
    side = config.data.image_size // 2 ** (len(config.vae.channel_multipliers) - 1) // fields.patch_size
    return transformer(fields.hidden_size, depth, side**2, fields.mlp_ratio) + depth * 12 * fields.hidden_size**2


def encoder(config, entry):
    """Forward pass of an alignment target on one image, in FLOP."""
    fields = dict(ARCHITECTURES[entry.architecture]) if isinstance(entry.architecture, str) else dict(entry.architecture)
    pixels = entry.image_size or FAMILIES[fields.get("family", "dinov2")].pixels * config.data.image_size // 256
    width, tokens = fields["hidden_size"], (pixels // fields["patch_size"]) ** 2 + 1
    return transformer(width, fields["depth"], tokens, fields.get("mlp_dim", 4 * width) / width)


def discriminator(config):
    """Forward pass of the discriminator on one image, in FLOP."""
    size, width, total, inputs = config.data.image_size, config.disc.channels, 0, 3
    for layer in range(config.disc.num_layers + 1):
        outputs = width * min(2**layer, 8)
        size = size // 2 if layer < config.disc.num_layers else size - 1
        total, inputs = total + _conv(inputs, outputs, 4, size), outputs
    return total + _conv(inputs, 1, 4, size - 1)


def perceptual(config):
    """Forward pass of LPIPS' network on one image, in FLOP."""
    total, inputs = 0, 3
    for down, width, count in VGG16:
        for _ in range(count):
            total, inputs = total + _conv(inputs, width, 3, config.data.image_size // down), width
    return total


def tflop_per_image(config):
    """TFLOP that one step spends on one image."""
    total = sum(encoder(config, entry) for entry in config.encoders.values())
    encode, decode = vae(config)
    if config.job != "vae":
        total += 3 * sit(config, config.sit.depth)
    if config.job == "ldm":
        return (total + (0 if config.data.cache else encode)) / 1e12
    weights = config.loss.vae
    trains_vae = any(weights.values())
    total += (3 if trains_vae else 1) * (encode + decode)
    if weights.se:
        total += 3 * sum(decode / factor**2 for factor in config.loss.se_factors)
    if weights.lpips:
        total += 3 * perceptual(config)
    if weights.get("align"):
        total += 2 * sit(config, config.sit.encoder_depth)
    if weights.get("diffusion"):
        total += 2 * sit(config, config.sit.depth)
    if weights.gan or not trains_vae:
        total += (8 if trains_vae else 6) * discriminator(config)
    return total / 1e12


def h100_hours(config):
    """Hours of one H100 at UTILISATION of its peak, for all steps."""
    flop = tflop_per_image(config) * 1e12 * config.data.batch_size * config.steps
    return flop / (H100[config.precision.compute] * UTILISATION) / 3600
