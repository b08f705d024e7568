"""The contract that every sequence mixer obeys.

    state, y_BTD = mixer(state, x_BTD, reset_BT)
    state = mixer.init_state(batch)

State comes first, so a mixer is the body of a `jax.lax.scan` over segments. A state is a
`NamedTuple` of arrays of fixed shape with lanes on axis 0. `reset_BT` true restores `init_state`
before that token. One step of generation is a segment of one token: there is no other mode.
The laws (any split equals the whole, causality, isolated documents, ...) are in
`tests/test_mixer_laws.py` and run on every entry of `memjax.mixers.MIXERS`.
"""

import dataclasses
import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

State = Any
"""A NamedTuple of arrays (or a nest of them), lanes on axis 0."""


class MemoryReport(NamedTuple):
    """What a mixer costs and, where it can tell, what its memory holds.

    state_bytes: bytes of carried state a sequence.
    flops_per_token: forward floating-point operations a token, in a segment started from the
        initial state, averaged over its tokens; a multiply-add counts two.
    recurrence_flops: the part of flops_per_token that updates and reads a recurrent state, at the
        cost of the token loop. Model FLOPs utilisation does not count it (see `memjax.bench`).
    telemetry: named scalars of the state given, if one was.
    """

    state_bytes: int
    flops_per_token: float
    recurrence_flops: float
    telemetry: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of the configs of mixers; `kind` is the key in `MIXERS`."""

    kind: ClassVar[str]

    def check_width(self, d_model: int) -> None:
        """Raise a FieldError if the mixer cannot have this width."""


class SequenceMixer(nnx.Module):
    """A token mixer with explicit state.

    splits_tokens: whether it looks along tokens through `memjax.ops`, `ShortConv` and `positions`
        alone, so that it runs where tokens are split over devices. Any other mixer runs there too,
        one shard after the other.
    """

    splits_tokens: ClassVar[bool] = False

    @abstractmethod
    def init_state(self, batch: int) -> State:
        """The state before the first token of a document, for `batch` lanes."""

    @abstractmethod
    def __call__(self, state: State, x_BTD: jax.Array, reset_BT: jax.Array):
        """Mix a segment: returns the state after it and y_BTD."""

    def auxiliary_loss(self, state: State, x_BTD: jax.Array, reset_BT: jax.Array) -> jax.Array:
        """What training adds to the loss for this segment, weighted, a float32 scalar.

        The model takes the mean over its layers that have one.
        """
        return jnp.zeros((), jnp.float32)

    @staticmethod
    def couple(params: dict) -> dict:
        """The parameters of all layers of this mixer, stacked in order of depth, as they use them.

        For layers that know their depth; the others leave it as it is.
        """
        return params

    @abstractmethod
    def memory_report(self, segment: int = 1024, state: State | None = None) -> MemoryReport:
        """Cost for segments of `segment` tokens, and telemetry of `state`."""


def state_bytes(mixer: Any) -> int:
    """Bytes of state a sequence, from the shapes that `mixer.init_state` really makes."""
    # Apart from its parameters, of which there may be shapes alone, and which init_state may read.
    definition, params = nnx.split(mixer)
    state = jax.eval_shape(lambda params: nnx.merge(definition, params).init_state(1), params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def projection_flops(module: nnx.Module) -> float:
    """Two operations a token for each weight of a matrix in `module`."""
    found = jax.tree.leaves(
        nnx.state(module, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    axes = ([name for name in param.get_metadata()["axes"] if name != "pair"] for param in found)
    return 2.0 * sum(math.prod(param.shape) for param, names in zip(found, axes) if len(names) == 2)


def tokens_seen(window: int, segment: int) -> float:
    """Keys in reach of a query, its own counted, the mean over a segment from the start."""
    reach = min(window, segment)
    return (reach * (reach + 1) / 2 + (segment - reach) * reach) / segment
