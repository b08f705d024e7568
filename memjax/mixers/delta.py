"""What the layers of the delta rule share: streams, write strength, memory and read-out."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check_at_least
from memjax.layers import Linear, l2_normalise
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.streams import Readout, Stream, split_heads
from memjax.ops import delta_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """key_size, value_size: channels of a head; what None means is the layer's to say.

    conv: width of the short convolutions on queries, keys and values; None for none.
    negative_eigenvalues: write strength in (0, 2) instead of (0, 1), for state tracking
        (arXiv:2411.12537).
    chunk: tokens computed together. Speed only.
    """

    heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    conv: int | None = 4
    negative_eigenvalues: bool = False
    chunk: int = 32
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "value_size", "conv", "chunk")


class DeltaState(NamedTuple):
    """The memory, and the last inputs of the short convolutions of queries, keys and values."""

    memory_BHKV: Float[Array, "B H K V"]
    query_tail_BMF: Float[Array, "B M F"]
    key_tail_BMF: Float[Array, "B M F"]
    value_tail_BMF: Float[Array, "B M Z"]


class DeltaMixer(SequenceMixer):
    """A memory that is corrected towards v_t where k_t reads it; `log_decay` may make it fade.

    q, k, v = silu(conv(W x)), q and k of unit norm; beta = sigmoid(W_b x), or twice that with
    `negative_eigenvalues`
    """

    splits_tokens = True

    def __init__(
        self, config: DeltaConfig, d_model: int, key_size: int, value_size: int, *, rngs: nnx.Rngs
    ):
        self.config, self.key_size, self.value_size = config, key_size, value_size
        keys, values = config.heads * key_size, config.heads * value_size
        self.query = Stream(d_model, keys, config.conv, rngs=rngs)
        self.key = Stream(d_model, keys, config.conv, rngs=rngs)
        self.value = Stream(d_model, values, config.conv, rngs=rngs)
        self.beta = Linear(d_model, config.heads, rngs=rngs, axes=("head", "embed"))

    def _make_readout(self, d_model: int, *, gated: bool, rngs: nnx.Rngs) -> None:
        self.readout = Readout(d_model, self.config.heads, self.value_size, gated=gated, rngs=rngs)

    def init_state(self, batch: int) -> DeltaState:
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        tails = (stream.init_tail(batch) for stream in (self.query, self.key, self.value))
        return DeltaState(jnp.zeros(shape, jnp.float32), *tails)

    def write_strength(self, x_BTD: jax.Array) -> jax.Array:
        """beta, [B, T, H] in float32."""
        strength = 2.0 if self.config.negative_eigenvalues else 1.0
        return strength * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))

    def log_decay(self, x_BTD: jax.Array) -> jax.Array | None:
        """The log of what remains of the memory, [B, T, H] in float32; None for all of it."""
        return None

    def __call__(
        self,
        state: DeltaState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[DeltaState, Float[Array, "B T D"]]:
        heads = self.config.heads
        query_tail_BMF, q_BTF = self.query(state.query_tail_BMF, x_BTD, reset_BT)
        key_tail_BMF, k_BTF = self.key(state.key_tail_BMF, x_BTD, reset_BT)
        value_tail_BMF, v_BTF = self.value(state.value_tail_BMF, x_BTD, reset_BT)
        beta_BTH, log_decay_BTH = self.write_strength(x_BTD), self.log_decay(x_BTD)
        telemetry.note_gates(log_decay_BTH, beta_BTH)
        o_BTHV, memory_BHKV = delta_rule(
            l2_normalise(split_heads(q_BTF, heads)),
            l2_normalise(split_heads(k_BTF, heads)),
            split_heads(v_BTF, heads),
            beta_BTH,
            log_decay_BTH,
            state.memory_BHKV,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        state = DeltaState(memory_BHKV, query_tail_BMF, key_tail_BMF, value_tail_BMF)
        return state, self.readout(o_BTHV, x_BTD)

    def memory_report(self, segment: int = 1024, state: DeltaState | None = None) -> MemoryReport:
        recurrence = 6.0 * self.config.heads * self.key_size * self.value_size
        told = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, told)
