"""What tests of kernels share: runs with every gradient, in an interpreter or by the definition."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, dispatch


def is_float(x):
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def with_gradients(call, args):
    """call(args), and the gradient of every floating argument under cotangents on all it gives."""

    @jax.jit
    def run(args):
        leaves, tree = jax.tree.flatten(args)
        floating = [is_float(x) for x in leaves]

        def of_floating(values):
            values = iter(values)
            full = [next(values) if f else x for f, x in zip(floating, leaves)]
            out = call(jax.tree.unflatten(tree, full))
            return [x for x in jax.tree.leaves(out) if is_float(x)], out

        values = [x for f, x in zip(floating, leaves) if f]
        differentiable, pull, out = jax.vjp(of_floating, values, has_aux=True)
        rng = np.random.default_rng(1)
        cotangents = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in differentiable]
        return out, pull(cotangents)[0]

    return run(args)


def interpreted(call, args):
    """With kernels for a TPU in Pallas's interpreter."""
    with dispatch.target("tpu", interpreter=True):
        return with_gradients(call, args)


def defined(call, args):
    """In float64."""
    wide = lambda x: np.asarray(x, np.float64) if is_float(x) else np.asarray(x)  # noqa: E731
    with dispatch.target("cpu"), jax.enable_x64(True):
        return with_gradients(call, jax.tree.map(lambda x: jnp.asarray(wide(x)), args))


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if is_float(x) else x, tree)


def assert_near(got, want, part, least=0.0):
    """Each array within `part` of its largest value, which is at least `least`."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(b).max(initial=least) >= least
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(initial=0), 1e-6))


def assert_nothing_crosses_a_reset(call, args, batch, tokens, at=9):
    """Of what `call(args, reset)` gives at a reset and behind it, no gradient reaches beyond, not
    even as rounding. Arguments have tokens in their second axis, but for the initial state."""
    reset = jnp.zeros((batch, tokens), bool).at[:, at].set(True)

    def after(args):
        o, state = call(args, reset)
        return jnp.sum(o[:, at:] ** 2) + jnp.sum(state**2)

    with dispatch.target("tpu", interpreter=True):
        got = jax.jit(jax.grad(after))(args)
    assert jnp.abs(got.pop("initial_state")).max() == 0
    for gradient in got.values():
        assert jnp.abs(gradient[:, :at]).max() == 0
        assert jnp.abs(gradient[:, at:]).max() > 0


def lowered(function, *args):
    """The program for a TPU, as text; args may be arrays of any kind."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.sharding.use_abstract_mesh(compat.abstract_tpu()), dispatch.target("tpu"):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
