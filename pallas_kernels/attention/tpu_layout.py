"""How the arrays of attention lie in blocks on a TPU, and what of a block is seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.attention.rule import Rule, capped
from pallas_kernels.attention.tile import HIDDEN
from pallas_kernels.tile_math import rows_dot_rows

ROW = 256  # queries a block
KEYS = 512


class Arrays(NamedTuple):
    """Inputs of the kernels, padded to whole blocks; N lanes are heads of rows of the batch.

    Places of queries are columns `[B, T, 1]`, those of keys rows `[B, blocks, 1, C]`; B may be 1.
    """

    q_NTK: jax.Array
    k_MJK: jax.Array
    v_MJV: jax.Array
    slope_N11: jax.Array | None
    query_position: jax.Array | None
    key_position: jax.Array | None
    query_segment: jax.Array | None
    key_segment: jax.Array | None


class Layout(NamedTuple):
    """Sizes and rule: hashable."""

    rule: Rule
    heads: int
    share: int  # query heads that read one key head
    row: int
    block: int
    rows: int
    blocks: int
    keys: int  # without the padding
    kind: Any
    interpreter: Any


class Scores(NamedTuple):
    """Of a tile: HIDDEN where not seen; the derivative of the cap; query minus key position."""

    scores: jax.Array
    steepness: jax.Array | None
    distance: jax.Array | None


def block_size(most: int, count: int) -> int:
    return min(most, max(16, 1 << (count - 1).bit_length()))


def pad(x_NT: jax.Array, length: int) -> jax.Array:
    widths = [(0, 0)] * x_NT.ndim
    widths[1] = (0, length - x_NT.shape[1])
    return jnp.pad(x_NT, widths)


def to_rows(x_BGRT1: jax.Array, plan: Layout) -> jax.Array:
    x_NT = pad(x_BGRT1.astype(jnp.float32).reshape(-1, x_BGRT1.shape[3]), plan.rows * plan.row)
    return x_NT.reshape(-1, plan.rows, 1, plan.row)


def from_rows(x_NI1C: jax.Array, tokens: int) -> jax.Array:
    return x_NI1C.reshape(x_NI1C.shape[0], -1)[:, :tokens]


def prepare(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys) -> tuple[Layout, Arrays]:
    batch, groups, share, tokens, _ = q_BGRTK.shape
    count = k_BGJK.shape[2]
    row, block = block_size(ROW, tokens), block_size(KEYS, count)
    rows, blocks = -(-tokens // row), -(-count // block)
    interpreter = dispatch.current_target().interpreter
    plan = Layout(
        rule, groups * share, share, row, block, rows, blocks, count, q_BGRTK.dtype, interpreter
    )

    def columns(x_BT):
        return None if x_BT is None else pad(x_BT.astype(jnp.int32), rows * row)[..., None]

    def as_rows(x_BJ):
        if x_BJ is None:
            return None
        x_BJ = pad(x_BJ.astype(jnp.int32), blocks * block)
        return x_BJ.reshape(x_BJ.shape[0], blocks, 1, block)

    by_array = rule.offset is None and (
        rule.causal or rule.window is not None or slopes_GR is not None
    )
    ids: tuple = (queries.segment_BT, keys.segment_BT)
    if ids[0] is None or ids[1] is None:
        ids = (None, None)
    slope = None
    if slopes_GR is not None:
        slope = jnp.tile(slopes_GR.reshape(-1), batch)[:, None, None]
    return plan, Arrays(
        pad(q_BGRTK.reshape(-1, *q_BGRTK.shape[3:]), rows * row),
        pad(k_BGJK.reshape(-1, *k_BGJK.shape[2:]), blocks * block),
        pad(v_BGJV.reshape(-1, *v_BGJV.shape[2:]), blocks * block),
        slope,
        columns(queries.position_BT) if by_array else None,
        as_rows(keys.position_BT) if by_array else None,
        columns(ids[0]),
        as_rows(ids[1]),
    )


def compiler(plan: Layout) -> dict[str, Any]:
    semantics: Any = ("parallel", "parallel", "arbitrary")
    return dict(
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=False if plan.interpreter is None else plan.interpreter,
    )


def quotient(x: Any, by: int) -> Any:
    # lax.div truncates, which is the quotient of numbers from 0, and Mosaic has it on every TPU
    return x if by == 1 else lax.div(x, jnp.int32(by))


def specs(plan: Layout, arrays: Arrays, at) -> Arrays:
    """Blocks of the inputs; `at` maps the grid to (lane, block of queries, block of keys)."""

    def query(x):
        return pl.BlockSpec((None, plan.row, x.shape[2]), lambda *g: (at(*g)[0], at(*g)[1], 0))

    def key(x):
        return pl.BlockSpec(
            (None, plan.block, x.shape[2]),
            lambda *g: (quotient(at(*g)[0], plan.share), fetched(plan, *at(*g)[1:]), 0),
        )

    def lane(x, n):
        return 0 if x.shape[0] == 1 else quotient(n, plan.heads)

    def query_place(x):
        return pl.BlockSpec((None, plan.row, 1), lambda *g: (lane(x, at(*g)[0]), at(*g)[1], 0))

    def key_place(x):
        return pl.BlockSpec(
            (None, None, 1, plan.block),
            lambda *g: (lane(x, at(*g)[0]), fetched(plan, *at(*g)[1:]), 0, 0),
        )

    def slope(x):
        return pl.BlockSpec((None, 1, 1), lambda *g: (at(*g)[0], 0, 0))

    kinds = (query, key, key, slope, query_place, key_place, query_place, key_place)
    blocks: Any = [None if x is None else kind(x) for kind, x in zip(kinds, arrays)]
    return Arrays(*blocks)


def row_spec(rows: int, size: int, at) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows, size), lambda *g: (*at(*g), 0))


def numbers_spec(plan: Layout, at) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, 1, plan.row), lambda *g: (*at(*g), 0, 0))


def last_seen(plan: Layout, i: Any) -> Any:
    """The last position of a block of queries, as a key position from 0."""
    assert plan.rule.offset is not None
    return jnp.maximum(plan.rule.offset + (i + 1) * plan.row - 1, 0)


def fetched(plan: Layout, i: Any, j: Any) -> Any:
    """The block of keys to hold: a hidden one behind the queries is not fetched anew."""
    if not (plan.rule.causal and plan.rule.offset is not None):
        return j
    last = jnp.minimum(quotient(last_seen(plan, i), plan.block), plan.blocks - 1)
    return jnp.minimum(j, last)


def is_seen(plan: Layout, i: Any, j: Any) -> Any:
    """Whether any query of block i may see a key of block j, by position."""
    rule = plan.rule
    seen: Any = True
    if rule.offset is not None and rule.causal:
        seen = rule.offset + (i + 1) * plan.row - 1 >= j * plan.block
    if rule.offset is not None and rule.window is not None:
        reach = rule.offset + i * plan.row - (j * plan.block + plan.block - 1) < rule.window
        seen = jnp.logical_and(seen, reach)
    return seen


def scores(plan: Layout, refs: Arrays, i: Any, j: Any) -> Scores:
    """Scores of block i of queries and block j of keys."""
    rule = plan.rule
    shape = (plan.row, plan.block)
    logits = rows_dot_rows(refs.q_NTK[...], refs.k_MJK[...], plan.kind) * rule.scale
    scores, steepness = capped(rule, logits)
    column = j * plan.block + lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = None
    if refs.query_position is not None and refs.key_position is not None:
        distance = refs.query_position[...] - refs.key_position[...]
    elif rule.offset is not None:
        row = i * plan.row + lax.broadcasted_iota(jnp.int32, shape, 0)
        distance = rule.offset + row - column
    if refs.slope_N11 is not None and distance is not None:
        scores = scores - refs.slope_N11[...] * distance.astype(jnp.float32)
    seen = []
    if rule.causal and distance is not None:
        seen.append(distance >= 0)
    if rule.window is not None and distance is not None:
        seen.append(distance < rule.window)
    if refs.query_segment is not None and refs.key_segment is not None:
        key = refs.key_segment[...]
        seen.append((refs.query_segment[...] == key) & (key >= 0))
    if plan.keys != plan.blocks * plan.block:
        seen.append(column < plan.keys)
    for mask in seen:
        scores = jnp.where(mask, scores, HIDDEN)
    return Scores(scores, steepness, distance)
