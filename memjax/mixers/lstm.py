"""LSTM: the non-linear control. It passes state tracking that no linear recurrence can."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.layers import Linear, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTM(MixerConfig):
    """unroll: steps of the token loop compiled together. Speed only."""

    kind: ClassVar[str] = "lstm"
    unroll: int = 8


class LSTMState(NamedTuple):
    cell_BD: Float[Array, "B D"]
    hidden_BD: Float[Array, "B D"]


class LSTMMixer(SequenceMixer):
    """A long short-term memory of one layer.

    (i, f, g, o) = W x_t + U h_{t-1} + b
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(c_t);  y_t = W_out h_t

    State: c and h, float32 [B, D]. The forget gate's bias starts at 1.
    Source: Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000.
    Non-linear in its state, so tokens run one after another; W x is one product for all.
    """

    def __init__(self, config: LSTM, d_model: int, *, rngs: nnx.Rngs):
        self.into = Linear(d_model, 4 * d_model, rngs=rngs, std=d_model**-0.5)
        forget_gate = jnp.zeros((4 * d_model,), jnp.float32).at[d_model : 2 * d_model].set(1.0)
        self.bias = nnx.Param(forget_gate, axes=("hidden",))
        self.recurrent = nnx.Param(
            normal(rngs, (4 * d_model, d_model), d_model**-0.5), axes=("hidden", "embed")
        )
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "hidden"))
        self.unroll, self.d_model = config.unroll, d_model

    def init_state(self, batch: int) -> LSTMState:
        zeros = jnp.zeros((batch, self.d_model), jnp.float32)
        return LSTMState(zeros, zeros)

    def __call__(
        self,
        state: LSTMState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[LSTMState, Float[Array, "B T D"]]:
        recurrent = self.recurrent[...]

        def token(state: LSTMState, xs):
            gates_BD, reset_B = xs
            cell_BD, hidden_BD = (jnp.where(reset_B[:, None], 0.0, a) for a in state)
            gates_BD = gates_BD + hidden_BD @ recurrent.T
            i, f, g, o = jnp.split(gates_BD, 4, -1)
            cell_BD = jax.nn.sigmoid(f) * cell_BD + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden_BD = jax.nn.sigmoid(o) * jnp.tanh(cell_BD)
            return LSTMState(cell_BD, hidden_BD), hidden_BD

        gates_TBD = jnp.moveaxis(self.into(x_BTD), 1, 0).astype(jnp.float32) + self.bias[...]
        unroll = min(self.unroll, x_BTD.shape[1])
        state, hidden_TBD = jax.lax.scan(token, state, (gates_TBD, reset_BT.T), unroll=unroll)
        return state, self.out(jnp.moveaxis(hidden_TBD, 0, 1).astype(x_BTD.dtype))

    def memory_report(self, segment: int = 1024, state: LSTMState | None = None) -> MemoryReport:
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.cell_BD)}
        return MemoryReport(state_bytes(self), projection_flops(self), 0.0, telemetry)
