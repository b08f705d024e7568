"""Miras: a memory that learns at test time, of any structure, bias, retention and learner."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax import telemetry
from memjax.layers import Linear, l2_normalise
from memjax.mixers.base import MemoryReport, SequenceMixer, projection_flops, state_bytes
from memjax.mixers.deep_memory import FORGET_BIAS, MOMENTUM_BIAS, RATE_BIAS, norms
from memjax.mixers.miras_config import MirasConfig
from memjax.mixers.streams import Readout, Stream, split_heads
from memjax.ops import last_token, neural_memory
from memjax.positions import apply_position, positions
from pallas_kernels.neural_memory import NeuralMemoryState, init_neural_memory

THRESHOLD_BIAS = math.log(math.e - 1)  # a softplus of 1


class MirasState(NamedTuple):
    """The memory, the last inputs of the short convolutions, and the position in the document."""

    memory: NeuralMemoryState
    query_tail_BMF: Float[Array, "B M F"]
    key_tail_BMF: Float[Array, "B M F"]
    value_tail_BMF: Float[Array, "B M F"]
    position_B: Int[Array, "B"]


class MirasMixer(SequenceMixer):
    """A memory W, one a head, that learns to answer k_t with v_t, and is asked q_t.

    S_t = momentum_t S_{t-1} - rate_t gradient of bias(structure(W_block; k_t), v_t) in W_block
    A_t = keep_t A_{t-1} + S_t;   o_t = structure(W_t; q_t)
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
    W_block = retention(A_block), as the block began; W_t moves from there as A_t does
    q, k, v = silu(conv(W x)); q and k turned by their position, then of unit norm
    rate = rate_cap sigmoid(w x + b), momentum and keep = sigmoid(w x + b), thresholds of the bias
    softplus(w x + b); one a head; no momentum, keep or threshold where the choices have none

    State: A and S at the start of the block, float32, the block's keys, values and gates so far,
    the tails of the convolutions, and the position. The A that a document starts with is learned.
    Source: arXiv:2504.13173, Sec. 3 and 5: moneta Eqs. 24-25, yaad Eq. 26, memora Eq. 27.
    Differs from paper: gates are one a head and not one a channel, which the exact dual form needs;
    the LayerNorm of the memory adds 1 to the variance; RMSNorm for the outer one; the choices say
    what else differs.
    """

    splits_tokens = True

    def __init__(self, config: MirasConfig, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.size = config, d_model // config.heads
        self.query, self.key, self.value = (
            Stream(d_model, d_model, config.conv, rngs=rngs) for _ in range(3)
        )
        biases = gate_biases(config)
        self.gates = Linear(d_model, len(biases) * config.heads, rngs=rngs, axes=("head", "embed"))
        bias_G = jnp.repeat(jnp.array(list(biases.values()), jnp.float32), config.heads)
        self.gate_bias = nnx.Param(bias_G, axes=("head",))
        structure = config.rule.structure
        weights, constants = {}, {}
        for i, shape in enumerate(structure.shapes(self.size, self.size)):
            drawn = jax.random.normal(rngs.params(), (config.heads, *shape)) * shape[0] ** -0.5
            weights[f"layer_{i}"] = nnx.Param(drawn, axes=("head", "value", "value"))
        for name, value in structure.constants(self.size).items():
            full = jnp.full((config.heads, self.size), value)
            constants[name] = nnx.Param(full, axes=("head", "value"))
        self.weights, self.constants = nnx.Dict(weights), nnx.Dict(constants)
        self.readout = Readout(d_model, config.heads, self.size, gated=True, rngs=rngs)

    @property
    def initial(self) -> tuple[jax.Array, ...]:
        """What a document starts to accumulate from."""
        return tuple(weight[...] for weight in self.weights.values())

    def init_state(self, batch: int) -> MirasState:
        size = (batch, 1, self.config.heads)
        streams = {name: jnp.zeros(size) for name in gate_biases(self.config)}
        streams |= {name: jnp.zeros((*size, self.size)) for name in "kv"}
        memory = init_neural_memory(
            self.config.rule, self.initial, streams, update_every=self.config.update_every
        )
        query_tail, key_tail, value_tail = (
            stream.init_tail(batch) for stream in (self.query, self.key, self.value)
        )
        position_B = jnp.zeros((batch,), jnp.int32)
        return MirasState(memory, query_tail, key_tail, value_tail, position_B)

    def __call__(
        self,
        state: MirasState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[MirasState, Float[Array, "B T D"]]:
        config, (structure, bias, retention, learner) = self.config, self.config.rule
        query_tail, q_BTF = self.query(state.query_tail_BMF, x_BTD, reset_BT)
        key_tail, k_BTF = self.key(state.key_tail_BMF, x_BTD, reset_BT)
        value_tail, v_BTF = self.value(state.value_tail_BMF, x_BTD, reset_BT)
        position_BT = positions(state.position_B, reset_BT)
        q_BTHK, k_BTHK = (
            l2_normalise(apply_position(config.position, split_heads(x, config.heads), position_BT))
            for x in (q_BTF, k_BTF)
        )
        gates = self._gates(x_BTD)
        telemetry.note_gates(gates.get("log_keep"), gates["rate"])
        o_BTHV, memory = neural_memory(
            q_BTHK,
            k_BTHK,
            split_heads(v_BTF, config.heads),
            **gates,
            weights=self.initial,
            constants={name: constant[...] for name, constant in self.constants.items()},
            state=state.memory,
            reset=reset_BT,
            update_every=config.update_every,
            structure=structure,
            bias=bias,
            retention=retention,
            learner=learner,
            impl=config.impl,
        )
        y_BTD = self.readout(o_BTHV, x_BTD)
        position_B = last_token(position_BT) + 1
        return MirasState(memory, query_tail, key_tail, value_tail, position_B), y_BTD

    def _gates(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """What `neural_memory` needs of every token, [B, T, H] each, in float32."""
        z_BTG = self.gates(x_BTD).astype(jnp.float32) + self.gate_bias[...]
        names = gate_biases(self.config)
        z = dict(zip(names, jnp.split(z_BTG, len(names), -1)))
        gates = {"rate": self.config.rate_cap * jax.nn.sigmoid(z["rate"])}
        if "log_momentum" in z:
            gates["log_momentum"] = jax.nn.log_sigmoid(z["log_momentum"])
        if "log_keep" in z:
            gates["log_keep"] = jax.nn.log_sigmoid(-z["log_keep"])
        if "threshold" in z:
            gates["threshold"] = jax.nn.softplus(z["threshold"])
        return gates

    def memory_report(self, segment: int = 1024, state: MirasState | None = None) -> MemoryReport:
        # Answer a key, the gradients of its answer, the steps, and an answer to the query.
        sizes = [math.prod(weight.shape) for weight in self.weights.values()]
        steps = 2.0 + 2.0 * self.config.rule.learner.momentum
        recurrence = (2 + 2 + 2 + steps) * sum(sizes) + 2.0 * sum(sizes[1:])
        flops = projection_flops(self) + recurrence
        told = {} if state is None else norms(state.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)


def gate_biases(config: MirasConfig) -> dict[str, float]:
    """The gates that the choices need, in order, and the biases that they start with."""
    _, bias, retention, learner = config.rule
    biases = {"rate": RATE_BIAS}
    biases |= {"log_momentum": MOMENTUM_BIAS} if learner.momentum else {}
    biases |= {"log_keep": FORGET_BIAS} if retention.forgets else {}
    return biases | ({"threshold": THRESHOLD_BIAS} if bias.needs_threshold else {})
