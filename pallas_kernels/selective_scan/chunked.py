"""The selective scan in chunks, plain JAX.

Each state is read, and its gradient is formed, while it lies in the cache of the processor: tokens
run in order, and one token's states [B, N, E], with the channels as vector lanes, are the unit of
work. The forward pass keeps the state that enters each chunk. The backward pass takes a chunk at a
time: it runs the tokens again, keeping the faded states of that chunk alone, then runs them in
reverse. Inside, arrays are [chunk, token, batch, ...].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import products
from pallas_kernels.sums import weighted_sum


class Tokens(NamedTuple):
    """What a token brings: its write `time * x`, its time, its write and read keys, its reset."""

    write_BE: jax.Array
    time_BE: jax.Array
    write_key_BN: jax.Array
    read_key_BN: jax.Array
    fresh_B: jax.Array


def selective_scan_chunked(x, dt, A, B, C, D, initial_state, reset, *, chunk):
    """Same as the reference; see `pallas_kernels.selective_scan` for shapes."""
    dtype = products.accumulation_dtype(x, dt, A, B, C)
    batch, tokens, channels = x.shape
    x_BTE, time_BTE, write_key_BTN, read_key_BTN = (a.astype(dtype) for a in (x, dt, B, C))
    fresh_BT = jnp.zeros((batch, tokens), bool) if reset is None else reset
    if initial_state is None:
        state_BNE = jnp.zeros((batch, A.shape[1], channels), dtype)
    else:
        state_BNE = jnp.swapaxes(initial_state.astype(dtype), 1, 2)
    write_BTE = time_BTE * x_BTE
    y_BTE, state_BNE = _scan(
        Tokens(write_BTE, time_BTE, write_key_BTN, read_key_BTN, fresh_BT),
        A.astype(dtype).T,
        state_BNE,
        min(chunk, tokens),
    )
    y_BTE = y_BTE if D is None else y_BTE + D.astype(dtype) * x_BTE
    return y_BTE.astype(x.dtype), jnp.swapaxes(state_BNE, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(tokens_BT: Tokens, rate_NE: jax.Array, state_BNE: jax.Array, length: int):
    return _forward(tokens_BT, rate_NE, state_BNE, length)[0]


def _forward(tokens_BT, rate_NE, state_BNE, length):
    count = tokens_BT.write_BE.shape[1]
    tokens = jax.tree.map(lambda a: _split(a, length), tokens_BT)

    def one_token(state_BNE, token):
        state_BNE = _faded(state_BNE, token, rate_NE) + _written(token)
        return state_BNE, _over_states(state_BNE, token.read_key_BN[:, :, None])

    def one_chunk(state_BNE, tokens):
        end_BNE, y_CBE = lax.scan(one_token, state_BNE, tokens)
        return end_BNE, (y_CBE, state_BNE)

    state_BNE, (y, entering) = lax.scan(one_chunk, state_BNE, tokens)
    return (_join(y, count), state_BNE), (tokens, rate_NE, entering)


def _backward(length, residuals, cotangents):
    tokens, rate_NE, entering = residuals
    d_y_BTE, d_state_BNE = cotangents
    count = d_y_BTE.shape[1]

    def one_chunk(carry, chunk):
        tokens, entering_BNE, d_y_CBE = chunk

        def again(state_BNE, token):
            faded_BNE = _faded(state_BNE, token, rate_NE)
            return faded_BNE + _written(token), faded_BNE

        _, faded_CBNE = lax.scan(again, entering_BNE, tokens)
        step = functools.partial(_backward_token, rate_NE)
        return lax.scan(step, carry, (tokens, faded_CBNE, d_y_CBE), reverse=True)

    carry = (d_state_BNE, jnp.zeros_like(entering[0]))
    chunks = (tokens, entering, _split(d_y_BTE, length))
    (d_state_BNE, d_rate_BNE), gradients = lax.scan(one_chunk, carry, chunks, reverse=True)
    d_tokens_BT = Tokens(*(_join(a, count) for a in gradients), None)
    return d_tokens_BT, jnp.sum(d_rate_BNE, 0), d_state_BNE


def _backward_token(rate_NE, carry, xs):
    """One token in reverse, from the gradient of the state after it to that before it."""
    d_after_BNE, d_rate_BNE = carry
    token, faded_BNE, d_y_BE = xs
    d_after_BNE = d_after_BNE + d_y_BE[:, None, :] * token.read_key_BN[:, :, None]
    d_exponent_BNE = d_after_BNE * faded_BNE
    d_write_BE = _over_states(d_after_BNE, token.write_key_BN[:, :, None])
    d_time_BE = _over_states(d_exponent_BNE, rate_NE)
    d_write_key_BN = _over_channels(d_after_BNE, token.write_BE)
    read_BN = _over_channels(faded_BNE, d_y_BE)
    own_B1 = jnp.sum(d_y_BE * token.write_BE, -1, keepdims=True)
    d_read_key_BN = read_BN + own_B1 * token.write_key_BN
    d_rate_BNE = d_rate_BNE + d_exponent_BNE * token.time_BE[:, None, :]
    d_before_BNE = _faded(d_after_BNE, token, rate_NE)
    return (d_before_BNE, d_rate_BNE), (d_write_BE, d_time_BE, d_write_key_BN, d_read_key_BN)


_scan.defvjp(_forward, _backward)


def _faded(state_BNE, token, rate_NE):
    """exp(time rate) state; zero where a document starts, whatever the state was."""
    faded_BNE = jnp.exp(token.time_BE[:, None, :] * rate_NE) * state_BNE
    return jnp.where(token.fresh_B[:, None, None], 0, faded_BNE)


def _written(token):
    return token.write_BE[:, None, :] * token.write_key_BN[:, :, None]


def _over_states(x_BNE, weight_NE):
    """sum_n weight_n x_n, written out: XLA on CPU vectorises sums over channels' lanes so."""
    rows = (x_BNE[..., n, :] * weight_NE[..., n, :] for n in range(x_BNE.shape[-2]))
    return functools.reduce(jnp.add, rows)


def _over_channels(x_BNE, weight_BE):
    if x_BNE.shape[0] == 1:  # as a product, one row takes XLA on CPU longer than two
        return weighted_sum(x_BNE, weight_BE[:, None, :], -1)
    highest = lax.Precision.HIGHEST
    return jnp.einsum("bne,be->bn", x_BNE, weight_BE, precision=highest)


def _split(x_BT: jax.Array, length: int) -> jax.Array:
    """`[B, T, ...]` to `[N, C, B, ...]`; tokens behind the last take no time and write nothing."""
    batch, tokens = x_BT.shape[:2]
    chunks = -(-tokens // length)
    padding = [(0, 0), (0, chunks * length - tokens), *[(0, 0)] * (x_BT.ndim - 2)]
    x_BNC = jnp.pad(x_BT, padding).reshape(batch, chunks, length, *x_BT.shape[2:])
    return jnp.moveaxis(x_BNC, 0, 2)


def _join(x_NCB: jax.Array, tokens: int) -> jax.Array:
    """`[N, C, B, ...]` to `[B, T, ...]`, without the padding."""
    x_BNC = jnp.moveaxis(x_NCB, 2, 0)
    return x_BNC.reshape(x_BNC.shape[0], -1, *x_BNC.shape[3:])[:, :tokens]
