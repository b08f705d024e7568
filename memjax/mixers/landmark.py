"""Landmark attention: blocks of tokens, each read through the token that ends it."""

import dataclasses
from functools import cache, partial
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
from pallas_kernels.blocks import BlockState, Body, init_blocks, scan_blocks
from pallas_kernels.products import dot, rows_dot_rows


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
            _body(self.config, telemetry.heard()),
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
        size, token = self.config.block + 1, np.arange(segment)
        own = token % size + 1
        held = np.minimum(self.config.blocks, token // size)
        read = held if self.config.retrieve is None else np.minimum(held, self.config.retrieve)
        wide = self.config.heads * self.size
        scored, summed = float(np.mean(own + size * held)), float(np.mean(own + size * read))
        flops = projection_flops(self) + 2.0 * (scored + summed) * wide
        told = {} if state is None else {"slot_use": state.carry.held_B.mean() / self.config.blocks}
        return MemoryReport(state_bytes(self), flops, 0.0, told)


@cache
def _body(config: Landmark, tells: bool) -> Body:
    """The same object for the same arguments, because it is compared."""
    return Body(step=partial(_step, config), finish=partial(_finish, config, tells))


def _step(config: Landmark, consts, cache: Cache, inputs):
    (k_BCHK, v_BCHK), _ = inputs

    def push(held: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([held[:, new.shape[1] :], new.astype(held.dtype)], 1)

    held_B = jnp.minimum(cache.held_B + 1, config.blocks)
    return Cache(push(cache.k_BMHK, k_BCHK), push(cache.v_BMHK, v_BCHK), held_B), ()


def _finish(config: Landmark, tells: bool, consts, cache: Cache, inputs, kept):
    """Outputs of blocks; if it `tells`, also slot_use and hit_distance of each of their tokens."""
    (k, v), q = inputs
    size, blocks = config.block + 1, config.blocks
    back_M = np.repeat(np.arange(blocks, 0, -1), size)  # blocks from the current one
    furthest = blocks if config.retrieve is None else min(blocks, config.retrieve + 1)
    start_M = (furthest - np.minimum(back_M, furthest)) * size
    place_M = start_M + np.tile(np.arange(size), blocks)
    place_J = np.concatenate([place_M, furthest * size + np.arange(size)])
    k_J = jnp.concatenate([cache.k_BMHK.astype(k.dtype), k], -3)
    v_J = jnp.concatenate([cache.v_BMHK.astype(v.dtype), v], -3)
    attend = jax.checkpoint(partial(_attend, config, place_J))
    o, weights = attend(
        _placed(config.position, q, place_J[-size:]),
        _placed(config.position, k_J, place_J),
        jnp.swapaxes(v_J, -3, -2),
        cache.held_B,
    )
    o = jnp.swapaxes(o, -3, -2)
    if not tells:
        return o, {}
    use = jnp.broadcast_to(cache.held_B[..., None] / blocks, o.shape[:-2])
    return o, {"slot_use": use, "hit_distance": _distance(size, blocks, weights)}


def _distance(size: int, blocks: int, weights: jax.Array) -> jax.Array:
    """Tokens, landmarks among them, back to what is read of other blocks, by its weight.

    weights: `[..., H, C, J]`. The result, `[..., C, H]`, is nan where there are none.
    """
    back_CM = np.arange(blocks * size, blocks * size + size)[:, None] - np.arange(blocks * size)
    past = weights[..., : blocks * size]
    total = jnp.sum(past, -1)
    mean = jnp.sum(past * back_CM, -1) / jnp.where(total > 0, total, 1)
    return jnp.swapaxes(jnp.where(total > 0, mean, jnp.nan), -1, -2)


def _placed(position: Position, x: jax.Array, place_J: np.ndarray) -> jax.Array:
    """[N, B, J, H, K] with positions, heads before tokens."""
    x_BJHK = x.reshape(-1, *x.shape[2:])
    x_BJHK = apply_position(position, x_BJHK, jnp.asarray(place_J)[None])
    return jnp.swapaxes(x_BJHK, 1, 2).reshape(*x.shape[:2], x.shape[3], x.shape[2], x.shape[4])


def _attend(config: Landmark, place_J: np.ndarray, q, k, v, held):
    """Queries of one block, `[..., H, C, K]`, over the blocks held and their own: sums, weights."""
    size, blocks = config.block + 1, config.blocks
    scores = rows_dot_rows(q, k) * q.shape[-1] ** -0.5
    slopes_H = config.position.slopes(config.heads)
    if slopes_H is not None:
        gap_CJ = place_J[-size:, None] - place_J
        scores -= jnp.asarray(slopes_H, jnp.float32)[:, None, None] * gap_CJ
    lead = scores.shape[:-1]
    past = scores[..., : blocks * size].reshape(*lead, blocks, size)
    # Own tokens up to the query, and never the own landmark, not even for itself.
    own_CC = np.tril(np.ones((size, size), bool)) & (np.arange(size) < config.block)
    own = jnp.where(own_CC, scores[..., blocks * size :], -jnp.inf)
    exists = jnp.arange(blocks) >= blocks - held[..., None, None, None]
    landmarks = jnp.where(exists, past[..., -1], -jnp.inf)
    if config.retrieve is not None:
        least = top_k(landmarks, config.retrieve)[0][..., -1:]
        landmarks = jnp.where(landmarks >= jax.lax.stop_gradient(least), landmarks, -jnp.inf)
    main = jax.nn.softmax(jnp.concatenate([landmarks, own], -1), -1)
    within = jax.nn.softmax(past[..., :-1], -1) * main[..., :blocks, None]
    within = jnp.pad(within, [(0, 0)] * (within.ndim - 1) + [(0, 1)]).reshape(*lead, -1)
    weights = jnp.concatenate([within, main[..., blocks:]], -1)
    return dot(weights.astype(v.dtype), v).astype(v.dtype), weights
