"""The driver of memories that are updated once a block, on a linear memory with one step a block.

Each token writes eta k (W0T k - v)T with W0 as at the start of the block, and reads WT q of the
weights so far. float64 comparisons allow 1e-9 of the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import BlockState, Body, init_blocks, place_in_block, scan_blocks
from pallas_kernels.blocks.reference import Tokens, scan_tokens

BATCH, SIZE = 3, 4
RATE = 0.3


def prepare(consts, xs, valid_NBC):
    (k_NBCK, v_NBCK), q_NBCK = xs
    scores_NBCC = jnp.tril(jnp.einsum("nbik,nbjk->nbij", q_NBCK, k_NBCK))
    return q_NBCK, k_NBCK, v_NBCK + consts, scores_NBCC


def step(consts, carry, prepared):
    q_BCK, k_BCK, v_BCK, scores_BCC = prepared
    error_BCK = jnp.einsum("bkv,bck->bcv", carry, k_BCK) - v_BCK
    return carry - RATE * jnp.einsum("bck,bcv->bkv", k_BCK, error_BCK), error_BCK


def finish(consts, carry, prepared, kept):
    q_NBCK, _, _, scores_NBCC = prepared
    return jnp.einsum("nbkv,nbck->nbcv", carry, q_NBCK) - RATE * scores_NBCC @ kept


BODY = Body(step, prepare, finish)


def oracle(consts, initial, carry, tokens, count, xs, reset, block):
    """One token of one lane at a time: y, and the carry before the unfinished block."""
    (k, v), q = xs
    y, last = np.zeros(q.shape), np.zeros(carry.shape)
    for b in range(len(q)):
        start, weights, place = carry[b], carry[b], 0
        held = count[b]
        history = [(None, *(t[b, len(t[b]) - held + i] for t in tokens)) for i in range(held)]
        news = [(q[b, t], k[b, t], v[b, t]) for t in range(q.shape[1])]
        for t, (query, key, value) in enumerate(history + news, -held):
            if t >= 0 and reset[b, t]:
                start, weights, place = initial, initial, 0
            error = start.T @ key - (value + consts)
            weights = weights - RATE * np.outer(key, error)
            if t >= 0:
                y[b, t] = weights.T @ query
            place += 1
            if place == block:
                start, place = weights, 0
        last[b] = start
    return y, last


def run(consts, initial, carry, tokens, count, xs, reset, *, block):
    state = BlockState(carry, tokens, count)
    xs, q = xs
    return scan_blocks(BODY, consts, initial, state, xs, reset, block=block, queries=q)


def run_tokens(consts, initial, carry, tokens, count, xs, reset, *, block):
    """The definition, for gradients."""

    def token(carry, running, x, place_B):
        (k_BK, v_BK), q_BK = x
        error_BK = jnp.einsum("bkv,bk->bv", carry, k_BK) - (v_BK + consts)
        running = running - RATE * k_BK[:, :, None] * error_BK[:, None, :]
        return running, jnp.einsum("bkv,bk->bv", running, q_BK)

    rule = Tokens(lambda carry: carry, token, lambda running: running)
    xs, q = xs
    state = BlockState(carry, tokens, count)
    return scan_tokens(rule, initial, state, xs, reset, block=block, queries=q)


def draw(tokens, block, counts=(0, 0, 0), seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: 0.7 * rng.standard_normal(shape)  # noqa: E731
    count = np.asarray(counts, np.int32) % block
    used = np.arange(block - 1) >= block - 1 - count[:, None]
    buffers = tuple(normal(BATCH, block - 1, SIZE) * used[..., None] for _ in range(2))
    k, v, q = (normal(BATCH, tokens, SIZE) for _ in range(3))
    consts, initial, carry = normal(SIZE), normal(SIZE, SIZE), normal(BATCH, SIZE, SIZE)
    return consts, initial, carry, buffers, count, ((k, v), q)


def resets(tokens, pairs):
    reset = np.zeros((BATCH, tokens), bool)
    for lane, token in pairs:
        reset[lane, token] = True
    return reset


def assert_near(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(initial=0), 1))


CASES = {
    "aligned": (32, 4, (0, 0, 0), []),
    "ragged counts": (30, 4, (0, 1, 3), []),
    "resets": (37, 4, (3, 2, 1), [(0, 5), (0, 6), (1, 0), (1, 21), (2, 36)]),
    "every token is a document": (37, 4, (1, 0, 2), [(b, t) for b in range(3) for t in range(37)]),
    "one lane is all resets": (37, 4, (1, 0, 2), [(1, t) for t in range(37)]),
    "segment shorter than a block": (3, 8, (0, 6, 7), [(2, 2)]),
    "blocks of one token": (9, 1, (0, 0, 0), [(0, 3)]),
    "rounds of one block": (300, 128, (0, 50, 127), [(0, 5), (1, 0), (1, 130), (2, 299)]),
    "many rounds": (90, 2, (1, 0, 1), [(0, 40), (1, 3), (1, 4), (1, 5), (2, 89)]),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_token_loop_and_its_gradients(case):
    tokens, block, counts, pairs = CASES[case]
    args, reset = draw(tokens, block, counts), resets(tokens, pairs)
    want = oracle(*args, reset, block)
    rng = np.random.default_rng(1)
    cotangent = [rng.standard_normal(x.shape) for x in want]

    def gradients(function, args):
        *first, count, xs = args

        def loss(first, xs):
            y, after = function(*first, count, xs, jnp.asarray(reset), block=block)
            loss = (y * cotangent[0]).sum() + (after.carry * cotangent[1]).sum()
            return loss + sum((x**2).sum() for x in after.tokens), (y, after)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(first, xs)

    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, args)
        got_gradient, got = gradients(run, args)
        want_gradient, defined = gradients(run_tokens, args)
    assert_near((got[0], got[1].carry), want)
    assert_near((defined[0], defined[1].carry), want)
    assert_near((got_gradient, got[1]), (want_gradient, defined[1]))


@pytest.mark.parametrize("split", [1, 3, 4, 20])
def test_any_split_equals_whole_with_gradients_through_the_state(split):
    tokens, block = 23, 4
    consts, initial, carry, buffers, count, xs = draw(tokens, block, (0, 3, 2))
    reset = jnp.asarray(resets(tokens, [(0, 2), (1, 3), (1, 5), (2, 21)]))

    def loss(inputs, cuts):
        consts, initial, carry, buffers, xs = inputs
        state, total = BlockState(carry, buffers, jnp.asarray(count)), 0.0
        for a, b in zip(cuts[:-1], cuts[1:]):
            piece, fresh = (jax.tree.map(lambda x, a=a, b=b: x[:, a:b], x) for x in (xs, reset))
            y, state = run(consts, initial, *state, piece, fresh, block=block)
            total += (y * jnp.cos(jnp.arange(a, b))[:, None]).sum()
        return total + sum((x**2).sum() for x in jax.tree.leaves(state.carry)), state

    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, (consts, initial, carry, buffers, xs))
        whole, split_up = (
            jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(inputs, cuts)
            for cuts in ((0, tokens), (0, split, tokens))
        )
    assert_near(split_up, whole)


def test_the_state_at_the_start_of_a_document_equals_a_reset_of_any_other():
    args = jax.tree.map(lambda x: jnp.asarray(x), draw(9, 4, (1, 2, 3)))
    consts, initial, carry, buffers, count, xs = args
    start = init_blocks(initial, xs[0], block=4)
    reset = jnp.asarray(resets(9, [(0, 0), (1, 0), (2, 0)]))
    fresh = run(consts, initial, *start, xs, None, block=4)
    again = run(consts, initial, carry, buffers, count, xs, reset, block=4)
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_places_are_counted_from_the_start_of_the_document():
    reset = jnp.asarray([[False] * 5, [False, False, True, True, False]])
    place = place_in_block(jnp.array([2, 1]), reset, 5, 3)
    np.testing.assert_array_equal(place, [[2, 0, 1, 2, 0], [1, 2, 0, 0, 1]])
