"""What a query may see, shared by the implementations of attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """The static part of the rule. Hashable: it decides what is compiled.

    `offset` is the position of query 0 minus that of key 0 where tokens lie at consecutive
    positions, None where positions are given as arrays.
    """

    causal: bool
    window: int | None
    scale: float
    offset: int | None
    logit_cap: float | None


class Places(NamedTuple):
    """Position and segment id of each token; axis B may be 1, segment ids may be None."""

    position_BT: jax.Array
    segment_BT: jax.Array | None

    def cut(self, start: int, stop: int) -> "Places":
        """Tokens start to stop."""
        segment_BT = None if self.segment_BT is None else self.segment_BT[:, start:stop]
        return Places(self.position_BT[:, start:stop], segment_BT)


def capped(rule: Rule, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """c tanh(logits / c) for a cap of c, and its derivative; logits and None without a cap."""
    if rule.logit_cap is None:
        return logits, None
    part = jnp.tanh(logits * (1 / rule.logit_cap))
    return rule.logit_cap * part, 1 - part * part


def distance(queries: Places, keys: Places) -> jax.Array:
    """Query position minus key position, `[B, T, J]`."""
    return queries.position_BT[:, :, None] - keys.position_BT[:, None, :]


def visible(rule: Rule, queries: Places, keys: Places) -> jax.Array | None:
    """Which keys each query sees, `[B, T, J]`; None for all."""
    parts = []
    if rule.causal:
        parts.append(distance(queries, keys) >= 0)
    if rule.window is not None:
        parts.append(distance(queries, keys) < rule.window)
    if queries.segment_BT is not None and keys.segment_BT is not None:
        same = queries.segment_BT[:, :, None] == keys.segment_BT[:, None, :]
        parts.append(same & (keys.segment_BT[:, None, :] >= 0))
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = jnp.logical_and(seen, part)
    return seen
