"""Landmark attention: blocks of tokens, each read through the token that ends it."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, top_k
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.positions import Position, PositionField, Rotary, apply_position, check_head_size
from pallas_kernels.blocks import BlockState, init_blocks, scan_blocks
from pallas_kernels.blocks.layout import Layout, read, where_leading
from pallas_kernels.products import dot, rows_dot_rows

ROUND_TOKENS = 128  # that are read together


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkFields:
    """block: tokens of text to a landmark. blocks: held before the current one.

    retrieve: blocks that a head reads for a token, those with the highest landmarks; None for all.
    """

    block: int = 50
    blocks: int = 10
    retrieve: int | None = None

    def __post_init__(self):
        check_at_least(self, 1, "block", "blocks", "retrieve")
        few = self.retrieve is None or self.retrieve <= self.blocks
        check(self, "retrieve", few, f"must be at most blocks={self.blocks}, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landmark(LandmarkFields, MixerConfig):
    """heads: each of head_size, None for d_model / heads. The others as in LandmarkFields."""

    kind: ClassVar[str] = "landmark"
    heads: int = 4
    head_size: int | None = None
    position: PositionField = Rotary()

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "heads", "head_size")

    def check_width(self, d_model: int) -> None:
        check_head_size(self, d_model)


class Cache(NamedTuple):
    """Keys, without positions, and values of the last blocks; how many blocks of the document.

    held is float32, in 0 .. blocks, as all of a carry must be.
    """

    k_BMHK: jax.Array
    v_BMHK: jax.Array
    held_B: jax.Array


class LandmarkMixer(SequenceMixer):
    """y_t = W_o sum_j w_j v_j, scores s_j = q_t . k_j / sqrt(K)

    Every (block + 1)-th token of a document is a landmark; `memjax.memory.landmark` puts them into
    a text. With L_b the landmark of block b:

    main = softmax of s over the block's own tokens up to t, without its landmark, and over the
        landmarks L_b of the blocks held
    w_j  = main_j for the own tokens
    w_j  = main_{L_b} softmax_b(s)_j for the tokens j of block b, without its landmark

    So a landmark's value is never read. With `retrieve`, each head of each token keeps the highest
    landmarks in `main` and no others, and positions stay within what was trained: a block further
    back than `retrieve` stands where the one before those would, retrieve + 1 blocks back.

    State: blocks (block + 1) + block keys and values, so twice as many H K floats: bounded, where
    the paper keeps the whole text. All blocks held are scored, and those not retrieved are weighed
    with 0. The gradient reaches all that a training step reads.
    Errors: FieldError if the heads do not fit the width.
    Source: arXiv:2305.16300, Sec. 3.
    """

    def __init__(self, config: Landmark, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.size = config, config.head_size or d_model // config.heads
        wide = config.heads * self.size
        self.query, self.key, self.value = (
            Linear(d_model, wide, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.out = Linear(wide, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> BlockState:
        token = jnp.zeros((batch, 1, self.config.heads, self.size), jnp.float32)
        return init_blocks(self._empty(), (token, token), block=self.config.block + 1)

    def _empty(self) -> Cache:
        count = self.config.blocks * (self.config.block + 1)
        nothing = jnp.zeros((count, self.config.heads, self.size), jnp.float32)
        return Cache(nothing, nothing, jnp.zeros((), jnp.float32))

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
        (o_BTHK, told), state = scan_blocks(
            _Reading(self.config, telemetry.heard()),
            (),
            self._empty(),
            state,
            (k_BTHK, v_BTHK),
            reset_BT,
            block=self.config.block + 1,
            queries=q_BTHK,
        )
        for name, value in told.items():
            telemetry.note(name, value)
        return state, self.out(o_BTHK.reshape(*x_BTD.shape[:2], -1))

    def memory_report(self, segment: int = 1024, state: BlockState | None = None) -> MemoryReport:
        config, size = self.config, self.config.block + 1
        # What is multiplied: whole blocks, those in the row that a query does not see as well.
        blocks = -(-segment // size)
        together = min(_Reading(config, False).size(size), blocks)
        padded = -(-blocks // together) * together * size / segment
        past, own = size * (config.blocks + together - 1), size
        scored = past * (1 + (config.retrieve is not None and config.retrieve + 1 < config.blocks))
        pairs = padded * (scored + past + 2 * own)
        flops = projection_flops(self) + 2.0 * pairs * config.heads * self.size
        told = {} if state is None else {"slot_use": state.carry.held_B.mean() / self.config.blocks}
        return MemoryReport(state_bytes(self), flops, 0.0, told)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A `Round` of `scan_blocks`: its blocks read the cache and each other in one product.

    Blocks of a document follow each other without a gap, so that block n sees of the row
    [cache, the round's blocks] those before it, as many as its document has, up to `blocks`.
    """

    config: Landmark
    tells: bool

    def size(self, block: int) -> int:
        # Of blocks + N - 1 key blocks in the row, `blocks` are seen by each.
        return max(1, min(ROUND_TOKENS // block, 1 + self.config.blocks // 3))

    def run(self, layout: Layout, consts, initial: Cache, carry: Cache, blocks):
        """The cache after the blocks, and their outputs, `[N, B, C, ...]`."""
        (k_NBCHK, v_NBCHK), q_NBCHK = blocks
        count, batch, size = q_NBCHK.shape[:3]
        held_NB, held_B = self._held(layout, carry.held_B)

        def row(held_BMHK: jax.Array, new_NBCHK: jax.Array) -> jax.Array:
            new_BMHK = jnp.swapaxes(new_NBCHK, 0, 1).reshape(batch, -1, *new_NBCHK.shape[3:])
            return jnp.concatenate([held_BMHK.astype(new_BMHK.dtype), new_BMHK], 1)

        k_BJHK, v_BJHK = row(carry.k_BMHK, k_NBCHK), row(carry.v_BMHK, v_NBCHK)
        q_BQHK = jnp.swapaxes(q_NBCHK, 0, 1).reshape(batch, count * size, *q_NBCHK.shape[3:])
        o_BHQK, past = _attend(self.config, held_NB.T, q_BQHK, k_BJHK, v_BJHK)
        o_NBCHK = _by_blocks(jnp.swapaxes(o_BHQK, 1, 2), count)
        told = {}
        if self.tells:
            use_NB1 = held_NB[..., None] / self.config.blocks
            use_NBC = jnp.broadcast_to(use_NB1, (count, batch, size))
            distance_BQH = jnp.swapaxes(_distance(past, count), 1, 2)
            told = {"slot_use": use_NBC, "hit_distance": _by_blocks(distance_BQH, count)}

        # What stands before the next block, without what is not of its document.
        valid_NB = jnp.any(layout.valid_NBC, -1)
        follows_NB = jnp.concatenate([valid_NB[1:], jnp.zeros_like(valid_NB[:1])])
        passed_B = jnp.sum(valid_NB & (layout.full_NB | follows_NB), 0)
        length = self.config.blocks * size
        keep_BM = jnp.arange(length) // size >= self.config.blocks - held_B[:, None]

        def cache(row_BJHK: jax.Array, old: jax.Array) -> jax.Array:
            last_BMHK = read(row_BJHK, passed_B * size, length)
            return where_leading(keep_BM, last_BMHK, 0).astype(old.dtype)

        held_B = held_B.astype(carry.held_B.dtype)
        after = Cache(cache(k_BJHK, carry.k_BMHK), cache(v_BJHK, carry.v_BMHK), held_B)
        return after, (o_NBCHK, told)

    def _held(self, layout: Layout, held_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many blocks each block of the round can see, and the next one."""
        held_N = []
        for fresh_B, full_B in zip(layout.fresh_NB, layout.full_NB):
            held_N.append(jnp.where(fresh_B, 0, held_B))
            held_B = jnp.minimum(held_N[-1] + full_B, self.config.blocks)
        return jnp.stack(held_N), held_B


def _by_blocks(x_BQ: jax.Array, count: int) -> jax.Array:
    """[B, N C, ...] to [N, B, C, ...]."""
    return jnp.swapaxes(x_BQ.reshape(x_BQ.shape[0], count, -1, *x_BQ.shape[2:]), 0, 1)


def _distance(past_BHQMC: jax.Array, count: int) -> jax.Array:
    """Tokens, landmarks among them, back to what is read of other blocks, by its weight.

    The result, `[B, H, Q]`, is nan where there are none.
    """
    *_, queries, blocks, size = past_BHQMC.shape
    at_Q = (blocks + 1 - count) * size + np.arange(queries)
    back_QMC = at_Q[:, None, None] - np.arange(blocks * size).reshape(blocks, size)
    total_BHQ = jnp.sum(past_BHQMC, (-1, -2))
    mean_BHQ = jnp.sum(past_BHQMC * back_QMC, (-1, -2)) / jnp.where(total_BHQ > 0, total_BHQ, 1)
    return jnp.where(total_BHQ > 0, mean_BHQ, jnp.nan)


def _placed(position: Position, x_BTHK: jax.Array, place_T: np.ndarray) -> jax.Array:
    """[B, H, T, K], with positions."""
    x_BTHK = apply_position(position, x_BTHK, jnp.asarray(place_T)[None])
    return jnp.swapaxes(x_BTHK, 1, 2)


def _attend(config: Landmark, held_BN, q_BQHK, k_BJHK, v_BJHK):
    """Queries of the last N blocks of a row over what each may see of it.

    Sums `[B, H, Q, K]`, and the weights of the tokens of the other blocks, `[B, H, Q, M, C]`.
    """
    count, size = held_BN.shape[1], config.block + 1
    queries, before, blocks = count * size, config.blocks * size, config.blocks + count - 1
    past_J = slice(blocks * size)
    place_Q, step_C = np.arange(queries) % size, np.arange(size)
    back_QM = config.blocks + np.arange(queries)[:, None] // size - np.arange(blocks)
    k_BHJK = _placed(config.position, k_BJHK, np.arange(before + queries))
    q_BQHK = q_BQHK * q_BQHK.shape[-1] ** -0.5
    q_BHQK = _placed(config.position, q_BQHK, before + np.arange(queries))
    v_BHJK = jnp.swapaxes(v_BJHK, 1, 2)

    def by_block(x_BHQ: jax.Array) -> jax.Array:
        return x_BHQ.reshape(*x_BHQ.shape[:2], count, size, -1)

    # Own tokens up to the query, and never the own landmark, not even for itself.
    gap_CC = step_C[:, None] - step_C
    own_BHNCC = rows_dot_rows(by_block(q_BHQK), by_block(k_BHJK[:, :, before:]))
    own_BHNCC = _logits(config, own_BHNCC, gap_CC)
    own_BHNCC = jnp.where((gap_CC >= 0) & (step_C < config.block), own_BHNCC, -jnp.inf)

    scores = rows_dot_rows(q_BHQK, k_BHJK[:, :, past_J])
    furthest = config.blocks if config.retrieve is None else config.retrieve + 1
    if furthest < config.blocks:
        k_far = _placed(config.position, k_BJHK[:, past_J], np.tile(step_C, blocks))
        q_far = _placed(config.position, q_BQHK, furthest * size + place_Q)
        is_far_QJ = np.repeat(back_QM >= furthest, size, 1)
        scores = jnp.where(is_far_QJ, rows_dot_rows(q_far, k_far), scores)
    gap_QMC = (np.minimum(back_QM, furthest) * size + place_Q[:, None])[..., None] - step_C
    past = _logits(config, scores.reshape(*scores.shape[:3], blocks, size), gap_QMC)

    exists_BQM = (back_QM > 0) & (back_QM <= jnp.repeat(held_BN, size, 1)[..., None])
    landmarks = jnp.where(exists_BQM[:, None], past[..., -1], -jnp.inf)
    if config.retrieve is not None:
        least = top_k(landmarks, config.retrieve)[0][..., -1:]
        landmarks = jnp.where(landmarks >= jax.lax.stop_gradient(least), landmarks, -jnp.inf)
    own_BHQC = own_BHNCC.reshape(*landmarks.shape[:-1], size)
    main = jax.nn.softmax(jnp.concatenate([landmarks, own_BHQC], -1), -1)
    within = jax.nn.softmax(past[..., :-1], -1) * main[..., :blocks, None]
    within = jnp.pad(within, [(0, 0)] * (within.ndim - 1) + [(0, 1)])
    o_BHQK = dot(within.reshape(scores.shape).astype(v_BHJK.dtype), v_BHJK[:, :, past_J])
    own_BHNCC = by_block(main[..., blocks:].astype(v_BHJK.dtype))
    o_BHQK += dot(own_BHNCC, by_block(v_BHJK[:, :, before:])).reshape(o_BHQK.shape)
    return o_BHQK.astype(v_BHJK.dtype), within


def _logits(config: Landmark, scores_BH: jax.Array, gap: np.ndarray) -> jax.Array:
    """Products as softmax takes them; gap: tokens between query and key, for ALiBi."""
    slopes_H = config.position.slopes(config.heads)
    if slopes_H is None:
        return scores_BH
    slopes = jnp.asarray(slopes_H, jnp.float32).reshape(-1, *(1,) * (scores_BH.ndim - 2))
    return scores_BH - slopes * gap
