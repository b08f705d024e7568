"""Ends that recurrences share: streams of queries, keys and values going in, and the read-out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.layers import Linear, RMSNorm, ShortConv


def split_heads(x_BTF: Float[Array, "B T F"], heads: int) -> Float[Array, "B T H K"]:
    return x_BTF.reshape(*x_BTF.shape[:2], heads, -1)


class Stream(nnx.Module):
    """y = silu(conv(W x)): queries, keys or values, all heads side by side.

    conv: width of the short convolution; None for none. Its tail, the last width - 1 values of
    W x in the document, is state: [B, width - 1, size], float32.
    """

    def __init__(self, d_model: int, size: int, conv: int | None, *, rngs: nnx.Rngs):
        self.project = Linear(d_model, size, rngs=rngs, axes=("heads", "embed"))
        self.conv = ShortConv(size, conv, rngs=rngs) if conv else None
        self.size, self.reach = size, (conv or 1) - 1

    def init_tail(self, batch: int) -> Float[Array, "B M F"]:
        return jnp.zeros((batch, self.reach, self.size), jnp.float32)

    def __call__(
        self,
        tail_BMF: Float[Array, "B M F"],
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B M F"], Float[Array, "B T F"]]:
        y_BTF = self.project(x_BTD)
        if self.conv is not None:
            tail_BMF, y_BTF = self.conv(tail_BMF, y_BTF, reset_BT)
        return tail_BMF, jax.nn.silu(y_BTF)


class Readout(nnx.Module):
    """y = W_o (RMSNorm(o) * silu(W_g x)), the norm over each head; without W_g if not `gated`."""

    def __init__(self, d_model: int, heads: int, size: int, *, gated: bool, rngs: nnx.Rngs):
        values, axes = heads * size, ("heads", "embed")
        self.gate = Linear(d_model, values, rngs=rngs, axes=axes) if gated else None
        self.norm = RMSNorm(size, axes=("value",))
        self.out = Linear(values, d_model, rngs=rngs, axes=("embed", "heads"))

    def __call__(
        self, o_BTHV: Float[Array, "B T H V"], x_BTD: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        y_BTF = self.norm(o_BTHV).reshape(*x_BTD.shape[:2], -1)
        if self.gate is not None:
            y_BTF = y_BTF * jax.nn.silu(self.gate(x_BTD))
        return self.out(y_BTF.astype(x_BTD.dtype))
