"""The diagonal scan in chunks, plain JAX.

All chunks run their tokens side by side from a state of zero, keeping the running products of
their decays; a scan over chunks then passes the states on. So T tokens take chunk + T / chunk steps
in order. The gradient is the same recurrence in the other direction.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import products


def diagonal_scan_chunked(x, log_decay, initial_state, reset, *, chunk):
    """Same as the reference; see `pallas_kernels.diagonal_scan` for shapes."""
    dtype = products.accumulation_dtype(x, log_decay)
    batch, tokens, channels = x.shape
    decay_BTE = jnp.exp(log_decay.astype(dtype))
    if reset is not None:
        decay_BTE = jnp.where(reset[:, :, None], 0, decay_BTE)
    if initial_state is None:
        state_BE = jnp.zeros((batch, channels), dtype)
    else:
        state_BE = initial_state.astype(dtype)
    h_BTE = _scan(x.astype(dtype), decay_BTE, state_BE, min(chunk, tokens))
    return h_BTE.astype(x.dtype), h_BTE[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(x_BTE: jax.Array, decay_BTE: jax.Array, state_BE: jax.Array, length: int) -> jax.Array:
    return _run(x_BTE, decay_BTE, state_BE, length, reverse=False)


def _forward(x_BTE, decay_BTE, state_BE, length):
    h_BTE = _scan(x_BTE, decay_BTE, state_BE, length)
    return h_BTE, (decay_BTE, h_BTE, state_BE)


def _backward(length, residuals, d_h_BTE):
    decay_BTE, h_BTE, state_BE = residuals
    following_BTE = jnp.pad(decay_BTE[:, 1:], ((0, 0), (0, 1), (0, 0)))
    d_x_BTE = _run(d_h_BTE, following_BTE, jnp.zeros_like(state_BE), length, reverse=True)
    before_BTE = jnp.concatenate([state_BE[:, None], h_BTE[:, :-1]], 1)
    return d_x_BTE, d_x_BTE * before_BTE, decay_BTE[:, 0] * d_x_BTE[:, 0]


_scan.defvjp(_forward, _backward)


def _run(x_BTE, decay_BTE, state_BE, length, *, reverse):
    tokens = x_BTE.shape[1]
    x_CNBE, decay_CNBE = _split(x_BTE, length, 0), _split(decay_BTE, length, 1)

    def one_token(carry, xs):
        inside_NBE, through_NBE = carry
        x_NBE, decay_NBE = xs
        carry = decay_NBE * inside_NBE + x_NBE, decay_NBE * through_NBE
        return carry, carry

    def one_chunk(state_BE, xs):
        inside_BE, through_BE = xs
        return through_BE * state_BE + inside_BE, state_BE

    zeros = jnp.zeros_like(x_CNBE[0])
    empty = (zeros, jnp.ones_like(zeros))
    whole, parts = lax.scan(one_token, empty, (x_CNBE, decay_CNBE), reverse=reverse)
    _, entering_NBE = lax.scan(one_chunk, state_BE, whole, reverse=reverse)
    inside_CNBE, through_CNBE = parts
    return _join(inside_CNBE + through_CNBE * entering_NBE, tokens)


def _split(x_BTE: jax.Array, length: int, fill: float) -> jax.Array:
    """`[B, T, E]` to `[C, N, B, E]`, with `fill` behind the last token."""
    batch, tokens, channels = x_BTE.shape
    chunks = -(-tokens // length)
    padding = ((0, 0), (0, chunks * length - tokens), (0, 0))
    x_BTE = jnp.pad(x_BTE, padding, constant_values=fill)
    return jnp.transpose(x_BTE.reshape(batch, chunks, length, channels), (2, 1, 0, 3))


def _join(x_CNBE: jax.Array, tokens: int) -> jax.Array:
    """`[C, N, B, E]` to `[B, T, E]`, without the padding."""
    length, chunks, batch, channels = x_CNBE.shape
    x_BTE = jnp.transpose(x_CNBE, (2, 1, 0, 3)).reshape(batch, chunks * length, channels)
    return x_BTE[:, :tokens]
