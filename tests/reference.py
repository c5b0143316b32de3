"""Loader of the golden values: inputs and outputs of the published PyTorch code, with weights drawn by rule.

A case is NAME.npz beside NAME.json in `REPAE_GOLDEN_DIR` (default: tests/golden). Sizes and hyper-parameters come from the
JSON, so that another folder of the same form runs unchanged.
"""

import json
import math
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(os.environ.get("REPAE_GOLDEN_DIR") or Path(__file__).parent / "golden")

NETWORK_RTOL = 2e-5  # relative to the largest entry
LOSS_RTOL = 1e-5
STEPS_RTOL = 1e-3  # three whole training steps


def cases(prefix):
    """Names of all cases that begin with `prefix`; at least one must exist."""
    names = sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.json"))
    assert names, f"no golden case {prefix}* in {GOLDEN}"
    return names


def draw(name, shape, seed, prefix):
    """One weight by the rule of the golden files."""
    rng = np.random.default_rng([seed, zlib.crc32((prefix + name).encode())])
    x = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return (0.5 + np.abs(x)).astype(np.float32)
    if len(shape) >= 2:
        return (x / np.sqrt(np.float32(math.prod(shape[1:])))).astype(np.float32)
    if name.endswith(".weight"):
        return (1 + 0.1 * x).astype(np.float32)
    return (0.1 * x).astype(np.float32)


def state_dict(specs, seed, prefix):
    """All drawn weights of one module."""
    return {name: draw(name, tuple(spec["shape"]), seed, prefix) for name, spec in specs.items() if spec["fill"]}


def load(name):
    """A case: .arrays (npz), .meta, .weights (one state dict, or one per module)."""
    spec = json.loads((GOLDEN / f"{name}.json").read_text())
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    meta, specs, seed = spec["meta"], spec["state_dict"], spec["seed"]
    if "prefixes" in meta:
        weights = {module: state_dict(specs[module], seed, meta["prefixes"][module]) for module in specs}
    else:
        weights = state_dict(specs, seed, meta.get("prefix", ""))
    return SimpleNamespace(arrays=arrays, meta=meta, weights=weights, seed=seed)


def nhwc(x):
    """NCHW -> NHWC."""
    return np.moveaxis(x, -3, -1)


def relative_error(actual, expected):
    """Largest difference relative to the largest entry expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all()
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def check(actual, expected, rtol, name, record=None):
    """Assert `relative_error` <= rtol; the error is recorded with the test (see --junitxml or -rP)."""
    error = relative_error(actual, expected)
    print(f"{name}: relative error {error:.1e} (tolerance {rtol:.0e})")
    if record is not None:
        record(name, float(error))
    assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"
