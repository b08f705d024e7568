"""Operations counted in traced programs, against counts by hand and against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memjax.operations import Undecided, count_products

A = jax.ShapeDtypeStruct((3, 5), np.float32)
B = jax.ShapeDtypeStruct((5, 3), np.float32)
ONE = 2 * 3 * 5 * 3  # of A B, and of each gradient of it


def turning(turns, a, b):
    """A B as often as `turns` says, by a loop with a condition."""
    return lax.fori_loop(0, turns, lambda i, sum: sum + (a + i) @ b, jnp.zeros((3, 3)))


def test_a_product_counts_two_operations_a_term():
    assert count_products(lambda known, a, b: a @ b, (), A, B) == ONE


def test_a_sum_counts_nothing_however_it_is_written():
    for rows in (lambda _, a: jnp.sum(a * a, -1), lambda _, a: jnp.einsum("ij,ij->i", a, a)):
        assert count_products(rows, (), A) == 0


def test_a_product_whose_result_nobody_reads_is_none():
    assert count_products(lambda known, a, b: (a @ b, a)[1], (), A, B) == 0


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_a_loop_counts_as_often_as_it_turns(turns):
    assert count_products(turning, np.int32(turns), A, B) == turns * ONE


def test_loops_within_a_loop_count_each_of_their_turns():
    """0 + 1 + 2 + 3 turns, first and last taken from the number of the row and from a table."""

    def rows(last, a, b):
        def row(total, i):
            more = lax.fori_loop(0, last[i], lambda _, sum: sum + a @ b, total)
            return lax.fori_loop(0, i, lambda _, sum: sum + a @ b, more), None

        return lax.scan(row, jnp.zeros((3, 3)), jnp.arange(4))[0]

    assert count_products(rows, np.array([2, 0, 0, 1]), A, B) == (6 + 3) * ONE


def test_a_loop_may_turn_until_what_it_carries_says_so():
    """5, 4, ... with the number of turns made within another loop."""

    def program(start, a, b):
        left = lax.while_loop(lambda n: n % 4 != 0, lambda n: n + 1, start)  # 8
        body = lambda carry: (carry[0] - 3, carry[1] + a @ b)  # noqa: E731
        return lax.while_loop(lambda carry: carry[0] > 0, body, (left, jnp.zeros((3, 3))))[1]

    assert count_products(program, np.int32(5), A, B) == 3 * ONE


@pytest.mark.parametrize("known", [False, True])
def test_of_a_condition_the_branch_that_is_taken_counts(known):
    def program(known, a, b):
        return lax.cond(known, lambda: a @ b, lambda: a @ b @ (a @ b))

    assert count_products(program, np.bool_(known), A, B) == (
        ONE if known else 2 * ONE + 2 * 3 * 3 * 3
    )


def test_the_gradient_of_a_scan_repeats_what_is_not_kept():
    """Three turns of two products: forward, again for the backward pass, and their gradients."""

    def program(known, a, b):
        @jax.checkpoint
        def turn(a, _):
            return jnp.sin(jnp.sin(a @ b) @ b.T), None

        return jax.grad(lambda a: lax.scan(turn, a, None, length=3)[0].sum())(a)

    assert count_products(program, (), A, B) == 3 * 3 * 2 * ONE


def test_what_depends_on_an_input_that_is_not_known_is_refused():
    with pytest.raises(Undecided, match="only the shape"):
        count_products(lambda known, turns, a, b: turning(turns, a, b), (), np.int32(3), A, B)


def test_products_that_cannot_be_seen_are_refused():
    def program(known, x):
        return lax.conv_general_dilated(x, x, (1,), "SAME")

    with pytest.raises(ValueError, match="conv_general_dilated cannot be counted"):
        count_products(program, (), jax.ShapeDtypeStruct((1, 1, 8), np.float32))
