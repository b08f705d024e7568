"""What the kernels for a Hopper GPU share: tiles, products and weights of one warpgroup.

Layouts are named where a value is born (lane semantics), so that none has to be inferred. The
interpreter of JAX 0.10 knows no layouts, no transposed operands and no accumulators that start from
a value: there, the same products are plain ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

CHUNK = 64  # tokens: the rows of one wgmma
SIZES = (64, 128)  # K and V
COARSE, FINE, DOCUMENT, ENTER, LEAVE, BETA = range(6)  # rows of the gates of a chunk

BLOCKS = 128  # of threads, near one for each of 132 processors, where chunks wait for each other


def stages_of(columns: int, key_size: int) -> int:
    """Chunks that such a block loads ahead: more where it has a processor for itself."""
    return 2 if columns == 64 or key_size == 256 else 4


def columns_of(lanes: int, value_size: int, key_size: int) -> int:
    """Columns of V that it takes: as few as give every processor a block, or as there is room."""
    if key_size == 256:
        return 16
    return next((n for n in (64, 32) if lanes * (value_size // n) >= BLOCKS), 16)


def dtype_unfit(**arrays: jax.Array) -> str | None:
    """Why kernels of bfloat16 cannot take the arrays."""
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}; it must be bfloat16"
    return None


def card_unfit() -> str | None:
    """Why the kernels cannot run on the card of this process, where it has one."""
    if jax.default_backend() == "gpu":
        capability = jax.local_devices()[0].compute_capability
        if capability != "9.0":
            return f"its instructions are those of compute capability 9.0, not {capability}"
    return None


class Warpgroup:
    """Operations in the body of a kernel."""

    def __init__(self, interpreter: Any):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self.pl, self.gpu, self.interpreted = pl, plgpu, interpreter is not None
        self.settings: dict[str, Any] = {
            "interpret": interpreter,
            "compiler_params": plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
            ),
        }
        self.layout = plgpu.Layout.WGMMA
        self.by_row, self.by_column = self.layout.reduce(1), self.layout.reduce(0)

    def tile(self, *shape: int, width: int = 64) -> Any:
        """bfloat16 in shared memory, in the order that TMA and wgmma want: blocks of 8 x `width`,
        which is the same for both operands of a product."""
        transforms = (
            self.gpu.TilingTransform((8, width)),
            self.gpu.SwizzleTransform(2 * width),
        )
        return self.gpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def read(self, ref: Any, *index: Any, layout: Any = None) -> jax.Array:
        """Memory to registers."""
        if self.interpreted:
            return ref[index or ...]
        layout = self.layout if layout is None else layout
        return compat.gpu_load(ref.at[index] if index else ref, layout)

    def load_chunk(self, heads: int, by_token: Any, by_chunk: Any, loaded: Any) -> tuple[Any, Any]:
        """Fill the tiles of a block of threads that has a chunk of a lane for itself, and wait.

        Pairs of an array in memory and a tile: `[B, T, H F]` and `[C, F]` by token, `[N, M, ...]`
        by chunk. Returns the lane and the chunk, and for a tile by token its place in an array.
        """
        chunk, lane = lax.axis_index("chunk"), lax.axis_index("lane")
        row, head = lax.div(lane, heads), lax.rem(lane, heads)
        rows = self.pl.ds(chunk * CHUNK, CHUNK)

        def place(tile: Any) -> tuple[Any, ...]:
            size = tile.shape[-1]
            return row, rows, self.pl.ds(head * size, size)

        for source, tile in by_token:
            self.gpu.copy_gmem_to_smem(source.at[place(tile)], tile, loaded)
        for source, tile in by_chunk:
            self.gpu.copy_gmem_to_smem(source.at[lane, chunk], tile, loaded)
        self.gpu.barrier_wait(loaded)
        return (lane, chunk), place

    def zeros(self, *shape: int) -> jax.Array:
        return self.full(0.0, *shape, layout=self.layout)

    def full(self, value: float, *shape: int, layout: Any) -> jax.Array:
        x = jnp.full(shape, value, jnp.float32)
        return x if self.interpreted else self.gpu.layout_cast(x, layout)

    def rows(self, gates: Any, row: int, columns: int) -> jax.Array:
        """A gate of each token, along its row."""
        gate = self.read(gates, row, layout=self.by_row)
        return lax.broadcast_in_dim(gate, (CHUNK, columns), (0,))

    def columns(self, gates: Any, row: int) -> jax.Array:
        """A gate of each token, along its column of a matrix of pairs."""
        gate = self.read(gates, row, layout=self.by_column)
        return lax.broadcast_in_dim(gate, (CHUNK, CHUNK), (1,))

    def places(self, rows: int = CHUNK, columns: int = CHUNK) -> list[jax.Array]:
        """Row and column of every entry of a matrix, of every pair of tokens if not told."""
        shape = (rows, columns)
        if self.interpreted:
            return [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1)]
        iota = self.gpu.broadcasted_iota
        return [iota(jnp.int32, shape, axis, layout=self.layout) for axis in (0, 1)]

    def indices(self, count: int, layout: Any) -> jax.Array:
        """0, 1, ..., of rows or of columns."""
        if self.interpreted:
            return lax.iota(jnp.int32, count)
        return self.gpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    def weights(self, gates: Any, *, reverse: bool = False, strict: bool = False) -> jax.Array:
        """pair_ij of rows i and columns j: 0 unless j <= i (or >=, or <) in the same document."""
        i, j = self.places()
        early, late = (i, j) if reverse else (j, i)
        seen = early < late if strict else early <= late
        if gates is None:
            return seen.astype(jnp.float32)

        def gap(row: int) -> jax.Array:
            along, across = self.rows(gates, row, CHUNK), self.columns(gates, row)
            return across - along if reverse else along - across

        seen = seen & (gap(DOCUMENT) == 0.0)
        # The gap of a pair that is not seen may be positive: it is replaced before exp.
        return jnp.where(seen, jnp.exp(jnp.where(seen, gap(COARSE) + gap(FINE), 0.0)), 0.0)

    def products(
        self,
        *pairs: Any,
        add: tuple[jax.Array, ...] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Products in registers, added to `add`. A pair of operands: each a tile, or registers on
        the left, or `(tile,)` for its transpose; more pairs that are added, as a list. `meanwhile`
        is done between their issue and their end."""
        sums = [pair if isinstance(pair, list) else [pair] for pair in pairs]
        if self.interpreted:
            if meanwhile is not None:
                meanwhile()
            out = tuple(
                functools.reduce(jnp.add, [_simulated(*pair) for pair in pairs]) for pairs in sums
            )
            return tuple(x + y for x, y in zip(out, add, strict=True)) if add else out

        def multiply(*accumulators: Any) -> Any:
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for pair in pairs:
                    left, right = (x[0].T if isinstance(x, tuple) else x for x in pair)
                    self.gpu.wgmma(accumulator, left, right)
            if meanwhile is not None:
                meanwhile()
            self.gpu.wgmma_wait(0)
            return None if add else tuple(x[...] for x in accumulators)

        if add:
            start = tuple(self.gpu.ACC.init(x) for x in add)
            return self.pl.run_state(lambda refs: multiply(*refs))(start)
        sizes = [(_shape(pairs[0][0])[0], _shape(pairs[0][1])[1]) for pairs in sums]
        return self.pl.run_scoped(multiply, *(self.gpu.ACC(size, jnp.float32) for size in sizes))

    def accumulate(self, shapes: list[tuple[int, int]], loops: Any, state: Any) -> tuple[Any, Any]:
        """Sums of products in registers over loops, and the state behind them.

        `loops` are pairs of a count and `step(n, sums, state)`, which adds to a sum by `add_to` and
        returns its state.
        """
        if self.interpreted:
            zeros = [jnp.zeros(shape, jnp.float32) for shape in shapes]
            carry = (zeros, state)
            for count, step in loops:

                def one(n, carry, step=step):
                    sums = [_Simulated(x) for x in carry[0]]
                    state = step(n, sums, carry[1])
                    return [x.value for x in sums], state

                carry = lax.fori_loop(0, count, one, carry)
            return carry

        def scoped(*sums: Any) -> tuple[Any, Any]:
            after = state
            for count, step in loops:
                after = lax.fori_loop(0, count, lambda n, x, step=step: step(n, sums, x), after)
            self.gpu.wgmma_wait(0)
            return [x[...] for x in sums], after

        return self.pl.run_scoped(scoped, *(self.gpu.ACC(shape, jnp.float32) for shape in shapes))

    def add_to(self, total: Any, left: Any, right: Any) -> None:
        """Begin a product that is added to a sum of `accumulate`; whoever next waits for products
        waits for it."""
        if self.interpreted:
            total.value = total.value + _simulated(left, right)
        else:
            self.gpu.wgmma(total, left, right)


class _Simulated:
    """A sum of the interpreter."""

    def __init__(self, value: jax.Array):
        self.value = value


def _shape(operand: Any) -> tuple[int, ...]:
    return operand[0].shape[::-1] if isinstance(operand, tuple) else operand.shape


def _simulated(left: Any, right: Any) -> jax.Array:
    contract = ((0 if isinstance(left, tuple) else 1,), (1 if isinstance(right, tuple) else 0,))
    tiles = [x[0] if isinstance(x, tuple) else x for x in (left, right)]
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in tiles)
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)
