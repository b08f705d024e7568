"""Infini-attention: attention in segments, and a linear memory of all segments before."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check, check_at_least
from memjax.layers import Linear, document_ids
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.linear_transformer import features
from memjax.positions import PositionField, Rotary, apply_position, check_head_size
from pallas_kernels import attention
from pallas_kernels.blocks import BlockState, Body, init_blocks, place_in_block, scan_blocks
from pallas_kernels.products import columns_dot_columns, dot

LEAST = 1e-6  # a smaller normaliser is that of an empty memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniFields:
    """segment: tokens that attend to each other, counted from the start of the document.

    update: "linear" adds what is new, "delta" what the memory did not say of it already.
    gate_rate: learning rate of the gates, relative to that of the other parameters.
    """

    segment: int = 128
    update: Literal["linear", "delta"] = "delta"
    gate_rate: float = 10.0
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "segment")
        check(self, "gate_rate", self.gate_rate > 0, "must be greater than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infini(InfiniFields, MixerConfig):
    """heads: each of head_size, None for d_model / heads. The others as in InfiniFields."""

    kind: ClassVar[str] = "infini"
    heads: int = 4
    head_size: int | None = None
    position: PositionField = Rotary()

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "heads", "head_size")

    def check_width(self, d_model: int) -> None:
        check_head_size(self, d_model)


class Memory(NamedTuple):
    """memory: sum of phi(k) vT; normaliser: sum of phi(k)."""

    memory_BHKV: jax.Array
    normaliser_BHK: jax.Array


class InfiniMixer(SequenceMixer):
    """y_t = W_o (g A_t + (1 - g) local_t),   g = sigmoid(beta), one a head

    local: causal softmax attention over the segment of t, with positions. A reads what the segments
    before left, without positions, phi = elu + 1:

    A_t = phi(q_t) M / (phi(q_t) z), 0 while the memory is empty
    M  += phi(K)T V                                "linear", at the end of each segment
    M  += phi(K)T (V - phi(K) M / (phi(K) z))      "delta"
    z  += sum of phi(k)

    State: M and z, float32, which the gradient reaches through all segments; keys and values of the
    unfinished segment. So H (K V + K) + 2 (segment - 1) H K floats.
    beta = gate_rate * b, with b learned and 0 at first: an optimizer whose steps do not depend on
    the scale of gradients moves beta gate_rate times as fast as the rest. It is never decayed.
    Errors: FieldError if the heads do not fit the width.
    Source: arXiv:2404.07143, Eqs. 4-10.
    """

    def __init__(self, config: Infini, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.size = config, config.head_size or d_model // config.heads
        wide = config.heads * self.size
        self.query, self.key, self.value = (
            Linear(d_model, wide, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.out = Linear(wide, d_model, rngs=rngs, axes=("embed", "heads"))
        self.gate = nnx.Param(jnp.zeros((config.heads,), jnp.float32), axes=("heads",))

    def init_state(self, batch: int) -> BlockState:
        token = jnp.zeros((batch, 1, self.config.heads, self.size), jnp.float32)
        return init_blocks(self._empty(), (token, token), block=self.config.segment)

    def _empty(self) -> Memory:
        shape = (self.config.heads, self.size, self.size)
        return Memory(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:2], jnp.float32))

    def __call__(
        self,
        state: BlockState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BlockState, Float[Array, "B T D"]]:
        q_BTHK, k_BTHK, v_BTHK = (
            p(x_BTD).reshape(*x_BTD.shape[:2], -1, self.size)
            for p in (self.query, self.key, self.value)
        )
        local_BTHK = self._local(state, q_BTHK, k_BTHK, v_BTHK, reset_BT)
        recalled_BTHK, state = scan_blocks(
            BODIES[self.config.update],
            (),
            self._empty(),
            state,
            (k_BTHK, v_BTHK),
            reset_BT,
            block=self.config.segment,
            queries=q_BTHK,
        )
        open_H1 = jax.nn.sigmoid(self.config.gate_rate * self.gate[...])[:, None]
        o_BTHK = open_H1 * recalled_BTHK + (1 - open_H1) * local_BTHK.astype(jnp.float32)
        return state, self.out(o_BTHK.astype(x_BTD.dtype).reshape(*x_BTD.shape[:2], -1))

    def _local(self, state: BlockState, q_BTHK, k_BTHK, v_BTHK, reset_BT) -> jax.Array:
        """Attention within segments, those that began before the call included."""
        block, tokens = self.config.segment, reset_BT.shape[1]
        place_BT = place_in_block(state.count_B, reset_BT, tokens, block)
        id_BT = document_ids(place_BT == 0)
        held_BM = jnp.arange(block - 1) - (block - 1) + state.count_B[:, None]  # places
        id_BJ = jnp.concatenate([jnp.where(held_BM >= 0, 0, -1), id_BT], 1)
        place_BJ = jnp.concatenate([held_BM, place_BT], 1)
        k_BJHK, v_BJHK = (
            jnp.concatenate([held.astype(new.dtype), new], 1)
            for held, new in zip(state.tokens, (k_BTHK, v_BTHK))
        )
        position = self.config.position
        slopes_H = position.slopes(self.config.heads)
        return attention(
            apply_position(position, q_BTHK, place_BT),
            apply_position(position, k_BJHK, jnp.maximum(place_BJ, 0)),
            v_BJHK,
            window=block,
            segment_ids=(id_BT, id_BJ),
            bias=None if slopes_H is None else jnp.asarray(slopes_H, jnp.float32),
            impl=self.config.impl,
        )

    def memory_report(self, segment: int = 1024, state: BlockState | None = None) -> MemoryReport:
        seen = float(np.mean(np.arange(segment) % self.config.segment + 1))
        wide = self.config.heads * self.size
        recurrence = (4.0 if self.config.update == "linear" else 6.0) * wide * self.size
        flops = projection_flops(self) + 4.0 * seen * wide + recurrence
        if state is None:
            return MemoryReport(state_bytes(self), flops, recurrence, {})
        told = {
            "gate": jax.nn.sigmoid(self.config.gate_rate * self.gate[...]).mean(),
            "state_norm": jnp.linalg.norm(state.carry.memory_BHKV),
        }
        return MemoryReport(state_bytes(self), flops, recurrence, told)


def scaled_features(x: jax.Array) -> jax.Array:
    """`features` in float32, the largest of a vector at least 1: their scale changes no reading."""
    x = x.astype(jnp.float32)
    low = jax.lax.stop_gradient(jnp.minimum(jnp.max(x, -1, keepdims=True), 0))
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0) - low))


def recall(memory: Memory, x_BHCK: jax.Array) -> jax.Array:
    """phi(x) M / (phi(x) z), 0 where nothing has been written."""
    phi_BHCK = scaled_features(x_BHCK)
    sum_BHC1 = jnp.einsum("...ck,...k->...c", phi_BHCK, memory.normaliser_BHK)[..., None]
    written = sum_BHC1 > LEAST
    return jnp.where(
        written, dot(phi_BHCK, memory.memory_BHKV) / jnp.where(written, sum_BHC1, 1), 0
    )


def _prepare(consts, inputs, valid_NBC):
    """Heads before tokens: keys, values, queries; float32 where they are written."""
    (k, v), q = inputs
    k, v, q = (jnp.swapaxes(a, 2, 3) for a in (k, v, q))
    return features(k.astype(jnp.float32)), k, v.astype(jnp.float32), q


def _write(memory: Memory, phi_BHCK: jax.Array, v_BHCV: jax.Array) -> Memory:
    return Memory(
        memory.memory_BHKV + columns_dot_columns(phi_BHCK, v_BHCV),
        memory.normaliser_BHK + jnp.sum(phi_BHCK, -2),
    )


def _step_linear(consts, memory, prepared):
    phi_BHCK, _, v_BHCV, _ = prepared
    return _write(memory, phi_BHCK, v_BHCV), ()


def _step_delta(consts, memory, prepared):
    phi_BHCK, k_BHCK, v_BHCV, _ = prepared
    return _write(memory, phi_BHCK, v_BHCV - recall(memory, k_BHCK)), ()


def _finish(consts, memory, prepared, kept):
    return jnp.swapaxes(recall(memory, prepared[-1]), 2, 3)


BODIES = {
    "linear": Body(step=_step_linear, prepare=_prepare, finish=_finish),
    "delta": Body(step=_step_delta, prepare=_prepare, finish=_finish),
}
