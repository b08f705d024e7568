"""Titans MAC: attention over a segment and over what a deep memory recalls for it."""

import dataclasses
from functools import cache, partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check, check_at_least
from memjax.layers import Linear, RMSNorm, normal
from memjax.mixers.base import (
    MemoryReport,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.deep_memory import (
    DeepMemoryBranch,
    norms,
)
from memjax.mixers.persistent import Prefix, attend
from memjax.mixers.titans import TitansConfig
from memjax.positions import apply_position
from pallas_kernels.blocks import BlockState, Body, init_blocks, scan_blocks
from pallas_kernels.neural_memory import Memory, start


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAC(TitansConfig):
    """As `TitansConfig`; segment: tokens that attend to each other, counted from the start of the
    document; a multiple of memory.update_every. Changes the mathematics.
    """

    kind: ClassVar[str] = "titans_mac"
    segment: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "segment")
        every = self.memory.update_every
        near = max(1, round(self.segment / every)) * every
        rule = f"must be a multiple of memory.update_every={every}; try {near}"
        check(self, "segment", self.segment % every == 0, rule)


class Carry(NamedTuple):
    """What a segment leaves to the next: the memory, and the tails of the short convolutions.

    recall: of the queries that ask the memory before attention. The others: of the keys and values
    of what attention gives.
    """

    memory: Memory
    recall_tail_BMF: jax.Array
    key_tail_BMF: jax.Array
    value_tail_BMF: jax.Array


class Streams(NamedTuple):
    """Projections of a segment's tokens; plain: queries without their positions."""

    plain_BHCK: jax.Array
    q_BHCK: jax.Array
    k_BHCK: jax.Array
    v_BHCK: jax.Array
    recall_BCF: jax.Array


class TitansMACMixer(SequenceMixer):
    """For each segment S of x, with the memory M as the segment before left it:

    h_t = RMSNorm(M(q_t)),  q_t = silu(conv(W_q S))_t of unit norm
    a_t = RMSNorm(attention of S_t over [persistent | h_1 .. h_t | S_1 .. S_t])
    M_t = M updated on a_1 .. a_t, as in `DeepMemoryBranch`
    y_t = W_o (a_t * silu(RMSNorm(M_t(W_q a_t))))

    State: M and its momentum, and the tails of the convolutions, at the start of the segment, and
    the segment's inputs so far, which the next call reads again.
    Source: arXiv:2501.00663, Eqs. 21-25.
    Differs from paper: as printed, token t attends to h_j for j > t, which asks with later tokens,
    and is gated by M after the whole segment: both leak the future. Here t sees h up to its own and
    M_t. The queries of a have no convolution: attention has mixed them. h_t and S_t stand at the
    same position. The heads of attention go on without a projection of their own, and are
    normalised once, for the memory and for the gate, whose non-linearity is SiLU and sits on the
    memory.
    """

    def __init__(self, config: TitansMAC, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.heads, self.size = config.memory.heads, d_model // config.memory.heads
        self.query, self.key, self.value = (
            Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.persistent = nnx.Param(
            normal(rngs, (config.persistent, d_model), 1.0), axes=("rank", "embed")
        )
        self.memory = DeepMemoryBranch(config.memory, d_model, rngs=rngs)
        self.recall_norm = RMSNorm(d_model, axes=("heads",))
        self.attention_norm = RMSNorm(d_model, axes=("heads",))
        self.memory_norm = RMSNorm(d_model, axes=("heads",))
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> BlockState:
        x_BTD = jnp.zeros((batch, 1, self.heads * self.size))
        return init_blocks(self._start(), x_BTD, block=self.config.segment)

    def _start(self) -> Carry:
        """The carry at the start of a document, without lanes."""
        tails = [tail[0] for tail in self.memory.init_tails(1)]
        return Carry(start(self.config.memory.rule, self.memory.initial), *tails)

    def __call__(
        self,
        state: BlockState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BlockState, Float[Array, "B T D"]]:
        definition, params = nnx.split(self)
        y_BTD, state = scan_blocks(
            _body(definition),
            params,
            self._start(),
            state,
            x_BTD,
            reset_BT,
            block=self.config.segment,
        )
        return state, y_BTD

    def prepare(self, x_NBCD: jax.Array) -> Streams:
        """Projections of the tokens of N segments."""
        x_BCD = x_NBCD.reshape(-1, *x_NBCD.shape[2:])
        q_BCHK, k_BCHK, v_BCHK = (self._split(p(x_BCD)) for p in (self.query, self.key, self.value))
        by_place = (q_BCHK, self._place(q_BCHK), self._place(k_BCHK), v_BCHK)
        plain_BHCK, q_BHCK, k_BHCK, v_BHCK = (jnp.swapaxes(a, 1, 2) for a in by_place)
        streams = Streams(plain_BHCK, q_BHCK, k_BHCK, v_BHCK, self.memory.query(x_BCD))
        return jax.tree.map(lambda a: a.reshape(*x_NBCD.shape[:2], *a.shape[1:]), streams)

    def step(self, carry: Carry, streams: Streams) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        """One segment: what it leaves, what attention gave, and what the memory answers to that."""
        recall_tail, q_BCHK = self.memory.queries(carry.recall_tail_BMF, streams.recall_BCF, None)
        h_BCD = self._merge(self.memory.recall(carry.memory, q_BCHK))
        h_BCD = self.recall_norm(h_BCD).astype(q_BCHK.dtype)
        a_BCD = self.attention_norm(self._attend(streams, h_BCD))
        memory, tails, o_BCHV = self.memory.read_whole_blocks(
            carry.memory, tuple(carry[2:]), a_BCD, impl=self.config.impl
        )
        return Carry(memory, recall_tail, *tails), (a_BCD, self._merge(o_BCHV))

    def finish(self, kept: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs of N segments."""
        a_NBCD, o_NBCD = kept
        return self.out(a_NBCD * jax.nn.silu(self.memory_norm(o_NBCD)))

    def _attend(self, streams: Streams, h_BCD: jax.Array) -> jax.Array:
        k_BHCK, v_BHCK = (
            jnp.swapaxes(a, 1, 2)
            for a in (self._place(self._split(self.key(h_BCD))), self._split(self.value(h_BCD)))
        )
        k_BHJK = jnp.concatenate([k_BHCK, streams.k_BHCK], 2)
        v_BHJK = jnp.concatenate([v_BHCK, streams.v_BHCK], 2)
        place_C = jnp.arange(h_BCD.shape[1])
        gap_CJ = place_C[:, None] - jnp.tile(place_C, 2)
        tokens_PD = self.persistent[...].astype(h_BCD.dtype)
        prefix = [jnp.swapaxes(self._split(p(tokens_PD)), 0, 1) for p in (self.key, self.value)]
        slopes_H = self.config.position.slopes(self.heads)
        penalty = None if slopes_H is None else slopes_H[:, None, None] * gap_CJ
        a_BHCK = attend(
            streams.q_BHCK,
            streams.plain_BHCK,
            k_BHJK,
            v_BHJK,
            Prefix(*prefix),
            gap_CJ >= 0,
            penalty,
        )
        return self._merge(jnp.swapaxes(a_BHCK, 1, 2))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.size)

    def _merge(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], -1)

    def _place(self, x_BCHK: jax.Array) -> jax.Array:
        """Queries or keys, by their places in the segment."""
        place_BC = jnp.broadcast_to(jnp.arange(x_BCHK.shape[1]), x_BCHK.shape[:2])
        return apply_position(self.config.position, x_BCHK, place_BC)

    def memory_report(self, segment: int = 1024, state: BlockState | None = None) -> MemoryReport:
        recurrence = self.memory.recurrence_flops()
        width = self.heads * self.size
        again = 2.0 * 3 * width * width  # keys and values of h, queries of a
        seen = self.config.persistent + min(self.config.segment, segment) + 1
        flops = projection_flops(self) + again + 4.0 * seen * width + recurrence
        told = {} if state is None else norms(state.carry.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)


@cache
def _body(definition: nnx.GraphDef) -> Body:
    """The body of `scan_blocks`: the same object for the same mixer, because it is compared."""
    return Body(
        step=partial(_step, definition),
        prepare=partial(_prepare, definition),
        finish=partial(_finish, definition),
    )


def _prepare(definition, params, x_NBCD, valid_NBC):
    return nnx.merge(definition, params).prepare(x_NBCD)


def _step(definition, params, carry, streams):
    return nnx.merge(definition, params).step(carry, streams)


def _finish(definition, params, carry, streams, kept):
    return nnx.merge(definition, params).finish(kept)
