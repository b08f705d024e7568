"""Arguments for `pallas_kernels.bench`."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import MLSTMMemory

DOCUMENTS = 4  # in a row of "attention.documents", of equal lengths


class Shape(NamedTuple):
    op: str  # of `pallas_kernels`, and behind a point what is special about its arguments
    batch: int
    tokens: int
    heads: int
    size: int  # K = V
    dtype: str

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @property
    def gates(self) -> tuple[int, ...]:
        """Axes of a decay behind its tokens."""
        return (self.heads, self.size) if self.op.endswith(".channel") else (self.heads,)


def documents(batch: int, tokens: int) -> jax.Array:
    """Ids of documents side by side, `[B, T]`."""
    return jnp.broadcast_to(jnp.arange(tokens) * DOCUMENTS // tokens, (batch, tokens))


@functools.partial(jax.jit, static_argnums=0)
def draw(shape: Shape, seed: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    """Arguments, and cotangents of the outputs, made on the device.

    The recurrences have a decay a head, or a channel if so named; numbers of tokens and states are
    float32. Keys have length 1, but those of the mLSTM, whose memory is divided by a sum of them.
    """
    normal = functools.partial(_normal, jax.random.key(seed))
    sizes = (shape.batch, shape.tokens, shape.heads, shape.size)
    args = {name: normal(name, sizes) for name in "qkv"}
    d_o = normal("d_o", sizes).astype(shape.dtype)
    if shape.base == "attention":
        return {name: x.astype(shape.dtype) for name, x in args.items()}, d_o
    if shape.op == "mlstm":
        return _mlstm(shape, args, d_o, normal)
    args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: x.astype(shape.dtype) for name, x in args.items()}
    args["log_decay"] = -jnp.exp(normal("log_decay", (*sizes[:2], *shape.gates)) - 3)
    if shape.op == "delta_rule":
        args["beta"] = jax.nn.sigmoid(normal("beta", sizes[:3]))
    state = (shape.batch, shape.heads, shape.size, shape.size)
    args["initial_state"] = normal("initial_state", state)
    return args, (d_o, normal("d_state", state))


def _mlstm(shape: Shape, args: dict, d_o: jax.Array, normal: Any) -> tuple[dict, Any]:
    gates, lanes = (shape.batch, shape.tokens, shape.heads), (shape.batch, shape.heads)
    args = {name: x.astype(shape.dtype) for name, x in args.items()}
    args["log_input"] = normal("log_input", gates)
    args["log_forget"] = jax.nn.log_sigmoid(normal("log_forget", gates) + 3)
    sizes = (*lanes, shape.size, shape.size), (*lanes, shape.size), lanes
    args["initial_state"], d_state = (
        MLSTMMemory(*(normal(name + part, size) for part, size in zip("Cnm", sizes)))
        for name in ("state", "d_state")
    )
    return args, (d_o, d_state)


def _normal(key: jax.Array, name: str, sizes: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), sizes)


def abstract(shape: Shape) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
    """Their shapes."""
    return jax.eval_shape(functools.partial(draw, shape), jnp.int32(0))
