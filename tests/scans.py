"""What tests of scans share: resets, runs with every gradient, and chunks against a token loop."""

import jax
import jax.numpy as jnp
import numpy as np
from kernels import assert_near

# Inside a chunk of 16, at its border, twice in a row, at the first and at the last token.
RESETS = [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]


def resets(pairs=RESETS, batch=3, tokens=37):
    reset = np.zeros((batch, tokens), bool)
    for lane, token in pairs:
        reset[lane, token] = True
    return reset


def outputs_and_gradients(function, args, reset=None, **settings):
    """Outputs, the last state, and every gradient by name under cotangents on both."""
    reset = None if reset is None else jnp.asarray(reset)

    @jax.jit
    def run(args):
        out, pull = jax.vjp(lambda args: function(**args, reset=reset, **settings), args)
        rng = np.random.default_rng(1)
        cotangent = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in out]
        return out, pull(tuple(cotangent))[0]

    return run({name: jnp.asarray(array) for name, array in args.items()})


def assert_chunks_equal_the_token_loop(function, args, reset, want, chunk):
    """Outputs against `want`, gradients against those of the reference, all in float64."""
    with jax.enable_x64(True):
        out, gradients = outputs_and_gradients(function, args, reset, chunk=chunk, impl="xla")
        defined, expected = outputs_and_gradients(function, args, reset, impl="reference")
    assert out[0].dtype == np.float64
    assert_near(out, want, 1e-9)
    assert_near(defined, want, 1e-9)
    assert gradients.keys() == args.keys()
    for name in args:
        assert np.abs(expected[name]).max() > 1e-3
        assert_near(gradients[name], expected[name], 1e-9)
