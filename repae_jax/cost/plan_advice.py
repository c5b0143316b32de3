"""Advice of a plan: what makes a program that does not fit smaller, and one that leaves much memory free faster."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from repae_jax.cost.chips import GIB, GPUS, Gpu, Tpu
from repae_jax.distributed import sharding
from repae_jax.job import build, initial_state, recipe

SAME_SIZE = 1.05  # states whose sizes differ by less count as equally large
ROOMY = 0.4  # free share of the memory above which it can be spent on speed
Numbers = Mapping[str, Any]  # of a plan


def chip_bytes(tree: Any) -> int:
    """Returns the bytes on each chip of a tree of shapes with shardings."""
    return sum(_shard_bytes(x, x.sharding) for x in jax.tree.leaves(tree))


def _shard_bytes(x, placed):
    return math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize


def check_state(chip: Tpu | Gpu, numbers: Numbers) -> None:
    """Raises ValueError if a card cannot hold what every program gets as arguments: the state and frozen weights."""
    least, room = numbers["state_bytes"] + numbers["frozen_bytes"], chip.usable * chip.memory
    if least <= room:
        return
    allowed = [name for name, each in GPUS.items() if least <= each.usable * each.memory] or ["no card known here"]
    sampling = numbers["job"] == "sample"
    if not sampling and numbers["chips"] > numbers["mesh"]["fsdp"]:
        allowed.insert(0, f"--config.mesh.fsdp up to {numbers['chips']}, which splits the state")
    kinds = "weights" if sampling else "state and frozen weights"
    raise ValueError(
        f"--topology={numbers['topology']}: too small for one image: {kinds} take "
        f"{least / GIB:.1f} GiB, and a program may fill {room / GIB:.1f}; allowed: {', '.join(allowed)}"
    )


def most_images(chip: Tpu | Gpu, numbers: Numbers) -> int:
    """Returns an estimate of the images that a chip has memory for: all temporaries but the gradients grow with them."""
    memory = numbers["memory_bytes"]
    fixed = min(numbers["gradient_bytes"], memory["temporaries"] / 2)  # not all gradients need be there at once
    each = max(memory["temporaries"] - fixed, 1) / numbers["images_per_chip"]
    return max(0, math.floor((chip.usable * chip.memory - (memory["total"] - memory["temporaries"]) - fixed) / each))


def spend(job: build.Job, numbers: Numbers) -> list[str]:
    """Returns lines on what would make a training step faster; what takes memory only where much of it is free."""
    config, lines = job.config, []
    if numbers["job"] == "sample":
        return []
    is_roomy = 1 - numbers["memory_bytes"]["total"] / numbers["memory_of_chip_bytes"] >= ROOMY
    if is_roomy and job.tx.sit is not None and config["sit"]["remat"] != "none":
        lines.append("--config.sit.remat=none: nothing of the SiT's blocks is computed twice")
    if job.nets.sit is not None and config["sit"]["unroll"] < config["sit"]["depth"]:
        depth = config["sit"]["depth"]
        lines.append(f"--config.sit.unroll={depth}: its blocks one after the other instead of a loop; compiling takes longer")
    is_half, is_gpu = config["precision"]["compute"] == "bfloat16", numbers["device_kind"].startswith("NVIDIA")
    if config["attention"] == "xla" and is_half and is_gpu:
        lines.append("--config.attention=cudnn: probabilities are not stored; to plan it, install nvidia-cudnn-cu13")
    if is_roomy and job.tx.vae is not None and config["vae"]["remat"]:
        lines.append("--config.vae.remat=False: nothing of the VAE's blocks is computed twice; it takes most")
    return lines


def advice(job: build.Job, numbers: Numbers) -> list[str]:
    """Returns lines on what would make a training step, or a batch of samples, smaller."""
    config, per_chip, lines = job.config, numbers["images_per_chip"], []
    if numbers["job"] == "sample":
        fewer = [f"--images_per_chip={per_chip // 2}: the same samples in more batches"] if per_chip > 1 else []
        return [*fewer, f"{numbers['chip']}s with more memory"]
    accumulation = config["accumulation"]
    fsdp, sharded = better_fsdp(job, numbers["state_bytes"])
    if fsdp is not None and sharded is not None:
        saved = (numbers["state_bytes"] - sharded) / GIB
        share = f"{fsdp} {numbers['chip']}s share a state, {saved:.2f} GiB less on each, more traffic"
        lines.append(f"--config.mesh.fsdp={fsdp}: {share}")
    if per_chip > accumulation and may_accumulate(config):
        parts = next(n for n in range(accumulation + 1, per_chip + 1) if per_chip % n == 0)
        norm = "; the discriminator's batch norm sees fewer images" if job.tx.disc is not None else ""
        fewer = f"{per_chip // parts} instead of {per_chip // accumulation} images of a {numbers['chip']} at a time"
        lines.append(f"--config.accumulation={parts}: {fewer} where gradients are taken{norm}")
    if job.tx.sit is not None and config["sit"]["remat"] != "full":
        lines.append("--config.sit.remat=full: the SiT's blocks are computed again for gradients, a third more of its FLOP")
    if job.tx.vae is not None and not config["vae"]["remat"]:
        lines.append("--config.vae.remat=True: the VAE's blocks are computed again, a third more of its FLOP; it saves less")
    more, larger = f"more {numbers['chip']}s", f"{numbers['chip']}s with more memory"
    return [*lines, f"{more} for the same batch, {larger}, or a smaller config.data.batch_size"]


def may_accumulate(config: Mapping[str, Any]) -> bool:
    """Returns whether a config may have more micro-batches: some losses are defined on a whole batch only."""
    try:
        recipe.make_recipe({**config, "accumulation": config["accumulation"] + 1})
    except ValueError:
        return False
    return True


def better_fsdp(job: build.Job, state_bytes: int) -> tuple[int, int] | tuple[None, None]:
    """Finds the least config.mesh.fsdp other than the job's with about the smallest state: at more, fewer arrays may divide.

    Returns it and the bytes of the state of a chip with it, or (None, None) if none makes the state smaller.
    """
    devices, slices = list(job.mesh.devices.flat), job.config["mesh"]["slices"]
    state, in_slice, sizes = initial_state.abstract_state(job), len(devices) // slices, {}
    for fsdp in range(1, in_slice + 1):
        if in_slice % fsdp == 0 and fsdp != job.mesh.shape[sharding.FSDP]:
            shardings = sharding.tree_sharding(sharding.make_mesh(fsdp, devices, slices), state)
            sizes[fsdp] = sum(jax.tree.leaves(jax.tree.map(_shard_bytes, state, shardings)))
    near = SAME_SIZE * min(sizes.values(), default=math.inf)
    return next(((fsdp, size) for fsdp, size in sizes.items() if size <= near and SAME_SIZE * size < state_bytes), (None, None))
