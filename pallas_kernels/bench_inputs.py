"""Arguments for `pallas_kernels.bench`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def draw(shape: Shape, seed: int, tokens: int | None = None) -> dict[str, np.ndarray]:
    """Arguments in float64; the recurrences have a decay a head, or a channel if so named."""
    normal = np.random.default_rng(seed).standard_normal
    tokens = shape.tokens if tokens is None else tokens
    batch, heads, size = shape.batch, shape.heads, shape.size
    args = {name: normal((batch, tokens, heads, size)) for name in "qkv"}
    if shape.base == "attention":
        return args
    args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    args["log_decay"] = -np.exp(normal((batch, tokens, *shape.gates)) - 3)
    args["initial_state"] = normal((batch, heads, size, size))
    if shape.op == "delta_rule":
        args["beta"] = 1 / (1 + np.exp(-normal((batch, tokens, heads))))
    return args


@functools.partial(jax.jit, static_argnums=0)
def drawn_there(shape: Shape, seed: jax.Array) -> dict[str, jax.Array]:
    """The same distribution, made on the device."""
    key = jax.random.key(seed)
    keys = dict(zip(("q", "k", "v", "log_decay", "beta"), jax.random.split(key, 5), strict=True))
    sizes = (shape.batch, shape.tokens, shape.heads, shape.size)
    args = {name: jax.random.normal(keys[name], sizes) for name in "qkv"}
    if shape.base != "attention":
        args["k"] /= jnp.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: x.astype(shape.dtype) for name, x in args.items()}
    if shape.base != "attention":
        gates = (*sizes[:2], *shape.gates)
        args["log_decay"] = -jnp.exp(jax.random.normal(keys["log_decay"], gates) - 3)
        args["initial_state"] = jnp.zeros((shape.batch, shape.heads, shape.size, shape.size))
    if shape.op == "delta_rule":
        args["beta"] = jax.nn.sigmoid(jax.random.normal(keys["beta"], sizes[:3]))
    return args


def placed(args: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    return {n: jnp.asarray(x, dtype if n in "qkv" else jnp.float32) for n, x in args.items()}


def abstract(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of arguments."""
    return jax.eval_shape(functools.partial(drawn_there, shape), jnp.int32(0))
