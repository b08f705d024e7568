"""The selective scan on a TPU: the body of a chunk, for `pallas_kernels.chunk_scan_tpu`.

A lane is a block of channels of one row of the batch; its states `[N, E]` have channels across and
stay in registers through the tokens of a chunk, which are unrolled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan
from pallas_kernels.products import accumulation_dtype

CHANNELS = 128  # a lane, where they divide
LARGEST_CHUNK = 64  # tokens that are unrolled


def chunk_body(rate_NE: jax.Array, fresh_1C: Any, xs: Any, h_NE: jax.Array):
    """h = exp(dt A) h + B (dt x);  y = sum over states of C h, token by token."""
    x_CE, dt_CE, write_NC, read_NC = xs
    written_CE = dt_CE * x_CE
    rows = []
    for t in range(x_CE.shape[0]):
        token = slice(t, t + 1)
        if fresh_1C is not None:
            h_NE = jnp.where(fresh_1C[:, token] > 0, 0.0, h_NE)
        h_NE = jnp.exp(dt_CE[token] * rate_NE) * h_NE + write_NC[:, token] * written_CE[token]
        rows.append(jnp.sum(read_NC[:, token] * h_NE, axis=0, keepdims=True))
    return jnp.concatenate(rows, axis=0), h_NE


def unfit(*arrays: jax.Array, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    named = dict(zip(("x", "dt", "A", "B", "C"), arrays))
    reason = lanes.dtype_unfit(**named) or lanes.chunk_unfit(chunk)
    if reason is None and chunk > LARGEST_CHUNK:
        return f"chunk={chunk} must be at most {LARGEST_CHUNK}, because its tokens are unrolled"
    return reason


def selective_scan_tpu(x, dt, A, B, C, D, initial_state, reset, *, chunk):
    """Same as the reference; see `pallas_kernels.selective_scan` for shapes."""
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x, dt, A, B, C)
    width = CHANNELS if channels % CHANNELS == 0 else channels
    blocks, length = channels // width, lanes.chunk_length(chunk, tokens)

    def fold(x_BTE: jax.Array) -> jax.Array:
        return lanes.fold(x_BTE.reshape(batch, tokens, blocks, width), length)

    def columns(x_BTN: jax.Array) -> jax.Array:
        """`[B, T, N]` to `[lanes, chunks, N, C]`, the same for all blocks of channels."""
        x_BLN = lanes.pad_tokens(x_BTN.astype(jnp.float32), length)
        x_BICN = x_BLN.reshape(batch, -1, length, x_BLN.shape[2])
        return jnp.repeat(jnp.swapaxes(x_BICN, 2, 3), blocks, axis=0)

    def states(x_BEN: jax.Array) -> jax.Array:
        x_BDEN = x_BEN.astype(jnp.float32).reshape(-1, blocks, width, x_BEN.shape[2])
        return jnp.swapaxes(x_BDEN, 2, 3).reshape(-1, x_BEN.shape[2], width)

    rate = states(jnp.broadcast_to(A, (batch, *A.shape)))
    fresh = None
    if reset is not None:
        fresh_BL = lanes.pad_tokens(reset.astype(jnp.float32), length)
        fresh = fresh_BL.reshape(batch, -1, 1, length)
    h = jnp.zeros_like(rate) if initial_state is None else states(initial_state)
    xs = (fold(x), fold(dt), columns(B), columns(C))
    plan = Plan(chunk_body, length, jnp.float32, dispatch.current_target().interpreter)
    y_NLE, h = chunk_scan(plan, rate, fresh, xs, h)
    y_BTE = lanes.unfold(y_NLE, batch, tokens).reshape(batch, tokens, channels)
    y_BTE = y_BTE if D is None else y_BTE + D.astype(jnp.float32) * x
    h_BDNE = h.reshape(batch, blocks, A.shape[1], width)
    h_BEN = jnp.swapaxes(h_BDNE, 2, 3).reshape(batch, channels, A.shape[1])
    return y_BTE.astype(x.dtype), h_BEN.astype(dtype)
