"""Attention over a sharded sequence; the claims are in tests/on_devices/ring_attention.py."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from devices import run_on_virtual_devices
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ring_attention import ring_attention


def test_ring_attention_is_attention_on_virtual_devices():
    run_on_virtual_devices("ring_attention")


@pytest.mark.parametrize("impl, kernels", [("rdma", 1), ("xla", 0), ("auto", 0)])
def test_the_named_ring_is_in_the_program_for_tpu(impl, kernels):
    mesh = AbstractMesh((4,), ("context",), axis_types=(AxisType.Auto,))
    spec = P(None, "context")
    local = partial(ring_attention, axis_name="context", impl=impl)
    call = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    q, k = (jax.ShapeDtypeStruct((1, 1024, h, 128), jnp.bfloat16) for h in (4, 2))
    with dispatch.target("tpu"):
        text = jax.jit(call).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("ring_attention_rdma") == text.count("tpu_custom_call") == kernels
