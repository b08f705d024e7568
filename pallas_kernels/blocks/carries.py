"""The part of a round that waits for the block before."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.layout import select_leading, where_leading


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_carries(step, consts, initial, carry, prepared, full_NB, restart_NB):
    """The last carry, the carry that enters each block, `[N, B, ...]`, and what each block keeps.

    new = step(...) where full, else carry;  carry = initial where restart, else new

    The backward pass scans the cotangent of the carry alone. What it needs of the forward pass, and
    the gradients of everything else, are computed for all blocks at once.
    """

    def one_block(carry, xs):
        prepared, full_B, restart_B = xs
        new, kept = _cast(step, consts, carry, prepared)
        new = select_leading(restart_B, initial, select_leading(full_B, new, carry))
        return new, (carry, kept)

    carry, (entering, kept) = lax.scan(one_block, carry, (prepared, full_NB, restart_NB))
    return carry, entering, kept


def _cast(step, consts, carry, prepared):
    new, kept = step(consts, carry, prepared)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry), kept


def _save(step, consts, initial, carry, prepared, full_NB, restart_NB):
    out = scan_carries(step, consts, initial, carry, prepared, full_NB, restart_NB)
    return out, (consts, initial, out[1], prepared, full_NB, restart_NB)


def _backward(step, residuals, cotangents):
    consts, initial, entering, prepared, full_NB, restart_NB = residuals
    d_carry, d_entering, d_kept = cotangents
    step = partial(_cast, step)

    def pull_of(carry, prepared):
        return jax.vjp(lambda carry: step(consts, carry, prepared), carry)[1]

    def one_block(d_left, xs):
        pull, d_entering, d_kept, full_B, restart_B = xs
        d_new = _masked(full_B & ~restart_B, d_left)
        d_same = _masked(~full_B & ~restart_B, d_left)
        (d_carry,) = pull((d_new, d_kept))
        return jax.tree.map(lambda *parts: sum(parts), d_carry, d_same, d_entering), d_left

    xs = (jax.vmap(pull_of)(entering, prepared), d_entering, d_kept, full_NB, restart_NB)
    d_carry, d_left = lax.scan(one_block, d_carry, xs, reverse=True)

    def all_steps(consts, prepared):
        return jax.vmap(step, (None, 0, 0))(consts, entering, prepared)

    d_new = _masked(full_NB & ~restart_NB, d_left)
    d_consts, d_prepared = jax.vjp(all_steps, consts, prepared)[1]((d_new, d_kept))
    d_initial = lax.cond(
        jnp.any(restart_NB),
        lambda d_left: _of_initial(initial, _masked(restart_NB, d_left)),
        lambda d_left: jax.tree.map(jnp.zeros_like, initial),
        d_left,
    )
    return d_consts, d_initial, d_carry, d_prepared, None, None


def _masked(condition: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: where_leading(condition, x, 0), tree)


def _of_initial(initial: Any, d_left: Any) -> Any:
    """The transpose of broadcasting `initial` to all lanes and blocks."""

    def spread(initial):
        return jax.tree.map(lambda x, d: jnp.broadcast_to(x, d.shape), initial, d_left)

    return jax.vjp(spread, initial)[1](d_left)[0]


scan_carries.defvjp(_save, _backward)
