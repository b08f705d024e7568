"""Memory+ (Memory Layers at Scale): layers that read one large table, each by its own keys."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, normal
from memjax.memory.base import LayerMemory, LayerModule
from memjax.memory.product_keys import KeySearch, check_search, read_table
from memjax.mixers.base import MemoryReport, projection_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlus(LayerMemory):
    """keys, heads, top_k, query_size: as in `ProductKeys`.

    value_size: channels of a row of the table; None is d_model.
    """

    kind: ClassVar[str] = "memory_plus"
    replaces_mlp: ClassVar[bool] = True
    keys: int = 128
    heads: int = 4
    top_k: int = 32
    query_size: int = 128
    value_size: int | None = None

    def __post_init__(self):
        check_search(self)
        check_at_least(self, 1, "value_size")


class Table(nnx.Module):
    """The rows that all layers read."""

    def __init__(self, rows: int, size: int, *, rngs: nnx.Rngs):
        self.values = nnx.Param(normal(rngs, (rows, size), size**-0.5), axes=("rows", "value"))


class MemoryPlusModule(LayerModule):
    """y = W_2 (m * silu(W_1 x)),  m_t = sum over heads of sum_r weight_r table_r

    with rows r and weights from a `KeySearch` whose queries and keys are normalised. W_1, W_2,
    queries and keys belong to the layer, the table to all layers.
    State: none; the table is a parameter, `[keys^2, V]`.
    Source: arXiv:2412.09764, Sec. 3 (Memory+).
    Differs from paper: queries and keys are always normalised, each half by its root mean square
    with a learned scale, and products divided by sqrt(query_size) (there: where training is not
    stable without). Weight decay and learning rate of the table are as in `ProductKeysModule`.
    """

    def __init__(self, config: MemoryPlus, d_model: int, *, rngs: nnx.Rngs):
        self.config, size = config, config.value_size or d_model
        self.search = KeySearch(config, d_model, norm_keys=True, rngs=rngs)
        self.gate = Linear(d_model, size, rngs=rngs, axes=("hidden", "embed"))
        self.out = Linear(size, d_model, rngs=rngs, axes=("embed", "hidden"))

    @staticmethod
    def shared(config: MemoryPlus, model: Any, *, rngs: nnx.Rngs) -> Table:
        return Table(config.keys**2, config.value_size or model.d_model, rngs=rngs)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def __call__(
        self,
        state: tuple[()],
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
        shared: nnx.Module | None,
    ) -> tuple[tuple[()], Float[Array, "B T D"]]:
        assert isinstance(shared, Table)
        memory_BTV = read_table(shared.values[...], *self.search(x_BTD)).astype(x_BTD.dtype)
        return (), self.out(memory_BTV * jax.nn.silu(self.gate(x_BTD)))

    def memory_report(self, segment: int = 1024, state: tuple[()] | None = None) -> MemoryReport:
        reads = 2.0 * self.config.heads * self.config.top_k * self.out.weight.shape[1]
        gated = projection_flops(self.gate) + projection_flops(self.out)
        return MemoryReport(0, self.search.flops() + gated + reads, 0.0, {})
