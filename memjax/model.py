"""The language model: embedding, a repeated pattern of blocks, norm, logits; states threaded.

    state, logits_BTY = lm(state, tokens_BT, reset_BT)

has the signature of a mixer, so the same laws hold for whole models. The pattern is repeated
`repeat` times with its parameters stacked on a leading axis R; its states are stacked likewise,
so lanes are on axis 1 of every leaf of the model's state (`LANE_AXIS`). The repeats run as one
`lax.scan` (compile time flat in depth) or unrolled (faster on a CPU); the parameters, and so the
checkpoints, are the same.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config import ConfigError, FieldError, OneOf, check, check_at_least
from memjax.layers import MLP, NoPE, RMSNorm, Rotary, SwiGLU, dot_transposed, normal
from memjax.memory import MEMORIES
from memjax.memory.base import MemoryConfig
from memjax.mixers import MIXERS
from memjax.mixers.base import MixerConfig, SequenceMixer, State

LANE_AXIS = 1

MixerField = Annotated[MixerConfig, OneOf(lambda: {k: c for k, (c, _) in MIXERS.items()})]
MemoryField = Annotated[MemoryConfig, OneOf(lambda: {k: c for k, (c, _) in MEMORIES.items()})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture: layers = len(pattern) * repeat.

    pattern: names of mixers; each is a key of `mixers` or a kind of the registry (its defaults).
    position: replaces the position of every mixer that has one.
    mlp: None for blocks that are a mixer alone.
    tied: whether the output matrix is the embedding.
    dtype: type of activations and products; parameters, norms and states are float32.
    layers: scan the repeats, or unroll them. Speed only.
    remat: what the backward pass recomputes: nothing, all but products ("dots"), or all ("full").
    """

    d_model: int = 256
    pattern: tuple[str, ...] = ("gated_deltanet",)
    repeat: int = 4
    mixers: dict[str, MixerField] = dataclasses.field(default_factory=dict)
    memory: MemoryField | None = None
    position: Rotary | NoPE | None = None
    mlp: SwiGLU | None = SwiGLU()
    tied: bool = True
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        check_at_least(self, 1, "d_model", "repeat")
        check(self, "dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        check(self, "pattern", len(self.pattern) > 0, "must name at least one mixer")
        known = [*self.mixers, *(k for k in MIXERS if k not in self.mixers)]
        for i, name in enumerate(self.pattern):
            if name not in known:
                rule = f"names no mixer; choose from {', '.join(known)}"
                raise FieldError(f"pattern[{i}]", name, rule)
        for name in self.mixers:
            if name not in self.pattern:
                raise ConfigError(f"mixers.{name} is not in pattern={self.pattern}; remove it")
            try:
                self.mixers[name].check_width(self.d_model)
            except FieldError as error:
                raise error.under(f"mixers.{name}") from None
        for name in set(self.pattern) - set(self.mixers):
            try:
                self.mixer(name).check_width(self.d_model)
            except FieldError as error:
                raise error.under(f"mixers.{name}") from None

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
        dropout_key: jax.Array | None = None,
    ) -> tuple[State, Float[Array, "B T D"]]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        state, mixed_BTD = self.mixer(state, self.mixer_norm(x_BTD), reset_BT)
        x_BTD = x_BTD + dropout(mixed_BTD, self.dropout, keys[0])
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, keys[1])
        return state, x_BTD


class Pattern(nnx.Module):
    """The blocks of one repeat of the pattern, in order."""

    def __init__(self, config: Model, *, rngs: nnx.Rngs):
        names = [f"{i}_{name}" for i, name in enumerate(config.pattern)]
        self.blocks = nnx.Dict(
            {key: Block(config, name, rngs=rngs) for key, name in zip(names, config.pattern)}
        )

    def init_state(self, batch: int) -> State:
        return tuple(block.init_state(batch) for block in self.blocks.values())

    def __call__(self, state, x_BTD, reset_BT, dropout_key=None):
        count = len(self.blocks)
        keys = [None] * count if dropout_key is None else jax.random.split(dropout_key, count)
        out = []
        for block, block_state, key in zip(self.blocks.values(), state, keys):
            block_state, x_BTD = block(block_state, x_BTD, reset_BT, key)
            out.append(block_state)
        return tuple(out), x_BTD


_REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LanguageModel(nnx.Module):
    """Logits of the next token, and the state of every layer."""

    def __init__(self, config: Model, vocab_size: int, *, rngs: nnx.Rngs):
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        self.embedding = nnx.Param(
            normal(rngs, (vocab_size, config.d_model)), axes=("vocab", "embed")
        )
        keys = jax.random.split(rngs.params(), config.repeat)
        self.patterns = jax.vmap(lambda key: Pattern(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.d_model)
        output = None if config.tied else normal(rngs, (vocab_size, config.d_model))
        self.output = None if output is None else nnx.Param(output, axes=("vocab", "embed"))
        self.repeat, self.layers, self.remat = config.repeat, config.layers, config.remat
        self.dropout, self.dtype = config.dropout, config.dtype

    def init_state(self, batch: int) -> State:
        """The state before the first token of a document; lanes on axis 1 of every leaf."""
        return jax.vmap(lambda pattern: pattern.init_state(batch))(self.patterns)

    def __call__(
        self,
        state: State,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[State, Float[Array, "B T Y"]]:
        """Float32 logits of the token after each of `tokens_BT`; dropout only if given a key."""
        state, hidden_BTD = self.hidden(state, tokens_BT, reset_BT, dropout_key=dropout_key)
        return state, self.logits(hidden_BTD)

    def hidden(
        self,
        state: State,
        tokens_BT: Int[Array, "B T"],
        reset_BT: Bool[Array, "B T"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[State, Float[Array, "B T D"]]:
        """The normalised output of the last layer, from which `logits` are made."""
        x_BTD = self.embedding[...][tokens_BT].astype(self.dtype)
        keys = None
        if dropout_key is not None and self.dropout > 0:
            first, rest = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, self.dropout, first)
            keys = jax.random.split(rest, self.repeat)

        def body(x_BTD: jax.Array, xs: Any):
            pattern, pattern_state, key = xs
            pattern_state, x_BTD = pattern(pattern_state, x_BTD, reset_BT, key)
            return x_BTD, pattern_state

        if self.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT[self.remat], prevent_cse=False)
        unroll = self.repeat if self.layers == "unroll" else 1
        x_BTD, state = jax.lax.scan(body, x_BTD, (self.patterns, state, keys), unroll=unroll)
        return state, self.norm(x_BTD)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Y"]:
        """Float32 logits."""
        table = self.embedding if self.output is None else self.output
        return dot_transposed(hidden_BTD, table[...], jnp.dtype(jnp.float32))


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
        flat.append((path, ("layers", *axes) if path[0] == "patterns" else axes))
    return nnx.traversals.unflatten_mapping(dict(flat))
