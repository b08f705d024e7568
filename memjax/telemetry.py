"""What layers say about themselves while they read: write and forget rates, slot use, loads.

    telemetry.note("forget_rate", rate_BTH)      in a mixer or a memory module

costs nothing unless somebody listens (XLA drops what nobody reads):

    with telemetry.listening() as heard:         around a call that is being traced
        lm.read(...)
    heard                                        {"patterns/0_gated_deltanet/forget_rate": [R]}

Values are means over everything but the repeats of the layers; nan, where there is nothing to
measure, counts for no mean. What is noted inside of loops other than that over layers must leave
them by itself, so such loops are `deaf`, or listen `by_token` and hand on what they hear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

_heard: ContextVar[dict[str, jax.Array] | None] = ContextVar("heard", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")
_tokens: ContextVar[tuple[int, int] | None] = ContextVar("tokens", default=None)


@contextmanager
def listening() -> Iterator[dict[str, jax.Array]]:
    """Hear what is noted inside."""
    heard: dict[str, jax.Array] = {}
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


@contextmanager
def deaf() -> Iterator[None]:
    """Hear nothing of what is noted inside."""
    token = _heard.set(None)
    try:
        yield
    finally:
        _heard.reset(token)


@contextmanager
def by_token(lanes: int, tokens: int) -> Iterator[None]:
    """Notes inside stay apart by lane and token, `[lanes, tokens]`: means are left to others."""
    token = _tokens.set((lanes, tokens))
    try:
        yield
    finally:
        _tokens.reset(token)


@contextmanager
def within(name: str) -> Iterator[None]:
    """Names of what is noted inside begin with `name/`."""
    token = _prefix.set(f"{_prefix.get()}{name}/")
    try:
        yield
    finally:
        _prefix.reset(token)


def heard() -> bool:
    """Whether somebody listens: what is expensive to note can be left out."""
    return _heard.get() is not None


def note(name: str, value: jax.Array | float) -> None:
    """Say that the mean of `value` is `name`, to whoever listens.

    Those who listen `by_token` hear the mean for each token of a value `[lanes, tokens, ...]`.
    """
    told = _heard.get()
    if told is not None:
        value = jnp.asarray(value, jnp.float32)
        shape = _tokens.get()
        if shape is None:
            said = jnp.nanmean(value)
        elif value.shape[:2] == shape:
            said = jnp.nanmean(value.reshape(*shape, -1), -1)
        else:
            said = jnp.broadcast_to(jnp.nanmean(value), shape)
        told[_prefix.get() + name] = said


def hears_tokens() -> bool:
    """Whether notes are kept apart by token."""
    return _tokens.get() is not None


def note_gates(log_decay: jax.Array | None, strength: jax.Array | None = None) -> None:
    """forget_rate = 1 - exp(log_decay) a token; write_rate = strength of a delta rule, or the
    learning rate of a memory that takes gradient steps."""
    if log_decay is not None:
        note("forget_rate", -jnp.expm1(jnp.asarray(log_decay, jnp.float32)))
    if strength is not None:
        note("write_rate", strength)


def pass_on(part: str, told: dict[str, jax.Array] | None) -> None:
    """Say what was heard in a loop over layers, as it left the loop: stacked."""
    outer = _heard.get()
    if outer is not None and told is not None:
        outer |= {f"{part}/{name}": value for name, value in told.items()}


def pass_on_tokens(told_BTR: dict[str, jax.Array]) -> None:
    """Say the means of what was heard by token, `[B, T, R]`, in a loop that read the tokens."""
    outer = _heard.get()
    if outer is not None:
        outer |= {name: jnp.nanmean(value, (0, 1)) for name, value in told_BTR.items()}
