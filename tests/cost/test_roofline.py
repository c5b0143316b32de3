"""Rooflines of small programs whose FLOP and bytes are known by hand: of kept texts and, with the CUDA plugin, of real ones."""

import dataclasses
import json
import re

import jax
import pytest
from gpu_programs import PROGRAMS, compiled, needs_cuda_plugin, skip_without_cudnn, stored
from hlo_programs import BRANCHES, LOOP, needs_libtpu

from repae_jax.cost import hlo_cost, roofline, roofline_text
from repae_jax.cost.chips import CHIPS
from repae_jax.cost.hlo import arrays, parse
from repae_jax.cost.kernels import flop, part_of
from repae_jax.cost.roofline import ARITHMETIC, COLLECTIVES, MEMORY, STARTS, Groups
from repae_jax.cost.topologies import topology_devices

H200 = CHIPS["h200"]
GROUPS = {"8": Groups.of_mesh({"data": 2, "fsdp": 4}, 8), "2x8": Groups.of_mesh({"data": 2, "fsdp": 8}, 8)}
MIB = 2**20
LAYER = 4096 * 1024  # elements
# FLOP by precision, bytes of kernels that move more than a kilobyte
EXPECTED = {
    "product": ({"bfloat16": 2 * 4096 * 1024 * 2048}, {"product": 2 * (4096 * 1024 + 1024 * 2048 + 4096 * 2048)}),
    "float32_product": ({"float32": 2 * 512**3}, {"product": 3 * MIB}),
    "exact_product": ({"exact": 2 * 512**3}, {"product": 3 * MIB}),
    "chain": ({}, {"fusion": 8192 * 4096 * (2 + 4 + 4)}),
    # a turn reads a layer's weights, writes them in bfloat16, multiplies, and applies tanh; x is copied once, for it changes
    "scan": (
        {"bfloat16": 12 * 2 * 4096 * 1024**2},
        {
            "copy": 4 * LAYER,
            "fusion": 12 * (6 * 1024**2 + 4 * LAYER),
            "product": 12 * (2 * 1024**2 + 4 * LAYER),
        },
    ),
    # the stack is filled with zeros first; then a turn reads x and writes its place of the stack, and reads and writes x
    "stacked": ({}, {"copy": 8 * LAYER, "fusion": 12 * 4 * LAYER + 12 * 2 * 8 * LAYER}),
    "update": ({}, {"fusion": 2 * 4 * 4096}),
    "convolution": (
        {"bfloat16": 2 * 9 * 128 * 256 * 8 * 64 * 64},
        {"convolution": 2 * (8 * 64 * 64 * (128 + 256) + 9 * 128 * 256), "fusion": 2 * 2 * 9 * 128 * 256},
    ),
    "convolution_gradients": (
        {"bfloat16": 2 * 2 * 9 * 128 * 256 * 8 * 64 * 64},
        {"convolution": 2 * 2 * (8 * 64 * 64 * (128 + 256) + 9 * 128 * 256), "fusion": 2 * 2 * 2 * 9 * 128 * 256},
    ),
    # back: the scores again, gradients of values, scores, queries and keys; the sums of exponentials are kept in float32
    "attention": (
        {"bfloat16": (2 + 5) * 2 * 4 * 16 * 256**2 * 64},
        {"product": (4 + 8) * 2 * 4 * 256 * 16 * 64 + 2 * 4 * 4 * 16 * 256},
    ),
    "scopes": ({"bfloat16": 2 * 512**3}, {"product": 2 * 3 * 512**2, "fusion": 2 * 2 * 512**2}),
}


def roofline_of(text, name, **options):
    return roofline.analyze(text, H200, GROUPS.get(PROGRAMS[name][3].get("gpus"), roofline.ALONE), **options)


def check(result, name):
    flops, sizes = EXPECTED[name]
    assert result.flop() == flops and result.unknown_loops == 0
    moved = {}
    for kernel in result.kernels:
        if kernel.bytes > 1024:
            moved[kernel.kind] = moved.get(kernel.kind, 0) + kernel.times * kernel.bytes
    assert moved == pytest.approx(sizes, rel=1e-4), "indices of slices are the rest"


@pytest.mark.parametrize("name", EXPECTED)
def test_flop_and_bytes_of_kept_programs(name):
    check(roofline_of(stored(name), name), name)


@pytest.mark.integration
@needs_cuda_plugin
@pytest.mark.parametrize("name", EXPECTED)
def test_flop_and_bytes_of_programs_compiled_now(name):
    skip_without_cudnn(name)
    check(roofline_of(compiled(name).as_text(), name), name)


ALL, HOST = 16, 8
EXCHANGES = {
    # kind, axes, bytes of the whole array, that a GPU sends over NVLink, and over the network
    "all_gather": ("all-gather", "data and fsdp", 16 * MIB, 16 * MIB * 7 / 8, 0),
    "fsdp": ("all-gather", "fsdp", 2 * MIB, 2 * MIB * 7 / 8, 0),
    # there and back: each of a host's eight sends an eighth of the sum to the other host
    "gradient_sum": ("all-reduce", "data and fsdp", MIB / 2, MIB / 2 * 2 * 15 / 16, MIB / 2 * 2 * 1 / 2 / 8),
}


def check_exchange(result, name):
    kind, axes, *sizes = EXCHANGES[name]
    [(key, moved)] = result.exchanges().items()
    assert key == (kind, axes) and [moved[field] for field in ("size", "over_link", "over_network")] == sizes
    slowest = max(sizes[1] / 450e9, sizes[2] / 50e9) / H200.reached["link"]
    assert moved["seconds"] == pytest.approx(slowest) == result.by_bound()[COLLECTIVES]


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_of_kept_programs(name):
    check_exchange(roofline_of(stored(name), name), name)


@pytest.mark.integration
@needs_cuda_plugin
@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_of_programs_compiled_now(name):
    check_exchange(roofline_of(compiled(name).as_text(), name), name)


def test_a_kernel_takes_as_long_as_the_slowest_of_its_limits():
    [product] = roofline_of(stored("product"), "product").kernels
    assert product.bound == ARITHMETIC
    assert product.seconds == pytest.approx(2 * 4096 * 1024 * 2048 / (H200.reached["product"] * 989e12))
    [chain] = roofline_of(stored("chain"), "chain").kernels
    assert chain.bound == MEMORY and chain.seconds == pytest.approx(8192 * 4096 * 10 / (H200.reached["memory"] * 4.8e12))
    [update] = roofline_of(stored("update"), "update").kernels
    assert update.bound == STARTS and update.seconds == H200.start
    slow = dataclasses.replace(H200, bandwidth=1e12)
    [product] = roofline.analyze(stored("product"), slow).kernels
    assert product.bound == MEMORY


def test_sums():
    result = roofline_of(stored("scan"), "scan")
    assert result.seconds == pytest.approx(sum(result.by_bound().values()))
    assert result.seconds == pytest.approx(sum(part["seconds"] for part in result.by_part().values()))
    first, *others = result.largest(3)
    assert first.kind == "product" and first.times == 12 and len(others) == 2
    numbers = result.numbers(3)
    assert "product custom-call.1" in roofline_text.kernel_table(numbers)[1]
    assert roofline_text.part_table(numbers)[-1].split()[2] == f"{1000 * result.seconds:.1f}"
    assert roofline_text.exchange_table(numbers, "NVLink") == [] and json.loads(json.dumps(numbers)) == numbers


def test_tables_of_exchanges():
    numbers = roofline_of(stored("gradient_sum"), "gradient_sum").numbers(1)
    head, row = roofline_text.exchange_table(numbers, "NVLink")
    assert "by NVLink" in head and row.split() == ["all-reduce", "over", "data", "and", "fsdp", "0.00", "0.00", "0.00", "0.0"]


def test_parts_are_named_as_flop_are():
    result = roofline_of(stored("scopes"), "scopes").by_part()
    assert set(result) == {"vae/Decoder.decode", "update"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(run)/vae/transpose(jvp(SiT.align))/SiT._to_tap/while/body/closed_call/blocks/mul", "vae/SiT.align"),
        ("jit(run)/encoders/encoder/VisionTransformer/attn/jit(softmax)/exp", "encoders/encoder/VisionTransformer"),
        ("jit(run)/vae/transpose(vae)/jvp(LPIPS)/select_n", "vae/LPIPS"),
        ("jit(run)/update/jit(_where)/select_n", "update"),
        ("jit(run)/sit/jvp()/mul", "sit"),
        ("jit(run)/jit(_normal)/erf_inv", "other"),
        ("", "other"),
    ],
)
def test_part_of_a_name(name, part):
    assert part_of(name) == part


def test_what_has_no_name_is_of_the_part_that_uses_it():
    unnamed = re.sub(r'(__cublas\$lt\$matmul", metadata=\{)op_name="[^"]*"', r"\1", stored("scopes"))
    assert unnamed != stored("scopes")
    assert set(roofline.analyze(unnamed, H200).by_part()) == {"vae/Decoder.decode", "update"}


# ---- programs by hand: what small ones do not show ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=(0,2,1,3) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_of_chips(groups, expected):
    assert sorted(map(sorted, roofline.replica_groups(groups, 4))) == expected


def test_an_unknown_notation_of_groups_is_an_error():
    with pytest.raises(ValueError, match="notation that is not known here: .*<circle>"):
        roofline.replica_groups("replica_groups=<circle>", 4)


def test_a_permutation_between_hosts_goes_over_the_network():
    text = """HloModule jit_f

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  ROOT %permute = f32[1024,1024]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,PLACE}}
}
"""
    near, far = (
        roofline.analyze(text.replace("PLACE", place), H200, Groups((0, 0, 1), {})).kernels[0].moved for place in ("0", "2")
    )
    assert (near.over_link, near.over_network) == (4 * MIB, 0) and (far.over_link, far.over_network) == (0, 4 * MIB)


COLLECTIVE = """HloModule jit_f

ENTRY %main (x: f32[1024,1024]) -> f32[RESULT,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  ROOT %c = f32[RESULT,1024]{1,0} KIND(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""
HALVES, UNEVEN = (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("kind", "domains", "link", "network"),
    [
        # each sends an eighth of its array to each of three near it, and of four far from it
        ("all-to-all", HALVES, 3 / 8, 4 / 8),
        # one of the six sends to five near it, one of the two to six far from it
        ("all-to-all", UNEVEN, 5 / 8, 6 / 8),
        ("all-to-all", (0,) * 8, 7 / 8, 0),
        # a half of the array to the other host, by four
        ("reduce-scatter", HALVES, 7 / 8, 1 / 2 / 4),
        ("reduce-scatter", UNEVEN, 7 / 8, 1 / 2 / 2),
        ("reduce-scatter", tuple(range(8)), 0, 7 / 8),
        ("all-reduce", UNEVEN, 2 * 7 / 8, 2 * 1 / 2 / 2),
    ],
)
def test_what_a_chip_sends_by_hand(kind, domains, link, network):
    text = COLLECTIVE.replace("RESULT", "128" if kind == "reduce-scatter" else "1024").replace("KIND", kind)
    [kernel] = roofline.analyze(text, H200, Groups(domains, {})).kernels
    moved = kernel.moved
    assert (moved.size, moved.over_link, moved.over_network) == (4 * MIB, 4 * MIB * link, 4 * MIB * network)


PRODUCT = """HloModule jit_f

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}PRECISION
}
"""


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("", "float32"),
        (", operand_precision={default,default}", "float32"),
        (", operand_precision={high,high}", "high"),
        (", operand_precision={highest,highest}", "exact"),
        (', backend_config={"precision_config":{"operand_precision":["HIGH","HIGH"]}}', "high"),
        (', backend_config={"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}', "exact"),
    ],
)
def test_precisions_of_float32(precision, name):
    computations, entry = parse(PRODUCT.replace("PRECISION", precision))
    assert flop(computations, computations[entry], computations[entry]["d"]) == {name: 2 * 8**3}


def test_what_is_started_counts_once():
    """Since jaxlib 0.11 the shape of what is started lists operands, result and context."""
    done = "ROOT %loop_dynamic_update_slice_fusion = f32[1024,4096]{1,0} fusion-done(%start)"
    start = "%start = ((f32[1024,4096]{1,0}, f32[1,4096]{1,0}), f32[1024,4096]{1,0}, u32[]) fusion-start("
    text = re.sub(r"ROOT %loop_dynamic_update_slice_fusion = \S+ fusion\((.*)", rf"{start}\1\n  {done}", stored("update"))
    assert "fusion-done" in text
    check(roofline_of(text, "update"), "update")


CONVOLUTION = """HloModule jit_f

ENTRY %main (x: bf16[2,8,8,16], w: bf16[3,3,16,32]) -> bf16[2,SIDE,SIDE,32] {
  %x = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %w = bf16[3,3,16,32]{3,2,1,0} parameter(1)
  ROOT %c = bf16[2,SIDE,SIDE,32]{3,2,1,0} convolution(%x, %w), window={WINDOW}, dim_labels=b01f_01io->b01f
}
"""


@pytest.mark.parametrize(
    ("side", "window", "pairs"),
    [
        (6, "size=3x3", 18),
        (8, "size=3x3 pad=1_1x1_1", 22),  # 8 places of 3, of which two are outside
        (4, "size=3x3 stride=2x2 pad=0_1x0_1", 11),
        (17, "size=3x3 pad=2_2x2_2 lhs_dilate=2x2", 24),  # every pixel meets every place of the window once
        (4, "size=3x3 rhs_dilate=2x2", 12),
    ],
)
def test_xlas_own_convolutions_count_what_is_not_zero(side, window, pairs):
    computations, entry = parse(CONVOLUTION.replace("SIDE", str(side)).replace("WINDOW", window))
    result = flop(computations, computations[entry], computations[entry]["c"])
    assert result == {"bfloat16": 2 * pairs**2 * 2 * 16 * 32}


def test_arrays_beside_the_processors_cost_nothing():
    assert [array.is_near for array in arrays("(f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, /*index=2*/f32[8]{0:S(5)})")] == [
        True,
        False,
        True,
    ]
    text = LOOP.replace("LIMIT", "10").replace("START", "0").replace("STEP", "1").replace("KNOWN", "")
    result = roofline.analyze(text, CHIPS["v5e"])
    fusion = next(kernel for kernel in result.kernels if kernel.kind == "fusion")
    assert fusion.times == 10 and fusion.bytes == 0 and fusion.flop == {"bfloat16": 2 * 8**3}


def tpu_text(name):
    function, shapes, dtypes, _ = PROGRAMS[name]
    [device] = topology_devices("v5e:1x1")
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in zip(shapes, dtypes)]
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.integration
@needs_libtpu
@pytest.mark.parametrize(("name", "factor"), [("product", 1.4), ("chain", 1.15), ("convolution", 1.6), ("scan", 2.5)])
def test_a_second_opinion_on_tpus(name, factor):
    """The roofline is near the cycles that the compiler expects; those of a scan are more, for its slices wait."""
    chip, text = CHIPS["v5e"], tpu_text(name)
    result, cycles = roofline.analyze(text, chip), hlo_cost.analyze(text).cycles
    assert 1 / factor < result.seconds / (cycles / chip.clock) < factor
    expected = EXPECTED[name][0].get("bfloat16", 0.0)
    assert result.flop().get("bfloat16", 0.0) == pytest.approx(expected, rel=0.03), "padding does not count"


def test_branches_count_as_often_as_they_are_taken():
    sizes = [
        sum(k.times * k.bytes for k in roofline.analyze(BRANCHES, H200, shares=shares).kernels) for shares in ((), (0.25, 0.75))
    ]
    assert sizes == [2 * 2 * 16, 2 * 2 * 16], "either branch copies 16 bytes; so does the call after them"
    assert [kernel.times for kernel in roofline.analyze(BRANCHES, H200, shares=(0.25, 0.75)).kernels] == [0.25, 0.75, 1]
