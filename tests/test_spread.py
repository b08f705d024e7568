"""How axes of arrays are found to be split, in programs for which it is plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memjax.spread import through

SHAPES = {"x": (8, 12, 16), "w": (16, 32), "v": (32,)}


def split(program, **given):
    """How `program(x, w, v)` is split, its inputs as given."""
    jaxpr = jax.make_jaxpr(program)(*(np.zeros(shape, np.float32) for shape in SHAPES.values()))
    whole = {name: (1,) * len(shape) for name, shape in SHAPES.items()}
    return through(jaxpr.jaxpr, tuple((whole | given).values()))[0]


CASES = {
    "rows of a product": (lambda x, w, v: x @ w, {"x": (2, 1, 1)}, (2, 1, 1)),
    "columns of a product": (lambda x, w, v: x @ w, {"w": (1, 4)}, (1, 1, 4)),
    "a sum over what is split": (lambda x, w, v: x @ w, {"x": (1, 1, 4), "w": (4, 1)}, (1, 1, 1)),
    "a vector beside": (lambda x, w, v: jnp.tanh(x @ w + v), {"v": (4,)}, (1, 1, 4)),
    "heads of channels": (
        lambda x, w, v: (x @ w).reshape(8, 12, 8, 4),
        {"w": (1, 4)},
        (1, 1, 4, 1),
    ),
    "fewer heads than parts": (
        lambda x, w, v: (x @ w).reshape(8, 12, 2, 16),
        {"w": (1, 4)},
        (1, 1, 2, 2),
    ),
    "channels of heads": (
        lambda x, w, v: jnp.swapaxes(x.reshape(8, 12, 4, 4), 1, 2).reshape(32, 48),
        {"x": (2, 1, 4)},
        (8, 1),
    ),
    "what is left of a sum": (lambda x, w, v: x.sum(1), {"x": (2, 3, 4)}, (2, 4)),
    "a part of an axis": (lambda x, w, v: x[:, :4, 3:4], {"x": (2, 2, 4)}, (2, 2, 1)),
    "a carry that begins whole": (
        lambda x, w, v: lax.scan(lambda c, x: (c + x, c), jnp.zeros((12, 16)), x)[0],
        {"x": (1, 3, 4)},
        (3, 4),
    ),
    "what a loop stacks": (
        lambda x, w, v: lax.scan(lambda c, x: (c + x, c), jnp.zeros((12, 16)), x)[1],
        {"x": (1, 3, 4)},
        (1, 3, 4),
    ),
    "what a while carries": (
        lambda x, w, v: lax.while_loop(lambda c: c[0, 0, 0] < 9, lambda c: c + x, 0 * x),
        {"x": (1, 3, 4)},
        (1, 3, 4),
    ),
    "either branch": (
        lambda x, w, v: lax.cond(v[0] > 0, lambda: x, lambda: jnp.zeros_like(x)),
        {"x": (2, 1, 1)},
        (2, 1, 1),
    ),
    "a call": (lambda x, w, v: jax.jit(jnp.sin)(x), {"x": (2, 1, 1)}, (2, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_split_as_what_they_are_made_of(name):
    program, given, expected = CASES[name]
    assert split(program, **given) == expected
