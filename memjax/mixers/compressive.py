"""Compressive Transformer: Transformer-XL whose cache is squeezed, not dropped, when it is full."""

import dataclasses
from functools import cache, partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check, check_at_least
from memjax.layers import Linear
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.relative import RelativeAttention, check_sinusoids
from pallas_kernels.blocks import BlockState, Body, init_blocks, scan_blocks
from pallas_kernels.products import dot, rows_dot_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveFields:
    """memory: cached tokens before the segment. compressed: slots behind those.

    segment: tokens that gradients flow between, counted from the start of the document.
    rate: tokens a slot. compression: mean or maximum of them, or a learned convolution.
    reconstruction: weight of the loss that trains the convolution.
    """

    memory: int = 128
    compressed: int = 64
    segment: int = 128
    rate: int = 4
    compression: Literal["conv", "mean", "max"] = "conv"
    reconstruction: float = 1.0

    def __post_init__(self):
        check_at_least(self, 1, "memory", "compressed", "segment", "rate")
        check_at_least(self, 0, "reconstruction")
        near = max(1, round(self.segment / self.rate)) * self.rate
        rule = f"must be a multiple of rate={self.rate}; try {near}"
        check(self, "segment", self.segment % self.rate == 0, rule)
        rule = f"must be at least segment={self.segment}, the tokens that leave it at once"
        check(self, "memory", self.memory >= self.segment, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressive(CompressiveFields, MixerConfig):
    """heads: each of head_size, None for d_model / heads. The others as in CompressiveFields."""

    kind: ClassVar[str] = "compressive"
    heads: int = 4
    head_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "heads", "head_size")

    def check_width(self, d_model: int) -> None:
        check_sinusoids(self, d_model)


class Carry(NamedTuple):
    """What a segment leaves: inputs of the layer, and inputs compressed; oldest first."""

    memory_BMD: jax.Array
    compressed_BMD: jax.Array


class CompressiveMixer(SequenceMixer):
    """y_t = W_o sum_j softmax_j(((q_t + u) . k_j + (q_t + v) . W_R r_{t-j}) / sqrt(K)) v_j

    over [compressed | memory | the segment up to t], whose places in this row are the positions.
    After a segment its inputs join the memory, the oldest inputs of the memory leave it, and
    f_c of every `rate` of them joins the compressed memory, whose oldest slots are dropped.
    Both are zeros at the start of a document, and zeros are attended to.

    The loss of every layer, with everything but f_c held fixed, over the tokens t:

        reconstruction * mean_t |A(x_t, old) - A(x_t, f_c(old))|,   A(x, m) = softmax(q kT) v

    old: the inputs that leave the memory at the end of the segment of t; A: no positions. It alone
    trains f_c: what is attended to in either memory has no gradient (depth 0).

    State: (memory + compressed + segment - 1) D floats.
    Errors: FieldError if the heads do not fit the width, or the width is odd.
    Source: arXiv:1911.05507, Sec. 3, Algorithms 1 and 2.
    Differs from paper: norms of differences are those of tokens, so that the loss of a text does
    not depend on how it is split. The convolution has no bias. f_c by dilated convolution and by
    use are left out.
    """

    def __init__(self, config: Compressive, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.d_model = config, d_model
        size = config.head_size or d_model // config.heads
        self.attention = RelativeAttention(d_model, config.heads, size, None, rngs=rngs)
        self.out = Linear(config.heads * size, d_model, rngs=rngs, axes=("embed", "heads"))
        several = config.rate * d_model
        self.compression = (
            Linear(several, d_model, rngs=rngs, axes=("hidden", "embed"), std=several**-0.5)
            if config.compression == "conv"
            else None
        )

    def init_state(self, batch: int) -> BlockState:
        token = jnp.zeros((batch, 1, self.d_model))
        return init_blocks(self._empty(), token, block=self.config.segment)

    def _empty(self) -> Carry:
        slots = (self.config.memory, self.config.compressed)
        return Carry(*(jnp.zeros((count, self.d_model), jnp.float32) for count in slots))

    def __call__(
        self,
        state: BlockState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BlockState, Float[Array, "B T D"]]:
        y_BTD, state = self._scan(_attending, state, x_BTD, reset_BT)
        return state, y_BTD

    def auxiliary_loss(self, state: BlockState, x_BTD: jax.Array, reset_BT: jax.Array) -> jax.Array:
        if self.compression is None:
            return jnp.zeros((), jnp.float32)
        state, x_BTD = jax.lax.stop_gradient((state, x_BTD))
        error_BT, _ = self._scan(_reconstructing, state, x_BTD, reset_BT)
        return self.config.reconstruction * jnp.mean(error_BT)

    def _scan(self, body, state: BlockState, x_BTD: jax.Array, reset_BT: jax.Array):
        definition, params = nnx.split(self)
        segment = self.config.segment
        return scan_blocks(
            body(definition), params, self._empty(), state, x_BTD, reset_BT, block=segment
        )

    def compress(self, x_BMD: jax.Array) -> jax.Array:
        """f_c: every `rate` inputs to one."""
        rate = self.config.rate
        groups = x_BMD.reshape(*x_BMD.shape[:-2], -1, rate, self.d_model)
        if self.config.compression == "mean":
            return jnp.mean(groups, -2)
        if self.config.compression == "max":
            return jnp.max(groups, -2)
        assert self.compression is not None
        return self.compression(groups.reshape(*groups.shape[:-2], -1))

    def step(self, carry: Carry, x_BCD: jax.Array) -> Carry:
        """What a whole segment leaves."""
        config, x_BCD = self.config, x_BCD.astype(jnp.float32)
        row_BMD = jnp.concatenate([carry.memory_BMD, x_BCD], 1)
        new_BMD = self.compress(row_BMD[:, : config.segment])
        slots_BMD = jnp.concatenate([carry.compressed_BMD, new_BMD], 1)
        after = Carry(row_BMD[:, config.segment :], slots_BMD[:, -config.compressed :])
        return jax.lax.stop_gradient(after)

    def attend(self, carry: Carry, x_NBCD: jax.Array) -> jax.Array:
        """Outputs of N segments."""
        parts = (carry.compressed_BMD, carry.memory_BMD, x_NBCD)
        row_NBJD = jnp.concatenate([part.astype(x_NBCD.dtype) for part in parts], -2)
        attention, tokens, keys = self.attention, x_NBCD.shape[-2], row_NBJD.shape[-2]
        pairs, own_pairs = attention.keys(row_NBJD)
        k, v = (jnp.moveaxis(a, -2, 0) for a in pairs)
        own_k, own_v = (jnp.moveaxis(a, -2, 0)[..., -tokens:, :] for a in own_pairs)
        q = jnp.moveaxis(attention.split_heads(attention.query(x_NBCD)), -2, 0)
        causal_CJ = keys - tokens + jnp.arange(tokens)[:, None] >= jnp.arange(keys)
        o = attention(q, k, v, own_k, own_v, causal_CJ[:, -tokens:], causal_CJ)
        return self.out(jnp.moveaxis(o, 0, -2).reshape(*x_NBCD.shape[:-1], -1))

    def error(self, carry: Carry, x_NBCD: jax.Array) -> jax.Array:
        """|A(x_t, old) - A(x_t, f_c(old))| of every token of N segments, with fixed attention."""
        attention = self.attention
        old_NBMD = carry.memory_BMD[..., : self.config.segment, :].astype(x_NBCD.dtype)
        q = jnp.swapaxes(attention.frozen_queries(x_NBCD), -2, -3) * attention.size**-0.5

        def read(m: jax.Array) -> jax.Array:
            k, v = (jnp.swapaxes(a, -2, -3) for a in attention.frozen_keys(m))
            o = dot(jax.nn.softmax(rows_dot_rows(q, k), -1).astype(v.dtype), v)
            return jnp.swapaxes(o, -2, -3).astype(jnp.float32)

        square = jnp.sum(jnp.square(read(old_NBMD) - read(self.compress(old_NBMD))), (-1, -2))
        some = square > 0  # the gradient of a root has no value at 0
        return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)

    def memory_report(self, segment: int = 1024, state: BlockState | None = None) -> MemoryReport:
        config, size = self.config, self.attention.size
        wide, slots = config.heads * size, config.memory + config.compressed
        seen = float(np.mean(np.arange(segment) % config.segment + 1)) + slots
        matrix = 2.0 * self.d_model * wide
        again = 2 * matrix * slots / config.segment - matrix  # keys and values; not distances
        flops = projection_flops(self) + again + 6.0 * seen * wide
        if state is None:
            return MemoryReport(state_bytes(self), flops, 0.0, {})
        used = [jnp.mean(jnp.any(part != 0, -1)) for part in state.carry]
        told = {"slot_use": used[0], "compressed_slot_use": used[1]}
        return MemoryReport(state_bytes(self), flops, 0.0, told)


@cache
def _attending(definition: nnx.GraphDef) -> Body:
    """The same object for the same mixer, because it is compared."""
    return Body(step=partial(_step, definition), finish=partial(_attend, definition))


@cache
def _reconstructing(definition: nnx.GraphDef) -> Body:
    return Body(step=partial(_step, definition), finish=partial(_error, definition))


def _step(definition, params, carry, x_BCD):
    return nnx.merge(definition, params).step(carry, x_BCD), ()


def _attend(definition, params, carry, x_NBCD, kept):
    return nnx.merge(definition, params).attend(carry, x_NBCD)


def _error(definition, params, carry, x_NBCD, kept):
    return nnx.merge(definition, params).error(carry, x_NBCD)
