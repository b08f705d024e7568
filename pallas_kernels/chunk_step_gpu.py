"""The step that matrix memories share, on a Hopper GPU (Mosaic GPU): one kernel for all chunks.

    d  = u - w S                                   (linear attention: no w, d = u = v)
    o  = scale ((q kT . pairs) d + enter (q S))
    S' = through S + (leave k)T d

A block of threads (one warpgroup) takes one lane and 64 columns of values through all chunks: tiles
come by TMA, products are wgmma with float32 accumulators, and the state stays in registers.
Forward only. Operands of products are rounded to bfloat16.

It has run in the interpreter and has been compiled; it has not been timed on a GPU.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, tile_math

CHUNK = 64  # tokens: the rows of one wgmma
COLUMNS = 64  # of values: with more, the state of K = 128 does not fit the registers
KEY_SIZES = (64, 128)


class Gates(NamedTuple):
    """Numbers of tokens, `[N, chunks, C]`, float32. `through` is `enter` of the last token.

    pairs[i, j] = exp((coarse_i - coarse_j) + (fine_i - fine_j)) for j <= i of the same document.
    """

    coarse: jax.Array
    fine: jax.Array
    document: jax.Array
    enter: jax.Array
    leave: jax.Array


def unfit(q, k, v, log_decay, *, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; it must be bfloat16"
    if q.shape[-1] not in KEY_SIZES:
        return f"K={q.shape[-1]} must be one of {KEY_SIZES}"
    if v.shape[-1] % COLUMNS:
        return f"V={v.shape[-1]} must be a multiple of {COLUMNS}"
    if log_decay is not None and log_decay.ndim == 4:
        return "log_decay must be None or one a head"
    if chunk != CHUNK:
        return f"chunk={chunk} must be {CHUNK}"
    return None


def in_chunks(x_NL: jax.Array) -> jax.Array:
    """`[N, L, ...]` to `[N, chunks, C, ...]`."""
    return x_NL.reshape(x_NL.shape[0], -1, CHUNK, *x_NL.shape[2:])


def decay_of(log_decay_rows: jax.Array | None, document_rows: jax.Array | None, shape) -> Any:
    """`tile_math.Decay` of every tile, from rows `[N, chunks, 1, C]` and `[B, chunks, 1, C]`."""
    lanes, chunks = shape
    if document_rows is None:
        document_rows = jnp.zeros((lanes, chunks, 1, CHUNK), jnp.float32)
    document_rows = jnp.repeat(document_rows, lanes // document_rows.shape[0], axis=0)
    if log_decay_rows is None:
        log_decay_rows = jnp.zeros((lanes, chunks, 1, CHUNK), jnp.float32)
    tile = jax.vmap(jax.vmap(lambda g, document: tile_math.decay_of(g, document, CHUNK)))
    return tile(log_decay_rows, document_rows)


def gates_of(decay: Any) -> Gates:
    enter, leave = (jax.vmap(jax.vmap(f))(decay) for f in (tile_math.enter, tile_math.leave))
    columns = (decay.coarse_CK, decay.fine_CK, decay.document_C1, enter, leave)
    return Gates(*(x[..., 0] for x in columns))


def chunk_steps(
    q_NLK: jax.Array,
    k_NLK: jax.Array,
    u_NLV: jax.Array,
    w_NLK: jax.Array | None,
    gates: Gates,
    state_NKV: jax.Array,
    *,
    scale: float,
    interpreter: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """o `[N, L, V]` bfloat16, and the last state `[N, K, V]` float32; q, k, u, w bfloat16."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lanes, tokens, key_size = q_NLK.shape
    value_size = u_NLV.shape[2]
    chunks = tokens // CHUNK
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    bfloat16 = jnp.bfloat16

    def product(a, b, *, add=None, a_transposed=False, b_transposed=False):
        """A product of two tiles in shared memory, in registers, added to `add`."""
        if interpreter is not None and (a_transposed or b_transposed):
            # The interpreter of JAX 0.10 has no wgmma of transposed operands.
            contract = ((0 if a_transposed else 1,), (1 if b_transposed else 0,))
            out = lax.dot_general(
                a[...], b[...], (contract, ((), ())), preferred_element_type=jnp.float32
            )
            return out if add is None else add + out
        a = a.T if a_transposed else a
        b = b.T if b_transposed else b

        def multiply(accumulator):
            plgpu.wgmma(accumulator, a, b)
            plgpu.wgmma_wait(0)
            return accumulator[...]

        def accumulate(accumulator):
            plgpu.wgmma(accumulator, a, b)
            plgpu.wgmma_wait(0)

        if add is not None and interpreter is not None:  # nor has it run_state
            return add + pl.run_scoped(multiply, plgpu.ACC(add.shape, jnp.float32))
        if add is not None:
            return pl.run_state(accumulate)(plgpu.ACC.init(add))
        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def by_row(ref, columns):
        return lax.broadcast_in_dim(ref[...], (CHUNK, columns), (0,))

    def kernel(*refs):
        *tokens_hbm, state_hbm = refs[:count]
        o_hbm, last_hbm, *scratch = refs[count:]
        *tiles, o_tile, keys_tile, pairs_tile, state_tile, wide_tile, loaded, started = scratch
        lane, column = lax.axis_index("lane"), lax.axis_index("column") * COLUMNS
        own = pl.ds(column, COLUMNS)
        plgpu.copy_gmem_to_smem(state_hbm.at[lane, :, own], wide_tile, started)
        plgpu.barrier_wait(started)

        def one_chunk(chunk, state):
            rows = pl.ds(chunk * CHUNK, CHUNK)
            for source, tile in zip(tokens_hbm[:matrices], tiles[:matrices]):
                whole = source is not tokens_hbm[2]
                view = source.at[lane, rows] if whole else source.at[lane, rows, own]
                plgpu.copy_gmem_to_smem(view, tile, loaded)
            for source, tile in zip(tokens_hbm[matrices:], tiles[matrices:]):
                plgpu.copy_gmem_to_smem(source.at[lane, chunk], tile, loaded)
            plgpu.barrier_wait(loaded)
            q, k, u, *w = tiles[:matrices]
            coarse, fine, document, enter, leave = tiles[matrices:]

            state_tile[...] = state.astype(bfloat16)
            plgpu.commit_smem()
            if w:
                less = product(w[0], state_tile, add=-u[...].astype(jnp.float32))
                u[...] = (-less).astype(bfloat16)
            scores = product(q, k, b_transposed=True)
            pairs_tile[...] = (scores * pairs(coarse, fine, document)).astype(bfloat16)
            written = k[...].astype(jnp.float32) * by_row(leave, key_size)
            keys_tile[...] = written.astype(bfloat16)
            plgpu.commit_smem()
            read = product(q, state_tile) * by_row(enter, COLUMNS)
            o = product(pairs_tile, u, add=read)
            o_tile[...] = (o * scale).astype(bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, o_hbm.at[lane, rows, own])
            state = product(keys_tile, u, add=state * enter[CHUNK - 1], a_transposed=True)
            plgpu.wait_smem_to_gmem(0)
            return state

        state = lax.fori_loop(0, chunks, one_chunk, wide_tile[...])
        wide_tile[...] = state
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(wide_tile, last_hbm.at[lane, :, own])
        plgpu.wait_smem_to_gmem(0)

    def pairs(coarse, fine, document):
        def against(ref):
            row = lax.broadcast_in_dim(ref[...], (CHUNK, CHUNK), (0,))
            return row - lax.broadcast_in_dim(ref[...], (CHUNK, CHUNK), (1,))

        shape = (CHUNK, CHUNK)
        earlier = lax.broadcasted_iota(jnp.int32, shape, 0) >= lax.broadcasted_iota(
            jnp.int32, shape, 1
        )
        seen = earlier & (against(document) == 0.0)
        # The gap of a pair that is not seen may be positive: it is replaced before exp.
        gap = jnp.where(seen, against(coarse) + against(fine), 0.0)
        return jnp.where(seen, jnp.exp(gap), 0.0)

    tokens_in = [q_NLK, k_NLK, u_NLV] + ([] if w_NLK is None else [w_NLK])
    matrices = len(tokens_in)
    count = matrices + len(gates) + 1
    key_tile = plgpu.SMEM((CHUNK, key_size), bfloat16, transforms=tiled)
    value_tile = plgpu.SMEM((CHUNK, COLUMNS), bfloat16, transforms=tiled)
    scratch: list[Any] = [key_tile, key_tile, value_tile] + [key_tile] * (matrices - 3)
    scratch += [plgpu.SMEM((CHUNK,), jnp.float32)] * len(gates)
    scratch += [
        plgpu.SMEM((CHUNK, COLUMNS), bfloat16),
        key_tile,
        plgpu.SMEM((CHUNK, CHUNK), bfloat16, transforms=tiled),
        plgpu.SMEM((key_size, COLUMNS), bfloat16, transforms=tiled),
        plgpu.SMEM((key_size, COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=matrices + len(gates)),
        plgpu.Barrier(num_arrivals=1),
    ]
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        kernel,
        out_type=(
            compat.like((lanes, tokens, value_size), bfloat16, q_NLK),
            compat.like(state_NKV.shape, jnp.float32, q_NLK),
        ),
        scratch_types=scratch,
        grid=(lanes, value_size // COLUMNS),
        grid_names=("lane", "column"),
        interpret=interpreter,
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
    )(*tokens_in, *gates, state_NKV)
