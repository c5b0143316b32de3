"""What one kernel of a scheduled program does: its FLOP, the bytes that it reads and writes in memory, the part it belongs to.

A kernel is an instruction outside of fusions: a fusion, a call of cuBLAS or cuDNN, a collective, a copy.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Mapping

from repae_jax.cost.hlo import Array, Computation, Instruction, array_bytes, arrays, root

_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "optimization-barrier", "partition-id",
    "replica-id", "add-dependency", "send", "recv",
)  # fmt: skip
OTHER = "other"
NEAR = 4  # steps to those that use a result, within which names are looked for
_SAME_ARRAY = ("bitcast", "reshape", "get-tuple-element", "copy", "convert")
_CONTROL = re.compile(r"while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation")  # no scopes
_OPERANDS = re.compile(r'operand_precision"?[=:]\s*[{\[]"?(highest|high)\b', re.IGNORECASE)
_PRECISIONS = {"highest": "exact", "high": "high"}
_SCRATCH = ("s8", "u8")  # of libraries, the last of their results
_FORWARD = ("__cudnn$convForward", "__cudnn$convForwardGraph", "__cudnn$convBiasActivationForward")
_ATTENTION = "__cudnn$fmha"
Computations = Mapping[str, Computation]
Users = dict[str, list[Instruction]]


def is_free(instruction: Instruction) -> bool:
    """Returns whether an instruction takes no time: a name of a value, or the end of what was started before."""
    return instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update"))


def scopes_of(op_name: str) -> list[str]:
    """Returns the scopes and modules of an op_name, outermost first, without transformations and control flow."""
    path = [re.sub(r"\w+\(|\)", "", step) for step in re.sub(r"\bjit\([^()]*\)", "", op_name).split("/")[:-1]]
    path = [step for step in path if re.fullmatch(r"[\w.\-]+", step) and not _CONTROL.fullmatch(step)]
    return [step for step, _ in itertools.groupby(path)]  # a gradient's has the scope twice


def part_of(op_name: str) -> str:
    """Returns the part of the model that an op_name is of, under the names of `flops.count`: 'vae/SiT.align'.

    It ends with the outermost module, whose name is that of its class; outside of modules it is the outermost scope.
    """
    path = scopes_of(op_name)
    depth = next((depth for depth, name in enumerate(path, 1) if name[0].isupper()), 1)
    return "/".join(path[:depth]) or OTHER


def op_name(computations: Computations, users: Users, instruction: Instruction) -> str:
    """Returns the op_name of a kernel: its own, one in the computation that it calls, one of those that use it, or ''."""
    own = _op_name(computations, instruction)
    if own:
        return own
    near = [instruction]
    for _ in range(NEAR):
        near = [user for each in near for user in users.get(each.name, ())]
        name = next((name for name in map(functools.partial(_op_name, computations), near) if name), "")
        if name:
            return name
    return ""


def _op_name(computations, instruction):
    match = re.search(r'op_name="([^"]*/[^"]*)"', instruction.attributes)  # one without a slash is the name of an argument
    if match:
        return match[1]
    inner = [_op_name(computations, each) for name in instruction.called("calls") for each in computations[name].values()]
    return next((name for name in reversed(inner) if name), "")


# ---- FLOP -----------------------------------------------------------------------------------------------------------


def flop(computations: Computations, computation: Computation, instruction: Instruction) -> dict[str, float]:
    """Returns the FLOP of products and convolutions in an instruction, and in what it calls, by precision.

    A multiplication with its addition counts 2. Of cuDNN's convolutions padding counts, of XLA's own neither padding nor zeros
    between pixels.

    Returns:
      'bfloat16', 'float32' (as the chip does it by default, such as TF32), 'high' or 'exact' -> FLOP.
    """
    counted: dict[str, float] = collections.Counter()
    for name in instruction.called("calls", "to_apply") if instruction.opcode in ("fusion", "call", "async-start") else ():
        for inner in computations[name].values():
            counted.update(flop(computations, computations[name], inner))
    count = {"dot": _dot, "convolution": _convolution, "custom-call": _library_call}.get(instruction.opcode)
    own = count(computation, instruction) if count else 0.0
    if own:
        counted[_precision(computation, instruction)] += own
    return counted


def _precision(computation, instruction):
    if arrays(computation[instruction.operands[0]].shape)[0].dtype not in ("f32", "f64"):
        return "bfloat16"
    match = _OPERANDS.search(instruction.attributes)
    return _PRECISIONS[match[1].lower()] if match else "float32"


def _sides(computation, name):
    return arrays(computation[name].shape)[0].sides


def _dot(computation, instruction):
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    left = _sides(computation, instruction.operands[0])
    return 2 * arrays(instruction.shape)[0].size * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)


def _convolution(computation, instruction):
    images, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0]))
    weights, pixels = _sides(computation, instruction.operands[1]), _sides(computation, instruction.operands[0])
    result_sides = arrays(instruction.shape)[0].sides
    used = 1
    for axis in sorted(label for label in kernel if label.isdigit()):
        option = {name: values.split("x")[int(axis)] for name, values in window.items()}
        used *= _pairs(pixels[images.index(axis)], weights[kernel.index(axis)], result_sides[result.index(axis)], option)
    return 2 * result_sides[result.index("b")] * result_sides[result.index("f")] * weights[kernel.index("i")] * used


def _pairs(pixels, size, results, option):
    """Counts the pairs of a result and a place in the window, along one axis, in which there is a pixel."""
    before = int(option.get("pad", "0_0").split("_")[0])
    stride, apart, spread = (int(option.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    places = (i * stride + j * spread - before for i, j in itertools.product(range(results), range(size)))
    return sum(place % apart == 0 and 0 <= place // apart < pixels for place in places)


def _library_call(computation, instruction):
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
    operands, result = [_sides(computation, name) for name in instruction.operands], arrays(instruction.shape)[0].sides
    if target.startswith("__cublas"):
        contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.attributes)[1]
        return 2 * math.prod(result) * math.prod(operands[0][int(axis)] for axis in re.findall(r"\d+", contracted))
    if target.startswith("__cudnn$conv"):
        output_sides, kernel = (result, operands[1]) if target in _FORWARD else (operands[0], operands[1])
        if target == "__cudnn$convBackwardFilter":
            output_sides, kernel = operands[1], result
        outputs = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1].index("o")
        return 2 * math.prod(output_sides) * math.prod(kernel) / kernel[outputs]
    if target.startswith(_ATTENTION):
        pairs = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)[1]
        products = 5 if "Backward" in target else 2  # back: scores again, and the gradients of values, scores, queries, keys
        return 2 * products * operands[0][-1] * math.prod(int(side) for side in re.findall(r"\d+", pairs))
    return 0.0


# ---- bytes ----------------------------------------------------------------------------------------------------------


def traffic(computations: Computations, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of memory that a kernel reads and writes.

    Of an array of which it takes a slice, those of the slice; of one that it updates in place, those of the update. What is in
    a chip's own memory beside its processors costs nothing, as do results that only a library's scratch space is made of.
    """
    results = [array for array in arrays(instruction.shape) if not array.is_near]
    if instruction.opcode == "fusion":
        fused = computations[instruction.called("calls")[0]]
        return _operands_bytes(computations, computation, instruction, fused) + _written(fused, arrays(instruction.shape))
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * sum(array.bytes for array in results)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * array_bytes(computation[instruction.operands[1]].shape)
    if instruction.opcode == "copy-start":
        results = results[:1] if not arrays(instruction.shape)[0].is_near else []  # then its operand, and a token
    if instruction.opcode == "custom-call" and len(results) > 1 and results[-1].dtype in _SCRATCH:
        results = results[:-1]
    read = (computation[name].shape for name in dict.fromkeys(instruction.operands))
    return sum(_far_bytes(shape) for shape in read) + sum(array.bytes for array in results)


def _far_bytes(shape):
    return sum(array.bytes for array in arrays(shape) if not array.is_near)


def _operands_bytes(computations, computation, instruction, fused):
    """Returns the bytes of its operands that a fusion reads."""
    parameters = {int(each.literal): each for each in fused.values() if each.opcode == "parameter"}
    users = users_of(fused)
    shares: dict[str, list[float]] = collections.defaultdict(list)
    for index, name in enumerate(instruction.operands):
        if index in parameters and _far_bytes(computation[name].shape):
            shares[name].append(_read(computations, fused, users, parameters[index].name))
    return sum(min(array_bytes(computation[name].shape), sum(reads)) for name, reads in shares.items())


def users_of(computation: Computation) -> Users:
    """Returns the instructions that use each value of a computation, by its name."""
    users: Users = collections.defaultdict(list)
    for instruction in computation.values():
        for name in dict.fromkeys(instruction.operands):
            users[name].append(instruction)
    return users


def _read(computations, fused, users, name) -> float:
    """Returns the bytes of a value inside of a fusion that are needed: of slices and of updates in place only their own."""
    whole, needed = array_bytes(fused[name].shape), 0.0
    for user in users[name]:
        first = user.operands[0] == name
        if user.opcode in _SAME_ARRAY:
            scale = whole / array_bytes(user.shape) if user.opcode == "convert" else 1
            needed += scale * _read(computations, fused, users, user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
            needed += array_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and first and _parameter(fused, name):
            continue
        elif user.opcode == "fusion":
            inner = computations[user.called("calls")[0]]
            index = user.operands.index(name)
            parameter = next(each.name for each in inner.values() if each.opcode == "parameter" and int(each.literal) == index)
            needed += _read(computations, inner, users_of(inner), parameter)
        else:
            return whole
    return min(whole, needed)


def _parameter(fused, name):
    """Returns whether a value is a parameter of the fusion, perhaps under another shape."""
    while fused[name].opcode in _SAME_ARRAY:
        name = fused[name].operands[0]
    return fused[name].opcode == "parameter"


def _written(fused: Computation, results: list[Array]) -> float:
    last = root(fused)
    values = [fused[name] for name in last.operands] if last.opcode == "tuple" else [last]
    if len(values) != len(results):  # results that are tuples themselves
        return sum(array.bytes for array in results if not array.is_near)
    return sum(_result_bytes(fused, value, array) for value, array in zip(values, results) if not array.is_near)


def _result_bytes(fused, value, array):
    while value.opcode in _SAME_ARRAY:
        value = fused[value.operands[0]]
    if value.opcode == "dynamic-update-slice" and _parameter(fused, value.operands[0]):
        return array_bytes(fused[value.operands[1]].shape)
    return array.bytes
