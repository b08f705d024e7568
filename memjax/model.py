"""The language model: embedding, layers, norm, logits; states threaded.

    state, logits_BTY = lm(state, tokens_BT, reset_BT)

has the signature of a mixer, so the same laws hold for whole models. Lanes are on axis 1 of every
leaf of its state (`LANE_AXIS`); `memjax.stack` holds the layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.architecture import Model
from memjax.cross_entropy import Score, count_pieces, cross_entropy
from memjax.gathering import copies, gather, look_up
from memjax.layers import RMSNorm, dot_transposed, normal
from memjax.memory import make_segment_module
from memjax.memory.base import SegmentMemory
from memjax.segments import SegmentState, init_segments, read_segments
from memjax.sharding import constrain
from memjax.stack import Stack, StackState, dropout

__all__ = ["LANE_AXIS", "LanguageModel", "Model", "Reading", "logical_axes", "merge", "split"]

LANE_AXIS = 1


class Reading(NamedTuple):
    """hidden_BTD: normalised, of the last layer. auxiliary: mean over the layers that have one."""

    state: StackState | SegmentState
    hidden_BTD: jax.Array
    auxiliary: jax.Array


class LanguageModel(nnx.Module):
    """Logits of the next token, and the state of every layer."""

    def __init__(self, config: Model, vocab_size: int, *, rngs: nnx.Rngs):
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        width, memory = config.d_model, config.memory
        self.embedding = nnx.Param(normal(rngs, (vocab_size, width)), axes=("vocab", "embed"))
        self.stack = Stack(config, rngs=rngs)
        memory = memory if isinstance(memory, SegmentMemory) else None
        self.memory = make_segment_module(memory, width, rngs=rngs) if memory else None
        self.segment = memory.segment if memory else 0
        self.norm = RMSNorm(width)
        output = None if config.tied else normal(rngs, (vocab_size, width))
        self.output = None if output is None else nnx.Param(output, axes=("vocab", "embed"))
        self.dropout, self.dtype, self.logit_cap = config.dropout, config.dtype, config.logit_cap

    def init_state(self, batch: int) -> StackState | SegmentState:
        """The state before the first token of a document; lanes on axis 1 of every leaf."""
        if self.memory is not None:
            return init_segments(self.stack, self.memory, self.segment, batch)
        return self.stack.init_state(batch)

    def __call__(
        self,
        state: StackState | SegmentState,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[StackState | SegmentState, Float[Array, "B T Y"]]:
        """Float32 logits of the token after each of `tokens_BT`; dropout only if given a key."""
        reading = self.read(state, tokens_BT, reset_BT, dropout_key=dropout_key)
        return reading.state, self.logits(reading.hidden_BTD)

    def read(
        self,
        state: StackState | SegmentState | None,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Reading:
        """The segment read up to the logits, which `logits` makes.

        state: None is `init_state`; a stack then holds the first states of one layer at a time.
        """
        if state is None and self.memory is not None:
            state = self.init_state(tokens_BT.shape[0])
        if isinstance(state, SegmentState):
            assert self.memory is not None
            parts = (self.stack, self.norm, self.memory)
            return Reading(
                *read_segments(parts, self.segment, state, tokens_BT, reset_BT, self._embed)
            )
        x_BTD, rest = self._embed(tokens_BT), None
        if dropout_key is not None and self.dropout > 0:
            first, rest = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, self.dropout, first)
        state, x_BTD, auxiliary = self.stack.read(state, x_BTD, reset_BT, rest)
        return Reading(state, self.norm(x_BTD), auxiliary)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Y"]:
        """Float32 logits."""
        param = self.embedding if self.output is None else self.output
        return _logits(self.logit_cap, hidden_BTD, gather(param))

    def score(
        self,
        hidden_BTD: Float[Array, "B T D"],
        targets_BT: Int[Array, "B T"],
        weight_BT: Float[Array, "B T"],
        *,
        z_loss: float = 0.0,
        devices: int = 1,
    ) -> Score:
        """Weighted sums of nll and log(Z)^2, never with all logits of a large vocabulary.

        devices: those over which the logits are split.
        """
        param = self.embedding if self.output is None else self.output
        rows, length = targets_BT.shape
        pieces = count_pieces(rows, length, param.shape[0], devices)
        table = copies(param)
        if table is None or rows % table.shape[0] or length % (pieces * table.shape[1]):
            table = gather(param)
        return cross_entropy(
            functools.partial(_logits, self.logit_cap),
            hidden_BTD,
            table,
            targets_BT,
            weight_BT,
            z_loss=z_loss,
            pieces=pieces,
        )

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = look_up(self.embedding, tokens_BT).astype(self.dtype)
        return constrain(x_BTD, "lanes", "tokens")


def _logits(cap: float | None, hidden_BTD: jax.Array, table: jax.Array) -> jax.Array:
    """table: [Y, D], or the `copies` of it."""
    product = functools.partial(dot_transposed, dtype=jnp.dtype(jnp.float32))
    if table.ndim == 2:
        logits_BTY = product(hidden_BTD, table)
    else:
        hidden_LSBTD = _by_copy(hidden_BTD, table)
        logits_LSBTY = jax.vmap(jax.vmap(product))(hidden_LSBTD, table)
        logits_LSBTY = constrain(logits_LSBTY, "lanes", "tokens", None, None, "vocab")
        logits_BTY = jnp.swapaxes(logits_LSBTY, 1, 2).reshape(*hidden_BTD.shape[:2], -1)
    logits_BTY = constrain(logits_BTY, "lanes", "tokens", "vocab")
    return logits_BTY if cap is None else cap * jnp.tanh(logits_BTY / cap)


def _by_copy(x_BTD: jax.Array, table_LSYD: jax.Array) -> jax.Array:
    """The lanes and tokens of each device, [L, S, B / L, T / S, D]."""
    (rows, tokens, width), (lanes, shards) = x_BTD.shape, table_LSYD.shape[:2]
    x_LBSTD = x_BTD.reshape(lanes, rows // lanes, shards, tokens // shards, width)
    return constrain(jnp.swapaxes(x_LBSTD, 1, 2), "lanes", "tokens")


def split(lm: LanguageModel) -> tuple[nnx.GraphDef, dict]:
    """The definition of a model, and its parameters as nested dicts of arrays."""
    definition, params = nnx.split(lm)
    return definition, nnx.to_pure_dict(params)


def merge(definition: nnx.GraphDef, params: dict) -> LanguageModel:
    """The model with these parameters."""
    return nnx.merge(definition, nnx.State(params))


def logical_axes(config: Model, vocab_size: int) -> dict:
    """The logical axes of every parameter, in the layout of `split`; layers are stacked first."""
    lm = nnx.eval_shape(lambda: LanguageModel(config, vocab_size, rngs=nnx.Rngs(0)))
    _, params = nnx.split(lm)
    flat = []
    for path, param in nnx.to_flat_state(params):
        axes = tuple(param.get_metadata()["axes"])
        flat.append((path, ("layers", *axes) if path[1:2] in (("patterns",), ("tail",)) else axes))
    return nnx.traversals.unflatten_mapping(dict(flat))
