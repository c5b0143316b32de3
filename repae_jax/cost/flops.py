"""What a config costs in arithmetic: FLOP per image by part, from the sizes of its networks, before anything is built.

Counted are the products of convolutions, matrices and attention, a multiplication with its addition as 2 FLOP, forward and
backward as the step does them. Not counted: norms, activations, optimizers, resizing, recomputation (`remat`), data, pictures.
`tests/test_flops.py` holds their sum against the operations of the traced step, and each against those of what the benchmark
times.
"""

import dataclasses

from repae_jax.diffusion import ddpm, guidance, samplers
from repae_jax.models import encoders as features
from repae_jax.models.lpips import VGG16_STAGES
from repae_jax.models.vit import SWIGLU

# dense FLOP/s of one device in bfloat16, by what its `device_kind` begins with; the first that fits counts
PEAKS = {
    "TPU7x": 2307e12 / 2, "TPU v6": 918e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v4": 275e12,
    "TPU v3": 123e12 / 2,  # of a v3 and a 7x, half a chip is a device
    "NVIDIA GB200": 2500e12, "NVIDIA B200": 2250e12, "NVIDIA GH200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"
UTILISATION = 0.3


def peak(device_kind, precision="bfloat16"):
    """Dense peak of one device.

    Args:
      device_kind: as JAX names it, such as 'TPU v5 lite' or 'NVIDIA H200'.
      precision: 'bfloat16' or 'float32', with which JAX multiplies on TPUs in bfloat16, too, and on GPUs in TF32, which is
        half as fast.

    Returns:
      FLOP/s; None for a device that is not in PEAKS, such as a CPU.
    """
    found = next((value for name, value in PEAKS.items() if device_kind.startswith(name)), None)
    return found / 2 if found and precision == "float32" and not device_kind.startswith("TPU") else found


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOP of a network's forward pass on one image.

    Attributes:
      weights: in products of activations with parameters.
      products: in products of activations with each other, those of attention.
    """

    weights: float
    products: float = 0.0

    def __add__(self, other):
        return Cost(self.weights + other.weights, self.products + other.products)

    def __mul__(self, times):
        return Cost(times * self.weights, times * self.products)

    @property
    def forward(self):
        """FLOP of the forward pass."""
        return self.weights + self.products

    @property
    def training(self):
        """FLOP of the forward pass and of the gradients of inputs and parameters."""
        return 3 * self.forward

    @property
    def to_inputs(self):
        """FLOP of the gradient of the inputs alone."""
        return self.weights + 2 * self.products


NOTHING = Cost(0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Networks: the forward pass on one image.
# ---------------------------------------------------------------------------------------------------------------------


def _conv(inputs, outputs, kernel, side):
    return Cost(2 * kernel**2 * inputs * outputs * side**2)


def _block(inputs, outputs, side):
    shortcut = _conv(inputs, outputs, 1, side) if inputs != outputs else NOTHING
    return _conv(inputs, outputs, 3, side) + _conv(outputs, outputs, 3, side) + shortcut


def _attention(width, side):
    return _conv(width, width, 1, side) * 4 + Cost(0.0, 4 * side**4 * width)


def vae(config, scale=1.0):
    """(encoder, decoder) of the VAE: Cost, of images whose sides are `scale` times the config's."""
    fields, size = config["vae"], round(config["data"]["image_size"] * scale)
    widths = [fields["channels"] * multiplier for multiplier in fields["channel_multipliers"]]
    sides = [size / 2**level for level in range(len(widths))]
    middle = _block(widths[-1], widths[-1], sides[-1]) * 2 + _attention(widths[-1], sides[-1])

    def levels(order, blocks, width):
        total = NOTHING
        for place, level in enumerate(order):
            for _ in range(blocks):
                total += _block(width, widths[level], sides[level])
                width = widths[level]
                total += _attention(width, sides[level]) if level in fields["attention_levels"] else NOTHING
            if place + 1 < len(widths):  # a convolution at the side of the next level
                total += _conv(width, width, 3, sides[order[place + 1]])
        return total

    down, up = list(range(len(widths))), list(reversed(range(len(widths))))
    c, blocks, deepest = fields["latent_channels"], fields["num_res_blocks"], sides[-1]
    quant = (_conv(2 * c, 2 * c, 1, deepest), _conv(c, c, 1, deepest)) if fields["quant_convs"] else (NOTHING, NOTHING)
    encoder = _conv(3, widths[0] // fields["channel_multipliers"][0], 3, size) + levels(down, blocks, fields["channels"])
    encoder += middle + _conv(widths[-1], 2 * c, 3, deepest) + quant[0]
    decoder = quant[1] + _conv(c, widths[-1], 3, deepest) + middle
    return encoder, decoder + levels(up, blocks + 1, widths[-1]) + _conv(widths[0], 3, 3, size)


def transformer(width, depth, tokens, mlp_dim, mlp_matrices=2):
    """Blocks of a transformer."""
    return Cost((8 * width**2 + 2 * mlp_matrices * mlp_dim * width) * tokens, 4 * tokens**2 * width) * depth


def token_grid(config):
    """Tokens of the SiT per side."""
    return config["data"]["image_size"] // 2 ** (len(config["vae"]["channel_multipliers"]) - 1) // config["sit"]["patch_size"]


def sit(config, depth):
    """The first `depth` blocks of the SiT with embeddings and modulations; the head too if these are all blocks."""
    fields = config["sit"]
    width, tokens, pixels = fields["hidden_size"], token_grid(config) ** 2, fields["patch_size"] ** 2
    channels = config["vae"]["latent_channels"]
    embedding = Cost(2 * pixels * channels * width * tokens + 2 * (256 * width + width**2))
    blocks = transformer(width, depth, tokens, int(width * fields["mlp_ratio"])) + Cost(12 * width**2 * depth)
    if depth < fields["depth"]:
        return embedding + blocks
    outputs = pixels * channels * (2 if fields["learned_sigma"] else 1)
    return embedding + blocks + Cost(4 * width**2 + 2 * width * outputs * tokens)


def projectors(config, encoders):
    """The SiT's projectors to the features of all encoders."""
    fields, tokens = config["sit"], token_grid(config) ** 2
    width, hidden = fields["hidden_size"], fields["projector_dim"]
    dims = [encoder.module.hidden_size for encoder in encoders]
    if fields["projector"] == "conv":
        return Cost(sum(2 * 9 * width * dim * tokens for dim in dims))
    return Cost(sum(2 * (width * hidden + hidden**2 + hidden * dim) * tokens for dim in dims))


def vision_transformer(module):
    """A frozen encoder, a VisionTransformer."""
    patches, width = module.grid[0] * module.grid[1], module.hidden_size
    tokens = patches + module.num_class_tokens + module.num_registers
    matrices = 3 if module.activation == SWIGLU else 2
    embedding = Cost(2 * 3 * module.patch_size**2 * width * patches)
    return embedding + transformer(width, module.depth, tokens, module.mlp_dim, matrices)


def discriminator(config, scale=1.0):
    """The discriminator on images whose sides are `scale` times the config's."""
    size, width = round(config["data"]["image_size"] * scale), config["disc"]["channels"]
    total, inputs, layers = NOTHING, 3, config["disc"]["num_layers"]
    for layer in range(layers + 1):
        outputs = width * min(2**layer, 8)
        size = size // 2 if layer < layers else size - 1
        total, inputs = total + _conv(inputs, outputs, 4, size), outputs
    return total + _conv(inputs, 1, 4, size - 1)


def perceptual(config, scale=1.0):
    """LPIPS' network on one image of a pair, its sides `scale` times the config's."""
    total, inputs, size = NOTHING, 3, round(config["data"]["image_size"] * scale)
    for stage, widths in enumerate(VGG16_STAGES):
        for width in widths:
            total, inputs = total + _conv(inputs, width, 3, size // 2**stage), width
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Steps and samples: what they do with the networks.
# ---------------------------------------------------------------------------------------------------------------------


def parts(config, encoders=None):
    """FLOP that a training step spends on one image, by part; where it draws what it does, as EQ-VAE's scales, the mean.

    Args:
      config: ConfigDict or nested dict, see configs/.
      encoders: tuple of features.Encoder, as `build.Job` has them; default those that the config describes.

    Returns:
      dict, part -> FLOP: those there are of 'vae_encoder', 'vae_decoder', 'sit', 'align_pass' and 'diffusion_pass' (the SiT for
      the VAE's loss), 'lpips', 'discriminator', 'scale_equivariance', 'vf', and 'encoder_NAME' for each of config.encoders.

    Raises:
      ValueError: for an encoder whose architecture is in its weights alone, if `encoders` is not given.
    """
    config = _plain(config)
    encoders = described_encoders(config) if encoders is None else encoders
    named = {f"encoder_{name}": vision_transformer(e.module).forward for name, e in zip(sorted(config["encoders"]), encoders)}
    return {**named, **(_sit_parts(config, encoders) if "sit" in config else {}), **_vae_parts(config, encoders)}


def per_image(config, encoders=None):
    """FLOP that a training step spends on one image, recomputation not counted; arguments as in `parts`."""
    return sum(parts(config, encoders).values())


def described_encoders(config):
    """Tuple of features.Encoder as the config alone describes them; ValueError if it does not."""
    found = []
    for name, entry in sorted(config["encoders"].items()):
        if not entry["architecture"]:
            raise ValueError(
                f"config.encoders.{name}.architecture is not set: what this encoder costs is in its weights alone; give the "
                f"architecture, one of {list(features.ARCHITECTURES)}, or the encoders of the built job"
            )
        size = config["data"]["image_size"]
        found.append(features.make_encoder(entry["architecture"], size, image_size=entry["image_size"]))
    return tuple(found)


def _plain(config):
    return config.to_dict() if hasattr(config, "to_dict") else config


def _sit_parts(config, encoders):
    weights, whole = config["loss"]["sit"], sit(config, config["sit"]["depth"])
    return {"sit": (whole + (projectors(config, encoders) if weights["align"] else NOTHING)).training}


def _vae_parts(config, encoders):
    if config["job"] == "ldm":
        return {} if config["data"]["cache"] else {"vae_encoder": vae(config)[0].forward}
    weights, loss, fixed = config["loss"]["vae"], config["loss"], config["optim"]["vae"]["fixed"]
    scales = _scales(config)
    encoder = vae(config)[0]
    if not any(weights.values()):  # the discriminator of a frozen VAE: real images and reconstructions
        decoder = vae(config)[1]
        made = {"vae_encoder": encoder.forward, "vae_decoder": decoder.forward}
        return made | {"discriminator": 2 * discriminator(config).training}
    decoder = sum((vae(config, scale)[1] * share for scale, share in scales), NOTHING)
    made = {"vae_encoder": encoder.forward if "encoder" in fixed else encoder.training, "vae_decoder": decoder.training}
    if weights["vf"] and loss["adaptive"]["vf"] and weights["gan"]:  # the pixels' own gradient at the latents, to compare
        made["vae_decoder"] += decoder.to_inputs
    if weights["lpips"]:
        image = sum((perceptual(config, scale) * share for scale, share in scales), NOTHING)
        made["lpips"] = 2 * image.forward + image.to_inputs
    if weights["gan"]:
        image = sum((discriminator(config, scale) * share for scale, share in scales), NOTHING)
        made["discriminator"] = image.forward + image.to_inputs + 2 * image.training
    if weights["se"]:
        made["scale_equivariance"] = 0.0
        for scale in (1 / factor for factor in loss["se_factors"]):
            small = perceptual(config, scale) if weights["lpips"] else NOTHING
            made["scale_equivariance"] += vae(config, scale)[1].training + 2 * small.forward + small.to_inputs
    if weights["vf"]:
        tokens, width = encoders[0].grid ** 2, encoders[0].module.hidden_size
        projection, gram = Cost(2 * config["vae"]["latent_channels"] * width * tokens), 2 * tokens**2 * width
        made["vf"] = projection.training + gram + Cost(0.0, gram).training  # the encoder's tokens need no gradient
    if weights.get("align"):
        seen = sit(config, config["sit"]["encoder_depth"]) + projectors(config, encoders)
        made["align_pass"] = seen.forward + seen.to_inputs
    if weights.get("diffusion"):
        whole = sit(config, config["sit"]["depth"])
        made["diffusion_pass"] = whole.forward + whole.to_inputs
    return made


def scale_shares(config):
    """Shares of the steps that draw each of config.loss.eq_scales, in order; [] where none is drawn."""
    loss = config["loss"]
    if not loss.get("eq_scales"):
        return []
    _, *others = loss["eq_scales"]
    return [loss["eq_prior"], *((1 - loss["eq_prior"]) / len(others) for _ in others)]


def _scales(config):
    """[(scale of the reconstruction, share of the steps)]."""
    shares = scale_shares(config)
    return list(zip(config["loss"]["eq_scales"], shares)) if shares else [(1.0, 1.0)]


def sampling_parts(config, sampling):
    """FLOP that sampling spends on one image, by part.

    Args:
      config: ConfigDict or nested dict, see configs/.
      sampling: generate.Sampling.

    Returns:
      {'sit': …, 'vae_decoder': …}: steps in the guidance interval count twice, Heun's steps twice, all but the last.
    """
    config = _plain(config)
    return {
        "sit": sit_calls(sampling) * sit(config, config["sit"]["depth"]).forward,
        "vae_decoder": vae(config)[1].forward,
    }


def sit_calls(sampling):
    """How often an image passes through the SiT while it is sampled, the null label's passes included."""
    make_times = {"sde": samplers.sde_times, "ancestral": ddpm.timesteps}.get(sampling.sampler, samplers.ode_times)
    times, last = make_times(sampling.steps), ddpm.NUM_TIMESTEPS - 1 if sampling.sampler == "ancestral" else 1
    interval = (sampling.guidance_low * last, sampling.guidance_high * last)
    stretches = guidance.segments(times, interval, 2 if sampling.guidance_scale > 1 else 1, 1)
    calls = sum(images * (len(stretch) - 1) for stretch, images in stretches)
    return 2 * calls - stretches[-1][1] if sampling.sampler == "heun" else calls


def h100_hours(config):
    """Hours of one H100 at UTILISATION of its peak, for all steps."""
    flop = per_image(config) * config["data"]["batch_size"] * config["steps"]
    return flop / (peak(H100, config["precision"]["compute"]) * UTILISATION) / 3600
