"""The diagonal scan on a TPU: the body of a chunk, for `pallas_kernels.chunk_scan_tpu`.

Channels of one token lie in up to 8 rows of 128, one register, so that every instruction works on
as many; the tokens of a chunk are unrolled, and their state stays in registers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan

COLUMNS, ROWS = 128, 8
LARGEST_CHUNK = 64  # tokens that are unrolled


@dataclasses.dataclass(frozen=True)
class ChunkBody:
    """h = exp(g) h + x, token by token; a token is `rows` rows of x and g."""

    rows: int

    def __call__(self, consts: Any, fresh_1C: Any, xs: Any, h_RE: jax.Array):
        x, log_decay = xs
        decay, states = jnp.exp(log_decay), []
        for t in range(x.shape[0] // self.rows):
            token = slice(t * self.rows, (t + 1) * self.rows)
            if fresh_1C is not None:
                h_RE = jnp.where(fresh_1C[:, t : t + 1] > 0, 0.0, h_RE)
            h_RE = decay[token] * h_RE + x[token]
            states.append(h_RE)
        return jnp.concatenate(states, axis=0), h_RE


def unfit(x: jax.Array, log_decay: jax.Array, *, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    reason = lanes.dtype_unfit(x=x, log_decay=log_decay) or lanes.chunk_unfit(chunk)
    if reason is None and chunk > LARGEST_CHUNK:
        return f"chunk={chunk} must be at most {LARGEST_CHUNK}, because its tokens are unrolled"
    return reason


def diagonal_scan_tpu(x, log_decay, initial_state, reset, *, chunk):
    """Same as the reference; see `pallas_kernels.diagonal_scan` for shapes."""
    batch, tokens, channels = x.shape
    columns = COLUMNS if channels % COLUMNS == 0 else channels
    rows = math.gcd(channels // columns, ROWS)
    blocks, length = channels // (columns * rows), lanes.chunk_length(chunk, tokens)

    def fold(x_BTE: jax.Array) -> jax.Array:
        """`[B, T, E]` to `[lanes, L rows, columns]`."""
        x_BLE = lanes.pad_tokens(x_BTE, length)
        x_BLDRE = x_BLE.reshape(batch, -1, blocks, rows, columns)
        return jnp.swapaxes(x_BLDRE, 1, 2).reshape(batch * blocks, -1, columns)

    fresh = None
    if reset is not None:
        fresh_BL = lanes.pad_tokens(reset.astype(jnp.float32), length)
        fresh = fresh_BL.reshape(batch, -1, 1, length)
    state = lanes.fold_state(initial_state, batch, blocks, rows, columns, like=x)
    interpreter = dispatch.current_target().interpreter
    plan = Plan(ChunkBody(rows), length * rows, x.dtype, interpreter)
    h, last = chunk_scan(plan, None, fresh, (fold(x), fold(log_decay)), state)
    h_BDLRE = h.reshape(batch, blocks, -1, rows, columns)
    h_BTE = jnp.swapaxes(h_BDLRE, 1, 2).reshape(batch, -1, channels)[:, :tokens]
    return h_BTE, last.reshape(batch, channels)
