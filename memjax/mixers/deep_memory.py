"""The deep neural memory of the Titans layers: projections, gates, and the learned start."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import FieldError, check, check_at_least
from memjax.layers import Linear, ShortConv, check_heads, l2_normalise
from memjax.ops import neural_memory
from memjax.positions import Position, Rotary
from pallas_kernels.dispatch import resolve
from pallas_kernels.neural_memory import (
    L2,
    MLP,
    GradientDescent,
    Memory,
    Momentum,
    NeuralMemoryState,
    Rule,
    WeightDecay,
    init_neural_memory,
    read,
    whole_blocks,
)

FORGET_BIAS, MOMENTUM_BIAS, RATE_BIAS = -7.0, 2.2, -2.2  # sigmoids of 0.001, 0.9 and 0.1
NORM_EPS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepMemory:
    """An MLP a head, trained on the tokens that it reads.

    layers, expansion: 1 (linear) to 4 matrices, hidden layers of expansion * d_model / heads.
    residual_norm: the memory answers k + LayerNorm(MLP(k)) instead of MLP(k), which bounds it.
    momentum, forget: whether surprise has momentum, and whether the weights decay.
    conv: width of the short convolutions on queries, keys and values; None for none.
    update_every: tokens whose gradients are taken at the same weights. Changes the mathematics.
    rate_cap: the largest inner learning rate of a token.
    """

    heads: int = 4
    layers: int = 2
    expansion: int = 2
    residual_norm: bool = True
    momentum: bool = True
    forget: bool = True
    conv: int | None = 4
    update_every: int = 32
    rate_cap: float = 0.1

    def __post_init__(self):
        check_at_least(self, 1, "heads", "layers", "expansion", "conv", "update_every")
        check(self, "layers", self.layers <= 4, "must be at most 4")
        check(self, "rate_cap", self.rate_cap > 0, "must be greater than 0")

    def check_width(self, d_model: int, position: Position | None = None) -> None:
        """Raise a FieldError, as the field `memory` of a mixer, if the heads do not fit."""
        try:
            check_heads(self, d_model)
            size = d_model // self.heads
            rule = f"gives head size {size}, but rotary positions need an even one"
            check(self, "heads", size % 2 == 0 or not isinstance(position, Rotary), rule)
        except FieldError as error:
            raise error.under("memory") from None

    @property
    def rule(self) -> Rule:
        """The memory in the terms of `pallas_kernels.neural_memory`."""
        structure = MLP(
            layers=self.layers,
            expansion=self.expansion,
            residual_norm=self.residual_norm,
            norm_eps=NORM_EPS,
        )
        return Rule(
            structure, L2(), WeightDecay(), Momentum() if self.momentum else GradientDescent()
        )


class DeepMemoryState(NamedTuple):
    """The memory, and the last inputs of the short convolutions of queries, keys and values."""

    memory: NeuralMemoryState
    query_tail_BMF: Float[Array, "B M F"]
    key_tail_BMF: Float[Array, "B M F"]
    value_tail_BMF: Float[Array, "B M F"]


class DeepMemoryBranch(nnx.Module):
    """A memory W, one a head, that learns to answer k_t with v_t, and is asked q_t.

    S_t = eta_t S_{t-1} - theta_t grad |memory(W_block; k_t) - v_t|^2 / 2
    W_t = (1 - alpha_t) W_{t-1} + S_t;   o_t = memory(W_t; q_t)
    memory(W; x) = x + scale LayerNorm(... gelu(x W_1) ...) + shift;  W_block: as the block began
    LayerNorm(z) = (z - mean(z)) / sqrt(variance(z) + 1)
    q, k, v = silu(conv(W x)), q and k of unit norm
    theta = rate_cap sigmoid(w x + b), eta = sigmoid(w x + b), alpha = sigmoid(w x + b), one a head

    State: W and S at the start of the block, float32, the block's keys, values and gates so far,
    and the tails of the convolutions. The W that a document starts with, scale and shift are
    learned by the outer loop, through all inner steps.
    Source: arXiv:2501.00663, Eqs. 8-18 and Sec. 4.4. Paper: M = W.
    Differs from paper: the gates are one a head; 1/2 of the loss (the factor is in the rate);
    LayerNorm and residual around the memory, and the cap of the rate, which keep it bounded. The 1
    in LayerNorm does so too: with the usual 1e-6 the gradients of weights that decay grow without
    end, and those of the outer loop with them.
    """

    def __init__(self, config: DeepMemory, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.size = size = d_model // config.heads
        self.query, self.key, self.value = (
            Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.query_conv, self.key_conv, self.value_conv = (
            ShortConv(d_model, config.conv, rngs=rngs) if config.conv else None for _ in range(3)
        )
        gates = 1 + config.momentum + config.forget
        self.gates = Linear(d_model, gates * config.heads, rngs=rngs, axes=("head", "embed"))
        biases = [RATE_BIAS]
        biases += [MOMENTUM_BIAS] if config.momentum else []
        biases += [FORGET_BIAS] if config.forget else []
        bias_G = jnp.repeat(jnp.array(biases, jnp.float32), config.heads)
        self.gate_bias = nnx.Param(bias_G, axes=("head",))
        structure = config.rule.structure
        self.weights = nnx.Dict(
            {
                f"layer_{i}": nnx.Param(
                    jax.random.normal(rngs.params(), (config.heads, *shape)) * shape[0] ** -0.5,
                    axes=("head", "value", "value"),
                )
                for i, shape in enumerate(structure.shapes(size, size))
            }
        )
        self.constants = nnx.Dict(
            {
                name: nnx.Param(jnp.full((config.heads, size), value), axes=("head", "value"))
                for name, value in structure.constants(size).items()
            }
        )

    @property
    def initial(self) -> tuple[jax.Array, ...]:
        """The weights at the start of a document."""
        return tuple(weight[...] for weight in self.weights.values())

    @property
    def fixed(self) -> dict[str, jax.Array]:
        """What of the memory the inner loop does not change."""
        return {name: constant[...] for name, constant in self.constants.items()}

    def init_tails(self, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The tails of the convolutions at the start of a document."""
        reach, width = (self.config.conv or 1) - 1, self.size * self.config.heads
        zeros_BMF = jnp.zeros((batch, reach, width), jnp.float32)
        return zeros_BMF, zeros_BMF, zeros_BMF

    def init_state(self, batch: int) -> DeepMemoryState:
        config = self.config
        size = (batch, 1, config.heads)
        names = ["rate", *["log_momentum"] * config.momentum, *["log_keep"] * config.forget]
        streams = {name: jnp.zeros(size) for name in names}
        streams |= {name: jnp.zeros((*size, self.size)) for name in "kv"}
        memory = init_neural_memory(
            config.rule, self.initial, streams, update_every=config.update_every
        )
        return DeepMemoryState(memory, *self.init_tails(batch))

    def queries(self, tail_BMF, stream_BTF, reset_BT) -> tuple[jax.Array, jax.Array]:
        """From projected queries: the tail of the convolution behind them, and q_BTHK."""
        tail_BMF, stream_BTF = convolve(self.query_conv, tail_BMF, stream_BTF, reset_BT)
        return tail_BMF, self.shape_queries(stream_BTF)

    def shape_queries(self, stream_BTF: jax.Array) -> jax.Array:
        """q_BTHK, of unit norm."""
        return l2_normalise(self._heads(jax.nn.silu(stream_BTF)))

    def writes(self, tails, x_BTD, reset_BT) -> tuple[tuple, dict[str, jax.Array]]:
        """Tails of keys and values behind the segment; k, v and the gates. No reset: None."""
        key_tail, k_BTF = convolve(self.key_conv, tails[0], self.key(x_BTD), reset_BT)
        value_tail, v_BTF = convolve(self.value_conv, tails[1], self.value(x_BTD), reset_BT)
        k_BTHK, v_BTHV = (self._heads(jax.nn.silu(a)) for a in (k_BTF, v_BTF))
        told = {"k": l2_normalise(k_BTHK), "v": v_BTHV, **self._gates(x_BTD)}
        return (key_tail, value_tail), told

    def _heads(self, x_BTF: jax.Array) -> jax.Array:
        return x_BTF.reshape(*x_BTF.shape[:2], self.config.heads, self.size)

    def _gates(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """rate, log_momentum and log_keep, [B, T, H] in float32."""
        heads = self.config.heads
        z_BTG = self.gates(x_BTD).astype(jnp.float32) + self.gate_bias[...]
        parts = jnp.split(z_BTG, z_BTG.shape[-1] // heads, -1)
        gates = {"rate": self.config.rate_cap * jax.nn.sigmoid(parts.pop(0))}
        if self.config.momentum:
            gates["log_momentum"] = jax.nn.log_sigmoid(parts.pop(0))
        if self.config.forget:
            gates["log_keep"] = jax.nn.log_sigmoid(-parts.pop(0))
        return gates

    def __call__(
        self,
        state: DeepMemoryState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
        *,
        impl: str,
    ) -> tuple[DeepMemoryState, Float[Array, "B T H V"]]:
        query_tail, q_BTHK = self.queries(state.query_tail_BMF, self.query(x_BTD), reset_BT)
        tails, tokens = self.writes(state[2:], x_BTD, reset_BT)
        telemetry.note_gates(tokens.get("log_keep"), tokens["rate"])
        o_BTHV, memory = self._learn({"q": q_BTHK, **tokens}, state.memory, reset_BT, impl)
        return DeepMemoryState(memory, query_tail, *tails), o_BTHV

    def _learn(self, tokens, state: NeuralMemoryState, reset_BT, impl: str):
        structure, bias, retention, learner = self.config.rule
        return neural_memory(
            **tokens,
            weights=self.initial,
            constants=self.fixed,
            state=state,
            reset=reset_BT,
            update_every=self.config.update_every,
            structure=structure,
            bias=bias,
            retention=retention,
            learner=learner,
            impl=impl,
        )

    def recall(self, memory: Memory, q_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H V"]:
        """What the memory answers to queries, as it is."""
        return read(self.config.rule, self.fixed, memory, q_BTHK.astype(jnp.float32))

    def read_whole_blocks(
        self, memory: Memory, tails, x_BTD: Float[Array, "B T D"], *, impl: str
    ) -> tuple[Memory, tuple, Float[Array, "B T H V"]]:
        """Whole blocks, from the start of one, without a reset; no convolution on queries.

        tails: of the convolutions of keys and values.
        """
        every = self.config.update_every
        tails, tokens = self.writes(tails, x_BTD, None)
        tokens["q"] = self.shape_queries(self.query(x_BTD))
        if resolve("neural_memory", impl) == "reference":
            state = init_neural_memory(self.config.rule, self.initial, tokens, update_every=every)
            state = state._replace(weights=memory.weights, momenta=memory.momenta)
            o_BTHV, state = self._learn(tokens, state, None, impl)
            return Memory(state.weights, state.momenta), tails, o_BTHV
        wide = {name: x.astype(jnp.float32) for name, x in tokens.items()}
        memory, o_BTHV = whole_blocks(
            self.config.rule, self.fixed, memory, wide, update_every=every
        )
        return memory, tails, o_BTHV.astype(x_BTD.dtype)

    def recurrence_flops(self) -> float:
        """Operations a token of the token loop: answer a key, its gradients, the steps, a read."""
        sizes = [math.prod(weight.shape) for weight in self.weights.values()]
        steps = 2.0 + 2.0 * self.config.momentum
        return (2 + 2 + 2 + steps) * sum(sizes) + 2.0 * sum(sizes[1:])


def convolve(conv: ShortConv | None, tail_BMF, x_BTF, reset_BT):
    """The tail behind the segment, and the convolved x; x as it is without a convolution."""
    if conv is None:
        return tail_BMF, x_BTF
    if reset_BT is not None:
        return conv(tail_BMF, x_BTF, reset_BT)
    length, weight_WF = x_BTF.shape[1], conv.weight[...].astype(x_BTF.dtype)
    padded_BJF = jnp.concatenate([tail_BMF.astype(x_BTF.dtype), x_BTF], 1)
    starts = range(conv.width - 1, -1, -1)
    y_BTF = sum(w_F * padded_BJF[:, at : at + length] for w_F, at in zip(weight_WF, starts))
    return padded_BJF[:, length:].astype(tail_BMF.dtype), y_BTF


def norms(memory: Memory | NeuralMemoryState) -> dict[str, jax.Array]:
    """Norms of weights and momenta, root mean squares over lanes and heads."""

    def norm(matrices: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sqrt(sum((jnp.mean(jnp.sum(w * w, (2, 3))) for w in matrices), jnp.zeros(())))

    return {"weight_norm": norm(memory.weights), "momentum_norm": norm(memory.momenta)}
