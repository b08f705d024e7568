"""The layers of a model: blocks in a repeated pattern and a tail, scanned; states threaded.

The pattern is repeated `repeat` times with its parameters stacked on a leading axis R, then the
`tail` once, with R = 1; states are stacked likewise, so lanes are on axis 1 of every leaf of the
state. The repeats run as one `lax.scan` (compile time flat in depth) or unrolled (faster on a
CPU); the parameters, and so the checkpoints, are the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.architecture import Model
from memjax.gathering import gather_again, gathered
from memjax.layers import MLP, PRODUCT, RMSNorm
from memjax.memory import layer_class, make_layer_part
from memjax.memory.base import LayerMemory, SegmentMemory
from memjax.mixers import MIXERS
from memjax.mixers.base import MixerConfig, SequenceMixer, State
from memjax.ops import read_in_turns
from memjax.sharding import constrain


def make_mixer(config: MixerConfig, d_model: int, *, rngs: nnx.Rngs) -> SequenceMixer:
    """The mixer of a config."""
    mixer = MIXERS[config.kind][1]
    return mixer(config, d_model, rngs=rngs)  # type: ignore[call-arg]


def read_mixer(mixer: SequenceMixer, state: State, x_BTD: jax.Array, reset_BT: jax.Array):
    """The mixer on a segment, on whatever mesh the program runs on."""
    if mixer.splits_tokens:
        return mixer(state, x_BTD, reset_BT)
    return read_in_turns(mixer, state, x_BTD, reset_BT)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; nothing without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class BlockState(NamedTuple):
    """The states of a block's mixer and of its memory module, an empty tuple if it has none."""

    mixer: State
    memory: State


class Block(nnx.Module):
    """x + mixer(norm(x)), then + memory(norm(x)) if it has one, then + mlp(norm(x)).

    A memory module that replaces the MLP stands in its place, behind its norm. The part of a memory
    of segments is added to x first, and written from the result.
    """

    def __init__(self, config: Model, name: str, place: int, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.d_model)
        self.mixer = make_mixer(config.mixer(name), config.d_model, rngs=rngs)
        memory = config.memory if isinstance(config.memory, LayerMemory) else None
        memory = memory if memory is not None and memory.has(place) else None
        beside = memory is not None and not memory.replaces_mlp
        mlp = config.mlp if memory is None or beside else None
        make = None if memory is None else layer_class(memory)
        segments = config.memory if isinstance(config.memory, SegmentMemory) else None
        self.part = make_layer_part(segments, config.d_model, rngs=rngs) if segments else None
        self.memory_norm = RMSNorm(config.d_model) if beside else None
        self.memory = make(memory, config.d_model, rngs=rngs) if make else None
        self.mlp_norm = RMSNorm(config.d_model) if config.mlp else None
        self.mlp = MLP(mlp, config.d_model, rngs=rngs) if mlp else None
        self.dropout = config.dropout

    def init_state(self, batch: int) -> BlockState:
        memory = self.memory or self.part
        memory_state = () if memory is None else memory.init_state(batch)
        return BlockState(self.mixer.init_state(batch), memory_state)

    def __call__(
        self,
        state: BlockState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BlockState, Float[Array, "B T D"]]:
        return self.read(state, x_BTD, reset_BT)[:2]

    def read(self, state, x_BTD, reset_BT, dropout_key: jax.Array | None = None, shared=None):
        """State, x_BTD and the auxiliary loss."""
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        x_BTD = constrain(x_BTD, "lanes", "tokens")
        if self.part is not None:
            x_BTD = x_BTD + self.part.read(state.memory, x_BTD)
        in_BTD = self.mixer_norm(x_BTD)
        auxiliary = self.mixer.auxiliary_loss(state.mixer, in_BTD, reset_BT)
        mixer_state, y_BTD = read_mixer(self.mixer, state.mixer, in_BTD, reset_BT)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[0])
        memory_state = state.memory
        if self.memory is not None and self.memory_norm is not None:
            in_BTD = self.memory_norm(x_BTD)
            memory_state, y_BTD = self.memory(memory_state, in_BTD, reset_BT, shared)
            x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[1])
        if self.mlp_norm is not None:
            in_BTD = self.mlp_norm(x_BTD)
            if self.mlp is not None:
                y_BTD = self.mlp(in_BTD)
            elif self.memory is not None:
                memory_state, y_BTD = self.memory(memory_state, in_BTD, reset_BT, shared)
            x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[2])
        if self.part is not None:
            memory_state = self.part.write(state.memory, x_BTD)
        x_BTD = constrain(x_BTD, "lanes", "tokens")
        after = BlockState(mixer_state, memory_state)
        if telemetry.heard() and not telemetry.hears_tokens():
            self._note_states(after)
        return after, x_BTD, auxiliary

    def _note_states(self, state: BlockState) -> None:
        """What the reports tell of states, but for their norms, which are measured outside."""
        told = self.mixer.memory_report(state=state.mixer).telemetry
        if self.memory is not None:
            told = told | self.memory.memory_report(state=state.memory).telemetry
        for name, value in told.items():
            if "norm" not in name:
                telemetry.note(name, value)


class Pattern(nnx.Module):
    """Blocks in order: one repeat of the pattern, or the tail."""

    def __init__(self, config: Model, layers: tuple[str, ...], *, rngs: nnx.Rngs):
        blocks = [Block(config, name, place, rngs=rngs) for place, name in enumerate(layers)]
        names = [f"{i}_{name}" for i, name in enumerate(layers)]
        self.blocks = nnx.Dict(dict(zip(names, blocks)))

    def init_state(self, batch: int) -> State:
        return tuple(block.init_state(batch) for block in self.blocks.values())

    def read(self, state, x_BTD, reset_BT, dropout_key: jax.Array | None = None, shared=None):
        """States, x_BTD and the sum of the auxiliary losses."""
        count = len(self.blocks)
        keys = [None] * count if dropout_key is None else jax.random.split(dropout_key, count)
        out, total = [], jnp.zeros((), jnp.float32)
        for (name, block), block_state, key in zip(self.blocks.items(), state, keys):
            with telemetry.within(name):
                read = block.read(block_state, x_BTD, reset_BT, key, shared)
            block_state, x_BTD, auxiliary = read
            out.append(block_state)
            total += auxiliary
        return tuple(out), x_BTD, total


LAYER_INPUT = "layer_input"

_REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class StackState(NamedTuple):
    """The states of the pattern's blocks, stacked over repeats, and those of the tail, R = 1."""

    patterns: tuple[State, ...]
    tail: tuple[State, ...]


def layer_memories(state: StackState) -> Any:
    """The states of the layers' memory modules alone."""
    return jax.tree.map(lambda block: block.memory, state, is_leaf=_is_block)


def with_layer_memories(state: StackState, memories: Any) -> StackState:
    """`state` with the states of the layers' memory modules that `layer_memories` returned."""
    return jax.tree.map(
        lambda block, memory: block._replace(memory=memory), state, memories, is_leaf=_is_block
    )


def _is_block(node: Any) -> bool:
    return isinstance(node, BlockState)


class Stack(nnx.Module):
    """All layers."""

    def __init__(self, config: Model, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), config.repeat)
        stacked = jax.vmap(lambda key: Pattern(config, config.pattern, rngs=nnx.Rngs(key)))
        self.patterns = stacked(keys)
        last = jax.vmap(lambda key: Pattern(config, config.tail, rngs=nnx.Rngs(key)))
        self.tail = last(rngs.params()[None]) if config.tail else None
        memory = config.memory if isinstance(config.memory, LayerMemory) else None
        shared = None if memory is None else layer_class(memory).shared
        self.shared = shared(memory, config, rngs=rngs) if shared else None
        self.repeat, self.layers, self.remat = config.repeat, config.layers, config.remat
        mixers = [(n, MIXERS[config.mixer(n).kind][1]) for n in config.layers_in_order]
        plain = SequenceMixer.couple, SequenceMixer.auxiliary_loss
        self.coupled = tuple(dict.fromkeys(n for n, m in mixers if m.couple is not plain[0]))
        self.auxiliaries = sum(m.auxiliary_loss is not plain[1] for _, m in mixers)

    def init_state(self, batch: int) -> StackState:
        """The state before the first token of a document; lanes on axis 1 of every leaf."""
        start = jax.vmap(lambda pattern: pattern.init_state(batch))
        patterns, tail = self._coupled()
        return StackState(start(patterns), () if tail is None else start(tail))

    def read(
        self,
        state: StackState | None,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ) -> tuple[StackState, Float[Array, "B T D"], Float[Array, ""]]:
        """The state, the residual stream after the last layer, the mean auxiliary loss.

        state: None is `init_state`, made in each layer when it runs and not held for all of them.
        """
        rows = x_BTD.shape[0]
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.repeat + 1)
        listen: Any = telemetry.listening if telemetry.heard() else telemetry.deaf

        def body(x_BTD: jax.Array, xs: Any):
            pattern, pattern_state, key = xs
            pattern = gathered(pattern)
            if state is None:
                pattern_state = in_turn(pattern.init_state(rows), pattern_state)
            x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
            with listen() as notes:
                pattern_state, x_BTD, auxiliary = pattern.read(
                    pattern_state, x_BTD, reset_BT, key, self.shared
                )
            return x_BTD, (pattern_state, auxiliary, notes)

        policy = gather_again() if self.remat == "none" else _REMAT[self.remat]
        if policy is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        patterns, tail = self._coupled()
        start: Any = jnp.zeros(self.repeat) if state is None else state.patterns
        xs = (patterns, start, None if keys is None else keys[:-1])
        unroll = self.repeat if self.layers == "unroll" else 1
        x_BTD, (after, auxiliary_R, notes) = jax.lax.scan(body, x_BTD, xs, unroll=unroll)
        telemetry.pass_on("patterns", notes)
        total, after_tail = jnp.sum(auxiliary_R), ()
        if tail is not None:
            start = jnp.zeros(1) if state is None else state.tail
            xs = (tail, start, None if keys is None else keys[-1:])
            x_BTD, (after_tail, auxiliary_R, notes) = jax.lax.scan(body, x_BTD, xs)
            telemetry.pass_on("tail", notes)
            total += jnp.sum(auxiliary_R)
        return StackState(after, after_tail), x_BTD, total / max(1, self.auxiliaries)

    def _coupled(self) -> tuple[Pattern, Pattern | None]:
        """The layers, with what couples the parameters of a mixer over depth worked in."""
        if not self.coupled:
            return self.patterns, self.tail
        stacks = [self.patterns] if self.tail is None else [self.patterns, self.tail]
        stacks = [nnx.merge(*nnx.split(stack)) for stack in stacks]  # copies: self stays as it is
        for name in self.coupled:
            couple_layers(name, stacks)
        return stacks[0], stacks[1] if self.tail is not None else None


def in_turn(value: Any, zero: jax.Array) -> Any:
    """value, as made in this turn of a loop: JAX would move what is the same in all turns, and all
    that follows from it (masks, for one), in front of the loop and hold it.

    zero: of this turn. Added to all, it is nothing to the compiler, which knows its value.
    """

    def add(x: jax.Array) -> jax.Array:
        return x ^ (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype)

    return jax.tree.map(add, value)


def couple_layers(name: str, stacks: list[Pattern]) -> None:
    """Replace the mixers called `name` in `stacks` by their coupled selves."""
    blocks = [
        [block for key, block in stack.blocks.items() if key.partition("_")[2] == name]
        for stack in stacks
    ]
    parts = [[nnx.split(block.mixer) for block in stack] for stack in blocks]
    params = [[nnx.to_pure_dict(state) for _, state in stack] for stack in parts]

    def in_order(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:])

    ordered = [jax.tree.map(in_order, *stack) for stack in params if stack]
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *ordered)
    mixer = type(next(block for stack in blocks for block in stack).mixer)
    whole, at = mixer.couple(whole), 0
    for stack, stack_parts in zip(blocks, parts):
        for i, (block, (definition, state)) in enumerate(zip(stack, stack_parts)):
            repeats = jax.tree.leaves(state)[0].shape[0]
            rows = slice(at + i, at + repeats * len(stack), len(stack))
            own = jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole)
            block.mixer = nnx.merge(definition, nnx.State(own))
        at += sum(jax.tree.leaves(state)[0].shape[0] for _, state in stack_parts)
