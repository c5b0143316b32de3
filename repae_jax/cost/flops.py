"""FLOP of a training step and of sampling, counted in their traced programs, and the peaks of devices.

Counted are matrix products and convolutions, a multiplication with its addition as 2 FLOP, forward and backward as the program
does them; padding counts, zeros between pixels do not. Not counted: elementwise operations, which optimizers but Muon are made
of, and what the backward pass recomputes (`remat`).
"""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from repae_jax.distributed import sharding
from repae_jax.job import build, compilation, initial_state
from repae_jax.sampling import generate

# dense FLOP/s of one device in bfloat16, by the beginning of its `device_kind`; the first that fits counts
PEAKS: dict[str, float | None] = {
    "TPU7x": 2307e12 / 2, "TPU v6": 918e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v4": 275e12,
    "TPU v3": 123e12 / 2,  # a v3 and a 7x have two devices on a chip
    "NVIDIA GB200": 2500e12, "NVIDIA B200": 2250e12, "NVIDIA GH200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12,
    "NVIDIA GeForce RTX 4090 Laptop": None, "NVIDIA GeForce RTX 4090 D": 147e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA L40S": 362e12, "NVIDIA RTX A6000": 154.8e12, "NVIDIA RTX 6000 Ada": 364.2e12,
}  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"
UTILIZATION = 0.3
RECOMPUTED = "rematted_computation"  # scope that JAX gives to what a backward pass computes again


def peak(device_kind: str, precision: str = "bfloat16") -> float | None:
    """Returns the dense peak of one device in FLOP/s; None where it is not known, as of a CPU.

    In precision 'float32', JAX multiplies on TPUs in bfloat16, too, and on GPUs in TF32, which is half as fast.
    """
    dense = next((value for name, value in PEAKS.items() if device_kind.startswith(name)), None)
    return dense / 2 if dense and precision == "float32" and not device_kind.startswith("TPU") else dense


def h100_hours(flop_per_image: float, config: Mapping[str, Any]) -> float:
    """Returns the hours of one H100 at UTILIZATION of its peak for all steps of a config."""
    flop_per_second = UTILIZATION * (peak(H100, config["precision"]["compute"]) or math.nan)
    return flop_per_image * config["data"]["batch_size"] * config["steps"] / flop_per_second / 3600


def of_step(job: build.Job) -> dict[str, float]:
    """Returns the FLOP that a training step spends on one image, by scope.

    A mean where steps are of several kinds (`Job.variants`), or draw one of several branches.
    """
    arguments = initial_state.abstract_state(job), *compilation.abstract_inputs(job)
    scopes: dict[str, float] = collections.defaultdict(float)
    for variant, share in job.variants:
        for name, flop in _per_image(variant, variant.step, arguments, branch_shares(job.config)).items():
            scopes[name] += share * flop
    return dict(scopes)


def of_sampling(job: build.Job) -> dict[str, float]:
    """Returns the FLOP that sampling by job.sampling spends on one image, by scope; the job must have a SiT.

    ValueError for an adaptive sampler, whose steps nobody knows before.
    """
    assert job.sampling is not None
    if job.sampling.method.adaptive:
        takes = "takes as many steps as it needs, which cannot be counted before"
        raise ValueError(f"config.sampling.sampler={job.sampling.sampler!r} {takes}: choose another sampler to plan with")
    return _per_image(job, *sampling_program(job))


def _per_image(job, function, arguments, shares=()):
    scopes = count(sharding.with_mesh_context(job.mesh, function), *arguments, shares=shares)
    return {name: flop / job.config["data"]["batch_size"] for name, flop in scopes.items()}


def sampling_program(job: build.Job) -> tuple[Callable, tuple[Any, ...]]:
    """Returns the function that samples by job.sampling, and the shapes of its arguments for config.data.batch_size images."""
    assert job.sampling is not None
    batch, frozen, key = compilation.abstract_inputs(job)
    params = generate.sampling_params(initial_state.abstract_state(job), frozen)
    run = generate.make_generate(job.nets, job.recipe.objective, job.latent_shape, job.sampling)
    return run, (params, batch["label"], batch["label"], key)


def branch_shares(config: Mapping[str, Any]) -> list[float]:
    """Returns the shares of the steps that draw each of config.loss.eq_scales, in order; [] where none is drawn."""
    loss = config["loss"]
    if not loss.get("eq_scales"):
        return []
    _, *others = loss["eq_scales"]
    return [loss["eq_prior"], *((1 - loss["eq_prior"]) / len(others) for _ in others)]


def count(function: Callable, *args: Any, shares: Sequence[float] = ()) -> dict[str, float]:
    """Counts the FLOP of function(*args), arrays or shapes, by scope, without those that no output needs.

    Scopes are paths of names of jax.named_scope, which Flax gives to its modules, too, down to the outermost module, whose name
    is that of its class: 'vae/SiT.align'. Loops whose length is computed by the program count once. Of conditionals with as
    many branches as `shares`, each branch is taken so often; of others, the costliest counts, of those between platforms the
    default.
    """
    closed = jax.make_jaxpr(function)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return dict(_count(jaxpr, (), tuple(shares)))


def _count(jaxpr: core.Jaxpr, outer: tuple[str, ...], shares: tuple[float, ...]) -> dict[str, float]:
    scopes: dict[str, float] = collections.defaultdict(float)
    for equation in jaxpr.eqns:
        path = outer + _names(str(equation.source_info.name_stack))
        flop = 0.0 if RECOMPUTED in path else _flop(equation)
        if flop:
            depth = next((depth for depth, name in enumerate(path, 1) if name[0].isupper()), None)
            scopes["/".join(path[:depth])] += flop
        for times, inner in _inner_programs(equation, path, shares):
            for name, value in _count(inner, path, shares).items():
                scopes[name] += times * value
    return scopes


def _names(name_stack: str) -> tuple[str, ...]:
    """Splits a name stack such as 'vae/transpose(jvp(SiT))/ij,jk->ik' into names, without transformations and einsums."""
    return tuple(name for name in re.sub(r"\w+\(|\)", "", name_stack).split("/") if re.fullmatch(r"[\w.\-]+", name))


def _flop(equation: core.JaxprEqn) -> float:
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        products = _size(equation.invars[0], contracted)
    elif equation.primitive.name == "conv_general_dilated":
        kernel_axes = params["dimension_numbers"].rhs_spec[1:]
        products = _size(equation.invars[1], kernel_axes) / math.prod(params["lhs_dilation"])  # zeros between are no work
    else:
        return 0.0
    return 2 * _size(equation.outvars[0]) * products


def _size(variable: Any, axes: Sequence[int] | None = None) -> int:
    shape = variable.aval.shape
    return math.prod(shape if axes is None else (shape[axis] for axis in axes))


def _inner_programs(equation, path, shares) -> Iterator[tuple[float, core.Jaxpr]]:
    """Yields (how often it runs, jaxpr) of the programs that an equation calls."""
    params = equation.params
    if equation.primitive.name != "cond":
        times = {"scan": "length", "shard_map": "mesh"}.get(equation.primitive.name)
        times = 1 if times is None else getattr(params[times], "size", params[times])  # of a mesh, each device runs it
        for value in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
                yield times, getattr(value, "jaxpr", value)
        return
    branches = [branch.jaxpr for branch in params["branches"]]
    if params.get("branches_platforms"):
        yield 1, branches[-1]  # for a platform without a branch of its own
    elif len(branches) == len(shares):
        yield from zip(shares, branches)
    else:
        yield 1, max(branches, key=lambda branch: sum(_count(branch, path, shares).values()))
