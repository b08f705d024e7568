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
    the gradients of everything else, are computed for all blocks at once, each of them once.
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
    kept_N, pull_with = _pulls(partial(_cast, step), consts, entering, prepared)

    def one_block(d_left, xs):
        kept, d_entering, d_kept, full_B, restart_B = xs
        d_new = _masked(full_B & ~restart_B, d_left)
        d_same = _masked(~full_B & ~restart_B, d_left)
        _, d_carry, _ = pull_with(kept)((d_new, d_kept))
        return jax.tree.map(lambda *parts: sum(parts), d_carry, d_same, d_entering), d_left

    xs = (kept_N, d_entering, d_kept, full_NB, restart_NB)
    d_carry, d_left = lax.scan(one_block, d_carry, xs, reverse=True)

    d_new = _masked(full_NB & ~restart_NB, d_left)
    d_all = jax.vmap(lambda kept, d: pull_with(kept)(d))(kept_N, (d_new, d_kept))
    d_consts, _, d_prepared = d_all
    d_consts = jax.tree.map(lambda d: jnp.sum(d, 0), d_consts)
    d_initial = lax.cond(
        jnp.any(restart_NB),
        lambda d_left: _of_initial(initial, _masked(restart_NB, d_left)),
        lambda d_left: jax.tree.map(jnp.zeros_like, initial),
        d_left,
    )
    return d_consts, d_initial, d_carry, d_prepared, None, None


def _pulls(step, consts, entering, prepared):
    """The transpose of every block: what it keeps, `[N, ...]`, and how to make it of one of these.

    What is kept is computed once for both uses, and consts that are among it are not repeated.
    """
    shared = jax.tree.leaves(consts)
    known: list[tuple[Any, list[int | None]]] = []

    def keep(carry, prepared):
        pull = jax.vjp(step, consts, carry, prepared)[1]
        leaves, tree = jax.tree.flatten(pull)
        places = [next((i for i, c in enumerate(shared) if c is leaf), None) for leaf in leaves]
        known.append((tree, places))
        return [leaf for leaf, place in zip(leaves, places) if place is None]

    kept_N = jax.vmap(keep)(entering, prepared)
    tree, places = known[-1]

    def pull_with(kept):
        own = iter(kept)
        leaves = [next(own) if place is None else shared[place] for place in places]
        return jax.tree.unflatten(tree, leaves)

    return kept_N, pull_with


def _masked(condition: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: where_leading(condition, x, 0), tree)


def _of_initial(initial: Any, d_left: Any) -> Any:
    """The transpose of broadcasting `initial` to all lanes and blocks."""

    def spread(initial):
        return jax.tree.map(lambda x, d: jnp.broadcast_to(x, d.shape), initial, d_left)

    return jax.vjp(spread, initial)[1](d_left)[0]


scan_carries.defvjp(_save, _backward)
