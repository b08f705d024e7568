"""Transformer-XL: attention to the segment so far and to cached inputs of the layer before it."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config import check_at_least
from memjax.layers import Linear, document_ids
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    state_bytes,
)
from memjax.mixers.relative import RelativeAttention, check_sinusoids
from memjax.mixers.sliding import Blocks
from memjax.positions import positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLFields:
    """memory: cached tokens before the current segment.

    segment: tokens that gradients flow between, counted from the start of the document.
    clamp: the largest distance that positions tell apart; None for no limit.
    chunk: queries at a time. Speed only.
    """

    memory: int = 128
    segment: int = 128
    clamp: int | None = None
    chunk: int = 64

    def __post_init__(self):
        check_at_least(self, 0, "memory")
        check_at_least(self, 1, "segment", "clamp", "chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXL(TransformerXLFields, MixerConfig):
    """heads: each of head_size, None for d_model / heads. The others as in TransformerXLFields."""

    kind: ClassVar[str] = "transformer_xl"
    heads: int = 4
    head_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "heads", "head_size")

    def check_width(self, d_model: int) -> None:
        check_sinusoids(self, d_model)


class TransformerXLState(NamedTuple):
    """Inputs of the last memory + segment - 1 tokens, 0 where the document has not so many.

    position: of the next token in its document.
    """

    x_BMD: Float[Array, "B M D"]
    position_B: Int[Array, "B"]


class TransformerXLMixer(SequenceMixer):
    """y_t = W_o sum_j softmax_j(((q_t + u) . k_j + (q_t + v) . W_R r_{t-j}) / sqrt(K)) v_j

    over the tokens j <= t of the current segment, k_j = W_k x_j and v_j = W_v x_j, and over the
    `memory` tokens before the segment, of the same document, k_j = W_k sg(x_j), v_j = W_v sg(x_j).
    r: sinusoids [sin, cos] of the distance; u, v: vectors a head, learned, 0 at first. Segments are
    counted from the start of the document, so any split of a text gives the same outputs.

    Gradient: none to the inputs of earlier segments (depth 0), though W_k and W_v do learn from
    what they make of them. State: (memory + segment - 1) D floats, the layer's inputs.
    Errors: FieldError if the heads do not fit the width, or the width is odd.
    Source: arXiv:1901.02860, Sec. 3.2 and 3.3.
    Differs from paper: the cache begins empty and holds the layer's inputs behind its norm, since
    blocks normalise first. u and v are each layer's own, as with `untie_r` of the released code.
    """

    def __init__(self, config: TransformerXL, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.d_model = config, d_model
        size = config.head_size or d_model // config.heads
        self.attention = RelativeAttention(d_model, config.heads, size, config.clamp, rngs=rngs)
        self.out = Linear(config.heads * size, d_model, rngs=rngs, axes=("embed", "heads"))
        self.before = config.memory + config.segment - 1

    def init_state(self, batch: int) -> TransformerXLState:
        x_BMD = jnp.zeros((batch, self.before, self.d_model), jnp.float32)
        return TransformerXLState(x_BMD, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        state: TransformerXLState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[TransformerXLState, Float[Array, "B T D"]]:
        batch, tokens = reset_BT.shape
        x_BJD = jnp.concatenate([state.x_BMD.astype(x_BTD.dtype), x_BTD], 1)
        position_BT = positions(state.position_B, reset_BT)
        id_BT = document_ids(reset_BT)
        held_BM = jnp.arange(self.before)[::-1] < state.position_B[:, None]
        id_BJ = jnp.concatenate([jnp.where(held_BM, 0, -1), id_BT], 1)

        blocks = Blocks(tokens, self.before, self.config.chunk)
        own_CJ, seen_CJ = self._seen(blocks, position_BT, id_BT, id_BJ)
        near = own_CJ.shape[-1]

        def heads(x_BNCHK: jax.Array) -> jax.Array:
            return jnp.moveaxis(x_BNCHK, 3, 0)

        attention = self.attention
        q_HBNCK = heads(blocks.queries(attention.split_heads(attention.query(x_BTD))))
        pairs, own_pairs = attention.keys(x_BJD)
        k, v = (heads(blocks.keys(a)) for a in pairs)
        own_k, own_v = (heads(blocks.keys(a)[:, :, -near:]) for a in own_pairs)
        o_HBNCK = attention(q_HBNCK, k, v, own_k, own_v, own_CJ, seen_CJ)
        o_BTHK = blocks.join(jnp.moveaxis(o_HBNCK, 0, 3))
        y_BTD = self.out(o_BTHK.reshape(batch, tokens, -1))

        keep_BM = id_BJ[:, tokens:] == id_BJ[:, -1:]
        x_BMD = jnp.where(keep_BM[..., None], x_BJD[:, tokens:], 0).astype(jnp.float32)
        return TransformerXLState(x_BMD, position_BT[:, -1] + 1), y_BTD

    def _seen(self, blocks: Blocks, position_BT, id_BT, id_BJ) -> tuple[jax.Array, jax.Array]:
        """Which keys are of the query's own segment, the last of a block's; and which are seen."""
        gap_CJ = blocks.gap()
        place_BNC1 = blocks.queries(position_BT % self.config.segment)[..., None]
        same_BNCJ = blocks.queries(id_BT)[..., None] == blocks.keys(id_BJ, -1)[:, :, None]
        past_BNCJ = same_BNCJ & (gap_CJ >= 0)
        # A padded query sees itself alone, so that nothing divides by zero.
        seen_BNCJ = (past_BNCJ & (gap_CJ <= place_BNC1 + self.config.memory)) | (gap_CJ == 0)
        near = min(gap_CJ.shape[1], blocks.size + self.config.segment - 1)
        own_BNCJ = (past_BNCJ & (gap_CJ <= place_BNC1))[..., -near:]
        return own_BNCJ, seen_BNCJ

    def memory_report(
        self, segment: int = 1024, state: TransformerXLState | None = None
    ) -> MemoryReport:
        blocks = Blocks(segment, self.before, self.config.chunk)
        queries = blocks.count * blocks.size / segment
        pairs = queries * (blocks.reach + blocks.size)  # masked ones are multiplied as well
        wide = self.config.heads * self.attention.size
        # Queries and outputs are made of the tokens, keys and values of the cache as well, the
        # distances of neither.
        maps = 2.0 * self.d_model * wide * (2 + 2 * (self.before + segment) / segment)
        flops = maps + 6.0 * pairs * wide
        if state is None:
            return MemoryReport(state_bytes(self), flops, 0.0, {})
        held_B = jnp.minimum(state.position_B, self.before)
        return MemoryReport(
            state_bytes(self), flops, 0.0, {"slot_use": held_B.mean() / max(1, self.before)}
        )
