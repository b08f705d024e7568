"""Models whose memory is a few tokens that go from segment to segment.

A segment is `segment` tokens, counted from the start of the document. The layers read it among the
tokens of the memory; what they make of the memory's tokens is the memory of the next segment. They
begin each segment from their own initial state, or, for a memory that asks for it, go on. The
tokens of an unfinished segment are part of the state and are read again by the next call, so any
split equals the whole, at the price that generation reads up to a segment for every token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import telemetry
from memjax.layers import RMSNorm
from memjax.memory.base import SegmentModule
from memjax.sharding import active
from memjax.stack import Stack, StackState, layer_memories, with_layer_memories
from pallas_kernels.blocks import BlockState, Body, join, leave, scan_blocks
from pallas_kernels.blocks.body import MOST_BLOCKS

LANE_AXIS = 1  # of states of layers, as in `memjax.model`


class Memories(NamedTuple):
    """tokens: of the module of the model. layers: what the layers keep (`_kept`), or nothing."""

    tokens: Any
    layers: Any


class SegmentState(NamedTuple):
    """The memories before the current segment, the segment's tokens so far and their count.

    Lanes are on axis 1 of every leaf, as in all states of models; axis 0 has size 1.
    """

    memory: Memories
    tokens_1BJ: jax.Array
    count_1B: jax.Array


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads a segment with the layers, the norm and the memory module of `definition`.

    listens: whether what the layers note of each token is a third output, by name `[B, C, R]`.
    """

    definition: nnx.GraphDef
    listens: bool

    def step(self, params: Any, memory: Memories, x_BCD: jax.Array):
        stack, norm, module = nnx.merge(self.definition, params)
        wide_BLD = module.wrap(memory.tokens, x_BCD)
        no_reset_BL = jnp.zeros(wide_BLD.shape[:2], bool)
        start = _with_kept(stack.init_state(wide_BLD.shape[0]), module, memory.layers)
        listen: Any = telemetry.listening if self.listens else telemetry.deaf
        with listen() as notes, telemetry.by_token(*wide_BLD.shape[:2]):
            after, h_BLD, auxiliary = stack.read(start, wide_BLD, no_reset_BL)
        told_BCR = {
            name: module.unwrap(memory.tokens, jnp.moveaxis(value_RBL, 0, -1))[1]
            for name, value_RBL in (notes or {}).items()
        }
        tokens, h_BCD = module.unwrap(memory.tokens, norm(h_BLD))
        memory = Memories(tokens, _kept(after, module))
        return memory, (h_BCD, jnp.broadcast_to(auxiliary, x_BCD.shape[:2]), told_BCR)


def _kept(state: StackState, module: SegmentModule) -> Any:
    """What the layers keep from segment to segment: all of their states, or the module's parts.

    With lanes first, and floating, as all of a carry must be: counts of tokens are exact in
    float32 up to 2^24.
    """

    def as_carry(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x, 0, LANE_AXIS)
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)

    return jax.tree.map(as_carry, state if module.carries_layers else layer_memories(state))


def _with_kept(start: StackState, module: SegmentModule, kept: Any) -> StackState:
    """The state with which the layers begin a segment."""

    def from_carry(x: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, LANE_AXIS).astype(like.dtype)

    if module.carries_layers:
        return jax.tree.map(from_carry, kept, start)
    return with_layer_memories(start, jax.tree.map(from_carry, kept, layer_memories(start)))


def _initial(stack: Stack, module: SegmentModule) -> Memories:
    """At the start of a document, without lanes."""
    layers = jax.tree.map(lambda x: x[0], _kept(stack.init_state(1), module))
    return Memories(module.initial(), layers)


def init_segments(stack: Stack, module: SegmentModule, segment: int, batch: int) -> SegmentState:
    """The state at the start of a document."""

    def lanes(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (1, batch, *x.shape))

    tokens_1BJ = jnp.zeros((1, batch, segment - 1), jnp.int32)
    memory = jax.tree.map(lanes, _initial(stack, module))
    return SegmentState(memory, tokens_1BJ, jnp.zeros((1, batch), jnp.int32))


def read_segments(
    parts: tuple[Stack, RMSNorm, SegmentModule],
    segment: int,
    state: SegmentState,
    tokens_BT: jax.Array,
    reset_BT: jax.Array,
    embed: Any,
) -> tuple[SegmentState, jax.Array, jax.Array]:
    """The state after the tokens, their normalised outputs [B, T, D], the auxiliary loss.

    embed: from ids to what the layers read.
    """
    memory, held_BJ, count_B = jax.tree.map(lambda x: x[0], tuple(state))
    definition, params = nnx.split(parts)
    held = BlockState(memory, held_BJ, count_B)
    # On a mesh one by one: JAX fails to vmap the transpose of the layers' `jax.shard_map`.
    most = MOST_BLOCKS if active() is None else 1
    (h_BTD, auxiliary_BT, told_BTR), after = scan_blocks(
        Body(_Reader(definition, telemetry.heard()).step, most=most),
        params,
        _initial(parts[0], parts[2]),
        held._replace(tokens=embed(held_BJ)),
        embed(tokens_BT),
        reset_BT,
        block=segment,
    )
    (joined_BJ, _), _, _ = join(held, tokens_BT, None, reset_BT, block=segment)
    after = leave(held, after.carry, joined_BJ, reset_BT, block=segment)
    state = SegmentState(*jax.tree.map(lambda x: x[None], tuple(after)))
    telemetry.pass_on_tokens(told_BTR)
    return state, h_BTD, jnp.mean(auxiliary_BT)
