"""Texts of compiled programs, by hand, and the mark of tests that compile real ones for TPUs."""

import importlib.util

import pytest


def has_libtpu():
    spec = importlib.util.find_spec("libtpu")
    return spec is not None and spec.loader is not None


needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install -e '.[tpu]'")


def costing(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":["4"]}}}}'


# as libtpu 0.0.42 writes them: layouts, memory spaces, a step of 1 that is carried along, no length of the loop
LOOP = f"""HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[8,8], p.1: bf16[8,8]) -> bf16[8,8] {{
  %p.0 = bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %p.1 = bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}} parameter(1)
  ROOT %convolution = bf16[8,8]{{1,0:T(8,128)(2,1)}} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}}

%body (state: (s32[], bf16[8,8], s32[])) -> (s32[], bf16[8,8], s32[]) {{
  %state = (s32[]{{:T(128)}}, bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:T(128)}}) parameter(0)
  %index = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %one = s32[]{{:T(128)}} get-tuple-element(%state), index=2
  %add = s32[]{{:T(128)}} add(%index, %one), {costing(2)}
  %x = bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%state), index=1
  %fusion = bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}} fusion(%x, %x), kind=kOutput, calls=%fused, {costing(100)}
  %sum = bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}} all-reduce(%fusion), channel_id=1, to_apply=%plus, {costing(7)}
  ROOT %tuple = (s32[]{{:T(128)}}, bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:T(128)}}) tuple(%add, %sum, %one)
}}

%condition (state.1: (s32[], bf16[8,8], s32[])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(LIMIT)
  %state.1 = (s32[]{{:T(128)}}, bf16[8,8]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:T(128)}}) parameter(0)
  %index.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%index.1, %limit), direction=LT
}}

ENTRY %main (x.1: bf16[8,8]) -> bf16[8,8] {{
  %zero = s32[]{{:T(128)}} constant(START)
  %one.1 = s32[]{{:T(128)}} constant(STEP)
  %x.1 = bf16[8,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  %copy = s32[]{{:T(128)}} copy(%zero), {costing(5)}
  %tuple.1 = (s32[]{{:T(128)}}, bf16[8,8]{{1,0:T(8,128)(2,1)}}, s32[]{{:T(128)}}) tuple(%copy, %x.1, %one.1)
  %while = (s32[]{{:T(128)}}, bf16[8,8]{{1,0}}, s32[]{{:T(128)}}) while(%tuple.1), condition=%condition, body=%bodyKNOWN
  ROOT %result = bf16[8,8]{{1,0}} get-tuple-element(%while), index=1
}}
"""


BRANCHES = f"""HloModule jit_f

%short (p.0: f32[4]) -> f32[4] {{
  %p.0 = f32[4]{{0}} parameter(0)
  ROOT %copy = f32[4]{{0}} copy(%p.0), {costing(10)}
}}

%long (p.1: f32[4]) -> f32[4] {{
  %p.1 = f32[4]{{0}} parameter(0)
  ROOT %copy.1 = f32[4]{{0}} copy(%p.1), {costing(30)}
}}

ENTRY %main (i: s32[], x: f32[4]) -> f32[4] {{
  %i = s32[] parameter(0)
  %x = f32[4]{{0}} parameter(1)
  %conditional = f32[4]{{0}} conditional(%i, %x, %x), branch_computations={{%short, %long}}
  ROOT %call = f32[4]{{0}} call(%conditional), to_apply=%short
}}
"""
