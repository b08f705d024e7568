"""Collectives in the text of programs for TPU and GPU, which is not as that for CPU."""

import jax
import numpy as np

from memjax.collectives import collectives

MESH = jax.sharding.Mesh(np.full((2, 4), jax.devices()[0]), ("data", "fsdp"))
# As the compiler for v5e writes it: a loop whose turns only its condition names, a gather that is
# written down in the three operations that it runs beside, and groups as axes of a mesh.
GROUPS = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global_device_ids=true"
TEXT = f"""HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: bf16[16,8]) -> bf16[64,8] {{
  ROOT %all-gather.1 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-gather(%param_0), channel_id=5, {GROUPS}
}}

%async_collective_fusion.2 (param_1: bf16[16,8]) -> bf16[64,8] {{
  ROOT %all-gather.2 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-gather(%param_1), channel_id=5, {GROUPS}
}}

%fused_computation.3 (param_2: bf16[16,8]) -> bf16[64,8] {{
  ROOT %all-gather.3 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-gather(%param_2), channel_id=5, {GROUPS}
}}

%condition.4 (wide.param: (s32[], bf16[16,8])) -> pred[] {{
  %constant.9 = s32[]{{:T(128)}} constant(24)
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%get-tuple-element.1, %constant.9), direction=LT
}}

%body.5 (wide.param: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {{
  %fusion.1 = bf16[64,8]{{1,0}} fusion(%x), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[64,8]{{1,0}} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %fusion.3 = bf16[64,8]{{1,0}} fusion(%x), kind=kCustom, calls=%fused_computation.3
  %all-reduce.6 = f32[64,8]{{1,0:T(8,128)}} all-reduce(%dw), channel_id=7, to_apply=%add, \
replica_groups=mesh['axis_0'=8] {{'axis_0'}}
}}

ENTRY %main.6 (param.1: bf16[16,8]) -> bf16[16,8] {{
  %while.1 = (s32[], bf16[16,8]) while(%tuple.1), condition=%condition.4, body=%body.5
}}
"""


def test_a_gather_beside_other_work_counts_once_a_turn():
    whole, sums = 2 * 64 * 8, 4 * 64 * 8
    assert sorted(collectives(TEXT, MESH)) == [
        ("all-gather", ("fsdp",), 24, whole, whole * 3 / 4),
        ("all-reduce", ("data", "fsdp"), 24, sums, 2 * sums * 7 / 8),
    ]


ASYNCHRONOUS = """HloModule jit_step

ENTRY %main.1 (param.1: bf16[16,8]) -> bf16[16,8] {
  %all-gather-start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %reduce-scatter-start = (f32[64,8]{1,0}, f32[16,8]{1,0}) reduce-scatter-start(%dw), \
channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-reduce-start = f32[8]{0} all-reduce-start(%y), channel_id=3, \
replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""


def test_what_an_asynchronous_collective_sends_is_not_counted_with_what_it_makes():
    assert sorted(collectives(ASYNCHRONOUS, MESH)) == [
        ("all-gather", ("fsdp",), 1, 2 * 64 * 8, 2 * 64 * 8 * 3 / 4),
        ("all-reduce", ("fsdp",), 1, 4 * 8, 2 * 4 * 8 * 3 / 4),
        ("reduce-scatter", ("fsdp",), 1, 4 * 16 * 8, 4 * 16 * 8 * 3),
    ]


SCATTERED = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.8.clone.1 (input: f32[64,8], input.1: f32[8]) -> (f32[16,8], f32[2]) {
  %all-reduce.66 = (f32[64,8]{0,1:T(8,128)}, f32[8]{0}) all-reduce(%input, %input.1), \
channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %dynamic-slice.328 = f32[16,8]{0,1} dynamic-slice(%get-tuple-element.1, %multiply, %constant)
  %dynamic-slice.329 = f32[2]{0} dynamic-slice(%get-tuple-element.2, %multiply)
}

ENTRY %main.6 (param.1: f32[64,8]) -> f32[16,8] {
  %fusion.4 = (f32[16,8], f32[2]) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.8.clone.1
}
"""


def test_for_tpu_an_all_reduce_that_is_sliced_is_a_reduce_scatter():
    part = 4 * (16 * 8 + 2)
    assert collectives(SCATTERED, MESH) == [("reduce-scatter", ("fsdp",), 1, part, 3 * part)]
