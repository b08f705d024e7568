"""mLSTM, the matrix memory of the xLSTM, in the block of its paper."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, LinearPair, ShortConv, dot_transposed, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.norms import unit_rms
from memjax.ops import mlstm
from pallas_kernels import MLSTMMemory
from pallas_kernels.once import once
from pallas_kernels.sums import scaled

FORGET_RANGE = (3.0, 6.0)
INPUT_STD = 0.1
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTM(MixerConfig):
    """expand: inner channels for each channel of the model.

    block: channels that a query, key or value channel is made of; it divides those of a head.
    conv: width of the short convolution ahead of queries and keys.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "mlstm"
    heads: int = 4
    expand: int = 2
    block: int = 4
    conv: int = 4
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "expand", "block", "conv", "chunk")

    def check_width(self, d_model: int) -> None:
        inner = self.expand * d_model
        check(self, "heads", inner % self.heads == 0, f"must divide expand * d_model = {inner}")
        size = inner // self.heads
        check(self, "block", size % self.block == 0, f"must divide the {size} channels of a head")


class MLSTMState(NamedTuple):
    """The memory with its normaliser and level, and the last inputs of the convolution."""

    memory: MLSTMMemory
    tail_BMF: Float[Array, "B M F"]


class Blocks(nnx.Module):
    """A block-diagonal linear map: channel j of a head mixes those that lie K / block apart.

    y[h, f, j] = sum_e weight[h, f, e, j] x[h, e, j], channel (e, j) of head h being e K / block + j
    """

    def __init__(self, heads: int, size: int, block: int, *, std: float, rngs: nnx.Rngs):
        weight = normal(rngs, (heads, block, block, size // block), std)
        self.weight = nnx.Param(weight, axes=("head", "rank", "rank", "value"))

    def __call__(self, x_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        return block_product(x_BTHK, self.weight[...].astype(x_BTHK.dtype))


@jax.custom_vjp
def block_product(x_BTHK: jax.Array, weight_HFEJ: jax.Array) -> jax.Array:
    """The map of `Blocks`."""
    _, size, _, apart = weight_HFEJ.shape
    x_BTHEJ = x_BTHK.reshape(*x_BTHK.shape[:3], size, apart)
    terms = (weight_HFEJ[:, :, e] * x_BTHEJ[..., e : e + 1, :] for e in range(size))
    return sum(terms, start=jnp.zeros((), x_BTHK.dtype)).reshape(x_BTHK.shape)


def _block_product_forward(x_BTHK, weight_HFEJ):
    return block_product(x_BTHK, weight_HFEJ), (x_BTHK, weight_HFEJ)


def _block_product_backward(residuals, dy_BTHK):
    """The gradient of the weights is taken from one dense product a head: on a CPU that is faster
    than a sum over tokens for each entry. x comes first because XLA transposes the first operand
    there, and would transpose dy entry by entry while it computes it."""
    x_BTHK, weight_HFEJ = residuals
    dy_BTHK = once(dy_BTHK)
    dx_BTHK = block_product(dy_BTHK, jnp.swapaxes(weight_HFEJ, 1, 2))
    heads, size, _, apart = weight_HFEJ.shape
    dense = jnp.einsum("bthl,bthk->bhlk", x_BTHK, dy_BTHK, preferred_element_type=jnp.float32)
    blocks = jnp.einsum("hejfj->hfej", dense.sum(0).reshape(heads, size, apart, size, apart))
    return dx_BTHK, blocks.astype(weight_HFEJ.dtype)


block_product.defvjp(_block_product_forward, _block_product_backward)


class MLSTMMixer(SequenceMixer):
    """A matrix memory with an exponential input gate, inside an inner width of its own.

    C_t = forget_t C_{t-1} + input_t k_t v_t^T;   n_t = forget_t n_{t-1} + input_t k_t
    h_t = C_t^T q_t / max(|n_t^T q_t|, 1), with q scaled by K^(-1/2)
    y_t = W_down ((LayerNorm(h_t) + skip * c_t) * silu(z_t)), the norm over each head
    (u, z)_t = W_up x_t;   c = silu(conv(u) + bias)
    q, k = block-diagonal maps of c, v of u; log input = W_i (q, k, v) + b_i,
    log forget = log_sigmoid(W_f (q, k, v) + b_f), one number a head; W_i and W_f start at zero

    State: C, n and their level (`pallas_kernels.mlstm`), float32, and the tail of the convolution.
    Source: arXiv:2405.04517, Sec. 2.3 and App. A (Fig. 11), which scales k where this scales q.
    W_up and the block-diagonal maps start from N(0, sqrt(2 / (5 d_model))), as in released code.
    Differs from paper: the channels of a block lie K / block apart in the head instead of side by
    side, which is a reordering of the rows of W_up; the level is at least 0; W_down starts from
    N(0, 0.02) at any depth (the released code: 2 / layers / sqrt(d_model)).
    """

    splits_tokens = True

    def __init__(self, config: MLSTM, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads, inner = config.heads, config.expand * d_model
        self.size = inner // heads
        std = math.sqrt(2 / (5 * d_model))
        self.up = LinearPair(d_model, inner, rngs=rngs, axes=("heads", "embed"), std=std)
        self.conv = ShortConv(inner, config.conv, rngs=rngs, bias=True)
        self.query, self.key, self.value = (
            Blocks(heads, self.size, config.block, std=std, rngs=rngs) for _ in range(3)
        )
        gates = jnp.zeros((2 * heads, 3 * inner), jnp.float32)
        self.gate_weight = nnx.Param(gates, axes=("head", "heads"))
        input_H = INPUT_STD * jax.random.normal(rngs.params(), (heads,), jnp.float32)
        bias = jnp.concatenate([input_H, jnp.linspace(*FORGET_RANGE, heads)])
        self.gate_bias = nnx.Param(bias, axes=("head",))
        self.norm = nnx.Param(jnp.ones((inner,), jnp.float32), axes=("heads",))
        self.skip = nnx.Param(jnp.ones((inner,), jnp.float32), axes=("heads",))
        self.down = Linear(inner, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> MLSTMState:
        heads, size = self.config.heads, self.size
        memory = MLSTMMemory(
            jnp.zeros((batch, heads, size, size), jnp.float32),
            jnp.zeros((batch, heads, size), jnp.float32),
            jnp.zeros((batch, heads), jnp.float32),
        )
        tail = (batch, self.config.conv - 1, heads * size)
        return MLSTMState(memory, jnp.zeros(tail, jnp.float32))

    def gates(self, *streams_BTHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log input and log forget, [B, T, H] in float32, from queries, keys and values."""
        weights = jnp.split(self.gate_weight[...], 3, 1)
        score_BTF = self.gate_bias[...]
        for stream_BTHK, weight in zip(streams_BTHK, weights):
            stream_BTE = stream_BTHK.reshape(*stream_BTHK.shape[:2], -1)
            score_BTF = score_BTF + dot_transposed(stream_BTE, weight, jnp.float32)
        log_input_BTH, forget_BTH = jnp.split(score_BTF, 2, -1)
        return log_input_BTH, jax.nn.log_sigmoid(forget_BTH)

    def __call__(
        self,
        state: MLSTMState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[MLSTMState, Float[Array, "B T D"]]:
        u_BTE, z_BTE = self.up(x_BTD)
        u_BTE = once(u_BTE)
        tail_BMF, c_BTE = self.conv(state.tail_BMF, u_BTE, reset_BT)
        c_BTE = once(jax.nn.silu(c_BTE))
        u_BTHK, c_BTHK = (
            x.reshape(*x.shape[:2], self.config.heads, self.size) for x in (u_BTE, c_BTE)
        )
        streams = self.query(c_BTHK), self.key(c_BTHK), self.value(u_BTHK)
        log_input_BTH, log_forget_BTH = self.gates(*streams)
        telemetry.note_gates(log_forget_BTH)
        h_BTHV, memory = mlstm(
            *streams,
            log_input_BTH,
            log_forget_BTH,
            state.memory,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        h_BTE = self._normalise(h_BTHV) + scaled(c_BTE, self.skip[...].astype(x_BTD.dtype))
        return MLSTMState(memory, tail_BMF), self.down(h_BTE * jax.nn.silu(z_BTE))

    def _normalise(self, h_BTHV: jax.Array) -> jax.Array:
        """LayerNorm of each head, without bias, statistics in float32: [B, T, E]."""
        wide = h_BTHV.astype(jnp.float32)
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = unit_rms(wide, NORM_EPS)
        wide = wide.reshape(*wide.shape[:2], -1)
        return scaled(wide, self.norm[...]).astype(h_BTHV.dtype)

    def memory_report(self, segment: int = 1024, state: MLSTMState | None = None) -> MemoryReport:
        recurrence = 4.0 * self.config.heads * self.size * (self.size + 1)
        blocks = 6.0 * self.config.heads * self.size * self.config.block
        told = {} if state is None else {"level": jnp.mean(state.memory.level_BH)}
        # In chunks, scores and sums over them: as much as the recurrence where chunk = size.
        recurrence += 4.0 * self.config.heads * self.size * min(self.config.chunk, segment)
        flops = projection_flops(self) + blocks + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, told)
