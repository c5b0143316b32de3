"""The runs of REPA-E's tables and of its neighbors, by name: `--config configs/paper.py:NAME`.

    python -m repae_jax.train --config configs/paper.py:repae-l --workdir runs/repae-l \
        --config.data.options.path=/data/imagenet/train \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth

The LPIPS weights are for names with `repae-`, `from-` and `without-`; the others train a network on a frozen VAE. Weights to
start from are names on the Hugging Face hub, and fields like all others: `--config.init.vae=sdvae-f8d4.pt`. NAME,tiny is the
same recipe at toy size with random weights, a full step in seconds; NAME,digits is scikit-learn's digits.

    python -m configs.paper [NAME …]

prints of these the command, TFLOP an image and hours of an H100 at 30 % of its peak, for which a step is traced in seconds
(repae_jax/cost/flops.py says what is counted); or every name with its table and published numbers. Tables are those of arXiv
2504.10483v3; numbers are gFID of 50,000 images, no guidance, SDE-250, random labels, unless they say otherwise. A guidance
'2.2 in [0, 0.65]' is `python -m repae_jax.sample --guidance_scale 2.2 --guidance_high 0.65`.

Not here: the baselines of other code bases (MaskDiT, FasterDiT, LightningDiT, tables 1 and 9), LSGM's objective (table 11) and
text-to-image (table 13). The tokenizers are names of configs/vae.py. Learning-rate schedules, weight decay, EMA decay and flips
are values of every config: `--config.optim.sit.schedule=cosine --config.optim.sit.decay_steps=400000`,
`--config.optim.sit.weight_decay=0.01`, `--config.ema_decay=0.9995`, `--config.data.flip_probability=0.5`.
"""

from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from configs import common, ldm, repae
from repae_jax import cli
from repae_jax.cost import flops
from repae_jax.job import build

FILES = {"repae": repae, "ldm": ldm}


class Row(NamedTuple):
    """A published run."""

    table: str  # number of the paper's table, or another source
    file: str  # one of FILES
    arg: str  # text after the colon of that config
    changes: dict[str, Any]  # dotted fields -> values that differ
    published: str  # numbers


_SDVAE, _INVAE, _VAVAE = "REPA-E/sdvae/sdvae-f8d4", "REPA-E/invae/invae-f16d32", "REPA-E/vavae/vavae-f16d32"
_E2E = "REPA-E/e2e-vavae/e2e-vavae-400k"
_RAE = "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"  # the statistics of its latents are in it
_VTP = "MiniMaxAI/VTP-Large-f16d64"  # its statistics are a file of its repository, generation/latent_stats/vtp_l
_SCALED = "stabilityai/sd-vae-ft-ema"  # SD-VAE's latents times 0.18215, as SiT, DiT and REPA take them
_SCALED_MSE = "stabilityai/sd-vae-ft-mse"  # the same encoder with another decoder


def _joint(table, published, arg="sit=L/2", vae=_SDVAE, steps=100_000, **changes):
    files = common.vae_files(vae, "vae", "latent_stats", "disc")
    return Row(table, "repae", arg, {**files, "steps": steps, **_dotted(changes)}, published)


def _frozen(table, published, arg="model=SiT-L/2,vae=f8d4", vae=_SCALED, steps=400_000, **changes):
    is_folder = vae in (_SCALED, _SCALED_MSE, _RAE, _VTP)
    files = {"init.vae": vae, "init.latent_stats": vae} if is_folder else common.vae_files(vae, "vae", "latent_stats")
    return Row(table, "ldm", arg, {**files, "steps": steps, **_dotted(changes)}, published)


def _dotted(changes):
    return {name.replace("__", "."): value for name, value in changes.items()}


# as published for SiT and DiT: 1,400 epochs, mirrored images, no clipping
_ALONE = {"steps": 7_000_000, "data__flip_probability": 0.5, "optim__sit__clip_norm": 1e9}

# the code of MeanFlow: float32, no clipping, and the other of SD-VAE's two decoders
_FAST_FORWARD = {
    "vae": _SCALED_MSE, "optim__sit__b2": 0.95, "optim__sit__clip_norm": 1e9, "precision__compute": "float32",
}  # fmt: skip

# as published for RAE and VTP: 80 epochs are 100,000 steps of 1024 images
_OF_1024 = {
    "steps": 100_000, "data__batch_size": 1024, "data__flip_probability": 0.5, "diffusion__time_distribution": "lognormal",
    "optim__sit__learning_rate": 2e-4, "optim__sit__b2": 0.95,
}  # fmt: skip

# constant for 40 epochs, then a tenth after 800
_RAE_RATE = {
    "optim__sit__schedule": "linear", "optim__sit__decay_start": 50_000, "optim__sit__decay_steps": 1_000_000,
    "optim__sit__final_learning_rate": 2e-5,
}  # fmt: skip

ROWS = {
    # the main runs and the sizes
    "repae-xl": _joint(
        "1, 2, 14", "12.83 at 100k, 7.17 at 200k, 4.07 at 400k; guided 2.2 in [0, 0.65]: 1.67; rFID 0.53", "sit=XL/2",
        steps=400_000,
    ),
    "repae-l": _joint("2 to 6", "16.3 (IS 75.0): L, DINOv2-B, SD-VAE, depth 8, all components"),
    "repae-b": _joint("2", "34.8 (IS 39.1)", "sit=B/2"),
    "repa": _frozen(
        "1, 8, 9", "19.40 at 100k, 11.10 at 200k, 7.90 at 400k, 5.90 at 4M; balanced labels 5.84, guided 1.28",
        "model=SiT-XL/2,vae=f8d4", steps=4_000_000,
    ),
    "repa-l": _frozen("2 to 5", "24.1 (IS 55.7)", steps=100_000),
    "repa-b": _frozen("2", "49.5 (IS 27.5); 24.4 at 400k", "model=SiT-B/2,vae=f8d4", steps=100_000),
    "sit": _frozen("1, 8, 9", "17.20 at 400k, 8.61 at 7M; guided 2.06", "model=SiT-XL/2,vae=f8d4,encoder=none", **_ALONE),
    "dit": _frozen("1, 8, 9", "19.82 at 400k, 9.62 at 7M; guided 2.27", "model=DiT-XL/2,vae=f8d4,encoder=none", **_ALONE),
    # encoders
    "repae-ijepa-h": _joint("3", "16.5 (IS 73.6)", "sit=L/2,encoder=ijepa_vith14_1k"),
    "repae-clip-l": _joint("3", "23.4 (IS 57.1)", "sit=L/2,encoder=clip-vit-large-patch14"),
    "repae-dinov2-l": _joint("3", "16.0 (IS 77.7)", "sit=L/2,encoder=dinov2-large"),
    "repa-ijepa-h": _frozen("3", "23.0 (IS 60.3)", "model=SiT-L/2,vae=f8d4,encoder=ijepa_vith14_1k", steps=100_000),
    "repa-clip-l": _frozen("3", "29.2 (IS 46.4)", "model=SiT-L/2,vae=f8d4,encoder=clip-vit-large-patch14", steps=100_000),
    "repa-dinov2-l": _frozen("3", "23.3 (IS 59.9)", "model=SiT-L/2,vae=f8d4,encoder=dinov2-large", steps=100_000),
    # VAEs
    "repae-invae": _joint("4", "12.7 (IS 84.0)", "sit=L/1,vae=f16d32", _INVAE),
    "repae-vavae": _joint("4", "11.1 (IS 88.8)", "sit=L/1,vae=f16d32", _VAVAE),
    "repa-invae": _frozen("4", "22.7 (IS 56.0)", "model=SiT-L/1", _INVAE, steps=100_000),
    "repa-vavae": _frozen("4", "12.8 (IS 83.8)", "model=SiT-L/1", _VAVAE, steps=100_000),
    "repae-xl-invae": _joint(
        "14, README", "4.09; guided 1.8 in [0, 0.825]: 1.61; rFID 0.27", "sit=XL/1,vae=f16d32", _INVAE, steps=400_000
    ),
    "repae-xl-vavae": _joint(
        "14, README", "4.05; guided 1.9 in [0, 0.825]: 1.73; rFID 0.28", "sit=XL/1,vae=f16d32", _VAVAE, steps=400_000
    ),
    # alignment depths; 8 is repae-l
    "repae-depth-6": _joint("5", "16.4 (IS 74.3)", sit__encoder_depth=6),
    "repae-depth-10": _joint("5", "16.2 (IS 74.7)", sit__encoder_depth=10),
    "repa-depth-6": _frozen("5", "23.0 (IS 59.2)", steps=100_000, sit__encoder_depth=6),
    "repa-depth-10": _frozen("5", "23.7 (IS 56.9)", steps=100_000, sit__encoder_depth=10),
    # components; v1 of the paper calls the last one 'without L_REG'
    "naive": _joint(
        "appendix A", "collapses: spatial variance of the latents 17.06 to 0.02",
        loss__vae__diffusion=1.0, loss__vae__align=0.0, diffusion__norm_momentum=0.0,
    ),
    "without-stop-gradient": _joint("6", "444.1 (IS 1.49): collapses", loss__vae__diffusion=1.0),
    "without-batch-norm": _joint("6", "18.1 (IS 72.4)", diffusion__norm_momentum=0.0),
    "without-gan": _joint("6", "19.2 (IS 68.2)", loss__vae__gan=0.0, init__disc=""),
    "from-scratch": _joint(
        "7", "14.12 at 100k, 7.54 at 200k, 4.34 at 400k", "sit=XL/2", steps=400_000,
        init__vae="", init__latent_stats="", init__disc="",
    ),
    # another VAE in place of the old one; 80 epochs. SD-VAE's other three are sit, dit and repa at 400k steps
    "dit-vavae": _frozen("8", "6.74", "model=DiT-XL/1,encoder=none", _VAVAE),
    "sit-vavae": _frozen("8", "5.93", "model=SiT-XL/1,encoder=none", _VAVAE),
    "dit-repa-sdvae": _frozen("8", "12.29", "model=DiT-XL/2,vae=f8d4"),
    "dit-repa-vavae": _frozen("8", "4.71", "model=DiT-XL/1", _VAVAE),
    "sit-repa-vavae": _frozen("8", "4.88", "model=SiT-XL/1", _VAVAE),
    "dit-e2e-vavae": _frozen("8", "6.75", "model=DiT-XL/1,encoder=none", _E2E),
    "sit-e2e-vavae": _frozen("8", "5.26", "model=SiT-XL/1,encoder=none", _E2E),
    "dit-repa-e2e-vavae": _frozen("8", "4.20", "model=DiT-XL/1", _E2E),
    "sit-repa-e2e-vavae": _frozen("8, 9", "3.46 (IS 159.8), guided 1.67 (IS 266.3)", "model=SiT-XL/1", _E2E),
    # the best result: repae-xl-vavae for 80 epochs, then its VAE frozen and a new SiT for 800
    "final": _frozen(
        "9", "balanced labels: 1.69 (IS 219.3), guided 2.4 in [0, 0.73]: 1.12 (IS 302.9)", "model=SiT-XL/1", _E2E,
        steps=4_000_000,
    ),
    # 512 pixels
    "repae-512": _joint("12", "12.8 (IS 90.6)", "sit=L/2,resolution=512"),
    "repa-512": _frozen("12", "22.2 (IS 58.3)", "model=SiT-L/2,vae=f8d4,resolution=512", steps=100_000),
    # what came after
    "irepa": _frozen(
        "iREPA (2512.10794)", "guided 2.0 at 400k: 1.93, where repa has 1.98", "model=SiT-XL/2,vae=f8d4",
        sit__projector="conv", encoders__target__spatial_gamma=0.6, loss__sit__align=1.0,
    ),
    "repa-early-stop": _frozen(
        "HASTE (2505.16792)", "-; HASTE distils attention, too, and stops by its own criterion", "model=SiT-XL/2,vae=f8d4",
        loss__align_end=250_000,
    ),
    # one or two steps; docs/beyond.md says what is not here
    "mean-flow": _frozen(
        "MeanFlow (2505.13447)", "guided in training: 3.43 in one step, 2.93 in two", "model=MF-XL/2,vae=f8d4,encoder=none",
        steps=1_200_000, diffusion__mean_flow__omega=0.2, diffusion__mean_flow__kappa=0.92,
        diffusion__mean_flow__guidance_high=0.75, **_FAST_FORWARD,
    ),
    "improved-mean-flow": _frozen(
        "iMF (2512.02012)", "told its guidance, by another network: 1.72 in one step, 1.54 in two",
        "model=iMF-XL/2,vae=f8d4,encoder=none", steps=800_000, data__batch_size=1024, optim__sit__warmup_steps=12_500,
        **_FAST_FORWARD,
    ),
    # no encoder; appendix A.3
    "self-flow": _frozen(
        "Self-Flow (2603.06507)", "5.70; REPA 5.89, SRA 7.27", "model=SiT-XL/2,vae=f8d4,encoder=none", steps=4_000_000,
        sit__encoder_depth=8, loss__sit__self=0.8, loss__self_depth=20, diffusion__second_time_share=0.25,
    ),
    "rae-dit-xl": _frozen(
        "RAE (2510.11690)", "4.28 (IS 222), Euler-50, with RoPE, SwiGLU and RMSNorm; DiT-DH-XL 2.16",
        "model=SiT-XL/1,vae=rae-dinov2-base,encoder=none", _RAE, ema_decay=0.9995, sampling__sampler="euler",
        sampling__steps=50, **_OF_1024, **_RAE_RATE,
    ),
    "vtp-dit-xl": _frozen(
        "VTP (2512.13687)", "2.03, Euler-250, with RoPE, SwiGLU, RMSNorm and a cosine loss; 1.11 in the end",
        "model=SiT-XL/1,vae=vtp-large,encoder=none", _VTP, init__latent_stats="", diffusion__time_mean=0.75,
        sampling__sampler="euler", sampling__time_shift=1 / 0.075, optim__sit__clip_norm=1e9, **_OF_1024,
    ),
    "repae-two-encoders": _joint("none", "-", "sit=L/2,encoder=dinov2-base+ijepa_vith14_1k"),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a row; see the module's docstring for `arg`."""
    name, preset, _ = common.parse_arg(arg, tuple(ROWS), common.SMALL)
    if not name:
        raise ValueError(f"{arg!r} names no run: --config configs/paper.py:NAME with NAME one of {list(ROWS)}")
    row = ROWS[name]
    config = FILES[row.file].get_config(row.arg)
    config.update_from_flattened_dict(row.changes)
    common.shrink(config.unlock(), preset)
    return config.lock()


def table() -> list[str]:
    """Returns the table of all runs as lines."""
    lines = [f"{'name':<22}{'table':<20}{'steps':>9}  published"]
    return lines + [f"{name:<22}{row.table:<20}{get_config(name).steps:>9,}  {row.published}" for name, row in ROWS.items()]


def describe(name: str) -> list[str]:
    """Returns a row's command, its differences from the config that it changes, and its cost, as lines of text."""
    row = common.choose("name", name, ROWS)
    job = build.build(get_config(name), jax.devices()[:1])
    flop_per_image = sum(flops.of_step(job).values())
    weights = "" if row.file == "ldm" else " --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.linear=vgg.pth"
    return [
        f"{name}: table {row.table}; published {row.published}",
        f"  configs/{row.file}.py:{row.arg} with {row.changes}",
        f"  {flop_per_image / 1e12:.2f} TFLOP an image, {flops.h100_hours(flop_per_image, job.config):,.0f} hours of an H100",
        f"  python -m repae_jax.train --config configs/paper.py:{name} --workdir runs/{name} "
        f"--config.data.options.path=/data/imagenet/train{weights}",
    ]


def parse_args(argv=None):
    """Command line of this program."""
    parser = cli.Parser(description="The runs of REPA-E's tables and of its neighbors.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="print the command of these; default: the table of all")
    return parser.parse_args(argv)


@cli.command(parse_args)
def main(args):
    """Entry point of `python -m configs.paper`."""
    print("\n".join(line for name in args.names for line in describe(name)) or "\n".join(table()))


if __name__ == "__main__":
    main()
