"""Associative recurrent memory (ARMT): a matrix in every layer, written once a segment."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import check_at_least
from memjax.layers import Linear, normal
from memjax.memory.base import LayerPart, SegmentMemory, SegmentModule
from memjax.mixers.base import MemoryReport, projection_flops, state_bytes

EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARMT(SegmentMemory):
    """slots: tokens behind every segment, which write. memory_size: channels of keys and queries.

    order: products of neighbours in the features of a key, of which it has 2 order memory_size.
    """

    kind: ClassVar[str] = "armt"
    slots: int = 16
    memory_size: int = 32
    order: int = 3

    def __post_init__(self):
        check_at_least(self, 1, "slots", "segment", "memory_size", "order")

    @property
    def added(self) -> int:
        return self.slots


class ARMTModule(SegmentModule):
    """The layers read [segment, slots]; what they make of the slots, each writes into its matrix.

    The slots are learned and the same for every segment; what is kept is in `ARMTLayer`.
    Source: arXiv:2407.04841, Sec. 2.
    """

    def __init__(self, config: ARMT, d_model: int, *, rngs: nnx.Rngs):
        self.slots = config.slots
        self.tokens = nnx.Param(normal(rngs, (config.slots, d_model)), axes=("slots", "embed"))

    @staticmethod
    def layer_part(config: ARMT, d_model: int, *, rngs: nnx.Rngs) -> LayerPart:
        return ARMTLayer(config, d_model, rngs=rngs)

    def initial(self) -> Any:
        return ()

    def wrap(self, memory: Any, x_BCD: jax.Array) -> jax.Array:
        tokens_MD = self.tokens[...].astype(x_BCD.dtype)
        tokens_BMD = jnp.broadcast_to(tokens_MD, (x_BCD.shape[0], *tokens_MD.shape))
        return jnp.concatenate([x_BCD, tokens_BMD], 1)

    def unwrap(self, memory: Any, h_BLD: jax.Array) -> tuple[Any, jax.Array]:
        return memory, h_BLD[:, : -self.slots]


class AssociativeState(NamedTuple):
    """What a layer has written, and how much of it lies in each feature."""

    memory_BFD: Float[Array, "B F D"]
    total_BF: Float[Array, "B F"]


class ARMTLayer(LayerPart):
    """A matrix A with a normaliser z, read by all tokens before a layer.

    read:   x_t += phi(q) A / (phi(q) . z + eps)                           q = W_q x_t
    write:  A += sum_m beta phi(k)^T (v - phi(k) A / (phi(k) . z + eps))    z += sum_m gamma phi(k)
            beta = sigmoid(w x + b)    gamma = clip(1 - phi(k) . z / (|phi(k)|^2 + eps), 0, 1)

    over the outputs x_m of the layer for the slots, k = W_k x_m, v = W_v x_m, with A and z as they
    were before the segment. No gradient goes through gamma. phi joins, for j from 1 to `order`, r
    times r shifted by j, with r = relu([x, -x]) (DPFP). A and z are 0 at the start of a document,
    where reading gives 0 and writing stores v itself; W_v starts at 0, so that a model starts as
    the one without. The gradient flows through all segments that a training step reads.

    Nothing bounds A, here as in the paper and the code of its authors. Slots are written at once:
    of n with one key, of which z has it once, each corrects all of its error, which becomes
    1 - n beta of what it was. And where phi(k) . z is no less than |phi(k)|^2, gamma is 0, though
    some features of k may not be in z at all: they are written into A alone, and a query of these
    alone gets them times 1 / eps. In training at a rate of 3e-3, A of single documents jumped from
    0.6 to 18 and to 410 within a few steps, and one run ended with losses that were not finite.
    Where it happens, lower the learning rate (the paper's is 1e-4) or the number of slots.
    State: A, F x D, and z, F, float32, F = 2 order memory_size, a layer.
    Source: arXiv:2407.04841, Eqs. 1-6.
    """

    def __init__(self, config: ARMT, d_model: int, *, rngs: nnx.Rngs):
        self.slots, self.order, self.d_model = config.slots, config.order, d_model
        self.share = config.slots / (config.segment + config.slots)
        size = config.memory_size
        self.features_size = 2 * config.order * size
        self.query = Linear(d_model, size, rngs=rngs, axes=("rank", "embed"))
        self.key = Linear(d_model, size, rngs=rngs, axes=("rank", "embed"))
        self.value = Linear(d_model, d_model, rngs=rngs, axes=("hidden", "embed"), std=0.0)
        self.rate = Linear(d_model, 1, rngs=rngs, axes=("head", "embed"), bias=True)

    def init_state(self, batch: int) -> AssociativeState:
        total_BF = jnp.zeros((batch, self.features_size), jnp.float32)
        memory_BFD = jnp.zeros((*total_BF.shape, self.d_model), jnp.float32)
        return AssociativeState(memory_BFD, total_BF)

    def read(self, state: AssociativeState, x_BLD: jax.Array) -> jax.Array:
        return recall(state, self._features(self.query(x_BLD))).astype(x_BLD.dtype)

    def write(self, state: AssociativeState, x_BLD: jax.Array) -> AssociativeState:
        x_BMD = x_BLD[:, -self.slots :]
        phi_BMF = self._features(self.key(x_BMD))
        error_BMD = self.value(x_BMD).astype(jnp.float32) - recall(state, phi_BMF)
        rate_BM1 = jax.nn.sigmoid(self.rate(x_BMD).astype(jnp.float32))
        known_BM = jnp.einsum("bmf,bf->bm", phi_BMF, state.total_BF)
        share_BM = known_BM / (jnp.sum(phi_BMF * phi_BMF, -1) + EPS)
        new_BM = jax.lax.stop_gradient(jnp.clip(1 - share_BM, 0, 1))
        return AssociativeState(
            state.memory_BFD + jnp.einsum("bmf,bmd->bfd", phi_BMF, rate_BM1 * error_BMD),
            state.total_BF + jnp.einsum("bm,bmf->bf", new_BM, phi_BMF),
        )

    def memory_report(self, state: AssociativeState | None = None) -> MemoryReport:
        recall = 2.0 * self.features_size * self.d_model
        write = 2 * recall + projection_flops(self) - projection_flops(self.query)
        flops = recall + projection_flops(self.query) + self.share * write
        told = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BFD)}
        return MemoryReport(state_bytes(self), flops, (1 + 2 * self.share) * recall, told)

    def _features(self, x: jax.Array) -> jax.Array:
        return features(x.astype(jnp.float32), self.order)


def features(x: Float[Array, "*lead K"], order: int) -> Float[Array, "*lead F"]:
    """DPFP: r * shift(r, j) for j = 1 .. order, r = relu([x, -x]); F = 2 order K."""
    r = jax.nn.relu(jnp.concatenate([x, -x], -1))
    return jnp.concatenate([r * jnp.roll(r, j, -1) for j in range(1, order + 1)], -1)


def recall(state: AssociativeState, phi_BLF: jax.Array) -> jax.Array:
    """phi A / (phi . z + eps)."""
    total_BL1 = jnp.einsum("blf,bf->bl", phi_BLF, state.total_BF)[..., None]
    return jnp.einsum("blf,bfd->bld", phi_BLF, state.memory_BFD) / (total_BL1 + EPS)
