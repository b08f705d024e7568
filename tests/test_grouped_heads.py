"""linear_attention where heads share queries and keys, as those of Mamba-2 do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import linear_attention as oracle

from pallas_kernels import linear_attention

BATCH, TOKENS, GROUPS, HEADS, KEY, VALUE = 3, 37, 2, 6, 5, 3
RESETS = [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]


def draw(decay):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    args = {
        "q": normal((BATCH, TOKENS, GROUPS, KEY)),
        "k": normal((BATCH, TOKENS, GROUPS, KEY)),
        "v": normal((BATCH, TOKENS, HEADS, VALUE)),
        "initial_state": normal((BATCH, HEADS, KEY, VALUE)),
    }
    if decay != "none":
        channels = (KEY,) if decay == "channel" else ()
        args["log_decay"] = -np.exp(2 * normal((BATCH, TOKENS, HEADS, *channels)))
    reset = np.zeros((BATCH, TOKENS), bool)
    for lane, token in RESETS:
        reset[lane, token] = True
    return args, reset


@pytest.mark.parametrize("decay", ["head", "channel", "none"])
@pytest.mark.parametrize("packed, chunk", [(True, 16), (False, 7)])
def test_shared_keys_equal_the_same_keys_given_to_every_head(decay, packed, chunk):
    args, reset = draw(decay)
    reset = reset if packed else None

    def run(**settings):
        @jax.jit
        def both(args):
            def call(args):
                return linear_attention(
                    **args, reset=None if reset is None else jnp.asarray(reset), **settings
                )

            out, pull = jax.vjp(call, args)
            rng = np.random.default_rng(1)
            return out, pull(tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in out))[0]

        return jax.tree.map(np.asarray, both(jax.tree.map(jnp.asarray, args)))

    with jax.enable_x64(True):
        out, gradients = run(chunk=chunk, impl="xla")
        _, want_gradients = run(impl="reference")
    per_head = {name: np.repeat(args[name], HEADS // GROUPS, 2) for name in "qk"}
    want = oracle.linear_attention(
        **per_head,
        v=args["v"],
        log_decay=args.get("log_decay"),
        state=args["initial_state"],
        reset=reset,
        scale=KEY**-0.5,
    )
    for a, b in zip(out, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())
    for name, gradient in gradients.items():
        assert np.abs(want_gradients[name]).max() > 1e-3
        bound = 1e-9 * np.abs(want_gradients[name]).max()
        np.testing.assert_allclose(gradient, want_gradients[name], rtol=0, atol=bound)


def test_groups_that_do_not_divide_the_heads_are_refused():
    q, v = jnp.zeros((1, 3, 4, 2)), jnp.zeros((1, 3, 6, 2))
    with pytest.raises(ValueError, match="q has 4 heads and v has 6"):
        linear_attention(q, q, v)
