"""The language model: embedding, a repeated pattern of blocks, norm, logits; states threaded.

    state, logits_BTY = lm(state, tokens_BT, reset_BT)

has the signature of a mixer, so the same laws hold for whole models. The pattern is repeated
`repeat` times with its parameters stacked on a leading axis R, then the `tail` once, with R = 1;
states are stacked likewise, so lanes are on axis 1 of every leaf of the model's state
(`LANE_AXIS`). The repeats run as one `lax.scan` (compile time flat in depth) or unrolled (faster
on a CPU); the parameters, and so the checkpoints, are the same.
"""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config import ConfigError, FieldError, OneOf, check, check_at_least
from memjax.layers import MLP, MLPS, GatedMLP, RMSNorm, SwiGLU, dot_transposed, normal
from memjax.memory import MEMORIES
from memjax.memory.base import MemoryConfig
from memjax.mixers import MIXERS
from memjax.mixers.base import MixerConfig, SequenceMixer, State
from memjax.positions import PositionField

LANE_AXIS = 1

MixerField = Annotated[MixerConfig, OneOf(lambda: {k: c for k, (c, _) in MIXERS.items()})]
MemoryField = Annotated[MemoryConfig, OneOf(lambda: {k: c for k, (c, _) in MEMORIES.items()})]
MLPField = Annotated[GatedMLP, OneOf(lambda: MLPS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture: layers = len(pattern) * repeat + len(tail).

    pattern: names of mixers; each is a key of `mixers` or a kind of the registry (its defaults).
    tail: names of the mixers of the layers behind the last repeat.
    position: replaces the position of every mixer that has one.
    mlp: None for blocks that are a mixer alone.
    tied: whether the output matrix is the embedding.
    logit_cap: c in c tanh(logits / c); None for logits as they are.
    dtype: type of activations and products; parameters, norms and states are float32.
    layers: scan the repeats, or unroll them. Speed only.
    remat: what the backward pass recomputes: nothing, all but products ("dots"), or all ("full").
    """

    d_model: int = 256
    pattern: tuple[str, ...] = ("gated_deltanet",)
    repeat: int = 4
    tail: tuple[str, ...] = ()
    mixers: dict[str, MixerField] = dataclasses.field(default_factory=dict)
    memory: MemoryField | None = None
    position: PositionField | None = None
    mlp: MLPField | None = SwiGLU()
    tied: bool = True
    logit_cap: float | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        check_at_least(self, 1, "d_model", "repeat")
        check(self, "dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        check(self, "pattern", len(self.pattern) > 0, "must name at least one mixer")
        cap = self.logit_cap
        check(self, "logit_cap", cap is None or cap > 0, "must be greater than 0, or none")
        known = [*self.mixers, *(k for k in MIXERS if k not in self.mixers)]
        for field in ("pattern", "tail"):
            for i, name in enumerate(getattr(self, field)):
                if name not in known:
                    rule = f"names no mixer; choose from {', '.join(known)}"
                    raise FieldError(f"{field}[{i}]", name, rule)
        used = (*self.pattern, *self.tail)
        for name in self.mixers:
            if name not in used:
                raise ConfigError(f"mixers.{name} is not in pattern={used}; remove it")
        for name in dict.fromkeys(used):
            try:
                self.mixer(name).check_width(self.d_model)
            except FieldError as error:
                raise error.under(f"mixers.{name}") from None

    @property
    def layers_in_order(self) -> tuple[str, ...]:
        """The name of the mixer of every layer."""
        return self.pattern * self.repeat + self.tail

    def mixer(self, name: str) -> MixerConfig:
        """The config of a mixer of the pattern, with the model's position worked in."""
        config = self.mixers[name] if name in self.mixers else MIXERS[name][0]()
        has_position = any(f.name == "position" for f in dataclasses.fields(config))
        if self.position is not None and has_position:
            return dataclasses.replace(config, position=self.position)  # type: ignore[call-arg]
        return config


def make_mixer(config: MixerConfig, d_model: int, *, rngs: nnx.Rngs) -> SequenceMixer:
    """The mixer of a config."""
    mixer = MIXERS[config.kind][1]
    return mixer(config, d_model, rngs=rngs)  # type: ignore[call-arg]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; nothing without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Model, name: str, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.d_model)
        self.mixer = make_mixer(config.mixer(name), config.d_model, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model) if config.mlp else None
        self.mlp = MLP(config.mlp, config.d_model, rngs=rngs) if config.mlp else None
        self.dropout = config.dropout

    def init_state(self, batch: int) -> State:
        return self.mixer.init_state(batch)

    def __call__(
        self,
        state: State,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[State, Float[Array, "B T D"]]:
        return self.read(state, x_BTD, reset_BT)[:2]

    def read(self, state, x_BTD, reset_BT, dropout_key: jax.Array | None = None):
        """State, x_BTD and the auxiliary loss."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        in_BTD = self.mixer_norm(x_BTD)
        auxiliary = self.mixer.auxiliary_loss(state, in_BTD, reset_BT)
        state, mixed_BTD = self.mixer(state, in_BTD, reset_BT)
        x_BTD = x_BTD + dropout(mixed_BTD, self.dropout, keys[0])
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, keys[1])
        return state, x_BTD, auxiliary


class Pattern(nnx.Module):
    """Blocks in order: one repeat of the pattern, or the tail."""

    def __init__(self, config: Model, layers: tuple[str, ...], *, rngs: nnx.Rngs):
        self.blocks = nnx.Dict(
            {f"{i}_{name}": Block(config, name, rngs=rngs) for i, name in enumerate(layers)}
        )

    def init_state(self, batch: int) -> State:
        return tuple(block.init_state(batch) for block in self.blocks.values())

    def read(self, state, x_BTD, reset_BT, dropout_key: jax.Array | None = None):
        """States, x_BTD and the sum of the auxiliary losses."""
        count = len(self.blocks)
        keys = [None] * count if dropout_key is None else jax.random.split(dropout_key, count)
        out, total = [], jnp.zeros((), jnp.float32)
        for block, block_state, key in zip(self.blocks.values(), state, keys):
            block_state, x_BTD, auxiliary = block.read(block_state, x_BTD, reset_BT, key)
            out.append(block_state)
            total += auxiliary
        return tuple(out), x_BTD, total


_REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class ModelState(NamedTuple):
    """The states of the pattern's blocks, stacked over repeats, and those of the tail, R = 1."""

    patterns: tuple[State, ...]
    tail: tuple[State, ...]


class Reading(NamedTuple):
    """hidden_BTD: normalised, of the last layer. auxiliary: mean over the layers that have one."""

    state: ModelState
    hidden_BTD: jax.Array
    auxiliary: jax.Array


class LanguageModel(nnx.Module):
    """Logits of the next token, and the state of every layer."""

    def __init__(self, config: Model, vocab_size: int, *, rngs: nnx.Rngs):
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        self.embedding = nnx.Param(
            normal(rngs, (vocab_size, config.d_model)), axes=("vocab", "embed")
        )
        keys = jax.random.split(rngs.params(), config.repeat)
        stacked = jax.vmap(lambda key: Pattern(config, config.pattern, rngs=nnx.Rngs(key)))
        self.patterns = stacked(keys)
        last = jax.vmap(lambda key: Pattern(config, config.tail, rngs=nnx.Rngs(key)))
        self.tail = last(rngs.params()[None]) if config.tail else None
        self.norm = RMSNorm(config.d_model)
        output = None if config.tied else normal(rngs, (vocab_size, config.d_model))
        self.output = None if output is None else nnx.Param(output, axes=("vocab", "embed"))
        self.repeat, self.layers, self.remat = config.repeat, config.layers, config.remat
        self.dropout, self.dtype, self.logit_cap = config.dropout, config.dtype, config.logit_cap
        mixers = [(n, MIXERS[config.mixer(n).kind][1]) for n in config.layers_in_order]
        plain = SequenceMixer.couple, SequenceMixer.auxiliary_loss
        self.coupled = tuple(dict.fromkeys(n for n, m in mixers if m.couple is not plain[0]))
        self.auxiliaries = sum(m.auxiliary_loss is not plain[1] for _, m in mixers)

    def init_state(self, batch: int) -> ModelState:
        """The state before the first token of a document; lanes on axis 1 of every leaf."""
        start = jax.vmap(lambda pattern: pattern.init_state(batch))
        patterns, tail = self._coupled()
        return ModelState(start(patterns), () if tail is None else start(tail))

    def __call__(
        self,
        state: ModelState,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[ModelState, Float[Array, "B T Y"]]:
        """Float32 logits of the token after each of `tokens_BT`; dropout only if given a key."""
        reading = self.read(state, tokens_BT, reset_BT, dropout_key=dropout_key)
        return reading.state, self.logits(reading.hidden_BTD)

    def read(
        self,
        state: ModelState,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Reading:
        """The segment read up to the logits, which `logits` makes."""
        x_BTD = self.embedding[...][tokens_BT].astype(self.dtype)
        keys = None
        if dropout_key is not None and self.dropout > 0:
            first, rest = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, self.dropout, first)
            keys = jax.random.split(rest, self.repeat + 1)

        def body(x_BTD: jax.Array, xs: Any):
            pattern, pattern_state, key = xs
            pattern_state, x_BTD, auxiliary = pattern.read(pattern_state, x_BTD, reset_BT, key)
            return x_BTD, (pattern_state, auxiliary)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT[self.remat], prevent_cse=False)
        patterns, tail = self._coupled()
        xs = (patterns, state.patterns, None if keys is None else keys[:-1])
        unroll = self.repeat if self.layers == "unroll" else 1
        x_BTD, (after, auxiliary_R) = jax.lax.scan(body, x_BTD, xs, unroll=unroll)
        total, after_tail = jnp.sum(auxiliary_R), ()
        if tail is not None:
            xs = (tail, state.tail, None if keys is None else keys[-1:])
            x_BTD, (after_tail, auxiliary_R) = jax.lax.scan(body, x_BTD, xs)
            total += jnp.sum(auxiliary_R)
        mean = total / max(1, self.auxiliaries)
        return Reading(ModelState(after, after_tail), self.norm(x_BTD), mean)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Y"]:
        """Float32 logits."""
        table = self.embedding if self.output is None else self.output
        logits_BTY = dot_transposed(hidden_BTD, table[...], jnp.dtype(jnp.float32))
        cap = self.logit_cap
        return logits_BTY if cap is None else cap * jnp.tanh(logits_BTY / cap)

    def _coupled(self) -> tuple[Pattern, Pattern | None]:
        """The layers, with what couples the parameters of a mixer over depth worked in."""
        if not self.coupled:
            return self.patterns, self.tail
        stacks = [self.patterns] if self.tail is None else [self.patterns, self.tail]
        stacks = [nnx.merge(*nnx.split(stack)) for stack in stacks]  # copies: self stays as it is
        for name in self.coupled:
            couple_layers(name, stacks)
        return stacks[0], stacks[1] if self.tail is not None else None


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
        flat.append((path, ("layers", *axes) if path[0] in ("patterns", "tail") else axes))
    return nnx.traversals.unflatten_mapping(dict(flat))
