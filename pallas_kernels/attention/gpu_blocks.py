"""How the arrays of attention lie in blocks on a Hopper GPU, and which blocks meet.

A block of threads owns OWN tokens of one side (queries, or keys for their gradients), ROWS for each
of the two warpgroups that compute, and goes through blocks of the other side. Which ones is told by
a table of numbers of blocks, made in plain JAX from the least and greatest position and segment id
of each block: [first, last) may be seen in part; of these [plain, plain_end) are seen in full, and
their scores need no mask. For documents side by side, windows and caches the table is exact; for
ids or positions in any other order it errs on the side of masks and of blocks that add nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention.rule import Places, Rule

ROWS = 64  # of one warpgroup
COMPUTING = 2  # warpgroups of a block of threads; a third copies
OWN = ROWS * COMPUTING
KEYS = 128  # a step of the forward pass
STEP = 64  # tokens a step of the backward pass, in either direction
NOBODY, NOTHING = -1, -2  # ids of queries that see no key, and of keys that nobody sees
FIRST, LAST, PLAIN, PLAIN_END = range(4)


class Plan(NamedTuple):
    """Sizes and rule: hashable."""

    rule: Rule
    batch: int
    heads: int
    groups: int
    key_size: int
    value_size: int
    placed: bool  # the rule needs positions
    interpreter: Any

    @property
    def share(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.groups


class Arrays(NamedTuple):
    """Inputs of the kernels, padded to whole blocks; heads lie side by side in the last axis."""

    q_BTF: jax.Array
    k_BJF: jax.Array
    v_BJF: jax.Array
    queries: Places  # `[B, T]`, int32
    keys: Places


def pad(x_BT: jax.Array, *, mode: str = "constant", fill: int = 0) -> jax.Array:
    """Tokens to whole blocks."""
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % OWN)
    if mode == "constant":
        return jnp.pad(x_BT, widths, constant_values=fill)
    return jnp.pad(x_BT, widths, mode=mode)


def flat(x_BTHK: jax.Array) -> jax.Array:
    """`[B, T, H, K]` to `[B, L, H K]`, L of whole blocks."""
    return pad(x_BTHK.reshape(*x_BTHK.shape[:2], -1))


def prepare(rule: Rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, queries: Places, keys: Places):
    """The plan and the arrays of a call."""
    batch, tokens, heads, key_size = q_BTHK.shape
    count, groups, value_size = v_BJGV.shape[1:]
    placed = rule.causal or rule.window is not None or slopes_H is not None
    interpreter = dispatch.current_target().interpreter
    plan = Plan(rule, batch, heads, groups, key_size, value_size, placed, interpreter)

    ids: tuple = (queries.segment_BT, keys.segment_BT)
    # Keys behind the last are hidden by an id, unless causality hides them.
    if count % OWN and not (rule.causal and rule.offset is not None) and ids[0] is None:
        ids = (jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, count), jnp.int32))

    def whole(x_BT, **settings):
        if x_BT is None:
            return None
        x_BL = pad(x_BT.astype(jnp.int32), **settings)
        return jnp.broadcast_to(x_BL, (batch, x_BL.shape[1]))

    position_BT, position_BJ = queries.position_BT, keys.position_BT
    if rule.offset is not None:
        position_BT = rule.offset + jnp.arange(-(-tokens // OWN) * OWN)[None]
        position_BJ = jnp.arange(-(-count // OWN) * OWN)[None]
    segment_BT, segment_BJ = ids
    if segment_BT is not None:
        segment_BT = jnp.maximum(segment_BT, NOBODY)
        segment_BJ = jnp.where(segment_BJ < 0, NOTHING, segment_BJ)
    return plan, Arrays(
        flat(q_BTHK),
        flat(k_BJGK),
        flat(v_BJGV),
        Places(whole(position_BT, mode="edge"), whole(segment_BT, mode="edge")),
        Places(whole(position_BJ, mode="edge"), whole(segment_BJ, fill=NOTHING)),
    )


def reach(rule: Rule, arrays: Arrays, rows: int, columns: int, *, of_keys: bool) -> jax.Array:
    """The table `[B, blocks, 4]`, of blocks of `rows` queries over blocks of `columns` keys, or,
    `of_keys`, of the same blocks of keys over those of queries."""
    query, key = arrays.queries, arrays.keys

    def bounds(x_BT, size):
        x_BNC = x_BT.reshape(len(x_BT), -1, size)
        return jnp.min(x_BNC, -1), jnp.max(x_BNC, -1)

    (q_low, q_high), (k_low, k_high) = (
        bounds(query.position_BT, rows),
        bounds(key.position_BT, columns),
    )
    q_low, q_high, k_low, k_high = (
        q_low[..., None],
        q_high[..., None],
        k_low[:, None],
        k_high[:, None],
    )
    seen = jnp.ones((*q_low.shape[:2], k_low.shape[2]), bool)
    plain = seen
    if rule.causal:
        seen, plain = seen & (q_high >= k_low), plain & (q_low >= k_high)
    if rule.window is not None:
        seen = seen & (q_low - k_high < rule.window)
        plain = plain & (q_high - k_low < rule.window)
    if query.segment_BT is not None and key.segment_BT is not None:
        own, other = bounds(query.segment_BT, rows), bounds(key.segment_BT, columns)
        used = jnp.where(key.segment_BT < 0, jnp.iinfo(jnp.int32).max, key.segment_BT)
        low, high = (x[..., None] for x in own)
        least, most = (x[:, None] for x in other)
        meets = (bounds(used, columns)[0][:, None] <= high) & (low <= most) & (most >= 0)
        seen = seen & meets
        plain = plain & (low == high) & (least == most) & (low == least)
    plain = plain & seen
    if of_keys:
        seen, plain = (jnp.swapaxes(x, 1, 2) for x in (seen, plain))
    return _ranges(seen, plain)


def _ranges(seen_BIN: jax.Array, plain_BIN: jax.Array) -> jax.Array:
    count = seen_BIN.shape[2]
    place = jnp.arange(count, dtype=jnp.int32)

    def end(mask_BIN):
        return jnp.max(jnp.where(mask_BIN, place + 1, 0), -1)

    last, plain_end = end(seen_BIN), end(plain_BIN)
    first = jnp.min(jnp.where(seen_BIN, place, count), -1)
    plain = end(~plain_BIN & (place < plain_end[..., None]))  # the run that ends at `plain_end`
    return jnp.stack([jnp.minimum(first, last), last, plain, plain_end], -1)


class Walk(NamedTuple):
    """The steps of a block of threads: blocks seen in full first, then those that need a mask."""

    first: jax.Array
    plain: jax.Array
    full: jax.Array  # number of blocks seen in full
    masked: jax.Array

    def block(self, step: jax.Array, *, masked: bool) -> jax.Array:
        """The number of the block of a step; each of the two kinds counts from 0."""
        if not masked:
            return self.plain + step
        block = self.first + step
        return block + jnp.where(block >= self.plain, self.full, 0)

    def any_block(self, step: jax.Array) -> jax.Array:
        """The same for a step of either kind, counted from the first step."""
        masked = self.block(step - self.full, masked=True)
        return jnp.where(step < self.full, self.block(step, masked=False), masked)


def walk_of(table_BI4: Any, row: jax.Array, block: jax.Array) -> Walk:
    """From the table in memory."""
    first, last, plain, end = (table_BI4[row, block, n] for n in (FIRST, LAST, PLAIN, PLAIN_END))
    return Walk(first, plain, end - plain, last - first - (end - plain))


def turned(block: jax.Array, count: int, rule: Rule) -> jax.Array:
    """Causal queries have the more work the later they are: blocks with most of it begin first."""
    return count - 1 - block if rule.causal else block
