"""Test-time memories token by token, weights of every token written out: the definition."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.neural_memory.rule import Memory, NeuralMemoryState, Rule


class _Loop(NamedTuple):
    """A, S: accumulators and momenta now; W: the weights that are read. A0, S0: at block start."""

    A: tuple
    S: tuple
    W: tuple
    A0: tuple
    S0: tuple
    tokens: dict
    place: jax.Array  # in the block, of the next token


def neural_memory_reference(
    rule, tokens, weights, constants, initial, state, reset, *, update_every
):
    """u = gradient at the block's first W;  S = eta S - theta u;  A = alpha A + S;  W likewise."""
    del weights
    rows = {name: x[:, None] for name, x in constants.items()}
    one = jax.vmap(lambda *lane: _lane(rule, rows, initial, update_every, *lane), in_axes=(0, 0, 0))
    batch, length = tokens["q"].shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, length), bool)
    return one(state, tokens, reset)


def _lane(rule, constants, initial: Memory, update_every, state: NeuralMemoryState, tokens, reset):
    """One lane: no leading axis."""
    W0 = tuple(map(rule.retention.weights, state.weights))
    # A lane that begins its block has seen nothing: the tokens of the block are read again.
    nothing = jax.tree.map(jnp.zeros_like, state.tokens)
    A0, S0 = state.weights, state.momenta
    loop = _Loop(A0, S0, W0, A0, S0, nothing, jnp.zeros_like(state.count_B))

    def token(loop, xs):
        x, fresh, live = xs
        begun = _restart(rule, initial, loop)
        after, o = _token(rule, constants, _select(fresh, begun, loop), x, update_every)
        return _select(live, after, loop), o

    places = jnp.arange(update_every - 1)
    live = places >= update_every - 1 - state.count_B
    none = jnp.zeros_like(live)
    q0 = jnp.zeros((update_every - 1, *tokens["q"].shape[1:]), tokens["q"].dtype)
    loop, _ = lax.scan(token, loop, ({**state.tokens, "q": q0}, none, live))
    loop, o = lax.scan(token, loop, (tokens, reset, jnp.ones_like(reset)))
    return o, NeuralMemoryState(loop.A0, loop.S0, loop.tokens, loop.place)


def _token(rule: Rule, constants, loop: _Loop, x, update_every):
    k, v, rate = x["k"], x["v"], x["rate"][:, None, None]
    keep = jnp.exp(x["log_keep"])[:, None, None] if "log_keep" in x else 1.0
    threshold = x["threshold"][:, None, None] if rule.bias.needs_threshold else None
    W0 = tuple(map(rule.retention.weights, loop.A0))

    def answer(W, row_HK):
        linear = lambda i, a: jnp.einsum(  # noqa: E731
            "hci,hio->hco", a, W[i], precision=lax.Precision.HIGHEST
        )
        return rule.structure(linear, constants, row_HK[:, None])

    y, pull = jax.vjp(lambda W: answer(W, k), W0)
    (u,) = pull(rule.bias.gradient(y, v[:, None], threshold))
    if rule.learner.momentum:
        eta = jnp.exp(x["log_momentum"])[:, None, None]
        S = tuple(eta * s - rate * g for s, g in zip(loop.S, u))
        step = tuple(rule.learner.step(s, -rate * g, eta) for s, g in zip(S, u))
    else:
        S, step = (), tuple(-rate * g for g in u)
    A = tuple(keep * a + s for a, s in zip(loop.A, step))
    W = tuple(keep * w + s for w, s in zip(loop.W, step))
    o = answer(W, x["q"])[:, 0]
    buffer = {name: jnp.concatenate([old, x[name][None]])[1:] for name, old in loop.tokens.items()}
    full = loop.place + 1 == update_every
    ended = _Loop(
        A,
        S,
        tuple(map(rule.retention.weights, A)),
        A,
        S,
        jax.tree.map(jnp.zeros_like, buffer),
        jnp.zeros_like(loop.place),
    )
    going = _Loop(A, S, W, loop.A0, loop.S0, buffer, loop.place + 1)
    return _select(full, ended, going), o


def _restart(rule: Rule, initial: Memory, loop: _Loop) -> _Loop:
    A, S = initial
    W = tuple(map(rule.retention.weights, A))
    return _Loop(
        A, S, W, A, S, jax.tree.map(jnp.zeros_like, loop.tokens), jnp.zeros_like(loop.place)
    )


def _select(condition, x, y):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(jnp.asarray(y).dtype), x, y)
