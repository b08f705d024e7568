"""Product keys: an MLP's place taken by a table of which every token reads a few rows."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax import sharding, telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, RMSNorm, normal, top_k
from memjax.memory.base import LayerMemory, LayerModule
from memjax.memory.tables import sum_rows
from memjax.mixers.base import MemoryReport, projection_flops
from pallas_kernels.products import accumulation_dtype, rows_dot_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeys(LayerMemory):
    """keys: keys of each half; the table has keys^2 rows. heads: searches a token.

    top_k: rows that each search reads. query_size: channels of a query, both halves together.
    """

    kind: ClassVar[str] = "product_keys"
    replaces_mlp: ClassVar[bool] = True
    keys: int = 128
    heads: int = 4
    top_k: int = 32
    query_size: int = 128

    def __post_init__(self):
        check_search(self)


def check_search(config: Any) -> None:
    """The rules of what a `KeySearch` reads of its config."""
    check_at_least(config, 1, "keys", "heads", "top_k")
    check_at_least(config, 2, "query_size")
    check(config, "query_size", config.query_size % 2 == 0, "must be even: it has two halves")
    rule = f"must be at most keys={config.keys}, those of a half"
    check(config, "top_k", config.top_k <= config.keys, rule)


class KeySearch(nnx.Module):
    """The rows of a table whose keys, pairs of half keys, have the largest products with a query.

    s_ij = q_1 . k_1i + q_2 . k_2j;   weights = softmax over the top_k largest s_ij, row i keys + j

    for each head, with its own queries and keys. The top_k sums are among those of the top_k of
    each half: with both sorted, s_ij has (i + 1)(j + 1) - 1 sums that are no smaller, so that only
    pairs with (i + 1)(j + 1) <= top_k, 119 for 32, can be among them.
    norm_keys: keys are normalised too, and products divided by sqrt(query_size).
    """

    def __init__(self, config: Any, d_model: int, *, norm_keys: bool, rngs: nnx.Rngs):
        self.heads, self.top_k = config.heads, config.top_k
        self.keys_of_half, half = config.keys, config.query_size // 2
        wide = config.heads * config.query_size
        self.query = Linear(d_model, wide, rngs=rngs, axes=("heads", "embed"))
        self.query_norm = RMSNorm(half, axes=("rank",))
        bound, shape = half**-0.5, (config.heads, 2, config.keys, half)
        keys = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.keys = nnx.Param(keys, axes=("heads", "value", "rank", "rank"))
        self.key_norm = RMSNorm(half, axes=("rank",)) if norm_keys else None
        self.scale = config.query_size**-0.5 if norm_keys else 1.0

    def __call__(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Int[Array, "B T J"], Float[Array, "B T J"]]:
        """Rows and their float32 weights, J = heads * top_k; weights of a head sum to one."""
        shape = (*x_BTD.shape[:2], self.heads, 2, -1)
        q_BTHPK = self.query_norm(self.query(x_BTD).reshape(shape))
        keys_HPNK = self.keys[...] if self.key_norm is None else self.key_norm(self.keys[...])
        # Tokens behind heads, as the product leaves them: scores are too many to be turned round.
        q_HPBTK = jnp.transpose(q_BTHPK, (2, 3, 0, 1, 4))
        scores_HPBTN = self.scale * _scores(q_HPBTK, keys_HPNK.astype(x_BTD.dtype))
        best_HPBTK, place_HPBTK = top_k(scores_HPBTN, self.top_k)
        one, two = pairs(self.top_k)
        sums_HBTS = best_HPBTK[:, 0][..., one] + best_HPBTK[:, 1][..., two]
        top_HBTK, pair_HBTK = top_k(sums_HBTS, self.top_k)
        first, second = (
            jnp.take_along_axis(place_HPBTK[:, half], jnp.asarray(of)[pair_HBTK], -1)
            for half, of in enumerate((one, two))
        )

        def flat(x_HBTK: jax.Array) -> jax.Array:
            return jnp.moveaxis(x_HBTK, 0, 2).reshape(*x_BTD.shape[:2], -1)

        weight_HBTK = jax.nn.softmax(top_HBTK, -1)
        row_BTJ = flat(first * self.keys_of_half + second)
        if telemetry.heard():
            rows_N = jnp.zeros(self.keys_of_half**2).at[row_BTJ.reshape(-1)].set(1.0)
            telemetry.note("slot_use", rows_N)
            telemetry.note("largest_weight", jnp.moveaxis(weight_HBTK[..., 0], 0, 2))
        return row_BTJ, flat(weight_HBTK)

    def flops(self) -> float:
        """Operations a token of queries and scores; sorting is not counted."""
        return projection_flops(self) + 2.0 * math.prod(self.keys.shape)


def _scores(q_HPBTK: jax.Array, keys_HPNK: jax.Array) -> jax.Array:
    """Products of all queries and the keys of their halves, `[H, P, B, T, N]`, float32."""
    if sharding.active() is not None:  # lanes and tokens that are split cannot be made one axis
        wide = accumulation_dtype(q_HPBTK)
        return jnp.einsum("hpbtk,hpnk->hpbtn", q_HPBTK, keys_HPNK, preferred_element_type=wide)
    q_HPFK = q_HPBTK.reshape(*q_HPBTK.shape[:2], -1, q_HPBTK.shape[-1])
    return rows_dot_rows(q_HPFK, keys_HPNK).reshape(*q_HPBTK.shape[:-1], -1)


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j) in two falling lists whose sums can be among the `count` largest."""
    i, j = np.indices((count, count)).reshape(2, -1)
    few = (i + 1) * (j + 1) <= count
    return i[few], j[few]


def read_table(table_NV: jax.Array, index_BTJ: jax.Array, weight_BTJ: jax.Array) -> jax.Array:
    """`sum_rows` with lanes: float32 `[B, T, V]`."""
    reads = index_BTJ.shape[-1]
    y = sum_rows(table_NV, index_BTJ.reshape(-1, reads), weight_BTJ.reshape(-1, reads))
    return y.reshape(*index_BTJ.shape[:2], -1)


class ProductKeysModule(LayerModule):
    """y_t = sum over heads of sum_r weight_r table_r, rows r and weights from `KeySearch`.

    State: none; the table is a parameter, `[keys^2, D]`, shared by the heads.
    Source: arXiv:1907.05242, Sec. 3.
    Differs from paper: a query is normalised by the root mean square of its own half; there, by
    the mean and variance of each channel over the batch, through which later tokens and other
    texts would reach every output. The table has no weight decay, as a step does not read most of
    its rows, and the learning rate of the rest unless `optimizer.table_rate` says otherwise.
    """

    def __init__(self, config: ProductKeys, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.search = KeySearch(config, d_model, norm_keys=False, rngs=rngs)
        table = normal(rngs, (config.keys**2, d_model), d_model**-0.5)
        self.table = nnx.Param(table, axes=("rows", "embed"))

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def __call__(
        self,
        state: tuple[()],
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
        shared: nnx.Module | None,
    ) -> tuple[tuple[()], Float[Array, "B T D"]]:
        return (), read_table(self.table[...], *self.search(x_BTD)).astype(x_BTD.dtype)

    def memory_report(self, segment: int = 1024, state: tuple[()] | None = None) -> MemoryReport:
        reads = 2.0 * self.config.heads * self.config.top_k * self.table.shape[1]
        return MemoryReport(0, self.search.flops() + reads, 0.0, {})
