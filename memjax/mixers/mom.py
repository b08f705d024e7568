"""Mixture of memories: a router chooses which linear memories a token writes and reads."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, check_heads, l2_normalise
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.mom_gates import GATES
from memjax.mixers.streams import Readout, Stream, split_heads
from memjax.ops import delta_rule, linear_attention
from pallas_kernels.sums import weighted_sum

DELTA_RULES = ("gated_delta", "delta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoM(MixerConfig):
    """memories: routed ones, of which a token uses top_k. shared: one more that every token uses.

    inner: how a memory is written: "gated_delta" (as in `gated_deltanet`), "delta" (`deltanet`),
        "linear" (no decay), "retention" (fixed decays, no positions) or "gla".
    heads must divide d_model; key_size, value_size: None is d_model / heads.
    conv: width of the short convolutions on queries, keys and values; None for none.
    balance: weight of the load-balance loss.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "mom"
    inner: Literal["gated_delta", "delta", "linear", "retention", "gla"] = "gated_delta"
    memories: int = 4
    top_k: int = 2
    shared: bool = True
    heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    conv: int | None = 4
    balance: float = 0.01
    chunk: int = 32
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        sizes = ("heads", "key_size", "value_size", "conv", "chunk")
        check_at_least(self, 1, "memories", "top_k", *sizes)
        check_at_least(self, 0, "balance")
        fits = self.top_k <= self.memories
        check(self, "top_k", fits, f"must be at most memories={self.memories}")

    def check_width(self, d_model: int) -> None:
        if None in (self.key_size, self.value_size):
            check_heads(self, d_model)


class MoMState(NamedTuple):
    """Memories, and the last inputs of the short convolutions of queries, keys and values.

    The H of memory_BHKV are all heads of the first memory, then those of the second, and so on;
    the shared one is the last.
    """

    memory_BHKV: Float[Array, "B H K V"]
    query_tail_BMF: Float[Array, "B M F"]
    key_tail_BMF: Float[Array, "B M E"]
    value_tail_BMF: Float[Array, "B M Z"]


class MoMMixer(SequenceMixer):
    """Each token writes and reads the memories that a router chooses for it, and a shared one.

    p_t = softmax(W_r x_t), in float32;  w_t = p_t on its top k, 0 elsewhere, divided by its sum
    memory m: as the inner recurrence with the keys, values and gates of m where w_tm > 0, else
              untouched, not even decayed
    o_t = sum_m w_tm memory_m^T q_t + shared^T q_t;   y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
    q, k, v = silu(conv(W x)); of unit norm (q and k) for the delta rules. Queries are common to all
    memories; each has its own W_k, W_v and gates, which share rates and biases.
    Load balance: `balance` * M * sum_m share_m mean_m, share_m of tokens that chose m (their sum is
    k) and mean_m of p over tokens, before the choice; k * `balance` when balanced.

    State: memories, float32 [B, (M + 1) H, K, V], and the tails of the convolutions. Every memory
    runs over every token with its gates closed where it is not chosen: shapes are static and
    nothing is dropped, at M + 1 times the cost of one.
    Source: arXiv:2502.13685, Sec. 3.
    Differs from paper: convolutions see the tokens in order, before routing; the released code
    convolves what was packed by memory, across memories and against time. Keys and values of each
    memory have convolutions of their own. The loss is balanced layer by layer.
    """

    splits_tokens = True

    def __init__(self, config: MoM, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads = config.heads
        self.count = config.memories + config.shared
        self.key_size = config.key_size or d_model // heads
        self.value_size = config.value_size or d_model // heads
        keys, values = heads * self.key_size, heads * self.value_size
        self.router = Linear(d_model, config.memories, rngs=rngs, axes=("head", "embed"))
        self.query = Stream(d_model, keys, config.conv, rngs=rngs)
        self.key = Stream(d_model, self.count * keys, config.conv, rngs=rngs)
        self.value = Stream(d_model, self.count * values, config.conv, rngs=rngs)
        self.gates = GATES[config.inner](d_model, self.count, heads, self.key_size, rngs=rngs)
        self.readout = Readout(d_model, heads, self.value_size, gated=True, rngs=rngs)

    def init_state(self, batch: int) -> MoMState:
        shape = (batch, self.count * self.config.heads, self.key_size, self.value_size)
        tails = (stream.init_tail(batch) for stream in (self.query, self.key, self.value))
        return MoMState(jnp.zeros(shape, jnp.float32), *tails)

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities before the choice, and whether a memory is chosen (0 or 1): [B, T, M]."""
        p_BTM = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), -1)
        order = jnp.arange(self.config.memories)
        first_MM = order[:, None] > order[None, :]  # of equals, the first is preferred
        p, other = p_BTM[..., :, None], p_BTM[..., None, :]
        rank_BTM = jnp.sum((other > p) | ((other == p) & first_MM), -1)
        return p_BTM, (rank_BTM < self.config.top_k).astype(jnp.float32)

    def auxiliary_loss(self, state: MoMState, x_BTD: jax.Array, reset_BT: jax.Array) -> jax.Array:
        p_BTM, chosen_BTM = self.route(x_BTD)
        share_M, mean_M = chosen_BTM.mean((0, 1)), p_BTM.mean((0, 1))
        return self.config.balance * self.config.memories * jnp.sum(share_M * mean_M)

    def __call__(
        self,
        state: MoMState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[MoMState, Float[Array, "B T D"]]:
        heads, count = self.config.heads, self.count
        p_BTM, chosen_BTM = self.route(x_BTD)
        for memory in range(self.config.memories):
            telemetry.note(f"router_load_{memory}", chosen_BTM[..., memory])
        weight_BTM = p_BTM * chosen_BTM
        weight_BTM = weight_BTM / jnp.sum(weight_BTM, -1, keepdims=True)
        extra = ((0, 0), (0, 0), (0, int(self.config.shared)))
        weight_BTM = jnp.pad(weight_BTM, extra, constant_values=1.0)
        open_BTH = jnp.repeat(jnp.pad(chosen_BTM, extra, constant_values=1.0), heads, -1)
        query_tail_BMF, q_BTF = self.query(state.query_tail_BMF, x_BTD, reset_BT)
        key_tail_BMF, k_BTF = self.key(state.key_tail_BMF, x_BTD, reset_BT)
        value_tail_BMF, v_BTF = self.value(state.value_tail_BMF, x_BTD, reset_BT)
        q_BTHK, k_BTHK = split_heads(q_BTF, heads), split_heads(k_BTF, count * heads)
        if self.config.inner in DELTA_RULES:
            q_BTHK, k_BTHK = l2_normalise(q_BTHK), l2_normalise(k_BTHK)
        o_BTHV, memory_BHKV = self._recur(
            jnp.tile(q_BTHK, (1, 1, count, 1)),
            k_BTHK,
            split_heads(v_BTF, count * heads),
            open_BTH,
            x_BTD,
            state.memory_BHKV,
            reset_BT,
        )
        o_BTMHV = o_BTHV.reshape(*x_BTD.shape[:2], count, heads, -1)
        o_BTHV = weighted_sum(o_BTMHV, weight_BTM[..., None, None], 2).astype(x_BTD.dtype)
        state = MoMState(memory_BHKV, query_tail_BMF, key_tail_BMF, value_tail_BMF)
        return state, self.readout(o_BTHV, x_BTD)

    def _recur(self, q_BTHK, k_BTHK, v_BTHV, open_BTH, x_BTD, memory_BHKV, reset_BT):
        """The inner recurrence of all memories, H being all their heads."""
        strength_BTH, log_decay = self.gates(x_BTD)
        if log_decay is not None:
            log_decay = log_decay * open_BTH.reshape(*open_BTH.shape, *[1] * (log_decay.ndim - 3))
        telemetry.note_gates(log_decay, strength_BTH)
        settings = dict(chunk=self.config.chunk, impl=self.config.impl)
        if strength_BTH is not None:
            beta_BTH = strength_BTH * open_BTH
            return delta_rule(
                q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, memory_BHKV, reset_BT, **settings
            )
        k_BTHK = k_BTHK * open_BTH[..., None].astype(k_BTHK.dtype)
        return linear_attention(
            q_BTHK, k_BTHK, v_BTHV, log_decay, memory_BHKV, reset_BT, **settings
        )

    def memory_report(self, segment: int = 1024, state: MoMState | None = None) -> MemoryReport:
        each = 6.0 if self.config.inner in DELTA_RULES else 4.0
        recurrence = each * self.count * self.config.heads * self.key_size * self.value_size
        flops = projection_flops(self) + recurrence
        if state is None:
            return MemoryReport(state_bytes(self), flops, recurrence, {})
        memory_BHKV = state.memory_BHKV
        memory_BMF = memory_BHKV.reshape(memory_BHKV.shape[0], self.count, -1)
        norm_M = jnp.sqrt(jnp.sum(jnp.square(memory_BMF), (0, 2)))
        telemetry = {f"state_norm_{i}": norm for i, norm in enumerate(norm_M)}
        telemetry["state_norm"] = jnp.linalg.norm(memory_BHKV)
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
