"""Values in parts on a GPU: columns of a matrix memory never meet, so each part is a head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_value_parts(run: Callable, by_head: tuple, v_BTHV: jax.Array, state_BHKV, most: int = 128):
    """`run(*by_head, v, state)` -> o, last state, with V in parts of `most`, or of 64.

    Arrays of `by_head` have heads in their third axis, and are repeated; None stays None.
    """
    heads, value_size = v_BTHV.shape[2:]
    parts = value_size // (64 if value_size % most else most)
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
