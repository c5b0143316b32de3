"""Speed beside the published PyTorch code: `python measurements/compare_published.py --published REPA-E`.

REPA-E is a checkout of https://github.com/End2End-Diffusion/REPA-E. Its networks and losses are used unchanged; its step is
the loop body of its `train_repae.py` without logging. Our step is the one that training compiles for configs/repae.py. Both
have the same sizes, loss terms and batch, random weights, and images that are on the device already.

Each side is a process of its own. They take turns, so that other load on the machine slows both: in every repeat one side runs
some steps while the other waits, then the other; the next repeat has the reverse order. Ratios are computed within a repeat.

Needs torch and transformers. Of the published code's other packages, timm and dictdot are imported if they are installed and
replaced by a few equivalent lines otherwise; its encoder, which comes from torch.hub, is transformers' DINOv2.
"""

import argparse
import contextlib
import copy
import functools
import importlib.machinery
import itertools
import math
import multiprocessing
import os
import sys
import time
import traceback
import types
import warnings
from pathlib import Path

import numpy as np

from repae_jax import cli, files

ROOT = Path(__file__).parents[1]
print_at_once = functools.partial(print, flush=True)
FILES = (
    "train_repae.py", "loss/discriminator.py", "loss/losses.py", "loss/lpips.py", "loss/perceptual_loss.py",
    "models/autoencoder.py", "models/sit.py",
)  # fmt: skip
PUBLISHED, OURS = SIDES = ("published", "ours")
TOLERANCE = 0.01  # relative difference of parameter counts
TERMS = {"l1": "vae/l1", "kl": "vae/kl", "hinge": "disc/hinge", "velocity": "sit/velocity"}  # compared: name -> our metric
SAME_SIZE = 10  # largest factor between losses; KL depends on the random biases of a few channels
SMALL = {
    "precision.compute": "float32", "sit.remat": "none", "sit.unroll": 12, "sit.projector_dim": 512, "data.num_classes": 100,
}  # fmt: skip
# sizes for CPUs; convolutions of VAE and LPIPS dominate in the first, matrix products of the SiT in the second
SIZES = {
    "conv": {
        "data.image_size": 64, "data.batch_size": 8, "vae.channels": 32,
        "sit.hidden_size": 192, "sit.depth": 4, "sit.num_heads": 3, "sit.encoder_depth": 2,
        "encoders.target.architecture": {"patch_size": 14, "hidden_size": 192, "depth": 4, "num_heads": 3},
    },
    "transformer": {
        "data.image_size": 64, "data.batch_size": 8, "vae.channels": 32, "vae.channel_multipliers": (1, 2, 4),
        "sit.hidden_size": 384, "sit.depth": 12, "sit.num_heads": 6, "sit.encoder_depth": 4,
        "encoders.target.architecture": {"patch_size": 14, "hidden_size": 384, "depth": 4, "num_heads": 6},
        "encoders.target.image_size": 112,
    },
}  # fmt: skip


def set_fast(config):
    """Sets a config of configs/repae.py to what docs/performance.md advises on NVIDIA GPUs that have the memory."""
    config.sit.unroll, config.sit.remat, config.attention = config.sit.depth, "none", "cudnn"


def config_of(size, batch_size, is_fast=False):
    """Returns the config of a run of configs/repae.py as a nested dict; ValueError for a size that does not exist.

    Args:
      size: name in SIZES, or the part behind the colon of `configs/repae.py:sit=XL/2,vae=f8d4`.
      batch_size: None is the size's own, 32 for those of configs/repae.py.
      is_fast: with the values of `set_fast`.
    """
    from configs import repae

    changes = {**SMALL, **SIZES[size]} if size in SIZES else {"data.batch_size": 32}
    if batch_size is not None:
        changes = {**changes, "data.batch_size": batch_size}
    config = repae.get_config("" if size in SIZES else size).unlock()
    with config.ignore_type():  # an architecture may be a name or a mapping
        config.update_from_flattened_dict({**changes, "lpips.input_range": (0.0, 1.0)})  # as the published code has it
    if is_fast:
        set_fast(config)
    return config.to_dict()


def check_checkout(folder):
    """Returns the path of the published code; ValueError if files are missing."""
    folder = Path(folder).expanduser()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        advice = "give a checkout of github.com/End2End-Diffusion/REPA-E"
        raise ValueError(f"--published={folder} lacks {', '.join(missing)}; {advice}")
    return folder


def check_losses(published, ours):
    """Raises ValueError if a term of both sides' first losses differs by more than SAME_SIZE; arguments are term -> value.

    The networks' weights are different random numbers of the same distributions. Terms that may have any sign (GAN, alignment)
    are left out, and LPIPS, whose random weights have another distribution.
    """
    differing = [
        f"{term} ({published[term]:.4g} published, {ours[term]:.4g} ours)"
        for term in TERMS
        if not ours[term] / SAME_SIZE < published[term] < SAME_SIZE * ours[term]
    ]
    if differing:
        raise ValueError(f"the first losses differ by more than a factor of {SAME_SIZE}: {'; '.join(differing)}")


def check_parameters(published, ours):
    """Raises ValueError if networks of both sides differ in size; arguments are name -> number of parameters."""
    differing = [
        f"{name} ({published.get(name, 0):,} published, {ours.get(name, 0):,} ours)"
        for name in sorted({*published, *ours})
        if abs(published.get(name, 0) - ours.get(name, 0)) > TOLERANCE * published.get(name, 0)
    ]
    if differing:
        raise ValueError(f"the networks differ by more than {TOLERANCE:.0%} in parameters: {'; '.join(differing)}")


def summarize(seconds, batch_size):
    """Returns {'published', 'ours': images/s of the median repeat, 'ratio': {'median', 'low', 'high', 'repeats'}}.

    The ratio is ours over published within each repeat, above 1 if ours is faster; `seconds` has each side's per step.
    """
    ratios = np.divide(seconds[PUBLISHED], seconds[OURS])
    speeds = {side: batch_size / float(np.median(seconds[side])) for side in SIDES}
    spread = {"median": float(np.median(ratios)), "low": float(np.min(ratios)), "high": float(np.max(ratios))}
    return {**speeds, "ratio": {**spread, "repeats": len(ratios)}}


def time_steps(step, wait, steps):
    """Returns seconds per step of some steps after a warm-up step; the device is idle when the clock starts and stops.

    `step` dispatches a step and returns its losses, and `wait` blocks until they are computed.
    """
    wait(step())
    began = time.perf_counter()
    for _ in range(steps):
        losses = step()
    wait(losses)
    return (time.perf_counter() - began) / steps


# ---- the published code ---------------------------------------------------------------------------------------------


def stand_in(name, **members):
    """Registers a module with these members in sys.modules."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(members)
    sys.modules[name] = module
    if "." in name:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)


def make_importable(folder):
    """Makes the published modules importable; returns the names of the packages that are replaced."""
    import torch
    import transformers  # noqa: F401 (looks for torchvision when imported: must come before its replacement)
    from torch import nn

    absent = []
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError:
        absent.append("timm")
        for name in ("timm", "timm.models"):
            stand_in(name)
        stand_in("timm.models.vision_transformer", **transformer_layers())
    try:
        import dictdot  # noqa: F401
    except ImportError:
        absent.append("dictdot")
        stand_in("dictdot", dictdot=lambda values: types.SimpleNamespace(**values))

    def vgg16(weights):
        layers, width = [], 3
        for features in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if not features:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(width, features, 3, padding=1), nn.ReLU(inplace=True)]
            width = features
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    # always replaced: the weights that it would download do not change the speed
    stand_in("torchvision")
    stand_in("torchvision.models", vgg16=vgg16, VGG16_Weights=types.SimpleNamespace(IMAGENET1K_V1=None))
    if importlib.util.find_spec("requests") is None:
        absent.append("requests")
        stand_in("requests")
    sys.dont_write_bytecode = True  # write nothing into the checkout
    warnings.filterwarnings("ignore", category=FutureWarning)  # about names that the checkout uses
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    return absent


def transformer_layers():
    """Returns the parts of timm's layers that the published SiT uses."""
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    class PatchEmbed(nn.Module):
        def __init__(self, size, patch_size, in_channels, width, bias):
            super().__init__()
            self.patch_size = (patch_size, patch_size)
            self.num_patches = (size // patch_size) ** 2
            self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    class Attention(nn.Module):
        def __init__(self, width, num_heads, qkv_bias, qk_norm):
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
            self.proj = nn.Linear(width, width)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))

    class Mlp(nn.Module):
        def __init__(self, in_features, hidden_features, act_layer, drop):
            super().__init__()
            self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
            self.fc2 = nn.Linear(hidden_features, in_features)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    return {"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp}


def published_networks(config, encoder):
    """Returns the published modules 'vae', 'sit', 'loss' (with discriminator and LPIPS) and 'encoder' in a config's sizes."""
    from loss.losses import ReconstructionLoss_Single_Stage
    from loss.lpips import LPIPS
    from ml_collections import ConfigDict
    from models import autoencoder
    from models.sit import SiT
    from transformers import Dinov2Config, Dinov2Model

    vae, sit, terms = config["vae"], config["sit"], config["loss"]["vae"]
    sizes = {"ch_mult": vae["channel_multipliers"], "z_channels": vae["latent_channels"]}
    sizes |= {"ch": vae["channels"], "num_res_blocks": vae["num_res_blocks"]}
    vae_net = autoencoder.AutoencoderKL(embed_dim=vae["latent_channels"], ch_mult=vae["channel_multipliers"])
    # the constructor above has no argument for the width
    vae_net.encoder, vae_net.decoder = autoencoder.Encoder(**sizes), autoencoder.Decoder(**sizes)

    factor = 2 ** (len(vae["channel_multipliers"]) - 1)
    copied = ("patch_size", "hidden_size", "depth", "num_heads", "encoder_depth", "projector_dim", "mlp_ratio", "qk_norm")
    sit_net = SiT(
        input_size=config["data"]["image_size"] // factor, in_channels=vae["latent_channels"],
        decoder_hidden_size=sit["hidden_size"], z_dims=[encoder.module.hidden_size], fused_attn=True,
        num_classes=config["data"]["num_classes"], class_dropout_prob=config["diffusion"]["label_dropout"],
        bn_momentum=config["diffusion"]["norm_momentum"], **{name: sit[name] for name in copied},
    )  # fmt: skip

    LPIPS.load_pretrained = lambda self: None
    losses = {
        "reconstruction_loss": "l1", "reconstruction_weight": terms["l1"], "perceptual_loss": "lpips",
        "perceptual_weight": terms["lpips"], "kl_weight": terms["kl"], "discriminator_weight": terms["gan"],
        "discriminator_start": 0, "discriminator_factor": 1.0, "lecam_regularization_weight": 0.0, "quantizer_weight": 1.0,
    }  # fmt: skip
    loss = ReconstructionLoss_Single_Stage(ConfigDict({"losses": losses, "model": {"vq_model": {"quantize_mode": "vae"}}}))

    vit = encoder.module
    dinov2 = Dinov2Config(
        hidden_size=vit.hidden_size, num_hidden_layers=vit.depth, num_attention_heads=vit.num_heads,
        mlp_ratio=vit.mlp_dim // vit.hidden_size, image_size=encoder.image_size, patch_size=vit.patch_size,
    )  # fmt: skip
    return {"vae": vae_net, "sit": sit_net, "loss": loss, "encoder": Dinov2Model(dinov2).eval().requires_grad_(False)}


def make_published(config, options, folder):
    """Returns the published step: `step` and `wait` as `time_steps` takes them (losses are TERMS), and a description."""
    import torch

    from repae_jax.benchmark.measure import NOISE
    from repae_jax.models import encoders

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    absent = make_importable(folder)
    (target,) = config["encoders"].values()
    encoder = encoders.make_encoder(target["architecture"], config["data"]["image_size"], image_size=target["image_size"])
    nets = published_networks(config, encoder)
    counted = {name: nets[name] for name in ("vae", "sit", "encoder")}
    counted |= {"disc": nets["loss"].discriminator, "lpips": nets["loss"].perceptual_loss}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in counted.items()}
    with torch.no_grad():
        for p in itertools.chain.from_iterable(counted[name].parameters() for name in ("vae", "sit", "disc")):
            p.add_(NOISE * torch.randn_like(p))
    step = PublishedStep(config, options, nets, encoder)

    def wait(losses):
        values = losses.tolist()
        if not all(map(math.isfinite, values)):
            raise RuntimeError(f"the published step's losses are not finite: {values}")
        return dict(zip(TERMS, values))  # the last two are not compared

    return step, wait, {"parameters": counts, "version": f"torch {torch.__version__}", "stood_in_for": absent}


class PublishedStep:
    """The loop body of the published train_repae.py without logging, on images that are on the device already."""

    def __init__(self, config, options, nets, encoder):
        import torch

        self.config, self.encoder, self.indices = config, encoder, itertools.count()
        self.nets = {name: net.to(options.device) for name, net in nets.items()}
        self.sit, self.ema = self.nets["sit"], copy.deepcopy(self.nets["sit"]).requires_grad_(False)
        self.optimizers = {}
        for name, section in (("vae", "vae"), ("loss", "disc"), ("sit", "sit")):
            rule = config["optim"][section]
            settings = {"lr": rule["learning_rate"], "betas": (rule["b1"], rule["b2"]), "eps": rule["eps"]}
            parameters = self.nets[name].parameters()
            self.optimizers[name] = torch.optim.AdamW(parameters, weight_decay=rule["weight_decay"], **settings)
        if options.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.nets |= {name: torch.compile(self.nets[name]) for name in self.optimizers}
        if options.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        half = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.published_precision]
        self.mixed = functools.partial(torch.autocast, options.device, half, enabled=half is not None)
        self.scaler = torch.amp.GradScaler(options.device, enabled=half == torch.float16)
        size, batch_size, generator = config["data"]["image_size"], config["data"]["batch_size"], np.random.default_rng(0)
        put = functools.partial(torch.tensor, device=options.device)
        self.images = put(generator.integers(0, 256, (batch_size, 3, size, size), np.uint8))
        self.labels = put(generator.integers(0, config["data"]["num_classes"], batch_size))
        self.mean, self.std = (put(x).view(3, 1, 1) for x in (encoder.family.mean, encoder.family.std))

    def __call__(self):
        """Dispatches a step; returns its losses."""
        import torch
        from torch.nn import functional as F

        vae, model, criterion = self.nets["vae"], self.nets["sit"], self.nets["loss"]
        index, weights = next(self.indices), self.config["loss"]
        with self.mixed(), torch.no_grad():
            resized = F.interpolate((self.images / 255.0 - self.mean) / self.std, self.encoder.image_size, mode="bicubic")
            targets = [self.nets["encoder"](resized).last_hidden_state[:, 1:]]
        vae.train()
        with self.mixed():
            # VAE: its alignment loss goes through the frozen SiT with running statistics
            real = self.images.float() / 127.5 - 1.0
            posterior, latents, recon = vae(real)
            model.requires_grad_(False)
            model.eval()
            loss_kwargs = {"path_type": "linear", "prediction": "v", "weighting": "uniform", "align_only": True}
            vae_loss, terms = criterion(real, recon, posterior, index, "generator")
            aligned = model(x=latents, y=self.labels, zs=targets, loss_kwargs=loss_kwargs)
            self._apply_gradients("vae", vae_loss.mean() + weights["vae"]["align"] * aligned["proj_loss"].mean())
            # discriminator
            disc_loss, _ = criterion(real, recon, posterior, index, "discriminator")
            self._apply_gradients("loss", disc_loss.mean())
            # SiT: the same times and noises, detached latents
            model.requires_grad_(True)
            model.train()
            same_noise = {"time_input": aligned["time_input"], "noises": aligned["noises"]}
            loss_kwargs["align_only"] = False
            sit_terms = model(x=latents.detach(), y=self.labels, zs=targets, loss_kwargs=loss_kwargs, **same_noise)
            sit_loss = sit_terms["denoising_loss"].mean() + weights["sit"]["align"] * sit_terms["proj_loss"].mean()
            self._apply_gradients("sit", sit_loss)
            with torch.no_grad():
                self._average()
        compared = terms["reconstruction_loss"], terms["kl_loss"] / weights["vae"]["kl"], disc_loss
        return torch.stack([x.detach().float() for x in (*compared, sit_terms["denoising_loss"].mean(), vae_loss, sit_loss)])

    def _apply_gradients(self, name, loss):
        import torch

        optimizer = self.optimizers[name]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.nets[name].parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _average(self):
        decay, averages = self.config["ema_decay"], self.ema.state_dict()  # which shares the module's memory
        for name, x in self.sit.state_dict().items():
            if x.is_floating_point():
                averages[name].mul_(decay).add_(x, alpha=1 - decay)
            else:
                averages[name].copy_(x)


# ---- ours -----------------------------------------------------------------------------------------------------------


def make_ours(config, options, folder):
    """Returns our step, as `make_published` returns the published one."""
    import jax

    from repae_jax.benchmark import measure
    from repae_jax.job import build, frozen_weights

    config, _ = measure.without_files(config)
    job = build.build(config, devices=jax.devices()[:1])
    frozen, key = frozen_weights.load_frozen(job), jax.random.key(config["seed"])
    state, batch = measure.random_state(job), measure.random_batch(job)
    nets = {name: getattr(state, name).params for name in ("vae", "sit", "disc")}
    nets |= {"lpips": frozen["lpips"], "encoder": frozen["encoders"]}
    counts = {name: sum(x.size for x in jax.tree.leaves(net)) for name, net in nets.items()}
    step = measure.Step(measure.compile_step(job, state, batch, frozen, key)[0], state, frozen, key)
    del state  # donated

    def wait(metrics):
        values = {name: float(metrics[name]) for name in ("skipped", *TERMS.values())}
        if values["skipped"]:
            raise RuntimeError(f"{values['skipped']:.0f} of our steps were skipped: their losses or gradients were not finite")
        return {term: values[name] for term, name in TERMS.items()}

    return lambda: step(batch), wait, {"parameters": counts, "version": f"jax {jax.__version__}"}


# ---- timing in turns ------------------------------------------------------------------------------------------------


def serve(side, config, options, connection):
    """Main function of a side's process: sends the step's description, then seconds for every number of steps it receives."""
    sys.path[:0] = [str(ROOT)]
    # leaves GPU memory for torch beside what jax reserves
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name; JAX takes one of them only
    os.environ |= {"JAX_PLATFORMS": options.device if side == OURS else "cpu", "XLA_CLIENT_MEM_FRACTION": ".45"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        step, wait, description = (make_published if side == PUBLISHED else make_ours)(config, options, options.published)
        connection.send({**description, "first_losses": wait(step())})
        while steps := connection.recv():
            connection.send(time_steps(step, wait, steps))
    except EOFError:
        pass  # the parent process has ended
    except Exception as error:  # the parent reports any error
        connection.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


class Side(contextlib.AbstractContextManager):
    """One side's process, and a context manager that ends it."""

    def __init__(self, side, config, options):
        context = multiprocessing.get_context("spawn")
        self.name, (self._connection, theirs) = side, context.Pipe()
        self._process = context.Process(target=serve, args=(side, config, options, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self):
        """Returns the process's next message; RuntimeError if it reports a failure or has died."""
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of the {self.name} step ended with code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"the {self.name} step failed: {answer}")
        return answer

    def seconds(self, steps):
        """Runs that many steps; returns the seconds per step."""
        self._connection.send(steps)
        return self.receive()

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()


def compare(size, options, say):
    """Times both sides at one size, and returns values for JSON; `say` is called with lines of progress.

    Raises:
      ValueError: if the sides differ in their networks or the size of their losses.
      RuntimeError: if a side fails.
    """
    config = config_of(size, options.batch, options.fast)
    batch_size, seconds = config["data"]["batch_size"], {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        sides, descriptions = {}, {}
        for name in SIDES:  # sequentially: each compiles with all cores
            say(f"{size}: {name}: building, compiling, a first step …")
            sides[name] = stack.enter_context(Side(name, config, options))
            descriptions[name] = sides[name].receive()
        check_parameters(*(descriptions[side]["parameters"] for side in SIDES))
        for name, count in descriptions[PUBLISHED]["parameters"].items():
            say(f"  parameters of {name:8} {count:>12,} published {descriptions[OURS]['parameters'][name]:>12,} ours")
        for term, value in descriptions[PUBLISHED]["first_losses"].items():
            say(f"  first {term:16} {value:>12.4g} published {descriptions[OURS]['first_losses'][term]:>12.4g} ours")
        check_losses(*(descriptions[side]["first_losses"] for side in SIDES))
        for repeat in range(1, options.repeats + 1):
            for name in SIDES if repeat % 2 else SIDES[::-1]:
                seconds[name].append(sides[name].seconds(options.steps))
            a, b = (batch_size / seconds[name][-1] for name in SIDES)
            say(f"  repeat {repeat} of {options.repeats}: published {a:.4g} img/s, ours {b:.4g}: {b / a:.3f} times")
    result = summarize(seconds, batch_size)
    ratio = result["ratio"]
    say(
        f"{size}, {batch_size} images: published {result[PUBLISHED]:.4g} img/s, ours {result[OURS]:.4g} img/s: "
        f"{ratio['median']:.2f} times as fast ({ratio['low']:.2f} to {ratio['high']:.2f} in {ratio['repeats']} repeats of "
        f"{options.steps} steps)"
    )
    described = {f"{side}_is": descriptions[side] for side in SIDES}
    return {**result, "batch_size": batch_size, "seconds_per_step": seconds, **described}


def parse_args(arguments=None):
    """Returns the parsed command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--published", required=True, metavar="FOLDER", help="checkout of End2End-Diffusion/REPA-E")
    sizes = f"{', '.join(SIZES)}, or sizes of configs/repae.py such as sit=XL/2,vae=f8d4; default both small ones"
    add("--sizes", nargs="+", default=list(SIZES), metavar="SIZE", help=sizes)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=cli.whole(1), help="images; default 8 of the small sizes, 32 of the others")
    add("--repeats", type=cli.whole(1), default=7, help="turns of both; default 7")
    add("--steps", type=cli.whole(1), help="timed in each turn, after one that is not; default 3, on CUDA 20")
    fast = "ours with all blocks unrolled and kept, and cuDNN's attention: with --device cuda, on cards that have the memory"
    add("--fast", action="store_true", help=fast)
    compiling = "torch.compile for the published networks and losses; default on CUDA only"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiling)
    precision = "default float32 on the CPU, on CUDA bfloat16, as ours; float16 is the published default"
    add("--published-precision", choices=("float32", "bfloat16", "float16"), help=precision)
    add("--json", metavar="FILE", help="for all numbers; must not exist")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if options.fast and not cuda:
        parser.error("--fast needs --device cuda, because the CPU has no cuDNN")
    options.published_precision = options.published_precision or ("bfloat16" if cuda else "float32")
    options.compile = cuda if options.compile is None else options.compile
    options.steps = options.steps or (20 if cuda else 3)  # enough to make the first dispatch negligible
    return options


def run(options, say=print_at_once):
    """Compares all sizes, writes the file and returns its content, {'sizes': {size: result of `compare`}, …}."""
    options.published = check_checkout(options.published)
    path = None if options.json is None else files.check_new("--json", options.json)
    for size in options.sizes:
        config_of(size, options.batch, options.fast)  # finds mistakes before anything is built
    result = {"device": options.device, "steps": options.steps, "compile": options.compile, "cores": os.cpu_count()}
    result |= {"published_precision": options.published_precision, "sizes": {}}
    for index, size in enumerate(options.sizes):
        result["sizes"][size] = compare(size, options, say)
        if path is not None:  # after each, because the next may fail
            files.write_json(path, result, overwrite=index > 0)
    if path is not None:
        say(f"all numbers: {options.json}")
    return result


main = cli.command(parse_args)(run)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
