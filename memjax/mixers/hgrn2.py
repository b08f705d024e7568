"""HGRN2: a gated linear memory whose keys are what its gates let go, with bounds that rise."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, RMSNorm
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.streams import split_heads
from memjax.ops import linear_attention

NO_BOUND = -100.0  # a logit whose sigmoid adds nothing to any gate in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2(MixerConfig):
    """expand: keys and values of a head, or all of d_model where that is less.

    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "hgrn2"
    expand: int = 128
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "expand", "chunk")

    def head_size(self, d_model: int) -> int:
        return min(self.expand, d_model)

    def check_width(self, d_model: int) -> None:
        fits = d_model % self.head_size(d_model) == 0
        check(self, "expand", fits, f"must divide d_model={d_model}, or be no less")


class HGRN2State(NamedTuple):
    memory_BHKV: Float[Array, "B H K V"]


class HGRN2Mixer(SequenceMixer):
    """A linear memory that forgets by channel, and writes to a channel what it forgets of it.

    memory_t = diag(forget_t) memory_{t-1} + (1 - forget_t) v_t^T
    o_t      = memory_t^T q_t;   y_t = W_o RMSNorm(o_t), the norm over the whole width
    forget_t = bound + (1 - bound) sigmoid(W_f x_t),   q_t = silu(W_q x_t),   v_t = W_v x_t

    Alone, bound = sigmoid(lower), one a channel. In a model the layers share a table: the bound of
    layer l is the sum of rows 1 to l of softmax(lower) over the layers, which is 0 for the first
    layer and below 1 for the last (`couple`).
    State: the memory, float32 [B, H, K, V], K = V = expand, zero at the start of a document.
    Source: arXiv:2404.07904, Eqs. 4 to 6; bounds of arXiv:2311.04823, Eq. 5.
    Paper: f = forget, gamma = bound, o = q. Activations differ among public layers: here as in
    flash-linear-attention; the layer that the authors released has SiLU on v, a sigmoid on q unless
    told otherwise, LayerNorm for RMSNorm, and biases.
    """

    splits_tokens = True

    def __init__(self, config: HGRN2, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.head_size = config.head_size(d_model)
        self.heads = d_model // self.head_size
        axes = ("heads", "embed")
        self.query = Linear(d_model, d_model, rngs=rngs, axes=axes)
        self.forget = Linear(d_model, d_model, rngs=rngs, axes=axes)
        self.value = Linear(d_model, d_model, rngs=rngs, axes=axes)
        self.lower = nnx.Param(jnp.zeros((d_model,), jnp.float32), axes=("heads",))
        self.norm = RMSNorm(d_model, axes=("heads",))
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    @staticmethod
    def couple(params: dict) -> dict:
        """`lower` of all layers, [L, D], becomes the logits of their bounds."""
        return {**params, "lower": bound_logits(params["lower"])}

    def init_state(self, batch: int) -> HGRN2State:
        shape = (batch, self.heads, self.head_size, self.head_size)
        return HGRN2State(jnp.zeros(shape, jnp.float32))

    def gates(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log forget and 1 - forget, [B, T, F] in float32."""
        score_BTF = self.forget(x_BTD).astype(jnp.float32)
        lower_F = self.lower[...]
        open_BTF = jax.nn.log_sigmoid(-lower_F) + jax.nn.log_sigmoid(score_BTF)
        log_forget_BTF = jnp.logaddexp(jax.nn.log_sigmoid(lower_F), open_BTF)
        write_BTF = jax.nn.sigmoid(-lower_F) * jax.nn.sigmoid(-score_BTF)
        return jnp.minimum(log_forget_BTF, 0), write_BTF

    def __call__(
        self,
        state: HGRN2State,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[HGRN2State, Float[Array, "B T D"]]:
        log_forget_BTF, write_BTF = self.gates(x_BTD)
        telemetry.note_gates(log_forget_BTF)
        o_BTHV, memory_BHKV = linear_attention(
            split_heads(jax.nn.silu(self.query(x_BTD)), self.heads),
            split_heads(write_BTF.astype(x_BTD.dtype), self.heads),
            split_heads(self.value(x_BTD), self.heads),
            split_heads(log_forget_BTF, self.heads),
            state.memory_BHKV,
            reset_BT,
            scale=1.0,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        y_BTD = self.out(self.norm(o_BTHV.reshape(x_BTD.shape)))
        return HGRN2State(memory_BHKV), y_BTD

    def memory_report(self, segment: int = 1024, state: HGRN2State | None = None) -> MemoryReport:
        recurrence = 4.0 * self.heads * self.head_size**2
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)


def bound_logits(table_LF: Float[Array, "L F"]) -> Float[Array, "L F"]:
    """logit(cumsum(softmax(table)) - softmax(table)[0]) over the layers; NO_BOUND for the first."""
    layers = table_LF.shape[0]
    layer_LJ, row_LJ = jnp.indices((layers, layers))[:, 1:]
    below_LJ1 = ((row_LJ >= 1) & (row_LJ <= layer_LJ))[..., None]

    def log_sum(rows_LJ1: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.where(rows_LJ1, table_LF, -jnp.inf), 1)

    first_F = jnp.full_like(table_LF[:1], NO_BOUND)
    return jnp.concatenate([first_F, log_sum(below_LJ1) - log_sum(~below_LJ1)])
