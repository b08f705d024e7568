"""Sizes of keys and values on a GPU: padded to whole tiles, and values in parts.

Channels of zeros in keys and values add nothing to what is read. Columns of a matrix memory never
meet, so each part of them is a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TILE = 64
LEAST = 32  # channels; of fewer most of a tile would be empty


def size_unfit(q: jax.Array, v: jax.Array, most: int | None = None) -> str | None:
    """Why K or V does not suit; `most` is the largest K."""
    for name, x in (("K", q), ("V", v)):
        if x.shape[-1] < LEAST:
            return f"{name}={x.shape[-1]} is less than {LEAST}: tiles have {TILE} channels"
    if most is not None and q.shape[-1] > most:
        return f"K={q.shape[-1]} is more than {most}"
    return None


def part_size(size: int, most: int = 128) -> int:
    """Channels of a part: `most`, or a tile where that does not divide."""
    return TILE if size % most else most


def widened(x: jax.Array, *sizes: int) -> jax.Array:
    """Zeros behind the last axes, up to these sizes."""
    more = [size - length for size, length in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(more)) + [(0, n) for n in more]) if any(more) else x


def in_whole_tiles(run: Callable, q, k, v, log_decay, state_BHKV, *, sizes: tuple[int, ...] = ()):
    """`run(q, k, v, log_decay, state)` -> o, last state, with V of whole tiles, and K too, or the
    next of `sizes`."""
    key_size, value_size = q.shape[-1], v.shape[-1]
    keys = next((n for n in sizes if n >= key_size), key_size + -key_size % TILE)
    values = value_size + -value_size % TILE
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = widened(log_decay, keys)
    if state_BHKV is not None:
        state_BHKV = widened(state_BHKV, keys, values)
    o, last = run(widened(q, keys), widened(k, keys), widened(v, values), log_decay, state_BHKV)
    return o[..., :value_size], last[..., :key_size, :value_size]


def in_value_parts(run: Callable, by_head: tuple, v_BTHV: jax.Array, state_BHKV, most: int = 128):
    """`run(*by_head, v, state)` -> o, last state, with V in parts of `most`, or of 64.

    Arrays of `by_head` have heads in their third axis, and are repeated; None stays None.
    """
    heads, value_size = v_BTHV.shape[2:]
    parts = value_size // part_size(value_size, most)
    if parts == 1:
        return run(*by_head, v_BTHV, state_BHKV)
    by_head = tuple(None if x is None else jnp.repeat(x, parts, axis=2) for x in by_head)
    v = v_BTHV.reshape(*v_BTHV.shape[:2], heads * parts, -1)
    state = state_BHKV
    if state is not None:
        batch, _, key_size, _ = state.shape
        state = jnp.swapaxes(state.reshape(batch, heads, key_size, parts, -1), 2, 3)
        state = state.reshape(batch, heads * parts, key_size, -1)
    o, last = run(*by_head, v, state)
    last = jnp.swapaxes(last.reshape(len(last), heads, parts, *last.shape[2:]), 2, 3)
    return o.reshape(*o.shape[:2], heads, -1), last.reshape(*last.shape[:3], -1)
