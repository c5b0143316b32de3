"""The evaluations of a sweep, one after the other: those that are missing are made, as a command of their own would."""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
from etils import epath

from repae_jax import files, sample
from repae_jax.evaluate import measuring
from repae_jax.evaluation import sweep
from repae_jax.evaluation.image_sets import open_images
from repae_jax.evaluation.reference_stats import read_checksum
from repae_jax.sampling.load_model import LoadedModel


def run_sweep(args: argparse.Namespace) -> tuple[epath.Path | None, sweep.Sweep | None]:
    """Evaluates every point of --sweep that has no result yet; returns the path of the sweep's result and the Sweep.

    Both are None in processes other than the first.
    """
    if open_images(epath.Path(args.source)) is not None:
        raise ValueError(f"--sweep: for models only; the images of {args.source} are there already")
    measuring.check_reference(args)
    trained, opened = measuring.load_trained(args), {}
    checksum = functools.cache(functools.partial(read_checksum, args.reference))
    commands = _commands(args, trained)
    networks = measuring.load_networks(args)
    home = epath.Path(args.out or args.source)
    folder = home if args.out else home / "evaluations"
    results = []
    for number, (name, (point, command)) in enumerate(commands.items(), start=1):
        command.out = str(folder / f"{name}.json") if args.out else None
        if jax.process_index() == 0:
            print(f"{number}/{len(commands)}: {', '.join(f'{key} {value:g}' for key, value in point.items())}", flush=True)
        existing = folder / f"{name}.json"
        if existing.exists():
            result = _read_same(existing, command, trained, networks, checksum())
        else:
            result = measuring.run(command, trained, networks, opened)[1]
        results.append((point, result))
    if jax.process_index():
        return None, None
    done = sweep.Sweep(args.sweep, results)
    axes = "-".join(str(axis).replace("=", "").replace(":", "_") for axis in args.sweep)
    out = (home if args.out else home / "sweeps") / f"{name}-sweep-{axes}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    done.draw(out.with_suffix(".png"))
    files.write_json(out, done.content([f"{name}.json" for name in commands]), overwrite=True)
    return out, done


def _commands(args: argparse.Namespace, trained: LoadedModel) -> dict[str, tuple[sweep.Point, argparse.Namespace]]:
    """Returns name of a result -> (point, settings of its evaluation); without guidance, all intervals are the same.

    ValueError if all of several points are the same.
    """
    commands: dict[str, tuple[sweep.Point, argparse.Namespace]] = {}
    points = sweep.points(args.sweep)
    for point in points:
        command = argparse.Namespace(**{**vars(args), **point, "sweep": None, "model_options": []})
        sampling, _ = sample.choose_sampling(command, trained)
        name = sample.settings_name(trained.step, sampling, command, trained.weaker_for(sampling))
        commands.setdefault(name, (point, command))
    if len(commands) == 1 < len(points):
        (name,) = commands
        raise ValueError(
            f"--sweep {' '.join(map(str, args.sweep))}: every point is {name}, because an interval or a power of guidance "
            "needs a scale above 1: give one"
        )
    return commands


def _read_same(
    path: epath.Path, args: argparse.Namespace, trained: LoadedModel, networks: measuring.Networks, reference: str
) -> dict[str, Any]:
    """Returns a result that an earlier command has left; ValueError if it is of other settings than this command's."""
    result, protocol = files.read_json(path), measuring.open_source(args, trained).protocol
    expected = {name: value for name, value in protocol.items() if name != "model"} | {"num_samples": args.num_samples}
    differing = sweep.differences(result, expected)
    there = result["protocol"]
    names = Path(str(there.get("reference", {}).get("npz"))).name, Path(args.reference).name
    if names[0] != names[1]:
        differing["reference"] = names
    elif (made := there["reference"].get("checksum")) != reference:
        differing["checksum of the reference"] = made, reference
    differing |= _differing_networks(there, args, networks)
    if differing:
        raise ValueError(f"{path} is of other settings (there, here): {differing}; move it away, or give a folder as --out")
    return result


def _differing_networks(there: dict[str, Any], args: argparse.Namespace, networks: measuring.Networks) -> dict[str, tuple]:
    """Returns what is otherwise in the networks of a protocol: name -> (there, here); weights are told by what they hold."""
    weights = {"inception": args.inception, **args.spaces}
    loaded = {"inception": networks.inception, **networks.spaces}
    before = {"inception": there.get("inception", {}), **there.get("spaces", {})}
    if set(before) != set(weights):
        return {"features": (sorted(before), sorted(weights))}
    made = {name: f"{before[name].get('weights')} of checksum {before[name].get('checksum')}" for name in weights}
    return {
        f"weights of {name}": (made[name], f"{weights[name]} of checksum {loaded[name].checksum}")
        for name in weights if before[name].get("checksum") != loaded[name].checksum
    }  # fmt: skip
