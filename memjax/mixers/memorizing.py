"""Memorizing Transformer: attention in segments, and the nearest of many remembered keys."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, document_ids, l2_normalise, top_k
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.relative import scores_of, sums_of
from memjax.mixers.sliding import Blocks
from memjax.positions import (
    Position,
    PositionField,
    Rotary,
    apply_position,
    check_head_size,
    positions,
)
from pallas_kernels.products import rows_dot_rows

NOTHING = -1e30  # the score of an empty slot: its weight is 0 beside any other


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorizingFields:
    """memory: remembered tokens, those before the current segment. neighbours: of them read.

    segment: tokens between two writes, counted from the start of the document. cache: tokens before
    the segment that local attention sees as well. chunk: queries at a time. Speed only.
    """

    memory: int = 1024
    neighbours: int = 32
    segment: int = 128
    cache: int = 128
    chunk: int = 128

    def __post_init__(self):
        check_at_least(self, 1, "memory", "neighbours", "segment", "chunk")
        check_at_least(self, 0, "cache")
        rule = f"must be at most memory={self.memory}"
        check(self, "neighbours", self.neighbours <= self.memory, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorizing(MemorizingFields, MixerConfig):
    """heads: each of head_size, None for d_model / heads. The others as in MemorizingFields."""

    kind: ClassVar[str] = "memorizing"
    heads: int = 4
    head_size: int | None = None
    position: PositionField = Rotary()

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "heads", "head_size")

    def check_width(self, d_model: int) -> None:
        check_head_size(self, d_model)


class MemorizingState(NamedTuple):
    """Keys, of unit norm and without positions, and values of the last tokens.

    M = max(memory, cache) + segment - 1 of them, 0 where the document has not so many.
    position: of the next token in its document.
    """

    k_BMHK: Float[Array, "B M H K"]
    v_BMHK: Float[Array, "B M H K"]
    position_B: Int[Array, "B"]


class Hits(NamedTuple):
    """What the queries found, nan for those that found nothing.

    distance: tokens back to what is recalled, mean by its weights. score: of the nearest key.
    """

    distance_BTH: jax.Array
    score_BTH: jax.Array


class MemorizingMixer(SequenceMixer):
    """y_t = W_o (g recalled_t + (1 - g) local_t),   g = sigmoid(b), one a head, b 0 at first

    q and k have unit norm; scores are s q . k, s > 0 learned a head, sqrt(K) at first.
    local: softmax attention, with positions, to the segment so far and to `cache` tokens before it.
    recalled: softmax attention, without positions, to those `neighbours` of the `memory` tokens
    before the segment that score highest, exactly; 0 while there are none.

    Gradient: none to keys and values from before the segment; q, s and g learn from what is read.
    State: (max(memory, cache) + segment - 1) 2 H K floats, of this document alone.
    Cost: 2 memory H K operations a token for the search, then gathers of `neighbours` keys and
    values; no loop over tokens.
    Errors: FieldError if the heads do not fit the width.
    Source: arXiv:2203.08913, Sec. 3.1 and 3.2; scores arXiv:2010.04245.
    Differs from paper: the search is exact, where the paper's is approximate; positions are those
    of the config, where the paper has the buckets of T5; the scale begins at sqrt(K), not at 1.
    """

    def __init__(self, config: Memorizing, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.size = config, config.head_size or d_model // config.heads
        wide = config.heads * self.size
        self.query, self.key, self.value = (
            Linear(d_model, wide, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.out = Linear(wide, d_model, rngs=rngs, axes=("embed", "heads"))
        self.scale = nnx.Param(jnp.ones((config.heads,), jnp.float32), axes=("heads",))
        self.gate = nnx.Param(jnp.zeros((config.heads,), jnp.float32), axes=("heads",))
        self.before = max(config.memory, config.cache) + config.segment - 1

    def init_state(self, batch: int) -> MemorizingState:
        cache = jnp.zeros((batch, self.before, self.config.heads, self.size), jnp.float32)
        return MemorizingState(cache, cache, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        state: MemorizingState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[MemorizingState, Float[Array, "B T D"]]:
        tokens = reset_BT.shape[1]
        position_BT = positions(state.position_B, reset_BT)
        id_BT = document_ids(reset_BT)
        held_BM = jnp.arange(self.before)[::-1] < state.position_B[:, None]
        id_BJ = jnp.concatenate([jnp.where(held_BM, 0, -1), id_BT], 1)
        q_BTHK, k_BTHK, v_BTHK = (
            p(x_BTD).reshape(*x_BTD.shape[:2], -1, self.size)
            for p in (self.query, self.key, self.value)
        )
        q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        k_BJHK = jnp.concatenate([state.k_BMHK.astype(x_BTD.dtype), k_BTHK], 1)
        v_BJHK = jnp.concatenate([state.v_BMHK.astype(x_BTD.dtype), v_BTHK], 1)
        asked_BTHK = q_BTHK * (self.size**0.5 * jnp.abs(self.scale[...])[:, None]).astype(
            q_BTHK.dtype
        )

        place_BT = position_BT % self.config.segment
        local_BTHK = self._local(asked_BTHK, k_BJHK, v_BJHK, place_BT, id_BT, id_BJ)
        recalled_BTHK, hits = self._recalled(asked_BTHK, k_BJHK, v_BJHK, place_BT, id_BT, id_BJ)
        if hits is not None:
            telemetry.note("hit_distance", hits.distance_BTH)
            scale_H = self.size**0.5 * jnp.abs(self.scale[...])
            telemetry.note("hit_similarity", hits.score_BTH / scale_H)
        open_H1 = jax.nn.sigmoid(self.gate[...])[:, None]
        o_BTHK = open_H1 * recalled_BTHK + (1 - open_H1) * local_BTHK.astype(jnp.float32)
        y_BTD = self.out(o_BTHK.astype(x_BTD.dtype).reshape(*x_BTD.shape[:2], -1))

        keep_BM = (id_BJ[:, tokens:] == id_BJ[:, -1:])[..., None, None]
        k_BMHK, v_BMHK = (
            jnp.where(keep_BM, a[:, tokens:], 0).astype(jnp.float32) for a in (k_BJHK, v_BJHK)
        )
        return MemorizingState(k_BMHK, v_BMHK, position_BT[:, -1] + 1), y_BTD

    def _local(self, q_BTHK, k_BJHK, v_BJHK, place_BT, id_BT, id_BJ) -> jax.Array:
        """Attention to the segment and the cache, in blocks of queries."""
        config, tokens = self.config, id_BT.shape[1]
        before = config.cache + config.segment - 1
        k_BJHK, v_BJHK, id_BJ = (a[:, self.before - before :] for a in (k_BJHK, v_BJHK, id_BJ))
        blocks = Blocks(tokens, before, config.chunk)
        gap_CJ = blocks.gap()
        near = min(gap_CJ.shape[1], blocks.size + config.segment - 1)
        place_BNC1 = blocks.queries(place_BT)[..., None]
        same_BNCJ = blocks.queries(id_BT)[..., None] == blocks.keys(id_BJ, -1)[:, :, None]
        past_BNCJ = same_BNCJ & (gap_CJ >= 0)
        # A padded query sees itself alone, so that nothing divides by zero.
        seen_BNCJ = (past_BNCJ & (gap_CJ <= place_BNC1 + config.cache)) | (gap_CJ == 0)
        own_BNCJ = (past_BNCJ & (gap_CJ <= place_BNC1))[..., -near:]

        def heads(x_BNCHK: jax.Array) -> jax.Array:
            return jnp.swapaxes(x_BNCHK, 2, 3)

        # Places in this row: of other documents they would be off, but those are not seen.
        step_1J = jnp.arange(before + tokens)[None]
        k_BJHK = apply_position(config.position, k_BJHK, step_1J)
        q_BTHK = apply_position(config.position, q_BTHK, step_1J[:, before:])
        pairs = [heads(blocks.keys(a)) for a in (k_BJHK, v_BJHK)]
        o_BNHCK = jax.checkpoint(partial(_attend, config.position, near))(
            heads(blocks.queries(q_BTHK)),
            [jax.lax.stop_gradient(a) for a in pairs],
            [a[..., -near:, :] for a in pairs],
            own_BNCJ[:, :, None],
            seen_BNCJ[:, :, None],
            gap_CJ,
        )
        return blocks.join(heads(o_BNHCK))

    def _recalled(
        self, q_BTHK, k_BJHK, v_BJHK, place_BT, id_BT, id_BJ
    ) -> tuple[jax.Array, Hits | None]:
        """Attention to the nearest of the memory, in chunks of queries; if heard, of its hits."""
        config, tokens = self.config, id_BT.shape[1]
        chunk = min(config.chunk, tokens)
        count = -(-tokens // chunk)
        reach = config.memory + config.segment - 1
        first, behind = self.before - reach, count * chunk - tokens
        k_BHJK, v_BHJK = (jnp.swapaxes(jax.lax.stop_gradient(a), 1, 2) for a in (k_BJHK, v_BJHK))
        searched_BHJK = jnp.pad(k_BHJK, ((0, 0), (0, 0), (0, behind), (0, 0)))
        id_BJ = jnp.pad(id_BJ, ((0, 0), (0, behind)), constant_values=-1)
        gap_CJ = reach + jnp.arange(chunk)[:, None] - jnp.arange(reach + chunk)

        def chunks(x_BT: jax.Array) -> jax.Array:
            x_BT = jnp.pad(x_BT, ((0, 0), (0, behind)) + ((0, 0),) * (x_BT.ndim - 2))
            x_BNC = x_BT.reshape(x_BT.shape[0], count, chunk, *x_BT.shape[2:])
            return jnp.moveaxis(x_BNC, 1, 0)

        def one(xs):
            n, q_BCHK, place_BC, id_BC = xs
            at = first + n * chunk
            near_BHJK = jax.lax.dynamic_slice_in_dim(searched_BHJK, at, reach + chunk, 2)
            near_BJ = jax.lax.dynamic_slice_in_dim(id_BJ, at, reach + chunk, 1)
            held_BCJ = (gap_CJ > place_BC[..., None]) & (
                gap_CJ <= place_BC[..., None] + config.memory
            )
            held_BCJ &= id_BC[..., None] == near_BJ[:, None]
            q_BHCK = jnp.swapaxes(q_BCHK, 1, 2)
            scores = jnp.where(
                held_BCJ[:, None], rows_dot_rows(jax.lax.stop_gradient(q_BHCK), near_BHJK), NOTHING
            )
            best_BHCM, index_BHCM = top_k(scores, config.neighbours)
            index_BHCM = jnp.minimum(index_BHCM + at, k_BHJK.shape[2] - 1)
            found = best_BHCM > NOTHING
            o_BHCK = jax.checkpoint(_read)(q_BHCK, k_BHJK, v_BHJK, index_BHCM, found)
            row_C1 = at + reach + jnp.arange(chunk)[:, None]
            hits = _hits(best_BHCM, row_C1 - index_BHCM) if telemetry.heard() else None
            return jax.tree.map(lambda a: jnp.swapaxes(a, 1, 2), (o_BHCK, hits))

        def join(x_NBCH: jax.Array) -> jax.Array:
            x_BNCH = jnp.moveaxis(x_NBCH, 0, 1)
            return x_BNCH.reshape(x_BNCH.shape[0], -1, *x_BNCH.shape[3:])[:, :tokens]

        found = jax.lax.map(one, (jnp.arange(count), *map(chunks, (q_BTHK, place_BT, id_BT))))
        return jax.tree.map(join, found)

    def memory_report(
        self, segment: int = 1024, state: MemorizingState | None = None
    ) -> MemoryReport:
        config, token = self.config, np.arange(segment)
        place = token % config.segment
        seen = float(np.mean(place + 1 + np.minimum(config.cache, token - place)))
        searched = float(np.mean(np.minimum(config.memory, token - place)))
        read = float(np.mean(np.minimum(config.neighbours, token - place)))
        wide = config.heads * self.size
        flops = projection_flops(self) + (4.0 * (seen + read) + 2.0 * searched) * wide
        if state is None:
            return MemoryReport(state_bytes(self), flops, 0.0, {})
        held_B = jnp.minimum(state.position_B, self.before)
        told = {
            "slot_use": held_B.mean() / self.before,
            "gate": jax.nn.sigmoid(self.gate[...]).mean(),
        }
        return MemoryReport(state_bytes(self), flops, 0.0, told)


def _attend(position: Position, near: int, q, pairs, own_pairs, own_CJ, seen_CJ, gap_CJ):
    (k, v), (own_k, own_v) = pairs, own_pairs
    scores_HCJ = scores_of(q, k, own_k, own_CJ)
    slopes_H = position.slopes(q.shape[-3])
    if slopes_H is not None:
        scores_HCJ -= jnp.asarray(slopes_H, jnp.float32)[:, None, None] * gap_CJ
    weight_HCJ = jax.nn.softmax(jnp.where(seen_CJ, scores_HCJ, -jnp.inf), -1).astype(v.dtype)
    return sums_of(weight_HCJ, v, own_v, own_CJ)


def _hits(score_BHCM: jax.Array, distance_BHCM: jax.Array) -> Hits:
    """Of each query's nearest keys, the best first; heads before tokens."""
    weight_BHCM = jax.nn.softmax(score_BHCM, -1)
    distance_BHC = jnp.sum(weight_BHCM * distance_BHCM, -1)
    best_BHC = score_BHCM[..., 0]
    found_BHC = best_BHC > NOTHING
    return Hits(*(jnp.where(found_BHC, a, jnp.nan) for a in (distance_BHC, best_BHC)))


def _read(q_BHCK, k_BHJK, v_BHJK, index_BHCM, found_BHCM) -> jax.Array:
    """Softmax attention of each query to the keys at its own indices, float32."""

    def gather(x_JK: jax.Array, index_CM: jax.Array) -> jax.Array:
        return x_JK.at[index_CM].get(mode="promise_in_bounds")

    k_BHCMK, v_BHCMK = (jax.vmap(jax.vmap(gather))(a, index_BHCM) for a in (k_BHJK, v_BHJK))
    wide = dict(preferred_element_type=jnp.float32)
    scores_BHCM = jnp.einsum("bhck,bhcmk->bhcm", q_BHCK, k_BHCMK, **wide)
    weight_BHCM = jax.nn.softmax(jnp.where(found_BHCM, scores_BHCM, NOTHING), -1) * found_BHCM
    return jnp.einsum("bhcm,bhcmk->bhck", weight_BHCM.astype(v_BHCMK.dtype), v_BHCMK, **wide)
