"""Cycles and collectives from the text of compiled programs: fragments by hand and, where libtpu is installed, real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_programs import BRANCHES, LOOP, needs_libtpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from repae_jax.cost import hlo, hlo_cost
from repae_jax.cost.topologies import topology_devices


def loop(limit=12, start=0, step=1, known=""):
    return LOOP.replace("LIMIT", str(limit)).replace("START", str(start)).replace("STEP", str(step)).replace("KNOWN", known)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (loop(), 12),
        (loop(start=3), 9),
        (loop(step=5), 3),
        (loop(limit=0), 0),
        (loop(known=', backend_config={"known_trip_count":{"n":"4"}}'), 4),
    ],
)
def test_a_loop_counts_as_often_as_it_turns(text, turns):
    cost = hlo_cost.analyze(text)
    assert cost.cycles == 5 + turns * (2 + 100 + 7) and cost.unknown_loops == 0
    assert cost.collectives == {"all-reduce": turns * 8 * 8 * 2}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("add(%index, %one)", "multiply(%index, %one)"),
        ("constant(12)", "parameter(1)"),
    ],
)
def test_a_loop_of_unknown_length_counts_once(old, new):
    cost = hlo_cost.analyze(loop().replace(old, new))
    assert cost.unknown_loops == 1 and cost.cycles == 5 + 109


def test_a_loop_inside_a_loop_knows_what_the_outer_one_carries():
    """Its limit, or its step, is often an element of the outer loop's state."""
    inner = loop().partition("ENTRY")[0].partition("\n\n")[2]
    for name in ("body", "condition", "fused"):
        inner = inner.replace(f"%{name} (", f"%{name}.in (")
    inner = inner.replace("calls=%fused", "calls=%fused.in")
    outer = loop(limit=3)
    at = "  %sum = "
    nested = (
        "  %nought = s32[]{:T(128)} constant(0)\n"
        "  %tuple.2 = (s32[], bf16[8,8]{1,0}, s32[]) tuple(%nought, %fusion, %one)\n"
        "  %while.2 = (s32[], bf16[8,8]{1,0}, s32[]) while(%tuple.2), condition=%condition.in, body=%body.in\n"
    )
    text = outer.replace(at, nested + at).replace("HloModule jit_f, is_scheduled=true\n", f"HloModule jit_f\n\n{inner}", 1)
    cost = hlo_cost.analyze(text)
    assert cost.unknown_loops == 0 and cost.cycles == 5 + 3 * (109 + 12 * 109)


def test_the_longest_branch_counts():
    assert hlo_cost.analyze(BRANCHES).cycles == 30 + 10
    assert hlo_cost.analyze(BRANCHES, [0.5, 0.25, 0.25]).cycles == 30 + 10, "shares of other conditionals"


@pytest.mark.parametrize(
    "branches", ["branch_computations={%short, %long}", "true_computation=%long, false_computation=%short"]
)
def test_branches_count_as_often_as_they_are_taken(branches):
    text = BRANCHES.replace("branch_computations={%short, %long}", branches)
    assert text.count(branches) == 1 and hlo_cost.analyze(text, [0.75, 0.25]).cycles == 0.75 * 10 + 0.25 * 30 + 10


COLLECTIVES = """HloModule jit_f

%scatter (p.0: f32[64,2]) -> f32[8,2] {
  %p.0 = f32[64,2]{1,0} parameter(0)
  ROOT %reduce-scatter = f32[8,2]{1,0} reduce-scatter(%p.0), channel_id=7, dimensions={0}, to_apply=%add
}

%scatter.on (p.1: f32[64,2]) -> f32[8,2] {
  %p.1 = f32[64,2]{1,0} parameter(0)
  ROOT %reduce-scatter.on = f32[8,2]{1,0} reduce-scatter(%p.1), channel_id=7, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[64,2]) -> f32[64,2] {
  %x = f32[64,2]{1,0:T(8,128)} parameter(0)
  %h = bf16[8,2]{1,0:T(8,128)(2,1)} convert(%x)
  %all-gather-start = (bf16[8,2]{1,0}, bf16[64,2]{1,0:T(8,128)S(1)}) all-gather-start(%h), dimensions={0}
  %all-gather-done = bf16[64,2]{1,0} all-gather-done(%all-gather-start)
  %unsharded = bf16[64,2]{1,0} all-gather(%h), dimensions={0}
  %send = (f32[64,2]{1,0}, f32[64,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %received = f32[64,2]{1,0} collective-permute-done(%send)
  %swapped = f32[64,2]{1,0} all-to-all(%received), dimensions={0}
  %fusion = f32[8,2]{1,0} fusion(%x), kind=kCustom, calls=%scatter
  %fusion.on = f32[8,2]{1,0} fusion(%x), kind=kCustom, calls=%scatter.on
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %other = (bf16[8,2]{1,0}, u32[], token[]) send(%h, %after-all), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM"}
  %to-host = (f32[64,2]{1,0}, u32[], token[]) send(%x, %after-all), channel_id=3, is_host_transfer=true
  ROOT %sums = (f32[64,2]{1,0}, /*index=1*/bf16[8,2]{1,0}) all-reduce(%swapped, %h), to_apply=%add
}
"""


def test_collectives_by_kind():
    """One that goes on in several fusions, of one channel, counts once."""
    whole = 64 * 2
    assert hlo_cost.analyze(COLLECTIVES).collectives == {
        "all-gather": 2 * whole * 2,
        "collective-permute": whole * 4,
        "all-to-all": whole * 4,
        "reduce-scatter": whole * 4,
        "all-reduce": whole * 4 + 8 * 2 * 2,
        "to other slices": 8 * 2 * 2,
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("(bf16[3]{0}, /*index=1*/s4[4], f8e4m3fn[5], pred[])", 6 + 2 + 5 + 1),
        ("token[]", 0),
        ("f32[<=7,2]", 56),
    ],
)
def test_array_bytes(shape, size):
    assert hlo.array_bytes(shape) == size


def test_another_format_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo_cost.analyze("module @jit_f { func.func public @main() }")


# ---- real programs --------------------------------------------------------------------------------------------------


def compiled_text(function, *shapes, spec, slices=1):
    """HLO of a function for four chips, or slices of so many; arguments are sharded as `spec` says, results replicated."""
    mesh = jax.sharding.Mesh(np.array(topology_devices("v5e:2x2", slices)), ("data",), axis_types=(AxisType.Auto,))
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p)) for s, p in zip(shapes, spec)]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, P()))
    return jitted.lower(*args).compile().as_text()


@pytest.mark.integration
@needs_libtpu
def test_a_scanned_product_costs_as_often_as_it_turns():
    side, turns = 2048, 12
    shapes, spec = [(turns, side, side), (side, side)], [P(), P()]

    def scanned(length):
        return lambda ws, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws[:length])[0]

    half, many = (hlo_cost.analyze(compiled_text(scanned(n), *shapes, spec=spec)) for n in (turns // 2, turns))
    assert many.unknown_loops == 0 and many.collectives == {}
    at_peak = 2 * side**3 / 197e12 * 1.5e9
    assert 0.8 * turns * at_peak < many.cycles < 2 * turns * at_peak
    assert many.cycles == pytest.approx(2 * half.cycles, rel=0.1)


def mean_gradient(w, x):
    return jax.grad(lambda w: jnp.mean(jnp.square((x @ w).astype(jnp.float32))))(w)


@pytest.mark.integration
@needs_libtpu
def test_the_bytes_of_a_sum_over_the_chips():
    cost = hlo_cost.analyze(compiled_text(mean_gradient, (512, 256), (4096, 512), spec=[P(), P("data")]))
    assert cost.collectives["all-reduce"] == pytest.approx(512 * 256 * 2, abs=64)


@pytest.mark.integration
@needs_libtpu
def test_the_bytes_of_a_sum_over_two_slices():
    """Scattered over the four chips of a slice, a quarter each, before it leaves that."""
    cost = hlo_cost.analyze(compiled_text(mean_gradient, (512, 256), (4096, 512), spec=[P(), P("data")], slices=2))
    assert cost.collectives[hlo_cost.TO_OTHER_SLICES] == pytest.approx(512 * 256 * 2 / 4, abs=64)
