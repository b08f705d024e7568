"""Test-time training: a memory whose weights take gradient steps on the tokens it reads."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check, check_at_least
from memjax.layers import Linear, ShortConv, check_heads, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.norms import unit_rms
from memjax.ops import ttt_linear, ttt_mlp
from memjax.positions import Rotary, apply_position, positions
from pallas_kernels.blocks import BlockState
from pallas_kernels.sums import scaled
from pallas_kernels.ttt import LinearMemory, MLPMemory, Norm, init_ttt

Implementation = Literal["auto", "reference", "xla", "tpu", "gpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTLinear(MixerConfig):
    """update_every: tokens of one inner gradient step; part of the mathematics.

    base_rate: the largest inner learning rate. conv: width of the short convolutions on queries and
    keys; None for none. rotary_base: of the rotary positions inside a block.
    """

    kind: ClassVar[str] = "ttt_linear"
    heads: int = 4
    update_every: int = 16
    base_rate: float = 1.0
    conv: int | None = 4
    rotary_base: float = 10_000.0
    impl: Implementation = "auto"

    def __post_init__(self):
        _check(self)

    def check_width(self, d_model: int) -> None:
        _check_width(self, d_model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTMLP(MixerConfig):
    """As `TTTLinear`; expansion: width of the memory's hidden layer, in head sizes."""

    kind: ClassVar[str] = "ttt_mlp"
    heads: int = 4
    expansion: int = 4
    update_every: int = 16
    base_rate: float = 0.1
    conv: int | None = 4
    rotary_base: float = 10_000.0
    impl: Implementation = "auto"

    def __post_init__(self):
        _check(self)
        check_at_least(self, 1, "expansion")

    def check_width(self, d_model: int) -> None:
        _check_width(self, d_model)


def _check(config: TTTLinear | TTTMLP) -> None:
    check_at_least(config, 1, "heads", "update_every", "conv")
    check(config, "base_rate", config.base_rate > 0, "must be greater than 0")
    check(config, "rotary_base", config.rotary_base > 1, "must be greater than 1")


def _check_width(config: TTTLinear | TTTMLP, d_model: int) -> None:
    check_heads(config, d_model)
    size = d_model // config.heads
    rule = (
        f"leaves heads of {size} channels at d_model={d_model}; rotary positions need an even one"
    )
    check(config, "heads", size % 2 == 0, rule)


class TTTState(NamedTuple):
    """The memory before the current block with the block's tokens, and the convolutions' inputs."""

    memory: BlockState
    tail_BMD: Float[Array, "B M D"]


class _Inputs(NamedTuple):
    q_BTHK: jax.Array
    k_BTHK: jax.Array
    v_BTHK: jax.Array
    rate_BTH: jax.Array
    place_rate_C: jax.Array


class _Backbone(nnx.Module):
    """What surrounds the memory: projections, convolutions, learning rates, norm and gate."""

    def __init__(self, config: TTTLinear | TTTMLP, d_model: int, *, rngs: nnx.Rngs):
        self.config, heads = config, config.heads
        self.shared = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))
        self.value = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))
        self.query_conv, self.key_conv = (
            ShortConv(d_model, config.conv, rngs=rngs, bias=True) if config.conv else None
            for _ in range(2)
        )
        self.rate = Linear(d_model, heads, rngs=rngs, axes=("head", "embed"), bias=True)
        self.place = nnx.Param(jnp.zeros((config.update_every,), jnp.float32), axes=("value",))
        size = d_model // heads
        self.scale = nnx.Param(jnp.ones((heads, size), jnp.float32), axes=("head", "value"))
        self.shift = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=("head", "value"))
        self.post_scale = nnx.Param(jnp.ones((d_model,), jnp.float32), axes=("embed",))
        self.post_shift = nnx.Param(jnp.zeros((d_model,), jnp.float32), axes=("embed",))
        self.gate = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def norm(self) -> Norm:
        return Norm(self.scale[...], self.shift[...])

    def inputs(
        self, state: TTTState, x_BTD: jax.Array, reset_BT: jax.Array
    ) -> tuple[jax.Array, _Inputs]:
        """The next tail of the convolutions, and what the memory reads."""
        config = self.config
        shared_BTD, tail_BMD = self.shared(x_BTD), state.tail_BMD
        streams = []
        for conv in (self.query_conv, self.key_conv):
            stream_BTD = shared_BTD
            if conv is not None:
                tail_BMD, stream_BTD = conv(state.tail_BMD, shared_BTD, reset_BT)
            streams.append(stream_BTD)
        streams.append(self.value(x_BTD))
        q_BTHK, k_BTHK, v_BTHK = (x.reshape(*x.shape[:2], config.heads, -1) for x in streams)
        place_BT = positions(state.memory.count_B, reset_BT) % config.update_every
        position = Rotary(base=config.rotary_base)
        gate_BTH = jax.nn.sigmoid(self.rate(x_BTD).astype(jnp.float32))
        rate_BTH = config.base_rate / q_BTHK.shape[-1] * gate_BTH
        step_C = jnp.arange(1, config.update_every + 1, dtype=jnp.float32)
        return tail_BMD, _Inputs(
            apply_position(position, q_BTHK, place_BT),
            apply_position(position, k_BTHK, place_BT),
            v_BTHK,
            rate_BTH,
            jnp.maximum(1 / step_C + self.place[...], 0),
        )

    def outputs(self, o_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """W_o (LayerNorm(o) * gelu(W_g x))."""
        o_BTD = o_BTHK.reshape(x_BTD.shape).astype(jnp.float32)
        o_BTD = o_BTD - jnp.mean(o_BTD, -1, keepdims=True)
        o_BTD = unit_rms(o_BTD, 1e-6)
        o_BTD = scaled(o_BTD, self.post_scale[...]) + self.post_shift[...]
        return self.out(o_BTD.astype(x_BTD.dtype) * jax.nn.gelu(self.gate(x_BTD)))

    def tail(self, batch: int, d_model: int) -> jax.Array:
        return jnp.zeros((batch, (self.config.conv or 1) - 1, d_model), jnp.float32)


class TTTLinearMixer(SequenceMixer):
    """A matrix a head that is trained on the keys and values it reads, a block to a step.

    f(x; W, c) = x + LN(x W + c);  loss_j = 1/2 |f(k_j; W, c) - v_j|^2
    W_i = W_0 - tau_i sum_{j <= i} rate_j dloss_j/dW at W_0, the weights before the block
    o_i = f(q_i; W_i, c_i);   y = W_o (LayerNorm(o) * gelu(W_g x))
    tau_i = max(1/i + learned_i, 0), i in 1 .. update_every;  rate = base_rate/K sigmoid(W_r x + b)
    q = rotate(conv_q(W x)), k = rotate(conv_k(W x)), v = W_v x; q and k share W

    The first W and c of a document, LN's scale and shift a head, and learned_i are parameters.
    Positions and blocks are counted from the start of the document.
    State: W [B, H, K, K] and c before the current block, its k, v and rate so far, and the inputs
    of the convolutions.
    Source: arXiv:2407.04620, Sec. 2 and 3, the "Mamba backbone" layer.
    Differs from paper: rotary pairs are halves of a head instead of neighbours, which permutes
    channels.
    """

    splits_tokens = True

    def __init__(self, config: TTTLinear, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.d_model = config, d_model
        heads, size = config.heads, d_model // config.heads
        self.backbone = _Backbone(config, d_model, rngs=rngs)
        self.weight = nnx.Param(normal(rngs, (heads, size, size)), axes=("head", "value", "value"))
        self.bias = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=("head", "value"))

    def initial_memory(self) -> LinearMemory:
        return LinearMemory(self.weight[...], self.bias[...])

    def init_state(self, batch: int) -> TTTState:
        memory = init_ttt(self.initial_memory(), batch, update_every=self.config.update_every)
        return TTTState(memory, self.backbone.tail(batch, self.d_model))

    def __call__(
        self, state: TTTState, x_BTD: Float[Array, "B T D"], reset_BT: Bool[Array, "B T"]
    ) -> tuple[TTTState, Float[Array, "B T D"]]:
        tail_BMD, inputs = self.backbone.inputs(state, x_BTD, reset_BT)
        memory, norm = self.initial_memory(), self.backbone.norm()
        o_BTHK, after = ttt_linear(
            *inputs, memory, norm, state.memory, reset_BT, impl=self.config.impl
        )
        return TTTState(after, tail_BMD), self.backbone.outputs(o_BTHK, x_BTD)

    def memory_report(self, segment: int = 1024, state: TTTState | None = None) -> MemoryReport:
        # Of each weight: used for k, its gradient added up, the step taken, used for q.
        size = self.d_model // self.config.heads
        recurrence = 8.0 * self.config.heads * size**2
        return _report(self, recurrence, state)


class TTTMLPMixer(SequenceMixer):
    """`TTTLinearMixer` with two layers for a memory: f(x) = x + LN(gelu(x W + c) U + d).

    All four are trained at test time; hidden width = expansion * K; gelu by its tanh approximation.
    State: W [B, H, K, F], c, U [B, H, F, K] and d before the current block, and the rest.
    Source: arXiv:2407.04620, Sec. 2.7.
    Differs from paper: as `TTTLinearMixer`; U starts from N(0, 0.02) at any depth of the model, as
    the text has it (the released code divides by sqrt(2 layers)).
    """

    splits_tokens = True

    def __init__(self, config: TTTMLP, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config, self.d_model = config, d_model
        heads, size = config.heads, d_model // config.heads
        width = config.expansion * size
        self.backbone = _Backbone(config, d_model, rngs=rngs)
        into, out = normal(rngs, (heads, size, width)), normal(rngs, (heads, width, size))
        self.weight_in = nnx.Param(into, axes=("head", "value", "hidden"))
        self.bias_in = nnx.Param(jnp.zeros((heads, width), jnp.float32), axes=("head", "hidden"))
        self.weight_out = nnx.Param(out, axes=("head", "hidden", "value"))
        self.bias_out = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=("head", "value"))

    def initial_memory(self) -> MLPMemory:
        weights = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        return MLPMemory(*(weight[...] for weight in weights))

    def init_state(self, batch: int) -> TTTState:
        memory = init_ttt(self.initial_memory(), batch, update_every=self.config.update_every)
        return TTTState(memory, self.backbone.tail(batch, self.d_model))

    def __call__(
        self, state: TTTState, x_BTD: Float[Array, "B T D"], reset_BT: Bool[Array, "B T"]
    ) -> tuple[TTTState, Float[Array, "B T D"]]:
        tail_BMD, inputs = self.backbone.inputs(state, x_BTD, reset_BT)
        memory, norm = self.initial_memory(), self.backbone.norm()
        o_BTHK, after = ttt_mlp(
            *inputs, memory, norm, state.memory, reset_BT, impl=self.config.impl
        )
        return TTTState(after, tail_BMD), self.backbone.outputs(o_BTHK, x_BTD)

    def memory_report(self, segment: int = 1024, state: TTTState | None = None) -> MemoryReport:
        # As for one layer, and the gradient that passes through U.
        size = self.d_model // self.config.heads
        recurrence = 18.0 * self.config.heads * self.config.expansion * size**2
        return _report(self, recurrence, state)


def _report(
    mixer: TTTLinearMixer | TTTMLPMixer, recurrence: float, state: TTTState | None
) -> MemoryReport:
    telemetry = {}
    if state is not None:
        carry = state.memory.carry
        moved = jax.tree.map(lambda now, first: now - first, carry, mixer.initial_memory())
        telemetry = {"state_norm": _norm(carry), "moved": _norm(moved)}
    flops = projection_flops(mixer) + recurrence
    return MemoryReport(state_bytes(mixer), flops, recurrence, telemetry)


def _norm(tree: LinearMemory | MLPMemory) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))
