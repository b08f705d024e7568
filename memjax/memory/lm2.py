"""LM2: a bank of slots beside every layer, read by tokens and rewritten once a segment."""

import dataclasses
import math
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check, check_at_least
from memjax.layers import Linear, check_heads
from memjax.memory.base import LayerMemory, LayerModule
from memjax.mixers.base import MemoryReport, state_bytes
from pallas_kernels.blocks import BlockState, Body, init_blocks, scan_blocks

OUTPUT_BIAS = -2.0
FORGET_BIAS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM2(LayerMemory):
    """slots: rows of a bank, at most d_model. segment: tokens between two writes, from the start of
    the document. heads: of the attention with which tokens read and slots write.
    """

    kind: ClassVar[str] = "lm2"
    slots: int = 32
    segment: int = 128
    heads: int = 4

    def __post_init__(self):
        check_at_least(self, 1, "slots", "segment", "heads")

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        check_heads(self, model.d_model)
        rule = f"must be at most d_model={model.d_model}: slots start as rows of the identity"
        check(self, "slots", self.slots <= model.d_model, rule)


class LM2Module(LayerModule):
    """Tokens read the bank as it was before their segment; at its end, slots read the segment.

    read:   e = attention of tokens on slots (q = W_q x, k = W_k M, v = W_v M)
            y = sigmoid(W_out e + b_out) * e
    write:  u = attention of slots on tokens (q = W'_q M, k = W'_k x, v = W'_v x)
            M = sigmoid(W_in u + b_in) * tanh(u) + sigmoid(W_f u + b_f) * M

    Attention has `heads` heads and logits divided by the square root of their size. M starts as
    rows of the identity; b_out = -2, so that a model begins near the one without memory; b_f = 1.
    The gradient flows through all segments that a training step reads.
    State: M, `slots` x D float32, and the tokens of the unfinished segment, (segment - 1) x D.
    Source: arXiv:2502.06049, Sec. 2.
    Differs from paper: its formula for writing has the tokens' shape where the bank's is needed,
    and its code pools the whole sequence into the gate, the future included, and hands one bank
    from layer to layer. Here slots attend to the segment, each layer has a bank of its own, and
    what a segment writes is read from the next one on. Biases are ours.
    """

    def __init__(self, config: LM2, d_model: int, *, rngs: nnx.Rngs):
        self.config, self.d_model = config, d_model

        def linear(bias: float | None = None) -> Linear:
            module = Linear(
                d_model, d_model, rngs=rngs, axes=("heads", "embed"), bias=bias is not None
            )
            if bias is not None:
                module.bias = nnx.Param(jnp.full(d_model, bias), axes=("heads",))
            return module

        self.query, self.key, self.value = linear(), linear(), linear()
        self.write_query, self.write_key, self.write_value = linear(), linear(), linear()
        self.output_gate = linear(OUTPUT_BIAS)
        self.input_gate, self.forget_gate = linear(0.0), linear(FORGET_BIAS)

    def _start(self) -> Float[Array, "M D"]:
        return jnp.eye(self.config.slots, self.d_model)

    def init_state(self, batch: int) -> BlockState:
        x_BTD = jax.ShapeDtypeStruct((batch, 1, self.d_model), jnp.float32)
        return init_blocks(self._start(), x_BTD, block=self.config.segment)

    def __call__(
        self,
        state: BlockState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
        shared: nnx.Module | None,
    ) -> tuple[BlockState, Float[Array, "B T D"]]:
        definition, params = nnx.split(self)
        y_BTD, state = scan_blocks(
            _body(definition),
            params,
            self._start(),
            state,
            x_BTD,
            reset_BT,
            block=self.config.segment,
        )
        return state, y_BTD

    def read(self, bank_BMD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """What the tokens take from the bank."""
        bank_BMD = bank_BMD.astype(x_BTD.dtype)
        keys, values = self.key(bank_BMD), self.value(bank_BMD)
        e_BTD = attend(self.query(x_BTD), keys, values, self.config.heads)
        return jax.nn.sigmoid(self.output_gate(e_BTD)) * e_BTD

    def write(self, bank_BMD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """The bank after a segment."""
        queries = self.write_query(bank_BMD.astype(x_BTD.dtype))
        keys, values = self.write_key(x_BTD), self.write_value(x_BTD)
        u_BMD = attend(queries, keys, values, self.config.heads).astype(jnp.float32)
        new_BMD = jax.nn.sigmoid(self.input_gate(u_BMD)) * jnp.tanh(u_BMD)
        return new_BMD + jax.nn.sigmoid(self.forget_gate(u_BMD)) * bank_BMD

    def memory_report(self, segment: int = 1024, state: BlockState | None = None) -> MemoryReport:
        slots, width = self.config.slots, self.d_model
        matrix = 2.0 * width * width
        a_slot = (3 + 2) * matrix / self.config.segment  # query, two gates, key and value
        recurrence = slots * (a_slot + 8.0 * width)  # attention of tokens, and of slots
        flops = recurrence + 4 * matrix  # of a token: query, key and value to write, output gate
        told = {} if state is None else {"state_norm": jnp.linalg.norm(state.carry)}
        return MemoryReport(state_bytes(self), flops, recurrence, told)


def attend(q_BTD: jax.Array, k_BJD: jax.Array, v_BJD: jax.Array, heads: int) -> jax.Array:
    """softmax(q k / sqrt(K)) v with so many heads; leading axes are shared."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, -1)

    q_BTHK, k_BJHK, v_BJHK = split(q_BTD), split(k_BJD), split(v_BJD)
    scores_BHTJ = jnp.einsum(
        "...thk,...jhk->...htj", q_BTHK, k_BJHK, preferred_element_type=jnp.float32
    )
    weights_BHTJ = jax.nn.softmax(scores_BHTJ / math.sqrt(q_BTHK.shape[-1]), -1)
    o_BTHK = jnp.einsum(
        "...htj,...jhk->...thk",
        weights_BHTJ.astype(v_BJD.dtype),
        v_BJHK,
        preferred_element_type=jnp.float32,
    )
    return o_BTHK.reshape(q_BTD.shape).astype(q_BTD.dtype)


@cache
def _body(definition: nnx.GraphDef) -> Body:
    """The same object for the same module, because it is compared."""
    return Body(step=partial(_step, definition), finish=partial(_finish, definition))


def _step(definition: nnx.GraphDef, params: Any, bank_BMD: jax.Array, x_BCD: jax.Array):
    return nnx.merge(definition, params).write(bank_BMD, x_BCD), ()


def _finish(definition: nnx.GraphDef, params: Any, bank_NBMD: jax.Array, x_NBCD: jax.Array, kept):
    return nnx.merge(definition, params).read(bank_NBMD, x_NBCD)
