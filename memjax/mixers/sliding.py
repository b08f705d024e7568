"""Blocks of queries, each with the keys that end with it: for attention with a bounded reach.

Keys are `before + T` tokens, the last T of them the queries' own. Block n is queries n C to
n C + C - 1; its keys are the `before` tokens before them and the block itself, in whole blocks.
"""

import jax
import jax.numpy as jnp


class Blocks:
    """How T queries and `before + T` keys are cut into blocks of `chunk` queries."""

    def __init__(self, tokens: int, before: int, chunk: int):
        self.tokens, self.before = tokens, before
        self.size = min(chunk, tokens)
        self.count = -(-tokens // self.size)
        # One block alone needs no keys but its own; several share theirs in whole blocks.
        self.behind = self.count * self.size - tokens
        self.reach = before if self.count == 1 else self.size * -(-before // self.size)

    def queries(self, x_BT: jax.Array, fill: int = 0) -> jax.Array:
        """[B, T, ...] to [B, N, C, ...]."""
        x_BT = self._pad(x_BT, 0, fill)
        return x_BT.reshape(x_BT.shape[0], self.count, self.size, *x_BT.shape[2:])

    def keys(self, x_BJ: jax.Array, fill: int = 0) -> jax.Array:
        """[B, before + T, ...] to [B, N, reach + C, ...]."""
        x_BJ = self._pad(x_BJ, self.reach - self.before, fill)
        if self.count == 1:
            return x_BJ[:, None]
        x_BNC = x_BJ.reshape(x_BJ.shape[0], -1, self.size, *x_BJ.shape[2:])
        shifts = range(self.reach // self.size + 1)
        return jnp.concatenate([x_BNC[:, i : i + self.count] for i in shifts], 2)

    def gap(self) -> jax.Array:
        """Tokens from each key of a block to each query, [C, reach + C]; below 0 for later ones."""
        return self.reach + jnp.arange(self.size)[:, None] - jnp.arange(self.reach + self.size)

    def join(self, y_BNC: jax.Array) -> jax.Array:
        """[B, N, C, ...] to [B, T, ...]."""
        y_BT = y_BNC.reshape(y_BNC.shape[0], -1, *y_BNC.shape[3:])
        return y_BT[:, : self.tokens]

    def _pad(self, x: jax.Array, front: int, fill: int) -> jax.Array:
        more = ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, ((0, 0), (front, self.behind), *more), constant_values=fill)
