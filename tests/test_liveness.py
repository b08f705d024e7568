"""The walk through a traced program, on programs whose worst moment is known."""

import jax
import jax.numpy as jnp
import pytest

from memjax.liveness import peak
from pallas_kernels import dispatch

N = 64
X = jax.ShapeDtypeStruct((N, N), jnp.float32)
SIZE = 4 * N * N


def products(x):
    """Each product dies at the next."""
    for _ in range(5):
        x = x @ x
    return x


def kept(x):
    """Four products wait for the last."""
    ways = [x @ (x + i) for i in range(4)]
    return ways[0] @ ways[1] @ ways[2] @ ways[3]


def fused(x):
    """Cheap operations are made where they are read, however many they are."""
    return jnp.sum(((x * 2 + 1) * x - 3) ** 2)


def dear(x):
    """An exponential that is read twice is held."""
    e = jnp.exp(x)
    return jnp.sum(e, 0), jnp.sum(e * e, 1)


def in_place(x):
    """The exponential of a product takes its place."""
    return jnp.exp(x @ x) @ x


def loop(x):
    """The carry, and a product for the turn."""
    return jax.lax.fori_loop(0, 10, lambda _, c: jnp.tanh(c @ x), x)


def stacking(x):
    """The carry, ten slices, and the product that is copied into one of them."""

    def turn(c, _):
        c = c @ x
        return c, c * 2

    return jax.lax.scan(turn, x, None, length=10)


def other_platform(x):
    """Of what depends on the platform, only the branch that is taken counts."""
    return jax.lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: kept(x))


CASES = {
    products: 2,
    kept: 5,
    fused: 0,
    dear: 1,
    in_place: 2,
    loop: 2,
    stacking: 12,
    other_platform: 1,
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_the_worst_moment_of(function):
    found = peak(jax.make_jaxpr(function)(X).jaxpr) / SIZE
    assert CASES[function] <= found < CASES[function] + 0.2


def test_the_platform_that_is_compiled_for_is_asked():
    program = jax.make_jaxpr(other_platform)(X).jaxpr
    with dispatch.target("tpu"):
        assert peak(program) > 3 * SIZE


def test_what_a_condition_chooses_needs_its_larger_branch():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, kept, products, x)

    found = peak(jax.make_jaxpr(either)(X).jaxpr) / SIZE
    assert 5 <= found < 5.2


def never(x):
    """A mask that follows from numbers alone is known, through loops, sides and slices."""

    def turn(c, zero):
        valid = jnp.zeros(N, bool) ^ (zero != 0)
        seen = jnp.concatenate([jnp.where(valid, 0, -1), c[0].astype(int)])
        return jax.lax.cond(jnp.any(seen[: N // 2] >= 0), kept, products, c), None

    return jax.lax.scan(turn, x, jnp.zeros(3))[0]


def test_a_branch_that_is_known_not_to_be_taken_needs_nothing():
    found, largest = (peak(jax.make_jaxpr(f)(X).jaxpr) / SIZE for f in (never, kept))
    assert largest >= 5 and 3 <= found < 3.3


def split_off(x):
    """As `never`, the known part cut off by a split."""

    def turn(c, zero):
        valid = jnp.zeros(N, bool) ^ (zero != 0)
        seen = jnp.concatenate([jnp.where(valid, 0, -1), c[0].astype(int)])
        return jax.lax.cond(jnp.any(jnp.split(seen, 2)[0] >= 0), kept, products, c), None

    return jax.lax.scan(turn, x, jnp.zeros(3))[0]


def test_a_part_that_is_split_off_is_known():
    assert 3 <= peak(jax.make_jaxpr(split_off)(X).jaxpr) / SIZE < 3.3
