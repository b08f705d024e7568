"""All rows of queries against one part of the keys: unrolled if few, in one loop if many."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.tile import (
    LOWEST,
    Tile,
    TileGradients,
    TransposedGradients,
    merge,
    tile_forward,
    tile_transposed,
)
from pallas_kernels.products import accumulation_dtype

ROW = 128
UNROLLED_ROWS = 16
UNROLLED_SCORES = ROW * 4096  # of one head in one tile
NEVER = -3.0e38  # no log-sum-exp and no gradient is this number
LOOP_ROW = 256
LOOP_KEYS = 512


def forward(rule: Rule, whole: Tile) -> tuple[jax.Array, jax.Array]:
    """Output `[B, G, R, T, V]` and log-sum-exp `[B, G, R, T, 1]`, in float32 or wider."""
    if not _is_unrolled(whole):
        return _loop_forward(rule, whole)
    o: list[jax.Array] = []
    lse: list[jax.Array] = []
    for row, keys in _ranges(rule, whole):
        part = tile_forward(rule, _after(lse, _cut(whole, row, keys)))
        o.append(part[0])
        lse.append(part[1])
    return jnp.concatenate(o, axis=3), jnp.concatenate(lse, axis=3)


def backward(
    rule: Rule, whole: Tile, lse_BGRT1: jax.Array, dot_BGRT1: jax.Array, d_o_BGRTV: jax.Array
) -> TileGradients:
    """Gradients in float32 or wider; lse is that over all keys, of every part."""
    if not _is_unrolled(whole):
        return _loop_backward(rule, whole, lse_BGRT1, dot_BGRT1, d_o_BGRTV)
    d_q: list[jax.Array] = []
    total = _zero_gradients(whole)
    for (start, stop), (first, last) in _ranges(rule, whole):
        tile = _after(d_q or [lse_BGRT1], _cut(whole, (start, stop), (first, last)))
        cotangent = (x[:, :, :, start:stop] for x in (lse_BGRT1, dot_BGRT1, d_o_BGRTV))
        part = tile_transposed(rule, tile, *cotangent)
        d_q.append(part.q_BGRCK)
        total = total._replace(
            k_BGKJ=total.k_BGKJ.at[..., first:last].add(part.k_BGKJ),
            v_BGVJ=total.v_BGVJ.at[..., first:last].add(part.v_BGVJ),
            slopes_GR=_add_slopes(total.slopes_GR, part.slopes_GR),
        )
    return total._replace(q_BGRCK=jnp.concatenate(d_q, axis=3)).upright()


def _after(before: list[jax.Array], tile: Tile) -> Tile:
    """The tile, which cannot be computed before the last of `before` is.

    XLA would compute the scores of all rows ahead of what needs them, and in the backward pass find
    and keep those of the forward pass: half of tokens x tokens for every head, several times over.
    """
    if not before:
        return tile
    one = before[-1][(0,) * before[-1].ndim]
    nothing = jnp.where(one == NEVER, one, 0)
    q, k, v = (x + nothing.astype(x.dtype) for x in tile[:3])
    return tile._replace(q_BGRCK=q, k_BGJK=k, v_BGJV=v)


def _is_unrolled(whole: Tile) -> bool:
    tokens, keys = whole.q_BGRCK.shape[3], whole.k_BGJK.shape[2]
    few = tokens <= UNROLLED_ROWS * ROW
    return few and min(tokens, ROW) * keys <= UNROLLED_SCORES


def _ranges(rule: Rule, whole: Tile):
    """For each row its range of queries, and the range of keys it may see (one key if none)."""
    tokens, keys = whole.q_BGRCK.shape[3], whole.k_BGJK.shape[2]
    for start in range(0, tokens, ROW):
        stop = min(start + ROW, tokens)
        first, last = 0, keys
        if rule.offset is not None and rule.window is not None:
            first = max(rule.offset + start - rule.window + 1, 0)
        if rule.offset is not None and rule.causal:
            last = min(rule.offset + stop, keys)
        first = min(first, keys - 1)
        yield (start, stop), (first, max(last, first + 1))


def _cut(whole: Tile, row: tuple[int, int], keys: tuple[int, int]) -> Tile:
    return Tile(
        whole.q_BGRCK[:, :, :, slice(*row)],
        whole.k_BGJK[:, :, slice(*keys)],
        whole.v_BGJV[:, :, slice(*keys)],
        whole.slopes_GR,
        whole.queries.cut(*row),
        whole.keys.cut(*keys),
    )


def _zero_gradients(whole: Tile) -> TransposedGradients:
    dtype = accumulation_dtype(whole.q_BGRCK)
    slopes_GR = None if whole.slopes_GR is None else jnp.zeros(whole.slopes_GR.shape, dtype)
    by_column = (jnp.swapaxes(x, -1, -2) for x in (whole.k_BGJK, whole.v_BGJV))
    q, k, v = (jnp.zeros(x.shape, dtype) for x in (whole.q_BGRCK, *by_column))
    return compat.vary_like(TransposedGradients(q, k, v, slopes_GR), whole.q_BGRCK)


def _add_slopes(total_GR: jax.Array | None, part_GR: jax.Array | None) -> jax.Array | None:
    return None if total_GR is None or part_GR is None else total_GR + part_GR


def _loop_forward(rule: Rule, whole: Tile) -> tuple[jax.Array, jax.Array]:
    tokens, keys = whole.q_BGRCK.shape[3], whole.k_BGJK.shape[2]
    row, block = min(LOOP_ROW, tokens), min(LOOP_KEYS, keys)
    whole = _pad_tile(whole, row, block)
    o_shape = (*whole.q_BGRCK.shape[:3], row, whole.v_BGJV.shape[-1])
    dtype = accumulation_dtype(whole.q_BGRCK)
    nothing = (jnp.zeros(o_shape, dtype), jnp.full((*o_shape[:4], 1), LOWEST, dtype))
    nothing = compat.vary_like(nothing, whole.q_BGRCK)

    def one_row(_, index):
        def one_block(position, out):
            tile = _slice_tile(whole, index, row, position, block)
            return merge(out, tile_forward(rule, tile))

        return None, lax.fori_loop(*_blocks(rule, whole, index, row, block), one_block, nothing)

    _, (o, lse) = lax.scan(one_row, None, jnp.arange(whole.q_BGRCK.shape[3] // row))
    return _join_rows(o)[:, :, :, :tokens], _join_rows(lse)[:, :, :, :tokens]


def _loop_backward(rule, whole, lse_BGRT1, dot_BGRT1, d_o_BGRTV) -> TileGradients:
    tokens, keys = whole.q_BGRCK.shape[3], whole.k_BGJK.shape[2]
    row, block = min(LOOP_ROW, tokens), min(LOOP_KEYS, keys)
    whole = _pad_tile(whole, row, block)
    cotangent = [_pad(x, row, axis=3) for x in (lse_BGRT1, dot_BGRT1, d_o_BGRTV)]
    zeros = _zero_gradients(whole)
    zero_q = zeros.q_BGRCK[:, :, :, :row]

    def one_row(total, index):
        row_cotangent = [_slice(x, index * row, row, axis=3) for x in cotangent]

        def one_block(position, carry):
            d_q, d_k, d_v, d_slopes = carry
            tile = _slice_tile(whole, index, row, position, block)
            part = tile_transposed(rule, tile, *row_cotangent)
            d_k = _add_slice(d_k, part.k_BGKJ, position * block)
            d_v = _add_slice(d_v, part.v_BGVJ, position * block)
            d_slopes = _add_slopes(d_slopes, part.slopes_GR)
            return d_q + part.q_BGRCK, d_k, d_v, d_slopes

        bounds = _blocks(rule, whole, index, row, block)
        d_q, *total = lax.fori_loop(*bounds, one_block, (zero_q, *total))
        return tuple(total), d_q

    rows = jnp.arange(whole.q_BGRCK.shape[3] // row)
    start = (zeros.k_BGKJ, zeros.v_BGVJ, zeros.slopes_GR)
    (d_k, d_v, d_slopes), d_q = lax.scan(one_row, start, rows)
    d_q = _join_rows(d_q)[:, :, :, :tokens]
    return TransposedGradients(d_q, d_k[..., :keys], d_v[..., :keys], d_slopes).upright()


def _blocks(rule: Rule, whole: Tile, index: jax.Array, row: int, block: int):
    """First and last (exclusive) block of keys that can be seen from a row."""
    blocks = whole.k_BGJK.shape[2] // block
    first: int | jax.Array = 0
    last: int | jax.Array = blocks
    if rule.offset is not None and rule.window is not None:
        first = jnp.maximum(rule.offset + index * row - rule.window + 1, 0) // block
    if rule.offset is not None and rule.causal:
        last = jnp.clip((rule.offset + (index + 1) * row + block - 1) // block, 0, blocks)
    return first, last


def _pad_tile(whole: Tile, row: int, block: int) -> Tile:
    """Whole rows and blocks; padding keys are hidden by a segment id of -1."""
    queries, keys = whole.queries, whole.keys
    if whole.k_BGJK.shape[2] % block and keys.segment_BT is None:
        queries = Places(queries.position_BT, jnp.zeros_like(queries.position_BT))
        keys = Places(keys.position_BT, jnp.zeros_like(keys.position_BT))
    return Tile(
        _pad(whole.q_BGRCK, row, axis=3),
        _pad(whole.k_BGJK, block, axis=2),
        _pad(whole.v_BGJV, block, axis=2),
        whole.slopes_GR,
        _map_places(lambda x: _pad(x, row, axis=1), queries),
        Places(
            _pad(keys.position_BT, block, axis=1),
            None if keys.segment_BT is None else _pad(keys.segment_BT, block, axis=1, fill=-1),
        ),
    )


def _slice_tile(whole: Tile, index: jax.Array, row: int, position: jax.Array, block: int) -> Tile:
    start, first = index * row, position * block
    return Tile(
        _slice(whole.q_BGRCK, start, row, axis=3),
        _slice(whole.k_BGJK, first, block, axis=2),
        _slice(whole.v_BGJV, first, block, axis=2),
        whole.slopes_GR,
        _map_places(lambda x: _slice(x, start, row, axis=1), whole.queries),
        _map_places(lambda x: _slice(x, first, block, axis=1), whole.keys),
    )


def _map_places(function, places: Places) -> Places:
    segment_BT = None if places.segment_BT is None else function(places.segment_BT)
    return Places(function(places.position_BT), segment_BT)


def _pad(x: jax.Array, multiple: int, *, axis: int, fill: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=fill)


def _slice(x: jax.Array, start: jax.Array, size: int, *, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _add_slice(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    held = lax.dynamic_slice_in_dim(total, start, part.shape[-1], -1)
    return lax.dynamic_update_slice_in_dim(total, held + part, start, -1)


def _join_rows(x_NBGRCV: jax.Array) -> jax.Array:
    x_BGRNCV = jnp.moveaxis(x_NBGRCV, 0, 3)
    return x_BGRNCV.reshape(*x_BGRNCV.shape[:3], -1, x_BGRNCV.shape[-1])
