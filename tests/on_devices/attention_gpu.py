"""Attention for a Hopper GPU in the interpreter, against one softmax in float64.

Here because a block of three warpgroups needs more threads than a small machine gives JAX. Operands
of products are bfloat16: 8 bits, 0.4% a rounding, a few roundings deep; compared is the largest
error with the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, compat, dispatch


def draw(tokens, keys, heads, groups, key_size=64, value_size=64):
    normal = np.random.default_rng(0).standard_normal
    shapes = {
        "q": (tokens, heads, key_size),
        "k": (keys, groups, key_size),
        "v": (keys, groups, value_size),
    }
    args = {n: jnp.asarray(normal((1, *shape)), jnp.bfloat16) for n, shape in shapes.items()}
    return args, jnp.asarray(normal((1, tokens, heads, value_size)), jnp.bfloat16)


def with_gradients(args, d_o, impl, **rule):
    @jax.jit
    def run(args, d_o):
        o, pull = jax.vjp(lambda args: attention(**args, impl=impl, **rule), args)
        return o, pull(d_o)[0]

    return run(args, d_o)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def compare(args, d_o, *, races=False, **rule):
    with dispatch.target("gpu", interpreter=compat.gpu_interpreter(detect_races=races)):
        o, gradients = with_gradients(args, d_o, "gpu", **rule)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(wide(x)) for name, x in args.items()}
        want, want_gradients = with_gradients(exact, jnp.asarray(wide(d_o)), "reference", **rule)
    assert o.dtype == jnp.bfloat16
    for name, gradient in {"o": o, **gradients}.items():
        right = np.asarray({"o": want, **want_gradients}[name])
        assert np.abs(right).max() > 1e-2
        # Of slopes: a sum over all pairs of what rounding of o does to o . d o. xla has the same.
        part = 0.02 if name == "bias" else 0.01
        np.testing.assert_allclose(wide(gradient), right, rtol=0, atol=part * np.abs(right).max())
    for name, gradient in gradients.items():
        assert gradient.dtype == args[name].dtype
    return o, gradients


def test_documents_in_a_window_with_a_cache_grouped_heads_cap_and_sinks_without_a_race():
    """A cache that is part full; a query that sees nothing gives zeros."""
    args, d_o = draw(70, 240, 2, 1, 64, 128)
    args["q"] = 4 * args["q"]  # so that the cap bends
    args["sinks"] = jnp.asarray([-30.0, 1.5])
    ids = np.sort(np.random.default_rng(1).integers(0, 3, 70))
    cache = np.concatenate([np.full(60, -1), np.zeros(110, int)])
    own = ids.copy()
    own[[5, 60]] = -1, 9
    segment_ids = tuple(jnp.asarray(x)[None] for x in (own, np.concatenate([cache, ids])))
    rule = {"segment_ids": segment_ids, "window": 150, "logit_cap": 10.0}
    o, gradients = compare(args, d_o, races=True, **rule)
    assert jnp.abs(o[0, jnp.asarray([5, 60])]).max() == 0
    assert jnp.abs(gradients["k"][0, :60]).max() == 0


def test_slopes_of_positions_in_any_order_in_both_directions():
    """Of two blocks of keys the first is seen in full. Keys fill up a tile, and so do values."""
    args, d_o = draw(40, 200, 1, 1, 104, 40)
    args["bias"] = jnp.asarray([0.02])
    integers = np.random.default_rng(2).integers
    positions = tuple(jnp.asarray(integers(0, 90, (1, n))) for n in (40, 200))
    compare(args, d_o, positions=positions, causal=False)


@pytest.mark.slow
def test_two_blocks_of_causal_queries():
    args, d_o = draw(130, 130, 1, 1)
    compare(args, d_o, races=True)
